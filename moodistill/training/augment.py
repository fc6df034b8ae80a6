"""Random views of training pictures."""

from __future__ import annotations

import numpy as np


def augment(images: np.ndarray, pad: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Random crop with reflected padding and horizontal flip of uint8 `(N, H, W, C)`."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    shifts = rng.integers(0, 2 * pad + 1, size=(2, count, 1))
    top, left = shifts[0] + np.arange(height), shifts[1] + np.arange(width)
    if flip:
        turned = rng.random(count) < 0.5
        left[turned] = left[turned, ::-1]
    return padded[np.arange(count)[:, None, None], top[:, :, None], left[:, None, :]]
