"""The student as a list of ONNX operations, with batch normalisation folded."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from moodistill.onnx_operations import (
    ACTIVATIONS,
    AS_MODULE,
    JOINS,
    MOVES,
    MUTATING,
    NO_OPS,
    REDUCING,
)

INPUT, OUTPUT = "input", "logits"

Shape = tuple[int, ...]


class UnsupportedOperation(Exception):
    """An operation without an ONNX form here; `to_onnx` then falls back to torch."""


@dataclass(frozen=True)
class OnnxOp:
    """One ONNX node; its `tensors` become initializers, appended to `inputs`.

    A kind that starts with `Reversed` has its tensor in front.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    tensors: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


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
        self._constants: dict[fx.Node, Any] = {}
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
        arrays = tuple(_array(tensor) for tensor in tensors if tensor is not None)
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
        if node.op == "get_attr":
            self._constants[node] = operator.attrgetter(target)(student)
            return None
        if node.op not in ("call_function", "call_method"):
            raise unknown
        arguments: list[Any] = [*node.args[1:], *node.kwargs.values()]
        if target in ("size", getattr, operator.getitem):
            return None  # sizes are read where a view uses them; elsewhere they have no value
        if target in JOINS:
            return self._join(node, unknown)
        if target in (torch.cat, torch.concat) and len(arguments) == 1:
            inputs = [self._value(part) for part in node.args[0]]  # type: ignore
            sizes = list(self._shapes[inputs[0]])
            axis = arguments[0] % (len(sizes) + 1)
            if axis:
                sizes[axis - 1] = sum(self._shapes[part][axis - 1] for part in inputs)
                return self._emit("Concat", inputs, node.name, tuple(sizes), axis=axis)
        if target in MOVES and (moved := self._move(target, node)):
            return moved
        if target in ("view", "reshape", torch.reshape):
            x = self._value(node.args[0])
            flat = math.prod(self._shapes[x])
            sizes = list[Any](_pair(arguments[0]) if len(arguments) == 1 else arguments)
            batch = sizes[0] == -1 or (isinstance(sizes[0], fx.Node) and _is_batch(sizes[0]))
            if len(sizes) == 2 and batch and sizes[1] in (-1, flat) and sizes != [-1, -1]:
                return self._module(nn.Flatten(), node.args[0], node.name)
        if target in AS_MODULE and not any(isinstance(a, fx.Node) for a in arguments):
            kind_of, names = AS_MODULE[target]
            settings = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
            if kind_of is nn.Flatten:
                settings.setdefault("start_dim", 0)
            return self._module(kind_of(**settings), node.args[0], node.name)
        raise unknown

    def _join(self, node: fx.Node, unknown: UnsupportedOperation) -> str:
        """An operation of two values, or of a value and a constant."""
        kind = JOINS[node.target]
        if len(node.args) != 2 or node.kwargs:
            raise unknown
        constants = [self._constants.get(a, a) for a in node.args]  # type: ignore[arg-type]
        for place, constant in enumerate(constants):
            if not isinstance(constant, fx.Node):
                x = self._value(node.args[1 - place])
                shape = self._shapes[x]
                tensor = torch.as_tensor(constant, dtype=torch.float32)
                whole = (1, *shape)  # a constant may have a batch axis of one
                if np.broadcast_shapes(whole, tuple(tensor.shape)) != whole:
                    raise unknown
                kind = kind if place == 1 else f"Reversed{kind}"
                value = self._emit(kind, (x,), node.name, shape, tensor)
                return self._mutated(x, value) if node.target in MUTATING else value
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
        value = self._emit(kind, (first, second), node.name, shape)
        return self._mutated(first, value) if node.target in MUTATING else value

    def _move(self, target: Any, node: fx.Node) -> str | None:
        """Permutations, slices, means over both spatial axes and zero padding."""
        arguments: Any = node.args
        x = self._value(arguments[0])
        shape = self._shapes[x]
        name = node.name
        if target in (torch.permute, "permute"):
            order = arguments[1] if isinstance(arguments[1], tuple | list) else arguments[1:]
            axes = [int(a) % (len(shape) + 1) for a in order]
            if axes[0] == 0:
                moved = tuple(shape[a - 1] for a in axes[1:])
                return self._emit("Transpose", (x,), name, moved, perm=axes)
        elif target is torch.narrow and len(arguments) == 4:
            axis, start, length = (int(a) for a in arguments[1:])
            axis %= len(shape) + 1
            if axis:
                cut = (*shape[: axis - 1], length, *shape[axis:])
                bounds = (np.array([v], dtype=np.int64) for v in (start, start + length, axis))
                return self._emit("Slice", (x,), name, cut, *bounds)
        elif target is torch.unflatten and arguments[1] == 1 and len(shape) == 1:
            sizes = list(arguments[2])
            if sizes.count(-1) == 1:
                sizes[sizes.index(-1)] = shape[0] // -math.prod(sizes)
            # 0 keeps the batch axis as it is.
            goal = np.array([0, *sizes], dtype=np.int64)
            return self._emit("Reshape", (x,), name, tuple(sizes), goal)
        elif target in REDUCING:
            settings = {**dict(zip(("dim", "keepdim"), arguments[1:], strict=False)), **node.kwargs}
            dims = settings.get("dim")
            if len(shape) == 3 and isinstance(dims, tuple | list):
                found = sorted(int(d) % 4 for d in dims)
                if found == [2, 3]:
                    pooled = self._emit(REDUCING[target], (x,), name, (shape[0], 1, 1))
                    if settings.get("keepdim", False):
                        return pooled
                    return self._emit("Flatten", (pooled,), name, (shape[0],), axis=1)
        return None

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
        if kind in ACTIVATIONS and (program := ACTIVATIONS[kind](m, len(shape))):
            values = [x]
            for onnx_kind, inputs, tensors, attributes in program:
                operands = [values[i] for i in inputs]
                values.append(self._emit(onnx_kind, operands, name, shape, *tensors, **attributes))
            return values[-1]
        if kind is nn.Flatten and m.start_dim == 1 and m.end_dim in (-1, len(shape)):
            flat = (math.prod(shape),)
            return x if shape == flat else self._emit("Flatten", (x,), name, flat, axis=1)
        if kind is nn.Linear and len(shape) == 1:
            _check_width(name, m.in_features, shape)
            return self._emit("Gemm", (x,), name, (m.out_features,), m.weight, m.bias, transB=1)
        if kind is nn.Linear and len(shape) == 3:
            _check_width(name, m.in_features, shape[::-1])
            wide = (*shape[:-1], m.out_features)
            value = self._emit("MatMul", (x,), name, wide, m.weight.T)
            return value if m.bias is None else self._emit("Add", (value,), name, wide, m.bias)
        if kind is nn.LayerNorm and m.normalized_shape == shape[-1:]:
            weight = torch.ones(shape[-1]) if m.weight is None else m.weight
            return self._emit(
                "LayerNormalization", (x,), name, shape, weight, m.bias, axis=-1,
                epsilon=float(m.eps),
            )  # fmt: skip
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
        if kind in (nn.ZeroPad2d, nn.ConstantPad2d):
            left, right, top, bottom = m.padding
            pads = np.array([0, 0, top, left, 0, 0, bottom, right], dtype=np.int64)
            out = [size[0] + top + bottom, size[1] + left + right]
            fill = float(getattr(m, "value", 0.0))
            return self._emit("Pad", (x,), name, (channels, *out), pads, fill)
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
                return self._emit("ReversedMatMul", (value,), name, (channels, *wanted), rows.T)
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


def _array(tensor: Any) -> np.ndarray:
    """Weights as float32; whole numbers (sizes, axes) are given as arrays and stay as they are."""
    if isinstance(tensor, np.ndarray):
        return tensor
    return torch.as_tensor(tensor, dtype=torch.float32).detach().cpu().contiguous().numpy()


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
