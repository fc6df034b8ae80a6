"""The lowest opset and IR version that a file's operations need, so that old runtimes read it.

The writer's nodes mean the same in every opset since the one that `FIRST` names for them, so a file
is given another opset by its stamp alone.
"""

from __future__ import annotations

import math

import onnx
from onnx import helper

from moodistill.errors import UserError

LOWEST, HIGHEST = 11, 21
SMALL = 64  # values of a tensor
# The opset in which an operation got the form that is written here; any other form is refused by
# onnx's checker. What is not listed keeps the opset that it was written in.
FIRST = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Conv", "Gemm", "BatchNormalization",
         "InstanceNormalization", "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Softsign",
         "Softplus", "Elu", "Selu", "HardSigmoid", "Erf", "Clip", "MaxPool", "AveragePool",
         "GlobalAveragePool", "GlobalMaxPool", "Concat", "Flatten", "Reshape", "Slice", "Transpose",
         "Pad", "Identity", "Cast"),
        LOWEST,
    ),
    "Celu": 12,
    "QuantizeLinear": 13,  # a scale for each channel
    "DequantizeLinear": 13,
    "ConvTranspose": LOWEST,
    "DepthToSpace": LOWEST,
    "Resize": 13,  # where regions may be left out
    "Softmax": 13,  # over one axis alone
    "LogSoftmax": 13,
    "HardSwish": 14,
    "LayerNormalization": 17,
}  # fmt: skip


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operator set that a model is written in."""
    versions = [one.version for one in model.opset_import if one.domain in ("", "ai.onnx")]
    return int(versions[0])


def lowest_opset(model: onnx.ModelProto) -> tuple[int, str]:
    """The lowest opset that a model's operations need, and the operation that needs it."""
    written = opset_of(model)
    needed = {node.op_type: FIRST.get(node.op_type, written) for node in model.graph.node}
    kind = max(needed, key=needed.__getitem__)
    for opset in range(min(needed[kind], written), written):
        if _valid(model, opset):
            return opset, kind
    return written, kind


def set_opset(model: onnx.ModelProto, opset: int | None = None) -> None:
    """Stamp a model, in place, with an opset and the lowest IR version that goes with it.

    Args:
        model: changed; its operations stay as they are.
        opset: None for the lowest that the operations need.

    Raises:
        UserError: if they need a higher one, or cannot be had in that one.
    """
    lowest, kind = lowest_opset(model)
    opset = lowest if opset is None else opset
    if opset < lowest:
        raise UserError(
            f"opset is {opset}; the operation {kind} of this student needs {lowest}: give at least "
            "that, or none for the lowest"
        )
    if not _valid(model, opset):
        raise UserError(
            f"opset is {opset}; this student's operations have another form there: give "
            f"{lowest} to {opset_of(model)}"
        )
    _stamp(model, opset)


def check_opset(opset: int | None) -> None:
    """Refuse an opset that nothing is written in.

    Raises:
        UserError: if it is out of range.
    """
    if opset is not None and not LOWEST <= opset <= HIGHEST:
        raise UserError(f"opset is {opset}; expected {LOWEST} to {HIGHEST}")


def _stamp(model: onnx.ModelProto, opset: int) -> None:
    others = [one for one in model.opset_import if one.domain not in ("", "ai.onnx")]
    del model.opset_import[:]
    imports = [helper.make_opsetid("", opset), *others]
    model.opset_import.extend(imports)
    model.ir_version = helper.find_min_ir_version_for(imports, ignore_unknown=True)


def _valid(model: onnx.ModelProto, opset: int) -> bool:
    """Whether onnx's checker takes a model in another opset; weights, which are large, left out."""
    tried = onnx.ModelProto()
    tried.opset_import.extend(model.opset_import)
    graph, light = model.graph, tried.graph
    light.name = graph.name
    for name in ("node", "input", "output", "value_info"):
        getattr(light, name).extend(getattr(graph, name))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) < SMALL:  # sizes and axes, on which shapes depend
            light.initializer.append(tensor)
        else:
            light.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    _stamp(tried, opset)
    try:
        onnx.checker.check_model(tried, full_check=True)
    except Exception:  # the checker and shape inference have their own classes
        return False
    return True
