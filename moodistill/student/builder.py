"""From a genome to a physical network: sliced modules, one dense conv per connection pattern.

A value of the teacher is, in the student, a list of tensors: each holds some parts of channel
groups. Layers read the tensors that they are connected to (concatenated); what moves channels
about in the teacher only relabels tensors, so that a channel shuffle leaves no trace.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.resolve import resolve
from moodistill.genome.structure import Structure
from moodistill.heads.outputs import given_as, outputs_of
from moodistill.student.partition import Parts
from moodistill.student.slicing import (
    GroupedSlice,
    Unit,
    centred,
    check_whole,
    opaque_copy,
    slice_grouped,
    slice_layer,
    slice_norm,
)
from moodistill.student.values import Key, Tensor, Tensors, Value
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv
from moodistill.teacher.operations import CONVS, JOINS, SHUFFLES
from moodistill.teacher.rearrange import Form
from moodistill.teacher.steps import Step


@dataclass(frozen=True)
class NormSlice:
    """One BatchNorm of the student: its path, the teacher's path, the channels."""

    target: str
    norm: str
    channels: np.ndarray


@dataclass(frozen=True)
class Student:
    """A physical student; `module` maps `(N, C, H, W)` to logits."""

    module: fx.GraphModule
    units: tuple[Unit, ...]
    norms: tuple[NormSlice, ...]
    grouped: tuple[GroupedSlice, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters (batch normalisation included, as the literature counts)."""
        return sum(p.numel() for p in self.module.parameters())


def build_student(
    graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray | Structure
) -> Student:
    """The physical network of a genome, or of what it means, with weights sliced from the teacher.

    A genome is taken as it is but for what `resolve` must repair; snap it to whole SIMD steps
    with `canonical` first. A layer that reads past a bypassed layer has no plain slice: its
    weights are zero until `inherit` solves for them.
    """
    structure = genome if isinstance(genome, Structure) else resolve(layout, genome)
    return _Builder(graph, layout, structure).build()


class _Builder:
    """Writes the student's graph step by step."""

    def __init__(self, graph: TeacherGraph, layout: GenomeLayout, structure: Structure) -> None:
        self.teacher = graph
        self.structure = structure
        layers = {s.name: s for s in graph.steps if s.kind == "layer"}
        convs = {n for n, s in layers.items() if type(self._module(s)) in CONVS}
        self.parts = Parts(layout, self.structure, convs)
        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.values: dict[str, Value] = {}
        self.units: list[Unit] = []
        self.norms: list[NormSlice] = []
        self.grouped: list[GroupedSlice] = []
        self.tensors = Tensors(graph, self.parts, self.graph, self.modules)
        self.norm_calls = Counter(s.target for s in graph.steps if s.kind == "norm")
        self.first_cut: dict[str, tuple[tuple[Key, ...], ...]] = {}
        self.step_of = {step.node: step for step in graph.steps}
        self.whole: dict[fx.Node, fx.Node] = {}  # the student's node for one of the teacher's
        self.readers: dict[str, list[Step]] = {}
        for step in graph.steps:
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)

    def _module(self, step: Step) -> nn.Module:
        return self.teacher.module.get_submodule(step.target)

    def build(self) -> Student:
        """The whole student."""
        write: dict[str, Callable[[Step, Value], Value]] = {
            "layer": self._layer, "norm": self._norm, "channelwise": self._channelwise,
            "mixing": self._mixing, "activation": self._apply, "spatial": self._apply,
        }  # fmt: skip
        for step in self.teacher.steps:
            if step.name not in self.structure.live:
                continue
            if step.kind == "input":
                node = self.graph.placeholder("input")
                value = Value((Tensor(node, self.tensors.natural(step)),), step, step.form)
            elif step.kind == "output":
                self._output(step)
                continue
            elif step.kind in ("merge", "gate"):
                value = self._joint(step)
            elif step.kind == "rearrange":
                value = self._rearrange(step)
            elif step.kind == "opaque":
                value = self._opaque(step)
            else:
                value = write[step.kind](step, self.values[step.inputs[0]])
            self.values[step.name] = value
        module = fx.GraphModule(self.modules, self.graph, "Student")
        return Student(module.eval(), tuple(self.units), tuple(self.norms), tuple(self.grouped))

    def _output(self, step: Step) -> None:
        """Every output by its name, with all channels in the teacher's order."""
        given = outputs_of(step.node.args[0])
        made = {name: self._whole(node) for name, node in given.items()}
        self.graph.output(given_as(made))

    @staticmethod
    def _path(target: str, index: int, count: int) -> str:
        return target if count == 1 else f"{target}.{index}"

    def _call(self, path: str, source: fx.Node, step: Step) -> fx.Node:
        """A call of a module with weights.

        Its node knows the pixels of the output, `area`, and of the input, `reads`.
        """
        node = self.graph.call_module(path, (source,))
        node.meta["area"] = step.form.area
        node.meta["reads"] = self.teacher.step(step.inputs[0]).form.area
        return node

    # Steps

    def _as_first(self, target: str, value: Value) -> Value:
        """A value cut and ordered as the first one that a module or parameter is used on."""
        wanted = self.first_cut.setdefault(target, tuple(t.keys for t in value.tensors))
        if wanted == tuple(t.keys for t in value.tensors):
            return value
        tensors = tuple(Tensor(self.tensors.gather(value, keys), keys) for keys in wanted)
        return replace(value, tensors=tensors)

    def _layer(self, step: Step, value: Value) -> Value:
        if step.name in self.structure.bypassed:
            return replace(value, through=True)
        value = self._as_first(step.target, value)
        outputs = []
        made = list(self._unit_keys(step, value))
        for index, (outs, ins) in enumerate(made):
            path = self._path(step.target, index, len(made))
            if step.name in self.parts.grouped:
                classes = self.parts.diagonal(step.name)
                ends = (step, value.of)
                out_groups, in_groups = (
                    tuple(self.tensors.table(s.name, k[0][0])[c, 0] for c in side)
                    for s, k, side in zip(ends, (outs, ins), classes, strict=True)
                )
            else:
                out_groups = (self.tensors.channels(step, outs),)
                in_groups = (self.tensors.channels(value.of, ins),)
            layer = self.teacher.layer_module(step.target)
            rank = self.structure.ranks.get(step.target)
            unit = Unit(
                path if rank is None else f"{path}.reduce", step.target, out_groups, in_groups,
                value.through, value.form.repeat, self._taps(layer, step), rank,
                None if rank is None else f"{path}.expand",
            )  # fmt: skip
            if unit.target not in self.modules:
                self.modules |= slice_layer(layer, unit)
                self.units.append(unit)
            node = self._call(unit.target, self.tensors.gather(value, ins), step)
            if unit.expand is not None:
                node = self._call(unit.expand, node, step)
            outputs.append(Tensor(node, outs))
        return Value(tuple(outputs), step, step.form)

    def _taps(self, layer: nn.Module, step: Step) -> tuple[slice, ...]:
        """The taps of a convolution that stay."""
        if not isinstance(layer, Conv):
            return ()
        return centred(layer.kernel_size, self.structure.kernels.get(step.target))

    def _unit_keys(
        self, step: Step, value: Value
    ) -> Iterator[tuple[tuple[Key, ...], tuple[Key, ...]]]:
        """Output and input keys of every module that a layer becomes."""
        cut = self.parts.cut
        parts = [(group, part) for group in step.groups for part in range(len(cut.get(group, ())))]
        patterns = [
            tuple(key for key in value.keys if self.parts.reads(step.name, part, key[:2]))
            for part in parts
        ]
        if len({group for group, _ in parts}) == len(parts) and len(set(patterns)) == 1:
            # Several groups that all read the same: one module, cut apart where it must be.
            yield tuple(k for g, p in parts for k in self.tensors.keys(step, g, p)), patterns[0]
            return
        for (group, part), pattern in zip(parts, patterns, strict=True):
            yield self.tensors.keys(step, group, part), pattern

    def _each(self, value: Value, step: Step, write: Callable[[Tensor, int], fx.Node]) -> Value:
        """A value made tensor by tensor from another with the same channels."""
        tensors = tuple(
            Tensor(write(tensor, index), tensor.keys) for index, tensor in enumerate(value.tensors)
        )
        of = value.of if value.through else step
        return Value(tensors, of, step.form, value.through)

    def _norm(self, step: Step, value: Value) -> Value:
        if value.through:
            return value
        value = self._as_first(step.target, value)
        count = len(value.tensors)

        def write(tensor: Tensor, index: int) -> fx.Node:
            path = self._path(step.target, index, count)
            if path not in self.modules:
                channels = self.tensors.channels(step, tensor.keys)
                self.modules[path] = slice_norm(self._module(step), channels)
                # A norm with several inputs keeps the teacher's statistics of them all.
                if self.norm_calls[step.target] == 1:
                    self.norms.append(NormSlice(path, step.target, channels))
            return self.graph.call_module(path, (tensor.node,))

        return self._each(value, step, write)

    def _channelwise(self, step: Step, value: Value) -> Value:
        constants = [n for n in step.node.all_input_nodes if n.op == "get_attr"]
        value = self._as_first(str(constants[0].target) if constants else step.target, value)
        count = len(value.tensors)

        def write(tensor: Tensor, index: int) -> fx.Node:
            channels = self.tensors.channels(value.of, tensor.keys)
            if step.node.op != "call_module":
                return self._scaled(step, tensor.node, channels, index, count)
            path = self._path(step.target, index, count)
            if path not in self.modules:
                module = self._module(step)
                if isinstance(module, Conv):
                    outputs = self.tensors.channels(step, tensor.keys)
                    taps = self._taps(module, step)
                    part = GroupedSlice(path, step.target, channels, outputs, taps)
                    self.modules[path] = slice_grouped(module, part, step.name)
                    self.grouped.append(part)
                elif type(module) in SHUFFLES:
                    check_whole(module, channels, step)
                    self.modules[path] = copy.deepcopy(module)
                else:
                    assert isinstance(module, nn.PReLU)
                    made = nn.PReLU(len(channels))
                    made.weight = nn.Parameter(module.weight.detach()[channels].clone())
                    self.modules[path] = made
            return self._call(path, tensor.node, step)

        return self._each(value, step, write)

    def _scaled(
        self, step: Step, node: fx.Node, channels: np.ndarray, index: int, count: int
    ) -> fx.Node:
        """An operation with one number per channel."""

        def convert(argument: fx.Node) -> fx.Node:
            if argument.op != "get_attr":
                return node
            name = str(argument.target) if count == 1 else f"{argument.target}_{index}"
            if name not in self.modules:
                tensor = operator.attrgetter(str(argument.target))(self.teacher.module)
                axis = tensor.ndim - 1
                axis -= len(step.form.size) if step.form.kind == "map" else 0
                chosen = tensor.detach().index_select(axis, torch.from_numpy(channels)).clone()
                trained = isinstance(tensor, nn.Parameter)
                self.modules[name] = nn.Parameter(chosen) if trained else chosen
            return self.graph.get_attr(name)

        arguments = fx.node.map_arg(step.node.args, convert)
        return self.graph.call_function(JOINS[step.node.target], arguments)

    def _mixing(self, step: Step, value: Value) -> Value:
        value = self._as_first(step.target, value)
        module = copy.deepcopy(self._module(step))
        if isinstance(module, nn.LayerNorm):
            # The order of the channels does not matter to it.
            node, keys = self.tensors.gather(value, value.keys), value.keys
            channels = torch.from_numpy(self.tensors.channels(value.of, keys))
            for name in ("weight", "bias"):
                tensor = getattr(module, name)
                if tensor is not None:
                    setattr(module, name, nn.Parameter(tensor.detach()[channels].clone()))
        else:
            node, keys = self.tensors.ordered(value), value.keys
            order = self.tensors.channels(value.of, keys)
            if not np.array_equal(order, np.arange(len(order))):
                raise UserError(f"{step.target}: its channels are out of order: not supported")
        self.modules[step.target] = module
        made = Tensor(self.graph.call_module(step.target, (node,)), keys)
        return Value((made,), step, step.form)

    def _joint(self, step: Step) -> Value:
        names = step.inputs
        kept = self.structure.merges.get(step.name, (True,) * len(names))
        chosen = [self.values[name] for name, on in zip(names, kept, strict=True) if on]
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
                    operands.append(self.tensors.gather(value, tensor.keys))
                else:  # one value for all channels
                    operands.append(self.tensors.gather(value, value.keys))
            node = self.graph.call_function(operation, tuple(operands))
            tensors.append(Tensor(node, tensor.keys))
        return Value(tuple(tensors), step, step.form)

    def _apply(self, step: Step, value: Value) -> Value:
        """A step without channels of its own (activation, pooling)."""
        if step.kind == "activation" and value.through:
            return value

        def write(tensor: Tensor, index: int) -> fx.Node:
            return self._repeat(step, tensor.node)

        return self._each(value, step, write)

    def _repeat(self, step: Step, node: fx.Node) -> fx.Node:
        source = step.node
        if source.op == "call_module":
            if step.target not in self.modules:
                made = copy.deepcopy(self._module(step))
                if getattr(made, "inplace", False):
                    # Where an edge is dropped, others may read the same tensor.
                    made.inplace = False  # type: ignore[assignment]
                self.modules[step.target] = made
            return self.graph.call_module(step.target, (node,))

        def convert(argument: fx.Node) -> fx.Node:
            if argument.op != "get_attr":
                return node
            name = str(argument.target)
            if name not in self.modules:
                tensor = operator.attrgetter(name)(self.teacher.module)
                made = tensor.detach().clone()
                trained = isinstance(tensor, nn.Parameter)
                self.modules[name] = nn.Parameter(made) if trained else made
            return self.graph.get_attr(name)

        arguments = fx.node.map_arg(source.args, convert)
        keywords = {k: v for k, v in source.kwargs.items() if k != "inplace"}
        keywords = fx.node.map_arg(keywords, convert)
        if source.target in JOINS:
            return self.graph.call_function(JOINS[source.target], arguments, keywords)
        if source.op == "call_method":
            method = str(source.target).removesuffix("_")
            return self.graph.call_method(method, arguments, keywords)
        return self.graph.call_function(source.target, arguments, keywords)  # type: ignore

    def _opaque(self, step: Step) -> Value:
        """What is not understood, as it is: its inputs whole and in the teacher's order."""
        arguments, keywords = fx.node.map_arg((step.node.args, step.node.kwargs), self._whole)
        if step.node.op == "call_module":
            if step.target not in self.modules:
                self.modules[step.target] = opaque_copy(self._module(step))
            node = self.graph.call_module(step.target, arguments, keywords)
            node.meta["area"] = node.meta["reads"] = step.form.area
        else:
            node = self.graph.create_node(step.node.op, step.node.target, arguments, keywords)
        return Value((Tensor(node, self.tensors.natural(step)),), step, step.form)

    def _whole(self, source: fx.Node) -> fx.Node:
        """The student's node for one of the teacher: a whole value, a constant, a size."""
        if source not in self.whole:
            if source in self.step_of:
                made = self.tensors.ordered(self.values[self.step_of[source].name])
            elif source.op == "get_attr":
                name = f"{source.target}_whole"
                tensor = operator.attrgetter(str(source.target))(self.teacher.module)
                copied = tensor.detach().clone()
                trained = isinstance(tensor, nn.Parameter)
                self.modules[name] = nn.Parameter(copied) if trained else copied
                made = self.graph.get_attr(name)
            else:
                made = self.graph.node_copy(source, self._whole)
            self.whole[source] = made
        return self.whole[source]

    def _rearrange(self, step: Step) -> Value:
        """Relabels the tensors that the step's channels come from."""
        live = [name for name in step.inputs if name in self.values]
        first = self.values[live[0]]
        if first.through:
            return self._each(first, step, lambda t, _: self._reform(t.node, first.form, step.form))
        assert step.origin is not None
        tensors: list[Tensor] = []
        for index, name in enumerate(step.inputs):
            if name not in self.values:
                continue
            value = self.values[name]
            target = np.flatnonzero(step.origin[:, 0] == index)
            origin = step.origin[target, 1]
            for tensor in value.tensors:
                renamed = [(k, new) for k in tensor.keys for new in self._renamed(
                    step, value, k, target, origin)]  # fmt: skip
                if renamed:
                    old, new = zip(*renamed, strict=True)
                    node = self._reform(self.tensors.gather(value, old), value.form, step.form)
                    tensors.append(Tensor(node, new))
        made = Value(tuple(tensors), step, step.form)
        if len(tensors) > 1 and self._is_read_whole(step):
            node = self.tensors.gather(made, made.keys)
            return replace(made, tensors=(Tensor(node, made.keys),))
        return made

    def _renamed(
        self, step: Step, value: Value, key: Key, target: np.ndarray, origin: np.ndarray
    ) -> Iterator[Key]:
        """What a key of a source is called in the rearranged value; nothing if left out."""
        group, part, _ = key
        sources = self.tensors.positions(value.of.name, key)
        wanted = np.isin(origin, sources)
        if not wanted.any():
            return
        for new in self.tensors.keys(step, group, part):
            places = self.tensors.positions(step.name, new)
            found = np.isin(places, target)
            if not found.all():
                continue
            came = origin[np.searchsorted(target, places)]
            if np.array_equal(came, sources):
                yield new
            elif group in self.teacher.grouping.together:
                raise UserError(
                    f"{step.name} takes apart channels that a grouped convolution keeps together: "
                    "not supported"
                )

    def _is_read_whole(self, step: Step) -> bool:
        """Whether everything behind a step reads all that is left of its channels."""
        readers = [s for s in self.readers.get(step.name, []) if s.name in self.structure.live]
        for reader in readers:
            if reader.kind == "layer":
                if reader.name in self.structure.bypassed:
                    return False
                if not self.parts.reads_all(reader.name, step.groups):
                    return False
            elif reader.kind in ("norm", "activation", "spatial", "channelwise"):
                if not self._is_read_whole(reader):
                    return False
            elif reader.kind not in ("mixing", "opaque", "output"):
                return False
        return bool(readers)

    def _reform(self, node: fx.Node, old: Form, new: Form) -> fx.Node:
        """The same pixels and channels in another form, by way of a map."""
        call = self.graph.call_function
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
