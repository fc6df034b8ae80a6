"""ONNX files of students, written straight from the fx graph in milliseconds.

Batch normalisation is folded here, and the same student gives the same bytes twice. A student
with an operation this writer does not know goes through `torch.onnx.export` instead.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from moodistill.errors import UserError

IR_VERSION = 8
OPSETS = range(14, 22)  # HardSwish came with 14; newer sets than 21 want a newer IR version
SMALLEST_WEIGHT = 1.2e-38  # below the smallest normal float32, where CPUs slow down
INPUT, OUTPUT = "input", "logits"

Shape = tuple[int, ...]


class UnsupportedOperation(Exception):
    """An operation this writer cannot express; `to_onnx` then falls back to torch."""


@dataclass(frozen=True)
class _Op:
    """One ONNX node; its `tensors` become initializers, appended to `inputs`."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    tensors: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


_TENSOR_NAMES = {
    "BatchNormalization": ("scale", "bias", "mean", "variance"),
    "Clip": ("min", "max"),
}
_DROPPED = (nn.Dropout, nn.Dropout2d, nn.Identity)
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
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
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    "relu": (nn.ReLU, ()),
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
    torch.flatten: (nn.Flatten, ("start_dim", "end_dim")),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
}


def to_onnx(student: fx.GraphModule, input_shape: tuple[int, int, int], opset: int = 17) -> bytes:
    """The student's inference graph as an ONNX file; the student is left as it is.

    Args:
        student: the traced network; batch normalisation counts as in eval mode.
        input_shape: `(C, H, W)` of one image; the batch stays free.
        opset: version of the ONNX operator set.

    Raises:
        UserError: if neither this writer nor torch's exporter can express the student.
    """
    if opset not in OPSETS:
        raise UserError(
            f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}: give one of these"
        )
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UserError(f"input_shape is {input_shape}; give three positive sizes (C, H, W)")
    try:
        graph = _Graph(student, tuple(input_shape))
    except UnsupportedOperation as reason:
        return _finish(_export_with_torch(student, input_shape, opset, str(reason)))
    return _finish(graph.to_model(opset))


def structure_hash(student: fx.GraphModule) -> str:
    """Hex SHA-256 of operations, attributes, wiring and tensor shapes; no weights, no names."""
    live = _live(student.graph)
    numbers: dict[fx.Node, int] = {}
    lines: list[Any] = []

    def describe(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, (list, tuple)):
            return [describe(v) for v in value]
        if isinstance(value, dict):
            return {k: describe(v) for k, v in sorted(value.items()) if k != "inplace"}
        return repr(value)

    for node in student.graph.nodes:
        if node not in live:
            continue
        what: Any = node.target
        if node.op == "call_module":
            module = student.get_submodule(str(node.target))
            if type(module) in _DROPPED:
                numbers[node] = numbers[node.all_input_nodes[0]]
                continue
            what = [_describe_module(part) for part in module.modules()]
        elif node.op == "call_function":
            what = f"{getattr(what, '__module__', '')}.{getattr(what, '__name__', what)}"
        elif node.op == "get_attr":
            what = list(getattr(operator.attrgetter(str(what))(student), "shape", ()))
        elif node.op != "call_method":
            what = ""
        lines.append([node.op, what, describe(node.args), describe(node.kwargs)])
        numbers[node] = len(lines)
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _describe_module(module: nn.Module) -> list[Any]:
    # Only torch's own modules list their settings; of others every plain attribute counts.
    own = type(module).__module__.startswith("torch.nn.")
    names = getattr(module, "__constants__", []) if own else vars(module)
    plain = (bool, int, float, str, tuple, list)
    settings = {
        name: repr(getattr(module, name, None))
        for name in names
        if name not in ("inplace", "training") and not name.startswith("_")
        if own or isinstance(getattr(module, name, None), plain)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = {name: list(tensor.shape) for name, tensor in tensors}
    return [f"{type(module).__module__}.{type(module).__qualname__}", settings, shapes]


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update((node, *node.all_input_nodes))
    return live


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # type: ignore


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


class _Graph:
    """The student as a list of ONNX operations, pruned and folded."""

    def __init__(self, student: fx.GraphModule, input_shape: Shape) -> None:
        self.ops: list[_Op] = []
        self.shapes: dict[str, Shape] = {INPUT: input_shape}  # of one image: no batch axis
        self._values: dict[fx.Node, str] = {}
        self._rectified: set[str] = set()
        live = _live(student.graph)
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
                except UnsupportedOperation:
                    # A method like clamp_ acts on its input even if nobody reads its result.
                    if node in live or str(node.target).endswith("_"):
                        raise
                    continue
                if value is not None:
                    self._values[node] = value
        self._finish_ops(self._value(result))

    def _value(self, argument: Any) -> str:
        if not isinstance(argument, fx.Node) or argument not in self._values:
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self._values[argument]

    def _emit(
        self, kind: str, inputs: Sequence[str], name: str, shape: Shape, *tensors: Any, **attrs: Any
    ) -> str:
        output = f"{name}.{len(self.ops)}"  # the dot keeps it apart from INPUT and OUTPUT
        arrays = tuple(np.asarray(tensor, np.float32) for tensor in tensors)
        self.ops.append(_Op(kind, tuple(inputs), output, arrays, attrs))
        self.shapes[output] = shape
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
        if target in _ADD or target in _MULTIPLY:
            if len(node.args) != 2 or node.kwargs:
                raise unknown
            first, second = self._value(node.args[0]), self._value(node.args[1])
            shapes = self.shapes[first], self.shapes[second]
            if len(shapes[0]) != len(shapes[1]):
                raise unknown
            kind = "Add" if target in _ADD else "Mul"
            try:
                shape = np.broadcast_shapes(*shapes)
            except ValueError:
                raise ValueError(
                    f"{node.name} joins {shapes[0]} and {shapes[1]} per image; expected shapes "
                    "that broadcast: build the student again with matching widths and sizes"
                ) from None
            value = self._emit(kind, (first, second), node.name, shape)
            return self._mutated(first, value) if target in _MUTATING else value
        if target in (torch.cat, torch.concat) and arguments in ([1], [-3]):
            inputs = [self._value(part) for part in node.args[0]]  # type: ignore
            shape = self.shapes[inputs[0]]
            if len(shape) == 3 or arguments == [1]:
                width = sum(self.shapes[part][0] for part in inputs)
                return self._emit("Concat", inputs, node.name, (width, *shape[1:]), axis=1)
        if target in ("view", "reshape", torch.reshape):
            x = self._value(node.args[0])
            flat = math.prod(self.shapes[x])
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
        kind, shape = type(m), self.shapes[x]
        if kind in _DROPPED:
            return x
        if kind is nn.ReLU and x in self._rectified:
            return x
        if kind in _SIMPLE:
            onnx_kind, attributes = _SIMPLE[kind]
            value = self._emit(onnx_kind, (x,), name, shape, **attributes(m))
            if kind is nn.ReLU:
                self._rectified.add(value)
            return value
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
            tensors = [_array(t) for t in (m.weight, m.bias) if t is not None]
            return self._emit("Gemm", (x,), name, (m.out_features,), *tensors, transB=1)
        if kind in (nn.BatchNorm2d, nn.BatchNorm1d) and m.running_mean is not None:
            _check_width(name, m.num_features, shape)
            affine = m.weight is not None
            scale = _array(m.weight) if affine else np.ones(m.num_features)
            bias = _array(m.bias) if affine else np.zeros(m.num_features)
            stored = scale, bias, _array(m.running_mean), _array(m.running_var)
            return self._emit(
                "BatchNormalization", (x,), name, shape, *stored, epsilon=float(m.eps)
            )
        if len(shape) == 3:
            windowed = self._windowed(m, x, name)
            if windowed is not None:
                return windowed
        raise UnsupportedOperation(f"{kind.__name__} on {len(shape) + 1}-D input with {m}")

    def _windowed(self, m: Any, x: str, name: str) -> str | None:
        """Value of a convolution or pooling module, or None if `m` is neither."""
        kind, (channels, *size) = type(m), self.shapes[x]
        if kind is nn.Conv2d and m.padding_mode == "zeros":
            _check_width(name, m.in_channels, self.shapes[x])
            ends = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            if isinstance(m.padding, str):
                same = m.padding == "same"
                pads = [e // 2 * same for e in ends] + [(e - e // 2) * same for e in ends]
            else:
                pads = [*m.padding, *m.padding]
            out = [
                (size[i] + pads[i] + pads[i + 2] - ends[i] - 1) // m.stride[i] + 1 for i in (0, 1)
            ]
            return self._emit(
                "Conv",
                (x,),
                name,
                (m.out_channels, *out),
                *[_array(t) for t in (m.weight, m.bias) if t is not None],
                kernel_shape=list(m.kernel_size),
                strides=list(m.stride),
                pads=pads,
                dilations=list(m.dilation),
                group=m.groups,
            )
        if kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
            wanted = [
                s if w is None else w for w, s in zip(_pair(m.output_size), size, strict=True)
            ]
            if wanted == size:
                return x
            if wanted == [1, 1] and not getattr(m, "return_indices", False):
                pool = "Average" if kind is nn.AdaptiveAvgPool2d else "Max"
                return self._emit(f"Global{pool}Pool", (x,), name, (channels, 1, 1))
            if kind is nn.AdaptiveAvgPool2d:  # rows and columns are weighted sums of the input's
                rows, columns = (_averages(s, w) for s, w in zip(size, wanted, strict=True))
                value = self._emit("MatMul", (x,), name, (channels, size[0], wanted[1]), columns.T)
                return self._emit("RowsMatMul", (value,), name, (channels, *wanted), rows)
        if kind is nn.MaxPool2d and not m.return_indices:
            out, window = _pooling(m, size, _pair(m.dilation))
            window["dilations"] = list(_pair(m.dilation))
            return self._emit("MaxPool", (x,), name, (channels, *out), **window)
        if kind is nn.AvgPool2d and m.divisor_override is None:
            out, window = _pooling(m, size, (1, 1))
            longer = window["pads"][2:] != window["pads"][:2]
            padded = m.count_include_pad and any(_pair(m.padding))
            if not (padded and longer):  # ONNX cannot count torch's padding without ceil_mode's
                counted = int(padded)
                return self._emit(
                    "AveragePool", (x,), name, (channels, *out), count_include_pad=counted, **window
                )
        return None

    def _finish_ops(self, result: str) -> None:
        """Prune, fold the batch normalisation and give the result its name."""
        if result == INPUT:
            result = self._emit("Identity", (INPUT,), "identity", self.shapes[INPUT])
        live, kept = {result}, []
        for op in reversed(self.ops):
            if op.output in live:
                live.update(op.inputs)
                kept.append(op)
        self.output_shape = self.shapes[result]
        self.ops = [_renamed(op, result) for op in _fold(kept[::-1])]

    def to_model(self, opset: int) -> onnx.ModelProto:
        """The operations as an ONNX model."""
        nodes, tensors = [], []
        for op in self.ops:
            names = _TENSOR_NAMES.get(op.kind, ("weight", "bias"))
            added = [f"{op.output}.{name}" for name in names[: len(op.tensors)]]
            inputs = [*op.inputs, *added]
            if op.kind == "RowsMatMul":
                inputs.reverse()
            kind = op.kind.removeprefix("Rows")
            tensors += [
                numpy_helper.from_array(a, n) for a, n in zip(op.tensors, added, strict=True)
            ]
            nodes.append(helper.make_node(kind, inputs, [op.output], **op.attributes))
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
            for name, shape in ((INPUT, self.shapes[INPUT]), (OUTPUT, self.output_shape))
        ]
        graph = helper.make_graph(nodes, "student", ends[:1], ends[1:], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


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
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    whole = node.args[0]
    if not isinstance(whole, fx.Node):
        return False
    if whole.target == "size":
        return len(whole.args) == 1
    return whole.target is getattr and bool(whole.args[1] == "shape")


def _averages(size: int, wanted: int) -> np.ndarray:
    """Adaptive average pooling of one axis as a `(wanted, size)` matrix."""
    matrix = np.zeros((wanted, size), np.float32)
    for i in range(wanted):
        start, stop = i * size // wanted, -(-(i + 1) * size // wanted)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def _pooling(m: Any, size: list[int], dilation: Shape) -> tuple[list[int], dict[str, list[int]]]:
    """Output height and width of a pooling module, and its window as ONNX attributes.

    ONNX and torch round differently in ceil mode, so the window that hangs over the edge is
    written as padding at the end.
    """
    kernel, stride, padding = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)
    out, ends = [], []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        span = d * (k - 1) + 1
        count = (n + 2 * p - span + (s - 1 if m.ceil_mode else 0)) // s + 1
        if m.ceil_mode and (count - 1) * s >= n + p:
            count -= 1  # a window may not start in the padding
        out.append(count)
        ends.append(max(p, (count - 1) * s + span - n - p))
    window = {"kernel_shape": kernel, "strides": stride, "pads": (*padding, *ends)}
    return out, {key: [int(v) for v in values] for key, values in window.items()}


def _renamed(op: _Op, result: str) -> _Op:
    inputs = tuple(OUTPUT if name == result else name for name in op.inputs)
    return replace(op, inputs=inputs, output=OUTPUT if op.output == result else op.output)


def _fold(ops: list[_Op]) -> list[_Op]:
    """Batch normalisation folded into the convolution or linear layer it alone reads."""
    users = Counter(name for op in ops for name in op.inputs)
    users[ops[-1].output] += 1  # the result: only the last can be it, the rest being pruned
    where: dict[str, int] = {}
    kept: list[_Op] = []
    for op in ops:
        at = where.get(op.inputs[0]) if op.kind == "BatchNormalization" else None
        if at is not None and kept[at].kind in ("Conv", "Gemm") and users[op.inputs[0]] == 1:
            scale, shift, mean, variance = (t.astype(np.float64) for t in op.tensors)
            factor = scale / np.sqrt(variance + op.attributes["epsilon"])
            weight, *bias = kept[at].tensors
            shift = shift + ((bias[0] if bias else 0.0) - mean) * factor
            weight = weight * factor.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
            tensors = (weight, shift.astype(np.float32))
            kept[at] = replace(kept[at], output=op.output, tensors=tensors)
        else:
            at = len(kept)
            kept.append(op)
        where[op.output] = at
    return kept


def _export_with_torch(
    student: fx.GraphModule, input_shape: Shape, opset: int, reason: str
) -> onnx.ModelProto:
    """torch's own export, freed of everything that tells where it was made."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                copy.deepcopy(student).cpu().eval(),
                (torch.zeros(2, *input_shape),),
                buffer,  # type: ignore[arg-type]
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # the exporter raises whatever its graph passes raise
        raise UserError(
            f"the student holds {reason}, which cannot be written as ONNX "
            f"({' '.join(str(error).split())[:200]}); replace that operation in the teacher"
        ) from error
    model = onnx.load_from_string(buffer.getvalue())
    for name in ("doc_string", "metadata_props", "domain", "producer_version", "model_version"):
        model.ClearField(name)
    for graph in _graphs(model.graph):
        graph.ClearField("doc_string")
        for node in graph.node:
            for name in ("doc_string", "metadata_props", "name"):
                node.ClearField(name)
            # The exporter calls its values /layer/Op_output_0: they look like absolute paths.
            node.input[:] = [name.lstrip("/") for name in node.input]
            node.output[:] = [name.lstrip("/") for name in node.output]
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.ClearField("doc_string")
            value.name = value.name.lstrip("/")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for part in _graphs(graph):
        yield from part.initializer
        for attribute in (a for node in part.node for a in node.attribute):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def _denormals(tensor: onnx.TensorProto) -> tuple[np.ndarray, np.ndarray]:
    values = numpy_helper.to_array(tensor)
    return values, (np.abs(values) < SMALLEST_WEIGHT) & (values != 0)


def _finish(model: onnx.ModelProto) -> bytes:
    """The checked file, without denormal weights."""
    floats = [t for t in _tensors(model.graph) if t.data_type == TensorProto.FLOAT]
    for tensor in floats:
        values, tiny = _denormals(tensor)
        if tiny.any():
            clean = np.where(tiny, np.float32(0), values)
            tensor.CopyFrom(numpy_helper.from_array(clean, tensor.name))
    assert not any(_denormals(t)[1].any() for t in floats), "denormal weights left in the model"
    model.ir_version, model.producer_name = IR_VERSION, "moodistill"
    data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data
