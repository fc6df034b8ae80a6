"""What the outputs of a bundle's model are called and hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.heads.head import CLASSES, Head
from moodistill.heads.outputs import OUTPUT

PROBABILITIES, PLAIN = "probabilities", "output"
VALUES = "values"  # an input that is no picture


@dataclass(frozen=True)
class ShippedOutput:
    """One output.

    Attributes:
        name: in the file; of an only output what it holds: `logits`, `probabilities`,
            `log_probabilities` or, of values, `output`.
        kind: of its head.
        metric: that is reported, empty if this output does not count.
        labels: names of the classes.
        softmax: whether a Softmax over its classes is added.
        level: of a label's output, above which the label is present.
    """

    name: str
    kind: str
    metric: str
    labels: tuple[str, ...]
    softmax: bool = False
    level: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {**asdict(self), "labels": list(self.labels)}


def shipped_outputs(data: ImageData, softmax: bool) -> tuple[ShippedOutput, ...]:
    """The outputs of a bundle's model, in order.

    Raises:
        UserError: if a Softmax is asked for and no output holds logits of classes.
    """
    heads = data.meaning.by_output
    made = tuple(_shipped(name, head, data, softmax) for name, head in heads.items())
    if softmax and not any(output.softmax for output in made):
        held = ", ".join(f"{name}: {h.kind}, {h.gives or 'logits'}" for name, h in heads.items())
        raise UserError(
            f"softmax is for logits of classes, the network's outputs are {held}; leave it out"
        )
    return made


def _shipped(name: str, head: Head, data: ImageData, softmax: bool) -> ShippedOutput:
    gives = head.gives or "logits"
    added = softmax and head.kind in CLASSES and gives == "logits"
    if name == OUTPUT:
        holds = gives if head.kind in (*CLASSES, "multilabel") else PLAIN
        name = PROBABILITIES if added else holds
    labels = head.labels or (data.labels if data.meaning.only is head else ())
    level = {"logits": 0.0, "probabilities": 0.5}.get(gives, -0.6931)
    metric = head.metric_name if head.weight > 0 else ""
    return ShippedOutput(name, head.kind, metric, labels, added, level)
