"""The cache: damaged files are made again, and one that cannot be written is named at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic
from moodistill.io.cache import read_cached, save_cached
from moodistill.io.cache_dir import cache_key, cached, default_cache_dir, read_or_none


def numbers(path):
    return int(path.read_text())


class Counted:
    """Makes 7, and counts how often."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return 7


def use(path, make):
    return cached(path, numbers, make, lambda value, to: write_atomic(to, str(value).encode()))


def test_made_once_and_again_when_damaged(tmp_path):
    make, path = Counted(), tmp_path / "deep" / "seven"
    assert [use(path, make) for _ in range(3)] == [7, 7, 7] and make.made == 1
    path.write_text("x")
    assert use(path, make) == 7 and make.made == 2 and path.read_text() == "7"
    assert [use(None, make) for _ in range(2)] == [7, 7] and make.made == 4
    assert sorted(p.name for p in path.parent.iterdir()) == ["seven"]


def test_a_damaged_file_is_gone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_cached({"a": torch.ones(3)}, path)
    assert torch.equal(read_or_none(path, read_cached)["a"], torch.ones(3))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a value, under the old digest
    path.write_bytes(data)
    assert read_or_none(path, read_cached) is None and not path.exists()
    assert read_or_none(path, read_cached) is None and read_or_none(None, read_cached) is None


def test_a_cache_that_cannot_be_made_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    make = Counted()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(UserError, match=f"cache {folder}.*set MOODISTILL_CACHE"):
            use(folder / "seven", make)
    assert make.made == 0
    with pytest.raises(UserError, match="set MOODISTILL_CACHE"):
        save_cached({"a": torch.ones(1)}, tmp_path / "file" / "x.safetensors")


def test_a_full_disk_is_told_with_the_variable(tmp_path):
    def full(value, path):
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(UserError, match="No space left.*MOODISTILL_CACHE.*space"):
        cached(tmp_path / "seven", numbers, Counted(), full)


def test_keys_tell_what_a_file_was_made_from():
    assert cache_key("a", 1) == cache_key("a", 1) != cache_key("a", 2)
    assert len(cache_key()) == 16


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.setenv("MOODISTILL_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "moodistill"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="no home.*MOODISTILL_CACHE"):
        default_cache_dir()
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path))  # which needs no home
    assert default_cache_dir() == tmp_path


@pytest.mark.parametrize(
    "given",
    [{"HOME": "/dev/null"}, {"HOME": "/proc"}, {"MOODISTILL_CACHE": "/proc/x"}],
    ids=["home is no folder", "home is read-only", "cache is read-only"],
)
def test_a_run_without_a_cache_says_so_in_one_line(given, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "MOODISTILL_CACHE"}
    done = subprocess.run(
        [sys.executable, "-m", "moodistill", "run", "--model", "digits", "--out", tmp_path / "run"],
        capture_output=True, text=True, cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), **given},
    )  # fmt: skip
    assert done.returncode == 2
    # ONNX Runtime may warn that it cannot use the home either.
    (line,) = (one for one in done.stderr.splitlines() if "onnxruntime" not in one)
    assert line.startswith("error: ")
    assert "MOODISTILL_CACHE" in line and next(iter(given.values())) in line


def test_the_teachers_accuracy_is_measured_once_for_all_runs(digits, tmp_path, monkeypatch):
    from moodistill.runs import accuracies

    made = []

    def measure(network, data, split):
        made.append(len(split))
        return 0.5 + len(made) / 100

    monkeypatch.setattr(accuracies, "student_accuracy", measure)
    runs = [accuracies.Accuracies(tmp_path / name / "accuracies.json") for name in "abc"]
    for known in runs[:2]:
        accuracies.measure_teacher(known, digits, tmp_path / "cache")
    assert made == [len(digits.data.validation), len(digits.data.test)]
    assert runs[1].known == runs[0].known == {"teacher": 0.51, "teacher_test": 0.52}
    (path,) = (tmp_path / "cache").glob("accuracy-*.json")
    path.write_text('{"teacher": 0.51}')  # one is missing: both are measured again
    accuracies.measure_teacher(runs[2], digits, tmp_path / "cache")
    assert runs[2].known == {"teacher": 0.53, "teacher_test": 0.54}
