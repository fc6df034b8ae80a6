"""From a run and a student's id to a bundle that has been checked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moodistill.bundle.folder import MODEL, write_package
from moodistill.bundle.int8 import judge_speed, quantise_student
from moodistill.bundle.model import Origin, ShipOptions, fixed_batch
from moodistill.bundle.parity import Parity, export_onnx
from moodistill.config import RunConfig
from moodistill.data.images import ImageData
from moodistill.errors import UnfinishedRun, UserError
from moodistill.finalists.distil import STUDENT_FILE, Finalist, read_finalist
from moodistill.io.atomic import write_atomic
from moodistill.latency.device import device_fingerprint
from moodistill.latency.meter import LatencyMeter
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.table import SUFFIX, FrontRow, read_front
from moodistill.runs.backend import Places
from moodistill.runs.compatibility import (
    check_data,
    check_network,
    check_origin,
    check_weights,
)
from moodistill.runs.moved import moved_config
from moodistill.runs.rows import int8_row, searched_row
from moodistill.storage.folder import RESULT_FILE, RUN_FILE, STUDENTS, read_run, student_folder
from moodistill.storage.searched import student_id
from moodistill.storage.store import Store
from moodistill.student.accuracy import student_accuracy
from moodistill.student.context import load_context, weights_digest
from moodistill.student.evaluator import make_student
from moodistill.student.file import load_student
from moodistill.student.network import Student
from moodistill.teacher.graph import trace
from moodistill.teacher.meaning import fitted_data
from moodistill.teacher.task import Task
from moodistill.teacher.weights import load_weights

# What the card says of it.
DEVICE_KEYS = {"cpu", "onnxruntime", "provider", "threads", "batch"}


@dataclass(frozen=True)
class Exported:
    """What was written: the model's path, and its comparison with torch (None for INT8)."""

    path: Path
    parity: Parity | None


@dataclass(frozen=True)
class Rebuilt:
    """A run's student made again, and what it was made with; what distillation reached, if any."""

    student: Student
    evaluation: Evaluation
    data: ImageData
    finalist: Finalist | None = None


def rebuild_student(
    run: Path,
    name: str,
    task: Task,
    data_dir: Path | None = None,
) -> Rebuilt:
    """A student of a run: distilled weights if it has them, else inherited from the teacher.

    Args:
        run: a run's folder.
        name: the student's id; of an INT8 student the float one is made.
        task: the run's.
        data_dir: where the data are.

    Raises:
        UserError: if there is no such student, its distilled weights are gone, or the teacher is
            not that of the run.
    """
    name = name.removesuffix(SUFFIX)
    evaluation = _evaluation(run, name)
    path = student_folder(run, name) / STUDENT_FILE
    if path.exists():
        return _read_distilled(run, path, evaluation, task, data_dir)
    if any(row.student == name and row.stage == "distilled" for row in read_front(run)):
        # Inherited weights would go under the accuracy of the distilled ones.
        there = (path.parent / MODEL).is_file()
        raise UserError(
            f"{path} is missing, and with it the distilled weights of {name}: restore it"
            + (f", or take {path.parent}, which is a bundle of them" if there else "")
        )
    config = RunConfig.read(run)
    context = load_context(task, data_dir, config.calibration, rules=config.rules)
    check_origin(run, read_run(run), context)
    genome = context.layout.unpack(evaluation.genome)
    return Rebuilt(make_student(context, genome, config.recipe), evaluation, context.data)


def _read_distilled(
    run: Path, path: Path, evaluation: Evaluation, task: Task, data_dir: Path | None
) -> Rebuilt:
    """A student with the distilled weights in the file `path`."""
    finalist, name = read_finalist(path.parent), path.parent.name
    if finalist is None or finalist.genome_hash != evaluation.genome_hash:
        raise UnfinishedRun(
            f"{path.parent / RESULT_FILE} is missing or not of {name}: its distillation was "
            "interrupted",
            run,
        )
    data, stored = task.load_data(data_dir), read_run(run)
    opaque = RunConfig.read(run).rules.opaque
    graph = trace(task.build().eval(), data.input_shape, opaque)
    data = fitted_data(
        data, graph, lambda: load_weights(task.build(), task.weights, task.weights_key)
    )
    check_data(run, stored, data)
    check_network(run, stored, graph)
    student = load_student(path, task.build(), data.input_shape)[0]
    return Rebuilt(student, evaluation, data, finalist)


def export_student(
    run: Path,
    student: str,
    out: Path,
    options: ShipOptions | None = None,
    int8: bool = False,
    places: Places | None = None,
    task: Task | None = None,
) -> Exported:
    """Write the bundle of a student; a finalist's distilled weights if it has them.

    Args:
        run: a run's folder.
        student: its id; `<id>-int8` is the same as `<id>` with `int8`.
        out: new folder, or one without a model.
        options: how the model takes images and answers.
        int8: quantise it; refused if that is not faster here or costs too much accuracy.
        places: where network, weights and images are now, if not where the run had them.
        task: the run's, None to load what it names.

    Raises:
        UserError: if there is no such run or student, `out` holds a model already, or the file
            does not pass the comparison with torch.
    """
    options, stored, config = options or ShipOptions(), read_run(run), RunConfig.read(run)
    places = places or Places()
    name = student.removesuffix(SUFFIX)
    device = _device_of(run, stored)
    _check_target(out)
    rows = {row.student: row for row in read_front(run)}
    teacher = next(row for row in rows.values() if row.stage == "teacher")
    if task is None:
        task = moved_config(run, config, places).task()
        if places.weights is not None:  # a distilled student does not need them
            check_weights(run, stored, task.weights, weights_digest(task))
    rebuilt = rebuild_student(run, name, task, places.data_dir)
    row = _current_row(name, rebuilt, rows.get(name), teacher)
    origin = Origin(task.name, str(stored.get("teacher_digest")), rebuilt.evaluation.genome)
    module, data = rebuilt.student.module, rebuilt.data
    int8 = int8 or name != student
    free = replace(options, batch=None)  # latency is measured of the run's own batch
    parity = export_onnx(module, data, origin, out / MODEL, free if int8 else options)
    if int8:
        # Distilled since the table was written, its twin in there is of other weights.
        known = rows.get(name + SUFFIX) if row == rows.get(name) else None
        request = _Int8(row, known, device, config, origin, free)
        try:
            row = _quantise(rebuilt, out, request)
            if options.batch is not None:
                write_atomic(out / MODEL, fixed_batch((out / MODEL).read_bytes(), options.batch))
        except BaseException:
            (out / MODEL).unlink(missing_ok=True)
            raise
    try:
        write_package(out, row, teacher, data, origin, device, options)
    except BaseException:
        (out / MODEL).unlink(missing_ok=True)
        raise
    return Exported(out / MODEL, None if int8 else parity)


def _device_of(run: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    device = stored.get("device")
    if not isinstance(device, dict) or DEVICE_KEYS - set(device):
        raise UserError(f"{run / RUN_FILE} does not say on which device; restore it from a copy")
    return device


def _check_target(out: Path) -> None:
    if (out / MODEL).exists():
        raise UserError(f"{out / MODEL} exists; give another `out`")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder as `out`")


def _current_row(name: str, rebuilt: Rebuilt, row: FrontRow | None, teacher: FrontRow) -> FrontRow:
    """The student's row in the table, with what has been reached since it was written."""
    row = row or searched_row(name, rebuilt.evaluation, teacher.teacher_latency_ms)
    row = replace(row, metric=teacher.metric)
    finalist = rebuilt.finalist
    if finalist is not None:
        row = replace(
            row,
            stage="distilled",
            accuracy=finalist.accuracy,
            test_accuracy=finalist.test_accuracy,
        )
    if row.accuracy is None:
        data = rebuilt.data
        reached = student_accuracy(rebuilt.student.module, data, data.validation)
        row = replace(row, accuracy=reached)
    return row


def _evaluation(run: Path, name: str) -> Evaluation:
    with Store.open(run, readonly=True) as store:
        evaluations = {student_id(n): e for n, e in store.numbered().items()}
    if name not in evaluations or evaluations[name].latency is None:
        known = sorted(p.name for p in (run / STUDENTS).glob("s*"))
        raise UserError(
            f"unknown student {name!r} in {run}; expected an id from its pareto.csv"
            + (f", for example {', '.join(known[:6])}" if known else "")
        )
    return evaluations[name]


@dataclass(frozen=True)
class _Int8:
    """What an INT8 twin is made and judged by.

    Attributes:
        row: of its float student.
        twin: its own row, where the run has made it.
        device: fingerprint of the run's.
        config: the run's.
        origin: written into the file.
        options: how the file takes images and answers.
    """

    row: FrontRow
    twin: FrontRow | None
    device: Mapping[str, Any]
    config: RunConfig
    origin: Origin
    options: ShipOptions


def _quantise(rebuilt: Rebuilt, out: Path, request: _Int8) -> FrontRow:
    """Replace the float model in `out` by its INT8 twin; the twin's row."""
    row, config, twin = request.row, request.config, request.twin
    here = device_fingerprint(config.latency)
    if twin is None and here != request.device:
        raise UserError(
            f"the run was measured on {request.device.get('cpu')!r}, this is {here['cpu']!r}: "
            "whether INT8 is faster cannot be judged here; export on the device of the run"
        )
    data, floating = rebuilt.data, (out / MODEL).read_bytes()
    bare = to_onnx(rebuilt.student.module, data.input_shape)
    assert row.accuracy is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = quantise_student(
            bare, row.student + SUFFIX, row.accuracy, data, request.origin, folder,
            request.device, config.int8, request.options,
        )  # fmt: skip
        model = b"" if result.refused else (folder / MODEL).read_bytes()
    if model and twin is None:
        times = _times(floating, model, rebuilt, request)
        result = judge_speed(result, times["int8"], times["float"])
        twin = int8_row(row, result, times["int8"])
    if result.refused or twin is None:
        raise UserError(
            f"{result.student} was not written: it {result.refused}; export it without INT8"
        )
    write_atomic(out / MODEL, model)
    return twin


def _times(floating: bytes, model: bytes, rebuilt: Rebuilt, request: _Int8) -> dict[str, Latency]:
    """Latencies of a `float` student and its `int8` twin, side by side on this device."""
    shape, scale = rebuilt.data.input_shape, request.row.latency_ms
    with LatencyMeter(floating, shape, request.config.latency, teacher_latency_ms=scale) as meter:
        return meter.confirm({"float": lambda: floating, "int8": lambda: model})
