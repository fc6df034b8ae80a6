"""Other ways to prepare images for a teacher, tried where it does badly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from moodistill.data.images import ImageData

# Means and deviations of pixels in [0, 1] that networks are commonly trained with, RGB.
USUAL = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's mean and std": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "mean and std 0.5 (pixels from -1 to 1)": ((0.5,) * 3, (0.5,) * 3),
    "pixels from 0 to 1, without mean and std": ((0.0,) * 3, (1.0,) * 3),
    "pixels from 0 to 255, without mean and std": ((0.0,) * 3, (1 / 255,) * 3),
    "pixels from 0 to 255 less ImageNet's mean": ((0.485, 0.456, 0.406), (1 / 255,) * 3),
}
GREY = {"MNIST's mean and std": ((0.1307,), (0.3081,))}
CROPPED = 224 / 256  # the share of a side that Resize(256) and CenterCrop(224) leave


@dataclass(frozen=True)
class Preparation:
    """One way to make an image into a network's input.

    Attributes:
        name: in words.
        mean, std: of each channel of pixels in [0, 1], in the order of the images.
        bgr: whether the channels are turned round once they are normalised.
        crop: whether the middle of an image is seen, as Resize and CenterCrop show it.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False
    crop: bool = False

    @property
    def advice(self) -> str:
        """What a user gives, or does, to have it."""
        parts = []
        if self.bgr:
            parts.append("turn the channels round in the network's forward: x.flip(1)")
        if self.crop:
            parts.append("prepare the images by a crop instead of squashing them")
        if "as it is" not in self.name:
            parts.append(f"give mean {_numbers(self.mean)} and std {_numbers(self.std)}")
        return ", and ".join(parts)

    def data(self, data: ImageData) -> ImageData:
        """The data with this mean and std, in the order in which the network sees channels."""
        step = -1 if self.bgr else 1
        return replace(data, mean=self.mean[::step], std=self.std[::step])

    def pictures(self, images: np.ndarray) -> np.ndarray:
        """uint8 `(N, H, W, C)` with channels and part as this has them."""
        if self.crop:
            images = _middle(images)
        return images[..., ::-1] if self.bgr else images


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _middle(images: np.ndarray) -> np.ndarray:
    """The middle of each image, in the size of the whole."""
    height, width = images.shape[1:3]
    rows, columns = round(height * CROPPED), round(width * CROPPED)
    top, left = (height - rows) // 2, (width - columns) // 2
    pixels = torch.from_numpy(images[:, top : top + rows, left : left + columns].copy())
    large = F.interpolate(
        pixels.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear", antialias=True
    )
    return large.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def other_preparations(data: ImageData) -> Iterator[Preparation]:
    """All but the one that the data have, the usual means and deviations in both orders."""
    channels = len(data.mean)
    kinds = {"the normalisation as it is": (data.mean, data.std)}
    if channels == 3:
        kinds |= USUAL
    else:
        named = USUAL if channels == 4 else {n: k for n, k in USUAL.items() if "'s" not in n} | GREY
        kinds |= {n: (_sized(m, channels), _sized(s, channels)) for n, (m, s) in named.items()}
    seen: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    for name, (mean, std) in kinds.items():
        if any(np.allclose((mean, std), other, atol=2e-3) for other in seen):
            continue
        if seen:  # the first is that of the data
            yield Preparation(name, mean, std)
        seen.append((mean, std))
        if channels == 3:
            yield Preparation(f"BGR and {name}", mean, std, bgr=True)
    yield Preparation(
        "the middle of the images (a crop) and the normalisation as it is",
        data.mean, data.std, crop=True,
    )  # fmt: skip


def _sized(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Of grey images the first one, of those with a fourth channel its mean beside them."""
    return (*values[:channels], *(float(np.mean(values)),) * (channels - len(values)))
