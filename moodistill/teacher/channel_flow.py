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
from moodistill.heads.outputs import outputs_of
from moodistill.teacher import operations as ops
from moodistill.teacher.moves import Mover
from moodistill.teacher.rearrange import REARRANGING_CALLS, REARRANGING_MODULES, Form, map_form
from moodistill.teacher.recorder import NotUnderstood, ReadAgain
from moodistill.teacher.steps import Step
from moodistill.teacher.tracing import DROPOUTS, is_tensor
from moodistill.teacher.value_tracer import holds_tensor


class Reader(Mover):
    """Reads a flat graph; see `Recorder` for what it collects."""

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
            self._leave_whole(node, f"{self._called(node)} ({self._place(node)}) reads no image")
        elif is_tensor(node):
            raise UserError(f"{self._called(node)} ({self._place(node)}) reads no input")

    def _output(self, node: fx.Node) -> None:
        """What the network gives: its channels stay, in their order."""
        sources = []
        for name, given in outputs_of(node.args[0]).items():
            if isinstance(given, fx.Node) and given in self.raw:
                self._hold(given, node)
            source = self.of.get(given) if isinstance(given, fx.Node) else None
            if source is None or not is_tensor(source.node):
                value = given.meta.get("value") if isinstance(given, fx.Node) else given
                what = f"a constant {tuple(value.shape)}" if isinstance(value, torch.Tensor) else (
                    f"a {type(value).__name__}"
                )  # fmt: skip
                raise UserError(
                    f"the network's output {name} is {what}; expected tensors that hang on the "
                    "input: give a wrapper that returns these alone"
                )
            try:
                self._shape(source.node)
            except NotUnderstood as reason:
                raise UserError(f"the network's output {name}: {reason}") from None
            self.channels.freeze(source.channels, "the network's output")
            sources.append(source)
        if not sources:
            raise UserError("the network gives no tensor; expected one or several")
        channels = np.concatenate([source.channels for source in sources])
        form = sources[0].form if len(sources) == 1 else Form("vector", len(channels), (1, 1))
        self._add(node, "output", form, channels, tuple(sources))

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
                raise self._forbid(node, "without running statistics mixes images: not supported")
            if form.kind == "last" or module.num_features != form.channels:
                raise self._refuse(node, f"on a value of shape {form.shape}")
            self._once(node, source)
            self._pass(node, "norm", source)
        elif isinstance(module, ops.MIXING):
            self._mixing(node, module, source)
        elif type(module) in ops.SHUFFLES and form.kind == "map":
            self._grouped(node, min(form.channels, self._shape(node)[0]), source)
        elif type(module) in ops.SOFTMAX:
            self._softmax(node, module, source)
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
            known = isinstance(module, ops.SPATIAL)
            raise self._refuse(node, f"on a value of shape {form.shape}" if known else "")

    def _layer(self, node: fx.Node, layer: Any, source: Step) -> None:
        name = str(node.target)
        shape = self._shape(node)
        kind = source.form.kind
        axes = {**ops.CONVS, **ops.TRANSPOSED}.get(type(layer))
        conv = axes is not None
        if conv:
            if type(layer) in ops.TRANSPOSED and layer.groups > 1:
                raise self._refuse(node, f"with {layer.groups} groups")
            if layer.padding_mode != "zeros":
                raise NotUnderstood(f"{name}: padding_mode {layer.padding_mode!r} is not supported")
            if kind != "map" or len(source.form.size) != axes:
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
            self._grouped(node, layer.groups, source)
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

    def _grouped(self, node: fx.Node, groups: int, source: Step) -> None:
        """Each group's inputs and outputs stay or go together."""
        form = map_form(self._shape(node))
        made = self.channels.new(str(node.target), form.channels)
        inputs = source.channels.reshape(groups, -1)
        outputs = made.reshape(groups, -1)
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

    def _softmax(self, node: fx.Node, module: Any, source: Step) -> None:
        """Over the channels: they stay, since each has a part in all others' outcome."""
        rank = len(source.shape) + 1
        kind = type(module).__name__
        if source.form.kind not in ("map", "vector", "last") or module.dim is None or (
            module.dim % rank != source.form.axis % rank
        ):  # fmt: skip
            raise self._refuse(node, f"over axis {module.dim} of {source.shape}")
        self.channels.freeze(source.channels, f"{kind} {node.target} mixes its channels")
        self._add(node, "mixing", source.form, source.channels, (source,))

    # Functions and methods

    def _call(self, node: fx.Node) -> None:
        if len(node.all_input_nodes) != 1:
            raise self._refuse(node)
        source = self.of[node.all_input_nodes[0]]
        target = node.target
        if getattr(target, "__name__", target) in DROPOUTS:
            raise self._forbid(node, "is active in evaluation (training=True): not supported")
        if target is F.batch_norm:
            raise self._forbid(node, "uses statistics of the batch: it mixes images")
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
