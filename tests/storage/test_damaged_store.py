"""A store cut off anywhere opens, or is refused in one line, and is never made worse; full disks."""

import random
import subprocess

import pytest
from helpers.outcomes import assert_same, carry_on, orphans, outcome, stored
from helpers.stores import evaluation, run_folder

from moodistill.errors import UserError
from moodistill.storage.store import Store

PAGE = 4096
FRAME = PAGE + 24  # of the write-ahead log, behind its header of 32 bytes


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Database and write-ahead log of a store whose writer was killed, and what it holds."""
    folder = run_folder(tmp_path_factory.mktemp("live") / "run", 60)
    with Store.open(folder) as store:
        store.add_generation(1, "aa", 1.0, 5, 0.5)
        for number in range(60, 90):
            store.add(evaluation(number))
        files = {path.name: path.read_bytes() for path in folder.glob("evaluations.sqlite*")}
    assert len(files["evaluations.sqlite-wal"]) > 30 * FRAME
    files.pop("evaluations.sqlite-shm")  # made again from the log
    return files, [evaluation(number) for number in range(90)]


def offsets(length, unit, start=0):
    """Around every boundary, and random ones between."""
    around = {b + d for b in range(start, length + 1, unit) for d in (-1, 0, 1)}
    rng = random.Random(0)
    around |= {rng.randrange(length) for _ in range(60)}
    return sorted(o for o in around if 0 <= o < length)


def open_damaged(folder, files, readonly):
    """The evaluations, or None if the store was refused; a refused one is as it was."""
    for path in folder.glob("evaluations.sqlite*"):
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        with Store.open(folder, readonly=readonly) as store:
            return store.all(), store.generations()
    except UserError as error:
        assert "\n" not in str(error) and "evaluations.sqlite" in str(error)
        for name, data in files.items():
            assert (folder / name).read_bytes() == data, f"{name} was changed"
        return None


def test_a_database_cut_off_anywhere(live, tmp_path):
    files, _ = live
    folder = run_folder(tmp_path / "run")
    database = files["evaluations.sqlite"]
    with_log = refused = 0
    places = offsets(len(database), PAGE)
    for number, place in enumerate(places):
        damaged = {**files, "evaluations.sqlite": database[:place]}
        if number % 2:
            del damaged["evaluations.sqlite-wal"]
            assert open_damaged(folder, damaged, number % 4 == 1) is None, place
            refused += 1
            continue
        # The log holds whole pages: with those the database may be whole again, or is refused.
        found = open_damaged(folder, damaged, number % 4 == 0)
        if found is not None:
            with_log += 1
            assert found[0] == live[1]
    assert refused > 30 and len(places) > 70 and with_log < len(places) // 4
    assert open_damaged(folder, files, False) is not None  # the lock was let go every time


def test_a_log_cut_off_anywhere(live, tmp_path):
    """What is lost are the last evaluations, and nothing before them."""
    files, whole = live
    folder = run_folder(tmp_path / "run")
    log = files["evaluations.sqlite-wal"]
    counts = []
    for number, place in enumerate(offsets(len(log), FRAME, 32)):
        damaged = {**files, "evaluations.sqlite-wal": log[:place]}
        found = open_damaged(folder, damaged, number % 2 == 0)
        if found is None:
            # A reader finds no schema in an empty database; the writer's log has it all.
            assert place < 32 + FRAME
            continue
        evaluations, _ = found
        assert evaluations == whole[: len(evaluations)], place
        counts.append(len(evaluations))
    assert counts == sorted(counts) and counts[0] == 60 and counts[-1] in (89, 90)
    assert len(counts) > 100 and len(set(counts)) == 30 + (counts[-1] == 90)
    assert open_damaged(folder, files, False)[0] == whole


def test_a_cut_off_store_with_a_whole_log_is_refused_untouched(live, tmp_path):
    """Closing a refused database must not write its log into it: both are needed to mend it."""
    files, _ = live
    folder = run_folder(tmp_path / "run")
    damaged = {**files, "evaluations.sqlite": files["evaluations.sqlite"][: 3 * PAGE + 100]}
    assert open_damaged(folder, damaged, readonly=False) is None
    (folder / "evaluations.sqlite").write_bytes(files["evaluations.sqlite"])
    with Store.open(folder) as store:
        assert len(store) == 90


def assert_full(done, folder, expected):
    """One line, exit code 2, and what was stored so far is there."""
    assert done.code == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "space" in line
    hashes = [e.genome_hash for e in expected["evaluations"]]
    now = stored(folder)
    assert now == hashes[: len(now)]
    return len(now)


# Largest file in bytes: too small for the log; for the weights of the first finalist.
@pytest.mark.parametrize(
    ("limit", "students"),
    [(60_000, range(2, 10)), pytest.param(400_000, [18], marks=pytest.mark.slow)],
)
def test_files_that_may_grow_no_more(driver, recorded_run, tmp_path, limit, students):
    folder = tmp_path / "run"
    expected = outcome(recorded_run)
    done = driver.call(*carry_on(folder), file_limit=limit)
    assert assert_full(done, folder, expected) in students
    assert driver.call(*carry_on(folder)).code == 0
    assert not orphans(folder)
    assert_same(folder, expected)


@pytest.fixture
def disk(tmp_path):
    """A folder, and a function that sets the size of the disk that it is on."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mounted, "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")

    def resize(kilobytes):
        options = f"remount,size={kilobytes}k"
        subprocess.run([*mounted, options, "tmpfs", place], check=True)

    yield place, resize
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again(driver, recorded_run, disk):
    place, resize = disk
    folder, expected = place / "run", outcome(recorded_run)
    counts = []
    for kilobytes in (4, 12, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280):
        resize(kilobytes)
        done = driver.call(*carry_on(folder))
        if done.code == 0:
            break
        counts.append(assert_full(done, folder, expected))
    assert len(counts) >= 6 and counts == sorted(counts) and counts[-1] == 18
    resize(20_000)
    assert driver.call(*carry_on(folder)).code == 0
    assert not orphans(folder)
    assert_same(folder, expected)


@pytest.mark.slow
def test_a_cache_that_is_full(driver, recorded_run, disk, tmp_path):
    """The cache is on another disk as a rule: a run needs it, and loses nothing without."""
    place, resize = disk
    folder, expected = tmp_path / "run", outcome(recorded_run)
    cache = {"MOODISTILL_CACHE": str(place)}
    assert_full(driver.call(*carry_on(folder), environment=cache), folder, expected)
    resize(20_000)
    assert driver.call(*carry_on(folder), environment=cache).code == 0
    assert_same(folder, expected)
