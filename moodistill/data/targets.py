"""Targets of splits: collected from datasets, checked for their heads, put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moodistill.data.images import Metric, Split, Targets, fraction_right
from moodistill.errors import UserError
from moodistill.heads.fit import as_targets
from moodistill.heads.head import CLASSES
from moodistill.heads.heads import Heads, outputs_of_words
from moodistill.heads.outputs import OUTPUT


def sample_of(item: Any) -> tuple[Any, Any]:
    """Input and targets of a dataset's item; None for targets where it is the input alone."""
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def stacked(targets: Sequence[Any], part: str) -> Targets:
    """Targets of all inputs as arrays: one, or by name those of several outputs.

    Args:
        targets: of each input; None for one without.
        part: the split's name.

    Raises:
        UserError: if inputs have targets of different shapes or names.
    """
    known = [one is not None for one in targets]
    if not any(known):
        return {}
    if not all(known):
        raise UserError(
            f"{part} input {known.index(False)} has no targets, others have; expected all or none"
        )
    several = isinstance(targets[0], Mapping | tuple | list)
    named = [outputs_of_words(one) if several else {OUTPUT: one} for one in targets]
    found = {}
    for name in named[0]:
        rows: list[np.ndarray] = []
        for index, one in enumerate(named):
            row = _array(one.get(name))
            if one.keys() != named[0].keys() or row.shape != np.shape(rows[0] if rows else row):
                raise UserError(
                    f"{part} input {index} has targets {_said(one)}, the first "
                    f"{_said(named[0])}; expected the same of all"
                )
            rows.append(row)
        found[name] = np.stack(rows)
    return found if several else found[OUTPUT]


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _said(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_array(value).shape}" for name, value in named.items())


def one_of(targets: Mapping[str, np.ndarray]) -> np.ndarray:
    """The targets of an only output."""
    return next(iter(targets.values()))


def one_label(label: Any, where: str) -> Any:
    """A label as a plain number (of whatever type it is), out of an array of one."""
    array = _array(label)
    if array.shape not in ((), (1,)):
        raise UserError(
            f"{where} has a label of type {array.dtype} and shape {array.shape}; expected one "
            "whole number, the index of its class (give heads for other targets)"
        )
    return array.reshape(()).item()


def whole_labels(labels: Any, part: str) -> np.ndarray:
    """Labels `(N,)` or `(N, 1)`, whole numbers of any type, as int64 `(N,)`.

    Raises:
        UserError: names what they are instead; `part` says of which split.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    expected = "expected one whole number an image, the index of its class"
    if labels.ndim != 1:
        raise UserError(f"the {part} labels are {labels.dtype} {labels.shape}; {expected}")
    if labels.dtype.kind not in "biuf":
        raise UserError(f"the {part} labels are of type {labels.dtype}; {expected}")
    broken = np.flatnonzero(~np.isfinite(labels) | (labels != np.trunc(labels)))
    if len(broken):
        raise UserError(
            f"the {part} labels are {labels.dtype} {labels.shape}, number {broken[0]} is "
            f"{labels[broken[0]]:g}; {expected} (for other "
            "targets give heads, such as heads='regression')"
        )
    return labels.astype(np.int64)


def meaning_of(splits: Mapping[str, Split], heads: Any, metric: Metric) -> Heads | None:
    """The heads that are given; without labels none, so that all are fidelity; else a classifier.

    Raises:
        UserError: if a metric is given beside heads, or some splits have labels and some none.
    """
    if heads is not None:
        if metric is not fraction_right:
            raise UserError("both metric and heads are given; give the metric in its head")
        return Heads.of(heads)
    bare = [part for part, split in splits.items() if isinstance(split.labels, dict)]
    if not bare:
        return None
    if len(bare) < len(splits) or any(split.targets for split in splits.values()):
        raise UserError(
            f"the {', '.join(bare)} data have no labels, or those of several outputs; give heads, "
            "or labels for all splits or none"
        )
    return Heads({})


def arranged(splits: Mapping[str, Split], heads: Heads | None) -> dict[str, Split]:
    """The splits with checked targets, in a random order that is always the same, and with a test.

    Raises:
        UserError: if targets or inputs do not fit together.
    """
    found = {}
    for part, split in splits.items():
        targets = whole_labels(split.labels, part) if heads is None else _checked(
            split, part, heads
        )  # fmt: skip
        _check_counts(split, targets, part)
        found[part] = _shuffled(replace(split, labels=targets))
    if "test" not in found:
        whole = found["validation"]
        found["validation"] = whole.part(slice(None, None, 2))
        found["test"] = whole.part(slice(1, None, 2))
    first = found["train"].images
    for part, split in found.items():
        if len(split) == 0 or split.images.shape[1:] != first.shape[1:]:
            raise UserError(
                f"the {part} split has images of shape {split.images.shape}, expected "
                f"(n, {', '.join(map(str, first.shape[1:]))}) with n > 0"
            )
    return found


def _check_counts(split: Split, targets: Targets, part: str) -> None:
    named = targets if isinstance(targets, dict) else {OUTPUT: targets}
    for array in named.values():
        if len(array) != len(split.images):
            raise UserError(
                f"the {part} split has inputs {split.images.shape} and targets {array.shape}; "
                "expected as many targets as inputs"
            )


def _checked(split: Split, part: str, heads: Heads) -> Targets:
    """Targets by name as their heads want them; those of fidelity heads are not needed."""
    given = split.targets
    if len(given) == len(heads.by_output) == 1:  # an only output, whatever it is called
        given = {next(iter(heads.by_output)): next(iter(given.values()))}
    wanted = {name: h for name, h in heads.by_output.items() if h.kind != "fidelity"}
    missing = [name for name, head in wanted.items() if name not in given and head.weight > 0]
    if missing:
        raise UserError(
            f"the {part} data have no targets for output {missing[0]!r} (a "
            f"{wanted[missing[0]].kind}); give them, or a head 'fidelity'"
        )
    unknown = [name for name in given if name not in heads.by_output]
    if unknown:
        raise UserError(
            f"the {part} data have targets for output {unknown[0]!r}, heads are given for "
            f"{', '.join(heads.by_output) or 'none'}; give one for it"
        )
    return {
        name: as_targets(head, given[name], f"the {part} labels")
        for name, head in wanted.items()
        if name in given
    }


def class_names(
    splits: Mapping[str, Split], heads: Heads | None, labels: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the classes of a network with one output of classes; of any other as given.

    Raises:
        UserError: if there are too few.
    """
    head = None if heads is None else heads.only
    names = labels if labels is not None or head is None else head.labels or None
    if heads is not None and (head is None or head.kind not in CLASSES):
        return tuple(names or ())
    arrays = [next(iter(split.targets.values())) for split in splits.values()]
    if head is not None and head.kind == "segmentation":
        arrays = [array[array != head.ignore] for array in arrays]
    low = min(int(array.min(initial=0)) for array in arrays)
    high = max(int(array.max(initial=0)) for array in arrays)
    if low < 0:
        raise UserError(f"a label is {low}; expected whole numbers from 0")
    if names is None:
        # How many classes a mask may have, the network says.
        return () if head is not None and head.kind == "segmentation" else tuple(
            map(str, range(high + 1))
        )  # fmt: skip
    if len(names) <= high:
        raise UserError(
            f"labels name {len(names)} classes, the data have {high + 1}; name them all"
        )
    return tuple(names)


def _shuffled(split: Split) -> Split:
    return split.ordered(np.random.default_rng(0).permutation(len(split)))
