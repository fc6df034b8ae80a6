"""From a run and a student's id to a file that has been checked."""

from __future__ import annotations

from pathlib import Path

from moodistill.context import default_cache_dir, load_context
from moodistill.errors import UserError
from moodistill.export import Parity, export_onnx
from moodistill.recipe import make_student
from moodistill.results import student_id
from moodistill.run_config import RunConfig
from moodistill.run_folder import read_run
from moodistill.store import Store
from moodistill.student_file import load_student
from moodistill.task import load_task


def export_student(
    run: Path, student: str, out: Path, data_dir: Path | None = None
) -> tuple[Path, Parity]:
    """Write `<out>/model.onnx` of a student; a finalist's distilled weights if it has them.

    Raises:
        UserError: if there is no such run or student, `out` holds a model already, or the file
            does not pass the comparison with torch.
    """
    config = RunConfig.from_dict(read_run(run).get("config", {}))
    with Store.open(run, readonly=True) as store:
        evaluations = {student_id(n): e for n, e in enumerate(store.all())}
    if student not in evaluations:
        known = sorted(p.name for p in (run / "students").glob("s*"))
        raise UserError(
            f"unknown student {student!r} in {run}; expected an id from its pareto.csv"
            + (f", for example {', '.join(known[:6])}" if known else "")
        )
    path = out / "model.onnx"
    if path.exists():
        raise UserError(f"{path} exists; give another --out")
    task = load_task(config.model)
    weights = run / "students" / student / "student.safetensors"
    if weights.exists():
        data = task.load_data(data_dir)
        made, _ = load_student(weights, task.build(), data.input_shape)
    else:
        context = load_context(
            task, data_dir, calibration=config.calibration, cache_dir=default_cache_dir()
        )
        data = context.data
        genome = context.layout.unpack(evaluations[student].genome)
        made = make_student(context, genome, config.recipe)
    return path, export_onnx(made.module, data, path)
