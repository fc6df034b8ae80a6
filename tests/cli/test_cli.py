"""The commands as a user types them: a whole run on the digits, then choosing and exporting."""

import copy
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import ROOT, TINY
from helpers.small import SMALL

from moodistill.storage.lock import writer_lock


def distilled(folder):
    """The float finalists."""
    return [r for r in rows(folder) if r["stage"] == "distilled" and r["precision"] == "fp32"]


def rows(folder):
    with open(folder / "pareto.csv") as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_what_is_documented(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "finished" and run["config"]["model"] == "digits"
    assert run["teacher_digest"] and run["data_digest"] and run["device"]
    # A student needs two fifths of the way from chance (ten classes) to the teacher.
    teacher = float(next(r for r in rows(finished) if r["stage"] == "teacher")["accuracy"])
    floor = run["config"]["search"]["limits"]["min_accuracy"]
    assert floor == pytest.approx(0.1 + 0.4 * (teacher - 0.1), abs=1e-3)
    for name in (
        "pareto.json", "pareto.png", "history.png", "evaluations.sqlite", "report.html",
        "layout.json", f"structure-{distilled(finished)[0]['student']}.png",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0
    table = rows(finished)
    assert [row["stage"] for row in table].count("teacher") == 1
    finalists = [row for row in table if row["stage"] == "distilled"]
    assert [row["precision"] for row in finalists].count("fp32") == 2
    for row in table:
        assert 0 <= float(row["accuracy"]) <= 1
        if row["precision"] == "fp32":
            assert 0 <= float(row["search_accuracy"]) <= 1
        else:  # a twin that was fast enough here; it was never searched
            assert row["search_accuracy"] == ""
        assert int(row["parameters"]) > 0 and float(row["latency_ms"]) > 0
    for row in finalists:
        assert 0 <= float(row["test_accuracy"]) <= 1
        assert (finished / row["onnx"]).stat().st_size == int(row["size_bytes"])
    assert all(row["test_accuracy"] == "" for row in table if row["stage"] == "searched")


def test_evaluations_are_stored_with_raw_samples(finished):
    with sqlite3.connect(f"file:{finished / 'evaluations.sqlite'}?mode=ro", uri=True) as store:
        assert store.execute("select count(*) from evaluations").fetchone()[0] == 12
        assert store.execute("select count(*) from generations").fetchone()[0] == 2


def test_exported_student_runs_in_onnx_runtime(finished):
    from moodistill.data.digits import load_digits

    data = load_digits()
    for row in rows(finished):
        if row["stage"] == "distilled":
            session = onnxruntime.InferenceSession(finished / row["onnx"])
            pixels = data.validation.images.transpose(0, 3, 1, 2)
            (logits,) = session.run(None, {"pixels": pixels})
            reached = (logits.argmax(1) == data.validation.labels).mean()
            assert reached == pytest.approx(float(row["accuracy"]), abs=1 / 350)


def test_choose_and_export(finished, call, tmp_path):
    text = call("choose", finished, "--knee").stdout
    assert "against the teacher" in text and "moodistill export" in text
    chosen = json.loads(call("choose", finished, "--max-params", "1e9", "--json").stdout)
    best = max(
        (r for r in rows(finished) if r["stage"] == "distilled"), key=lambda r: float(r["accuracy"])
    )
    assert float(chosen["student"]["accuracy"]) == float(best["accuracy"])
    call("choose", finished, "--weights", "accuracy=1,latency=2,params=0.5")
    name = chosen["student"]["student"]
    call("export", finished, name, "--out", tmp_path / "ship")
    assert "as expected" in call("verify", tmp_path / "ship").stdout
    assert (tmp_path / "ship" / "model.onnx").read_bytes() == (
        finished / "students" / name / "model.onnx"
    ).read_bytes()
    before = (tmp_path / "ship" / "model.onnx").stat().st_mtime_ns
    again = call("export", finished, name, "--out", tmp_path / "ship", code=2)
    assert "exists" in again.stderr
    assert (tmp_path / "ship" / "model.onnx").stat().st_mtime_ns == before
    searched = next(r["student"] for r in rows(finished) if r["stage"] == "searched")
    call("export", finished, searched, "--out", tmp_path / "searched")


def test_resume_of_a_finished_run_changes_nothing_but_carries_on(finished, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = rows(folder)
    done = call("run", "--resume", folder)
    assert "12 from the store" in done.stdout + done.stderr
    assert rows(folder) == before
    onnx = [r["onnx"] for r in before if r["onnx"]]
    assert all((folder / o).read_bytes() == (finished / o).read_bytes() for o in onnx)


LONG = ["--model", "digits", "--population", "6", "--generations", "50", "--finalists", "1",
        "--distill-steps", "5", "--seeded", "0", "--simd-step", "8", "--torch-threads", "1"]  # fmt: skip


def start_long_run(folder, cache, arguments=()):
    """A run of many generations; returns once it has scored some students."""
    process = subprocess.Popen(
        [sys.executable, SMALL, ROOT / "scripts/run_nsga.py", "--out", folder, *LONG, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "MOODISTILL_CACHE": str(cache)},
        # A background job may inherit an ignored SIGINT; a terminal's program does not.
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL)
                            for s in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    wait_for_students(folder)
    return process


def wait_for_students(folder):
    database = folder / "evaluations.sqlite"
    for _ in range(1200):
        time.sleep(0.1)
        if database.exists():
            try:
                with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
                    if store.execute("select count(*) from evaluations").fetchone()[0] >= 8:
                        break
            except sqlite3.OperationalError:
                pass


def assert_stopped(folder, call):
    table = rows(folder)
    assert table[0]["stage"] == "teacher" and len(table) > 1
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert (folder / "report.html").is_file()
    chosen = json.loads(call("choose", folder, "--json").stdout)
    assert chosen["student"]["stage"] == "searched"


@pytest.mark.parametrize("stop", ["SIGINT", "SIGHUP"])
def test_a_stopped_run_keeps_what_was_found(call, driver, tmp_path, stop):
    folder = tmp_path / "run"
    started = driver.start("run", "--out", folder, *LONG)
    wait_for_students(folder)
    os.kill(started[0], getattr(signal, stop))
    done = driver.wait(started)
    assert done.code == 130, done.stderr
    assert "Traceback" not in done.stderr and "--resume" in done.stdout + done.stderr
    assert_stopped(folder, call)


def test_a_script_that_a_service_manager_stops_keeps_what_was_found(call, cache, tmp_path):
    folder = tmp_path / "run"
    process = start_long_run(folder, cache)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "--resume" in out + error
    assert_stopped(folder, call)


def test_a_run_whose_output_nobody_reads_any_more_keeps_what_was_found(call, cache, tmp_path):
    """As in `moodistill run ... | head`."""
    folder = tmp_path / "run"
    process = start_long_run(folder, cache, ["--progress", "json"])
    process.stdout.close()
    assert process.wait(120) == 130
    error = process.stderr.read()
    assert "Traceback" not in error and "Exception ignored" not in error and "--resume" in error
    assert_stopped(folder, call)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vgg17"], "unknown model"),
        (["--model", "digits", "--population", "0"], "--population is 0"),
        (["--model", "digits", "--population", "3"], "population 3"),
        (["--model", "digits", "--preset", "best"], "unknown preset"),
        (["--model", "digits", "--connections", "merges,edges"], "'edges'"),
        ([], "which network"),
        (["--resume", "no/such/run"], "no/such/run"),
        (["--model", "digits", "--student", "s0001"], "give --resume RUN too"),
        (["--model", "digits", "--weights", "no.safetensors"], "no.safetensors"),
        (["--model", "digits", "--weights", "README.md"], "README.md"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "README.md").write_text("no weights\n")
    monkeypatch.chdir(tmp_path)
    done = call("run", *arguments, code=2)
    assert words in done.stderr
    assert not (tmp_path / "results").exists()


def test_an_existing_run_is_never_overwritten(finished, call):
    before = (finished / "run.json").read_bytes()
    done = call("run", "--model", "digits", "--out", finished, *TINY, code=2)
    assert "resume it, or give another --out" in done.stderr
    assert (finished / "run.json").read_bytes() == before


def test_bad_choices_and_exports_are_one_line(finished, call, tmp_path):
    assert (
        "unknown student"
        in call("export", finished, "s9999", "--out", tmp_path / "x", code=2).stderr
    )
    assert not (tmp_path / "x").exists()
    assert "0.0001" in call("choose", finished, "--max-latency-ms", "0.0001", code=2).stderr
    call("choose", tmp_path, code=2)
    call("export", tmp_path, "s0001", "--out", tmp_path / "x", code=2)


def test_teacher_of_another_architecture_is_refused(call, tmp_path):
    import torch

    from moodistill.io.tensorfile import save_atomic

    save_atomic({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    done = call(
        "run", "--model", "digits", "--weights", tmp_path / "other.safetensors",
        "--out", tmp_path / "run", code=2,
    )  # fmt: skip
    assert "does not fit DigitsNet" in done.stderr and not (tmp_path / "run").exists()


def test_export_that_disagrees_with_torch_leaves_no_file(tmp_path, monkeypatch):
    from moodistill.bundle import parity as export
    from moodistill.data.digits import load_digits
    from moodistill.errors import UserError
    from moodistill.teacher.graph import trace
    from moodistill.teacher.task import load_task

    student = trace(load_task("digits").build(), (1, 32, 32)).module
    honest = export.to_onnx

    def wrong(module, shape, opset):
        import onnx
        from onnx import numpy_helper

        model = onnx.load_from_string(honest(module, shape, opset))
        tensor = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
        values = numpy_helper.to_array(tensor) + 0.05
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(export, "to_onnx", wrong)
    with pytest.raises(UserError, match="was not written"):
        origin = export.Origin("digits", "", b"")
        export.export_onnx(student, load_digits(), origin, tmp_path / "model.onnx", images=50)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_goes_on_with_a_larger_budget(finished, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    done = call("run", "--resume", folder, "--generations", "3", "--finalists", "3")
    assert "18 evaluated (12 from the store)" in done.stdout
    with sqlite3.connect(f"file:{folder / 'evaluations.sqlite'}?mode=ro", uri=True) as store:
        assert store.execute("select count(*) from evaluations").fetchone()[0] == 18
    assert len(distilled(folder)) >= 3
    fewer = call("run", "--resume", folder, "--generations", "1", code=2)
    assert "3 finished generations" in fewer.stderr
    assert len(rows(folder)) > 3


def test_a_student_chosen_by_eye_is_distilled_and_the_others_stay(finished, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = {row["student"]: row for row in distilled(folder)}
    name = next(row["student"] for row in rows(folder) if row["stage"] == "searched")
    config = json.loads((folder / "run.json").read_text())["config"]
    done = call("run", "--resume", folder, "--student", name, "--distill-steps", "8")
    assert f"{name}: validation accuracy" in done.stdout and "after 8 steps" in done.stdout
    after = {row["student"]: row for row in distilled(folder)}
    assert set(after) == {*before, name}
    assert all(after[n]["test_accuracy"] == row["test_accuracy"] for n, row in before.items())
    stored = json.loads((folder / "run.json").read_text())
    assert stored["config"] == config and stored["status"] == "finished"
    assert (folder / f"structure-{name}.png").exists()
    # The run itself goes on without it and keeps it.
    call("run", "--resume", folder)
    assert set(after) == {row["student"] for row in distilled(folder)}


def test_a_search_that_goes_on_and_is_stopped_shows_what_it_found(
    finished, call, tmp_path, monkeypatch
):
    from moodistill.runs import run

    def stops(*arguments, **keywords):
        raise KeyboardInterrupt

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(run, "finish", stops)
    call("run", "--resume", folder, "--generations", "3", code=130)
    # Of the whole search: the front of those that were measured again would hide what is new.
    table = [row for row in rows(folder) if row["stage"] != "teacher"]
    assert table and all(row["latency_ms"] == row["search_latency_ms"] for row in table)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def shipped(folder):
    """The table and all students' files."""
    paths = [folder / "pareto.csv", *(folder / "students").rglob("*")]
    return {p.relative_to(folder): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt, 130), (FloatingPointError("nan"), 2)]
)
def test_a_student_that_is_not_distilled_leaves_the_run_as_it_was(
    finished, call, tmp_path, monkeypatch, error, code
):
    from moodistill.finalists import distil as finalists

    def stops(*arguments, **keywords):
        raise error

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = shipped(folder)
    monkeypatch.setattr(finalists, "distill", stops)
    name = distilled(folder)[0]["student"]
    done = call("run", "--resume", folder, "--student", name, "--distill-steps", "9", code=code)
    assert "Traceback" not in done.stderr
    assert shipped(folder) == before
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_the_first_of_two_students_stays_where_the_second_fails(
    finished, call, tmp_path, monkeypatch
):
    from moodistill.finalists import distil as finalists

    real, seen = finalists.distill, []

    def fails(*arguments, **keywords):
        seen.append(1)
        if len(seen) == 2:
            raise FloatingPointError("nan")
        return real(*arguments, **keywords)

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    twins = [row["student"] for row in rows(folder) if row["precision"] == "int8"]
    good = next(row["student"] for row in rows(folder) if row["stage"] == "searched")
    bad = distilled(folder)[0]
    monkeypatch.setattr(finalists, "distill", fails)
    words = ["--student", good, "--student", bad["student"], "--distill-steps", "9"]
    done = call("run", "--resume", folder, *words, code=2)
    assert f"{bad['student']} was not distilled (nan)" in done.stderr
    after = {row["student"]: row for row in rows(folder)}
    assert after[good]["stage"] == "distilled" and after[bad["student"]] == bad
    assert set(twins) <= set(after)
    for path in (folder / "students").glob("*/manifest.json"):
        call("verify", path.parent)
    # The same command again does what is missing.
    monkeypatch.setattr(finalists, "distill", real)
    call("run", "--resume", folder, *words)
    assert {good, bad["student"]} <= {row["student"] for row in distilled(folder)}


def test_a_longer_distillation_that_is_worse_keeps_the_earlier_weights(
    finished, call, tmp_path, monkeypatch
):
    from moodistill.finalists import distil as finalists

    def spoils(student, *arguments):
        spoilt = copy.deepcopy(student)
        with torch.no_grad():
            for parameter in spoilt.parameters():
                parameter.zero_()
        return spoilt

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    name = min(distilled(folder), key=lambda row: float(row["search_accuracy"]))["student"]
    path = folder / "students" / name / "result.json"
    before, weights = json.loads(path.read_text()), (path.parent / "model.onnx").read_bytes()
    monkeypatch.setattr(finalists, "distill", spoils)
    monkeypatch.setattr(finalists, "inherited_accuracy", lambda *_: 0.5)
    call("run", "--resume", folder, "--student", f"{name}-int8", "--distill-steps", "9")
    after = json.loads(path.read_text())
    assert after == {**before, "budget": {**before["budget"], "steps": 9}}
    assert (path.parent / "model.onnx").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student", "s9999"], "no student 's9999'"),
        (["--student", "s0001", "--generations", "3"], "leave out --generations"),
    ],
)
def test_a_student_that_is_none_is_one_line(finished, call, arguments, words):
    before = (finished / "run.json").read_bytes()
    assert words in call("run", "--resume", finished, *arguments, code=2).stderr
    assert (finished / "run.json").read_bytes() == before


def test_students_of_a_search_that_has_not_ended(finished, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    run = json.loads((folder / "run.json").read_text())
    run["config"]["search"]["generations"], run["status"] = 3, "interrupted"
    (folder / "run.json").write_text(json.dumps(run))
    done = call("run", "--resume", folder, "--student", rows(folder)[1]["student"], code=2)
    assert "has not ended" in done.stderr


def test_a_finalist_that_fails_costs_itself_only(call, tmp_path, monkeypatch):
    from moodistill.finalists import distil as finalists

    real, seen = finalists.distill, []

    def diverges(*arguments, **keywords):
        seen.append(1)
        if len(seen) == 1:
            raise FloatingPointError("the distillation loss became nan at step 3")
        return real(*arguments, **keywords)

    monkeypatch.setattr(finalists, "distill", diverges)
    done = call("run", "--model", "digits", "--out", tmp_path / "run", *TINY)
    assert "was not distilled (the distillation loss became nan" in done.stdout
    assert len(distilled(tmp_path / "run")) == 1


def test_a_latency_that_cannot_be_confirmed_loses_nothing(call, tmp_path, monkeypatch):
    from moodistill.latency.meter import LatencyError, LatencyMeter

    def dies(*arguments, **keywords):
        raise LatencyError("the latency worker died (exit code -9)")

    monkeypatch.setattr(LatencyMeter, "confirm", dies)
    done = call("run", "--model", "digits", "--out", tmp_path / "run", *TINY, code=2)
    assert "was not confirmed" in done.stderr and "--resume" in done.stderr
    assert len(distilled(tmp_path / "run")) == 2
    monkeypatch.undo()
    assert "12 from the store" in call("run", "--resume", tmp_path / "run").stdout


def test_a_teacher_that_cannot_be_timed_is_one_line(call, tmp_path, monkeypatch):
    from moodistill.runs import backend as scoring

    monkeypatch.setattr(scoring, "teacher_onnx", lambda context: b"no model")
    done = call("run", "--model", "digits", "--out", tmp_path / "run", *TINY, code=2)
    assert "the teacher cannot be timed" in done.stderr


def test_the_front_is_that_of_the_second_measurement(finished):
    record = json.loads((finished / "confirmed.json").read_text())
    table = [row for row in rows(finished) if row["stage"] != "teacher"]
    for row in table:
        again = record["students"][row["student"]]
        assert float(row["latency_ms"]) == again["latency_ms"]
        assert len(again["samples_ms"]) == int(row["latency_samples"]) == 64
        assert float(row["latency_ms_p90"]) > 0
    run = json.loads((finished / "run.json").read_text())
    assert set(run["changed_by_confirmation"]) == {"lost", "gained"}
    assert run["rejected_latency_windows"] >= record["rejected_windows"] >= 0
    searched = {row["student"] for row in table if row["precision"] == "fp32"}
    lost = set(run["changed_by_confirmation"]["lost"])
    assert all(row["stage"] == "distilled" for row in table if row["student"] in lost & searched)


def test_finalists_are_shipped_folders(finished, call):
    for row in rows(finished):
        if row["onnx"]:
            folder = (finished / row["onnx"]).parent
            assert "as expected" in call("verify", folder).stdout
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["accuracy"]["test"]["fraction"] == float(row["test_accuracy"])
            assert manifest["latency"]["median_ms"] == float(row["latency_ms"])
            assert manifest["precision"] == row["precision"]


def test_export_forms(finished, call, tmp_path):
    name = distilled(finished)[0]["student"]
    for kind, options in {
        "float32": ["--float32", "--softmax"], "normalised": ["--bare"], "uint8": []
    }.items():  # fmt: skip
        call("export", finished, name, "--out", tmp_path / kind, *options)
        manifest = json.loads((tmp_path / kind / "manifest.json").read_text())
        assert manifest["input"]["kind"] == kind
        assert manifest["output"] == ("probabilities" if "--softmax" in options else "logits")
        call("verify", tmp_path / kind)


def test_export_of_a_searched_student(finished, call, tmp_path):
    with sqlite3.connect(f"file:{finished / 'evaluations.sqlite'}?mode=ro", uri=True) as store:
        count = store.execute("select count(*) from evaluations").fetchone()[0]
    ids = {f"s{n:04d}" for n in range(1, count)} - {row["student"] for row in rows(finished)}
    name = min(ids)  # neither a finalist nor on the front
    call("export", finished, name, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "searched" and manifest["accuracy"]["test"] is None
    assert manifest["accuracy"]["validation"]["images"] == 350


def test_export_without_the_distilled_weights(finished, call, tmp_path):
    """They are nowhere else: inherited ones under the accuracy of distilled ones were a lie."""
    run = shutil.copytree(finished, tmp_path / "run")
    name = distilled(run)[0]["student"]
    (run / "students" / name / "student.safetensors").unlink()
    done = call("export", run, name, "--out", tmp_path / "out", code=2)
    assert "distilled weights" in done.stderr and "is a bundle" in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_teacher(finished, call, tmp_path):
    """A student that was not distilled inherits from the teacher: it must be the run's."""
    from moodistill.io.tensorfile import save_atomic
    from moodistill.teacher.task import load_task
    from moodistill.teacher.weights import load_weights

    searched = next(r["student"] for r in rows(finished) if r["stage"] == "searched")
    task = load_task("digits")
    other = load_weights(task.build(), task.weights)
    other.output.weight.data *= 1.5
    save_atomic(dict(other.state_dict()), tmp_path / "other.safetensors")
    given = ["--weights", tmp_path / "other.safetensors"]
    done = call("export", finished, searched, "--out", tmp_path / "out", *given, code=2)
    assert "another teacher: " in done.stderr and "other.safetensors has digest" in done.stderr
    assert not (tmp_path / "out" / "model.onnx").exists()
    call("export", finished, searched, "--out", tmp_path / "out", "--weights", task.weights)


def test_a_run_that_stops_for_a_reason_says_so_in_its_record(call, tmp_path, monkeypatch):
    from moodistill.latency.meter import LatencyError, LatencyMeter

    monkeypatch.setattr(
        LatencyMeter, "measure", lambda *_: (_ for _ in ()).throw(LatencyError("no answer"))
    )
    folder = tmp_path / "run"
    done = call("run", "--model", "digits", "--out", folder, *TINY, code=2)
    assert "the teacher itself could not be scored" in done.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"


def test_resume_refuses_other_settings(finished, call):
    before = (finished / "run.json").read_bytes()
    done = call("run", "--resume", finished, "--seed", "5", "--population", "9", code=2)
    assert "seed 0, not 5" in done.stderr and "population 6, not 9" in done.stderr
    done = call("run", "--resume", finished, "--no-int8", "--threads", "1", code=2)
    assert "int8_twins True, not False" in done.stderr and "threads" not in done.stderr
    done = call("run", "--resume", finished, "--connections", "none", code=2)
    assert "connections blocks,merges,bypasses, not none" in done.stderr
    options = ["--keep", "hidden", "--min-width", "hidden=16", "--max-macs", "1e6"]
    done = call("run", "--resume", finished, *options, "--opaque", "conv1", code=2)
    for difference in ("keep none, not hidden", "min_width none, not hidden=16", "max_macs none"):
        assert difference in done.stderr
    assert "opaque none, not conv1" in done.stderr
    options = ["--connections", "bypasses,merges,blocks", "--seed", "5"]
    done = call("run", "--resume", finished, *options, code=2)
    assert "seed" in done.stderr and "connections" not in done.stderr  # their order is nothing
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize("part", ["cpu", "simd"])
def test_latencies_of_two_processors_are_not_mixed(finished, call, tmp_path, part):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run = json.loads((folder / "run.json").read_text())
    for device in (run["device"], *run["devices"].values()):
        device[part] = "another"
    (folder / "run.json").write_text(json.dumps(run))
    before = (folder / "run.json").read_bytes()
    for options in ((), ("--generations", "3"), ("--student", distilled(folder)[0]["student"])):
        done = call("run", "--resume", folder, *options, code=2)
        assert "cannot be mixed" in done.stderr and part in done.stderr
        assert (folder / "run.json").read_bytes() == before


def test_a_start_does_not_touch_what_another_has_begun(call, tmp_path):
    """The folder looks empty while the first one still calibrates."""
    (tmp_path / "run").mkdir()
    with writer_lock(tmp_path / "run"):
        done = call("run", "--model", "digits", "--out", tmp_path / "run", *TINY, code=2)
    assert "is being written by process" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_changed_forward_is_not_carried_on(call, tmp_path):
    """The weights, and so their digest, are the same."""
    (tmp_path / "mine.py").write_text("from problems.digits import TASK\n")
    model = ["--model", tmp_path / "mine.py", "--out", tmp_path / "run", "--no-int8"]
    tiny = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2"]
    call("run", *model, *tiny)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nimport torch\nfrom problems.digits import TASK, DigitsNet\n"
        "class Other(DigitsNet):\n"
        "    def forward(self, x):\n        return super().forward(torch.relu(x))\n"
        "TASK = replace(TASK, build=Other)\n"
    )
    name = distilled(tmp_path / "run")[0]["student"]
    done = call("run", "--resume", tmp_path / "run", "--student", name, code=2)
    assert "another network of the same weights" in done.stderr


def test_an_interrupted_distillation_of_a_finished_run_loses_no_row(
    finished, call, tmp_path, monkeypatch
):
    from moodistill.finalists import distil as finalists

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = rows(folder)
    assert any(row["precision"] == "int8" for row in before)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finalists, "distill", interrupted)
    call("run", "--resume", folder, "--distill-steps", "500", code=130)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert rows(folder) == before


def test_export_says_what_the_weights_reach_not_what_the_table_did(finished, call, tmp_path):
    """Distilled since the table was written, or killed before it was."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    name = distilled(folder)[0]["student"]
    result = json.loads((folder / "students" / name / "result.json").read_text())
    table = json.loads((folder / "pareto.json").read_text())
    for row in table:
        if row["student"] == name:
            row["stage"] = "searched"
    kept = [row for row in table if row["student"] != f"{name}-int8"]
    (folder / "pareto.json").write_text(json.dumps(kept))
    call("export", folder, name, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "distilled"
    assert manifest["accuracy"]["test"]["fraction"] == result["test_accuracy"]
    (folder / "students" / name / "result.json").unlink()
    done = call("export", folder, name, "--out", tmp_path / "other", code=2)
    assert "was interrupted; continue with --resume" in done.stderr


def test_a_least_accuracy_that_is_given_is_kept(call, tmp_path):
    """Below the one that a run sets itself, too; and a resume takes it as it was given."""
    folder, given = tmp_path / "run", ("--min-accuracy", "0.2")
    tiny = ("--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2")
    done = call("run", "--model", "digits", "--out", folder, *tiny, "--no-int8", *given)
    assert "students below accuracy 0.2000 are infeasible" in done.stdout
    stored = json.loads((folder / "run.json").read_text())
    assert stored["config"]["search"]["limits"]["min_accuracy"] == 0.2
    call("run", "--resume", folder, *given)
    assert (
        "min_accuracy 0.2, not 0.1"
        in call("run", "--resume", folder, "--min-accuracy", "0.1", code=2).stderr
    )


def test_provider_that_is_not_installed(call, tmp_path):
    done = call(
        "run", "--model", "digits", "--provider", "NoExecutionProvider", "--out", tmp_path / "r",
        code=2,
    )  # fmt: skip
    assert "CPUExecutionProvider" in done.stderr and not (tmp_path / "r").exists()


def test_clean(finished, call, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    kept = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    (folder / ".run.json.7.tmp").write_text("half")
    (folder / "students" / "s9999").mkdir()
    (folder / "students" / "s9999" / "student.safetensors").write_text("half")
    assert "2 files" in call("clean", folder).stdout
    left = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert {p for p in kept if "sqlite" not in p.name} == {
        p for p in left if "sqlite" not in p.name
    }
    assert "nothing to clean" in call("clean", code=2).stderr
    assert "not a run" in call("clean", tmp_path, code=2).stderr


def test_interrupted_in_its_last_stage_a_run_keeps_the_second_measurement(
    call, tmp_path, monkeypatch
):
    from moodistill.runs import run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "score_front", interrupted)
    folder = tmp_path / "run"
    arguments = ["--model", "digits", "--out", folder, "--simd-step", "8", "--no-int8", *TINY]
    call("run", *arguments, code=130)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    confirmed = json.loads((folder / "confirmed.json").read_text())["students"]
    students = [row for row in rows(folder) if row["stage"] != "teacher"]
    assert students
    for row in students:
        assert float(row["latency_ms"]) == confirmed[row["student"]]["latency_ms"]
        assert row["latency_samples"] == "64"
