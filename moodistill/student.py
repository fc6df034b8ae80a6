"""From a genome to a physical network: sliced modules, one dense conv per connection pattern.

A value of the teacher is, in the student, a list of tensors: each holds some parts of channel
groups. Layers read the tensors that they are connected to (concatenated); what moves channels
about in the teacher only relabels tensors, so that a channel shuffle leaves no trace.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.channels import ranks
from moodistill.errors import UserError
from moodistill.genome import GenomeLayout
from moodistill.graph import Step, TeacherGraph
from moodistill.operations import JOINS
from moodistill.parts import Parts
from moodistill.rearrange import Form
from moodistill.resolve import resolve

Key = tuple[str, int, int]  # group, part of it, which of a class's channels in this value


@dataclass(frozen=True)
class Unit:
    """One conv or linear module of the student and what it stands for in the teacher.

    Attributes:
        target: its path in the student.
        layer: the teacher's layer.
        outputs: per group of the convolution, the teacher layer's outputs that it computes.
        inputs: per group of the convolution, the teacher layer's inputs that it reads; past a
            bypassed layer those of the value that it reads instead.
        through: whether it reads past a bypassed layer.
        repeat: features per channel of its input (behind a flatten).
    """

    target: str
    layer: str
    outputs: tuple[np.ndarray, ...]
    inputs: tuple[np.ndarray, ...]
    through: bool
    repeat: int


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

    @property
    def parameters(self) -> int:
        """Number of parameters (batch normalisation included, as the literature counts)."""
        return sum(p.numel() for p in self.module.parameters())


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the student and the keys of the channels in it, in order."""

    node: fx.Node
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class _Value:
    """A teacher's value in the student.

    Attributes:
        tensors: that hold it.
        of: the step whose channels the keys refer to (an earlier one past a bypassed layer).
        form: how it lies in memory.
        through: whether it comes past a bypassed layer.
    """

    tensors: tuple[_Tensor, ...]
    of: Step
    form: Form
    through: bool = False

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys, tensor by tensor."""
        return tuple(key for tensor in self.tensors for key in tensor.keys)


def build_student(graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray) -> Student:
    """The physical network of a genome, its weights sliced from the teacher.

    The genome is taken as it is but for what `resolve` must repair; snap it to whole SIMD steps
    with `canonical` first. A layer that reads past a bypassed layer has no plain slice: its
    weights are zero until `inherit` solves for them.
    """
    return _Builder(graph, layout, genome).build()


class _Builder:
    """Writes the student's graph step by step."""

    def __init__(self, graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray) -> None:
        self.teacher = graph
        self.structure = resolve(layout, genome)
        layers = {s.name: s for s in graph.steps if s.kind == "layer"}
        convs = {n for n, s in layers.items() if isinstance(self._module(s), nn.Conv2d)}
        self.parts = Parts(layout, self.structure, convs)
        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.values: dict[str, _Value] = {}
        self.units: list[Unit] = []
        self.norms: list[NormSlice] = []
        self.positions = cache(self._positions)
        self.table = cache(self._table)
        self.joined = cache(self._join)
        self.narrowed = cache(self._narrow)
        self.readers: dict[str, list[Step]] = {}
        for step in graph.steps:
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)

    def _module(self, step: Step) -> nn.Module:
        return self.teacher.module.get_submodule(step.target)

    def build(self) -> Student:
        """The whole student."""
        write: dict[str, Callable[[Step, _Value], _Value]] = {
            "layer": self._layer, "norm": self._norm, "channelwise": self._channelwise,
            "mixing": self._mixing, "activation": self._apply, "spatial": self._apply,
        }  # fmt: skip
        for step in self.teacher.steps:
            if step.name not in self.structure.live:
                continue
            if step.kind == "input":
                node = self.graph.placeholder("input")
                value = _Value((_Tensor(node, self._natural(step)),), step, step.form)
            elif step.kind == "output":
                self.graph.output(self._ordered(self.values[step.inputs[0]]))
                continue
            elif step.kind in ("merge", "gate"):
                value = self._joint(step)
            elif step.kind == "rearrange":
                value = self._rearrange(step)
            else:
                value = write[step.kind](step, self.values[step.inputs[0]])
            self.values[step.name] = value
        module = fx.GraphModule(self.modules, self.graph, "Student")
        return Student(module.eval(), tuple(self.units), tuple(self.norms))

    # Keys and channels

    def _table(self, name: str, group: str) -> np.ndarray:
        """`(size, n)`: where the channels of each class of a group lie in a step's output."""
        step = self.teacher.step(name)
        here = np.flatnonzero(step.owner == step.groups.index(group))
        place = step.place[here]
        rank = ranks(place)
        table = np.full((self.teacher.groups[group], int(rank.max()) + 1), -1)
        table[place, rank] = here
        return table

    def _positions(self, name: str, key: Key) -> np.ndarray:
        """Channels of a step's output that a key stands for, in order."""
        group, part, lane = key
        table = self.table(name, group)[self.parts.members(group, part)]
        if group in self.teacher.grouping.together:
            return table.reshape(-1)
        return table[:, lane]

    def _channels(self, step: Step, keys: Sequence[Key]) -> np.ndarray:
        return np.concatenate([self.positions(step.name, key) for key in keys])

    def _keys(self, step: Step, group: str, part: int) -> tuple[Key, ...]:
        if group in self.teacher.grouping.together:
            return ((group, part, 0),)
        lanes = self.table(step.name, group).shape[1]
        return tuple((group, part, lane) for lane in range(lanes))

    def _natural(self, step: Step) -> tuple[Key, ...]:
        """All keys of a step's output."""
        return tuple(
            key
            for group in step.groups
            for part in range(len(self.parts.cut[group]))
            for key in self._keys(step, group, part)
        )

    # Tensors

    def _join(self, nodes: tuple[fx.Node, ...], axis: int) -> fx.Node:
        return self.graph.call_function(torch.cat, (list(nodes), axis))

    def _narrow(self, node: fx.Node, axis: int, start: int, length: int) -> fx.Node:
        return self.graph.call_function(torch.narrow, (node, axis, start, length))

    def _gather(self, value: _Value, keys: Sequence[Key]) -> fx.Node:
        """One tensor with exactly these keys in this order; whole tensors where possible."""
        place = {k: (t, i) for t in value.tensors for i, k in enumerate(t.keys)}
        axis, repeat = value.form.axis, value.form.repeat
        pieces = []
        start = 0
        while start < len(keys):
            tensor, first = place[keys[start]]
            count = 1
            while tensor.keys[first + count : first + count + 1] == tuple(
                keys[start + count : start + count + 1]
            ) != ():  # fmt: skip
                count += 1
            if count == len(tensor.keys):
                pieces.append(tensor.node)
            else:
                before, here = tensor.keys[:first], tensor.keys[first : first + count]
                offset = len(self._channels(value.of, before)) * repeat if before else 0
                length = len(self._channels(value.of, here)) * repeat
                pieces.append(self.narrowed(tensor.node, axis, offset, length))
            start += count
        return pieces[0] if len(pieces) == 1 else self.joined(tuple(pieces), axis)

    def _ordered(self, value: _Value) -> fx.Node:
        """The whole value as one tensor in the teacher's order of channels."""
        node = self._gather(value, value.keys)
        order = np.argsort(self._channels(value.of, value.keys))
        if np.array_equal(order, np.arange(len(order))):
            return node
        name = f"{node.name}_order"
        self.modules[name] = torch.from_numpy(order)
        return self.graph.call_function(
            torch.index_select, (node, value.form.axis, self.graph.get_attr(name))
        )

    @staticmethod
    def _path(target: str, index: int, count: int) -> str:
        return target if count == 1 else f"{target}.{index}"

    # Steps

    def _layer(self, step: Step, value: _Value) -> _Value:
        if step.name in self.structure.bypassed:
            return replace(value, through=True)
        outputs = []
        made = list(self._unit_keys(step, value))
        for index, (outs, ins) in enumerate(made):
            path = self._path(step.target, index, len(made))
            if step.name in self.parts.grouped:
                classes = self.parts.diagonal(step.name)
                ends = (step, value.of)
                out_groups, in_groups = (
                    tuple(self.table(s.name, k[0][0])[c, 0] for c in side)
                    for s, k, side in zip(ends, (outs, ins), classes, strict=True)
                )
            else:
                out_groups = (self._channels(step, outs),)
                in_groups = (self._channels(value.of, ins),)
            unit = Unit(path, step.target, out_groups, in_groups, value.through, value.form.repeat)
            if path not in self.modules:
                layer = self.teacher.layer_module(step.target)
                self.modules[path] = _slice_layer(layer, unit)
                self.units.append(unit)
            node = self.graph.call_module(path, (self._gather(value, ins),))
            outputs.append(_Tensor(node, outs))
        return _Value(tuple(outputs), step, step.form)

    def _unit_keys(
        self, step: Step, value: _Value
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
            yield tuple(k for g, p in parts for k in self._keys(step, g, p)), patterns[0]
            return
        for (group, part), pattern in zip(parts, patterns, strict=True):
            yield self._keys(step, group, part), pattern

    def _each(self, value: _Value, step: Step, write: Callable[[_Tensor, int], fx.Node]) -> _Value:
        """A value made tensor by tensor from another with the same channels."""
        tensors = tuple(
            _Tensor(write(tensor, index), tensor.keys) for index, tensor in enumerate(value.tensors)
        )
        of = value.of if value.through else step
        return _Value(tensors, of, step.form, value.through)

    def _norm(self, step: Step, value: _Value) -> _Value:
        if value.through:
            return value
        count = len(value.tensors)

        def write(tensor: _Tensor, index: int) -> fx.Node:
            path = self._path(step.target, index, count)
            if path not in self.modules:
                channels = self._channels(step, tensor.keys)
                self.modules[path] = _slice_norm(self._module(step), channels)
                calls = sum(s.target == step.target for s in self.teacher.steps)
                # A norm with several inputs keeps the teacher's statistics of them all.
                if calls == 1:
                    self.norms.append(NormSlice(path, step.target, channels))
            return self.graph.call_module(path, (tensor.node,))

        return self._each(value, step, write)

    def _channelwise(self, step: Step, value: _Value) -> _Value:
        count = len(value.tensors)

        def write(tensor: _Tensor, index: int) -> fx.Node:
            channels = self._channels(value.of, tensor.keys)
            if step.node.op != "call_module":
                return self._scaled(step, tensor.node, channels, index, count)
            path = self._path(step.target, index, count)
            if path not in self.modules:
                module = self._module(step)
                if isinstance(module, nn.Conv2d):
                    self.modules[path] = _slice_grouped(
                        module, channels, self._channels(step, tensor.keys), step.name
                    )
                else:
                    assert isinstance(module, nn.PReLU)
                    made = nn.PReLU(len(channels))
                    made.weight = nn.Parameter(module.weight.detach()[channels].clone())
                    self.modules[path] = made
            return self.graph.call_module(path, (tensor.node,))

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
                axis = tensor.ndim - (1 if step.form.kind != "map" else 3)
                chosen = tensor.detach().index_select(axis, torch.from_numpy(channels)).clone()
                trained = isinstance(tensor, nn.Parameter)
                self.modules[name] = nn.Parameter(chosen) if trained else chosen
            return self.graph.get_attr(name)

        arguments = fx.node.map_arg(step.node.args, convert)
        return self.graph.call_function(JOINS[step.node.target], arguments)

    def _mixing(self, step: Step, value: _Value) -> _Value:
        module = copy.deepcopy(self._module(step))
        if isinstance(module, nn.LayerNorm):
            # The order of the channels does not matter to it.
            node, keys = self._gather(value, value.keys), value.keys
            channels = torch.from_numpy(self._channels(value.of, keys))
            for name in ("weight", "bias"):
                tensor = getattr(module, name)
                if tensor is not None:
                    setattr(module, name, nn.Parameter(tensor.detach()[channels].clone()))
        else:
            node, keys = self._ordered(value), value.keys
            if len(keys) > 1 or len(value.tensors) > 1:
                order = self._channels(value.of, keys)
                if not np.array_equal(order, np.arange(len(order))):
                    raise UserError(f"{step.target}: its channels are out of order: not supported")
        self.modules[step.target] = module
        made = _Tensor(self.graph.call_module(step.target, (node,)), keys)
        return _Value((made,), step, step.form)

    def _joint(self, step: Step) -> _Value:
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
                    operands.append(self._gather(value, tensor.keys))
                else:  # one value for all channels
                    operands.append(self._gather(value, value.keys))
            node = self.graph.call_function(operation, tuple(operands))
            tensors.append(_Tensor(node, tensor.keys))
        return _Value(tuple(tensors), step, step.form)

    def _apply(self, step: Step, value: _Value) -> _Value:
        """A step without channels of its own (activation, pooling)."""
        if step.kind == "activation" and value.through:
            return value

        def write(tensor: _Tensor, index: int) -> fx.Node:
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
            self.modules[name] = operator.attrgetter(name)(self.teacher.module)
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

    def _rearrange(self, step: Step) -> _Value:
        """Relabels the tensors that the step's channels come from."""
        live = [name for name in step.inputs if name in self.values]
        first = self.values[live[0]]
        if first.through:
            return self._each(first, step, lambda t, _: self._reform(t.node, first.form, step.form))
        assert step.origin is not None
        tensors: list[_Tensor] = []
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
                    node = self._reform(self._gather(value, old), value.form, step.form)
                    tensors.append(_Tensor(node, new))
        made = _Value(tuple(tensors), step, step.form)
        if len(tensors) > 1 and self._is_read_whole(step):
            node = self._gather(made, made.keys)
            return replace(made, tensors=(_Tensor(node, made.keys),))
        return made

    def _renamed(
        self, step: Step, value: _Value, key: Key, target: np.ndarray, origin: np.ndarray
    ) -> Iterator[Key]:
        """What a key of a source is called in the rearranged value; nothing if left out."""
        group, part, _ = key
        sources = self.positions(value.of.name, key)
        wanted = np.isin(origin, sources)
        if not wanted.any():
            return
        for new in self._keys(step, group, part):
            places = self.positions(step.name, new)
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
            elif reader.kind not in ("mixing", "output"):
                return False
        return bool(readers)

    def _reform(self, node: fx.Node, old: Form, new: Form) -> fx.Node:
        call = self.graph.call_function
        if old.kind == new.kind:
            return node
        if (old.kind, new.kind) == ("last", "map"):
            return call(torch.permute, (node, (0, 3, 1, 2)))
        if new.kind in ("flat", "vector"):
            return call(torch.flatten, (node, 1))
        if old.kind in ("flat", "vector"):
            node = call(torch.unflatten, (node, 1, (-1, *new.size)))
        return node if new.kind == "map" else call(torch.permute, (node, (0, 2, 3, 1)))


def feature_index(channels: np.ndarray, repeat: int) -> torch.Tensor:
    """Columns of flattened features: `repeat` consecutive ones per channel."""
    index = channels[:, None] * repeat + np.arange(repeat)[None, :]
    return torch.from_numpy(index.reshape(-1))


def _slice_layer(layer: nn.Conv2d | nn.Linear, unit: Unit) -> nn.Module:
    outputs = torch.from_numpy(np.concatenate(unit.outputs))
    width = sum(len(i) for i in unit.inputs)
    blocks = []
    for outs, ins in zip(unit.outputs, unit.inputs, strict=True):
        rows = layer.weight.detach()[torch.from_numpy(outs)]
        if unit.through:
            shape = (len(outs), len(ins) * unit.repeat, *rows.shape[2:])
            blocks.append(torch.zeros(shape))
        else:
            blocks.append(rows[:, feature_index(ins, unit.repeat)])
    weight = torch.cat(blocks)
    made: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        made = nn.utils.skip_init(
            nn.Conv2d, width, len(outputs), layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, len(unit.outputs), layer.bias is not None,
        )  # fmt: skip
    else:
        made = nn.utils.skip_init(
            nn.Linear, width * unit.repeat, len(outputs), layer.bias is not None
        )
    made.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[outputs].clone())
    return made


def _slice_grouped(
    layer: nn.Conv2d, inputs: np.ndarray, outputs: np.ndarray, name: str
) -> nn.Conv2d:
    """The groups of a grouped convolution that read `inputs`."""
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    groups = inputs.reshape(-1, reads)[:, 0] // reads
    whole = np.array_equal(inputs, (groups[:, None] * reads + np.arange(reads)).reshape(-1))
    wanted = (groups[:, None] * writes + np.arange(writes)).reshape(-1)
    if not whole or not np.array_equal(outputs, wanted):
        raise UserError(f"{name}: the channels of its groups are out of order: not supported")
    made = nn.utils.skip_init(
        nn.Conv2d, len(inputs), len(outputs), layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, len(groups), layer.bias is not None,
    )  # fmt: skip
    index = torch.from_numpy(outputs)
    made.weight = nn.Parameter(layer.weight.detach()[index].clone())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[index].clone())
    return made


def _slice_norm(norm: nn.Module, channels: np.ndarray) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    index = torch.from_numpy(channels)
    made = type(norm)(len(channels), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.load_state_dict({k: v[index] if v.ndim else v for k, v in norm.state_dict().items()})
    return made
