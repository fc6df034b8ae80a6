"""Images that open and a table that lines up."""

import dataclasses

import numpy as np
import pytest
from helpers.rows import ROWS, TEACHER, student
from PIL import Image

from moodistill.report.figures import front_table, plot_front, plot_history, plot_structure
from moodistill.storage.store import Generation


def check_png(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > 300 and picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:2], [TEACHER], [], [student("only", 0.5, 10, 1.0, search_accuracy=0.6)]]
)
def test_plot_front(tmp_path, rows):
    path = tmp_path / "new" / "pareto.png"
    plot_front(rows, path, r"cost: $5 & 50% \frac{ $ of_it")
    check_png(path)


def test_plot_front_with_an_interval_beside_the_median(tmp_path):
    row = dataclasses.replace(ROWS[2], latency_ms_low=3.1, latency_ms_high=2.9)
    plot_front([TEACHER, row], tmp_path / "pareto.png", "odd")
    check_png(tmp_path / "pareto.png")


def test_a_stopped_run_is_shown_with_what_the_search_saw(tmp_path):
    rows = [dataclasses.replace(row, accuracy=None, search_accuracy=0.5)
            for row in ROWS[:2]]  # fmt: skip
    plot_front(rows, tmp_path / "pareto.png", "stopped")
    check_png(tmp_path / "pareto.png")
    assert front_table(rows).count("0.5000") == 2


@pytest.mark.parametrize("count", [0, 1, 5])
def test_plot_history(tmp_path, count):
    generations = [Generation(i, "aa", 1.0, 3, 0.1 * i, 20 * (i + 1)) for i in range(count)]
    plot_history(generations, tmp_path / "history.png")
    check_png(tmp_path / "history.png")


def test_front_table():
    rows = [dataclasses.replace(row, test_accuracy=0.9) if row.student == "d2" else row
            for row in ROWS]  # fmt: skip
    lines = front_table(rows).splitlines()
    assert [line.split()[0] for line in lines] == [
        "student", "d1", "d2", "d3", "d4", "s1", "teacher",
    ]  # fmt: skip
    assert lines[2].split() == [
        "d2", "distilled", "0.9100", "0.9000", "1,000,000", "14.00", "1", "4.00",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 110
    assert front_table([]).startswith("student")
    assert front_table(ROWS[1:]).splitlines()[1].split()[5] == "-"


def test_structure_figure(tmp_path):
    layers = [
        {"name": f"features.{i}", "full": 64, "kept": 64 - 8 * i, "state": "kept",
         "matrix": [[1, 0], [-1, 1]] if i else None, "thinned": "1x3 rank 48/64" if i == 2 else ""}
        for i in range(7)
    ]  # fmt: skip
    gone = {
        "name": "gone",
        "full": 64,
        "kept": 0,
        "state": "bypassed",
        "matrix": None,
        "thinned": "",
    }
    layers.append(gone)
    plot_structure({"layers": layers, "merges": []}, tmp_path / "s.png", "vgg16 $x$")
    picture = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).reshape(-1, 3)
    assert (picture == (0, 0x72, 0xB2)).all(axis=1).mean() > 0.05
