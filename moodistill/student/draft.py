"""The student's graph while it is written, and what the writing of most steps needs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from moodistill.genome.layout import GenomeLayout
from moodistill.genome.structure import Structure
from moodistill.student.partition import Parts
from moodistill.student.slicing import GroupedSlice, NormSlice, Unit, centred
from moodistill.student.values import Key, Tensor, Tensors, Value
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv
from moodistill.teacher.operations import CONVS
from moodistill.teacher.steps import Step


class Draft:
    """A student that is being written, step by step of the teacher.

    Attributes:
        teacher, structure: what the student is made from.
        parts: how its channel groups are cut into tensors.
        graph, modules: the student itself; modules, parameters and buffers by path.
        values: by name of a step, its value in the student.
        tensors: looks up channels, joins and cuts tensors.
        units, norms, grouped: what its modules stand for in the teacher.
        norm_calls: by path of a norm, how often the teacher calls it.
        readers: by name of a step, the teacher's steps that read its value.
    """

    def __init__(self, teacher: TeacherGraph, layout: GenomeLayout, structure: Structure) -> None:
        self.teacher = teacher
        self.structure = structure
        layers = {s.name: s for s in teacher.steps if s.kind == "layer"}
        convs = {n for n, s in layers.items() if type(self.module(s)) in CONVS}
        self.parts = Parts(layout, structure, convs)
        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.values: dict[str, Value] = {}
        self.units: list[Unit] = []
        self.norms: list[NormSlice] = []
        self.grouped: list[GroupedSlice] = []
        self.tensors = Tensors(teacher, self.parts, self.graph, self.modules)
        self.norm_calls = Counter(s.target for s in teacher.steps if s.kind == "norm")
        self.readers: dict[str, list[Step]] = {}
        for step in teacher.steps:
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)
        self._first_cut: dict[str, tuple[tuple[Key, ...], ...]] = {}

    def module(self, step: Step) -> nn.Module:
        """The teacher's module that a step calls."""
        return self.teacher.module.get_submodule(step.target)

    def taps(self, layer: nn.Module, step: Step) -> tuple[slice, ...]:
        """The taps of a convolution that stay."""
        if not isinstance(layer, Conv):
            return ()
        return centred(layer.kernel_size, self.structure.kernels.get(step.target))

    def as_first(self, target: str, value: Value) -> Value:
        """A value cut and ordered as the first one that a module or parameter is used on."""
        wanted = self._first_cut.setdefault(target, tuple(t.keys for t in value.tensors))
        if wanted == tuple(t.keys for t in value.tensors):
            return value
        tensors = tuple(Tensor(self.tensors.gather(value, keys), keys) for keys in wanted)
        return replace(value, tensors=tensors)

    def call(self, path: str, source: fx.Node, step: Step) -> fx.Node:
        """A call of a module with weights.

        Its node knows the pixels of the output, `area`, and of the input, `reads`.
        """
        node = self.graph.call_module(path, (source,))
        node.meta["area"] = step.form.area
        node.meta["reads"] = self.teacher.step(step.inputs[0]).form.area
        return node

    def constant(
        self, source: str, name: str, cut: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> fx.Node:
        """A read of one of the teacher's parameters or buffers, or a cut of it, under a name."""
        if name not in self.modules:
            tensor = operator.attrgetter(source)(self.teacher.module)
            made = (tensor.detach() if cut is None else cut(tensor.detach())).clone()
            trained = isinstance(tensor, nn.Parameter)
            self.modules[name] = nn.Parameter(made) if trained else made
        return self.graph.get_attr(name)

    def each(self, value: Value, step: Step, write: Callable[[Tensor, int], fx.Node]) -> Value:
        """A value made tensor by tensor from another with the same channels."""
        tensors = tuple(
            Tensor(write(tensor, index), tensor.keys) for index, tensor in enumerate(value.tensors)
        )
        of = value.of if value.through else step
        return Value(tensors, of, step.form, value.through)


def part_path(target: str, index: int, count: int) -> str:
    """Where one of the `count` modules lies that a module of the teacher becomes."""
    return target if count == 1 else f"{target}.{index}"
