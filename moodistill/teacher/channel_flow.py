"""Reads a flat graph node by node: every operation by what it does to channels.

What is not understood is left whole: the channels that flow into it and out of it are frozen in
their order, and it runs in every student as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.genome.layout import INPUT
from moodistill.teacher import operations as ops
from moodistill.teacher.channel_groups import Channels
from moodistill.teacher.rearrange import (
    NEXT_PICTURE,
    REARRANGING_CALLS,
    REARRANGING_MODULES,
    Elements,
    Form,
    map_form,
)
from moodistill.teacher.steps import Step
from moodistill.teacher.tracing import DROPOUTS, is_tensor
from moodistill.teacher.value_tracer import PICTURES, holds_tensor

READERS_ASKED = 4  # steps from what is left whole to the layer that says where its channels are


class NotUnderstood(Exception):
    """An operation whose effect on channels is not known."""


class ReadAgain(Exception):
    """What has been read shows that some nodes must be left whole."""

    def __init__(self, nodes: dict[fx.Node, str]) -> None:
        super().__init__()
        self.nodes = nodes


class Reader:
    """Collects the steps of a flat graph and what ties their channels.

    Attributes:
        channels: of all steps.
        steps: by name, in topological order.
        whole: steps that are left whole, and why.
    """

    def __init__(
        self, module: fx.GraphModule, left: dict[str, str], nodes: dict[fx.Node, str]
    ) -> None:
        """`left` are modules, `nodes` nodes of the graph to be left whole, with reasons."""
        self.module = module
        self.left = left
        self.forced = nodes
        self.whole: dict[str, str] = {}
        self.channels = Channels()
        self.elements = Elements()
        self.steps: dict[str, Step] = {}
        self.of: dict[fx.Node, Step] = {}
        # Rearranged values whose channels are not on one axis: numbers of their elements.
        self.raw: dict[fx.Node, Any] = {}
        self.moved_by: dict[fx.Node, str] = {}  # the operation that took them off one axis
        self.calls: dict[str, Step] = {}  # first call of every layer
        self.uses: dict[str, Step] = {}  # and what other modules and parameters were first used on
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.taken = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}

    def read(self, node: fx.Node) -> None:
        """Add the node's step, if it has one."""
        if node.op == "placeholder":
            self._add(node, "input", map_form(self._shape(node)))
        elif node.op == "output":
            self._output(node)
        elif node.op == "get_attr":
            self.constants[node] = operator.attrgetter(str(node.target))(self.module)
        elif any(s in self.of or s in self.raw for s in node.all_input_nodes):
            if holds_tensor(node.meta.get("value")):  # sizes and the like are no steps
                self._operation(node)
        elif is_tensor(node) and any(s not in self.constants for s in node.all_input_nodes):
            self._leave_whole(node, f"{self._called(node)} ({self._place(node)}) reads no picture")
        elif is_tensor(node):
            raise UserError(f"{self._called(node)} ({self._place(node)}) reads no input")

    def _called(self, node: fx.Node) -> str:
        return ops.called(self.module, node.target, node.op == "call_module")

    def _refuse(self, node: fx.Node, why: str = "") -> NotUnderstood:
        return NotUnderstood(
            f"operation {self._called(node)} ({self._place(node)}) is not supported"
            f"{f' {why}' if why else ''}"
        )

    @staticmethod
    def _place(node: fx.Node) -> str:
        where = node.meta.get("where")
        return f"at {node.name}, {where}" if where else f"at {node.name}"

    def _forbid(self, node: fx.Node, why: str) -> UserError:
        """For what would be wrong in a student, too."""
        return UserError(f"{self._called(node)} ({self._place(node)}) {why}")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of one picture; refuses what mixes pictures."""
        value = node.meta["value"]
        assert isinstance(value, torch.Tensor)
        if not value.ndim or value.shape[0] != PICTURES:
            raise NotUnderstood(
                f"{self._called(node)} ({self._place(node)}) mixes pictures, or moves the first "
                "axis, that of the batch"
            )
        return tuple(value.shape[1:])

    def _add(
        self,
        node: fx.Node,
        kind: str,
        form: Form,
        channels: np.ndarray | None = None,
        inputs: tuple[Step, ...] = (),
        origin: np.ndarray | None = None,
        name: str = "",
        again: bool = False,
    ) -> Step:
        # A layer is named by its module path; no other step may have that name.
        own = node.op == "call_module" and node.target == node.name
        taken = node.name in self.taken and not own
        name = name or (f"{node.name} operation" if taken else node.name)
        if channels is None:
            channels = self.channels.new(INPUT if kind == "input" else node.target, form.channels)  # type: ignore
            if kind == "input":
                self.channels.freeze(channels, "the network's input")
        elif origin is not None:
            self.channels.occurs(channels, tuple(s.channels for s in inputs), origin)
        sources = tuple(s.name for s in inputs)
        step = Step(name, kind, node, sources, form, channels, origin=origin, again=again)
        self.steps[name] = self.of[node] = step
        return step

    def _output(self, node: fx.Node) -> None:
        given: Any = node.args[0]
        if isinstance(given, fx.Node) and given in self.raw:
            self._hold(given, node)
        source = self.of.get(given) if isinstance(given, fx.Node) else None
        if source is None or source.form.kind != "vector":
            value = given.meta.get("value") if isinstance(given, fx.Node) else given
            form = f"{(1, *value.shape[1:])}" if isinstance(value, torch.Tensor) else (
                type(value).__name__
            )  # fmt: skip
            obstacles = f"; left whole: {self.obstacles()}" if self.whole else ""
            raise UserError(
                "the network's output is not one tensor of logits (N, classes) but, for one "
                f"picture, {form}: give a wrapper that returns the logits{obstacles}"
            )
        if self._called(source.node).lower() == "softmax":
            raise self._forbid(source.node, "gives probabilities; return the logits before it")
        self.channels.freeze(source.channels, "the network's output")
        self._add(node, "output", source.form, source.channels, (source,))

    def _operation(self, node: fx.Node) -> None:
        """Read a node, or leave it whole."""
        target = str(node.target)
        try:
            if node in self.forced:
                raise NotUnderstood(self.forced[node])
            if node.op == "call_module" and target in self.left:
                raise NotUnderstood(f"{self._called(node)} {target}: {self.left[target]}")
            self._understand(node)
        except NotUnderstood as reason:
            self._leave_whole(node, str(reason))

    def _leave_whole(self, node: fx.Node, why: str) -> None:
        """Add a node as it is; what it reads and gives keeps all channels in their order."""
        if node.op == "call_module" and list(
            self.module.get_submodule(str(node.target)).parameters()
        ):
            calls = [s for s in self.steps.values() if s.node.op == "call_module"]
            others = [
                s.node for s in calls if s.node.target == node.target and s.kind != "opaque"
            ]  # fmt: skip
            if others:  # its weights are used both ways: left whole wherever it is called
                raise ReadAgain({node: why, **dict.fromkeys(others, why)})
            self.left.setdefault(str(node.target), why)
        for source in node.all_input_nodes:
            if source in self.raw:
                self._hold(source, node, why)
        inputs = tuple(dict.fromkeys(self.of[s] for s in node.all_input_nodes if s in self.of))
        form = self._form_of_whole(node)
        made = self.channels.new(node.name, form.channels)
        step = self._add(node, "opaque", form, made, inputs)
        for channels in (made, *(source.channels for source in inputs)):
            self.channels.freeze(channels, why)
        self.whole[step.name] = why

    def _hold(self, node: fx.Node, reader: fx.Node, why: str = "") -> None:
        """Leave a rearrangement whole whose outcome `reader` needs as it is."""
        del self.raw[node]
        what = f"{self._called(reader)} ({self._place(reader)}) reads {self.moved_by[node]}"
        self._leave_whole(node, why or f"{what}, which moves more than whole channels")

    def _form_of_whole(self, node: fx.Node) -> Form:
        """The form of what an operation gives that is left whole, by who reads it."""
        value, more = node.meta["value"], node.meta["more"]
        whole = Form("whole", 1, (1, 1))
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return whole
        batched = (value.shape[0], more.shape[0]) == (PICTURES, PICTURES + 1)
        if not batched or value.shape[1:] != more.shape[1:]:
            return whole
        shape = tuple(value.shape[1:])
        if len(shape) == 1:
            return map_form(shape)
        frontier = [node]
        for _ in range(READERS_ASKED):
            frontier = [user for reader in frontier for user in reader.users]
            for user in frontier:
                if user.op != "call_module":
                    continue
                module = self.module.get_submodule(str(user.target))
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    return Form("last", shape[-1], shape[:-1])
                if type(module) in ops.CONVS or isinstance(module, ops.NORMS):
                    return map_form(shape)
        return map_form(shape) if len(shape) == 3 else whole

    def obstacles(self) -> str:
        """All reasons why something is left whole, each once."""
        reasons = list(dict.fromkeys(self.whole.values()))
        more = f"; and {len(reasons) - 8} more" if len(reasons) > 8 else ""
        return "; ".join(reasons[:8]) + more

    def _understand(self, node: fx.Node) -> None:
        module = None
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
        moves = isinstance(module, REARRANGING_MODULES) if module is not None else (
            node.target in REARRANGING_CALLS
        )  # fmt: skip
        if moves:
            self._rearrange(node, module)
            return
        for source in node.all_input_nodes:
            if source in self.raw:
                self._hold(source, node)
            if source in self.of and self.of[source].form.kind == "whole":
                raise NotUnderstood(self.whole[self.of[source].name])
        if module is not None:
            self._module(node, module)
        elif node.target in ops.JOINS:
            self._join(node)
        else:
            self._call(node)

    # Modules

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        if len(node.all_input_nodes) != 1 or len(node.args) != 1:
            raise self._refuse(node, "with other than one positional input")
        source = self.of[node.all_input_nodes[0]]
        form = source.form
        if type(module) in ops.LAYERS:
            self._layer(node, module, source)
        elif isinstance(module, ops.NORMS):
            if form.kind == "flat":
                raise NotUnderstood(f"{node.target}: BatchNorm behind a flatten is not supported")
            if module.running_mean is None:
                raise self._forbid(node, "without running statistics mixes pictures: not supported")
            if form.kind == "last" or module.num_features != form.channels:
                raise self._refuse(node, f"on a value of shape {form.shape}")
            self._once(node, source)
            self._pass(node, "norm", source)
        elif isinstance(module, ops.MIXING):
            self._mixing(node, module, source)
        elif isinstance(module, ops.ACTIVATIONS):
            self._pass(node, "activation", source)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1 and form.kind not in ("map", "vector"):
                raise self._refuse(node, f"on a {form.kind} value")
            self._once(node, source)
            self._pass(node, "activation" if module.num_parameters == 1 else "channelwise", source)
        elif isinstance(module, ops.SPATIAL) and form.kind == "map" and is_tensor(node):
            self._spatial(node, source)
        else:
            raise self._refuse(node, "" if form.kind == "map" else f"on a {form.kind} value")

    def _pass(self, node: fx.Node, kind: str, source: Step) -> None:
        self._add(node, kind, source.form, source.channels, (source,))

    def _once(self, node: fx.Node, source: Step) -> None:
        """Tie what a module, or a parameter, is used on: it is cut once for all its uses."""
        first = self.uses.setdefault(str(node.target), source)
        if first is not source:
            self.channels.tie(first.channels, source.channels)

    def _layer(self, node: fx.Node, layer: Any, source: Step) -> None:
        name = str(node.target)
        shape = self._shape(node)
        kind = source.form.kind
        conv = type(layer) in ops.CONVS
        if conv:
            if layer.padding_mode != "zeros":
                raise NotUnderstood(f"{name}: padding_mode {layer.padding_mode!r} is not supported")
            if kind != "map" or len(source.form.size) != ops.CONVS[type(layer)]:
                raise self._refuse(node, f"on a {kind} value of shape {source.shape}")
            form = map_form(shape)
        elif kind == "map":
            raise NotUnderstood(
                f"{name}: Linear on a tensor of shape {source.shape} is not supported"
            )
        elif kind == "last":
            form = Form("last", shape[-1], source.form.size)
        elif kind == "whole":
            raise self._refuse(node, "on what is left whole")
        else:
            form = map_form(shape)
        if conv and layer.groups > 1:
            self._grouped(node, layer, source, form)
            return
        first = self.calls.get(name)
        if first is None:
            step = self._add(node, "layer", form, None, (source,), name=name)
            self.calls[name] = step
            return
        # A shared layer is cut once for all its calls.
        before = self.steps[first.inputs[0]]
        if before.form.repeat != source.form.repeat:
            why = f"layer {name} is shared by inputs {before.shape} and {source.shape}"
            raise ReadAgain({first.node: why, node: why})
        self.channels.tie(before.channels, source.channels)
        made = self.channels.new(name, form.channels)
        self.channels.tie(first.channels, made)
        self._add(node, "layer", form, made, (source,), name=f"{name} ({node.name})", again=True)

    def _grouped(self, node: fx.Node, layer: Any, source: Step, form: Form) -> None:
        """Each group's inputs and outputs stay or go together."""
        made = self.channels.new(str(node.target), form.channels)
        inputs = source.channels.reshape(layer.groups, -1)
        outputs = made.reshape(layer.groups, -1)
        self.channels.tie(inputs[:, 0], outputs[:, 0])
        for channels in (inputs, outputs):
            if channels.shape[1] > 1:
                self.channels.bind(channels)
        self._once(node, source)
        step = self._add(node, "channelwise", form, made, (source,))
        first = self.calls.setdefault(str(node.target), step)
        if first is not step:
            self.channels.tie(first.channels, step.channels)

    def _mixing(self, node: fx.Node, module: nn.Module, source: Step) -> None:
        form = source.form
        if isinstance(module, nn.LayerNorm):
            if form.kind not in ("last", "vector") or module.normalized_shape != (form.channels,):
                raise self._refuse(node, f"over {tuple(module.normalized_shape)} of {form.shape}")
        elif form.kind not in ("map", "vector"):
            raise self._refuse(node, f"on a {form.kind} value")
        kind = type(module).__name__
        self._once(node, source)
        self.channels.freeze(source.channels, f"{kind} {node.target} mixes its channels")
        self._add(node, "mixing", form, source.channels, (source,))

    # Functions and methods

    def _call(self, node: fx.Node) -> None:
        if len(node.all_input_nodes) != 1:
            raise self._refuse(node)
        source = self.of[node.all_input_nodes[0]]
        target = node.target
        if getattr(target, "__name__", target) in DROPOUTS:
            raise self._forbid(node, "is active in evaluation (training=True): not supported")
        if target is F.batch_norm:
            raise self._forbid(node, "uses statistics of the batch: it mixes pictures")
        if target in ops.ACTIVATION_CALLS:
            self._pass(node, "activation", source)
        elif target in ops.SPATIAL_CALLS and source.form.kind == "map" and is_tensor(node):
            if target is F.pad and len(node.args[1]) > 2 * len(source.form.size):  # type: ignore
                raise self._refuse(node, "on other axes than those of the size")
            if target is F.instance_norm and len(node.args) > 1:
                raise self._refuse(node, "with tensors of its own")
            self._spatial(node, source)
        elif target in ops.MOVING_CALLS and source.form.kind == "map":
            axes = node.kwargs.get("dims", node.args[-1] if len(node.args) > 1 else ())
            axes = axes if isinstance(axes, tuple | list) else (axes,)
            rank = len(source.form.size)
            inner = (*range(2, 2 + rank), *range(-rank, 0))
            if not axes or not all(isinstance(a, int) and a in inner for a in axes):
                raise self._refuse(node, f"over axes {axes} of {source.shape}")
            self._spatial(node, source)
        elif target in ops.REDUCING_CALLS and is_tensor(node):
            self._reduce(node, source)
        else:
            raise self._refuse(node)

    def _spatial(self, node: fx.Node, source: Step) -> None:
        shape = self._shape(node)
        if len(shape) != 1 + len(source.form.size) or shape[0] != source.form.channels:
            raise self._refuse(node, f"from {source.shape} to {shape}")
        self._add(node, "spatial", map_form(shape), source.channels, (source,))

    def _reduce(self, node: fx.Node, source: Step) -> None:
        """A mean, sum or extreme over all axes of the size."""
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        rank = len(source.shape) + 1
        found = sorted(a % rank for a in axes if isinstance(a, int))
        inner = len(source.form.size)
        first = {"map": 2, "last": 1}.get(source.form.kind, rank)
        wanted = list(range(first, first + inner))
        if found != wanted:
            raise self._refuse(node, f"over axes {axes} of {source.shape}")
        shape = self._shape(node)
        if len(shape) == 1:
            form = Form("vector", source.form.channels, (1, 1))
        else:
            form = Form(source.form.kind, source.form.channels, (1,) * inner)
        self._add(node, "spatial", form, source.channels, (source,))

    def _join(self, node: fx.Node) -> None:
        """An operation of two values, or of a value and a constant."""
        extra = {k: v for k, v in node.kwargs.items() if k not in ("alpha",) or v != 1}
        if len(node.args) != 2 or extra:
            raise self._refuse(node, f"with {', '.join(extra)}" if extra else "")
        values = [self.of.get(a) for a in node.args]  # type: ignore
        one, other = values
        if one is None or other is None:
            source = one or other
            assert source is not None
            constant = node.args[1] if other is None else node.args[0]
            self._scale(node, source, constant)
            return
        operation = ops.JOINS[node.target]
        if one.form == other.form:
            self.channels.tie(one.channels, other.channels)
            kind = "merge" if operation is torch.add else "gate"
            self._add(node, kind, one.form, one.channels, (one, other))
            return
        forms = (one.form, other.form)
        whole = one if one.form.channels * one.form.area >= other.form.channels * other.form.area \
            else other  # fmt: skip
        part = other if whole is one else one
        if (
            forms[0].kind != forms[1].kind
            or self._shape(node) != whole.shape
            or part.form.channels not in (1, whole.form.channels)
        ):
            raise NotUnderstood(
                f"{self._called(node)} ({self._place(node)}) joins {one.shape} and {other.shape}; "
                "expected equal shapes, or one value per channel or per pixel beside the other"
            )
        if part.form.channels == whole.form.channels:
            self.channels.tie(whole.channels, part.channels)
        else:
            self.channels.freeze(part.channels, f"{node.name} spreads it over all channels")
        self._add(node, "gate", whole.form, whole.channels, (one, other))

    def _scale(self, node: fx.Node, source: Step, constant: Any) -> None:
        if isinstance(constant, int | float):
            self._pass(node, "activation", source)
            return
        tensor = self.constants.get(constant)
        if tensor is None or self._shape(node) != source.shape:
            raise self._refuse(node, "with such a second operand")
        if tensor.numel() == 1:
            self._pass(node, "activation", source)
            return
        axis = -1 if source.form.kind != "map" else -1 - len(source.form.size)
        if source.form.kind == "flat" or (tensor.ndim > len(source.shape) and tensor.shape[0] > 1):
            raise self._refuse(node, f"with a constant of shape {tuple(tensor.shape)}")
        if tensor.ndim < -axis or tensor.shape[axis] == 1 < source.form.channels:
            self._pass(node, "activation", source)  # the same for all channels
            return
        assert isinstance(constant, fx.Node)
        self._once(constant, source)
        self._add(node, "channelwise", source.form, source.channels, (source,))

    # Rearrangements

    def _numbers(self, node: fx.Node) -> Any:
        if node in self.raw:
            return self.raw[node]
        if node in self.of:
            step = self.of[node]
            if step.form.kind == "whole":
                raise NotUnderstood(self.whole[step.name])
            return self.elements.number(step.name, step.form)
        if node in self.constants:
            raise NotUnderstood(
                f"a constant tensor ({node.target}) among moved channels: unsupported"
            )
        return node.meta["value"]

    def _concatenate(self, node: fx.Node) -> bool:
        """Whether the node is a plain concatenation of maps, which needs no numbers; adds it."""
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        parts = [self.of.get(part) for part in node.args[0]] if node.args else []  # type: ignore
        first = parts[0] if parts else None
        if node.target not in (torch.cat, torch.concat) or axis != 1 or first is None:
            return False
        steps = [p for p in parts if p is not None and p.form.kind == "map"]
        if len(steps) < len(parts) or any(s.form.size != first.form.size for s in steps):
            return False
        names = list(dict.fromkeys(step.name for step in steps))
        origin = np.concatenate(
            [
                np.stack(
                    [np.full(s.form.channels, names.index(s.name)), np.arange(s.form.channels)], 1
                )
                for s in steps
            ]
        )
        channels = np.concatenate([step.channels for step in steps])
        form = Form("map", len(channels), first.form.size)
        self._add(node, "rearrange", form, channels, tuple(self.steps[n] for n in names), origin)
        return True

    def _rearrange(self, node: fx.Node, module: nn.Module | None) -> None:
        if module is None and node.target in (torch.cat, torch.concat) and self._concatenate(node):
            return
        arguments = fx.node.map_arg(node.args, self._numbers)
        keywords = fx.node.map_arg(node.kwargs, self._numbers)
        if module is not None:
            result = module(*arguments, **keywords)
        elif node.op == "call_method":
            first, *rest = arguments
            # The numbers need not lie in memory as the network's tensors do.
            method = "reshape" if node.target == "view" else str(node.target)
            result = getattr(first, method)(*rest, **keywords)
        else:
            result = node.target(*arguments, **keywords)  # type: ignore
        before = [self.moved_by[s] for s in node.all_input_nodes if s in self.moved_by]
        self.moved_by[node] = before[0] if before else f"{self._called(node)} ({self._place(node)})"
        if not isinstance(result, torch.Tensor):
            self.raw[node] = result
            return
        self._shape(node)
        if len(result) != PICTURES or not (result[1] - result[0] == NEXT_PICTURE).all():
            raise NotUnderstood(
                f"{self._called(node)} ({self._place(node)}) mixes pictures, or moves the first "
                "axis, that of the batch"
            )
        found = self.elements.read(result[0].contiguous())
        if found is None:
            self.raw[node] = result
            return
        form, names, origin = found
        sources = tuple(self.steps[name] for name in names)
        channels = np.empty(form.channels, dtype=int)
        for index, source in enumerate(sources):
            mine = origin[:, 0] == index
            channels[mine] = source.channels[origin[mine, 1]]
        self._add(node, "rearrange", form, channels, sources, origin)
