"""The three endings of a run, each with what is written; and rows of what was measured again."""

import contextlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moodistill.config import RunConfig
from moodistill.errors import UnfinishedRun, UserError
from moodistill.finalists.confirm import Confirmed, read_confirmed, still_confirmed
from moodistill.latency.meter import LatencyError
from moodistill.pareto.evaluation import Latency
from moodistill.pareto.table import read_front
from moodistill.runs import run
from moodistill.runs.accuracies import Accuracies
from moodistill.runs.backend import HERE
from moodistill.runs.rows import make_rows
from moodistill.storage.folder import read_run
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store

STAGES = ("announce", "search", "usable_students", "finish", "score_front")
CONFIRMED = Confirmed({"s1": "ab"}, {"s1": Latency(1.0, 0.9, 1.1, 0.5)})


class Closed:
    """A reporter whose terminal is gone."""

    def close(self):
        raise OSError("gone")


def ended(folder, monkeypatch, stage=None, error=None, students=()):
    """What is written, and raised, where a stage raises an error; and the stages that began."""
    began, written = [], []

    def make(name):
        def do(*_):
            began.append(name)
            if name == stage:
                raise error
            return CONFIRMED if name == "finish" else None

        return do

    for name in STAGES:
        monkeypatch.setattr(run, name, make(name))
    monkeypatch.setattr(run, "write_results", lambda _, *what: written.append(what))
    (folder / "run.json").write_text('{"status": "running"}')
    session = SimpleNamespace(
        folder=folder, students=students, reporter=Closed(), store=[1, 2], tell=lambda text: None,
        timed=lambda stage: contextlib.nullcontext(),
    )  # fmt: skip
    raised = None
    try:
        run.execute(session)
    except BaseException as caught:
        raised = caught
    return written, raised, began


def test_finished(tmp_path, monkeypatch):
    assert ended(tmp_path, monkeypatch) == ([("finished", CONFIRMED)], None, list(STAGES))


def test_students_of_an_ended_search_are_not_searched_for(tmp_path, monkeypatch):
    _, _, began = ended(tmp_path, monkeypatch, students=("s1",))
    assert began == [name for name in STAGES if name != "search"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError()])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted(tmp_path, monkeypatch, stage, error):
    written, raised, began = ended(tmp_path, monkeypatch, stage, error)
    known = CONFIRMED if stage == "score_front" else Confirmed()
    assert written == [("interrupted", known)] and isinstance(raised, KeyboardInterrupt)
    assert began[-1] == stage


def test_stopped_because_latencies_were_not_confirmed(tmp_path, monkeypatch):
    error = LatencyError("the worker died")
    written, raised, _ = ended(tmp_path, monkeypatch, "finish", error)
    assert written == [("stopped", Confirmed())]
    assert isinstance(raised, UnfinishedRun) and raised.folder == tmp_path
    assert "not confirmed (the worker died)" in str(raised) and "--" not in str(raised)
    _, raised, _ = ended(tmp_path, monkeypatch, "finish", error, ("s1",))
    assert type(raised) is UserError and "the same command" in str(raised)


def test_stopped_for_a_reason_before_anything_was_found(tmp_path, monkeypatch):
    written, raised, _ = ended(tmp_path, monkeypatch, "search", UserError("eight failures"))
    assert written == [] and str(raised) == "eight failures"
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"


def test_a_student_that_fails_leaves_rows(tmp_path, monkeypatch):
    written, raised, _ = ended(tmp_path, monkeypatch, "finish", UserError("nan"), ("s1",))
    assert written == [("stopped", Confirmed())] and str(raised) == "nan"


@pytest.fixture
def again(recorded_run):
    """A finished run's folder, its students and what was measured again."""
    config = RunConfig.read(recorded_run).search
    with Store.open(recorded_run, readonly=True) as store:
        searched = Searched.read(store, config.limits, config.objectives)
    return recorded_run, searched, read_confirmed(recorded_run)


def rows_of(again, confirmed):
    folder, searched, _ = again
    known = Accuracies(folder / "accuracies.json").known
    return make_rows(folder, searched, known, confirmed, read_run(folder)["teacher_latency_ms"])


def test_rows_are_those_in_the_table(again):
    folder, _, confirmed = again
    assert rows_of(again, confirmed) == read_front(folder)
    assert still_confirmed(*again[:2]).latencies == confirmed.latencies != {}


def test_rows_have_the_times_on_devices_that_were_measured(again):
    confirmed = again[2]
    name = rows_of(again, confirmed)[1].student
    times = {name: replace(confirmed.latencies[name], latency_ms=7.0)}
    rows = rows_of(again, replace(confirmed, devices={"phone": times}))
    assert {row.student: dict(row.on_devices) for row in rows if row.on_devices} == {
        "teacher": {HERE: 1.25}, name: {"phone": 7.0}
    }  # fmt: skip


@pytest.mark.parametrize("value", ["x", -1, 1e300, None])
def test_a_damaged_confirmation_is_made_again(again, tmp_path, value):
    shutil.copy(again[0] / "confirmed.json", tmp_path)
    record = json.loads((tmp_path / "confirmed.json").read_text())
    next(iter(record["students"].values()))["latency_ms"] = value
    (tmp_path / "confirmed.json").write_text(json.dumps(record))
    assert read_confirmed(tmp_path) == Confirmed()
