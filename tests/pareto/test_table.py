"""The front: strict files, `pareto.json` and `pareto.csv`, that are read back exactly."""

import dataclasses
import json
import random

import numpy as np
import pytest
from helpers.rows import ROWS, TEACHER, student
from hypothesis import given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.pareto.choose import choose, knee
from moodistill.pareto.table import FrontRow, has_front, read_front, write_front

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FRACTIONS = st.floats(0, 1).map(abs)
POSITIVE = st.floats(1e-300, 1e300)
COUNTS = st.integers(1, 10**17)
ANY_STUDENT = st.builds(
    FrontRow, TEXT.filter(bool), st.sampled_from(["searched", "distilled"]), FRACTIONS, FRACTIONS,
    st.none() | FRACTIONS, COUNTS, COUNTS, POSITIVE, POSITIVE, POSITIVE, POSITIVE, COUNTS,
    st.sampled_from(["", "students/a b,c.onnx"]), TEXT.filter(bool), TEXT,
)  # fmt: skip
ANY_STUDENT |= ANY_STUDENT.map(
    lambda row: dataclasses.replace(row, accuracy=None, stage="searched")
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_STUDENT, max_size=4, unique_by=lambda r: (r.student, r.stage)))
def test_csv_round_trip_is_exact(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("front")
    rows = [*rows, TEACHER]
    write_front(folder, rows)
    assert read_front(folder) == read_front(folder / "pareto.csv") == rows
    twin = json.loads((folder / "pareto.json").read_text())
    assert twin == [dataclasses.asdict(row) for row in rows]
    assert sorted(entry.name for entry in folder.iterdir()) == ["pareto.csv", "pareto.json"]


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    row = student("n", np.float64(0.1), np.int64(5), np.float32(0.5))
    write_front(tmp_path / "pareto.csv", [TEACHER, row])
    assert read_front(tmp_path)[1] == row


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("latency_ms_low", "low", "line 1: 0 columns latency_ms_low, expected 1"),
        ("macs", "student", "line 1: 2 columns student, expected 1"),
        ("14000000", "many", "line 2, column parameters: 'many'; expected a positive whole number"),
        ("14000000", "1_0", "line 2, column parameters"),
        ("14000000", "0", "line 2, column parameters"),
        ("14000000", "9" * 5000, "line 2, column parameters"),
        ("0.93", "nan", "line 2, column accuracy: 'nan'; expected a fraction"),
        ("0.93", "93", "line 2, column accuracy: '93'; expected a fraction between 0 and 1"),
        ("0.93", "", "line 2, column accuracy: empty"),
        ("0.92,", ",", "line 4, column accuracy: empty"),
        ("3.6", "inf", "line 2, column latency_ms_low: 'inf'; expected a positive number"),
        ("3.6", "1e999", "line 2, column latency_ms_low"),
        ("3.6", "-3.6", "line 2, column latency_ms_low"),
        ("teacher,teacher", "teacher,searched", "0 rows have 'teacher' as their stage"),
        ("teacher,teacher", "teacher,tutor", "line 2, column stage: 'tutor'; expected one of"),
        ("d1.onnx", "../d1.onnx", "line 4, column onnx"),
        ("d1.onnx", "/d1.onnx", "line 4, column onnx"),
        (",0,0,accuracy\n", ",0,0,accuracy,more\n", "line 2: 22 cells, expected 21"),
        ("d2,distilled", "d1,distilled", "line 5, column student: 'd1' was distilled before"),
        ("s1,searched", "s1,teacher", "2 rows have 'teacher' as their stage, expected 1"),
        ("a summary", '"a summary', "no readable CSV"),
    ],
)
def test_damaged_csv_names_line_and_column(tmp_path, old, new, message):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    (tmp_path / "pareto.json").unlink()  # as in a run of an earlier version
    with pytest.raises(UserError, match=message):
        read_front(tmp_path)


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (0, "parameters", "many", r"\[0\].parameters is 'many'; expected int"),
        (0, "parameters", 1.5, r"\[0\].parameters is 1.5; expected int"),
        (0, "parameters", 0, "row 1, parameters: '0'; expected a positive whole number"),
        (0, "parameters", 10**30, "row 1, parameters"),
        (0, "accuracy", 93, "row 1, accuracy: '93.0'; expected a fraction between 0 and 1"),
        (0, "accuracy", None, "row 1, accuracy: empty"),
        (2, "accuracy", None, "row 3, accuracy: empty"),
        (0, "latency_ms_low", -3.6, "row 1, latency_ms_low: '-3.6'; expected a positive number"),
        (0, "latency_ms_low", True, r"\[0\].latency_ms_low is True; expected float"),
        (0, "stage", "searched", "0 rows have 'teacher' as their stage, expected 1"),
        (0, "stage", "tutor", "row 1, stage: 'tutor'; expected one of teacher"),
        (0, "precision", "int4", "row 1, precision: 'int4'; expected one of fp32"),
        (2, "onnx", "../d1.onnx", "row 3, onnx"),
        (3, "student", "d1", "row 4, student: 'd1' was distilled before"),
        (3, "student", "", "row 4, student: ''; expected text"),
        (1, "stage", "teacher", "2 rows have 'teacher' as their stage, expected 1"),
        (1, "on_devices", {"pi": 0}, "row 2, pi: '0.0'; expected a positive number"),
        (1, "on_devices", {"pi": "x"}, r"\[1\].on_devices is {'pi': 'x'}; expected float"),
    ],
)
def test_damaged_json_names_row_and_field(tmp_path, row, field, value, message):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.json"
    content = json.loads(path.read_text())
    content[row][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"pareto.json.*{message}"):
        read_front(tmp_path)


def test_json_that_lacks_a_field_or_is_none(tmp_path):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.json"
    content = json.loads(path.read_text())
    del content[1]["genome_hash"]
    for text, message in (
        (json.dumps(content), r"\[1\].genome_hash is missing"),
        ("{}", "the whole file is {}; expected list"),
        ("[", "no readable JSON"),
        ('[{"student": NaN}]', "no readable JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_front(tmp_path)


def test_json_is_read_where_there_is_csv_too(tmp_path):
    folder = tmp_path / "run.csv"  # a folder may have any name
    folder.mkdir()
    write_front(folder, ROWS)
    write_front(tmp_path, ROWS[:2])
    (folder / "pareto.csv").write_bytes((tmp_path / "pareto.csv").read_bytes())
    assert read_front(folder) == ROWS
    (folder / "pareto.json").unlink()
    assert read_front(folder) == ROWS[:2] and has_front(folder)
    (folder / "pareto.csv").unlink()
    assert not has_front(folder)


def test_a_field_of_a_newer_version_is_passed_over(tmp_path):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps([one | {"energy_mj": 3.5} for one in json.loads(path.read_text())]))
    assert read_front(tmp_path) == ROWS


def test_a_front_without_a_teacher_or_a_file(tmp_path):
    with pytest.raises(UserError, match="does not exist; expected the front"):
        read_front(tmp_path)
    write_front(tmp_path, ROWS[1:])
    with pytest.raises(UserError, match="0 rows have 'teacher'"):
        read_front(tmp_path)


def test_mutated_csv_never_raises_anything_else(tmp_path):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.csv"
    healthy = path.read_bytes()
    (tmp_path / "pareto.json").unlink()
    pieces = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"-", b"e9", b"nan", b"teacher", b"0" * 9]
    for seed in range(600):
        rng = random.Random(seed)
        data = healthy
        for _ in range(rng.choice([1, 1, 3, 30])):
            start = rng.randrange(len(data) + 1)
            end = start + rng.choice([0, 1, 1, 8, 200])
            data = data[:start] + rng.choice(pieces) * rng.randrange(3) + data[end:]
        path.write_bytes(data)
        try:
            rows = read_front(tmp_path)
            choose(rows)
            knee(rows)
        except UserError as error:
            assert "\n" not in str(error)
