"""Random views of training images."""

from __future__ import annotations

import numpy as np


def augment(
    images: np.ndarray, pad: int, flip: bool | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Random crop with reflected padding, and horizontal flip, of uint8 `(N, H, W, C)`.

    `flip` True mirrors each with probability 0.5; an array `(N,)` of bool says which are mirrored.
    """
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    shifts = rng.integers(0, 2 * pad + 1, size=(2, count, 1))
    top, left = shifts[0] + np.arange(height), shifts[1] + np.arange(width)
    if not isinstance(flip, np.ndarray):
        flip = rng.random(count) < 0.5 if flip else np.zeros(count, bool)
    left[flip] = left[flip, ::-1]
    return padded[np.arange(count)[:, None, None], top[:, :, None], left[:, None, :]]


def alternating_flips(count: int, epoch: int, seed: int) -> np.ndarray:
    """Which of `count` images are mirrored in an epoch: a random half, then the other half.

    So two epochs show every image in both forms, which random flips do only for half of them
    (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
    """
    first = np.random.default_rng([seed, 7]).random(count) < 0.5
    return first ^ bool(epoch % 2)


def cutout(
    images: np.ndarray, size: int, colour: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A square of `size` pixels in one `colour` `(C,)` on each of `(N, H, W, C)`, in place.

    Its centre lies anywhere in the image, so that it may stand over the border (DeVries and
    Taylor 2017).
    """
    count, height, width, _ = images.shape
    y = rng.integers(-size // 2, height - size // 2, size=(count, 1))
    x = rng.integers(-size // 2, width - size // 2, size=(count, 1))
    rows = (np.arange(height) >= y) & (np.arange(height) < y + size)
    columns = (np.arange(width) >= x) & (np.arange(width) < x + size)
    images[rows[:, :, None] & columns[:, None, :]] = colour
    return images
