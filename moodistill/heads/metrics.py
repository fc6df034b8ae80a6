"""Metrics of one output: larger is better, from 0 to 1.

Answers have the batch on their first axis and classes or values on the second, targets likewise
but without the axis of the classes where they are class indices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Answers `(n, ...)` and targets `(n, ...)` to a figure in [0, 1], the larger the better.
Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(classes: np.ndarray, targets: np.ndarray) -> float:
    """Fraction of equal class indices, of any shape."""
    return float((classes == targets).mean()) if targets.size else 0.0


def _counts(classes: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By class: how often answered and meant, how often answered, how often meant."""
    most = int(max(classes.max(initial=0), targets.max(initial=0))) + 1
    both = np.bincount(targets[classes == targets].reshape(-1), minlength=most)
    answered = np.bincount(classes.reshape(-1), minlength=most)
    meant = np.bincount(targets.reshape(-1), minlength=most)
    return both, answered, meant


def mean_iou(classes: np.ndarray, targets: np.ndarray) -> float:
    """Intersection over union, mean of the classes that are meant or answered anywhere."""
    both, answered, meant = _counts(classes, targets)
    union = answered + meant - both
    return float((both[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


def macro_f1(classes: np.ndarray, targets: np.ndarray) -> float:
    """F1, mean of the classes that are meant or answered anywhere."""
    return _mean_f1(*_counts(classes, targets))


def multilabel_f1(present: np.ndarray, targets: np.ndarray) -> float:
    """F1 of each label `(n, labels, ...)` of 0 and 1, mean of those that are meant or answered."""
    axes = (0, *range(2, targets.ndim))
    present, wanted = present.astype(bool), targets.astype(bool)
    return _mean_f1((present & wanted).sum(axes), present.sum(axes), wanted.sum(axes))


def _mean_f1(both: np.ndarray, answered: np.ndarray, meant: np.ndarray) -> float:
    total = answered + meant
    return float((2 * both[total > 0] / total[total > 0]).mean()) if total.any() else 0.0


def r2(values: np.ndarray, targets: np.ndarray) -> float:
    """Coefficient of determination, mean of the channels; 0 where the mean would do better."""
    found, wanted = _by_channel(values), _by_channel(targets)
    error = ((found - wanted) ** 2).sum(1)
    spread = ((wanted - wanted.mean(1, keepdims=True)) ** 2).sum(1)
    exact = np.where(error > 0, 0.0, 1.0)
    ratio = np.divide(error, spread, out=1.0 - exact, where=spread > 0)
    return float(max(0.0, (1.0 - ratio).mean()))


def relative_mae(values: np.ndarray, targets: np.ndarray) -> float:
    """1 - mean absolute error over that of the median, mean of the channels; 0 where beyond it."""
    found, wanted = _by_channel(values), _by_channel(targets)
    error = np.abs(found - wanted).sum(1)
    spread = np.abs(wanted - np.median(wanted, 1, keepdims=True)).sum(1)
    exact = np.where(error > 0, 0.0, 1.0)
    ratio = np.divide(error, spread, out=1.0 - exact, where=spread > 0)
    return float(max(0.0, (1.0 - ratio).mean()))


def fidelity(values: np.ndarray, targets: np.ndarray) -> float:
    """1 - squared error relative to the variance of the teacher's outputs around channel means."""
    found, wanted = _by_channel(values), _by_channel(targets)
    error = ((found - wanted) ** 2).sum()
    spread = ((wanted - wanted.mean(1, keepdims=True)) ** 2).sum()
    return float(max(0.0, 1.0 - error / spread)) if spread > 0 else float(error == 0)


def _by_channel(values: np.ndarray) -> np.ndarray:
    """`(channels, n)` float64 of `(n, channels, ...)` or `(n,)`."""
    values = values.reshape(len(values), 1) if values.ndim == 1 else values
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
