"""What one output of a network means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.heads import metrics
from moodistill.heads.metrics import Metric

CLASSES = ("classification", "segmentation")  # kinds whose targets are class indices
KINDS = (*CLASSES, "multilabel", "regression", "fidelity")
GIVES = ("logits", "probabilities", "log_probabilities")
IGNORE = 255  # in masks: a place that is not scored, as in Pascal VOC and Cityscapes

# By kind its metrics, the default first: what people call it, and its function.
_OF_CLASSES: dict[str, tuple[str, Metric]] = {
    "accuracy": ("accuracy", metrics.accuracy),
    "macro_f1": ("macro F1", metrics.macro_f1),
    "mean_iou": ("mean IoU", metrics.mean_iou),
}
METRICS: dict[str, dict[str, tuple[str, Metric]]] = {
    "classification": _OF_CLASSES,
    "segmentation": {
        "mean_iou": _OF_CLASSES["mean_iou"], "accuracy": ("pixel accuracy", metrics.accuracy),
        "macro_f1": _OF_CLASSES["macro_f1"],
    },
    "multilabel": {
        "macro_f1": ("macro F1", metrics.multilabel_f1),
        "accuracy": ("accuracy of labels", metrics.accuracy),
    },
    "regression": {
        "r2": ("R2", metrics.r2), "mae": ("1 - relative MAE", metrics.relative_mae),
    },
    "fidelity": {
        "fidelity": ("fidelity", metrics.fidelity), "agreement": ("agreement", metrics.accuracy),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """What one output of a network means: its kind, its metric and its loss.

    Attributes:
        kind: `classification` (one class an input, logits `(N, K)`), `segmentation` (one class a
            place, logits `(N, K, *size)`), `multilabel` (0 or 1 for each label, `(N, K, ...)`),
            `regression` (values `(N, ...)`), or `fidelity`: the teacher's own outputs are the
            targets, labels are not needed.
        metric: a name of `METRICS[kind]`, or a function of the output `(n, ...)` and its targets
            `(n, ...)` that gives a number from 0 to 1, the larger the better. None takes the first
            of the kind: accuracy, mean IoU, macro F1, R2, fidelity.
        loss: a function `(student's output, teacher's output, targets or None) -> scalar` of
            tensors, for distillation; None takes that of the kind (see `heads.losses`).
        gives: whether the output holds `logits`, `probabilities` or `log_probabilities`; None
            takes what the network's last operation says.
        labels: names of the classes; empty numbers them.
        ignore: value of a mask where it is not scored.
        weight: of this output's metric and loss among several; 0 only keeps the output.
    """

    kind: str = "classification"
    metric: str | Metric | None = None
    loss: Callable[..., Any] | None = None
    gives: str | None = None
    labels: tuple[str, ...] = ()
    ignore: int = IGNORE
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse words that mean nothing."""
        if self.kind not in KINDS:
            raise UserError(f"the kind of a head is {self.kind!r}; expected one of "
                            f"{', '.join(KINDS)}")  # fmt: skip
        names = METRICS[self.kind]
        if isinstance(self.metric, str) and self.metric not in names:
            raise UserError(
                f"the metric of a {self.kind} head is {self.metric!r}; expected one of "
                f"{', '.join(names)}, or a function"
            )
        if self.gives is not None and self.gives not in GIVES:
            raise UserError(f"a head gives {self.gives!r}; expected one of {', '.join(GIVES)}")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"the weight of a head is {self.weight:g}; expected a number >= 0")

    @property
    def own_metric(self) -> bool:
        """Whether the metric is a function of the user's."""
        return self.metric is not None and not isinstance(self.metric, str)

    @property
    def metric_key(self) -> str:
        """The metric's name in `METRICS`; empty for a function of the user's."""
        if self.own_metric:
            return ""
        return str(self.metric) if self.metric else next(iter(METRICS[self.kind]))

    @property
    def metric_name(self) -> str:
        """What people call the metric."""
        if callable(self.metric):
            plain = getattr(self.metric, "func", self.metric)
            return str(getattr(plain, "__name__", type(plain).__name__))
        return METRICS[self.kind][self.metric_key][0]

    @property
    def of_classes(self) -> bool:
        """Whether the metric sees the largest of the output's values alone."""
        return self.kind in CLASSES or self.metric_key == "agreement"

    def compact(self, answers: np.ndarray) -> np.ndarray:
        """What the metric needs of an output `(n, ...)`: class indices of maps are far smaller."""
        if self.own_metric:
            return answers
        if self.of_classes:
            return answers.argmax(1).astype(np.int32)
        if self.kind == "multilabel":
            level = {"logits": 0.0, "probabilities": 0.5, "log_probabilities": np.log(0.5)}
            return answers > level[self.gives or "logits"]
        return answers

    def score(self, compact: np.ndarray, targets: np.ndarray) -> float:
        """The metric of what `compact` gave, and targets.

        Raises:
            UserError: if a function of the user's gives no number from 0 to 1.
        """
        if callable(self.metric):
            found = float(self.metric(compact, targets))
        else:
            if self.metric_key == "agreement":
                targets = targets.argmax(1)
            elif self.kind == "segmentation":
                seen = targets != self.ignore
                compact, targets = compact[seen], targets[seen]
            elif self.kind == "regression" and targets.ndim == 1:
                targets = targets.reshape(compact.shape)
            found = METRICS[self.kind][self.metric_key][1](compact, targets)
        if not -1e-6 <= found <= 1 + 1e-6:  # nor NaN
            raise UserError(
                f"the metric {self.metric_name} gives {found:g}; expected a number from 0 to 1"
            )
        return min(1.0, max(0.0, found))
