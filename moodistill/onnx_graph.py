"""The student as a list of ONNX operations, with batch normalisation folded."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

INPUT, OUTPUT = "input", "logits"
NO_OPS = (nn.Dropout, nn.Dropout2d, nn.Identity)

Shape = tuple[int, ...]


class UnsupportedOperation(Exception):
    """An operation without an ONNX form here; `to_onnx` then falls back to torch."""


@dataclass(frozen=True)
class OnnxOp:
    """One ONNX node; its `tensors` become initializers, appended to `inputs`.

    The kind `RowsMatMul` is a `MatMul` with its tensor in front.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    tensors: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


_JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "Add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "Mul"),
}
_MUTATING = (operator.iadd, operator.imul, "add_", "mul_")
_SIMPLE: dict[type[nn.Module], tuple[str, Callable[[Any], dict[str, float]]]] = {
    nn.ReLU: ("Relu", lambda m: {}),
    nn.LeakyReLU: ("LeakyRelu", lambda m: {"alpha": float(m.negative_slope)}),
    nn.Hardswish: ("HardSwish", lambda m: {}),
    nn.Hardsigmoid: ("HardSigmoid", lambda m: {"alpha": 1 / 6, "beta": 0.5}),
    nn.Sigmoid: ("Sigmoid", lambda m: {}),
    nn.Tanh: ("Tanh", lambda m: {}),
    nn.ELU: ("Elu", lambda m: {"alpha": float(m.alpha)}),
}
_POOL = ("kernel_size", "stride", "padding")
# Functions and methods as the module they stand for, with the order of their arguments.
_AS_MODULE: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), (nn.ReLU, ("inplace",))),
    F.relu6: (nn.ReLU6, ("inplace",)),
    F.silu: (nn.SiLU, ("inplace",)),
    F.hardswish: (nn.Hardswish, ("inplace",)),
    torch.sigmoid: (nn.Sigmoid, ()),
    torch.tanh: (nn.Tanh, ()),
    F.dropout: (nn.Identity, ("p", "training", "inplace")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode")),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    **dict.fromkeys((torch.flatten, "flatten"), (nn.Flatten, ("start_dim", "end_dim"))),
}


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update((node, *node.all_input_nodes))
    return live


class OnnxGraph:
    """The student's operations from `INPUT` to `OUTPUT`, pruned and folded.

    Shapes are of one image, without the batch axis.
    """

    def __init__(self, student: fx.GraphModule, input_shape: Shape) -> None:
        """Translate the student; `UnsupportedOperation` if it holds one that counts."""
        self.ops: list[OnnxOp] = []
        self.input_shape = input_shape
        self._shapes: dict[str, Shape] = {INPUT: input_shape}
        self._values: dict[fx.Node, str] = {}
        live = live_nodes(student.graph)
        result = None
        for node in student.graph.nodes:
            if node.op == "output":
                result = node.args[0]
            elif node.op == "placeholder":
                if self._values:
                    raise UnsupportedOperation("a second input")
                self._values[node] = INPUT
            else:
                try:
                    value = self._visit(student, node)
                    if value is not None:
                        self._values[node] = value
                except UnsupportedOperation:
                    # A method like clamp_ acts on its input even if nobody reads its result.
                    if node in live or str(node.target).endswith("_"):
                        raise
        output = self._value(result)
        if output == INPUT:
            output = self._emit("Identity", [INPUT], "identity", input_shape)
        self.output_shape = self._shapes[output]
        self.ops = _fold(_pruned(self.ops, output))

    def _value(self, argument: Any) -> str:
        if not isinstance(argument, fx.Node) or argument not in self._values:
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self._values[argument]

    def _emit(
        self, kind: str, inputs: Sequence[str], name: str, shape: Shape, *tensors: Any, **attrs: Any
    ) -> str:
        output = f"{name}.{len(self.ops)}"  # the dot keeps it apart from INPUT and OUTPUT
        present = (torch.as_tensor(t, dtype=torch.float32) for t in tensors if t is not None)
        arrays = tuple(tensor.detach().cpu().numpy() for tensor in present)
        self.ops.append(OnnxOp(kind, tuple(inputs), output, arrays, attrs))
        self._shapes[output] = shape
        return output

    def _mutated(self, old: str, new: str) -> str:
        """After an in-place operation whoever reads the old tensor later sees the new one."""
        self._values = {n: new if v == old else v for n, v in self._values.items()}
        return new

    def _visit(self, student: fx.GraphModule, node: fx.Node) -> str | None:
        target: Any = node.target
        unknown = UnsupportedOperation(f"{node.op} {getattr(target, '__name__', target)}")
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise unknown
            return self._module(student.get_submodule(target), node.args[0], node.name)
        if node.op not in ("call_function", "call_method"):
            raise unknown
        arguments = [*node.args[1:], *node.kwargs.values()]
        if target in ("size", getattr, operator.getitem):
            return None  # sizes are read where a view uses them; elsewhere they have no value
        if target in _JOINS:
            if len(node.args) != 2 or node.kwargs:
                raise unknown
            first, second = self._value(node.args[0]), self._value(node.args[1])
            shapes = self._shapes[first], self._shapes[second]
            if len(shapes[0]) != len(shapes[1]):
                raise unknown
            try:
                shape = np.broadcast_shapes(*shapes)
            except ValueError:
                raise ValueError(
                    f"{node.name} joins {shapes[0]} and {shapes[1]} per image; expected shapes "
                    "that broadcast: build the student again with matching widths and sizes"
                ) from None
            value = self._emit(_JOINS[target], (first, second), node.name, shape)
            return self._mutated(first, value) if target in _MUTATING else value
        if target in (torch.cat, torch.concat) and arguments in ([1], [-3]):
            inputs = [self._value(part) for part in node.args[0]]  # type: ignore
            shape = self._shapes[inputs[0]]
            if len(shape) == 3 or arguments == [1]:
                width = sum(self._shapes[part][0] for part in inputs)
                return self._emit("Concat", inputs, node.name, (width, *shape[1:]), axis=1)
        if target in ("view", "reshape", torch.reshape):
            x = self._value(node.args[0])
            flat = math.prod(self._shapes[x])
            sizes = list(_pair(arguments[0]) if len(arguments) == 1 else arguments)
            batch = sizes[0] == -1 or (isinstance(sizes[0], fx.Node) and _is_batch(sizes[0]))
            if len(sizes) == 2 and batch and sizes[1] in (-1, flat) and sizes != [-1, -1]:
                return self._module(nn.Flatten(), node.args[0], node.name)
        if target in _AS_MODULE and not any(isinstance(a, fx.Node) for a in arguments):
            kind_of, names = _AS_MODULE[target]
            settings = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
            if kind_of is nn.Flatten:
                settings.setdefault("start_dim", 0)
            return self._module(kind_of(**settings), node.args[0], node.name)
        raise unknown

    def _module(self, module: Any, argument: Any, name: str) -> str:
        x = self._value(argument)
        value = self._convert(module, x, name)
        return self._mutated(x, value) if getattr(module, "inplace", False) else value

    def _convert(self, m: Any, x: str, name: str) -> str:
        """Value of module `m` applied to the value `x`."""
        kind, shape = type(m), self._shapes[x]
        if kind in NO_OPS:
            return x
        if kind is nn.ReLU and any(op.output == x and op.kind == "Relu" for op in self.ops):
            return x
        if kind in _SIMPLE:
            onnx_kind, attributes = _SIMPLE[kind]
            return self._emit(onnx_kind, (x,), name, shape, **attributes(m))
        if kind is nn.ReLU6:
            return self._emit("Clip", (x,), name, shape, 0.0, 6.0)
        if kind is nn.SiLU:
            gate = self._emit("Sigmoid", (x,), name, shape)
            return self._emit("Mul", (x, gate), name, shape)
        if kind is nn.GELU and m.approximate == "none":  # the form that ONNX Runtime fuses
            value = self._emit("Div", (x,), name, shape, math.sqrt(2))
            value = self._emit("Erf", (value,), name, shape)
            value = self._emit("Add", (value,), name, shape, 1.0)
            value = self._emit("Mul", (x, value), name, shape)
            return self._emit("Mul", (value,), name, shape, 0.5)
        if kind is nn.Flatten and m.start_dim == 1 and m.end_dim in (-1, len(shape)):
            flat = (math.prod(shape),)
            return x if shape == flat else self._emit("Flatten", (x,), name, flat, axis=1)
        if kind is nn.Linear and len(shape) == 1:
            _check_width(name, m.in_features, shape)
            return self._emit("Gemm", (x,), name, (m.out_features,), m.weight, m.bias, transB=1)
        if kind in (nn.BatchNorm2d, nn.BatchNorm1d) and m.running_mean is not None:
            _check_width(name, m.num_features, shape)
            affine = m.weight, m.bias
            if m.weight is None:
                affine = torch.ones(m.num_features), torch.zeros(m.num_features)
            tensors = *affine, m.running_mean, m.running_var
            epsilon = float(m.eps)
            return self._emit("BatchNormalization", (x,), name, shape, *tensors, epsilon=epsilon)
        if len(shape) == 3 and (spatial := self._convert_spatial(m, x, name)):
            return spatial
        raise UnsupportedOperation(f"{kind.__name__} on {len(shape) + 1}-D input with {m}")

    def _convert_spatial(self, m: Any, x: str, name: str) -> str | None:
        """Value of a convolution or pooling module, or None if `m` is neither."""
        kind, (channels, *size) = type(m), self._shapes[x]
        if kind is nn.Conv2d and m.padding_mode == "zeros":
            _check_width(name, m.in_channels, self._shapes[x])
            out, window = _window(m, size)
            shape, window["group"] = (m.out_channels, *out), m.groups
            return self._emit("Conv", (x,), name, shape, m.weight, m.bias, **window)
        if kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
            goal = _pair(m.output_size)
            wanted = [s if w is None else w for s, w in zip(size, goal, strict=True)]
            if wanted == size:
                return x
            if wanted == [1, 1] and not getattr(m, "return_indices", False):
                pool = "Average" if kind is nn.AdaptiveAvgPool2d else "Max"
                return self._emit(f"Global{pool}Pool", (x,), name, (channels, 1, 1))
            if kind is nn.AdaptiveAvgPool2d:  # rows and columns are weighted sums of the input's
                rows = F.adaptive_avg_pool1d(torch.eye(size[0]), wanted[0])
                columns = F.adaptive_avg_pool1d(torch.eye(size[1]), wanted[1])
                value = self._emit("MatMul", (x,), name, (channels, size[0], wanted[1]), columns)
                return self._emit("RowsMatMul", (value,), name, (channels, *wanted), rows.T)
        if kind is nn.MaxPool2d and not m.return_indices:
            out, window = _window(m, size)
            return self._emit("MaxPool", (x,), name, (channels, *out), **window)
        if kind is nn.AvgPool2d and m.divisor_override is None:
            out, window = _window(m, size)
            del window["dilations"]  # the older operator sets have none here
            counted = bool(m.count_include_pad) and any(_pair(m.padding))
            window["count_include_pad"] = int(counted)
            # ONNX cannot count torch's padding without that of ceil_mode.
            if not counted or window["pads"][:2] == window["pads"][2:]:
                return self._emit("AveragePool", (x,), name, (channels, *out), **window)
        return None


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # type: ignore


def _check_width(name: str, expected: int, shape: Shape) -> None:
    if shape[0] != expected:
        raise ValueError(
            f"{name} expects {expected} channels or features but its input is {shape} "
            "per image; build the student again with matching widths"
        )


def _is_batch(node: fx.Node) -> bool:
    """Whether the node is `x.size(0)`, `x.size()[0]` or `x.shape[0]`."""
    if node.target == "size":
        return bool(node.args[1:] == (0,))
    whole = node.args[0]
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(whole, fx.Node):
        return False
    return whole.args[1:] == {"size": (), getattr: ("shape",)}.get(whole.target)  # type: ignore


def _window(m: Any, size: list[int]) -> tuple[list[int], dict[str, Any]]:
    """Output height and width of a convolution or pooling module, and its ONNX attributes.

    ONNX and torch round differently in ceil mode, so the window that hangs over the edge is
    written as padding at the end.
    """
    kernel, stride, dilation = map(_pair, (m.kernel_size, m.stride, getattr(m, "dilation", 1)))
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


def _pruned(ops: list[OnnxOp], result: str) -> list[OnnxOp]:
    """The operations that the result needs; it comes last, as `OUTPUT`."""
    needed, kept = {result}, []
    for op in reversed(ops):
        if op.output in needed:
            needed.update(op.inputs)
            kept.append(op)
    kept[0] = replace(kept[0], output=OUTPUT)
    return kept[::-1]


def _fold(ops: list[OnnxOp]) -> list[OnnxOp]:
    """Batch normalisation folded into the convolution or linear layer it alone reads."""
    users = Counter(name for op in ops for name in op.inputs)
    kept: dict[str, OnnxOp] = {}
    for op in ops:
        layer = kept.get(op.inputs[0]) if op.kind == "BatchNormalization" else None
        if layer and layer.kind in ("Conv", "Gemm") and users[layer.output] == 1:
            del kept[layer.output]
            scale, shift, mean, variance = (t.astype(np.float64) for t in op.tensors)
            factor = scale / np.sqrt(variance + op.attributes["epsilon"])
            weight, *bias = layer.tensors
            shift = shift + ((bias[0] if bias else 0.0) - mean) * factor
            weight = weight * factor.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
            tensors = (weight, shift.astype(np.float32))
            op = replace(layer, output=op.output, tensors=tensors)
        kept[op.output] = op
    return list(kept.values())
