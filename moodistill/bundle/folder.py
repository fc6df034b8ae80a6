"""The folder that goes to the device: model, manifest, card, sample and a script to run it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from moodistill.bundle.model import PIXELS, Origin, ShipOptions, colour, input_kind, layout
from moodistill.bundle.outputs import VALUES, shipped_outputs
from moodistill.bundle.trial import script_text, try_run_script
from moodistill.data.images import ImageData, Split
from moodistill.data.targets import one_of
from moodistill.io.atomic import write_atomic, write_json_atomic
from moodistill.io.records import parse_json
from moodistill.onnx.opset import opset_of
from moodistill.onnx.runtime import outputs
from moodistill.pareto.evaluation import accuracy_interval
from moodistill.pareto.table import FrontRow
from moodistill.storage.folder import MODEL_FILE
from moodistill.version import __version__

MANIFEST, MODEL = "manifest.json", MODEL_FILE
EXPECTED = "expected.npz"  # the sample's outputs where they are no single vector
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
    found = next(iter(outputs(model, data, first, threads=1)))
    shipped = shipped_outputs(data, options.softmax)
    answer = {one.name: a[0] for one, a in zip(shipped, found.values(), strict=True)}
    sample = io.BytesIO()
    np.save(sample, first.images[0], allow_pickle=False)
    kind = input_kind(data, options)
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
            "name": {"normalised": "input", VALUES: VALUES}.get(kind, PIXELS),
            "kind": kind,
            "pictures": data.pictures,
            "layout": layout(data),
            "shape": list(data.input_shape),
            "batch": options.batch,
            "colour": colour(data),
            "preparation": data.preparation.settings() if data.preparation else None,
            "prepared": data.preparation.describe(data.input_shape[0])
            if data.preparation
            else _unprepared(data),
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "output": shipped[0].name,
        "outputs": [{**one.to_dict(), "shape": list(answer[one.name].shape)} for one in shipped],
        "labels": list(data.labels),
        "metric": data.metric_label,
        "parameters": row.parameters,
        "macs": row.macs,
        "size_bytes": len(model),
        "accuracy": {
            "validation": _accuracy(row.accuracy, data, data.validation),
            "test": _accuracy(row.test_accuracy, data, data.test),
            "teacher_validation": _accuracy(teacher.accuracy, data, data.validation),
            "teacher_test": _accuracy(teacher.test_accuracy, data, data.test),
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
    }
    files = {"run.py": script_text().encode(), "sample.npy": sample.getvalue()}
    manifest["sample"], more = _expected(data, first, answer)
    files |= more
    with tempfile.TemporaryDirectory() as place:
        whole = {**files, MODEL: model, MANIFEST: json.dumps(manifest).encode()}
        for name, content in whole.items():
            (Path(place) / name).write_bytes(content)
        manifest["tried"] = try_run_script(Path(place), data, model, shipped)
    files["README.md"] = _card(manifest).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    digests[MODEL] = hashlib.sha256(model).hexdigest()
    write_json_atomic(folder / MANIFEST, {**manifest, "files": dict(sorted(digests.items()))})


def _unprepared(data: ImageData) -> str:
    if data.pictures:
        return "not known: give images of exactly the input's size, made as for training"
    return "arrays, as the training data were"


def _expected(
    data: ImageData, first: Split, answer: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says of the sample, and a file of its answers where they are no vector."""
    only = data.meaning.only
    made: dict[str, Any] = {
        "file": "sample.npy", "label": None, "answer": None, "expected": None,
        "expected_file": None,
    }  # fmt: skip
    values = next(iter(answer.values()))
    if only is not None and only.kind == "classification":
        made["label"] = int(one_of(first.targets)[0])
        made["answer"] = int(values.argmax())
    if len(answer) == 1 and values.ndim == 1:
        made["expected"] = [round(float(v), 6) for v in values]
        return made, {}
    stored = io.BytesIO()
    np.savez_compressed(stored, **answer)  # type: ignore[arg-type]
    made["expected_file"] = EXPECTED
    return made, {EXPECTED: stored.getvalue()}


def _accuracy(value: float | None, data: ImageData, split: Split) -> dict[str, Any] | None:
    """The metric and, of a fraction of the inputs, its interval."""
    if value is None:
        return None
    found: dict[str, Any] = {"fraction": value, "images": len(split), "low": None, "high": None}
    if data.by_accuracy:
        found["low"], found["high"] = accuracy_interval(value, len(split))
    return found


def _reached(found: Mapping[str, Any] | None, inputs: str) -> str:
    if found is None:
        return "not measured"
    if found["low"] is None:
        return f"{found['fraction']:.4f} ({found['images']:,} {inputs})"
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['fraction']:.2f}% ({low:.2f}-{high:.2f}, {found['images']:,} {inputs})"


def _said(outputs: Sequence[Mapping[str, Any]], batch: int | None) -> str:
    """A line of the card for every output."""
    lines = []
    for one in outputs:
        shape = ", ".join([str(batch or "batch"), *map(str, one["shape"])])
        labels = f": {', '.join(one['labels'])}" if one["labels"] else f" ({one['kind']})"
        lines.append(f"- Output `{one['name']}`: ({shape}){labels}.")
    return "\n".join(lines)


WHAT = {
    "classification": "An image classifier", "segmentation": "A segmentation network",
    "multilabel": "A network that labels", "regression": "A regression network",
}  # fmt: skip


def _card(manifest: Mapping[str, Any]) -> str:
    """The model card, in Markdown."""
    accuracy, latency, entry = manifest["accuracy"], manifest["latency"], manifest["input"]
    device = latency["device"]
    pictures = entry["pictures"]
    inputs = "images" if pictures else "inputs"
    raw = "(pixels / 255 - mean) / std" if pictures else "(values - mean) / std"
    p90 = "" if latency["p90_ms"] is None else f", 90th percentile {latency['p90_ms']:.3f} ms"
    kind = {
        "uint8": "uint8 pixels from 0 to 255; the normalisation is inside the graph",
        "float32": "float32 pixels from 0 to 255; the normalisation is inside the graph",
        "normalised": f"float32, {raw}; nothing is inside the graph",
        VALUES: "float32, as the training data were; mean and std are inside the graph",
    }[entry["kind"]]
    outputs = manifest["outputs"]
    what = WHAT.get(outputs[0]["kind"], "A network") if len(outputs) == 1 else "A network"
    what = what if pictures else what.replace("An image classifier", "A classifier")
    metric = manifest["metric"]
    tried = ""
    if manifest["tried"]:
        tried = (
            f"Before this folder was written, run.py gave the search's answers to\n"
            f"{manifest['tried']} of the original files. "
        )
    yours = (
        "`python run.py IMAGE` prepares and runs images of yours (with Pillow)."
        if pictures
        else "`python run.py FILE.npy` runs arrays of yours."
    )
    return f"""# {manifest["task"]}, student {manifest["student"]} ({manifest["precision"]})

{what}, made smaller from its teacher by {manifest["made_by"]}.
{"Distilled" if manifest["stage"] == "distilled" else "Weights inherited, not distilled"};
structure: {manifest["structure"]}

| | this student | its teacher |
| --- | --- | --- |
| {metric}, validation {inputs} | {_reached(accuracy["validation"], inputs)} | \
{_reached(accuracy["teacher_validation"], inputs)} |
| {metric}, test {inputs} | {_reached(accuracy["test"], inputs)} | \
{_reached(accuracy["teacher_test"], inputs)} |
| latency | {latency["median_ms"]:.3f} ms \
({latency["low_ms"]:.3f}-{latency["high_ms"]:.3f}{p90}) | {latency["teacher_ms"]:.3f} ms |

{manifest["parameters"]:,} parameters, {manifest["macs"]:,} multiply-accumulates,
{manifest["size_bytes"]:,} bytes. Intervals are 95%. Validation {inputs} chose the student, the
test {inputs} chose nothing. Latency: ONNX Runtime {device["onnxruntime"]}, {device["provider"]},
{device["threads"]} thread(s), batch {device["batch"]}, on {device["cpu"]},
{latency["timings"]} timings beside the teacher. On another device it is another number.

## Use

- Input `{entry["name"]}`: {entry["colour"]}, {entry["layout"]}, ({entry["batch"] or "batch"}, \
{", ".join(map(str, entry["shape"]))}), {kind}.
- {inputs.capitalize()} are prepared: {entry["prepared"]}.
{_said(manifest["outputs"], entry["batch"])}
- ONNX opset {manifest["opset"]}, IR version {manifest["ir_version"]}.

`python run.py` runs the sample and compares the answer with the expected one; it needs numpy
and onnxruntime alone. {yours} `python run.py --out FOLDER FILE` writes all
outputs. {tried}`manifest.json` holds the SHA-256 of every file; `moodistill verify FOLDER` checks
them.

Limits: it knows {inputs} like those it was trained on, nothing else.
"""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, whatever it holds; `verify` checks it."""
    return parse_json((folder / MANIFEST).read_bytes(), dict[str, Any])
