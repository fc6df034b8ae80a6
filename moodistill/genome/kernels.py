"""Kernel genes: which centred part of a convolution's kernel stays.

Per spatial axis, in their order (rows before columns), one bit for every ring of taps that may go.
Dropping a ring takes the outermost tap on both sides, so a 7-tap axis with three rings keeps 7, 5,
3 or 1 taps. The number of True bits counts, wherever they stand: as many rings stay. In the
canonical form the True bits come first.
"""

from __future__ import annotations

import numpy as np


def read_kernel(
    bits: np.ndarray, kernel: tuple[int, ...], rings: tuple[int, ...]
) -> tuple[int, ...]:
    """Taps that stay by axis.

    Args:
        bits: `(sum of rings,)` of the gene.
        kernel: taps of the teacher's kernel by axis.
        rings: rings that may go by axis.
    """
    taps = []
    start = 0
    for size, count in zip(kernel, rings, strict=True):
        gone = count - int(np.count_nonzero(bits[start : start + count]))
        taps.append(size - 2 * gone)
        start += count
    return tuple(taps)


def write_kernel(
    bits: np.ndarray, kernel: tuple[int, ...], rings: tuple[int, ...], taps: tuple[int, ...]
) -> None:
    """Set a gene's bits in place to the canonical form of `taps`, the inverse of `read_kernel`."""
    start = 0
    for size, count, left in zip(kernel, rings, taps, strict=True):
        kept = count - (size - left) // 2
        bits[start : start + kept] = True
        bits[start + kept : start + count] = False
        start += count
