"""ONNX files of students, written straight from the fx graph in milliseconds.

Batch normalisation is folded, and the same student gives the same bytes twice. A student
with an operation this writer does not know goes through `torch.onnx.export` instead.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import operator
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.heads.outputs import outputs_of
from moodistill.onnx.graph import OnnxGraph, live_nodes
from moodistill.onnx.modules import NO_OPS
from moodistill.onnx.ops import INPUT, Shape, UnsupportedOperation
from moodistill.onnx.opset import FIRST, HIGHEST, LOWEST

OPSETS = range(LOWEST, HIGHEST + 1)
SMALLEST_WEIGHT = 1.2e-38  # below the smallest normal float32, where CPUs slow down
_TENSOR_NAMES = {
    "BatchNormalization": ("scale", "bias", "mean", "variance"),
    "Clip": ("min", "max"),
    "LayerNormalization": ("scale", "bias"),
    "InstanceNormalization": ("scale", "bias"),
    "Slice": ("starts", "ends", "axes"),
    "Reshape": ("shape",),
    "Pad": ("pads", "value"),
    "Resize": ("scales",),
    "PRelu": ("slope",),
}


def to_onnx(student: fx.GraphModule, input_shape: tuple[int, ...], opset: int = 17) -> bytes:
    """The student's inference graph as an ONNX file; the student is left as it is.

    Args:
        student: the traced network; batch normalisation counts as in eval mode.
        input_shape: `(C, H, W)` of one image, `(C, L)` of a signal; the batch stays free.
        opset: version of the ONNX operator set.

    Raises:
        UserError: if neither this writer nor torch's exporter can express the student.
    """
    if opset not in OPSETS:
        raise UserError(
            f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}: give one of these"
        )
    if not 2 <= len(input_shape) <= 4 or min(input_shape) < 1:
        raise UserError(
            f"input_shape is {input_shape}; give positive sizes: (C, H, W) of images, (C, L) of "
            "signals"
        )
    try:
        model = _to_model(OnnxGraph(student, tuple(input_shape)), opset)
    except UnsupportedOperation as reason:
        model = _export_with_torch(student, input_shape, opset, str(reason))
    return _finish(model)


def structure_hash(student: fx.GraphModule) -> str:
    """Hex SHA-256 of operations, attributes, wiring and tensor shapes; no weights, no names."""
    live = live_nodes(student.graph)
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
            if type(module) in NO_OPS:
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


def _to_model(graph: OnnxGraph, opset: int) -> onnx.ModelProto:
    nodes, tensors = [], []
    for op in graph.ops:
        if opset < FIRST.get(op.kind, 0):
            raise UnsupportedOperation(f"{op.kind} in opset {opset}")
        names = _TENSOR_NAMES.get(op.kind, ("weight", "bias"))
        added = [f"{op.output}.{name}" for name in names[: len(op.tensors)]]
        inputs = [*added, *op.inputs] if op.front else [*op.inputs, *added]
        tensors += [numpy_helper.from_array(a, n) for a, n in zip(op.tensors, added, strict=True)]
        nodes.append(helper.make_node(op.kind, inputs, [op.output], **op.attributes))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in ((INPUT, graph.input_shape), *graph.outputs.items())
    ]
    student = helper.make_graph(nodes, "student", ends[:1], ends[1:], tensors)
    return helper.make_model(student, opset_imports=[helper.make_opsetid("", opset)])


class _Listed(nn.Module):
    """A network whose outputs come in a tuple, for torch's exporter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(outputs_of(self.network(x)).values())


def _export_with_torch(
    student: fx.GraphModule, input_shape: Shape, opset: int, reason: str
) -> onnx.ModelProto:
    """torch's own export, freed of everything that tells where it was made."""
    buffer = io.BytesIO()
    names = list(outputs_of(next(iter(reversed(student.graph.nodes))).args[0]))
    try:
        # It would print the whole of a graph that it cannot export, whatever its `verbose` is.
        silent = mock.patch.object(torch._C, "_jit_onnx_log", lambda *_: None, create=True)
        with warnings.catch_warnings(), _without_fast_attention(), silent:
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Listed(copy.deepcopy(student).cpu().eval()),
                (torch.zeros(2, *input_shape),),
                buffer,  # type: ignore[arg-type]
                input_names=[INPUT],
                output_names=names,
                dynamic_axes={name: {0: "batch"} for name in (INPUT, *names)},
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # the exporter raises whatever its graph passes raise
        raise UserError(
            f"the student holds {' '.join(reason.split())[:200]}, which cannot be written as ONNX "
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


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """torch's attention by its single operations: ONNX has none for the fused one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _graphs(
    graph: onnx.GraphProto | onnx.FunctionProto,
) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph and those inside its nodes."""
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graphs(inner)


def model_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model stores: in attributes, inner graphs, functions, sparse ones too."""
    for part in (p for whole in (model.graph, *model.functions) for p in _graphs(whole)):
        sparse: list[onnx.SparseTensorProto] = []
        if isinstance(part, onnx.GraphProto):
            yield from part.initializer
            sparse += part.sparse_initializer
        for attribute in (a for node in part.node for a in node.attribute):
            yield from attribute.tensors
            sparse += attribute.sparse_tensors
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
        for one in sparse:
            yield from (one.values, one.indices)


def _denormals(tensor: onnx.TensorProto) -> tuple[np.ndarray, np.ndarray]:
    values = numpy_helper.to_array(tensor)
    return values, (np.abs(values) < SMALLEST_WEIGHT) & (values != 0)


def _finish(model: onnx.ModelProto) -> bytes:
    """The checked file, without denormal weights."""
    floats = [t for t in model_tensors(model) if t.data_type == TensorProto.FLOAT]
    for tensor in floats:
        values, tiny = _denormals(tensor)
        if tiny.any():
            clean = np.where(tiny, np.float32(0), values)
            tensor.CopyFrom(numpy_helper.from_array(clean, tensor.name))
    assert not any(_denormals(t)[1].any() for t in floats), "denormal weights left in the model"
    model.producer_name = "moodistill"
    model.ir_version = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data
