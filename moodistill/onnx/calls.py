"""Functions and methods of torch as ONNX operations."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from moodistill.onnx.maps import border_pad, constant_pad, resize
from moodistill.onnx.modules import convert
from moodistill.onnx.ops import Shape, UnsupportedOperation
from moodistill.onnx.values import Values

_JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), "Add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub"), "Sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), "Mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div"), "Div"),
}
_INPLACE = ("inplace",)
_POOL = ("kernel_size", "stride", "padding")
# Functions and methods as the module they stand for, with the order of their arguments.
_AS_MODULE: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), (nn.ReLU, _INPLACE)),
    F.relu6: (nn.ReLU6, _INPLACE),
    F.hardtanh: (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.silu: (nn.SiLU, _INPLACE),
    F.hardswish: (nn.Hardswish, _INPLACE),
    F.hardsigmoid: (nn.Hardsigmoid, _INPLACE),
    F.gelu: (nn.GELU, ("approximate",)),
    F.mish: (nn.Mish, _INPLACE),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.celu: (nn.CELU, ("alpha", "inplace")),
    F.selu: (nn.SELU, _INPLACE),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.softsign: (nn.Softsign, ()),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), (nn.Sigmoid, ())),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), (nn.Tanh, ())),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        (nn.Identity, ("p", "training", "inplace")),
    ),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    F.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode")),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    F.max_pool1d: (nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool1d: (nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode")),
    F.max_pool3d: (nn.MaxPool3d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool3d: (nn.MaxPool3d, (*_POOL, "dilation", "ceil_mode")),
    F.avg_pool1d: (nn.AvgPool1d, (*_POOL, "ceil_mode", "count_include_pad")),
    F.avg_pool3d: (nn.AvgPool3d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_max_pool1d: (nn.AdaptiveMaxPool1d, ("output_size", "return_indices")),
    F.adaptive_avg_pool3d: (nn.AdaptiveAvgPool3d, ("output_size",)),
    F.adaptive_max_pool3d: (nn.AdaptiveMaxPool3d, ("output_size", "return_indices")),
    **dict.fromkeys((torch.flatten, "flatten"), (nn.Flatten, ("start_dim", "end_dim"))),
}
# Inference does nothing here either; told by name, since torchvision loads slowly.
_NO_OP_CALLS = (("torchvision.ops.stochastic_depth", "stochastic_depth"),)
# Those that are given their tensors, with the defaults of their arguments.
_WITH_TENSORS: dict[Any, tuple[type[nn.Module], dict[str, Any]]] = {
    F.conv2d: (
        nn.Conv2d,
        {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    ),
    F.linear: (nn.Linear, {"weight": None, "bias": None}),
    F.prelu: (nn.PReLU, {"weight": None}),
    F.batch_norm: (
        nn.BatchNorm2d,
        {"running_mean": None, "running_var": None, "weight": None, "bias": None,
         "training": False, "momentum": 0.1, "eps": 1e-5},
    ),
    F.layer_norm: (
        nn.LayerNorm, {"normalized_shape": (), "weight": None, "bias": None, "eps": 1e-5}
    ),
    F.group_norm: (nn.GroupNorm, {"num_groups": 1, "weight": None, "bias": None, "eps": 1e-5}),
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """One call of the student's graph: its name, and the values that it may read."""

    values: Values
    name: str

    def emit(
        self, kind: str, inputs: str | list[str], shape: Shape, *tensors: Any, **attributes: Any
    ) -> str:
        return self.values.ops.emit(kind, inputs, self.name, shape, *tensors, **attributes)


def converted_module(values: Values, node: fx.Node, kind: type, module: Any) -> str:
    """Value of a module of this kind on the first argument of a node.

    `module` is the module, or anything with the settings and tensors that its kind reads.
    """
    x = values.value(node.args[0])
    value = convert(values.ops, kind, module, x, node.name)
    return values.mutated(x, value) if getattr(module, "inplace", False) else value


def converted_call(values: Values, node: fx.Node, target: Any) -> str | None:
    """Value of a function or method, `target`, None if it is not known."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    if target in _JOINS:
        if len(node.args) != 2 or node.kwargs:
            return None
        return _join(_Call(values, node.name), _JOINS[target], *node.args)
    if target in _CALLS:
        aliases = {"axis": "dim", "keepdims": "keepdim"}  # numpy's, which torch takes too
        keywords = {aliases.get(k, k): v for k, v in node.kwargs.items()}
        call = _Call(values, node.name)
        try:
            bound = inspect.signature(_CALLS[target]).bind(call, *node.args, **keywords)
        except TypeError:
            return None
        return _CALLS[target](*bound.args, **bound.kwargs)
    if not node.args:
        return None
    if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) in _NO_OP_CALLS:
        return values.value(node.args[0])
    if target in _WITH_TENSORS:
        kind, defaults = _WITH_TENSORS[target]
        given = {**dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
        settings = {k: values.constant(v) for k, v in given.items()}
        return converted_module(values, node, kind, SimpleNamespace(**{**defaults, **settings}))
    if target in _AS_MODULE and not any(isinstance(a, fx.Node) for a in arguments):
        kind, names = _AS_MODULE[target]
        settings = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        if kind is nn.Flatten:
            settings.setdefault("start_dim", 0)
        return converted_module(values, node, kind, kind(**settings))
    return None


def _join(call: _Call, kind: str, *operands: Any) -> str:
    """A sum, difference, product or quotient of two tensors, one of which may be constant."""
    given = [call.values.value(o) for o in operands if call.values.has(o)]
    shapes = [call.values.ops.shapes[v] for v in given]
    if len(given) == 2:
        if len(shapes[0]) != len(shapes[1]):
            raise UnsupportedOperation(f"{kind} of {shapes[0]} and {shapes[1]} per image")
        return call.emit(kind, given, _broadcast(call.name, *shapes))
    front = call.values.has(operands[1])
    constant = call.values.constant(operands[0 if front else 1])
    if not given or not isinstance(constant, (int, float, torch.Tensor)):
        raise UnsupportedOperation(f"{kind} of {operands[0]} and {operands[1]}")
    constant = torch.as_tensor(constant).float()
    if constant.ndim == len(shapes[0]) + 1 and len(constant) == 1:
        constant = constant[0]
    if constant.ndim > len(shapes[0]):
        raise UnsupportedOperation(f"{kind} with a constant for every image of a batch")
    shape = _broadcast(call.name, shapes[0], tuple(constant.shape))
    return call.emit(kind, given, shape, constant, front=front)


# The functions and methods of `_CALLS`, with the arguments that torch gives them.


def _concat(call: _Call, tensors: Any, dim: Any = 0) -> str:
    if not isinstance(tensors, (list, tuple)):
        raise UnsupportedOperation(f"concatenation of the parts of {tensors}")
    parts = [call.values.value(part) for part in tensors]
    shapes = [call.values.ops.shapes[part] for part in parts]
    axis = _axis(dim, len(shapes[0]) + 1)
    if len({(*s[: axis - 1], None, *s[axis:]) for s in shapes}) > 1:
        raise _mismatch(call.name, *shapes)
    width = sum(s[axis - 1] for s in shapes)
    shape = (*shapes[0][: axis - 1], width, *shapes[0][axis:])
    return call.emit("Concat", parts, shape, axis=axis)


def _narrow(call: _Call, input: Any, dim: Any, start: Any, length: Any) -> str:
    shape = call.values.shape(input)
    axis = _axis(dim, len(shape) + 1)
    start, length, size = call.values.size(start), call.values.size(length), shape[axis - 1]
    start += size if start < 0 else 0
    if not 0 <= start <= start + length <= size:
        raise UnsupportedOperation(f"{length} channels from {start} of {size}")
    ends = (torch.tensor([v]) for v in (start, start + length, axis))
    shape = (*shape[: axis - 1], length, *shape[axis:])
    return call.emit("Slice", call.values.value(input), shape, *ends)


def _permute(call: _Call, input: Any, *order: Any, dims: Any = None) -> str:
    shape = call.values.shape(input)
    given = _several(dims if dims is not None else order)
    axes = [_axis(d, len(shape) + 1) for d in given[1:]]
    if given[:1] not in ([0], [-len(given)]) or sorted(axes) != [*range(1, len(shape) + 1)]:
        raise UnsupportedOperation(f"permutation {given} of {len(shape) + 1}-D input")
    shape = tuple(shape[a - 1] for a in axes)
    return call.emit("Transpose", call.values.value(input), shape, perm=[0, *axes])


def _transpose(call: _Call, input: Any, dim0: Any, dim1: Any) -> str:
    rank = len(call.values.shape(input)) + 1
    one, other = _axis(dim0, rank), _axis(dim1, rank)
    order = list(range(rank))
    order[one], order[other] = other, one
    return _permute(call, input, order)


def _view(call: _Call, input: Any, *sizes: Any, shape: Any = None) -> str:
    flat = math.prod(call.values.shape(input))
    first, *rest = map(call.values.size, _several(sizes or shape))
    if first == 0 and rest.count(-1) == 1 and 0 not in rest:
        rest[rest.index(-1)] = flat // -math.prod(rest)
    if first not in (0, -1) or min(rest, default=0) < 1 or math.prod(rest) != flat:
        raise UnsupportedOperation(f"a view of {call.values.shape(input)} as {(first, *rest)}")
    return call.values.ops.reshape(call.values.value(input), call.name, tuple(rest))


def _unflatten(call: _Call, input: Any, dim: Any, sizes: Any) -> str:
    shape = call.values.shape(input)
    axis = _axis(dim, len(shape) + 1)
    return _view(call, input, 0, *shape[: axis - 1], *_several(sizes), *shape[axis:])


def _unsqueeze(call: _Call, input: Any, dim: Any) -> str:
    shape = call.values.shape(input)
    axis = _axis(dim, len(shape) + 2)
    return _view(call, input, 0, *shape[: axis - 1], 1, *shape[axis - 1 :])


def _squeeze(call: _Call, input: Any, dim: Any) -> str:
    shape = call.values.shape(input)
    axes = [_axis(d, len(shape) + 1) for d in _several(dim)]
    kept = (n for i, n in enumerate(shape, 1) if n != 1 or i not in axes)
    return _view(call, input, 0, *kept)


def _mean(call: _Call, input: Any, dim: Any = None, keepdim: Any = False) -> str:
    shape = call.values.shape(input)
    axes = sorted(_axis(d, len(shape) + 1) for d in _several(dim))
    if len(shape) < 2 or axes != [*range(2, len(shape) + 1)]:
        raise UnsupportedOperation(f"the mean of {len(shape) + 1}-D input over {dim}")
    out = (shape[0], *[1] * (len(shape) - 1))
    value = call.emit("GlobalAveragePool", call.values.value(input), out)
    return value if keepdim else call.values.ops.reshape(value, call.name, shape[:1])


def _pad(call: _Call, input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> str:
    values = call.values
    borders = {"reflect": "reflect", "replicate": "edge"}
    if mode in borders:
        x = values.value(input)
        return border_pad(values.ops, x, call.name, _several(pad), borders[mode])
    if mode != "constant":
        raise UnsupportedOperation(f"padding of mode {mode}")
    return constant_pad(values.ops, values.value(input), call.name, _several(pad), value or 0.0)


def _interpolate(
    call: _Call, input: Any, size: Any = None, scale_factor: Any = None, mode: Any = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: Any = False,
) -> str:  # fmt: skip
    values, made = call.values, None
    if not antialias:
        size = None if size is None else [values.size(one) for one in _several(size)]
        axes = len(values.shape(input)) - 1
        size = size * axes if size is not None and len(size) == 1 else size
        made = resize(
            values.ops, values.value(input), call.name, size, scale_factor, mode, align_corners,
            recompute_scale_factor,
        )  # fmt: skip
    if made is None:
        raise UnsupportedOperation(f"interpolate by mode {mode} from {values.shape(input)}")
    return made


def _instance_norm(
    call: _Call, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: Any = True, momentum: Any = 0.1, eps: Any = 1e-5,
) -> str:  # fmt: skip
    if running_mean is not None or not use_input_stats:
        raise UnsupportedOperation("instance_norm with stored statistics")
    values = call.values
    channels = values.shape(input)[0]
    scale = torch.ones(channels) if weight is None else values.constant(weight)
    shift = torch.zeros(channels) if bias is None else values.constant(bias)
    x = values.value(input)
    return values.ops.like(
        "InstanceNormalization", x, call.name, scale, shift, epsilon=float(eps)
    )  # fmt: skip


def _copy(call: _Call, input: Any, **_: Any) -> str:
    return call.values.ops.like("Identity", call.values.value(input), call.name)


_CALLS: dict[Any, Callable[..., str]] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concat),
    **dict.fromkeys((torch.narrow, "narrow"), _narrow),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _view),
    **dict.fromkeys((torch.unflatten, "unflatten"), _unflatten),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _unsqueeze),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.clone, "clone", "contiguous"), _copy),
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.instance_norm: _instance_norm,
}


def _several(value: Any) -> list[Any]:
    """What torch takes as one tuple or as arguments of their own, or as a single number."""
    if isinstance(value, (tuple, list)):
        only = len(value) == 1 and isinstance(value[0], (tuple, list))
        return _several(value[0]) if only else list(value)
    return [value]


def _axis(dim: Any, rank: int) -> int:
    """An axis counted from the front; the batch, which nothing may touch, is at 0."""
    if not isinstance(dim, int) or not -rank <= dim < rank or dim % rank == 0:
        raise UnsupportedOperation(f"axis {dim} of {rank}-D input")
    return dim % rank


def _broadcast(name: str, *shapes: Shape) -> Shape:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise _mismatch(name, *shapes) from None


def _mismatch(name: str, *shapes: Shape) -> ValueError:
    return ValueError(
        f"{name} joins {' and '.join(map(str, shapes))} per image; expected shapes that "
        "fit: build the student again with matching widths and sizes"
    )
