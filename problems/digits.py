"""A small residual CNN on scikit-learn's digits: the example that needs no network."""

from pathlib import Path

import torch
from torch import nn

from moodistill.data.digits import load_digits
from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.teacher.task import Task, TrainConfig


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
    )


class DigitsNet(nn.Module):
    """Stem, two residual blocks, two plain convolutions, a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 32, stride=2)
        self.block1a = conv_bn(32, 32)
        self.block1b = conv_bn(32, 32)
        self.block2a = conv_bn(32, 64, stride=2)
        self.block2b = conv_bn(64, 64)
        self.shortcut2 = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        self.conv3 = conv_bn(64, 64)
        self.conv4 = conv_bn(64, 64)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, 1, 32, 32)` to logits `(N, 10)`."""
        x = self.relu(self.stem(x))
        x = self.relu(self.block1b(self.relu(self.block1a(x))) + x)
        x = self.relu(self.block2b(self.relu(self.block2a(x))) + self.shortcut2(x))
        x = self.relu(self.conv4(self.relu(self.conv3(x))))
        x = torch.flatten(self.pool(x), 1)
        return self.output(self.relu(self.hidden(x)))


def load_data(data_dir: Path | None) -> ImageData:
    """The digits that come with scikit-learn."""
    if data_dir is not None:
        raise UserError(
            f"`data_dir` is {data_dir}, but scikit-learn brings the digits; leave it out"
        )
    return load_digits()


TASK = Task(
    name="digits",
    build=DigitsNet,
    load_data=load_data,
    weights=Path(__file__).parent / "teachers" / "digits.safetensors",
    train=TrainConfig(phases=((12, 32),), batch_size=64, lr=0.1, pad=2, flip=False),
)
