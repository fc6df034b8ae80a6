"""The files of a run folder: `run.json` and what a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from moodistill.errors import UserError
from moodistill.io.atomic import TEMPORARY, remove_orphans, write_json_atomic
from moodistill.io.records import read_record

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
STUDENTS = "students"  # the folder of the finalists and their INT8 twins, each in one by its name
RESULT_FILE = "result.json"  # of a student; written last: a folder with a result is complete
MODEL_FILE = "model.onnx"  # of a folder that goes to a device


def student_folder(run: Path, name: str) -> Path:
    """The folder of a finalist or an INT8 twin in a run's folder."""
    return run / STUDENTS / name


def model_file(run: Path, name: str) -> Path:
    """The ONNX file of a finalist or an INT8 twin in a run's folder."""
    return student_folder(run, name) / MODEL_FILE


def relative_model_file(name: str) -> str:
    """The same relative to the run's folder, with slashes, as `pareto.json` has it."""
    return f"{STUDENTS}/{name}/{MODEL_FILE}"


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        UserError: if the folder is no run or the file is not a JSON object.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run: expected {RUN_FILE} in it; name the folder that a search wrote"
        )
    return read_record(path, dict[str, Any], "restore it from a copy")


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write `run.json` atomically."""
    write_json_atomic(folder / RUN_FILE, run)


def new_run_folder(out: Path, locked: bool = False) -> Path:
    """Make the folder of a new run; who has `locked` it may delete what a killed start left.

    Raises:
        UserError: if `out` exists and is not an empty folder, or cannot be made.
    """
    try:
        if out.is_dir() and all(_is_unfinished(path) for path in out.iterdir()):
            if locked:
                remove_orphans(out)
        elif out.exists():
            raise UserError(f"{out} exists; resume it, or give another `out`")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error}); give another `out`") from error
    return out


def _is_unfinished(path: Path) -> bool:
    """Whether a file may lie in a folder in which no run has begun."""
    draft = path.name.startswith(f".{RUN_FILE}.") and path.name.endswith(TEMPORARY)
    return draft or path.name == LOCK_FILE


def versions() -> dict[str, Any]:
    """What a run was made with: library versions, platform, and the git commit if there is one."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("moodistill", "torch", "pymoo", "onnxruntime", "numpy", "onnx"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "git": _git()}


def _git() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent,
            capture_output=True, encoding="utf-8", check=True, timeout=30,
        ).stdout.strip()  # fmt: skip

    try:
        # Fails in a virtual environment that lies inside some other project's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
