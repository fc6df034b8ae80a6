"""Trainings pause while something is timed."""

import io
import os
import threading
import time
from dataclasses import replace

import pytest
from filelock import FileLock, Timeout

from moodistill.data.digits import load_digits
from moodistill.io.measuring import MEASURING, STEP, measuring, training_step
from moodistill.latency import meter as latency
from moodistill.progress import Reporter
from moodistill.teacher.task import TrainConfig, load_task
from moodistill.training.teacher import train_teacher


def held(path):
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


class Steps(Reporter):
    def __init__(self):
        super().__init__(io.StringIO())
        self.steps = 0

    def update(self, stage, done, facts):
        self.steps += 1


def test_training_waits_while_something_is_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))
    digits = load_digits()
    data = replace(
        digits, train=digits.train.head(64), validation=digits.validation.head(20),
        test=digits.test.head(20),
    )  # fmt: skip
    task = replace(load_task("digits"), train=TrainConfig(phases=((1, 32),), batch_size=32))
    reporter, found = Steps(), {}

    def train():
        found.update(train_teacher(task, data, tmp_path / "t.safetensors", reporter=reporter))

    thread = threading.Thread(target=train)
    with measuring():
        thread.start()
        time.sleep(3.0)
        assert reporter.steps == 0 and thread.is_alive()
    thread.join(60)
    assert reporter.steps == 2
    assert found["training_seconds"] < 3  # the pause is not counted


def test_what_is_timed_waits_for_the_step_that_goes_on(tmp_path):
    order = []

    def measure():
        with measuring(tmp_path):
            order.append("timed")

    with training_step(tmp_path) as waited:
        assert waited < 1
        thread = threading.Thread(target=measure)
        thread.start()
        time.sleep(0.3)
        order.append("step")
    thread.join(10)
    with training_step(tmp_path):
        order.append("next")
    assert order == ["step", "timed", "next"]
    assert not held(tmp_path / MEASURING) and not held(tmp_path / STEP)


def test_two_trainings_do_not_wait_for_each_other(tmp_path):
    with training_step(tmp_path), training_step(tmp_path) as waited:
        assert waited < 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_nobody_waits_where_locks_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with measuring(tmp_path / "cache"), training_step(tmp_path / "cache"):
        pass


def test_nobody_waits_where_the_folder_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    with measuring(tmp_path / "cache"), training_step(tmp_path / "cache"):
        pass


def test_the_meter_holds_the_lock_while_it_times(tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path))
    seen = []

    class Worker:
        alive = True

        def request(self, header, body, timeout_s):
            seen.append((header["op"], held(tmp_path / MEASURING)))
            times = {"samples_ms": [1.0, 1.0], "reference_ms": [2.0, 2.0]}
            if header["op"] == "start":
                times["reference_ms"] = 2.0
            return {**times, "times_ms": [[2.0, 2.0], [1.0, 1.0]], "rejected_windows": 0}

        def stop(self, kill=False):
            pass

    monkeypatch.setattr(latency, "_WorkerProcess", Worker)
    meter = latency.LatencyMeter(b"", (1, 8, 8))
    assert meter.measure(b"").latency_ms == 1.0
    assert meter.confirm({"a": lambda: b""})["a"].latency_ms == 1.0
    # The worker of the confirmation calibrates nothing: it only starts.
    assert seen == [("start", True), ("measure", True), ("start", False), ("confirm", True)]
    assert not held(tmp_path / MEASURING)
