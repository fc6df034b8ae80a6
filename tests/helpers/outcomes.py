"""What a run leaves behind, compared."""

import json
import sqlite3
from dataclasses import replace

from helpers import TINY_RUN
from moodistill.io.cache import content_digest
from moodistill.io.tensorfile import read_safetensors
from moodistill.storage.store import Store

SQLITE = {"evaluations.sqlite-wal", "evaluations.sqlite-shm"}


def outcome(folder):
    """All that a run leaves, without times of day and durations."""
    run = json.loads((folder / "run.json").read_text())
    confirmed = json.loads((folder / "confirmed.json").read_text())
    with Store.open(folder, readonly=True) as store:
        found = {
            "evaluations": [replace(e, seconds={}) for e in store.all()],
            "generations": [replace(g, seconds=0.0) for g in store.generations()],
        }
    found["run"] = {k: run[k] for k in ("config", "status", "changed_by_confirmation", "device")}
    found["confirmed"] = {k: confirmed[k] for k in ("measured", "students")}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "result.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.suffix == ".safetensors":  # which writes its metadata in any order
            tensors, metadata = read_safetensors(path)
            assert content_digest(tensors, metadata) == metadata["digest"]
            found[name] = metadata
        elif path.suffix in (".csv", ".json", ".onnx", ".md", ".npy", ".py"):
            found.setdefault(name, path.read_bytes())
        elif path.is_file() and name not in SQLITE:
            found[name] = None
    for name in ("run.json", "confirmed.json"):
        del found[name]
    return found


def assert_same(folder, expected):
    found = outcome(folder)
    assert [e.genome_hash for e in found["evaluations"]] == [
        e.genome_hash for e in expected["evaluations"]
    ]
    assert found["pareto.csv"].decode() == expected["pareto.csv"].decode()
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == expected[name], name


def carry_on(folder):
    """What a user would type to have this run finished."""
    if (folder / "run.json").exists():
        return ["run", "--resume", folder, "--torch-threads", "1"]
    return ["run", "--out", folder, *TINY_RUN]


def stored(folder):
    """Hashes of the students in a run's store, which must be whole if it is there."""
    if not (folder / "evaluations.sqlite").exists():
        return []
    with sqlite3.connect(f"file:{folder / 'evaluations.sqlite'}?mode=ro", uri=True) as store:
        assert store.execute("pragma integrity_check").fetchall() == [("ok",)]
    with Store.open(folder, readonly=True) as store:
        return [e.genome_hash for e in store.all()]


def orphans(folder):
    """Half-written files, and when they were written."""
    return [(path, path.stat().st_mtime_ns) for path in folder.rglob(".*.tmp")]
