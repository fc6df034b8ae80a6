"""The folder that goes to the device: model, manifest, card, sample and a script to run it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from moodistill.bundle.model import PIXELS, PROBABILITIES, Origin, ShipOptions, colour
from moodistill.bundle.trial import script_text, try_run_script
from moodistill.data.images import ImageData
from moodistill.io.atomic import write_atomic, write_json_atomic
from moodistill.io.records import parse_json
from moodistill.onnx.opset import opset_of
from moodistill.onnx.runtime import outputs
from moodistill.pareto.evaluation import accuracy_interval
from moodistill.pareto.table import FrontRow
from moodistill.storage.folder import MODEL_FILE
from moodistill.version import __version__

MANIFEST, MODEL = "manifest.json", MODEL_FILE
FORMAT = 1


def write_package(
    folder: Path,
    row: FrontRow,
    teacher: FrontRow,
    data: ImageData,
    origin: Origin,
    device: Mapping[str, Any],
    options: ShipOptions | None = None,
) -> None:
    """Complete `folder`, which holds `model.onnx`, into a bundle.

    Its `run.py` is run on some of the data's files first and must give the answers of the search.

    Args:
        folder: written into; `manifest.json` comes last.
        row, teacher: what was measured of the student and of its teacher.
        data: labels, normalisation, the sample image (the first of `validation`).
        origin: task, teacher and genome.
        device: fingerprint of the device that the latency was measured on.
        options: those that `model.onnx` was written with.

    Raises:
        UserError: if `run.py` gives other answers; nothing is written then.
    """
    options = options or ShipOptions()
    model = (folder / MODEL).read_bytes()
    proto = onnx.load_from_string(model)
    first = data.validation.head(1)
    (answer,) = next(iter(outputs(model, data, first, threads=1)))
    sample = io.BytesIO()
    np.save(sample, first.images[0], allow_pickle=False)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "made_by": f"moodistill {__version__}",
        "task": origin.task,
        "student": row.student,
        "stage": row.stage,
        "precision": row.precision,
        "teacher_sha256": origin.teacher_digest,
        "genome": base64.b64encode(origin.genome).decode(),
        "structure": row.summary,
        "opset": opset_of(proto),
        "ir_version": proto.ir_version,
        "input": {
            "name": "input" if options.input == "normalised" else PIXELS,
            "kind": options.input,
            "layout": "NCHW",
            "shape": list(data.input_shape),
            "batch": options.batch,
            "colour": colour(data),
            "preparation": data.preparation.settings() if data.preparation else None,
            "prepared": data.preparation.describe(data.input_shape[0])
            if data.preparation
            else "not known: give images of exactly the input's size, made as for training",
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "output": PROBABILITIES if options.softmax else "logits",
        "labels": list(data.labels),
        "parameters": row.parameters,
        "macs": row.macs,
        "size_bytes": len(model),
        "accuracy": {
            "validation": _accuracy(row.accuracy, len(data.validation)),
            "test": _accuracy(row.test_accuracy, len(data.test)),
            "teacher_validation": _accuracy(teacher.accuracy, len(data.validation)),
            "teacher_test": _accuracy(teacher.test_accuracy, len(data.test)),
        },
        "latency": {
            "median_ms": row.latency_ms,
            "low_ms": row.latency_ms_low,
            "high_ms": row.latency_ms_high,
            "p90_ms": row.latency_ms_p90,
            "timings": row.latency_samples,
            "teacher_ms": row.teacher_latency_ms,
            "device": dict(device),
            "on_devices_ms": dict(row.on_devices),
        },
        "sample": {
            "file": "sample.npy",
            "label": int(first.labels[0]),
            "answer": int(answer.argmax()),
            "expected": [round(float(v), 6) for v in answer],
        },
    }
    files = {"run.py": script_text().encode(), "sample.npy": sample.getvalue()}
    with tempfile.TemporaryDirectory() as place:
        whole = {**files, MODEL: model, MANIFEST: json.dumps(manifest).encode()}
        for name, content in whole.items():
            (Path(place) / name).write_bytes(content)
        manifest["tried"] = try_run_script(Path(place), data, model, manifest["output"])
    files["README.md"] = _card(manifest).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    digests[MODEL] = hashlib.sha256(model).hexdigest()
    write_json_atomic(folder / MANIFEST, {**manifest, "files": dict(sorted(digests.items()))})


def _accuracy(value: float | None, images: int) -> dict[str, Any] | None:
    if value is None:
        return None
    low, high = accuracy_interval(value, images)
    return {"fraction": value, "images": images, "low": low, "high": high}


def _per_cent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['fraction']:.2f}% ({low:.2f}-{high:.2f}, {found['images']:,} images)"


def _card(manifest: Mapping[str, Any]) -> str:
    """The model card, in Markdown."""
    accuracy, latency, entry = manifest["accuracy"], manifest["latency"], manifest["input"]
    device = latency["device"]
    p90 = "" if latency["p90_ms"] is None else f", 90th percentile {latency['p90_ms']:.3f} ms"
    kind = {
        "uint8": "uint8 pixels from 0 to 255; the normalisation is inside the graph",
        "float32": "float32 pixels from 0 to 255; the normalisation is inside the graph",
        "normalised": "float32, (pixels / 255 - mean) / std; nothing is inside the graph",
    }[entry["kind"]]
    tried = ""
    if manifest["tried"]:
        tried = (
            f"Before this folder was written, run.py gave the search's answers to\n"
            f"{manifest['tried']} of the original files. "
        )
    return f"""# {manifest["task"]}, student {manifest["student"]} ({manifest["precision"]})

An image classifier, made smaller from its teacher by {manifest["made_by"]}.
{"Distilled" if manifest["stage"] == "distilled" else "Weights inherited, not distilled"};
structure: {manifest["structure"]}

| | this student | its teacher |
| --- | --- | --- |
| accuracy, validation images | {_per_cent(accuracy["validation"])} | \
{_per_cent(accuracy["teacher_validation"])} |
| accuracy, test images | {_per_cent(accuracy["test"])} | {_per_cent(accuracy["teacher_test"])} |
| latency | {latency["median_ms"]:.3f} ms \
({latency["low_ms"]:.3f}-{latency["high_ms"]:.3f}{p90}) | {latency["teacher_ms"]:.3f} ms |

{manifest["parameters"]:,} parameters, {manifest["macs"]:,} multiply-accumulates,
{manifest["size_bytes"]:,} bytes. Intervals are 95%. Validation images chose the student, the
test images chose nothing. Latency: ONNX Runtime {device["onnxruntime"]}, {device["provider"]},
{device["threads"]} thread(s), batch {device["batch"]}, on {device["cpu"]},
{latency["timings"]} timings beside the teacher. On another device it is another number.

## Use

- Input `{entry["name"]}`: {entry["colour"]}, {entry["layout"]}, ({entry["batch"] or "batch"}, \
{", ".join(map(str, entry["shape"]))}), {kind}.
- Images are prepared: {entry["prepared"]}.
- Output `{manifest["output"]}`: ({entry["batch"] or "batch"}, {len(manifest["labels"])}): \
{", ".join(manifest["labels"])}.
- ONNX opset {manifest["opset"]}, IR version {manifest["ir_version"]}.

`python run.py` classifies the sample image and compares with the expected answer; it needs numpy
and onnxruntime alone. `python run.py IMAGE` prepares and classifies images of yours (with
Pillow). {tried}`manifest.json` holds the SHA-256 of every file; `moodistill verify FOLDER` checks
them.

Limits: it knows the classes above and images like those it was trained on, nothing else.
"""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, whatever it holds; `verify` checks it."""
    return parse_json((folder / MANIFEST).read_bytes(), dict[str, Any])
