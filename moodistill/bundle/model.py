"""The ONNX file as a bundle holds it: preprocessing inside, labels and origin in its metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.onnx.opset import check_opset, opset_of, set_opset
from moodistill.version import __version__

PIXELS, PROBABILITIES = "pixels", "probabilities"
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


def shipped_model(
    model: bytes,
    mean: Sequence[float],
    std: Sequence[float],
    options: ShipOptions,
    properties: Mapping[str, str],
) -> bytes:
    """A bare model (one float input, logits) as a bundle holds it; deterministic.

    Args:
        model: an ONNX file of ours, float or INT8.
        mean, std: of each channel of images scaled to [0, 1].
        options: what the graph takes and gives.
        properties: written into `metadata_props`.
    """
    made = onnx.load_from_string(model)
    graph = made.graph
    if options.input != "normalised":
        _prepend_normalisation(graph, mean, std, options.input)
    set_opset(made, options.opset)
    if options.softmax:  # over (batch, classes) it is the same in every opset
        logits = graph.output[0]
        graph.node.append(
            helper.make_node("Softmax", [logits.name], [PROBABILITIES], PROBABILITIES, axis=1)
        )
        logits.name = PROBABILITIES
    facts = {
        **properties,
        "opset": str(opset_of(made)),
        "ir_version": str(made.ir_version),
    }
    for key, value in sorted(facts.items()):
        made.metadata_props.add(key=key, value=value)
    data = made.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data if options.batch is None else fixed_batch(data, options.batch)


def _prepend_normalisation(
    graph: onnx.GraphProto, mean: Sequence[float], std: Sequence[float], kind: str
) -> None:
    """`pixels * scale + shift`: two operations in place of a division and a subtraction more."""
    entry = graph.input[0]
    bare = entry.name
    factor, offset = np.asarray(std, np.float64), np.asarray(mean, np.float64)
    arrays = {
        "pixels.scale": 1.0 / (255.0 * factor),
        "pixels.shift": -offset / factor,
    }
    for name, array in arrays.items():
        values = array.astype(np.float32).reshape(-1, 1, 1)
        graph.initializer.append(numpy_helper.from_array(values, name))
    nodes = [
        helper.make_node("Mul", [PIXELS, "pixels.scale"], ["pixels.scaled"], "pixels.scaled"),
        helper.make_node("Add", ["pixels.scaled", "pixels.shift"], [bare], "normalise"),
    ]
    if kind == "uint8":
        cast = helper.make_node("Cast", [PIXELS], ["pixels.float"], "cast", to=TensorProto.FLOAT)
        nodes[0].input[0] = "pixels.float"
        nodes.insert(0, cast)
        entry.type.tensor_type.elem_type = TensorProto.UINT8
    entry.name = PIXELS
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


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
    if channels == 3:
        return data.preparation.channel_order if data.preparation else "RGB"
    return f"{channels} channel(s)"


def properties(data: ImageData, origin: Origin, options: ShipOptions) -> dict[str, str]:
    """The `metadata_props` of a bundle's model."""
    inside = options.input != "normalised"
    return {
        "labels": json.dumps(data.labels),
        "input_layout": "NCHW",
        "input_colour": colour(data),
        "input_range": "0-255" if inside else "normalised",
        "normalisation": json.dumps(
            {"scale": 1 / 255, "mean": data.mean, "std": data.std, "inside_graph": inside}
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
    return shipped_model(model, data.mean, data.std, options, facts)
