"""`report.html`: the front to look at and choose from, one file that opens offline."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.layout_file import read_layout
from moodistill.genome.resolve import resolve
from moodistill.genome.structure import alive_in, thinned
from moodistill.io.atomic import write_atomic
from moodistill.pareto.table import SUFFIX, FrontRow
from moodistill.storage.folder import read_run
from moodistill.storage.store import Store

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
ON, OFF, DEAD = 1, 0, -1  # a block connection: kept, cut, or one of its blocks is gone


def write_report(
    folder: Path, store: Store, rows: Sequence[FrontRow], refresh_s: int | None = None
) -> Path:
    """Write `report.html` of a run, finished or not; returns its path.

    Args:
        folder: the run's.
        store: its evaluations.
        rows: of its front.
        refresh_s: the page loads itself anew so often; None never.
    """
    run = read_run(folder)
    layout = read_layout(folder)
    try:
        page = _page(report_data(folder, store, rows, run, layout) | {"refresh_s": refresh_s})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be shown ({type(error).__name__}: {str(error)[:120]}): run.json or "
            "layout.json is damaged; restore them from a copy"
        ) from error
    path = folder / REPORT_FILE
    write_atomic(path, page.encode())
    return path


def report_data(
    folder: Path,
    store: Store,
    rows: Sequence[FrontRow],
    run: Mapping[str, Any],
    layout: GenomeLayout | None,
) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    evaluations = store.all()
    teacher = next(row for row in rows if row.stage == "teacher")
    students = [row for row in rows if row.stage != "teacher"]
    config, device = run.get("config", {}), run.get("device", {})
    genomes = {one.genome_hash: one.genome for one in evaluations}
    structures: dict[str, Any] = {}
    if layout is not None:
        for row in students:
            name = row.student.removesuffix(SUFFIX)
            if name not in structures and row.genome_hash in genomes:
                genome = layout.unpack(genomes[row.genome_hash])
                structures[name] = structure_data(layout, genome)
    reasons = Counter(one.failure for one in evaluations if one.failure is not None)
    finished = run.get("status") == "finished"
    device_line = (
        f"{device.get('cpu', 'unknown device')}, ONNX Runtime {device.get('onnxruntime', '?')}, "
        f"{device.get('threads', 1)} thread(s), batch {device.get('batch', 1)}"
    )
    return {
        "title": f"moodistill: {config.get('model', folder.name)}",
        "subtitle": f"{len(evaluations)} students searched, {config.get('preset', '')} preset, "
        f"{run.get('status', 'unknown')}. Latency on {device_line}.",
        "metric": teacher.metric,
        "teacher": _row(teacher),
        "students": [_row(row) for row in students],
        "history": [
            {"evaluations": g.evaluations, "hypervolume": g.hypervolume}
            for g in store.generations()
        ],
        "structures": structures,
        "failures": [{"reason": r, "count": n} for r, n in reasons.most_common()],
        "changes": run.get("changed_by_confirmation") if finished else None,
        "rejected_windows": run.get("rejected_latency_windows", 0),
        "provenance": dict(run),
        # The student's id goes in between. It is copied into any shell: the whole path.
        "command": [f"moodistill export {shlex.quote(str(folder.resolve()))} ", " --out ", ""],
    }


def _row(row: FrontRow) -> dict[str, Any]:
    return {
        "id": row.student,
        "stage": row.stage,
        "precision": row.precision,
        "accuracy": row.validation_accuracy,
        "search_accuracy": row.search_accuracy,
        "test_accuracy": row.test_accuracy,
        "parameters": row.parameters,
        "latency_ms": row.latency_ms,
        "low_ms": row.latency_ms_low,
        "high_ms": row.latency_ms_high,
        "teacher_ms": row.teacher_latency_ms,
        "on_devices": dict(row.on_devices),
        "size_bytes": row.size_bytes,
        "onnx": row.onnx,
    }


def structure_data(layout: GenomeLayout, genome: np.ndarray) -> dict[str, Any]:
    """Each layer's width, block matrix, taps and rank, and the Adds that lost an input.

    `thinned` says in words what taps and rank are left (`1x3, rank 48/64`), empty if all are.
    `matrix` `(output blocks, input blocks)` holds 1 (kept), 0 (cut) and -1 (a block is gone); None
    where a layer has no connection genes of its own.
    """
    found = resolve(layout, genome)
    layers = []
    for layer in layout.nodes:
        grouped = layer.kind == "channelwise" and layer.path in layout.kernels
        if layer.kind != "layer" and not grouped:
            continue
        full = sum(layout.groups[g].size * layout.groups[g].width for g in layer.groups)
        name = layer.path if grouped else layer.name
        entry: dict[str, Any] = {"name": name, "full": full, "matrix": None, "thinned": ""}
        if layer.name in found.connected or (grouped and layer.name in found.live):
            kept = sum(
                int(found.kept[g].sum()) * layout.groups[g].width
                for g in layer.groups if g in found.kept
            )  # fmt: skip
            entry |= {"kept": kept, "state": "kept", "thinned": thinned(found, layer.path)}
            if f"block/{layer.name}" in layout.slices and layer.name not in found.through:
                rows = alive_in(layout, found, layer.groups)
                columns = alive_in(layout, found, found.source[layer.name])
                alive = rows[:, None] & columns[None, :]
                matrix = np.where(alive, found.connected[layer.name].astype(int), DEAD)
                entry["matrix"] = matrix.tolist()
        else:
            gone = layer.name not in found.live
            entry |= {"kept": 0, "state": "gone" if gone else "bypassed"}
        layers.append(entry)
    merges = []
    for merge in layout.merges:
        inputs = found.merges.get(merge.name)
        cut = [] if inputs is None else [
            name for name, on in zip(merge.inputs, inputs, strict=True) if not on
        ]  # fmt: skip
        merges.append({"name": merge.name, "gone": cut})
    return {"layers": layers, "merges": merges}


@cache
def _chart_library() -> str:
    """plotly.js as gzip in base64, which the page unpacks: a third of its size."""
    from plotly.offline import get_plotlyjs  # a second's import

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _page(data: Mapping[str, Any]) -> str:
    # Nothing in the data may end the script element that holds it.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    title = str(data["title"]).replace("&", "&amp;").replace("<", "&lt;")
    parts = {"{{TITLE}}": title, "{{PLOTLY}}": _chart_library(), "{{DATA}}": text}
    # One pass, since the library's text may hold a marker of ours.
    return re.sub(
        "|".join(map(re.escape, parts)), lambda m: parts[m[0]], TEMPLATE.read_text("utf-8")
    )
