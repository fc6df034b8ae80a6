"""Data fitted to a network: a head for every output, checked targets, and those of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from moodistill.data.images import ImageData, Split
from moodistill.errors import UserError
from moodistill.heads.fit import check_targets
from moodistill.heads.heads import Heads
from moodistill.heads.outputs import OUTPUT
from moodistill.teacher.answers import answers_of
from moodistill.teacher.graph import TeacherGraph


def fitted_data(
    data: ImageData, graph: TeacherGraph, teacher: Callable[[], nn.Module]
) -> ImageData:
    """The data with a head for every output of the network.

    Where the targets are the teacher's own outputs, these are computed for validation and test.

    Args:
        data: what is known of the outputs, and targets.
        graph: of the network.
        teacher: gives the network (in eval mode) where its outputs are needed.

    Raises:
        UserError: names both shapes where targets do not fit an output, or the outputs where heads
            or labels leave open which is meant.
    """
    shapes = {name: step.shape for name, step in graph.outputs.items()}
    gives = graph.gives()
    if data.heads is None and (len(shapes) > 1 or len(shapes[OUTPUT]) != 1):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"the network's outputs are, for one input, {given}; the labels are one class "
            "an input, for logits (classes,): say by heads what the outputs mean, such as "
            "heads='segmentation', or give inputs without labels"
        )
    heads = data.meaning.fitted(shapes, gives)
    _check_classes(data, heads, shapes, type(graph.module).__name__)
    splits = {part: _renamed(getattr(data, part), heads) for part in SPLITS}
    for part, split in splits.items():
        for name, targets in split.targets.items():
            check_targets(heads.by_output[name], name, shapes[name], targets, part)
    if data.heads is None and not gives:
        return data
    labels = data.labels
    if heads.only is not None and heads.only.kind == "segmentation" and not labels:
        labels = tuple(map(str, range(shapes[OUTPUT][0])))
    if heads.of_teacher:
        network = teacher()
        for part in SPLITS[1:]:
            splits[part] = _with_answers(splits[part], heads, network, data)
    train, validation, test = (splits[part] for part in SPLITS)
    return replace(data, heads=heads, labels=labels, train=train, validation=validation, test=test)


SPLITS = ("train", "validation", "test")


def _check_classes(
    data: ImageData, heads: Heads, shapes: dict[str, tuple[int, ...]], network: str
) -> None:
    """Refuse another number of classes than the data name."""
    if heads.only is None or heads.only.kind not in ("classification", "segmentation"):
        return
    count = shapes[OUTPUT][0] if shapes[OUTPUT] else 0
    if data.labels and count != len(data.labels):
        raise UserError(
            f"{network} gives {count} logits, the data have {len(data.labels)} classes "
            f"({', '.join(data.labels)[:80]}): expected one for each"
        )


def _renamed(split: Split, heads: Heads) -> Split:
    """The targets of an only output by its name, whatever the data call it."""
    targets = split.targets
    if isinstance(split.labels, dict) and len(targets) == len(heads.by_output) == 1:
        targets = {OUTPUT: next(iter(targets.values()))}
    return replace(split, labels=dict(targets)) if isinstance(split.labels, dict) else split


def _with_answers(split: Split, heads: Heads, network: nn.Module, data: ImageData) -> Split:
    """The split with the network's own outputs as targets of the heads that have no others."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in heads.of_teacher}
    for batch in answers_of(network, data, split.images):
        for name, parts in found.items():
            parts.append(batch[name])
    own = {name: np.concatenate(parts) for name, parts in found.items()}
    return replace(split, labels={**split.targets, **own})
