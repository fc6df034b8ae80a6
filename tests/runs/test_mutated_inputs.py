"""Damaged and nonsensical input files through the commands that read them.

Every one is either used or refused in one line with exit code 2, and never changed or lost. Files of
the cache may be deleted, but what comes from them is what would come without them.
"""

import contextlib
import csv
import hashlib
import io
import json
import random
import shutil
import sqlite3
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.driver import RecordedMeter

from moodistill import config as settings_of_runs
from moodistill.cli import run_tool
from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.evolution.driver import Search
from moodistill.evolution.executor import SerialExecutor
from moodistill.finalists.confirm import Confirmed, read_confirmed
from moodistill.io.cache import content_digest
from moodistill.io.tensorfile import read_safetensors, save_atomic
from moodistill.latency import simd
from moodistill.latency.meter import LatencyError, LatencyMeter
from moodistill.latency.simd import probe_simd
from moodistill.pareto.evaluation import Evaluation
from moodistill.pareto.objectives import Limits
from moodistill.runs import export as shipping
from moodistill.runs import run
from moodistill.runs.accuracies import Accuracies
from moodistill.runs.results import changed_places
from moodistill.runs.rows import make_rows
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.context import load_context
from moodistill.student.evaluator import Evaluator
from moodistill.student.file import load_student
from moodistill.teacher.samples import collect_samples
from moodistill.teacher.weights import load_weights
from moodistill.training.distill import DistillConfig, SoftTargets

ODD = (
    None, True, False, -1, 0, 1, 7, 0.5, -2.5, 1e300, 10**30, float("nan"), float("inf"), "", "x",
    "0", "../../etc/passwd", "\u0000", "é" * 300, [], {}, [1], [[]], {"a": 1}, [None] * 3,
)  # fmt: skip
ODD_CELLS = (
    "", "0", "-1", "nan", "inf", "1e999", "1_0", " 1", "0.5", "2", "x", '"', "'", ",", "\x00",
    "../secret", "/etc/passwd", "é", "9" * 400, "teacher", "distilled", "int8", "1\r2", "1\n2",
)  # fmt: skip


def mutated_bytes(data, rng):
    """Flips, a cut, a hole, an insertion, a repeated piece or zeros."""
    changed = bytearray(data)
    kind = rng.choice(["flip", "flip", "cut", "hole", "insert", "repeat", "zeros"])
    # Half of the places are in the first part, where headers are.
    low = rng.randrange(min(len(changed), 400) if rng.random() < 0.5 else len(changed))
    size = rng.choice([1, 2, 8, 100, 5000])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 30])):
            place = (low + rng.randrange(size)) % len(changed)
            changed[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[low:]
    elif kind == "hole":
        del changed[low : low + size]
    elif kind == "insert":
        changed[low:low] = rng.randbytes(size)
    elif kind == "repeat":
        changed[low:low] = changed[low : low + size]
    else:
        changed[low : low + size] = bytes(len(changed[low : low + size]))
    return bytes(changed)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value[:4]):
            yield from places(one, (*path, key))


def mutated_json(data, rng):
    """Another value, a missing or an unknown key, deep nesting; or bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        *path, last = rng.choice(list(places(value))[1:])
        owner = value
        for key in path:
            owner = owner[key]
        kind = rng.random()
        if kind < 0.7:
            owner[last] = rng.choice(ODD)
        elif kind < 0.85:
            del owner[last]
        elif isinstance(owner, dict):
            owner[rng.choice(["", "unknown", "__class__"])] = rng.choice(ODD)
        if not isinstance(value, dict) or len(value) < 2:
            break
    if rng.random() < 0.03:
        return b'{"a": ' * 5000 + b"1" + b"}" * 5000
    return json.dumps(value).encode()


def mutated_csv(data, rng):
    """Odd cells, lines and columns that are missing or twice there; or bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    lines = list(csv.reader(io.StringIO(data.decode())))
    for _ in range(rng.choice([1, 1, 2, 5])):
        line = rng.choice(lines)
        kind = rng.random()
        if kind < 0.7:
            line[rng.randrange(len(line))] = rng.choice(ODD_CELLS)
        elif kind < 0.8:
            del line[rng.randrange(len(line))]
        elif kind < 0.9:
            lines.append(list(line))
        elif len(lines) > 1:
            lines.remove(line)
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(lines)
    return table.getvalue().encode()


def mutated_safetensors(data, rng):
    """A header that says something else; or bytes."""
    if rng.random() < 0.5:
        return mutated_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(list(header))
    kind = rng.randrange(5)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header["other"] = header.pop(name)
    elif name == "__metadata__":
        header[name][rng.choice(list(header[name]))] = rng.choice(["", "x", "[]", "{}", "[[1]]"])
    elif kind == 2:
        header[name]["dtype"] = rng.choice(["F64", "I16", "BF16", "BOOL", "U8", "F8_E4M3", "C64"])
    elif kind == 3:
        header[name]["shape"] = rng.choice([[], [0], header[name]["shape"][::-1], [1, -1], [2**60]])
    else:
        header[name]["data_offsets"] = rng.choice([[0, 0], [5, 2], [0, 2**62], [-1, 8], []])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def resigned_student(data, rng, folder):
    """Tensors or metadata that are odd, under a digest that holds."""
    path = folder / "resigned.safetensors"
    path.write_bytes(data)
    tensors, metadata = read_safetensors(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor.to(rng.choice([torch.float64, torch.int32, torch.bool, torch.half]))
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
    elif kind == 3 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), 1e38, -float("inf"), 0]))
    elif kind == 4:
        tensors["other"] = torch.zeros(3)
    else:
        key = rng.choice(sorted(set(metadata) - {"digest"}))
        metadata[key] = mutated_bytes(metadata[key].encode(), rng).decode("latin-1")
    metadata["digest"] = content_digest(tensors, metadata)
    save_atomic(tensors, path, metadata)
    changed = path.read_bytes()
    path.unlink()
    return changed


def mutated_database(data, rng, folder):
    """Odd values in rows, missing rows and tables; or bytes."""
    if rng.random() < 0.4:
        return mutated_bytes(data, rng)
    path = folder / "mutated.sqlite"
    path.write_bytes(data)
    values = (None, -1, 0, 1.5, 1e300, 2**62, "", "x", "[]", "{}", "null", '{"a": [1]}',
              '{"samples_ms": [1], "reference_ms": ["x"]}', b"", b"\x00", b"\xff" * 4000)  # fmt: skip
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("pragma journal_mode = delete")
        columns = [row[1] for row in store.execute("pragma table_info(evaluations)")]
        for _ in range(rng.choice([1, 1, 3])):
            kind, number = rng.random(), rng.randrange(1, 19)
            with contextlib.suppress(sqlite3.IntegrityError):
                if kind < 0.75:
                    store.execute(
                        f"update evaluations set {rng.choice(columns)} = ? where number = ?",
                        (rng.choice(values), number),
                    )
                elif kind < 0.85:
                    column = rng.choice(["offspring_hash", "evaluations", "hypervolume", "seconds"])
                    store.execute(f"update generations set {column} = ?", (rng.choice(values),))
                elif kind < 0.9:
                    store.execute("delete from evaluations where number >= ?", (number,))
                elif kind < 0.95:
                    store.execute(f"drop table {rng.choice(['evaluations', 'generations'])}")
                    break
                else:
                    store.execute(f"pragma user_version = {rng.choice([0, 1, 3, 99])}")
        store.commit()
        store.execute("pragma journal_mode = wal")
    changed = path.read_bytes()
    path.unlink()
    return changed


def mutated_package_model(data, rng):
    """Bytes of an ONNX file; half the time in its first part, where the graph is."""
    return mutated_bytes(data, rng)


@pytest.fixture(scope="module")
def folder(recorded_run, tmp_path_factory):
    """A copy of a finished run that files are mutated in, one at a time."""
    folder = tmp_path_factory.mktemp("mutated") / "run"
    shutil.copytree(recorded_run, folder)
    Store.open(folder).close()
    return folder


def finalist(folder):
    """The folder of a finalist: which students those are depends on the machine's arithmetic."""
    found = folder.glob("students/s*/student.safetensors")
    return sorted(path.parent for path in found)[0]


@pytest.fixture(scope="module")
def context(folder):
    """The teacher as the run saw it."""
    config = RunConfig.from_dict(json.loads((folder / "run.json").read_text())["config"])
    from moodistill.teacher.task import load_task

    made = load_context(
        load_task("digits"), calibration=config.calibration, cache_dir=folder.parent / "cache"
    )
    # Comparisons with torch on all images take most of the time of an export.
    return replace(made, data=replace(made.data, validation=made.data.validation.head(32)))


class Stop(UserError):
    """Raised in place of hours of work."""


@pytest.fixture
def call(context, folder, monkeypatch):
    """Commands in this process, with the teacher at hand and no work beyond reading."""

    def execute(session):
        """All that a run does with its inputs before and after the search, without the work."""
        folder, store, config = session.folder, session.store, session.config
        timing = session.backend.timing

        def evaluate(genome):
            raise Stop("a new student")

        Evaluator(context, config.recipe, timing.here, config.search.simd_step)
        SoftTargets(
            context.graph.module, context.data, config.distill, None, context.teacher_digest
        )
        with contextlib.suppress(Stop):
            list(Search(context.layout, config.search, store, SerialExecutor(evaluate)).run())
        searched = Searched.read(store, config.search.limits, config.search.objectives)
        if searched is None:
            return
        known, names = Accuracies(folder / "accuracies.json"), searched.near_front(0.05)
        confirmed = read_confirmed(folder)
        if any(confirmed.measured.get(n) != one.genome_hash for n, one in names.items()):
            confirmed = Confirmed()
        rows = make_rows(folder, searched, known.known, confirmed, timing.teacher_latency_ms)
        changed_places(searched, confirmed.latencies)
        json.dumps([vars(row) for row in rows], allow_nan=False)
        for one in searched.students.values():
            context.layout.unpack(one.genome)

    monkeypatch.setenv("MOODISTILL_CACHE", str(folder.parent / "cache"))
    for module in (run, shipping):
        monkeypatch.setattr(module, "load_context", lambda *_, **__: context)
    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(LatencyMeter, "_start", lambda self: None)
    digits = replace(context.task, load_data=lambda _: context.data)
    real = settings_of_runs.load_task
    monkeypatch.setattr(
        settings_of_runs,
        "load_task",
        lambda name, *rest: digits if name == "digits" else real(name, *rest),
    )

    def command(*arguments):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = run_tool(arguments[0], [str(a) for a in arguments[1:]])
        assert code in (0, 2), f"exit code {code}"
        lines = error.getvalue().strip().splitlines()
        assert len(lines) == (code == 2), lines
        return code, out.getvalue()

    return command


def state(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".lock", "evaluations.sqlite-"))
    }


def attempt(path, data, check):
    """Write a mutated file and read it; 1 if it was refused. Anything but a `UserError` fails."""
    path.write_bytes(data)
    try:
        refused = check()
    except UserError as error:
        assert "\n" not in str(error).strip(), error
        refused = 1
    return refused


def torture(path, mutate, check, seeds, keeps=None):
    """Mutations of one file; how many were refused. The file, and those in `keeps`, stay."""
    original = path.read_bytes()
    before = state(keeps) if keeps else {}
    refused, wrong = 0, []
    for seed in seeds:
        rng = random.Random(zlib.crc32(f"{path.name} {seed}".encode()))
        data = mutate(original, rng)
        try:
            refused += attempt(path, data, check)
            assert path.read_bytes() == data, "the file was changed"
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            path.write_bytes(original)
    if keeps:
        assert state(keeps) == before
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong)
    return refused


def some(few, many):
    """A few seeds for every run of the tests, and many for the slow ones."""
    return pytest.mark.parametrize(
        "seeds",
        [range(few), pytest.param(range(few, few + many), marks=pytest.mark.slow)],
        ids=[f"{few}", f"{many}"],
    )


@some(7, 150)
def test_run_json(folder, call, tmp_path, seeds):
    path = folder / "run.json"

    def check():
        data = path.read_bytes()
        codes = {call("run", "--resume", folder, "--seed", "5")[0] - 2}
        code, _ = call("run", "--resume", folder)
        if code == 0:  # a resume says in `run.json` that it goes on
            now, then = json.loads(path.read_bytes()), json.loads(data)
            assert now | {"status": 0, "config": 0} == then | {"status": 0, "config": 0}
            path.write_bytes(data)
        assert path.read_bytes() == data
        codes |= {code, call("report", folder)[0]}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        call("export", folder, finalist(folder).name, "--out", tmp_path / "out")
        return code == 2

    def mutate(data, rng):
        value = json.loads(data)
        if rng.random() < 0.4:
            return mutated_json(data, rng)
        try:  # most of the file says how it was made; this part decides what is done
            value["config"] = json.loads(mutated_json(json.dumps(value["config"]).encode(), rng))
        except (ValueError, RecursionError):
            return mutated_json(data, rng)
        return json.dumps(value).encode()

    assert torture(path, mutate, check, seeds) > len(seeds) // 3


@some(6, 60)
def test_layout_json(folder, call, seeds):
    path = folder / "layout.json"
    assert torture(path, mutated_json, lambda: call("report", folder)[0] == 2, seeds) >= 1


@some(16, 120)
def test_teacher(context, tmp_path, seeds):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(context.task.weights.read_bytes())
    model = context.task.build()

    def check():
        found = load_weights(model, path)
        assert all(torch.isfinite(p).all() for p in found.parameters())
        return 0

    assert torture(path, mutated_safetensors, check, seeds) > len(seeds) // 3


@some(8, 90)
def test_student(folder, context, call, tmp_path, seeds):
    path = finalist(folder) / "student.safetensors"
    images = context.data.normalise(context.data.validation.images[:8])
    expected, _ = load_student(path, context.task.build(), context.data.input_shape)

    def mutate(data, rng):
        if rng.random() < 0.5:
            return resigned_student(data, rng, tmp_path)
        return mutated_safetensors(data, rng)

    def check():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, _ = call("export", folder, finalist(folder).name, "--out", tmp_path / "out")
        assert (tmp_path / "out" / "model.onnx").exists() == (code == 0)
        return code == 2

    with torch.no_grad():
        assert torch.isfinite(expected.module(images)).all()
    assert torture(path, mutate, check, seeds, folder) > len(seeds) // 2


@some(12, 150)
@pytest.mark.parametrize(
    ("name", "mutate"), [("pareto.json", mutated_json), ("pareto.csv", mutated_csv)]
)
def test_the_front(folder, call, tmp_path, name, mutate, seeds):
    run = tmp_path / "run"  # with that file alone, as runs of earlier versions have CSV
    run.mkdir()
    shutil.copy(folder / name, run)

    def check():
        refused = 0
        for options in ([], ["--knee"], ["--weights", "accuracy=1,latency=2"]):
            code, text = call("choose", run, "--json", *options)
            if code == 0:
                chosen = json.loads(text, parse_constant=lambda name: pytest.fail(name))
                assert 0 <= chosen["student"]["test_accuracy"] <= 1
            refused |= code == 2
        return refused

    assert torture(run / name, mutate, check, seeds, run) > len(seeds) // 3


@some(16, 120)
def test_manifest(folder, call, seeds):
    package = finalist(folder)
    check = lambda: call("verify", package)[0] == 2  # noqa: E731
    refused = torture(package / "manifest.json", mutated_json, check, seeds, package)
    assert refused >= len(seeds) // 4


@some(6, 60)
def test_model_onnx(folder, driver, tmp_path, seeds):
    """Under a manifest that lists the damaged file: a crash of a library would be a crash of ours."""
    package = tmp_path / "package"
    shutil.copytree(finalist(folder), package)
    path, manifest = package / "model.onnx", package / "manifest.json"
    content = json.loads(manifest.read_text())

    def check():
        content["files"]["model.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
        done = driver.call("verify", package)
        assert done.code in (0, 2), done
        assert len(done.stderr.splitlines()) == (done.code == 2)
        return done.code == 2

    assert torture(path, mutated_package_model, check, seeds) > len(seeds) // 2


@some(10, 140)
def test_store(folder, call, tmp_path, seeds):
    path = folder / "evaluations.sqlite"
    run_file = (folder / "run.json").read_bytes()

    def check():
        data = path.read_bytes()
        for leftover in folder.glob("evaluations.sqlite-*"):
            leftover.unlink()
        with contextlib.suppress(UserError), Store.open(folder, readonly=True) as store:
            assert all(isinstance(one, Evaluation) for one in store.all())
            Searched.read(store, Limits(), ("accuracy", "latency"))
        codes = [call("report", folder)[0]]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        codes.append(call("export", folder, "s0003", "--out", tmp_path / "out")[0])
        assert path.read_bytes() == data
        codes.append(call("run", "--resume", folder)[0])
        (folder / "run.json").write_bytes(run_file)
        if codes[-1] == 0:  # it may have stored a generation again
            path.write_bytes(data)
        return 2 in codes

    assert torture(path, lambda d, r: mutated_database(d, r, tmp_path), check, seeds) >= 4


@some(3, 40)
@pytest.mark.parametrize(
    "name", ["confirmed.json", "accuracies.json", "students/STUDENT/result.json"]
)
def test_results_of_finalists(folder, call, name, seeds):
    """What a resume reads back or makes again."""
    run_file = (folder / "run.json").read_bytes()

    def check():
        code, _ = call("run", "--resume", folder)
        (folder / "run.json").write_bytes(run_file)
        return code == 2

    name = name.replace("STUDENT", finalist(folder).name)
    torture(folder / name, mutated_json, check, seeds)


@some(4, 40)
def test_cached_samples(context, tmp_path, seeds):
    graph, data, config = context.graph, context.data, context.samples.config

    def samples():
        found = collect_samples(graph, data, config, tmp_path, context.teacher_digest)
        for name, values in context.samples.inputs.items():
            assert torch.equal(found.inputs[name], values), name
        return 0

    samples()
    torture_cache(tmp_path, mutated_safetensors, samples, seeds)


@some(4, 40)
def test_cached_logits(context, tmp_path, seeds):
    config = DistillConfig(steps=3)

    def targets():
        made = SoftTargets(context.graph.module, context.data, config, tmp_path, "digest")
        return made, [made.soft(k, made.batch(k)[0]) for k in range(3)]

    made, expected = targets()
    made.save()

    def check():
        for found, wanted in zip(targets()[1], expected, strict=True):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        return 0

    torture_cache(tmp_path, mutated_safetensors, check, seeds)


@some(6, 40)
def test_cached_accuracies(tmp_path, seeds):
    Accuracies(tmp_path / "accuracy-1.json").add("teacher", 0.75)

    def check():
        known = Accuracies(tmp_path / "accuracy-1.json")
        assert all(isinstance(v, float) and 0 <= v <= 1 for v in known.known.values())
        known.add("other", 0.5)
        return 0

    torture_cache(tmp_path, mutated_json, check, seeds)


@some(6, 40)
def test_cached_probe(tmp_path, monkeypatch, seeds):
    def fails(*_, **__):
        raise LatencyError("no clock")

    class Meter(RecordedMeter):
        def confirm(self, models, rounds=64, report=None):
            return {name: SimpleNamespace(ratio=int(name) / 64) for name in models}

    monkeypatch.setattr(simd, "LatencyMeter", Meter)
    probe_simd(None, tmp_path)

    def check():
        found = probe_simd(None, tmp_path)
        assert 1 <= found.step <= 64 and all(0 < r < 100 for r in found.ratios.values())
        return 0

    torture_cache(tmp_path, mutated_json, check, seeds)


def torture_cache(folder, mutate, check, seeds):
    """Mutations of the one file in a cache, which may be deleted or written anew."""
    (path,) = (p for p in Path(folder).iterdir() if p.is_file())
    original = path.read_bytes()
    wrong = []
    for seed in seeds:
        path.write_bytes(mutate(original, random.Random(seed)))
        try:
            check()
        except (Exception, UserError) as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong)


def test_mutations_are_repeatable_and_change_something():
    data = json.dumps({"a": {"b": [1, 2, 3]}, "c": "text"}).encode() * 1
    for mutate in (mutated_bytes, mutated_json):
        made = [mutate(data, random.Random(seed)) for seed in range(40)]
        assert made == [mutate(data, random.Random(seed)) for seed in range(40)]
        assert sum(one != data for one in made) >= 35
    assert np.unique([mutated_bytes(data, random.Random(s)) for s in range(40)]).size > 30
