"""The front of a run on disk: `pareto.json`, which programs read, and `pareto.csv` for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moodistill.errors import UserError
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import read_record
from moodistill.pareto.row import PRECISIONS, STAGES, SUFFIX, FrontRow, check_front
from moodistill.pareto.table_csv import read_csv, write_csv

__all__ = ["PRECISIONS", "STAGES", "SUFFIX", "FrontRow", "has_front", "read_front", "write_front"]

FRONT_FILE, CSV_FILE = "pareto.json", "pareto.csv"


def write_front(path: Path, rows: Sequence[FrontRow]) -> None:
    """Write `pareto.json` and `pareto.csv` into a run's folder (or beside that path)."""
    folder = path.parent if path.suffix == ".csv" and not path.is_dir() else path
    write_json_atomic(folder / FRONT_FILE, [asdict(row) for row in rows])
    write_csv(folder / CSV_FILE, rows)


def has_front(folder: Path) -> bool:
    """Whether a run's folder holds a front."""
    return (folder / FRONT_FILE).is_file() or (folder / CSV_FILE).is_file()


def read_front(path: Path) -> list[FrontRow]:
    """The front in a run's folder, or that of a file; a folder without `pareto.json` may have CSV.

    Raises:
        UserError: if there is none or it is damaged; names the row and the field.
    """
    if path.is_dir() or path.suffix not in (".csv", ".json"):
        path = path / (FRONT_FILE if (path / FRONT_FILE).is_file() else CSV_FILE)
    if not path.is_file():
        path = path.with_name(FRONT_FILE) if path.name == CSV_FILE else path
        raise UserError(f"{path} does not exist; expected the front of a finished run")
    if path.suffix == ".csv":
        return read_csv(path)
    rows = read_record(path, list[FrontRow], "restore it from a copy, or delete it to use the CSV")
    places = (f"{path} row {number}," for number in range(1, len(rows) + 1))
    return check_front(zip(places, rows, strict=True), str(path))
