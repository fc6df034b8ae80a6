"""The student's fx graph read as a list of ONNX operations."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from moodistill.heads.outputs import outputs_of
from moodistill.onnx.maps import border_pad, constant_pad, resize
from moodistill.onnx.modules import convert
from moodistill.onnx.ops import INPUT, OpList, Shape, UnsupportedOperation

_JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), "Add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub"), "Sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), "Mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div"), "Div"),
}
_MUTATING = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_SIZES = ("size", getattr, operator.getitem)
# What shapes a parameter before it is used: done here, once.
_SHAPING = (
    *_SIZES, torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze,
    torch.permute, torch.transpose, "view", "reshape", "flatten", "unflatten", "unsqueeze",
    "squeeze", "permute", "transpose", "contiguous",
)  # fmt: skip
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


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update((node, *node.all_input_nodes))
    return live


class OnnxGraph:
    """The student's operations from `INPUT` to its outputs, pruned and folded.

    Shapes are of one image, without the batch axis; `outputs` has those of the outputs by name.
    """

    def __init__(self, student: fx.GraphModule, input_shape: Shape) -> None:
        """Translate the student; `UnsupportedOperation` if it holds one that counts."""
        self.input_shape = input_shape
        self._student = student
        self._ops = OpList(input_shape)
        self._values: dict[fx.Node, str] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._visited: set[fx.Node] = set()
        live = live_nodes(student.graph)
        result: dict[str, Any] = {}
        for node in student.graph.nodes:
            self._visited.add(node)
            if node.op == "output":
                result = outputs_of(node.args[0])
            elif node.op == "placeholder":
                if self._values:
                    raise UnsupportedOperation("a second input")
                self._values[node] = INPUT
            else:
                try:
                    value = self._visit(node)
                    if value is not None:
                        self._values[node] = value
                except UnsupportedOperation:
                    # A method like clamp_ acts on its input even if nobody reads its result.
                    if node in live or self._in_place(node):
                        raise
        results = {name: self._value(value) for name, value in result.items()}
        self.outputs = {name: self._ops.shapes[value] for name, value in results.items()}
        self.ops = self._ops.finished(results)

    def _value(self, argument: Any) -> str:
        if not self._has_value(argument):
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self._values[argument]

    def _has_value(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in self._values

    def _shape(self, argument: Any) -> Shape:
        return self._ops.shapes[self._value(argument)]

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._student.get_submodule(str(node.target)), "inplace", False))
        name = getattr(node.target, "__name__", str(node.target))
        return name.endswith("_") or node.target in _MUTATING or bool(node.kwargs.get("inplace"))

    def _mutated(self, old: str, new: str) -> str:
        """After an in-place operation whoever reads the old tensor later sees the new one."""
        if new == old:
            return new
        storage = self._ops.storage(old)
        for node, value in self._values.items():
            shared = value != old and self._ops.storage(value) == storage
            if shared and not self._visited.issuperset(node.users):
                raise UnsupportedOperation(f"an in-place operation seen through {node}")
        self._values = {n: new if v == old else v for n, v in self._values.items()}
        return new

    def _visit(self, node: fx.Node) -> str | None:
        """The value of a node, None if it has none: a constant, or a size.

        Sizes are read where a view uses them.
        """
        target: Any = node.target
        unknown = UnsupportedOperation(f"{node.op} {getattr(target, '__name__', target)}")
        if node.op == "get_attr":
            constant = operator.attrgetter(target)(self._student)
            if not isinstance(constant, torch.Tensor):
                raise unknown
            self._constants[node] = constant.detach()
            return None
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise unknown
            module = self._student.get_submodule(target)
            return self._module(type(module), module, node.args[0], node.name)
        if node.op not in ("call_function", "call_method"):
            raise unknown
        if target in _SHAPING and all(n in self._constants for n in node.all_input_nodes):
            args, keywords = fx.node.map_arg((node.args, node.kwargs), self._constants.__getitem__)
            call = target if node.op == "call_function" else getattr(args[0], target)
            self._constants[node] = call(*args[node.op == "call_method" :], **keywords)
            return None
        if target in _SIZES:
            return None
        in_place = target in _MUTATING
        if isinstance(target, str) and target.endswith("_"):
            in_place, target = True, target.removesuffix("_")
        value = self._call(target, node)
        if value is None:
            raise unknown
        return self._mutated(self._value(node.args[0]), value) if in_place else value

    def _call(self, target: Any, node: fx.Node) -> str | None:
        """The value of a function or method, None if it is not known."""
        arguments = [*node.args[1:], *node.kwargs.values()]
        if target in _JOINS:
            if len(node.args) != 2 or node.kwargs:
                return None
            return self._join(_JOINS[target], node.name, *node.args)
        if target in _CALLS:
            aliases = {"axis": "dim", "keepdims": "keepdim"}  # numpy's, which torch takes too
            keywords = {aliases.get(k, k): v for k, v in node.kwargs.items()}
            try:
                bound = inspect.signature(_CALLS[target]).bind(
                    self, node.name, *node.args, **keywords
                )
            except TypeError:
                return None
            return _CALLS[target](*bound.args, **bound.kwargs)
        if not node.args:
            return None
        if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) in _NO_OP_CALLS:
            return self._value(node.args[0])
        if target in _WITH_TENSORS:
            kind, defaults = _WITH_TENSORS[target]
            given = {**dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
            settings = {k: self._constant(v) for k, v in given.items()}
            return self._module(
                kind, SimpleNamespace(**{**defaults, **settings}), node.args[0], node.name
            )
        if target in _AS_MODULE and not any(isinstance(a, fx.Node) for a in arguments):
            kind, names = _AS_MODULE[target]
            settings = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
            if kind is nn.Flatten:
                settings.setdefault("start_dim", 0)
            return self._module(kind, kind(**settings), node.args[0], node.name)
        return None

    def _module(self, kind: type, module: Any, argument: Any, name: str) -> str:
        x = self._value(argument)
        value = convert(self._ops, kind, module, x, name)
        return self._mutated(x, value) if getattr(module, "inplace", False) else value

    def _constant(self, argument: Any) -> Any:
        """The parameter or buffer behind a node; anything but a node as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self._constants:
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self._constants[argument]

    def _join(self, kind: str, name: str, *operands: Any) -> str:
        """A sum, difference, product or quotient of two tensors, one of which may be constant."""
        values = [self._values[o] for o in operands if self._has_value(o)]
        shapes = [self._ops.shapes[v] for v in values]
        if len(values) == 2:
            if len(shapes[0]) != len(shapes[1]):
                raise UnsupportedOperation(f"{kind} of {shapes[0]} and {shapes[1]} per image")
            return self._ops.emit(kind, values, name, _broadcast(name, *shapes))
        front = self._has_value(operands[1])
        constant = self._constant(operands[0 if front else 1])
        if not values or not isinstance(constant, (int, float, torch.Tensor)):
            raise UnsupportedOperation(f"{kind} of {operands[0]} and {operands[1]}")
        constant = torch.as_tensor(constant).float()
        if constant.ndim == len(shapes[0]) + 1 and len(constant) == 1:
            constant = constant[0]
        if constant.ndim > len(shapes[0]):
            raise UnsupportedOperation(f"{kind} with a constant for every image of a batch")
        shape = _broadcast(name, shapes[0], tuple(constant.shape))
        return self._ops.emit(kind, values, name, shape, constant, front=front)

    # The functions and methods of `_CALLS`, with the arguments that torch gives them.

    def _concat(self, name: str, tensors: Any, dim: Any = 0) -> str:
        if not isinstance(tensors, (list, tuple)):
            raise UnsupportedOperation(f"concatenation of the parts of {tensors}")
        parts = [self._value(part) for part in tensors]
        shapes = [self._ops.shapes[part] for part in parts]
        axis = _axis(dim, len(shapes[0]) + 1)
        if len({(*s[: axis - 1], None, *s[axis:]) for s in shapes}) > 1:
            raise _mismatch(name, *shapes)
        width = sum(s[axis - 1] for s in shapes)
        shape = (*shapes[0][: axis - 1], width, *shapes[0][axis:])
        return self._ops.emit("Concat", parts, name, shape, axis=axis)

    def _narrow(self, name: str, input: Any, dim: Any, start: Any, length: Any) -> str:
        shape = self._shape(input)
        axis = _axis(dim, len(shape) + 1)
        start, length, size = self._size(start), self._size(length), shape[axis - 1]
        start += size if start < 0 else 0
        if not 0 <= start <= start + length <= size:
            raise UnsupportedOperation(f"{length} channels from {start} of {size}")
        ends = (torch.tensor([v]) for v in (start, start + length, axis))
        shape = (*shape[: axis - 1], length, *shape[axis:])
        return self._ops.emit("Slice", self._value(input), name, shape, *ends)

    def _permute(self, name: str, input: Any, *order: Any, dims: Any = None) -> str:
        shape = self._shape(input)
        given = _several(dims if dims is not None else order)
        axes = [_axis(d, len(shape) + 1) for d in given[1:]]
        if given[:1] not in ([0], [-len(given)]) or sorted(axes) != [*range(1, len(shape) + 1)]:
            raise UnsupportedOperation(f"permutation {given} of {len(shape) + 1}-D input")
        shape = tuple(shape[a - 1] for a in axes)
        return self._ops.emit("Transpose", self._value(input), name, shape, perm=[0, *axes])

    def _transpose(self, name: str, input: Any, dim0: Any, dim1: Any) -> str:
        rank = len(self._shape(input)) + 1
        one, other = _axis(dim0, rank), _axis(dim1, rank)
        order = list(range(rank))
        order[one], order[other] = other, one
        return self._permute(name, input, order)

    def _view(self, name: str, input: Any, *sizes: Any, shape: Any = None) -> str:
        flat = math.prod(self._shape(input))
        first, *rest = map(self._size, _several(sizes or shape))
        if first == 0 and rest.count(-1) == 1 and 0 not in rest:
            rest[rest.index(-1)] = flat // -math.prod(rest)
        if first not in (0, -1) or min(rest, default=0) < 1 or math.prod(rest) != flat:
            raise UnsupportedOperation(f"a view of {self._shape(input)} as {(first, *rest)}")
        return self._ops.reshape(self._value(input), name, tuple(rest))

    def _unflatten(self, name: str, input: Any, dim: Any, sizes: Any) -> str:
        shape = self._shape(input)
        axis = _axis(dim, len(shape) + 1)
        return self._view(name, input, 0, *shape[: axis - 1], *_several(sizes), *shape[axis:])

    def _unsqueeze(self, name: str, input: Any, dim: Any) -> str:
        shape = self._shape(input)
        axis = _axis(dim, len(shape) + 2)
        return self._view(name, input, 0, *shape[: axis - 1], 1, *shape[axis - 1 :])

    def _squeeze(self, name: str, input: Any, dim: Any) -> str:
        shape = self._shape(input)
        axes = [_axis(d, len(shape) + 1) for d in _several(dim)]
        kept = (n for i, n in enumerate(shape, 1) if n != 1 or i not in axes)
        return self._view(name, input, 0, *kept)

    def _mean(self, name: str, input: Any, dim: Any = None, keepdim: Any = False) -> str:
        shape = self._shape(input)
        axes = sorted(_axis(d, len(shape) + 1) for d in _several(dim))
        if len(shape) < 2 or axes != [*range(2, len(shape) + 1)]:
            raise UnsupportedOperation(f"the mean of {len(shape) + 1}-D input over {dim}")
        out = (shape[0], *[1] * (len(shape) - 1))
        value = self._ops.emit("GlobalAveragePool", self._value(input), name, out)
        return value if keepdim else self._ops.reshape(value, name, shape[:1])

    def _pad(
        self, name: str, input: Any, pad: Any, mode: Any = "constant", value: Any = None
    ) -> str:
        borders = {"reflect": "reflect", "replicate": "edge"}
        if mode in borders:
            return border_pad(self._ops, self._value(input), name, _several(pad), borders[mode])
        if mode != "constant":
            raise UnsupportedOperation(f"padding of mode {mode}")
        return constant_pad(self._ops, self._value(input), name, _several(pad), value or 0.0)

    def _interpolate(
        self, name: str, input: Any, size: Any = None, scale_factor: Any = None,
        mode: Any = "nearest", align_corners: Any = None, recompute_scale_factor: Any = None,
        antialias: Any = False,
    ) -> str:  # fmt: skip
        made = None
        if not antialias:
            size = None if size is None else [self._size(one) for one in _several(size)]
            axes = len(self._shape(input)) - 1
            size = size * axes if size is not None and len(size) == 1 else size
            made = resize(
                self._ops, self._value(input), name, size, scale_factor, mode, align_corners,
                recompute_scale_factor,
            )  # fmt: skip
        if made is None:
            raise UnsupportedOperation(f"interpolate by mode {mode} from {self._shape(input)}")
        return made

    def _instance_norm(
        self, name: str, input: Any, running_mean: Any = None, running_var: Any = None,
        weight: Any = None, bias: Any = None, use_input_stats: Any = True, momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> str:  # fmt: skip
        if running_mean is not None or not use_input_stats:
            raise UnsupportedOperation("instance_norm with stored statistics")
        channels = self._shape(input)[0]
        scale = torch.ones(channels) if weight is None else self._constant(weight)
        shift = torch.zeros(channels) if bias is None else self._constant(bias)
        value = self._value(input)
        return self._ops.like(
            "InstanceNormalization", value, name, scale, shift, epsilon=float(eps)
        )  # fmt: skip

    def _copy(self, name: str, input: Any, **_: Any) -> str:
        return self._ops.like("Identity", self._value(input), name)

    def _size(self, size: Any) -> int:
        """A size as a number, 0 for that of the batch: 3, x.size(1), x.size()[1] or x.shape[1]."""
        number = self._constant(size) if size in self._constants else size
        if isinstance(number, int):
            return number
        source: Any = None
        axis: Any = None
        if isinstance(size, fx.Node) and size.target == "size" and len(size.args) == 2:
            source, axis = size.args
        elif isinstance(size, fx.Node) and size.target is operator.getitem:
            whole: Any = size.args[0]
            if whole.args[1:] == {"size": (), getattr: ("shape",)}.get(whole.target):
                source, axis = whole.args[0], size.args[1]
        sizes = (0, *self._shape(source))
        if not isinstance(axis, int) or not -len(sizes) <= axis < len(sizes):
            raise UnsupportedOperation(f"{size} where a size is expected")
        return sizes[axis]


_CALLS: dict[Any, Callable[..., str]] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), OnnxGraph._concat),
    **dict.fromkeys((torch.narrow, "narrow"), OnnxGraph._narrow),
    **dict.fromkeys((torch.permute, "permute"), OnnxGraph._permute),
    **dict.fromkeys((torch.transpose, "transpose"), OnnxGraph._transpose),
    **dict.fromkeys((torch.reshape, "reshape", "view"), OnnxGraph._view),
    **dict.fromkeys((torch.unflatten, "unflatten"), OnnxGraph._unflatten),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), OnnxGraph._unsqueeze),
    **dict.fromkeys((torch.squeeze, "squeeze"), OnnxGraph._squeeze),
    **dict.fromkeys((torch.mean, "mean"), OnnxGraph._mean),
    **dict.fromkeys((torch.clone, "clone", "contiguous"), OnnxGraph._copy),
    F.pad: OnnxGraph._pad,
    F.interpolate: OnnxGraph._interpolate,
    F.instance_norm: OnnxGraph._instance_norm,
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
