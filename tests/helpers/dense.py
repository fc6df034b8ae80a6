"""Networks whose outputs are maps, several, or of signals; and inputs for them."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def block(inputs, outputs, axes=2, stride=1):
    """Convolution, norm and activation of any number of axes."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes]
    return nn.Sequential(conv(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels; up again by a transposed convolution and by interpolation."""

    def __init__(self, channels=3, classes=3, width=16, axes=2):
        super().__init__()
        pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[axes]
        up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[axes]
        last = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.a, self.b = block(channels, width, axes), block(width, 2 * width, axes)
        self.c, self.pool = block(2 * width, 2 * width, axes), pool(2)
        self.up = up(2 * width, width, 2, 2)
        self.d, self.e = block(3 * width, 2 * width, axes), block(3 * width, width, axes)
        self.out = last(width, classes, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(self.pool(a))
        d = self.d(torch.cat([self.up(self.c(self.pool(b))), b], 1))
        return self.out(self.e(torch.cat([F.interpolate(d, scale_factor=2), a], 1)))


class TwoHeads(nn.Module):
    """A map and a vector, in a dict."""

    def __init__(self, width=32):
        super().__init__()
        self.stem, self.body = block(3, width, stride=2), block(width, width)
        self.map, self.vector = nn.Conv2d(width, 2, 1), nn.Linear(width, 4)

    def forward(self, x):
        y = self.body(self.stem(x))
        return {"map": self.map(y), "vector": self.vector(y.mean((2, 3)))}


def with_statistics(network, inputs, seed=0):
    """The network in eval mode, its norms far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.data.uniform_(0.6, 1.4, generator=generator)
        norm.bias.data.uniform_(-0.3, 0.3, generator=generator)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(inputs)
    return network.eval()


def signals(count, seed, length=64):
    """Two channels of noisy waves, and which of three frequencies they have."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    place = np.arange(length) / length
    waves = np.array([2, 5, 9])[labels][:, None] * place + rng.random((count, 1))
    first = np.sin(2 * np.pi * waves) + 0.3 * rng.standard_normal((count, length))
    return np.stack([first, np.roll(first, 3, 1)], 1).astype(np.float32), labels


def rectangles(count, seed, size=16):
    """Pictures `(N, H, W, 3)` uint8 with a red and a green rectangle, and masks `(N, H, W)`."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, size, size, 3))
    masks = np.zeros((count, size, size), np.int64)
    for image, mask in zip(images, masks, strict=True):
        for kind in (1, 2):
            row, column = rng.integers(1, size // 2, 2)
            height, width = rng.integers(size // 4, size // 2, 2)
            place = np.s_[row : row + height, column : column + width]
            mask[place] = kind
            image[(*place, kind - 1)] += 150
    return images.clip(0, 255).astype(np.uint8), masks


def taught(network, inputs, targets, loss=F.cross_entropy, epochs=4, rate=0.05):
    """A few epochs of SGD; back in eval mode."""
    optimizer = torch.optim.SGD(network.train().parameters(), rate, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(inputs), generator=generator).split(25):
            optimizer.zero_grad()
            loss(network(inputs[index]), targets[index]).backward()
            optimizer.step()
    return network.eval()
