"""The geometry of a Pareto front: dominance, its knee, and a spread of finalists."""

from __future__ import annotations

import itertools
import math

import numpy as np

from moodistill.errors import UserError

_FLAT = 1e-9


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Which rows of `(n, m)` minimised objectives no other row dominates: `(n,)` bool.

    Of equal rows only the first is kept; a row with a NaN never is.
    """
    values = np.asarray(objectives, dtype=float)
    mask = np.zeros(len(values), dtype=bool)
    if values.size == 0:
        return mask
    usable = np.flatnonzero(~np.isnan(values).any(axis=1))
    # In lexicographic order only an earlier row can dominate a later one.
    _, first = np.unique(values[usable], axis=0, return_index=True)
    kept: list[int] = []
    for index in usable[first]:
        if not (values[kept] <= values[index]).all(axis=1).any():
            kept.append(int(index))
    mask[kept] = True
    return mask


def near_front(objectives: np.ndarray, slack: float, column: int) -> np.ndarray:
    """Rows of `(n, m)` that no row dominates which is better by more than `slack` in `column`.

    `(n,)` bool: the front, and those whose place in it hangs on a small difference (a fraction
    `slack`) in a measured column.
    """
    values = np.asarray(objectives, dtype=float)
    mask = np.zeros(len(values), dtype=bool)
    for index, row in enumerate(values):
        better = (values <= row).all(axis=1) & (values[:, column] < row[column] * (1.0 - slack))
        mask[index] = not better.any()
    return mask


def shrunk(objectives: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`(n, m)` [error, costs...] in the unit cube of a reference `(m,)`, the teacher.

    A cost becomes 1 at the reference's or above, 0 at a 1,024th of it, on a log2 scale.
    """
    smaller = np.log2(reference[None, 1:] / objectives[:, 1:]) / 10.0
    return np.column_stack([objectives[:, 0], 1.0 - np.clip(smaller, 0.0, 1.0)])


def normalise(objectives: np.ndarray) -> np.ndarray:
    """`(n, m)` [error, costs...] scaled to 0..1, the costs on a log2 scale."""
    values = np.array(objectives, dtype=float)
    values[:, 1:] = np.log2(np.maximum(values[:, 1:], 1e-12))
    low = values.min(axis=0)
    span = values.max(axis=0) - low
    return np.where(span > _FLAT, (values - low) / np.where(span > _FLAT, span, 1.0), 0.0)


def _extremes(unit: np.ndarray) -> list[int]:
    """The best row of each objective; among equals the one that is best overall."""
    total = unit.sum(axis=1)
    return [int(np.lexsort((total, unit[:, j]))[0]) for j in range(unit.shape[1])]


def knee_index(unit: np.ndarray) -> int:
    """The row of `(n, m)` that bulges furthest towards the ideal 0; see `choose.knee`."""
    dimensions = unit.shape[1]
    corners = unit[list(dict.fromkeys(_extremes(unit)))]
    bulge = np.zeros(len(unit))
    normal = np.zeros(dimensions)
    if len(corners) == dimensions:
        # What is perpendicular to all differences of the corners, if they span a hyperplane.
        _, spread, directions = np.linalg.svd(corners[1:] - corners[0])
        if spread.min() > _FLAT:
            normal = directions[-1]
    if normal.any():
        offset = float(normal @ corners[0])
        # Positive on the ideal's side of the plane; if the ideal lies in it, below the plane.
        side = offset if abs(offset) > _FLAT else float(normal.sum())
        bulge = (offset - unit @ normal) * (1.0 if side >= 0 else -1.0)
    elif len(corners) > 1:
        pairs = itertools.combinations(corners, 2)
        start, end = max(pairs, key=lambda pair: float(np.linalg.norm(pair[1] - pair[0])))
        along = (end - start) / np.linalg.norm(end - start)
        across = (unit - start) - np.outer((unit - start) @ along, along)
        bulge = np.linalg.norm(across, axis=1) * np.where(across.sum(axis=1) < 0, 1.0, -1.0)
    best = int(np.argmax(bulge))
    if bulge[best] > _FLAT:
        return best
    # The costs fall together, so the error counts as much as all of them.
    weights = np.array([math.sqrt(dimensions - 1), *[1.0] * (dimensions - 1)])
    distance = np.linalg.norm(unit * weights, axis=1).round(9)
    return int(np.lexsort((unit[:, 0], distance))[0])


def pick_finalists(
    objectives: np.ndarray, count: int, min_accuracy: float | None = None
) -> list[int]:
    """Rows of `(n, m)` minimised [error, costs...] that are worth distilling.

    The most accurate, the knee, and the best in each cost (the last one first) of the non-dominated
    rows, then always the row farthest from those picked (normalised, costs on a log scale), up to
    `count`. Rows below `min_accuracy` are left out; if all are, the most accurate is taken alone.
    Deterministic; fewer than `count` if not so many are left.
    """
    if count < 1:
        raise UserError(f"{count} finalists are too few; expected at least 1")
    values = np.asarray(objectives, dtype=float)
    if len(values) == 0:
        return []
    front = np.flatnonzero(non_dominated(values) & np.isfinite(values).all(axis=1))
    if len(front) == 0:
        return []
    if min_accuracy is not None:
        hopeful = front[1.0 - values[front, 0] >= min_accuracy]
        front = hopeful if len(hopeful) else front[[np.argmin(values[front, 0])]]
    unit = normalise(values[front])
    accurate, *cheapest = _extremes(unit)
    picked = list(dict.fromkeys([accurate, knee_index(unit), *reversed(cheapest)]))[:count]
    while len(picked) < min(count, len(front)):
        gaps = np.linalg.norm(unit[:, None] - unit[None, picked], axis=2).min(axis=1)
        gaps[picked] = -1.0
        picked.append(int(np.argmax(gaps)))
    return [int(front[index]) for index in picked]
