"""Rank genes: through how many paths a layer's inputs reach its outputs.

A layer of rank `r` is two: all inputs to `r` values, and these to all outputs. A gene offers a few
ranks below the full one, closer together where they are small; the number of True bits counts,
wherever they stand: `c` of them say the rank at place `c`, all of them say that the layer stays
one. In the canonical form the True bits come first.
"""

from __future__ import annotations

import numpy as np

# Ranks are multiples of the first number up to the second: about as many for every doubling.
SPACING = ((8, 64), (16, 128), (32, 256), (64, 512), (128, 1 << 30))


def saves(rank: int, inputs: int, outputs: int) -> bool:
    """Whether a layer of this rank is smaller than the whole one.

    `inputs` are values that an output is summed of, taps included. Both parts run on the output's
    pixels, so that what holds for parameters holds for multiply-accumulates.
    """
    return rank * (inputs + outputs) < inputs * outputs


def rank_levels(inputs: int, outputs: int) -> tuple[int, ...]:
    """The ranks, ascending, that a gene of a layer offers: all that save anything at full width."""
    levels: list[int] = []
    low = 0
    for step, high in SPACING:
        for rank in range(low + step, high + 1, step):
            if not saves(rank, inputs, outputs):
                return tuple(levels)
            levels.append(rank)
        low = high
    return tuple(levels)


def read_rank(bits: np.ndarray, levels: tuple[int, ...], step: int = 1) -> int | None:
    """The rank that a gene says, in whole multiples of `step`; None where the layer stays one."""
    count = int(np.count_nonzero(bits))
    return None if count == len(levels) else nearest_rank(levels[count], levels, step)


def nearest_rank(rank: float, levels: tuple[int, ...], step: int = 1) -> int | None:
    """The level nearest to `rank` that is a multiple of `step`; None if there is none."""
    whole = [level for level in levels if level % step == 0]
    return min(whole, key=lambda level: abs(level - rank), default=None)


def write_rank(bits: np.ndarray, levels: tuple[int, ...], rank: int | None) -> None:
    """Set a gene's bits in place to the canonical form of one of its ranks, or of none."""
    bits[:] = True
    if rank is not None:
        bits[levels.index(rank) :] = False
