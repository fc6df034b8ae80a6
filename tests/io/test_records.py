"""Records from JSON: the types of their dataclasses, and one line for what a file has wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from helpers import ROOT

from moodistill.bundle.int8 import Int8Result
from moodistill.errors import UserError
from moodistill.finalists.distil import read_finalist
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import convert, parse_json, read_record
from moodistill.pareto.evaluation import Latency
from moodistill.pareto.table import read_csv, read_front
from moodistill.storage.folder import read_run


@dataclass(frozen=True)
class Record:
    name: str
    accuracy: float
    count: int
    times: tuple[float, ...]
    latency: Latency | None = None
    devices: Mapping[str, Latency] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)


LATENCY = {"latency_ms": 1, "low_ms": 0.5, "high_ms": 2, "ratio": 0.1, "samples_ms": [1, 2.5]}
GOOD = {
    "name": "s0001", "accuracy": 1, "count": 3, "times": [1, 0.5], "latency": LATENCY,
    "devices": {"pi": LATENCY}, "ratios": {"32": 0.5},
}  # fmt: skip


def test_a_record_comes_back_with_its_types(tmp_path):
    latency = Latency(1.0, 0.5, 2.0, 0.1, (1.0, 2.5), ())
    expected = Record("s0001", 1.0, 3, (1.0, 0.5), latency, {"pi": latency}, {32: 0.5})
    write_json_atomic(tmp_path / "r.json", GOOD)
    found = read_record(tmp_path / "r.json", Record, "restore it")
    assert found == expected and type(found.accuracy) is float and type(found.times) is tuple
    newer = json.dumps({**GOOD, "energy_mj": 1})
    assert parse_json(newer, Record) == expected
    assert parse_json(json.dumps({k: GOOD[k] for k in list(GOOD)[:4]}), Record).latency is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 7}, "name is 7; expected str"),
        ({"accuracy": "high"}, "accuracy is 'high'; expected float"),
        ({"accuracy": True}, "accuracy is True; expected float"),
        ({"count": 1.5}, "count is 1.5; expected int"),
        ({"count": "3"}, "count is '3'; expected int"),
        ({"times": 1}, "times is 1; expected list"),
        ({"times": [1, None]}, r"times[1] is None; expected float"),
        ({"latency": {}}, "latency.latency_ms is missing"),
        ({"latency": []}, "latency is []; expected object"),
        (
            {"latency": {**LATENCY, "samples_ms": [1, "x"]}},
            "latency.samples_ms[1] is 'x'; expected float",
        ),
        ({"devices": {"pi": {**LATENCY, "ratio": None}}}, "; expected float"),
        ({"ratios": {"wide": 1}}, "a key of ratios is {'wide': 1}; expected int"),
    ],
)
def test_a_damaged_field_is_named_in_one_line(tmp_path, change, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError) as caught:
        read_record(path, Record, "restore it from a copy")
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.endswith("; restore it from a copy")
    assert message in text and "\n" not in text and "`" not in text


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff", b"[" * 100_000, b"[NaN]", b"[1e999]", b"[-Infinity]", b'{"a": 1}x',
     b"9" * 9000],
)  # fmt: skip
def test_what_is_no_strict_json(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="r.json: ") as caught:
        read_record(path, dict, "restore it")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path / "none.json", dict, "restore it")


def test_a_number_too_large_for_its_field():
    for value in (10**400, -(10**400)):
        with pytest.raises(ValueError):
            convert({**GOOD, "accuracy": value}, Record)


def test_names_of_files_that_are_no_utf8(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_json_atomic(tmp_path / "run.json", {"data": name})
    assert read_run(tmp_path) == {"data": name}


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_records_of_the_last_version(model):
    folder = ROOT / "results" / "reference" / model
    assert read_run(folder)["config"]["model"] == model
    rows = read_front(folder)
    assert len(rows) > 100 and rows == read_csv(folder / "pareto.csv")
    (student,) = (folder / "students").iterdir()
    found = read_finalist(student)
    (row,) = (one for one in rows if (one.student, one.stage) == (found.student, "distilled"))
    assert found.genome_hash == row.genome_hash and found.accuracy == row.accuracy


def test_a_result_that_is_damaged_is_none(tmp_path):
    path = tmp_path / "result.json"
    good = json.loads(
        next((ROOT / "results/reference").glob("vgg16/students/*/result.json")).read_text()
    )
    path.write_text(json.dumps(good))
    assert read_finalist(tmp_path).student == good["student"]
    for change in ({"accuracy": None}, {"budget": 1}, {"parity_images": 0.5}):
        path.write_text(json.dumps({**good, **change}))
        assert read_finalist(tmp_path) is None
    twin = {"student": "s1-int8", "float_sha256": "ab", "scheme": {"weights": "int8"},
            "excluded": ["conv1"], "accuracy": 0.9, "test_accuracy": None, "size_bytes": 7}  # fmt: skip
    assert parse_json(json.dumps(twin), Int8Result).excluded == ("conv1",)
