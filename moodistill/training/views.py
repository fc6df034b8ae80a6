"""Random views of training inputs, their targets moved with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from moodistill.data.images import ImageData
from moodistill.training.augment import augment


def view(
    data: ImageData,
    inputs: np.ndarray,
    targets: Mapping[str, np.ndarray],
    shift: int,
    flip: bool,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Normalised inputs `(B, C, *size)` and targets by name, as a student sees them.

    Images are shifted by up to `shift` pixels and, if `flip`, mirrored, and so are maps of their
    size among the targets; beside maps of another size they stay as they are. Only images: what a
    shift or a mirror does to other inputs is not known.
    """
    size = data.input_shape[1:]
    maps = {name for name, array in targets.items() if array.ndim > 2}
    fit = all(targets[name].shape[-len(size) :] == size for name in maps)
    if data.pictures and fit:
        for name in maps:
            targets = {**targets, name: _moved(targets[name], shift, flip, copy.deepcopy(rng))}
        inputs = augment(inputs, shift, flip, rng)
    named = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in targets.items()}
    return data.normalise(inputs), named


def _moved(maps: np.ndarray, shift: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Maps `(B, H, W)` or `(B, C, H, W)`, moved as `augment` moves images with this generator."""
    if maps.ndim == 3:
        return augment(maps[..., None], shift, flip, rng)[..., 0]
    return np.moveaxis(augment(np.moveaxis(maps, 1, -1), shift, flip, rng), -1, 1)
