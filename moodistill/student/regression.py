"""Ridge regression of what a layer should give on what it may read, and its best rank.

A layer of the student reads patches `p` `(n, k)` where the teacher's gave `y` `(n, o)`, before its
norm:

    [W, b] = argmin |y - W p - b|^2 / n + ridge * |W - W0|^2

with `W0` the sliced weights (He et al. 2017 regress outputs on channels in this way). Through `r`
paths only, the best `W` is its projection on the `r` directions in which its fitted outputs vary
most (reduced-rank regression; Zhang et al. 2015, "Accelerating very deep convolutional networks").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moodistill.accelerator import in_double

BLOCK = (
    512  # columns; of a symmetric product only the blocks on and above the diagonal are computed
)


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 matrices in bfloat16 where the processor gains, summed in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gram_matrix(rows: torch.Tensor) -> torch.Tensor:
    """`rows^T rows` `(k, k)` of `(n, k)`."""
    width = rows.shape[1]
    if width <= BLOCK:
        return rows.T @ rows
    result = rows.new_empty(width, width)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        strip = rows[:, start:end].T @ rows[:, start:]
        result[start:end, start:] = strip
        result[start:, start:end] = strip.T
    return result


def regress(
    patches: torch.Tensor,
    outputs: torch.Tensor,
    anchor: torch.Tensor,
    centred: bool,
    ridge: float,
    scarce: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(o, k)` and constant `(o,)` that estimate outputs from patches.

    Args:
        patches: `(n, k)`, centred in place if `centred`.
        outputs: `(n, o)`.
        anchor: `(o, k)` weights that the ridge pulls towards.
        centred: whether a constant may be taken; otherwise it is 0.
        ridge: relative to the mean diagonal of the patches' second moments.
        scarce: added to `ridge` times `(k / n)^2`.
    """
    count, width = patches.shape
    zero = patches.new_zeros(())
    mean, level = (patches.mean(0), outputs.mean(0)) if centred else (zero, zero)
    if centred:
        patches -= mean  # before any product in bfloat16
    with fast_products():
        gram = gram_matrix(patches).div_(count)
        cross = (patches.T @ (outputs - level)).div_(count)
    pull = gram.diagonal().mean().clamp_min(1e-12) * (ridge + scarce * (width / count) ** 2)
    gram.diagonal().add_(pull)
    weight = _solve(gram, cross.add_(anchor.T, alpha=float(pull))).T
    constant = level - weight @ mean if centred else weight.new_zeros(len(weight))
    return weight, constant


def _solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """`gram^-1 cross`; in float32, which the ridge makes good enough, unless that fails."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    return solve_exactly(gram, cross) if failed else torch.cholesky_solve(cross, factor)


def solve_exactly(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """`gram^-1 cross`, solved in float64; NaN where `gram` has no Cholesky factor."""
    factor, failed = torch.linalg.cholesky_ex(in_double(gram))
    if failed:
        return torch.full_like(cross, torch.nan, dtype=torch.float32)
    return torch.cholesky_solve(in_double(cross), factor).float().to(cross.device)


def reduce_rank(
    weight: torch.Tensor, patches: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `(o, r)` and `(r, k)` of the best rank-`r` weights for what `weight` fits.

    Args:
        weight: `(o, k)` solved weights.
        patches: `(n, k)`, centred where a constant is taken.
        rank: r.
    """
    fitted = patches @ weight.T
    _, vectors = torch.linalg.eigh(in_double(fitted.T @ fitted))
    basis = vectors[:, -rank:].flip(1).float().to(weight.device)
    return basis, basis.T @ weight
