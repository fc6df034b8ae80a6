"""The tables of a run: errors of single changes, times of layers on the device that times."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.evolution.tables import Change, Errors, LayerTimes, Tables, single_changes
from moodistill.genome.canonical import canonical
from moodistill.io.atomic import write_json_atomic
from moodistill.io.fields import convert
from moodistill.latency.meter import LatencyError
from moodistill.onnx.writer import to_onnx
from moodistill.progress import Stage
from moodistill.runs.session import Session
from moodistill.student.builder import build_student
from moodistill.student.changes import ChangeErrors
from moodistill.student.context import TeacherContext
from moodistill.teacher.samples import CalibrationConfig, collect_samples

TABLES_FILE = "tables.json"
PROFILED = 10  # networks of all sizes, whose layers are timed
CALIBRATION = CalibrationConfig(images=64, pixels=4_000, patches=3_000)
HELD_IMAGES = 96  # of the validation split, that errors of changes are measured on
FEW_IMAGES = 8  # of each, however large they are
MOST_BYTES = 1536 * 2**20  # of all values of a network for these images
HOPELESS = 100.0  # error of a change that cannot be scored
Profile = Callable[[bytes], tuple[list[list[float]], float]]


def run_tables(session: Session) -> Tables | None:
    """Those in the run's folder, or measured now; None where the search begins without."""
    search, path = session.config.search, session.folder / TABLES_FILE
    if not search.seeded:
        return None
    if path.exists():
        return read_tables(path)
    kept = session.context.layout.unsearched(search.connections)
    changes = list(single_changes(session.context.layout, search.simd_step, kept))
    with session.reporter.stage("tables", len(changes), "change") as stage:
        errors = change_errors(session.context, changes, stage)
    times = layer_times(session.context, session.backend.timing.profile, search.simd_step, kept)
    tables = Tables(errors, times, layer_pixels(session.context))
    write_tables(path, tables)
    _say(session, tables)
    return tables


def _say(session: Session, tables: Tables) -> None:
    """What is in the tables, and what could not be measured."""
    changes = [error for levels in tables.errors.values() for error in levels.values()]
    hopeless = sum(error >= HOPELESS for error in changes)
    session.reporter.say(
        f"{len(changes)} single changes are scored"
        + (f", {hopeless} could not be and are left to the search" if hopeless else "")
    )
    if not tables.times.measured:
        session.reporter.say(
            "the times of single layers cannot be measured on this device: the first students are "
            "chosen by their multiply-accumulates"
        )


def make_tables(
    context: TeacherContext,
    profile: Profile,
    step: int,
    kept: np.ndarray,
) -> Tables:
    """Measure both tables.

    Args:
        context: of the teacher.
        profile: gives the times of a model's layers (`latency.profile.layer_times`).
        step: SIMD step.
        kept: `(length,)` bits that are not searched.
    """
    return Tables(
        change_errors(context, list(single_changes(context.layout, step, kept))),
        layer_times(context, profile, step, kept),
        layer_pixels(context),
    )


def layer_pixels(context: TeacherContext) -> dict[str, int]:
    """Pixels of the outputs of layers and channelwise operations by name."""
    steps = context.graph.steps
    return {one.name: one.form.area for one in steps if one.kind in ("layer", "channelwise")}


def change_errors(
    context: TeacherContext, changes: Sequence[Change], stage: Stage | None = None
) -> Errors:
    """Error of every single change, on a few images."""
    size = sum(4 * one.form.area * one.form.channels for one in context.graph.steps)
    most = max(FEW_IMAGES, MOST_BYTES // (2 * size))
    samples = collect_samples(
        context.solver,
        context.data,
        replace(CALIBRATION, images=min(CALIBRATION.images, most)),
        None,
        context.teacher_digest,
    )
    if context.device.type != "cpu":
        samples = samples.to(context.device)
    data = context.data
    images = data.normalise(data.validation.head(min(HELD_IMAGES, most)).images[:])
    measure = ChangeErrors(context.graph, context.layout, samples, images, data.meaning)
    found: Errors = {}
    for count, change in enumerate(changes, 1):
        try:
            error = min(HOPELESS, measure.error(change.genome))
        except Exception:  # one bad change must not end a search; `_say` counts them
            error = HOPELESS
        found.setdefault(change.gene, {})[change.level] = error
        if stage is not None:
            stage.update(count)
    return found


def layer_times(
    context: TeacherContext, profile: Profile, step: int, kept: np.ndarray
) -> LayerTimes:
    """Times of layers, fitted to those of a few networks of all sizes."""
    layout, rng = context.layout, np.random.default_rng(0)
    sampling = DensitySampling(layout, step)
    rows: list[list[float]] = []
    values, rest = [], []
    for share in np.geomspace(1.0, sampling.smallest, PROFILED):
        genome = layout.teacher()
        if share < 1.0:
            sampling.draw(genome, float(share), rng)
        student = build_student(context.graph, layout, canonical(layout, genome | kept, step))
        try:
            layers, others = profile(to_onnx(student.module, context.data.input_shape))
        except LatencyError:
            return LayerTimes.by_macs()
        rows += layers
        values.append(sum(outputs * pixels for _, outputs, _, pixels, _ in layers))
        rest.append(others)
    if not rows:  # providers that run a network as a whole say nothing of its layers
        return LayerTimes.by_macs()
    table = np.array(rows)
    return LayerTimes.fit(table[:, :4], table[:, 4], np.array(values), np.array(rest))


@dataclass(frozen=True)
class _Stored:
    """What `tables.json` holds; errors as `[gene, level, error]`."""

    errors: list[tuple[str, list[int], float]]
    coefficients: list[float]
    per_value: float
    constant: float
    pixels: dict[str, int]
    measured: bool = True


def write_tables(path: Path, tables: Tables) -> None:
    """Keep the tables: with others a resumed search would breed other students."""
    times = tables.times
    write_json_atomic(
        path,
        {
            "errors": [
                [gene, list(level), error]
                for gene, levels in tables.errors.items()
                for level, error in levels.items()
            ],
            "coefficients": times.coefficients.tolist(),
            "per_value": times.per_value,
            "constant": times.constant,
            "measured": times.measured,
            "pixels": tables.pixels,
        },
    )


def read_tables(path: Path) -> Tables:
    """The inverse of `write_tables`.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        stored = convert(json.loads(path.read_bytes()), _Stored, str(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); expected the tables of the run") from error
    errors: Errors = {}
    for gene, level, value in stored.errors:
        errors.setdefault(gene, {})[tuple(level)] = value
    times = LayerTimes(
        np.array(stored.coefficients), stored.per_value, stored.constant, stored.measured
    )
    return Tables(errors, times, stored.pixels)
