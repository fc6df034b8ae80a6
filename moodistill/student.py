"""From a genome to a physical network: sliced modules, one dense conv per connection pattern."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from moodistill.genome import GenomeLayout, Structure, resolve
from moodistill.graph import Step, TeacherGraph


@dataclass(frozen=True)
class Unit:
    """One conv or linear module of the student and what it stands for in the teacher.

    Attributes:
        target: its path in the student.
        layer: the teacher's layer.
        outputs: per group of the convolution, the teacher channels that it computes.
        inputs: per group of the convolution, the channels (of `source`) that it reads.
        source: the channel group that it reads.
        through: whether it reads past a bypassed layer, so that `source` is not the group that
            the teacher's layer reads.
        repeat: features per channel of its input (behind a flatten).
    """

    target: str
    layer: str
    outputs: tuple[np.ndarray, ...]
    inputs: tuple[np.ndarray, ...]
    source: str
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
class _Value:
    """A teacher node's value in the student: one fx node per part of a channel group."""

    group: str
    nodes: tuple[fx.Node, ...]
    through: bool = False
    repeat: int = 1


class _Parts:
    """How each live group's kept channels are cut into tensors, and which layers are grouped."""

    def __init__(self, layout: GenomeLayout, structure: Structure, convs: set[str]) -> None:
        self.layout = layout
        self.structure = structure
        self.active = [layout.by_name[name] for name in structure.source]
        self.alive = {
            name: np.unique(layout.groups[name].block[kept])
            for name, kept in structure.kept.items()
        }
        self.grouped: dict[str, int] = {}
        self.cut = self._cut()
        for layer in self.active:
            # Linear layers have no grouped form: theirs stay one dense layer per pattern.
            classes = self._classes(layer.name) if layer.name in convs else 0
            if classes > 1:
                # Taken only if the layer then reads one tensor and writes one, in class order.
                self.grouped[layer.name] = classes
                trial = self._cut()
                ends = (self.structure.source[layer.name], layer.group)
                rest = [g for g in self.grouped if g != layer.name]
                affected = {self.structure.source[g] for g in rest} | {
                    layout.by_name[g].group for g in rest
                }
                whole = all(len(trial[g]) == 1 for g in {*ends, *affected})
                if whole and all(self._in_order(g, trial) for g in self.grouped):
                    self.cut = trial
                else:
                    del self.grouped[layer.name]

    def _matrix(self, name: str) -> np.ndarray:
        """Live part of a layer's block matrix, `(live out blocks, live in blocks)`."""
        rows = self.alive[self.layout.by_name[name].group]
        columns = self.alive[self.structure.source[name]]
        return self.structure.connected[name][np.ix_(rows, columns)]

    def _classes(self, name: str) -> int:
        """Number of equal diagonal blocks of the layer's connections, 0 if not block-diagonal."""
        matrix = self._matrix(name)
        patterns = np.unique(matrix, axis=0)
        if len(patterns) < 2 or (patterns.sum(axis=0) != 1).any():
            return 0
        layer = self.layout.by_name[name]
        sizes = set()
        for pattern in patterns:
            rows = (matrix == pattern).all(axis=1)
            outputs = self._count(layer.group, self.alive[layer.group][rows])
            source = self.structure.source[name]
            sizes.add((outputs, self._count(source, self.alive[source][pattern])))
        return len(patterns) if len(sizes) == 1 else 0

    def _count(self, group: str, blocks: np.ndarray) -> int:
        kept = self.structure.kept[group]
        return int(np.isin(self.layout.groups[group].block[kept], blocks).sum())

    def _label(self, name: str, side: str) -> np.ndarray:
        """A number per live block of one side of a layer: equal rows or columns, equal number."""
        matrix = self._matrix(name)
        lines = matrix if side == "out" else matrix.T
        _, label = np.unique(lines, axis=0, return_inverse=True)
        return np.asarray(label).reshape(-1)

    def _cut(self) -> dict[str, list[np.ndarray]]:
        """For every live group, its tensors: lists of block indices in channel order."""
        result = {}
        for name, blocks in self.alive.items():
            split: list[np.ndarray] = []
            order: list[np.ndarray] = []
            for layer in self.active:
                ends = (("in", self.structure.source[layer.name]), ("out", layer.group))
                for side in (side for side, group in ends if group == name):
                    if layer.name in self.grouped:
                        order.append(self._class_rank(layer.name, side))
                    else:
                        split.append(self._label(layer.name, side))
            keys = np.array([*split, *order, np.arange(len(blocks))]).reshape(-1, len(blocks))
            sequence = np.lexsort(keys[::-1])
            parts: list[list[int]] = []
            previous = None
            for place in sequence:
                key = tuple(label[place] for label in split)
                if key != previous:
                    parts.append([])
                parts[-1].append(int(blocks[place]))
                previous = key
            result[name] = [np.array(part) for part in parts]
        return result

    def _class_rank(self, name: str, side: str) -> np.ndarray:
        """The diagonal block that each live block of one side belongs to."""
        matrix = self._matrix(name)
        patterns = np.unique(matrix, axis=0)
        if side == "in":
            return patterns.argmax(axis=0)
        return np.array([int((patterns == row).all(axis=1).argmax()) for row in matrix])

    def _in_order(self, name: str, cut: dict[str, list[np.ndarray]]) -> bool:
        """Whether both sides of a grouped layer run through its classes one after another."""
        layer = self.layout.by_name[name]
        for side, group in (("in", self.structure.source[name]), ("out", layer.group)):
            rank = dict(zip(self.alive[group], self._class_rank(name, side), strict=True))
            ranks = [rank[block] for block in cut[group][0]]
            if ranks != sorted(ranks):
                return False
        return True

    def channels(self, group: str, blocks: np.ndarray) -> np.ndarray:
        """Kept teacher channels of some blocks, block by block."""
        kept = self.structure.kept[group]
        block = self.layout.groups[group].block
        return np.concatenate([np.flatnonzero(kept & (block == b)) for b in blocks])

    def units(self, layer: Step) -> Iterator[tuple[list[int], tuple, tuple]]:
        """For each output tensor: the input tensors it reads, outputs and inputs per class."""
        source = self.structure.source[layer.name]
        if layer.name in self.grouped:
            out_rank = dict(
                zip(self.alive[layer.group], self._class_rank(layer.name, "out"), strict=True)
            )
            in_rank = dict(zip(self.alive[source], self._class_rank(layer.name, "in"), strict=True))

            def split(group: str, rank: dict) -> tuple[np.ndarray, ...]:
                blocks = self.cut[group][0]
                return tuple(
                    self.channels(group, blocks[[rank[b] == c for b in blocks]])
                    for c in range(self.grouped[layer.name])
                )

            yield [0], split(layer.group, out_rank), split(source, in_rank)
            return
        for part in self.cut[layer.group]:
            row = self.structure.connected[layer.name][part[0]]
            chosen = [i for i, blocks in enumerate(self.cut[source]) if row[blocks[0]]]
            inputs = np.concatenate([self.channels(source, self.cut[source][i]) for i in chosen])
            yield chosen, (self.channels(layer.group, part),), (inputs,)


def build_student(graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray) -> Student:
    """The physical network of a genome, its weights sliced from the teacher.

    The genome is taken as it is but for what `genome.resolve` must repair; snap it to whole SIMD
    steps with `genome.canonical` first. A layer that reads past a bypassed layer has no plain
    slice: its weights are zero until `inherit` solves for them.
    """
    structure = resolve(layout, genome)
    convs = {s.name for s in graph.layers if isinstance(graph.layer_module(s.name), nn.Conv2d)}
    parts = _Parts(layout, structure, convs)
    target_graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    values: dict[str, _Value] = {}
    units: list[Unit] = []
    norms: list[NormSlice] = []
    joined: dict[tuple[fx.Node, ...], fx.Node] = {}

    def join(nodes: tuple[fx.Node, ...]) -> fx.Node:
        if len(nodes) == 1:
            return nodes[0]
        if nodes not in joined:
            joined[nodes] = target_graph.call_function(torch.cat, (list(nodes), 1))
        return joined[nodes]

    def name(target: str, index: int, count: int) -> str:
        return target if count == 1 else f"{target}.{index}"

    for step in graph.steps:
        if step.name not in structure.live:
            continue
        target = str(step.node.target)
        if step.kind == "input":
            node = target_graph.placeholder("input")
            values[step.name] = _Value(step.group, (node,))
            continue
        if step.kind == "output":
            target_graph.output(join(values[step.inputs[0]].nodes))
            continue
        if step.kind == "merge":
            kept = structure.merges[step.name]
            chosen = [values[i] for i, on in zip(step.inputs, kept, strict=True) if on]
            if len(chosen) == 1:
                values[step.name] = chosen[0]
            else:
                pairs = zip(chosen[0].nodes, chosen[1].nodes, strict=True)
                added = tuple(target_graph.call_function(torch.add, pair) for pair in pairs)
                values[step.name] = _Value(step.group, added, repeat=step.repeat)
            continue
        value = values[step.inputs[0]]
        if step.kind == "layer":
            if step.name in structure.bypassed:
                values[step.name] = _Value(value.group, value.nodes, True, value.repeat)
                continue
            made = list(parts.units(step))
            outputs = []
            for index, (chosen_parts, outs, ins) in enumerate(made):
                path = name(step.name, index, len(made))
                unit = Unit(path, step.name, outs, ins, value.group, value.through, value.repeat)
                modules[path] = _slice_layer(graph.layer_module(step.name), unit)
                units.append(unit)
                source = join(tuple(value.nodes[i] for i in chosen_parts))
                outputs.append(target_graph.call_module(path, (source,)))
            values[step.name] = _Value(step.group, tuple(outputs))
        elif step.kind == "norm":
            if value.through:
                values[step.name] = value
                continue
            outputs = []
            for index, (node, blocks) in enumerate(
                zip(value.nodes, parts.cut[value.group], strict=True)
            ):
                path = name(target, index, len(value.nodes))
                channels = parts.channels(value.group, blocks)
                modules[path] = _slice_norm(graph.module.get_submodule(target), channels)
                norms.append(NormSlice(path, target, channels))
                outputs.append(target_graph.call_module(path, (node,)))
            values[step.name] = _Value(value.group, tuple(outputs))
        elif step.kind == "activation" and value.through:
            values[step.name] = value
        else:
            outputs = [_apply(target_graph, modules, graph, step, node) for node in value.nodes]
            repeat = value.repeat
            if step.kind == "spatial" and step.repeat != 1:
                repeat = step.repeat
            values[step.name] = _Value(value.group, tuple(outputs), value.through, repeat)
    module = fx.GraphModule(modules, target_graph, "Student")
    return Student(module.eval(), tuple(units), tuple(norms))


def _apply(
    target_graph: fx.Graph,
    modules: dict[str, nn.Module],
    graph: TeacherGraph,
    step: Step,
    node: fx.Node,
) -> fx.Node:
    """Repeat a step without channels of its own (activation, pooling, flatten) on one tensor."""
    source = step.node
    if source.op == "call_module":
        path = str(source.target)
        if path not in modules:
            modules[path] = copy.deepcopy(graph.module.get_submodule(path))
            if getattr(modules[path], "inplace", False):
                # Where an edge is dropped, others may read the same tensor.
                modules[path].inplace = False  # type: ignore[assignment]
        return target_graph.call_module(path, (node,))
    if source.target in ("view", "reshape"):
        # The teacher's sizes are those of all its channels: flatten says the same for any width.
        return target_graph.call_function(torch.flatten, (node, 1))
    arguments = (node, *source.args[1:])
    keywords = {k: False if k == "inplace" else v for k, v in source.kwargs.items()}
    if source.op == "call_method":
        return target_graph.call_method(str(source.target).removesuffix("_"), arguments, keywords)
    return target_graph.call_function(source.target, arguments, keywords)  # type: ignore


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


def _slice_norm(norm: nn.Module, channels: np.ndarray) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    index = torch.from_numpy(channels)
    made = type(norm)(len(channels), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.load_state_dict({k: v[index] if v.ndim else v for k, v in norm.state_dict().items()})
    return made
