"""The store: exact round trips, one writer, nothing lost to a kill, damage told in one line."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from helpers.stores import evaluation, run_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.storage.folder import (
    new_run_folder,
    read_run,
    versions,
    write_json_atomic,
    write_run,
)
from moodistill.storage.lock import is_written, writer_lock
from moodistill.storage.store import ReplayDiverged, Store

FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**62)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LATENCIES = st.builds(
    Latency,
    FLOATS,
    FLOATS,
    FLOATS,
    FLOATS,
    st.lists(FLOATS, max_size=4).map(tuple),
    st.lists(FLOATS, max_size=4).map(tuple),
)
EVALUATIONS = st.builds(
    Evaluation,
    genome_hash=TEXT,
    genome=st.binary(max_size=40),
    accuracy=FLOATS,
    parameters=COUNTS,
    macs=COUNTS,
    size_bytes=COUNTS,
    latency=st.none() | LATENCIES,
    seconds=st.dictionaries(TEXT, FLOATS, max_size=3),
    failure=st.none() | TEXT,
    summary=TEXT,
)
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.lists(EVALUATIONS, max_size=5, unique_by=lambda e: e.genome_hash))
def test_round_trip_is_exact(tmp_path_factory, evaluations):
    folder = tmp_path_factory.mktemp("run") / "a"
    run_folder(folder)
    with Store.open(folder) as store:
        for item in evaluations:
            store.add(item)
    with Store.open(folder, readonly=True) as store:
        assert store.all() == evaluations
        assert len(store) == len(evaluations)
        for item in evaluations:
            assert store.get(item.genome_hash) == item
        assert store.get("never seen \x00") is None


def test_numpy_scalars_come_back_as_numbers(tmp_path):
    folder = run_folder(tmp_path / "run")
    given_values = Evaluation(
        "a", b"", np.float32(0.5), np.int64(7), np.int32(8), np.int64(9),
        Latency(*np.array([1.5, 1, 2, 0.5], np.float32), tuple(np.ones(2)), ()),
        {"build": np.float64(0.25)},
    )  # fmt: skip
    with Store.open(folder) as store:
        store.add(given_values)
        found = store.get("a")
    assert found == given_values
    assert type(found.parameters) is int and type(found.accuracy) is float


def test_refuses_duplicates_and_nan(tmp_path):
    folder = run_folder(tmp_path / "run", 1)
    with Store.open(folder) as store:
        with pytest.raises(ValueError, match="00000000"):
            store.add(evaluation(0))
        with pytest.raises(ValueError, match="NaN"):
            store.add(Evaluation("n", b"", float("nan"), 1, 1, 1, None))
        assert store.all() == [evaluation(0)]
    with Store.open(folder, readonly=True) as store, pytest.raises(ValueError, match="read-only"):
        store.add(evaluation(1))


def test_adding_is_quick(tmp_path):
    with Store.open(run_folder(tmp_path / "run")) as store:
        times = []
        for number in range(30):
            start = time.perf_counter()
            store.add(evaluation(number))
            times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.02


def test_generations_and_replay(tmp_path):
    folder = run_folder(tmp_path / "run", 2)
    with Store.open(folder) as store:
        store.add_generation(0, "aa", 1.5, 2, 0.1 + 0.2)
        store.add(evaluation(2))
        store.add_generation(1, "bb", 2.5, 3, 0.4)
        before = store.generations()
        assert [(g.number, g.evaluations) for g in before] == [(0, 2), (1, 3)]
        assert before[0].hypervolume == 0.1 + 0.2
        store.add_generation(1, "bb", 0.01, 3, 0.4)
        with pytest.raises(ReplayDiverged, match="generation 1 bred offspring cc.* stored bb"):
            store.add_generation(1, "cc", 2.5, 3, 0.4)
        assert store.generations() == before


CHILD = """
import os, sys, time
from pathlib import Path
from helpers.stores import evaluation
from moodistill.storage.store import Store
store = Store.open(Path(sys.argv[1]))
if sys.argv[2] == "fork":
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(reading, 1)  # a fork that has not begun to run holds all that its parent does
print("ready", flush=True)
number = 0
while True:
    if sys.argv[2] == "add":
        store.add(evaluation(number))
        print(number, flush=True)
        number += 1
    else:
        time.sleep(0.05)
"""


@pytest.fixture
def child():
    started = []

    def start(folder, mode):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), mode],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def test_a_second_writer_is_refused(tmp_path, child):
    folder = run_folder(tmp_path / "run", 1)
    other = child(folder, "hold")
    with pytest.raises(UserError, match=f"process {other.pid};"):
        Store.open(folder)
    with Store.open(folder, readonly=True) as reader:
        assert len(reader) == 1
    assert is_written(folder) and is_written(folder)
    other.kill()
    other.wait()
    assert not is_written(folder)  # the system let go of it, the process could not
    with Store.open(folder):
        assert is_written(folder)
    assert not is_written(folder) and not is_written(tmp_path / "nothing")


def test_a_forked_worker_does_not_keep_the_lock(tmp_path, child):
    folder = run_folder(tmp_path / "run")
    other = child(folder, "fork")
    other.kill()
    other.wait()
    Store.open(folder).close()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("parameters", "many", "parameters is 'many'; expected int"),
        ("accuracy", b"x", "accuracy is b'x'; expected float"),
        ("seconds", '{"build": "x"}', "seconds is {'build': 'x'}; expected float"),
        (
            "samples",
            '{"samples_ms": [1, null]}',
            r"latency.samples_ms\[1\] is None; expected float",
        ),
        ("samples", "[1]", "mapping"),
        ("genome", "text", "genome is 'text'; expected bytes"),
    ],
)
def test_a_damaged_value_names_its_column(tmp_path, column, value, message):
    folder = run_folder(tmp_path / "run", 2)
    with sqlite3.connect(folder / "evaluations.sqlite") as store:
        store.execute(f"update evaluations set {column} = ? where number = 2", (value,))
    store.close()
    with (
        Store.open(folder, readonly=True) as store,
        pytest.raises(UserError, match=f"evaluations.sqlite.*{message}"),
    ):
        store.all()


def test_a_killed_writer_loses_nothing_it_reported(tmp_path, child):
    folder = run_folder(tmp_path / "run")
    writer = child(folder, "add")
    reported = -1
    while reported < 20:
        reported = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = writer.stdout.read().split()
    reported = max([reported, *(int(word) for word in last)])
    with Store.open(folder, readonly=True) as reader:
        kept = reader.all()
    assert len(kept) in (reported + 1, reported + 2)
    assert kept == [evaluation(number) for number in range(len(kept))]
    with Store.open(folder) as store:
        store.add(evaluation(len(kept)))
        assert store.all() == [*kept, evaluation(len(kept))]


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "truncate":
        return data[: rng.randrange(len(data))]
    if kind == "garbage":
        return rng.randbytes(len(data))
    changed = bytearray(data)
    for _ in range(rng.choice([1, 20, 400])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["truncate", "garbage", "flip"])
def test_damage_is_a_user_error(tmp_path, kind):
    folder = run_folder(tmp_path / "run", 40)
    with Store.open(folder) as store:
        store.add_generation(0, "aa", 1.5, 2, 0.3)
    database = folder / "evaluations.sqlite"
    healthy = database.read_bytes()
    refused = 0
    for seed in range(60):
        for leftover in folder.glob("evaluations.sqlite-*"):
            leftover.unlink()
        database.write_bytes(damaged(healthy, kind, random.Random(seed)))
        try:
            with Store.open(folder, readonly=seed % 2 == 0) as store:
                store.all()
                store.get("00000003")
                store.generations()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "evaluations.sqlite" in str(error)
    # Flipped bytes in free space or in a number's digits cannot be told from good ones.
    assert refused == 60 if kind != "flip" else refused > 20
    database.write_bytes(healthy)
    Store.open(folder).close()  # the lock was let go after every refusal


def test_a_key_that_left_its_index_is_found_when_opening(tmp_path):
    folder = run_folder(tmp_path / "run", 20)
    database = folder / "evaluations.sqlite"
    database.write_bytes(database.read_bytes().replace(b"0000000a", b"0000009a", 1))
    with pytest.raises(UserError, match="index"):
        Store.open(folder)


def test_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"not a run: expected run\.json"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"not a run: expected run\.json"):
        read_run(tmp_path)
    write_run(tmp_path, {})
    with pytest.raises(UserError, match=r"not a run: expected evaluations\.sqlite"):
        Store.open(tmp_path)
    for text in ("", "{", "[1]", "\xff", "[" * 100_000):
        (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"run\.json"):
            read_run(tmp_path)


def test_new_run_folder(tmp_path):
    folder = run_folder(tmp_path / "a" / "run", 1)
    with pytest.raises(UserError, match="exists; resume it, or give another `out`"):
        new_run_folder(folder)
    with pytest.raises(UserError, match="exists; resume its run"):
        Store.create(folder)
    assert Store.open(folder, readonly=True).all() == [evaluation(0)]
    (tmp_path / "empty").mkdir()
    assert new_run_folder(tmp_path / "empty").is_dir()
    with writer_lock(tmp_path / "empty") as lock:
        with pytest.raises(UserError, match="is being written by process"):
            Store.create(tmp_path / "empty")
        with (
            Store.create(tmp_path / "empty", lock),
            pytest.raises(UserError, match="being written"),
        ):
            Store.create(tmp_path / "empty")
    (tmp_path / "killed").mkdir()
    with writer_lock(tmp_path / "killed"):
        pass  # a start that was killed before run.json leaves its lock
    assert new_run_folder(tmp_path / "killed").is_dir()
    (folder / "run.json").unlink()  # what was evaluated is not thrown away for a new run
    with pytest.raises(UserError, match="exists; resume it"):
        new_run_folder(folder)
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="another `out`"):
            new_run_folder(bad)


def test_json_is_atomic_and_strict(tmp_path):
    path = tmp_path / "x.json"
    content = {"seed": np.int64(3), "rates": np.array([0.5]), "out": tmp_path, "third": 1 / 3}
    write_json_atomic(path, content)
    expected = {"seed": 3, "rates": [0.5], "out": str(tmp_path), "third": 1 / 3}
    assert json.loads(path.read_text()) == expected
    with pytest.raises(ValueError):
        write_json_atomic(path, {"bad": float("nan")})
    assert json.loads(path.read_text()) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_versions(monkeypatch):
    found = versions()
    json.dumps(found)
    assert found["numpy"] == np.__version__
    assert found["git"] is None or len(found["git"]["commit"]) == 40
    monkeypatch.setenv("PATH", "")
    assert versions()["git"] is None


def test_no_heavy_imports():
    names = "moodistill.storage.store, moodistill.pareto.choose, moodistill.report.figures"
    code = f"import sys, {names}; print([m for m in ('torch', 'pymoo') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
