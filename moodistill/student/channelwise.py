"""Operations of the student with weights per channel, and those that mix channels in place."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.student.draft import Draft, part_path
from moodistill.student.slicing import (
    GroupedSlice,
    NormSlice,
    check_whole,
    slice_grouped,
    slice_norm,
)
from moodistill.student.values import Tensor, Value
from moodistill.teacher.kernels import Conv
from moodistill.teacher.operations import JOINS, SHUFFLES
from moodistill.teacher.steps import Step


def write_norm(draft: Draft, step: Step, value: Value) -> Value:
    """Batch normalisation, one module for every tensor; none past a bypassed layer."""
    if value.through:
        return value
    value = draft.as_first(step.target, value)
    count = len(value.tensors)

    def write(tensor: Tensor, index: int) -> fx.Node:
        path = part_path(step.target, index, count)
        if path not in draft.modules:
            channels = draft.tensors.channels(step, tensor.keys)
            draft.modules[path] = slice_norm(draft.module(step), channels)
            # A norm with several inputs keeps the teacher's statistics of them all.
            if draft.norm_calls[step.target] == 1:
                draft.norms.append(NormSlice(path, step.target, channels))
        return draft.graph.call_module(path, (tensor.node,))

    return draft.each(value, step, write)


def write_channelwise(draft: Draft, step: Step, value: Value) -> Value:
    """A grouped convolution, a PReLU, or an operation with one number per channel."""
    constants = [n for n in step.node.all_input_nodes if n.op == "get_attr"]
    value = draft.as_first(str(constants[0].target) if constants else step.target, value)
    count = len(value.tensors)

    def write(tensor: Tensor, index: int) -> fx.Node:
        channels = draft.tensors.channels(value.of, tensor.keys)
        if step.node.op != "call_module":
            return _scaled(draft, step, tensor.node, channels, "" if count == 1 else f"_{index}")
        path = part_path(step.target, index, count)
        if path not in draft.modules:
            draft.modules[path] = _cut_module(draft, step, tensor, channels, path)
        return draft.call(path, tensor.node, step)

    return draft.each(value, step, write)


def _cut_module(
    draft: Draft, step: Step, tensor: Tensor, channels: np.ndarray, path: str
) -> nn.Module:
    """The part of a grouped convolution, shuffle or PReLU that works on these input channels."""
    module = draft.module(step)
    if isinstance(module, Conv):
        outputs = draft.tensors.channels(step, tensor.keys)
        part = GroupedSlice(path, step.target, channels, outputs, draft.taps(module, step))
        made = slice_grouped(module, part, step.name)
        draft.grouped.append(part)
        return made
    if type(module) in SHUFFLES:
        check_whole(module, channels, step.name)
        return copy.deepcopy(module)
    assert isinstance(module, nn.PReLU)
    cut = nn.PReLU(len(channels))
    cut.weight = nn.Parameter(module.weight.detach()[channels].clone())
    return cut


def _scaled(draft: Draft, step: Step, node: fx.Node, channels: np.ndarray, suffix: str) -> fx.Node:
    """An operation with one number per channel."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        axis = tensor.ndim - 1
        axis -= len(step.form.size) if step.form.kind == "map" else 0
        return tensor.index_select(axis, torch.from_numpy(channels))

    def convert(argument: fx.Node) -> fx.Node:
        if argument.op != "get_attr":
            return node
        return draft.constant(str(argument.target), f"{argument.target}{suffix}", cut)

    arguments = fx.node.map_arg(step.node.args, convert)
    return draft.graph.call_function(JOINS[step.node.target], arguments)


def write_mixing(draft: Draft, step: Step, value: Value) -> Value:
    """A normalisation across channels, on the value as one tensor."""
    value = draft.as_first(step.target, value)
    module = copy.deepcopy(draft.module(step))
    if isinstance(module, nn.LayerNorm):
        # The order of the channels does not matter to it.
        node, keys = draft.tensors.gather(value, value.keys), value.keys
        channels = torch.from_numpy(draft.tensors.channels(value.of, keys))
        for name in ("weight", "bias"):
            tensor = getattr(module, name)
            if tensor is not None:
                setattr(module, name, nn.Parameter(tensor.detach()[channels].clone()))
    else:
        node, keys = draft.tensors.ordered(value), value.keys
        order = draft.tensors.channels(value.of, keys)
        if not np.array_equal(order, np.arange(len(order))):
            raise UserError(f"{step.target}: its channels are out of order: not supported")
    draft.modules[step.target] = module
    made = Tensor(draft.graph.call_module(step.target, (node,)), keys)
    return Value((made,), step, step.form)
