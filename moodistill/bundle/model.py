"""The ONNX file as a bundle holds it: preprocessing inside, labels and origin in its metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moodistill.bundle.outputs import VALUES, ShippedOutput, shipped_outputs
from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.onnx.opset import check_opset, opset_of, set_opset
from moodistill.version import __version__

PIXELS = "pixels"
INPUTS = ("uint8", "float32", "normalised")


@dataclass(frozen=True)
class ShipOptions:
    """How a bundle's model takes images and gives its answer.

    Attributes:
        input: `uint8` or `float32` pixels from 0 to 255 with the normalisation inside the graph, or
            `normalised` floats, the bare network. All are `(batch, C, H, W)`.
        softmax: probabilities instead of logits.
        opset: of the file; None for the lowest that the student's operations need.
        batch: images that the file takes at once; None leaves that free. Some converters want a
            number there.
    """

    input: str = "uint8"
    softmax: bool = False
    opset: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no file can be written with."""
        if self.input not in INPUTS:
            raise UserError(f"input is {self.input!r}; expected one of {', '.join(INPUTS)}")
        check_opset(self.opset)
        if self.batch is not None and self.batch < 1:
            raise UserError(f"batch is {self.batch}; expected a whole number of at least 1")


def input_kind(data: ImageData, options: ShipOptions) -> str:
    """How the model takes its input: as `options` say of images; arrays as they are (`values`)."""
    return options.input if data.pictures or options.input == "normalised" else VALUES


@dataclass(frozen=True)
class Normalisation:
    """What a model does to its input first.

    Attributes:
        mean, std: of each channel, of pixels scaled to [0, 1] or of arrays as they are.
        kind: as `input_kind` gives it.
        scale: what pixels are divided by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str
    scale: float = 255.0


def shipped_model(
    model: bytes,
    normalisation: Normalisation,
    outputs: Sequence[ShippedOutput],
    options: ShipOptions,
    properties: Mapping[str, str],
) -> bytes:
    """A bare model (one float input) as a bundle holds it; deterministic.

    Args:
        model: an ONNX file of ours, float or INT8.
        normalisation: what goes in front of it.
        outputs: what each of its outputs is called and whether it ends in a Softmax.
        options: opset and batch.
        properties: written into `metadata_props`.
    """
    made = onnx.load_from_string(model)
    graph = made.graph
    if normalisation.kind != "normalised":
        _prepend_normalisation(graph, normalisation)
    set_opset(made, options.opset)
    for value, output in zip(graph.output, outputs, strict=True):
        _finish_output(graph, value, output, opset_of(made))
    facts = {
        **properties,
        "opset": str(opset_of(made)),
        "ir_version": str(made.ir_version),
    }
    for key, entry in sorted(facts.items()):
        made.metadata_props.add(key=key, value=entry)
    data = made.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data if options.batch is None else fixed_batch(data, options.batch)


def _finish_output(
    graph: onnx.GraphProto, value: onnx.ValueInfoProto, output: ShippedOutput, opset: int
) -> None:
    """Give an output its name, behind a Softmax over the classes if it is to have one."""
    if not output.softmax:
        _rename(graph, value.name, output.name)
        return
    inner = value.name
    if inner == output.name:
        inner = f"{output.name}.logits"
        _rename(graph, value.name, inner)
    if len(value.type.tensor_type.shape.dim) > 2 and opset < 13:
        raise UserError(
            f"opset is {opset}; the softmax of a map needs 13: give that, or leave it out"
        )
    # Over (batch, classes) it is the same in every opset.
    graph.node.append(helper.make_node("Softmax", [inner], [output.name], output.name, axis=1))
    value.name = output.name


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Call a value otherwise wherever it is named."""
    if old == new:
        return
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in graph.output:
        value.name = new if value.name == old else value.name


def _prepend_normalisation(graph: onnx.GraphProto, normalisation: Normalisation) -> None:
    """`pixels * scale + shift`: two operations in place of a division and a subtraction more."""
    entry = graph.input[0]
    bare, axes = entry.name, len(entry.type.tensor_type.shape.dim) - 2
    name = VALUES if normalisation.kind == VALUES else PIXELS
    entry.name = name
    factor = np.asarray(normalisation.std, np.float64)
    offset = np.asarray(normalisation.mean, np.float64)
    if normalisation.kind == VALUES and (factor == 1).all() and (offset == 0).all():
        _read_as(graph, bare, name)
        return
    arrays = {
        f"{name}.scale": 1.0 / (normalisation.scale * factor),
        f"{name}.shift": -offset / factor,
    }
    for key, array in arrays.items():
        values = array.astype(np.float32).reshape(-1, *[1] * axes)
        graph.initializer.append(numpy_helper.from_array(values, key))
    scaled = f"{name}.scaled"
    nodes = [
        helper.make_node("Mul", [name, f"{name}.scale"], [scaled], scaled),
        helper.make_node("Add", [scaled, f"{name}.shift"], [bare], "normalise"),
    ]
    if normalisation.kind == "uint8":
        cast = helper.make_node("Cast", [name], ["pixels.float"], "cast", to=TensorProto.FLOAT)
        nodes[0].input[0] = "pixels.float"
        nodes.insert(0, cast)
        entry.type.tensor_type.elem_type = TensorProto.UINT8
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _read_as(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let all nodes read a value by another name."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def fixed_batch(model: bytes, batch: int) -> bytes:
    """A model that takes `batch` images at once, in place of any number."""
    made = onnx.load_from_string(model)
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].dim_param:
            axes[0].dim_value = batch  # takes the name's place
    data: bytes = made.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data


@dataclass(frozen=True)
class Origin:
    """Where a student comes from, written into its file.

    Attributes:
        task: the problem's name.
        teacher_digest: SHA-256 of the teacher's weights.
        genome: packed canonical genome.
    """

    task: str
    teacher_digest: str
    genome: bytes


def colour(data: ImageData) -> str:
    """The order of the channels that a model takes."""
    channels = data.input_shape[0]
    if channels == 3 and data.pictures:
        return data.preparation.channel_order if data.preparation else "RGB"
    return f"{channels} channel(s)"


def layout(data: ImageData) -> str:
    """The order of the input's axes."""
    return {2: "NCL", 3: "NCHW", 4: "NCDHW"}.get(len(data.input_shape), "N...")


def properties(data: ImageData, origin: Origin, options: ShipOptions) -> dict[str, str]:
    """The `metadata_props` of a bundle's model."""
    kind = input_kind(data, options)
    inside = kind != "normalised"
    outputs = [output.to_dict() for output in shipped_outputs(data, options.softmax)]
    pixels = {"input_colour": colour(data)} if data.pictures else {}
    return {
        "labels": json.dumps(data.labels),
        "outputs": json.dumps(outputs),
        "input_layout": layout(data),
        **pixels,
        "input_range": ("0-255" if data.pictures else VALUES) if inside else "normalised",
        "normalisation": json.dumps(
            {"scale": 1 / data.scale, "mean": data.mean, "std": data.std, "inside_graph": inside}
        ),
        "preparation": json.dumps(data.preparation.settings() if data.preparation else None),
        "task": origin.task,
        "data": data.name,
        "teacher_sha256": origin.teacher_digest,
        "genome": base64.b64encode(origin.genome).decode(),
        "moodistill_version": __version__,
    }


def ship(model: bytes, data: ImageData, origin: Origin, options: ShipOptions) -> bytes:
    """A bare ONNX file with preprocessing and metadata."""
    facts = properties(data, origin, options)
    kind = input_kind(data, options)
    normalisation = Normalisation(data.mean, data.std, kind, data.scale)
    outputs = shipped_outputs(data, options.softmax)
    return shipped_model(model, normalisation, outputs, options, facts)
