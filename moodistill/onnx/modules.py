"""Modules of torch as ONNX operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moodistill.onnx.ops import OpList, Shape, UnsupportedOperation

NO_OPS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Identity)

_SIMPLE: dict[type[nn.Module], tuple[str, Callable[[Any], dict[str, float]]]] = {
    nn.LeakyReLU: ("LeakyRelu", lambda m: {"alpha": float(m.negative_slope)}),
    nn.Hardswish: ("HardSwish", lambda m: {}),
    nn.Hardsigmoid: ("HardSigmoid", lambda m: {"alpha": 1 / 6, "beta": 0.5}),
    nn.Sigmoid: ("Sigmoid", lambda m: {}),
    nn.Tanh: ("Tanh", lambda m: {}),
    nn.Softsign: ("Softsign", lambda m: {}),
    nn.ELU: ("Elu", lambda m: {"alpha": float(m.alpha)}),
    nn.CELU: ("Celu", lambda m: {"alpha": float(m.alpha)}),
    nn.SELU: ("Selu", lambda m: {}),
}


def convert(ops: OpList, kind: type, m: Any, x: str, name: str) -> str:
    """Value of a module of this kind applied to the value `x`.

    `m` is the module, or anything with the settings and tensors that its kind reads.
    """
    value = None
    if kind in NO_OPS:
        value = x
    elif kind in _SIMPLE:
        onnx_kind, attributes = _SIMPLE[kind]
        value = ops.like(onnx_kind, x, name, **attributes(m))
    elif kind in _CONVERTERS:
        value = _CONVERTERS[kind](ops, m, x, name)
    elif kind in _MAPS and len(ops.shapes[x]) == 3:
        value = _MAPS[kind](ops, m, x, name)
    if value is None:
        rank = len(ops.shapes[x]) + 1
        raise UnsupportedOperation(f"{kind.__name__} on {rank}-D input with {m}")
    return value


def _relu(ops: OpList, m: Any, x: str, name: str) -> str:
    again = x in ops.ops and ops.ops[x].kind == "Relu"
    return ops.like("Identity" if again else "Relu", x, name)


def _hardtanh(ops: OpList, m: Any, x: str, name: str) -> str:
    return ops.like("Clip", x, name, float(m.min_val), float(m.max_val))


def _silu(ops: OpList, m: Any, x: str, name: str) -> str:
    return ops.like("Mul", (x, ops.like("Sigmoid", x, name)), name)


def _gelu(ops: OpList, m: Any, x: str, name: str) -> str:
    """Both in the form that ONNX Runtime fuses; an operation Gelu came with opset 20 only."""
    if m.approximate == "none":
        value = ops.like("Div", x, name, math.sqrt(2))
        value = ops.like("Erf", value, name)
        value = ops.like("Add", value, name, 1.0)
        value = ops.like("Mul", (x, value), name)
        return ops.like("Mul", value, name, 0.5)
    value = ops.like("Pow", x, name, 3.0)
    value = ops.like("Mul", value, name, 0.044715)
    value = ops.like("Add", (x, value), name)
    value = ops.like("Mul", value, name, math.sqrt(2 / math.pi))
    value = ops.like("Tanh", value, name)
    value = ops.like("Add", value, name, 1.0)
    return ops.like("Mul", (ops.like("Mul", x, name, 0.5), value), name)


def _mish(ops: OpList, m: Any, x: str, name: str) -> str:
    value = ops.like("Softplus", x, name)
    return ops.like("Mul", (x, ops.like("Tanh", value, name)), name)


def _softplus(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if m.threshold < 15:  # from here on torch returns the input; ONNX differs by exp(-threshold)
        return None
    if m.beta == 1:
        return ops.like("Softplus", x, name)
    value = ops.like("Softplus", ops.like("Mul", x, name, float(m.beta)), name)
    return ops.like("Div", value, name, float(m.beta))


def _prelu(ops: OpList, m: Any, x: str, name: str) -> str:
    shape = ops.shapes[x]
    if m.weight.numel() > 1:
        _check_width(name, m.weight.numel(), shape)
    return ops.like("PRelu", x, name, m.weight.reshape(-1, *[1] * (len(shape) - 1)))


def _softmax(ops: OpList, m: Any, x: str, name: str) -> str | None:
    """Over one axis; from opset 13 on the axis means that alone."""
    rank = len(ops.shapes[x]) + 1
    if m.dim is None or m.dim % rank == 0:
        return None
    kind = "LogSoftmax" if isinstance(m, nn.LogSoftmax) else "Softmax"
    return ops.like(kind, x, name, axis=m.dim % rank)


def _flatten(ops: OpList, m: Any, x: str, name: str) -> str | None:
    shape = ops.shapes[x]
    start, end = (d % (len(shape) + 1) for d in (m.start_dim, m.end_dim))
    if start < 1:
        return None
    merged = math.prod(shape[start - 1 : end])
    return ops.reshape(x, name, (*shape[: start - 1], merged, *shape[end:]))


def _linear(ops: OpList, m: Any, x: str, name: str) -> str:
    *rest, width = ops.shapes[x]
    outputs, inputs = m.weight.shape
    _check_width(name, inputs, ops.shapes[x], -1)
    if not rest:
        return ops.emit("Gemm", x, name, (outputs,), m.weight, m.bias, transB=1)
    value = ops.emit("MatMul", x, name, (*rest, outputs), m.weight.T)
    return value if m.bias is None else ops.like("Add", value, name, m.bias)


def _batch_norm(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if m.running_mean is None:
        return None
    width = len(m.running_mean)
    _check_width(name, width, ops.shapes[x])
    tensors = *_affine(m, (width,)), m.running_mean, m.running_var
    return ops.like("BatchNormalization", x, name, *tensors, epsilon=float(m.eps))


def _layer_norm(ops: OpList, m: Any, x: str, name: str) -> str | None:
    normed = tuple(m.normalized_shape)
    if ops.shapes[x][-len(normed) :] != normed:
        return None
    scale = torch.ones(normed) if m.weight is None else m.weight
    settings = {"axis": -len(normed), "epsilon": float(m.eps)}
    return ops.like("LayerNormalization", x, name, scale, m.bias, **settings)


def _group_norm(ops: OpList, m: Any, x: str, name: str) -> str:
    """ONNX has a GroupNormalization from opset 18, with other tensors from opset 21."""
    shape, groups = ops.shapes[x], m.num_groups
    if m.weight is not None:
        _check_width(name, len(m.weight), shape)
    rows = ops.reshape(x, name, (groups, math.prod(shape) // groups))
    plain = torch.ones(groups), torch.zeros(groups)
    value = ops.like("InstanceNormalization", rows, name, *plain, epsilon=float(m.eps))
    value = ops.reshape(value, name, shape)
    if m.weight is None and m.bias is None:
        return value
    scale, shift = (t.reshape(-1, *[1] * (len(shape) - 1)) for t in _affine(m, shape[:1]))
    return ops.like("Add", ops.like("Mul", value, name, scale), name, shift)


def _conv(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if getattr(m, "padding_mode", "zeros") != "zeros":
        return None
    shape = ops.shapes[x]
    outputs, inputs, *kernel = m.weight.shape
    _check_width(name, inputs * m.groups, shape)
    out, window = _window(m, kernel, shape[1:])
    return ops.emit(
        "Conv", x, name, (outputs, *out), m.weight, m.bias, group=int(m.groups), **window
    )


def _max_pool(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if m.return_indices:
        return None
    channels, *size = ops.shapes[x]
    out, window = _window(m, m.kernel_size, size)
    starts, ends = window["pads"][:2], window["pads"][2:]
    if any(e >= k for e, k in zip(ends, window["kernel_shape"], strict=True)):
        # With dilation a window may hang over by more than ONNX Runtime takes as padding. The
        # border is finite, since INT8 calibration refuses infinite values.
        lowest = torch.finfo(torch.float32).min
        x, window["pads"] = _padded(ops, x, name, starts, ends, lowest), [0] * 4
    return ops.emit("MaxPool", x, name, (channels, *out), **window)


def _avg_pool(ops: OpList, m: Any, x: str, name: str) -> str:
    channels, *size = ops.shapes[x]
    out, window = _window(m, m.kernel_size, size)
    del window["dilations"]  # the older operator sets have none here
    starts, ends = window["pads"][:2], window["pads"][2:]
    divisor = m.divisor_override
    counted = any(starts) if m.count_include_pad else False
    if divisor is not None:  # every window is whole then
        x, window["pads"] = _padded(ops, x, name, starts, ends), [0] * 4
        counted = False
    elif counted and starts != ends:
        # ONNX cannot count torch's padding without that of ceil_mode: the former is written out.
        x = _padded(ops, x, name, starts, starts)
        window["pads"] = [0, 0, *(e - s for s, e in zip(starts, ends, strict=True))]
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
    return constant_pad(ops, x, name, (starts[1], ends[1], starts[0], ends[0]), value)


def _adaptive_pool(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if getattr(m, "return_indices", False):
        return None
    pool = "Max" if hasattr(m, "return_indices") else "Average"
    channels, *size = ops.shapes[x]
    wanted = [s if w is None else int(w) for s, w in zip(size, _pair(m.output_size), strict=True)]
    shape = (channels, *wanted)
    if wanted == size:
        return ops.like("Identity", x, name)
    if wanted == [1, 1]:
        return ops.emit(f"Global{pool}Pool", x, name, shape)
    if not any(s % w for s, w in zip(size, wanted, strict=True)):
        kernel = [s // w for s, w in zip(size, wanted, strict=True)]
        return ops.emit(f"{pool}Pool", x, name, shape, kernel_shape=kernel, strides=kernel)
    if pool == "Max":
        return None
    # Rows and columns are weighted sums of the input's.
    rows = F.adaptive_avg_pool1d(torch.eye(size[0]), wanted[0])
    columns = F.adaptive_avg_pool1d(torch.eye(size[1]), wanted[1])
    value = ops.emit("MatMul", x, name, (channels, size[0], wanted[1]), columns)
    return ops.emit("MatMul", value, name, shape, rows.T, front=True)


def _pad(ops: OpList, m: Any, x: str, name: str) -> str:
    return constant_pad(ops, x, name, m.padding, m.value)


# Kinds for maps and vectors, and those for maps (C, H, W) alone.
_Converter = Callable[[OpList, Any, str, str], str | None]
_CONVERTERS: dict[type, _Converter] = {
    nn.ReLU: _relu,
    nn.ReLU6: _hardtanh,
    nn.Hardtanh: _hardtanh,
    nn.SiLU: _silu,
    nn.GELU: _gelu,
    nn.Mish: _mish,
    nn.Softplus: _softplus,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten,
    nn.Softmax: _softmax,
    nn.LogSoftmax: _softmax,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
_MAPS: dict[type, _Converter] = {
    nn.Conv2d: _conv,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.AdaptiveMaxPool2d: _adaptive_pool,
    nn.ZeroPad2d: _pad,
    nn.ConstantPad2d: _pad,
}


def constant_pad(ops: OpList, x: str, name: str, padding: Sequence[int], value: float = 0.0) -> str:
    """The value `x` with constant borders; `padding` is torch's, from the last axis on."""
    shape, axes = ops.shapes[x], len(padding) // 2
    if len(padding) % 2 or axes > len(shape) or not all(isinstance(p, int) for p in padding):
        raise UnsupportedOperation(f"padding {padding} of {len(shape) + 1}-D input")
    starts, ends = ([0] * (len(shape) + 1 - axes) + list(padding[i::2])[::-1] for i in (0, 1))
    out = tuple(n + s + e for n, s, e in zip(shape, starts[1:], ends[1:], strict=True))
    return ops.emit("Pad", x, name, out, torch.tensor(starts + ends), float(value) or None)


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # type: ignore


def _affine(m: Any, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a norm, which it may lack."""
    scale = torch.ones(shape) if m.weight is None else m.weight
    return scale, torch.zeros(shape) if m.bias is None else m.bias


def _check_width(name: str, expected: int, shape: Shape, axis: int = 0) -> None:
    if shape[axis] != expected:
        raise ValueError(
            f"{name} expects {expected} channels or features but its input is {shape} "
            "per image; build the student again with matching widths"
        )


def _window(m: Any, kernel_size: Any, size: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Output height and width of a convolution or pooling module, and its ONNX attributes.

    ONNX and torch round differently in ceil mode, so the window that hangs over the edge is
    written as padding at the end.
    """
    kernel, stride, dilation = map(_pair, (kernel_size, m.stride, getattr(m, "dilation", 1)))
    ceil_mode = getattr(m, "ceil_mode", False)
    out, starts, ends = [], [], []
    for i, (n, k, s, d) in enumerate(zip(size, kernel, stride, dilation, strict=True)):
        span = d * (k - 1) + 1
        if isinstance(m.padding, str):
            both = span - 1 if m.padding == "same" else 0
            start, end = both // 2, both - both // 2
        else:
            start = end = _pair(m.padding)[i]
        count = (n + start + end - span + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= n + start:
            count -= 1  # a window may not start in the padding
        out.append(count)
        starts.append(start)
        ends.append(max(end, (count - 1) * s + span - n - start))
    pads = starts + ends
    window = {"kernel_shape": kernel, "strides": stride, "pads": pads, "dilations": dilation}
    return out, {key: [int(v) for v in values] for key, values in window.items()}
