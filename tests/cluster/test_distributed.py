"""Scoring on other processes: same answers, faults, versions; with real Dask workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("distributed")

from helpers.dask import end

from moodistill.cluster import client as clusters
from moodistill.cluster import tasks as remote
from moodistill.cluster.client import ClusterConfig, connect
from moodistill.cluster.executor import DaskExecutor, distil_there
from moodistill.cluster.meter import DeviceMeters
from moodistill.config import RunConfig, new_config
from moodistill.errors import UserError
from moodistill.evolution.driver import Search, SearchConfig
from moodistill.evolution.executor import SerialExecutor
from moodistill.evolution.operators import DensitySampling
from moodistill.finalists.distil import distil_here
from moodistill.io.tensorfile import read_safetensors
from moodistill.latency.meter import LatencyConfig
from moodistill.pareto.table import read_front
from moodistill.settings import Settings
from moodistill.storage.store import Store
from moodistill.student.evaluator import Evaluator, Recipe, teacher_onnx
from moodistill.teacher.weights import network_digest

pytestmark = pytest.mark.distributed

SEARCH = SearchConfig(population=6, generations=2, seed=5, simd_step=8)


def table(model, key):
    """A recorded latency: the same for the same structure, whoever asks."""
    from moodistill.pareto.evaluation import Latency

    ms = 0.1 + int(key[:6], 16) / 0xFFFFFF
    return Latency(ms, ms, ms, ms, (ms,) * 3, (1.0,) * 3)


def score_setup(context, **changes):
    config = new_config("digits", Settings(simd_step=8, generations=2, population=6))
    values = {
        "version": remote.__version__, "config": json.dumps(asdict(config)),
        "teacher_digest": context.teacher_digest, "data_digest": context.data.digest,
        "network_digest": network_digest(context.graph.module),
        "data_dir": None, "threads": 1,
    }  # fmt: skip
    return remote.ScoreSetup(**values | changes)


def searched(folder, layout, executor):
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with Store.create(folder) as store:
        list(Search(layout, SEARCH, store, executor).run())
        return [
            (e.genome_hash, e.accuracy, e.parameters, e.macs, e.size_bytes, e.latency.latency_ms)
            for e in store.all()
        ]


@pytest.fixture(scope="module")
def four(environment):
    with connect(ClusterConfig(workers=4), lambda text: None) as cluster:
        yield cluster


def dask(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def scheduler(environment, tmp_path):
    """Address of a scheduler on loopback, in a process of its own."""
    file = tmp_path / "scheduler.json"
    process = dask(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
        "--scheduler-file", str(file),
    )  # fmt: skip
    while not file.exists() or not file.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    yield json.loads(file.read_text())["address"]
    end(process)


def worker(address, resource, *more):
    return dask(
        "worker", address, "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard",
        "--resources", f"{resource}=1", "--death-timeout", "60", *more,
    )  # fmt: skip


def test_one_process_and_four_workers_find_the_same(digits, four, tmp_path):
    serial = SerialExecutor(Evaluator(digits, Recipe(), table, 8).evaluate)
    expected = searched(tmp_path / "serial", digits.layout, serial)
    executor = DaskExecutor(four, digits.layout, score_setup(digits), None, table)
    found = searched(tmp_path / "four", digits.layout, executor)
    assert len(found) == 12 and found == expected


def test_finalists_are_distilled_on_the_workers(digits, four, tmp_path):
    """Their files are those that this process makes; a finished one is not made again."""
    setup = score_setup(digits)
    config = RunConfig.from_dict(json.loads(setup.config))
    config = replace(config, distill=replace(config.distill, steps=3))
    setup = replace(setup, config=json.dumps(asdict(config)))
    evaluator = Evaluator(digits, config.recipe, table, 8)
    sampling = DensitySampling(digits.layout, 8)
    genomes = sampling._do(None, 4, random_state=np.random.default_rng(0))[1:]
    students = {f"s{n}": evaluator.evaluate(genome) for n, genome in enumerate(genomes)}
    here = distil_here(digits, config.recipe, config.distill)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have, so that no bit differs
    expected = dict(here(students, tmp_path / "here", lambda *_: None))
    torch.set_num_threads(before)
    there = distil_there(four, setup, config.distill)
    found = dict(there(students, tmp_path / "there", lambda *_: None))
    assert set(found) == set(expected) == set(students)
    for name, one in found.items():
        assert replace(one, seconds=0) == replace(expected[name], seconds=0)
        names = {path.name for path in (tmp_path / "here" / name).iterdir()}
        assert {path.name for path in (tmp_path / "there" / name).iterdir()} == names
        sides = [tmp_path / side / name for side in ("here", "there")]
        assert len({(side / "model.onnx").read_bytes() for side in sides}) == 1
        # The order of the metadata in such a file is a matter of chance.
        (one, facts), (two, others) = (read_safetensors(s / "student.safetensors") for s in sides)
        assert facts == others and set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
    again = dict(there(students, tmp_path / "there", lambda *_: None))
    assert {name: one.seconds for name, one in again.items()} == {
        name: one.seconds for name, one in found.items()
    }
    broken = replace(students["s0"], genome=b"")
    error = dict(there({"s0": broken}, tmp_path / "broken", lambda *_: None))["s0"]
    assert isinstance(error, Exception) and not (tmp_path / "broken").exists()


def test_the_order_of_finishing_changes_nothing(digits, tmp_path):
    class Reversed(SerialExecutor):
        def map(self, genomes):
            yield from reversed(list(super().map(genomes)))

    evaluate = Evaluator(digits, Recipe(), table, 8).evaluate
    expected = searched(tmp_path / "serial", digits.layout, SerialExecutor(evaluate))
    assert searched(tmp_path / "reversed", digits.layout, Reversed(evaluate)) == expected


def test_a_worker_killed_in_the_middle_is_made_up_for(digits, four, tmp_path):
    genomes = [digits.layout.teacher()] * 8
    executor = DaskExecutor(four, digits.layout, score_setup(digits), None, table)
    list(executor.map(genomes))  # all have loaded their teacher
    pids = list(four.client.run(os.getpid).values())
    threading.Timer(0.05, os.kill, (pids[0], signal.SIGKILL)).start()
    found = dict(executor.map(genomes * 3))
    assert sorted(found) == list(range(24))
    assert {e.failure for e in found.values()} == {None}
    assert len({e.accuracy for e in found.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "0.0.1"}, r"worker \d at tcp://127.0.0.1:\d+ has moodistill .* has 0.0.1"),
        ({"teacher_digest": "abc"}, r"worker \d .* has another teacher"),
        ({"data_digest": "abc"}, r"worker \d .* has another data set"),
        ({"network_digest": f"{torch.__version__}/abc"}, r"worker \d .* has another forward"),
    ],
)
def test_another_version_teacher_or_data_set_is_refused_by_name(digits, four, changes, match):
    executor = DaskExecutor(four, digits.layout, score_setup(digits, **changes), None, table)
    with pytest.raises(UserError, match=match):
        list(executor.map([digits.layout.teacher()]))


def test_a_worker_of_another_version_is_refused_when_the_run_starts(four, monkeypatch):
    monkeypatch.setattr(clusters, "__version__", "9.9")
    with pytest.raises(UserError, match=r"worker \d at tcp://.* has moodistill .* has 9.9"):
        clusters.Cluster(four.client, four.config, print)


def test_latency_on_a_named_device(digits, scheduler, tmp_path):
    """Students are scored on one worker and timed on another; the device then vanishes."""
    student, device = worker(scheduler, "student"), worker(scheduler, "latency:edge")
    said = []
    config = ClusterConfig(scheduler=scheduler, latency_on=("edge",), patience_s=30)
    try:
        with connect(config, said.append) as cluster:
            assert cluster.probe_step(LatencyConfig()) in (4, 8, 16, 32)
            shape = digits.data.input_shape
            meter = DeviceMeters(cluster, teacher_onnx(digits), shape, LatencyConfig(), None)
            assert meter.teacher_latency_ms > 0 and meter.device["onnxruntime"]
            executor = DaskExecutor(cluster, digits.layout, score_setup(digits), meter, None)
            rng = np.random.default_rng(0)
            genomes = [digits.layout.teacher()]
            small = digits.layout.teacher()
            for name in digits.layout.shapes:
                if name.startswith("mask/"):
                    view = digits.layout.view(small, name)
                    view[:] = rng.random(view.shape) < 0.3
            found = dict(executor.map([*genomes, small]))
            assert found[0].latency.ratio == pytest.approx(1.0, abs=0.4)
            assert found[1].latency.latency_ms < found[0].latency.latency_ms
            assert len(found[1].latency.samples_ms) >= 8 and found[1].failure is None
            confirmed = meter.confirm({"t": lambda: teacher_onnx(digits)}, rounds=16)
            assert len(confirmed["t"].samples_ms) == 16
            end(device)
            cluster.config = ClusterConfig(
                scheduler=scheduler, latency_on=("edge",), patience_s=1.0
            )
            with pytest.raises(
                UserError, match=r"no worker with the resource 'latency:edge' for 1"
            ):
                list(executor.map(genomes))
            # Or the run waits, says so, and goes on when the device is back.
            cluster.config = ClusterConfig(
                scheduler=scheduler, latency_on=("edge",), patience_s=1.0, wait=True
            )
            answers = executor.map(genomes)
            made = []
            thread = threading.Thread(target=lambda: made.extend(answers))
            thread.start()
            while not any("waiting for one" in text for text in said):
                time.sleep(0.1)
            device = worker(scheduler, "latency:edge")
            thread.join(60)
            assert len(made) == 1 and made[0][1].failure is None
            assert any("is back" in text for text in said)
    finally:
        end(student, device)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give either `workers`"),
        ({"workers": 2, "scheduler": "tcp://a:1"}, "give either `workers`"),
        ({"workers": 0}, "`workers` is 0"),
        ({"workers": 2, "latency_on": ("edge",)}, "`latency_on` names a worker"),
        ({"scheduler": "tcp://a:1", "latency_on": ("a", "a")}, "`latency_on` is 'a,a'"),
        ({"scheduler": "tcp://a:1", "latency_on": ("a b",)}, "`latency_on` is 'a b'"),
        ({"scheduler": "tcp://a:1", "latency_on": ("a",), "worst_latency": True}, "several"),
        ({"scheduler": "tls://a:1", "tls_ca": "x"}, "TLS needs all three"),
        ({"scheduler": "tls://a:1"}, "tls://a:1 asks for certificates"),
    ],
)
def test_options_that_do_not_fit(options, match):
    with pytest.raises(UserError, match=match):
        ClusterConfig(**options)


# What a worker with this preload measures is ten times as long: a slower device. Dask may load it
# more than once.
SLOWER = """
from dataclasses import replace
from moodistill.latency.meter import LatencyMeter
if not hasattr(LatencyMeter, "real"):
    LatencyMeter.real = LatencyMeter._latency
def slower(self, samples, reference):
    one = self.real(samples, reference)
    return replace(one, latency_ms=10 * one.latency_ms, high_ms=10 * one.high_ms)
LatencyMeter._latency = slower
"""


@pytest.mark.parametrize("worst", [False, True])
def test_several_devices_are_columns(worst, scheduler, call, tmp_path):
    """The first one's latency is the objective, or the largest over all of them."""
    (tmp_path / "slower.py").write_text(SLOWER)
    workers = [
        worker(scheduler, "student"), worker(scheduler, "latency:board"),
        worker(scheduler, "latency:phone", "--preload", str(tmp_path / "slower.py")),
    ]  # fmt: skip
    out = tmp_path / "run"
    places = ["--scheduler", scheduler, "--latency-on", "board,phone"]
    options = [
        "--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
        "--no-int8", *(["--worst-latency"] if worst else []),
    ]  # fmt: skip
    try:
        call("run", "--model", "digits", "--out", out, *places, *options)
        run = json.loads((out / "run.json").read_text())
        assert run["latency_on"] == ("the worst of board,phone" if worst else "board,phone")
        assert set(run["devices"]) == set(run["teacher_latencies_ms"]) == {"board", "phone"}
        students = [row for row in read_front(out) if row.stage != "teacher"]
        assert students and all(set(row.on_devices) == {"board", "phone"} for row in students)
        for row in students:
            assert row.on_devices["phone"] > 2 * row.on_devices["board"]
            assert row.latency_ms == row.on_devices["phone" if worst else "board"]
            # In the search, too: it saw the device that counts, and one of them is far slower.
            searched = row.search_latency_ms / row.on_devices["phone"]
            assert searched > 0.4 if worst else searched < 0.4
        manifest = json.loads(
            (out / "students" / students[0].student / "manifest.json").read_text()
        )
        assert manifest["latency"]["on_devices_ms"] == students[0].on_devices
        error = call("run", "--resume", out, *places[:2], "--latency-on", "phone", code=2).stderr
        assert "not of phone; resume it with the same --latency-on" in error
    finally:
        end(*workers)


def test_nobody_there(scheduler):
    config = ClusterConfig(scheduler=scheduler, patience_s=0.5)
    with (
        pytest.raises(UserError, match="no worker with the resource 'student' within 0.5 s"),
        connect(config, print),
    ):
        pass
    with (
        pytest.raises(UserError, match="no Dask scheduler answers at tcp://127.0.0.1:9"),
        connect(ClusterConfig(scheduler="tcp://127.0.0.1:9"), print),
    ):
        pass


def test_a_whole_run_on_two_workers(call, tmp_path):
    out = tmp_path / "run"
    call(
        "run", "--model", "digits", "--out", out, "--workers", "2", "--population", "6",
        "--generations", "2", "--finalists", "1", "--distill-steps", "4", "--no-int8",
        "--simd-step", "8",
    )  # fmt: skip
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert (out / "pareto.csv").read_text().count("\n") >= 3
    error = call("run", "--resume", out, "--scheduler", "tcp://127.0.0.1:9", code=2).stderr
    assert "no Dask scheduler answers" in error


def test_a_worse_distillation_of_a_worker_does_not_replace_a_better_one(tmp_path):
    from moodistill.cluster.executor import _keep
    from moodistill.finalists.distil import Finalist, read_finalist

    def files(accuracy, steps, model):
        one = Finalist("s0001", "abc", {"steps": steps}, 0.5, accuracy, accuracy, 1, 1, 0.0, 1.0)
        return {"result.json": json.dumps(asdict(one)).encode(), "model.onnx": model}

    _keep(tmp_path, files(0.7, 5, b"first"))
    _keep(tmp_path, files(0.6, 9, b"worse"))
    kept = read_finalist(tmp_path)
    assert kept is not None and kept.accuracy == 0.7 and kept.budget == {"steps": 9}
    assert (tmp_path / "model.onnx").read_bytes() == b"first"
    _keep(tmp_path, files(0.8, 12, b"better"))
    assert (tmp_path / "model.onnx").read_bytes() == b"better"
