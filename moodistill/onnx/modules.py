"""Modules of torch as ONNX operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moodistill.onnx.maps import check_width, convert_map
from moodistill.onnx.ops import OpList, Shape, UnsupportedOperation

NO_OPS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.Identity,
)  # fmt: skip

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
    else:
        value = convert_map(ops, kind, m, x, name)
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
        check_width(name, m.weight.numel(), shape)
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
    check_width(name, inputs, ops.shapes[x], -1)
    if not rest:
        return ops.emit("Gemm", x, name, (outputs,), m.weight, m.bias, transB=1)
    value = ops.emit("MatMul", x, name, (*rest, outputs), m.weight.T)
    return value if m.bias is None else ops.like("Add", value, name, m.bias)


def _batch_norm(ops: OpList, m: Any, x: str, name: str) -> str | None:
    if m.running_mean is None:
        return None
    width = len(m.running_mean)
    check_width(name, width, ops.shapes[x])
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
        check_width(name, len(m.weight), shape)
    rows = ops.reshape(x, name, (groups, math.prod(shape) // groups))
    plain = torch.ones(groups), torch.zeros(groups)
    value = ops.like("InstanceNormalization", rows, name, *plain, epsilon=float(m.eps))
    value = ops.reshape(value, name, shape)
    if m.weight is None and m.bias is None:
        return value
    scale, shift = (t.reshape(-1, *[1] * (len(shape) - 1)) for t in _affine(m, shape[:1]))
    return ops.like("Add", ops.like("Mul", value, name, scale), name, shift)


def _affine(m: Any, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a norm, which it may lack."""
    scale = torch.ones(shape) if m.weight is None else m.weight
    return scale, torch.zeros(shape) if m.bias is None else m.bias


# Kinds for maps and vectors.
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
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
