"""A front as CSV: for people and spreadsheets, and what runs of earlier versions have alone."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic
from moodistill.pareto.row import COLUMNS, METRIC, FrontRow, check_front, fault

ON_DEVICE = "latency_ms_on_"  # and the device's name: the column of one of several devices


def write_csv(path: Path, rows: Sequence[FrontRow]) -> None:
    """Write the rows atomically; `on_devices` becomes a column `latency_ms_on_<device>` each."""
    table = io.StringIO(newline="")
    devices = list(dict.fromkeys(device for row in rows for device in row.on_devices))
    header = [*COLUMNS, METRIC, *(ON_DEVICE + device for device in devices)]
    csv.writer(table, lineterminator="\n").writerow(header)
    for row in rows:
        # float() first: the repr of a NumPy scalar is not a number.
        values = [getattr(row, name) for name in (*COLUMNS, METRIC)]
        values += [row.on_devices.get(device) for device in devices]
        cells = [repr(float(v)) if isinstance(v, float) else v for v in values]
        # csv leaves a lone carriage return unquoted and then reads it as the end of a line.
        if any("\r" in str(cell) for cell in cells):
            csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
        else:
            csv.writer(table, lineterminator="\n").writerow(cells)
    write_atomic(path, table.getvalue().encode())


def read_csv(path: Path) -> list[FrontRow]:
    """The rows of a file.

    Raises:
        UserError: if it is damaged; names the line and the column.
    """
    try:
        # Not read_text, which would change line ends inside quoted cells.
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV ({error}); restore it") from error
    return check_front(_rows(path, lines), str(path))


def _rows(path: Path, lines: Sequence[tuple[int, list[str]]]) -> Iterator[tuple[str, FrontRow]]:
    header = lines[0][1] if lines else []
    for name in COLUMNS:
        if (count := header.count(name)) != 1:
            raise UserError(f"{path} line 1: {count} columns {name}, expected 1")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path} line {line}: {len(cells)} cells, expected {len(header)}")
        where = f"{path} line {line}, column"
        yield where, _row(dict(zip(header, cells, strict=True)), where)


def _row(cells: dict[str, str], where: str) -> FrontRow:
    devices = {
        name.removeprefix(ON_DEVICE): _number(name, text, where)
        for name, text in cells.items()
        if name.startswith(ON_DEVICE) and text
    }
    values = {name: _cell(name, cells[name], where) for name in COLUMNS}
    return FrontRow(**values, on_devices=devices, metric=cells.get(METRIC) or "accuracy")


def _cell(name: str, text: str, where: str) -> Any:
    kind = COLUMNS[name]
    if kind == "str":
        return text
    if not text and "None" in kind:
        return None
    # Stricter than int() and float(), which also take "1_0", " 1" and "nan".
    if kind == "int":
        return int(
            _checked(name, text, where, int(text) if re.fullmatch(r"\d{1,18}", text, re.A) else -1)
        )
    return _number(name, text, where)


def _number(name: str, text: str, where: str) -> float:
    plain = re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", text)
    return _checked(name, text, where, float(text) if plain else math.nan)


def _checked(name: str, text: str, where: str, value: float) -> float:
    if expected := fault(name, value):
        raise UserError(f"{where} {name}: {text[:40]!r}; {expected}")
    return value
