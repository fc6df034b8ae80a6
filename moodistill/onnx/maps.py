"""Modules of torch that work along the axes of a map's size, as ONNX operations.

Maps are `(C, L)`, `(C, H, W)` or `(C, D, H, W)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moodistill.onnx.ops import OpList, Shape, UnsupportedOperation


def _conv(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if getattr(m, "padding_mode", "zeros") != "zeros":
        return None
    shape = ops.shapes[x]
    outputs, inputs, *kernel = m.weight.shape
    check_width(name, inputs * m.groups, shape)
    out, window = _window(m, kernel, shape[1:])
    return ops.emit(
        "Conv", x, name, (outputs, *out), m.weight, m.bias, group=int(m.groups), **window
    )


def _conv_transpose(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if getattr(m, "padding_mode", "zeros") != "zeros":
        return None
    _, *size = ops.shapes[x]
    inputs, outputs, *kernel = m.weight.shape
    check_width(name, inputs, ops.shapes[x])
    settings = {
        key: _each(getattr(m, key), len(size))
        for key in ("stride", "padding", "output_padding", "dilation")
    }
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + more + 1
        for n, k, s, p, more, d in zip(size, kernel, *settings.values(), strict=True)
    ]
    pads = [int(p) for p in settings["padding"]]
    return ops.emit(
        "ConvTranspose", x, name, (outputs * m.groups, *out), m.weight, m.bias,
        group=int(m.groups), kernel_shape=[int(k) for k in kernel], pads=[*pads, *pads],
        strides=[int(v) for v in settings["stride"]],
        dilations=[int(v) for v in settings["dilation"]],
        output_padding=[int(v) for v in settings["output_padding"]],
    )  # fmt: skip


def _max_pool(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if m.return_indices:
        return None
    channels, *size = ops.shapes[x]
    out, window = _window(m, m.kernel_size, size)
    starts, ends = window["pads"][: len(size)], window["pads"][len(size) :]
    if any(e >= k for e, k in zip(ends, window["kernel_shape"], strict=True)):
        # With dilation a window may hang over by more than ONNX Runtime takes as padding. The
        # border is finite, since INT8 calibration refuses infinite values.
        lowest = torch.finfo(torch.float32).min
        x, window["pads"] = _padded(ops, x, name, starts, ends, lowest), [0] * 2 * len(size)
    return ops.emit("MaxPool", x, name, (channels, *out), **window)


def _avg_pool(ops: OpList, m: Any, x: str, name: str) -> str:
    channels, *size = ops.shapes[x]
    out, window = _window(m, m.kernel_size, size)
    del window["dilations"]  # the older operator sets have none here
    starts, ends = window["pads"][: len(size)], window["pads"][len(size) :]
    divisor = m.divisor_override
    counted = any(starts) if m.count_include_pad else False
    if divisor is not None:  # every window is whole then
        x, window["pads"] = _padded(ops, x, name, starts, ends), [0] * 2 * len(size)
        counted = False
    elif counted and starts != ends:
        # ONNX cannot count torch's padding without that of ceil_mode: the former is written out.
        x = _padded(ops, x, name, starts, starts)
        window["pads"] = [*[0] * len(size), *(e - s for s, e in zip(starts, ends, strict=True))]
        counted = False
    window["count_include_pad"] = int(counted)
    value = ops.emit("AveragePool", x, name, (channels, *out), **window)
    if divisor is None:
        return value
    return ops.like("Mul", value, name, math.prod(window["kernel_shape"]) / divisor)


def _padded(
    ops: OpList, x: str, name: str, starts: list[int], ends: list[int], value: float = 0.0
) -> str:
    if not any(starts + ends):
        return x
    pairs = zip(reversed(starts), reversed(ends), strict=True)
    return constant_pad(ops, x, name, [p for pair in pairs for p in pair], value)


def _adaptive_pool(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if getattr(m, "return_indices", False):
        return None
    pool = "Max" if hasattr(m, "return_indices") else "Average"
    channels, *size = ops.shapes[x]
    wanted = [
        s if w is None else int(w)
        for s, w in zip(size, _each(m.output_size, len(size)), strict=True)
    ]
    shape = (channels, *wanted)
    if wanted == size:
        return ops.like("Identity", x, name)
    if set(wanted) == {1}:
        return ops.emit(f"Global{pool}Pool", x, name, shape)
    if not any(s % w for s, w in zip(size, wanted, strict=True)):
        kernel = [s // w for s, w in zip(size, wanted, strict=True)]
        return ops.emit(f"{pool}Pool", x, name, shape, kernel_shape=kernel, strides=kernel)
    if pool == "Max" or len(size) != 2:
        return None
    # Rows and columns are weighted sums of the input's.
    rows = F.adaptive_avg_pool1d(torch.eye(size[0]), wanted[0])
    columns = F.adaptive_avg_pool1d(torch.eye(size[1]), wanted[1])
    value = ops.emit("MatMul", x, name, (channels, size[0], wanted[1]), columns)
    return ops.emit("MatMul", value, name, shape, rows.T, front=True)


def _pad(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if isinstance(m, _CIRCULAR):
        return None
    mode = "reflect" if isinstance(m, _REFLECTED) else "edge" if isinstance(m, _REPEATED) else ""
    if mode:
        return border_pad(ops, x, name, m.padding, mode)
    return constant_pad(ops, x, name, m.padding, m.value)


_CIRCULAR = (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
_REFLECTED = (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
_REPEATED = (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)


def _upsample(ops: OpList, m: Any, x: str, name: str) -> str | None:
    given = getattr(m, "recompute_scale_factor", None)
    return resize(ops, x, name, m.size, m.scale_factor, m.mode, m.align_corners, given)


def resize(
    ops: OpList, x: str, name: str, size: Any, scale: Any, mode: str, align: Any, again: Any
) -> str | None:
    """A map in another size, as `interpolate` gives it; None where ONNX differs.

    Args:
        ops, x, name: as of every converter.
        size, scale: of the outcome, or how many times larger; one of them.
        mode: of `interpolate`.
        align: whether the centres of the corners stay where they are.
        again: whether torch computes the scale from the sizes.
    """
    channels, *old = ops.shapes[x]
    if size is not None:
        new = [int(v) for v in _each(size, len(old))]
    else:
        factors = [float(v) for v in _each(scale, len(old))]
        new = [math.floor(n * f) for n, f in zip(old, factors, strict=True)]
        even = all(n * f == m for n, f, m in zip(old, factors, new, strict=True))
        if not (even or again):
            return None  # torch takes the scale as it is, ONNX that of the sizes
    kind = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear"}
    if mode not in kind:
        return None
    scales = np.array([1, 1, *(m / n for n, m in zip(old, new, strict=True))], np.float32)
    found = np.floor(np.array([1, channels, *old], np.float32) * scales)[2:]
    if found.tolist() != new:
        return None  # rounded otherwise in single precision
    settings: dict[str, Any] = {"mode": kind[mode]}
    if mode == "nearest":
        settings |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        coordinates = "align_corners" if align else "pytorch_half_pixel"
        settings |= {"coordinate_transformation_mode": coordinates}
    shape = (channels, *new)
    return ops.emit("Resize", (x, ""), name, shape, torch.from_numpy(scales), **settings)


def _pixel_shuffle(ops: OpList, m: Any, x: str, name: str) -> str:
    """`(C r r, H, W)` to `(C, H r, W r)`."""
    times = int(m.upscale_factor)
    channels, height, width = ops.shapes[x]
    shape = (channels // times**2, height * times, width * times)
    return ops.emit("DepthToSpace", x, name, shape, blocksize=times, mode="CRD")


def _pixel_unshuffle(ops: OpList, m: Any, x: str, name: str) -> str:
    """`(C, H r, W r)` to `(C r r, H, W)`; ONNX has the channels in another order."""
    times = int(m.downscale_factor)
    channels, height, width = ops.shapes[x]
    height, width = height // times, width // times
    value = ops.reshape(x, name, (channels, height, times, width, times))
    shape = (channels, times, times, height, width)
    value = ops.emit("Transpose", value, name, shape, perm=[0, 1, 3, 5, 2, 4])
    return ops.reshape(value, name, (channels * times**2, height, width))


def constant_pad(ops: OpList, x: str, name: str, padding: Sequence[int], value: float = 0.0) -> str:
    """The value `x` with constant borders; `padding` is torch's, from the last axis on."""
    shape, axes = ops.shapes[x], len(padding) // 2
    if len(padding) % 2 or axes > len(shape) or not all(isinstance(p, int) for p in padding):
        raise UnsupportedOperation(f"padding {padding} of {len(shape) + 1}-D input")
    starts, ends = ([0] * (len(shape) + 1 - axes) + list(padding[i::2])[::-1] for i in (0, 1))
    out = tuple(n + s + e for n, s, e in zip(shape, starts[1:], ends[1:], strict=True))
    return ops.emit("Pad", x, name, out, torch.tensor(starts + ends), float(value) or None)


def border_pad(ops: OpList, x: str, name: str, padding: Sequence[int], mode: str) -> str:
    """The value `x` with borders that repeat it; `padding` is torch's, from the last axis on."""
    shape, axes = ops.shapes[x], len(padding) // 2
    if axes > len(shape) - 1 or min(padding) < 0:
        raise UnsupportedOperation(f"padding {padding} of {len(shape) + 1}-D input")
    starts, ends = ([0] * (len(shape) + 1 - axes) + list(padding[i::2])[::-1] for i in (0, 1))
    out = tuple(n + s + e for n, s, e in zip(shape, starts[1:], ends[1:], strict=True))
    return ops.emit("Pad", x, name, out, torch.tensor(starts + ends), mode=mode)


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    """One value an axis, of one for all or of one each."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes


def check_width(name: str, expected: int, shape: Shape, axis: int = 0) -> None:
    """Refuse a value that has not as many channels or features as a module expects."""
    if shape[axis] != expected:
        raise ValueError(
            f"{name} expects {expected} channels or features but its input is {shape} "
            "per image; build the student again with matching widths"
        )


def _window(m: Any, kernel_size: Any, size: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Output sizes of a convolution or pooling module, and its ONNX attributes.

    ONNX and torch round differently in ceil mode, so the window that hangs over the edge is
    written as padding at the end.
    """
    axes = len(size)
    settings = (kernel_size, m.stride, getattr(m, "dilation", 1))
    kernel, stride, dilation = (_each(value, axes) for value in settings)
    ceil_mode = getattr(m, "ceil_mode", False)
    out, starts, ends = [], [], []
    for i, (n, k, s, d) in enumerate(zip(size, kernel, stride, dilation, strict=True)):
        span = d * (k - 1) + 1
        if isinstance(m.padding, str):
            both = span - 1 if m.padding == "same" else 0
            start, end = both // 2, both - both // 2
        else:
            start = end = _each(m.padding, axes)[i]
        count = (n + start + end - span + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= n + start:
            count -= 1  # a window may not start in the padding
        out.append(count)
        starts.append(start)
        ends.append(max(end, (count - 1) * s + span - n - start))
    pads = starts + ends
    window = {"kernel_shape": kernel, "strides": stride, "pads": pads, "dilations": dilation}
    return out, {key: [int(v) for v in values] for key, values in window.items()}


# By kind its converter, and how many axes the size of its map has.
MAPS: dict[type, tuple[Any, int]] = {
    nn.Conv1d: (_conv, 1), nn.Conv2d: (_conv, 2), nn.Conv3d: (_conv, 3),
    nn.ConvTranspose1d: (_conv_transpose, 1), nn.ConvTranspose2d: (_conv_transpose, 2),
    nn.ConvTranspose3d: (_conv_transpose, 3),
    nn.MaxPool1d: (_max_pool, 1), nn.MaxPool2d: (_max_pool, 2), nn.MaxPool3d: (_max_pool, 3),
    nn.AvgPool1d: (_avg_pool, 1), nn.AvgPool2d: (_avg_pool, 2), nn.AvgPool3d: (_avg_pool, 3),
    nn.AdaptiveAvgPool1d: (_adaptive_pool, 1), nn.AdaptiveAvgPool2d: (_adaptive_pool, 2),
    nn.AdaptiveAvgPool3d: (_adaptive_pool, 3), nn.AdaptiveMaxPool1d: (_adaptive_pool, 1),
    nn.AdaptiveMaxPool2d: (_adaptive_pool, 2), nn.AdaptiveMaxPool3d: (_adaptive_pool, 3),
    nn.PixelShuffle: (_pixel_shuffle, 2), nn.PixelUnshuffle: (_pixel_unshuffle, 2),
    nn.UpsamplingNearest2d: (_upsample, 2), nn.UpsamplingBilinear2d: (_upsample, 2),
    nn.ZeroPad1d: (_pad, 1), nn.ZeroPad2d: (_pad, 2), nn.ZeroPad3d: (_pad, 3),
    nn.ConstantPad1d: (_pad, 1), nn.ConstantPad2d: (_pad, 2), nn.ConstantPad3d: (_pad, 3),
    nn.ReflectionPad1d: (_pad, 1), nn.ReflectionPad2d: (_pad, 2), nn.ReflectionPad3d: (_pad, 3),
    nn.ReplicationPad1d: (_pad, 1), nn.ReplicationPad2d: (_pad, 2), nn.ReplicationPad3d: (_pad, 3),
    nn.CircularPad1d: (_pad, 1), nn.CircularPad2d: (_pad, 2), nn.CircularPad3d: (_pad, 3),
}  # fmt: skip


def convert_map(ops: OpList, kind: type, m: Any, x: str, name: str) -> str | None:
    """Value of a module of this kind on a map; None if it is not known, or not so."""
    axes = len(ops.shapes[x]) - 1
    if kind is nn.Upsample:  # of any rank
        return _upsample(ops, m, x, name) if axes else None
    converter, wanted = MAPS.get(kind, (None, 0))
    found: str | None = converter(ops, m, x, name) if converter and axes == wanted else None
    return found
