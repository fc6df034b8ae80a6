"""What moves channels about in the teacher only relabels tensors in the student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from moodistill.errors import UserError
from moodistill.student.draft import Draft
from moodistill.student.values import Key, Tensor, Value
from moodistill.teacher.rearrange import Form
from moodistill.teacher.steps import Step


def write_rearranged(draft: Draft, step: Step) -> Value:
    """Relabels the tensors that the step's channels come from."""
    live = [name for name in step.inputs if name in draft.values]
    first = draft.values[live[0]]
    if first.through:
        return draft.each(
            first, step, lambda t, _: _reform(draft.graph, t.node, first.form, step.form)
        )
    assert step.origin is not None
    tensors: list[Tensor] = []
    for index, name in enumerate(step.inputs):
        if name not in draft.values:
            continue
        value = draft.values[name]
        target = np.flatnonzero(step.origin[:, 0] == index)
        came = (target, step.origin[target, 1])
        for tensor in value.tensors:
            renamed = [(k, new) for k in tensor.keys for new in _renamed(
                draft, step, value, k, came)]  # fmt: skip
            if renamed:
                old, new = zip(*renamed, strict=True)
                gathered = draft.tensors.gather(value, old)
                node = _reform(draft.graph, gathered, value.form, step.form)
                tensors.append(Tensor(node, new))
    made = Value(tuple(tensors), step, step.form)
    if len(tensors) > 1 and _is_read_whole(draft, step):
        node = draft.tensors.gather(made, made.keys)
        return replace(made, tensors=(Tensor(node, made.keys),))
    return made


def _renamed(
    draft: Draft, step: Step, value: Value, key: Key, came: tuple[np.ndarray, np.ndarray]
) -> Iterator[Key]:
    """What a key of a source is called in the rearranged value; nothing if left out.

    `came` says which channels of the value come from this source, and from which of its own.
    """
    target, origin = came
    group, part, _ = key
    sources = draft.tensors.positions(value.of.name, key)
    wanted = np.isin(origin, sources)
    if not wanted.any():
        return
    for new in draft.tensors.keys(step, group, part):
        places = draft.tensors.positions(step.name, new)
        found = np.isin(places, target)
        if not found.all():
            continue
        if np.array_equal(origin[np.searchsorted(target, places)], sources):
            yield new
        elif group in draft.teacher.grouping.together:
            raise UserError(
                f"{step.name} takes apart channels that a grouped convolution keeps together: "
                "not supported"
            )


def _is_read_whole(draft: Draft, step: Step) -> bool:
    """Whether everything behind a step reads all that is left of its channels."""
    readers = [s for s in draft.readers.get(step.name, []) if s.name in draft.structure.live]
    for reader in readers:
        if reader.kind == "layer":
            if reader.name in draft.structure.bypassed:
                return False
            if not draft.parts.reads_all(reader.name, step.groups):
                return False
        elif reader.kind in ("norm", "activation", "spatial", "channelwise"):
            if not _is_read_whole(draft, reader):
                return False
        elif reader.kind not in ("mixing", "opaque", "output"):
            return False
    return bool(readers)


def _reform(graph: fx.Graph, node: fx.Node, old: Form, new: Form) -> fx.Node:
    """The same pixels and channels in another form, by way of a map."""
    call = graph.call_function
    if (old.kind, old.size) == (new.kind, new.size):
        return node
    rank = len(old.size)
    if old.kind == "last":
        node = call(torch.permute, (node, (0, rank + 1, *range(1, rank + 1))))
    if new.kind in ("flat", "vector"):
        return node if old.kind in ("flat", "vector") else call(torch.flatten, (node, 1))
    if old.kind in ("flat", "vector"):
        node = call(torch.unflatten, (node, 1, (-1, *new.size)))
    elif old.size != new.size:
        node = call(torch.flatten, (node, 2)) if rank > 1 else node
        node = call(torch.unflatten, (node, 2, new.size)) if len(new.size) > 1 else node
    rank = len(new.size)
    return node if new.kind == "map" else call(
        torch.permute, (node, (0, *range(2, rank + 2), 1))
    )  # fmt: skip
