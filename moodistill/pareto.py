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


def near_front(objectives: np.ndarray, slack: float) -> np.ndarray:
    """Rows of `(n, 3)` that no row dominates which is more than `slack` (a fraction) faster.

    `(n,)` bool: the front, and those whose place in it hangs on a small difference in latency.
    """
    values = np.asarray(objectives, dtype=float)
    mask = np.zeros(len(values), dtype=bool)
    for index, row in enumerate(values):
        faster = values[:, 2] < row[2] * (1.0 - slack)
        mask[index] = not (faster & (values[:, :2] <= row[:2]).all(axis=1)).any()
    return mask


def normalise(objectives: np.ndarray) -> np.ndarray:
    """`(n, 3)` [error, parameters, latency] scaled to 0..1, the last two on a log2 scale."""
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
    """The row that bulges furthest towards the ideal `(0, 0, 0)`; see `choose.knee`."""
    corners = unit[list(dict.fromkeys(_extremes(unit)))]
    bulge = np.zeros(len(unit))
    normal = np.zeros(3)
    if len(corners) == 3:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    if np.linalg.norm(normal) > _FLAT:
        normal /= np.linalg.norm(normal)
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
    # Parameters and latency fall together, so the error counts as much as both.
    distance = np.linalg.norm(unit * (math.sqrt(2.0), 1.0, 1.0), axis=1).round(9)
    return int(np.lexsort((unit[:, 0], distance))[0])


def pick_finalists(
    objectives: np.ndarray, count: int, min_accuracy: float | None = None
) -> list[int]:
    """Rows of `(n, 3)` minimised [error, parameters, latency] that are worth distilling.

    The most accurate, the knee, the fastest and the smallest of the non-dominated rows, then always
    the row farthest from those picked (normalised, parameters and latency on a log scale), up to
    `count`. Rows below `min_accuracy` are left out if any other row is left. Deterministic; fewer
    than `count` if the front is smaller.
    """
    if count < 1:
        raise UserError(f"{count} finalists are too few; expected at least 1")
    values = np.asarray(objectives, dtype=float).reshape(-1, 3)
    front = np.flatnonzero(non_dominated(values) & np.isfinite(values).all(axis=1))
    if min_accuracy is not None:
        hopeful = front[1.0 - values[front, 0] >= min_accuracy]
        front = hopeful if len(hopeful) else front
    if len(front) == 0:
        return []
    unit = normalise(values[front])
    accurate, smallest, fastest = _extremes(unit)
    picked = list(dict.fromkeys([accurate, knee_index(unit), fastest, smallest]))[:count]
    while len(picked) < min(count, len(front)):
        gaps = np.linalg.norm(unit[:, None] - unit[None, picked], axis=2).min(axis=1)
        gaps[picked] = -1.0
        picked.append(int(np.argmax(gaps)))
    return [int(front[index]) for index in picked]
