"""What all outputs of a network mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.heads.head import Head
from moodistill.heads.outputs import OUTPUT, outputs_of

Arrays = Mapping[str, np.ndarray]  # by the name of the output


@dataclass(frozen=True)
class Heads:
    """The head of each output that is described, by the output's name.

    Attributes:
        by_output: until `fitted` to a network perhaps not of all its outputs.
    """

    by_output: Mapping[str, Head]

    @classmethod
    def of(cls, given: Any) -> Heads:
        """From one head or its kind, or from those of several outputs by name or in order.

        Raises:
            UserError: if it is none of these.
        """
        if isinstance(given, Heads):
            return given
        if isinstance(given, str | Head):
            given = {OUTPUT: given}
        named = outputs_of_words(given)
        found = {name: Head(one) if isinstance(one, str) else one for name, one in named.items()}
        for name, one in found.items():
            if not isinstance(one, Head):
                raise UserError(
                    f"the head of output {name!r} is a {type(one).__name__}; expected a Head or "
                    "its kind, such as 'segmentation'"
                )
        return cls(found)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Heads:
        """From words such as `segmentation`, `regression:mae` or `angle=regression`.

        Raises:
            UserError: if a word is none of these, or an output is named twice.
        """
        found: dict[str, Head] = {}
        for word in words:
            name, separator, rest = word.rpartition("=")
            kind, _, metric = rest.partition(":")
            name = name if separator else OUTPUT
            if name in found:
                raise UserError(f"two heads for output {name!r}; expected one, such as {name}=KIND")
            found[name] = Head(kind, metric or None)
        return cls(found)

    def fitted(self, shapes: Mapping[str, tuple[int, ...]], gives: Mapping[str, str]) -> Heads:
        """The heads of all outputs of a network; those that nobody described are `fidelity`.

        Args:
            shapes: of each output, without the batch axis.
            gives: of outputs whose last operation says it, whether they are probabilities.

        Raises:
            UserError: if an output is described that the network does not have.
        """
        named = dict(self.by_output)
        if len(named) == len(shapes) == 1:  # an only output, whatever it is called
            named = {OUTPUT: next(iter(named.values()))}
        for name in named:
            if name not in shapes:
                raise UserError(
                    f"a head is given for output {name!r}; the network has {', '.join(shapes)}: "
                    "name those"
                )
        heads = {name: named.get(name, Head("fidelity")) for name in shapes}
        return Heads({
            name: one if one.gives else replace(one, gives=gives.get(name, "logits"))
            for name, one in heads.items()
        })  # fmt: skip

    @property
    def scored(self) -> dict[str, Head]:
        """The heads that count."""
        found = {name: head for name, head in self.by_output.items() if head.weight > 0}
        if not found:
            raise UserError("all heads have weight 0; expected one that counts")
        return found

    @property
    def only(self) -> Head | None:
        """The head of a network with one output; None of another."""
        return next(iter(self.by_output.values())) if len(self.by_output) == 1 else None

    @property
    def plain_classes(self) -> bool:
        """Whether the network is a classifier with one output, by accuracy."""
        only = self.only
        return only is not None and only.kind == "classification" and (
            only.metric_key == "accuracy"
        )  # fmt: skip

    @property
    def of_teacher(self) -> tuple[str, ...]:
        """Names of outputs whose targets are the teacher's."""
        return tuple(n for n, head in self.by_output.items() if head.kind == "fidelity")

    @property
    def metric_name(self) -> str:
        """What people call the figure that `score` gives."""
        scored = self.scored
        names = list(dict.fromkeys(head.metric_name for head in scored.values()))
        if len(names) == 1:
            return names[0] if len(scored) == 1 else f"mean {names[0]}"
        listed = ", ".join(f"{name}: {head.metric_name}" for name, head in scored.items())
        return f"mean of metrics ({listed})"

    @property
    def known_metric(self) -> bool:
        """Whether all metrics are known by name, so that 0 is what a constant answer gets."""
        return not any(head.own_metric for head in self.scored.values())

    def each(self, answers: Iterable[Arrays], targets: Arrays) -> dict[str, float]:
        """The metric of each output that counts; answers come batch by batch, in order."""
        scored = self.scored
        parts: dict[str, list[np.ndarray]] = {name: [] for name in scored}
        for batch in answers:
            for name, head in scored.items():
                parts[name].append(head.compact(batch[name]))
        return {
            name: head.score(np.concatenate(parts[name]), targets[name])
            for name, head in scored.items()
        }

    def score(self, answers: Iterable[Arrays], targets: Arrays) -> float:
        """The mean of the outputs' metrics by their weights."""
        found, scored = self.each(answers, targets), self.scored
        total = sum(head.weight for head in scored.values())
        return sum(found[name] * head.weight for name, head in scored.items()) / total


def outputs_of_words(given: Any) -> dict[str, Any]:
    """Values by the names that `outputs_of` gives a network's outputs: in a dict, tuple or list.

    A key that is a number means the output at that place.
    """
    if isinstance(given, Mapping):
        return {f"output_{k}" if isinstance(k, int) else str(k): v for k, v in given.items()}
    if isinstance(given, tuple | list):
        return {f"output_{place}": value for place, value in enumerate(given) if value is not None}
    return outputs_of(given)
