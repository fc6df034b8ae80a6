"""A layer of the teacher in the student: none, one module, or one for each connection pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moodistill.student.draft import Draft, part_path
from moodistill.student.slicing import Unit, slice_layer
from moodistill.student.values import Key, Tensor, Value
from moodistill.teacher.steps import Step

Keys = tuple[Key, ...]


def write_layer(draft: Draft, step: Step, value: Value) -> Value:
    """What a layer makes of a value; the value itself past a bypassed layer."""
    if step.name in draft.structure.bypassed:
        return replace(value, through=True)
    value = draft.as_first(step.target, value)
    outputs = []
    made = list(_unit_keys(draft, step, value))
    for index, (outs, ins) in enumerate(made):
        unit = _unit(draft, step, value, (outs, ins), part_path(step.target, index, len(made)))
        if unit.target not in draft.modules:
            draft.modules.update(slice_layer(draft.teacher.layer_module(step.target), unit))
            draft.units.append(unit)
        node = draft.call(unit.target, draft.tensors.gather(value, ins), step)
        if unit.expand is not None:
            node = draft.call(unit.expand, node, step)
        outputs.append(Tensor(node, outs))
    return Value(tuple(outputs), step, step.form)


def _unit(draft: Draft, step: Step, value: Value, ends: tuple[Keys, Keys], path: str) -> Unit:
    """The unit of a layer with these output and input keys; two modules where it has a rank."""
    outs, ins = ends
    tensors = draft.tensors
    if step.name in draft.parts.grouped:
        classes = draft.parts.diagonal(step.name)
        out_groups, in_groups = (
            tuple(tensors.table(s.name, k[0][0])[c, 0] for c in side)
            for s, k, side in zip((step, value.of), ends, classes, strict=True)
        )
    else:
        out_groups = (tensors.channels(step, outs),)
        in_groups = (tensors.channels(value.of, ins),)
    rank = draft.structure.ranks.get(step.target)
    return Unit(
        target=path if rank is None else f"{path}.reduce",
        layer=step.target,
        outputs=out_groups,
        inputs=in_groups,
        through=value.through,
        repeat=value.form.repeat,
        taps=draft.taps(draft.teacher.layer_module(step.target), step),
        rank=rank,
        expand=None if rank is None else f"{path}.expand",
    )


def _unit_keys(draft: Draft, step: Step, value: Value) -> Iterator[tuple[Keys, Keys]]:
    """Output and input keys of every module that a layer becomes."""
    cut = draft.parts.cut
    parts = [(group, part) for group in step.groups for part in range(len(cut.get(group, ())))]
    patterns = [
        tuple(key for key in value.keys if draft.parts.reads(step.name, part, key[:2]))
        for part in parts
    ]
    if len({group for group, _ in parts}) == len(parts) and len(set(patterns)) == 1:
        # Several groups that all read the same: one module, cut apart where it must be.
        yield tuple(k for g, p in parts for k in draft.tensors.keys(step, g, p)), patterns[0]
        return
    for (group, part), pattern in zip(parts, patterns, strict=True):
        yield draft.tensors.keys(step, group, part), pattern
