"""From a trained network to channel groups, connection sites and edges, by general rules.

The teacher is traced at module level by `torch.fx`; channel identity is followed through the
graph: layers start a group, Add ties groups, everything element-wise or spatial passes them on.
An operation that is not known is refused by name, never taken as element-wise.
"""

from __future__ import annotations

import contextlib
import io
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.genome import INPUT

PICTURES = 2  # in the batch that shapes are propagated with
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.GELU, nn.ELU, nn.Dropout, nn.Dropout2d, nn.Identity,
)  # fmt: skip
SPATIAL = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)
ADDS = (operator.add, operator.iadd, torch.add)
ACTIVATION_CALLS = (F.relu, torch.relu, F.dropout, "relu", "relu_")
SPATIAL_CALLS = (F.adaptive_avg_pool2d, F.max_pool2d, F.avg_pool2d, torch.flatten, "flatten")


@dataclass(frozen=True)
class Step:
    """One live node of the traced teacher.

    Attributes:
        name: for a layer its module path, else the fx node's name.
        kind: input, layer, merge, norm, activation, spatial or output.
        node: the fx node.
        inputs: names of the steps it reads.
        group: the channel group of its output.
        reads: for a layer, the group of its input.
        repeat: features per channel (`h * w` behind a flatten, else 1).
        shape: of its output without the batch axis.
    """

    name: str
    kind: str
    node: fx.Node
    inputs: tuple[str, ...]
    group: str
    reads: str
    repeat: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TeacherGraph:
    """The traced teacher; `groups` gives every channel group's size."""

    module: fx.GraphModule
    steps: tuple[Step, ...]
    groups: dict[str, int]
    input_shape: tuple[int, int, int]
    output_group: str

    @property
    def layers(self) -> list[Step]:
        """Conv and linear layers in topological order."""
        return [step for step in self.steps if step.kind == "layer"]

    def layer_module(self, name: str) -> nn.Conv2d | nn.Linear:
        """The teacher's conv or linear layer at a module path."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return module


class _Groups:
    """Union-find over group names; the earliest name represents a group."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def new(self, name: str, size: int) -> str:
        self.parent[name], self.sizes[name] = name, size
        return name

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def tie(self, one: str, other: str) -> str:
        one, other = self.find(one), self.find(other)
        order = list(self.parent)
        first, second = sorted((one, other), key=order.index)
        self.parent[second] = first
        return first


def trace(teacher: nn.Module, input_shape: tuple[int, int, int]) -> TeacherGraph:
    """Trace `teacher` and find its channel groups.

    Raises:
        UserError: if it cannot be traced or uses an operation that is not supported.
    """
    try:
        module = fx.symbolic_trace(teacher.eval())
        module.graph.eliminate_dead_code()
        # Two pictures, so that an operation that mixes them shows; ShapeProp prints a traceback of
        # its own, the cause of the error says the same in one line.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(module).propagate(torch.zeros(PICTURES, *input_shape))
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(
            f"{type(teacher).__name__} cannot be traced by torch.fx with input "
            f"{(1, *input_shape)}: {reason[0]}; expected a CNN without data-dependent control flow"
        ) from error
    groups = _Groups()
    steps: dict[str, Step] = {}
    used: set[str] = set()
    names: dict[fx.Node, str] = {}
    taken = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for node in module.graph.nodes:
        step = _read_node(module, node, names, steps, groups, used, taken)
        names[node] = step.name
        steps[step.name] = step
    final = tuple(
        Step(
            s.name, s.kind, s.node, s.inputs, groups.find(s.group),
            groups.find(s.reads) if s.reads else "", s.repeat, s.shape,
        )
        for s in steps.values()
    )  # fmt: skip
    sizes = {g: groups.sizes[g] for g in groups.parent if groups.find(g) == g}
    return TeacherGraph(module, final, sizes, input_shape, final[-1].group)


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape[1:]) if isinstance(meta, fx.passes.shape_prop.TensorMetadata) else ()


def _batch(node: fx.Node) -> int:
    """Length of the first axis, `PICTURES` where it is not a tensor."""
    meta = node.meta.get("tensor_meta")
    return meta.shape[0] if isinstance(meta, fx.passes.shape_prop.TensorMetadata) else PICTURES


def _read_node(
    module: fx.GraphModule,
    node: fx.Node,
    names: dict[fx.Node, str],
    steps: dict[str, Step],
    groups: _Groups,
    used: set[str],
    taken: set[str],
) -> Step:
    shape = _shape(node)
    sources = [arg for arg in node.all_input_nodes]
    inputs = tuple(names[source] for source in sources)
    first = steps[inputs[0]] if inputs else None

    def step(kind: str, group: str, reads: str = "", repeat: int = 1, name: str = "") -> Step:
        # A layer is named by its module path; no other step may have that name.
        own = node.name if node.name not in taken else f"{node.name} operation"
        return Step(name or own, kind, node, inputs, group, reads, repeat, shape)

    if node.op == "placeholder":
        if steps:
            raise UserError(f"the network has a second input {node.name!r}; expected one image")
        return step("input", groups.new(INPUT, shape[0]))
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node) or len(steps[inputs[0]].shape) != 1:
            raise UserError("the network's output is not one tensor of logits (N, classes)")
        return step("output", steps[inputs[0]].group)
    if first is None:
        raise UserError(f"{_called(module, node)} (at {node.name}) reads no input: not supported")
    if _batch(node) != PICTURES:
        raise UserError(
            f"{_called(module, node)} (at {node.name}) mixes pictures; expected the first axis to "
            "stay that of the batch"
        )
    if node.op == "call_module":
        target = str(node.target)
        called = module.get_submodule(target)
        if isinstance(called, nn.Conv2d | nn.Linear):
            if target in used:
                raise UserError(f"layer {target} is used twice; shared layers are not supported")
            used.add(target)
            _check_layer(called, target, first)
            size = called.out_channels if isinstance(called, nn.Conv2d) else called.out_features
            return step("layer", groups.new(target, size), reads=first.group, name=target)
        if isinstance(called, NORMS):
            if target in used:
                raise UserError(f"norm {target} is used twice; shared layers are not supported")
            used.add(target)
            if first.repeat != 1:
                raise UserError(f"{target}: BatchNorm behind a flatten is not supported")
            return step("norm", first.group)
        if isinstance(called, ACTIVATIONS):
            return step("activation", first.group, repeat=first.repeat)
        if isinstance(called, SPATIAL):
            return step("spatial", first.group, repeat=_repeat(node, first, shape, groups))
    elif node.op in ("call_function", "call_method"):
        if node.target in ADDS and len(sources) == len(node.args) == 2 and not node.kwargs:
            other = steps[inputs[1]]
            if other.shape != first.shape or other.repeat != first.repeat:
                raise UserError(
                    f"Add {node.name} joins {first.shape} and {other.shape}; "
                    "expected equal shapes (broadcasting is not supported)"
                )
            return step("merge", groups.tie(first.group, other.group), repeat=first.repeat)
        if node.target in ACTIVATION_CALLS and len(sources) == 1:
            return step("activation", first.group, repeat=first.repeat)
        if node.target in SPATIAL_CALLS and len(sources) == 1:
            return step("spatial", first.group, repeat=_repeat(node, first, shape, groups))
        if node.target in ("view", "reshape") and len(sources) == 1 and len(shape) == 1:
            return step("spatial", first.group, repeat=_repeat(node, first, shape, groups))
    raise UserError(
        f"operation {_called(module, node)} (at {node.name}) is not supported; supported are "
        "Conv2d, Linear, BatchNorm, element-wise activations, pooling, flatten and Add"
    )


def _called(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _check_layer(layer: nn.Module, name: str, source: Step) -> None:
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise UserError(f"{name}: grouped convolution (groups={layer.groups}) is not supported")
        if layer.padding_mode != "zeros":
            raise UserError(f"{name}: padding_mode {layer.padding_mode!r} is not supported")
    elif len(source.shape) != 1:
        raise UserError(f"{name}: Linear on a tensor of shape {source.shape} is not supported")


def _repeat(node: fx.Node, source: Step, shape: tuple[int, ...], groups: _Groups) -> int:
    """Features per channel behind a spatial operation: `h * w` once the map is flattened."""
    if len(shape) == 3:
        return 1
    size = groups.sizes[groups.find(source.group)]
    if len(shape) != 1 or shape[0] % size:
        raise UserError(
            f"{node.name} turns {source.shape} into {shape}; expected (channels * height * width,)"
        )
    return shape[0] // size
