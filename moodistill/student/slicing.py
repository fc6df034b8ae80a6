"""Modules of a student, cut out of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moodistill.accelerator import in_double
from moodistill.errors import UserError
from moodistill.teacher.kernels import Conv, Layer, Transposed, padding_of, weight_of
from moodistill.teacher.operations import NORMS
from moodistill.teacher.plain import copied


@dataclass(frozen=True)
class Unit:
    """What a layer of the student, or one connection pattern of it, stands for in the teacher.

    It is one conv or linear module, `target`; where it has a rank it is two, one after the other:
    `target` (all inputs and taps to `rank` values, no bias) and `expand` (these to all outputs,
    1x1, with the bias).

    Attributes:
        target: path in the student of the module that reads the inputs.
        layer: the teacher's layer.
        outputs: per group of the convolution, the teacher layer's outputs that it computes.
        inputs: per group of the convolution, the teacher layer's inputs that it reads; past a
            bypassed layer those of the value that it reads instead.
        through: whether it reads past a bypassed layer.
        repeat: features per channel of its input (behind a flatten).
        taps: of a convolution, by axis, the taps of the teacher's kernel that it keeps.
        rank: values between its two modules; None where it is one.
        expand: path in the student of the second module.
    """

    target: str
    layer: str
    outputs: tuple[np.ndarray, ...]
    inputs: tuple[np.ndarray, ...]
    through: bool
    repeat: int
    taps: tuple[slice, ...] = ()
    rank: int | None = None
    expand: str | None = None


@dataclass(frozen=True)
class GroupedSlice:
    """One grouped or depthwise convolution of the student: some groups of the teacher's.

    Attributes:
        target: its path in the student.
        layer: module path of the teacher's.
        inputs, outputs: the teacher convolution's channels that it reads and computes, in order.
        taps: by axis, the taps of the teacher's kernel that it keeps.
    """

    target: str
    layer: str
    inputs: np.ndarray
    outputs: np.ndarray
    taps: tuple[slice, ...]


@dataclass(frozen=True)
class NormSlice:
    """One BatchNorm of the student: its path, the teacher's path, the channels."""

    target: str
    norm: str
    channels: np.ndarray


def centred(kernel: Sequence[int], kept: Sequence[int] | None) -> tuple[slice, ...]:
    """By axis, the `kept` taps in the middle of a kernel; all where `kept` is None."""
    pairs = zip(kernel, kept or kernel, strict=True)
    return tuple(slice((size - left) // 2, (size + left) // 2) for size, left in pairs)


def tapped(weight: torch.Tensor, taps: tuple[slice, ...]) -> torch.Tensor:
    """The kept taps of a weight `(outputs, inputs, *kernel)`; all of a linear layer's."""
    return weight[(slice(None), slice(None), *taps)]


def feature_index(channels: np.ndarray, repeat: int) -> torch.Tensor:
    """Columns of flattened features: `repeat` consecutive ones per channel."""
    index = channels[:, None] * repeat + np.arange(repeat)[None, :]
    return torch.from_numpy(index.reshape(-1))


def slice_layer(layer: Layer, unit: Unit) -> dict[str, nn.Module]:
    """By path, the modules of a unit: the part of a layer that it stands for.

    Zeros past a bypassed layer. With a rank the best approximation of what would be there without.
    """
    outputs = torch.from_numpy(np.concatenate(unit.outputs))
    width = sum(len(i) for i in unit.inputs)
    first = len(outputs) if unit.rank is None else unit.rank
    bias, alone = layer.bias is not None, unit.expand is None
    made: dict[str, nn.Module] = {}
    if isinstance(layer, Conv):
        groups = len(unit.outputs)
        made[unit.target] = _conv_like(layer, width, first, groups, unit.taps, bias and alone)
        if unit.expand is not None:
            made[unit.expand] = nn.utils.skip_init(type(layer), first, len(outputs), 1, bias=bias)
    elif isinstance(layer, Transposed):
        made[unit.target] = nn.utils.skip_init(
            type(layer), width, len(outputs), layer.kernel_size, layer.stride, layer.padding,
            layer.output_padding, 1, bias, layer.dilation,
        )  # fmt: skip
    else:
        features = width * unit.repeat
        made[unit.target] = nn.utils.skip_init(nn.Linear, features, first, bias and alone)
        if unit.expand is not None:
            made[unit.expand] = nn.utils.skip_init(nn.Linear, first, len(outputs), bias)
    blocks = []
    for outs, ins in zip(unit.outputs, unit.inputs, strict=True):
        rows = tapped(weight_of(layer).detach()[torch.from_numpy(outs)], unit.taps)
        if unit.through:
            shape = (len(outs), len(ins) * unit.repeat, *rows.shape[2:])
            blocks.append(torch.zeros(shape))
        else:
            blocks.append(rows[:, feature_index(ins, unit.repeat)])
    weight = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    write_weights(unit, made, weight, None if layer.bias is None else layer.bias.detach()[outputs])
    return made


@torch.no_grad()
def write_weights(
    unit: Unit, modules: Mapping[str, nn.Module], weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Set a unit's modules, by path, to a layer's weight; with a rank, to its best approximation.

    Args:
        unit: of one or two modules.
        modules: its own by path.
        weight: `(outputs, inputs, *kept taps)`.
        bias: `(outputs,)`; None leaves what is there.
    """
    first = last = _layer(modules, unit.target)
    if unit.expand is None:
        weight_of(first).copy_(weight)
    else:
        last = _layer(modules, unit.expand)
        reduce, expand = low_rank(weight.flatten(1), last.weight.shape[1])
        first.weight.copy_(reduce.reshape(first.weight.shape))
        last.weight.copy_(expand.reshape(last.weight.shape))
    if bias is not None:
        assert last.bias is not None
        last.bias.copy_(bias)


def _layer(modules: Mapping[str, nn.Module], path: str) -> Layer:
    module = modules[path]
    assert isinstance(module, Layer)
    return module


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rank, k)` and `(o, rank)` whose product is nearest to a matrix `(o, k)` (Eckart, Young).

    From the eigenvectors of the smaller of its two Gram matrices, which costs far less than the
    singular vectors of a wide matrix.
    """
    exact, device = in_double(matrix), matrix.device
    if matrix.shape[0] <= matrix.shape[1]:
        basis = torch.linalg.eigh(exact @ exact.T)[1][:, -rank:]
        return (basis.T @ exact).to(matrix.dtype).to(device), basis.to(matrix.dtype).to(device)
    basis = torch.linalg.eigh(exact.T @ exact)[1][:, -rank:]
    return basis.T.to(matrix.dtype).to(device), (exact @ basis).to(matrix.dtype).to(device)


def _conv_like(
    conv: Conv, inputs: int, outputs: int, groups: int, taps: tuple[slice, ...], bias: bool
) -> Conv:
    """A convolution without weights yet, with some taps of another's kernel at the same places."""
    padding: str | tuple[int, ...] = conv.padding
    kernel = tuple(place.stop - place.start for place in taps)
    if kernel != tuple(conv.kernel_size):
        padding = tuple(
            p - d * place.start
            for p, d, place in zip(padding_of(conv), conv.dilation, taps, strict=True)
        )
    return nn.utils.skip_init(
        type(conv), inputs, outputs, kernel, conv.stride, padding, conv.dilation, groups, bias
    )


def slice_grouped(layer: Conv, part: GroupedSlice, name: str) -> Conv:
    """The groups of a grouped convolution that a slice of it names."""
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    groups = part.inputs.reshape(-1, reads)[:, 0] // reads
    whole = np.array_equal(part.inputs, (groups[:, None] * reads + np.arange(reads)).reshape(-1))
    wanted = (groups[:, None] * writes + np.arange(writes)).reshape(-1)
    if not whole or not np.array_equal(part.outputs, wanted):
        raise UserError(f"{name}: the channels of its groups are out of order: not supported")
    index = torch.from_numpy(part.outputs)
    made = _conv_like(
        layer, len(part.inputs), len(index), len(groups), part.taps, layer.bias is not None
    )
    made.weight = nn.Parameter(tapped(layer.weight.detach()[index], part.taps).clone())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[index])
    return made


def check_whole(shuffle: nn.Module, channels: np.ndarray, name: str) -> None:
    """Refuse channels of a pixel shuffle that are not those of whole outputs, in order."""
    reads = shuffle.upscale_factor**2 if isinstance(shuffle, nn.PixelShuffle) else 1
    outputs = channels.reshape(-1, reads)[:, 0] // reads
    wanted = (outputs[:, None] * reads + np.arange(reads)).reshape(-1)
    if not np.array_equal(channels, wanted):
        raise UserError(f"{name}: the channels that it joins are out of order: not supported")


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
