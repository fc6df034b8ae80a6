"""INT8 twins: kept only where measured faster and accurate enough."""

import contextlib
import csv
import io
import json

import onnx
import pytest

from moodistill.bundle.int8 import (
    Int8Config,
    Int8Result,
    judge_speed,
    quantise_student,
    read_int8,
    save_int8,
)
from moodistill.bundle.model import Origin
from moodistill.cli import run_tool
from moodistill.latency.device import device_fingerprint
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Latency
from moodistill.storage.searched import student_id
from moodistill.storage.store import Store

ORIGIN = Origin("digits", "ab" * 32, b"\x01")
FOUND = Int8Result("s1-int8", "ab", {}, (), 0.9, None, 100)
SLOW, FAST = Latency(1.0, 0.95, 1.05, 0.5), Latency(0.5, 0.4, 0.6, 0.25)


def twin(digits, folder, **settings):
    bare = to_onnx(digits.graph.module, digits.data.input_shape)
    config = Int8Config(**settings)
    return quantise_student(
        bare, "s1-int8", 1.0, digits.data, ORIGIN, folder, device_fingerprint(), config
    )


def test_a_twin_is_smaller_and_takes_raw_pixels(digits, tmp_path):
    found = twin(digits, tmp_path)
    assert not found.refused and found.test_accuracy is None
    model = (tmp_path / "model.onnx").read_bytes()
    bare = to_onnx(digits.graph.module, digits.data.input_shape)
    assert found.size_bytes == len(model) < 0.4 * len(bare)
    assert found.accuracy == onnx_accuracy(model, digits.data, digits.data.validation, 1) > 0.98
    entry = onnx.load_from_string(model).graph.input[0]
    assert entry.name == "pixels" and entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    (tmp_path / "model.onnx").write_bytes(b"kept")
    assert twin(digits, tmp_path) == found  # read back, not made again
    assert (tmp_path / "model.onnx").read_bytes() == b"kept"
    (tmp_path / "model.onnx").unlink()
    assert read_int8(tmp_path) is None


def test_a_twin_that_loses_too_much_is_refused(digits, tmp_path):
    found = twin(digits, tmp_path, max_loss=-0.5)  # it would have to gain 50 points
    assert "points of validation accuracy" in found.refused
    assert not (tmp_path / "model.onnx").exists() and read_int8(tmp_path) == found


@pytest.mark.parametrize(
    ("twin_latency", "kept"),
    [(FAST, True), (SLOW, False), (Latency(0.9, 0.7, 1.01, 0.4), False)],
)
def test_speed_is_judged_by_the_interval(twin_latency, kept, tmp_path):
    judged = judge_speed(FOUND, twin_latency, SLOW)
    assert (judged.refused == "") is kept
    if not kept:
        assert "is not faster" in judged.refused
    (tmp_path / "model.onnx").write_bytes(b"")
    save_int8(tmp_path, judged)
    assert (tmp_path / "model.onnx").exists() is kept
    assert read_int8(tmp_path) == judged


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose twins are kept, however slow the integer kernels of this machine are."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOODISTILL_CACHE", str(folder / "cache"))
        patch.setattr("moodistill.runs.finish.judge_speed", lambda result, *latencies: result)
        code, _ = call(
            "run", "--model", "digits", "--out", folder / "run", "--population", "4",
            "--generations", "1", "--finalists", "2", "--distill-steps", "3",
        )  # fmt: skip
        assert code == 0
        yield folder / "run"


def call(command, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run_tool(command, [str(a) for a in arguments])
    return code, out.getvalue()


def table(run):
    with open(run / "pareto.csv") as stream:
        return list(csv.DictReader(stream))


def test_twins_are_rows_of_the_front(run):
    rows = {row["student"]: row for row in table(run)}
    twins = [name for name in rows if name.endswith("-int8")]
    assert len(twins) == 2
    for name in twins:
        row, floating = rows[name], rows[name.removesuffix("-int8")]
        assert row["precision"] == "int8" and floating["precision"] == "fp32"
        assert row["parameters"] == floating["parameters"]
        assert int(row["size_bytes"]) < int(floating["size_bytes"])
        assert 0 < float(row["test_accuracy"]) <= 1 and int(row["latency_samples"]) == 64
        assert call("verify", (run / row["onnx"]).parent)[0] == 0
    assert call("choose", run, "--max-size-bytes", rows[twins[0]]["size_bytes"])[0] == 0


def test_export_of_a_twin(run, tmp_path, monkeypatch):
    row = next(r for r in table(run) if r["precision"] == "int8")
    code, text = call("export", run, row["student"], "--out", tmp_path / "a")
    assert code == 0 and "INT8" in text
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (run / row["onnx"]).read_bytes()
    name = row["student"].removesuffix("-int8")
    code, _ = call("export", run, name, "--int8", "--bare", "--out", tmp_path / "b")
    assert code == 0 and call("verify", tmp_path / "b")[0] == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["precision"] == "int8" and manifest["input"]["kind"] == "normalised"
    assert manifest["accuracy"]["validation"]["fraction"] == float(row["accuracy"])


def test_export_of_a_student_without_twin_is_judged_here(run, tmp_path, monkeypatch):
    finalists = {row["student"] for row in table(run) if row["stage"] == "distilled"}
    with Store.open(run, readonly=True) as store:
        names = [student_id(n) for n, e in store.numbered().items() if n > 0 and not e.failure]
    searched = next(name for name in names if name not in finalists)
    monkeypatch.setattr(
        "moodistill.runs.export.judge_speed", lambda result, *times: judge_speed(result, FAST, SLOW)
    )
    code, text = call("export", run, searched, "--int8", "--out", tmp_path / "a")
    assert code == 0 and call("verify", tmp_path / "a")[0] == 0, text
    monkeypatch.setattr(
        "moodistill.runs.export.judge_speed", lambda result, *times: judge_speed(result, SLOW, FAST)
    )
    code, text = call("export", run, searched, "--int8", "--out", tmp_path / "b")
    assert code == 2 and "is not faster" in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "b" / "model.onnx").exists()
    stored = json.loads((run / "run.json").read_text())
    stored["device"]["cpu"] = "another"
    (run / "run.json").write_text(json.dumps(stored))
    code, text = call("export", run, searched, "--int8", "--out", tmp_path / "c")
    assert code == 2 and "cannot be judged here" in text
