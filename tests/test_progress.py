"""What a run says: plain, JSON, quiet, live."""

import io
import json
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, TINY

from moodistill.errors import UserError
from moodistill.progress import (
    JsonReporter,
    LiveReporter,
    Percents,
    QuietReporter,
    Reporter,
    TensorBoardReporter,
    make_reporter,
)


def speak(reporter):
    with reporter.stage("searching", 4, "student") as stage:
        stage.update(2, front=1)
        reporter.say("half of it", done=2)
        reporter.table(lambda: (["student", "ms"], [["s0001", "0.5"]]))
        stage.update(4, front=2)
    reporter.close()
    return reporter.stream.getvalue()


def test_plain_lines_for_a_log():
    assert speak(Reporter(io.StringIO())) == "half of it\n"
    assert speak(QuietReporter(io.StringIO())) == ""


def test_json_lines():
    lines = [json.loads(line) for line in speak(JsonReporter(io.StringIO())).splitlines()]
    assert [line["event"] for line in lines] == ["begin", "progress", "message", "progress", "end"]
    assert lines[0]["total"] == 4 and lines[1]["front"] == 1 and lines[3]["done"] == 4
    assert lines[2]["text"] == "half of it" and all(line["time"] > 0 for line in lines)


def test_live_display_starts_with_the_first_stage():
    stream = io.StringIO()
    LiveReporter(stream)  # bad input may end the run now: the terminal is as it was
    assert stream.getvalue() == ""


def test_live_display_shows_all():
    text = speak(LiveReporter(io.StringIO()))
    assert "half of it" in text


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("json", JsonReporter), ("quiet", QuietReporter), ("plain", Reporter), ("auto", Reporter)],
)
def test_modes(mode, kind):
    assert type(make_reporter(mode)) is kind  # not a terminal here


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_names_that_the_terminal_cannot_print(mode):
    code = (
        "from moodistill.progress import make_reporter;"
        f"make_reporter({mode!r}).say('classes: caf\\xe9, \\u65e5')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    text = done.stdout.decode("latin-1")
    if mode == "json":
        assert json.loads(text)["text"] == "classes: café, 日"
    else:
        assert text == "classes: café, \\u65e5\n"


def run(cache, folder, **streams):
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/run_nsga.py", "--model", "digits", "--out", folder, *TINY,
         "--no-int8"],
        env={**os.environ, "MOODISTILL_CACHE": str(cache), "TERM": "xterm"}, **streams,
    )  # fmt: skip


def test_a_terminal_gets_a_live_display_and_files_no_colours(cache, tmp_path):
    master, slave = pty.openpty()
    with open(tmp_path / "out.txt", "w") as out:
        process = run(cache, tmp_path / "live", stdout=out, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0
    assert b"\x1b[" in shown and b"x faster" in shown and b"generation 2" in shown
    text = (tmp_path / "out.txt").read_text()
    assert "\x1b" not in text and "choose a student" in text


def test_json_of_a_run(call, tmp_path):
    done = call(
        "run", "--model", "digits", "--out", tmp_path / "run", *TINY, "--no-int8", "--json",
        "--tensorboard", tmp_path / "board",
    )  # fmt: skip
    assert done.stderr == ""
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1] == {"event": "finished", "run": str(tmp_path / "run")}
    assert sum(e["event"] == "progress" and e["stage"] == "searching" for e in events) == 12
    measured = [e for e in events if e["event"] == "measured"]
    assert [e["step"] for e in measured] == [6, 12] and measured[1]["hypervolume"] > 0
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path / "board"))
    accumulator.Reload()
    assert [e.step for e in accumulator.Scalars("hypervolume")] == [6, 12]


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard"):
        TensorBoardReporter(Reporter(io.StringIO()), tmp_path)


def test_a_stage_of_very_many_steps_is_told_by_percents():
    told = []
    stage = SimpleNamespace(update=told.append)
    bar = Percents(stage, 1000)
    for done in range(1, 1001):
        bar.update(done)
    assert told == list(range(10, 1001, 10))
