"""Modules of a student, cut out of the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.teacher.graph import Layer
from moodistill.teacher.operations import NORMS
from moodistill.teacher.plain import copied


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


def feature_index(channels: np.ndarray, repeat: int) -> torch.Tensor:
    """Columns of flattened features: `repeat` consecutive ones per channel."""
    index = channels[:, None] * repeat + np.arange(repeat)[None, :]
    return torch.from_numpy(index.reshape(-1))


def slice_layer(layer: Layer, unit: Unit) -> nn.Module:
    """The part of a conv or linear layer that a unit stands for; zeros past a bypassed layer."""
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
    weight = blocks[0] if len(blocks) == 1 else torch.cat(blocks)  # either way a copy of its own
    made: Layer
    if not isinstance(layer, nn.Linear):
        made = nn.utils.skip_init(
            type(layer), width, len(outputs), layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, len(unit.outputs), layer.bias is not None,
        )  # fmt: skip
    else:
        made = nn.utils.skip_init(
            nn.Linear, width * unit.repeat, len(outputs), layer.bias is not None
        )
    made.weight = nn.Parameter(weight)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[outputs])
    return made


def slice_grouped(layer: Any, inputs: np.ndarray, outputs: np.ndarray, name: str) -> nn.Module:
    """The groups of a grouped convolution that read `inputs`."""
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    groups = inputs.reshape(-1, reads)[:, 0] // reads
    whole = np.array_equal(inputs, (groups[:, None] * reads + np.arange(reads)).reshape(-1))
    wanted = (groups[:, None] * writes + np.arange(writes)).reshape(-1)
    if not whole or not np.array_equal(outputs, wanted):
        raise UserError(f"{name}: the channels of its groups are out of order: not supported")
    made = nn.utils.skip_init(
        type(layer), len(inputs), len(outputs), layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, len(groups), layer.bias is not None,
    )  # fmt: skip
    index = torch.from_numpy(outputs)
    made.weight = nn.Parameter(layer.weight.detach()[index])
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[index])
    return made


def opaque_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that is left whole; nothing in it overwrites what others may read."""
    made = copied(module)
    for inner in made.modules():
        if getattr(inner, "inplace", False):
            inner.inplace = False  # type: ignore[assignment]
    return made


def slice_norm(norm: nn.Module, channels: np.ndarray) -> nn.Module:
    """Some channels of a batch normalisation, statistics included."""
    assert isinstance(norm, NORMS)
    index = torch.from_numpy(channels)
    made = type(norm)(len(channels), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.load_state_dict({k: v[index] if v.ndim else v for k, v in norm.state_dict().items()})
    return made
