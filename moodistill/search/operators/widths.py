"""Shared by sampling and mutation: choosing which channels of a group stay."""

from __future__ import annotations

import numpy as np

from moodistill.genome.layout import Group


def noisy_top(
    group: Group, count: int, noise: float, rng: np.random.Generator, kept: np.ndarray | None = None
) -> np.ndarray:
    """`(size,)` mask of the `count` channels of highest log-importance plus Gumbel noise.

    Top-k of Gumbel-perturbed scores draws without replacement with probabilities that follow
    the importance (Kool et al. 2019). Channels in `kept` are preferred, so that a mask shrinks
    and grows around what it has.
    """
    score = group.standardised_importance + noise * rng.gumbel(size=group.size)
    if kept is not None:
        score = score + np.where(kept, 3.0, 0.0)
    count = max(1, count)
    if count >= group.size:
        return np.ones(group.size, dtype=bool)
    mask = np.zeros(group.size, dtype=bool)
    mask[np.argpartition(-score, count - 1)[:count]] = True
    return mask


def snap(width: float, size: int, step: int) -> int:
    """The nearest width in whole steps, or the full size, at least one step (or the full size)."""
    stepped = min(size, max(step, round(width / step) * step))
    return int(size if abs(size - width) < abs(stepped - width) else stepped)
