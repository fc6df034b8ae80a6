"""Shared by sampling and mutation: which channels of a group stay, which ranks are worth having."""

from __future__ import annotations

import math

import numpy as np

from moodistill.genome.kernels import read_kernel
from moodistill.genome.layout import GenomeLayout, Group, Node
from moodistill.genome.ranks import saves


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


def kept_taps(layout: GenomeLayout, genome: np.ndarray, node: Node) -> tuple[int, ...]:
    """Taps by axis of a convolution; none of a linear layer."""
    if node.path not in layout.kernels:
        return node.kernel
    bits = layout.view(genome, f"kernel/{node.path}")
    return read_kernel(bits, node.kernel, node.rings)


def useful_ranks(layout: GenomeLayout, genome: np.ndarray, layer: Node, step: int) -> list[int]:
    """Ranks in whole steps below the full one that make a layer smaller, ascending.

    Widths are those of the masks: what repair will change, and bypasses before the layer, are not
    looked at.
    """
    source = layout.by_name[layer.inputs[0]]
    inputs, outputs = (_channels(layout, genome, node) for node in (source, layer))
    inputs *= source.repeat * math.prod(kept_taps(layout, genome, layer))
    return [rank for rank in layer.ranks if rank % step == 0 and saves(rank, inputs, outputs)]


def _channels(layout: GenomeLayout, genome: np.ndarray, node: Node) -> int:
    total = 0
    for name, lanes in zip(node.groups, node.lanes, strict=True):
        place = layout.slices.get(f"mask/{name}")
        kept = layout.groups[name].size if place is None else int(np.count_nonzero(genome[place]))
        total += kept * lanes
    return total
