"""From a genome to a physical network: sliced modules, one dense conv per connection pattern.

A value of the teacher is, in the student, a list of tensors: each holds some parts of channel
groups. Layers read the tensors that they are connected to (concatenated); what moves channels
about in the teacher only relabels tensors, so that a channel shuffle leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import fx

from moodistill.genome.layout import GenomeLayout
from moodistill.genome.resolve import resolve
from moodistill.genome.structure import Structure
from moodistill.heads.outputs import given_as, outputs_of
from moodistill.student.channelwise import write_channelwise, write_mixing, write_norm
from moodistill.student.draft import Draft
from moodistill.student.layers import write_layer
from moodistill.student.network import Student
from moodistill.student.relabel import write_rearranged
from moodistill.student.repeated import OpaqueWriter, write_repeated
from moodistill.student.values import Tensor, Value
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.operations import JOINS
from moodistill.teacher.steps import Step

__all__ = ["Student", "build_student"]


def build_student(
    graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray | Structure
) -> Student:
    """The physical network of a genome, or of what it means, with weights sliced from the teacher.

    A genome is taken as it is but for what `resolve` must repair; snap it to whole SIMD steps
    with `canonical` first. A layer that reads past a bypassed layer has no plain slice: its
    weights are zero until `inherit` solves for them.
    """
    structure = genome if isinstance(genome, Structure) else resolve(layout, genome)
    draft = Draft(graph, layout, structure)
    opaque = OpaqueWriter(draft)
    for step in graph.steps:
        if step.name not in structure.live:
            continue
        if step.kind == "output":
            given = outputs_of(step.node.args[0])
            made = {name: opaque.whole(node) for name, node in given.items()}
            draft.graph.output(given_as(made))
        elif step.kind == "opaque":
            draft.values[step.name] = opaque.write(step)
        elif step.kind in _ON_ONE_VALUE:
            value = draft.values[step.inputs[0]]
            draft.values[step.name] = _ON_ONE_VALUE[step.kind](draft, step, value)
        else:
            draft.values[step.name] = _OTHER[step.kind](draft, step)
    module = fx.GraphModule(draft.modules, draft.graph, "Student")
    return Student(module.eval(), tuple(draft.units), tuple(draft.norms), tuple(draft.grouped))


def _write_input(draft: Draft, step: Step) -> Value:
    node = draft.graph.placeholder("input")
    return Value((Tensor(node, draft.tensors.natural(step)),), step, step.form)


def _write_joint(draft: Draft, step: Step) -> Value:
    """An Add or product of those inputs that are kept; with one of them left, that value."""
    names = step.inputs
    kept = draft.structure.merges.get(step.name, (True,) * len(names))
    chosen = [draft.values[name] for name, on in zip(names, kept, strict=True) if on]
    if len(chosen) == 1:
        return replace(chosen[0], of=step)
    operation = JOINS[step.node.target]
    whole = [v for v in chosen if v.form == step.form or v.of.form.channels > 1]
    # The coarser of two cuts: joining tensors costs less than taking them apart.
    base = min(whole, key=lambda v: (v.form != step.form, len(v.tensors)))
    tensors = []
    for tensor in base.tensors:
        operands = []
        for value in chosen:
            if value is base:
                operands.append(tensor.node)
            elif set(tensor.keys) <= set(value.keys):
                operands.append(draft.tensors.gather(value, tensor.keys))
            else:  # one value for all channels
                operands.append(draft.tensors.gather(value, value.keys))
        node = draft.graph.call_function(operation, tuple(operands))
        tensors.append(Tensor(node, tensor.keys))
    return Value(tuple(tensors), step, step.form)


# What a step becomes, by its kind.
_ON_ONE_VALUE: dict[str, Callable[[Draft, Step, Value], Value]] = {
    "layer": write_layer,
    "norm": write_norm,
    "channelwise": write_channelwise,
    "mixing": write_mixing,
    "activation": write_repeated,
    "spatial": write_repeated,
}
_OTHER: dict[str, Callable[[Draft, Step], Value]] = {
    "input": _write_input,
    "merge": _write_joint,
    "gate": _write_joint,
    "rearrange": write_rearranged,
}
