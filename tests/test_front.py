"""The front: dominance, choosing, finalists, and a strict pareto.csv."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.front import (
    Constraints,
    Student,
    choose,
    knee,
    non_dominated,
    pick_finalists,
    read_front,
    weighted,
    write_front,
)


def student(name, accuracy, parameters, latency, stage="distilled", **changes):
    row = Student(
        name, stage, None if stage == "teacher" else accuracy - 0.05, accuracy, None, parameters,
        1000, latency, latency * 0.9, latency * 1.1, 4.0, 4 * parameters, f"{name}.onnx", "ab" * 8,
        "a summary",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


TEACHER = student("teacher", 0.93, 14_000_000, 4.0, "teacher")
ROWS = [
    TEACHER,
    student("s1", 0.60, 10_000, 0.4, "searched"),
    student("d1", 0.92, 8_000_000, 3.0),
    student("d2", 0.91, 1_000_000, 1.0),
    student("d3", 0.80, 500_000, 0.8),
    student("d4", 0.62, 100_000, 0.43),
]


def brute_force(values):
    keep = []
    for i, row in enumerate(values):
        beaten = any(
            (other <= row).all() and ((other < row).any() or j < i)
            for j, other in enumerate(values)
            if j != i
        )
        keep.append(not beaten and not np.isnan(row).any())
    return np.array(keep, dtype=bool)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(2, 9), st.randoms(use_true_random=False))
def test_non_dominated_against_brute_force(count, objectives, levels, rng):
    # Few levels give many ties and duplicates.
    values = np.array(
        [[rng.choice([rng.randrange(levels), -0.0, math.inf]) for _ in range(objectives)]
         for _ in range(count)], dtype=float,
    ).reshape(count, objectives)  # fmt: skip
    assert (non_dominated(values) == brute_force(values)).all()


def test_non_dominated_ignores_nan_and_empty():
    values = np.array([[math.nan, 0.0], [1.0, 1.0], [2.0, 2.0], [1.0, 1.0]])
    assert non_dominated(values).tolist() == [False, True, False, False]
    assert non_dominated(np.empty((0, 3))).tolist() == []
    assert non_dominated(np.array([])).tolist() == []


def test_choose_takes_the_most_accurate_that_fits():
    assert choose(ROWS, Constraints()).student.student == "d1"
    assert choose(ROWS).student.student == "d1"
    choice = choose(ROWS, Constraints(max_latency_ms=1.0))
    assert choice.student.student == "d2"
    assert choice.reason == ("d2 is the most accurate among 3 of 4 finalists with latency <= 1 ms.")
    assert choose(ROWS, Constraints(max_parameters=999_999)).student.student == "d3"
    assert choose(ROWS, Constraints(max_size_bytes=400_000)).student.student == "d4"
    assert choice.gives_up.accuracy_points == pytest.approx(2.0)
    assert choice.gives_up.times_fewer_parameters == pytest.approx(14.0)
    assert choice.gives_up.times_faster == pytest.approx(4.0)
    assert str(choice.gives_up) == (
        "2.00 accuracy points lost, 14.00x fewer parameters, 4.00x faster"
    )
    assert json.loads(json.dumps(choice.to_dict()))["student"]["student"] == "d2"


def test_choose_breaks_ties_and_never_looks_at_the_test_set():
    rows = [
        TEACHER,
        student("slow", 0.9, 10, 2.0, test_accuracy=0.99),
        student("large", 0.9, 30, 1.0, test_accuracy=0.98),
        student("best", 0.9, 20, 1.0, test_accuracy=0.10),
    ]
    assert choose(rows).student.student == "best"
    assert choose(rows[::-1]).student.student == "best"


def test_choose_falls_back_to_searched_students():
    assert choose(ROWS[:2]).student.student == "s1"
    # A search that was stopped early has only what the search saw.
    early = [dataclasses.replace(row, accuracy=None, search_accuracy=row.accuracy, stage=stage)
             for row, stage in zip(ROWS, ["teacher"] + ["searched"] * 5, strict=True)]  # fmt: skip
    assert choose(early).student.student == "d1"
    assert choose(early).gives_up.accuracy_points == pytest.approx(1.0)
    assert knee(early).student.student == "d2"
    with pytest.raises(UserError, match="the most accurate has 0.9200"):
        choose(early, Constraints(min_accuracy=0.99))
    with pytest.raises(UserError, match="no student, only the teacher"):
        choose([TEACHER])
    with pytest.raises(UserError, match="no teacher row"):
        choose(ROWS[1:])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_latency_ms": 0.1},
         r"no finalist has latency <= 0\.1 ms; the fastest takes 0\.43 ms at accuracy 0\.6200; "
         r"relax max_latency_ms"),
        ({"max_parameters": 5000}, "the smallest has 100,000 parameters at accuracy 0.6200"),
        ({"max_size_bytes": 5000}, "the smallest file has 400,000 bytes"),
        ({"min_accuracy": 0.95}, "the most accurate has 0.9200 at 3 ms and 8,000,000 parameters"),
        ({"min_accuracy": 0.92, "max_latency_ms": 1.0},
         r"no finalist has latency <= 1 ms and accuracy >= 0\.92 together; with the other limits "
         r"kept, the fastest takes 3 ms at accuracy 0\.9200; with the other limits kept, the most "
         r"accurate has 0\.9100 at 1 ms"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", [choose, knee, lambda r, c: weighted(r, {"latency": 1}, c)])
def test_unreachable_constraints_say_what_is_reachable(limits, message, way):
    with pytest.raises(UserError, match=message):
        way(ROWS, Constraints(**limits))


def test_constraints_are_checked():
    for name in ("max_latency_ms", "max_parameters", "min_accuracy", "max_size_bytes"):
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(UserError, match=name):
                Constraints(**{name: bad})
    with pytest.raises(UserError, match="0.85 means 85%"):
        Constraints(min_accuracy=85)


def test_knee_of_a_known_front():
    # Accuracy falls off a cliff below 1,000,000 parameters and hardly rises above.
    rows = [TEACHER]
    for power, accuracy in enumerate([0.3, 0.5, 0.7, 0.9, 0.91, 0.92, 0.93]):
        rows.append(student(f"k{power}", accuracy, 125_000 * 2**power, 0.1 * 2**power))
    random.Random(0).shuffle(rows)
    assert knee(rows).student.student == "k3"
    assert knee(rows, Constraints(max_latency_ms=0.5)).student.latency_ms <= 0.5


def test_knee_with_three_different_extremes():
    rows = [
        TEACHER,
        student("accurate", 0.9, 2**20, 2.0),
        student("small", 0.5, 2**10, 1.0),
        student("fast", 0.5, 2**15, 0.5),
        student("middle", 0.8, 2**12, 0.6),
        student("dent", 0.55, 2**14, 0.99),
    ]
    assert knee(rows).student.student == "middle"


def test_knee_lies_on_the_side_of_the_ideal():
    # Error, log2 parameters and log2 latency in 0..1; the plane is 0.75 e + 0.5 p + 0.5 l = 1.
    places = {
        "accurate": (0, 1, 1), "small": (1, 0, 0.5), "fast": (1, 0.5, 0),
        "towards": (0.2, 0.6, 0.6), "away": (0.95, 0.45, 0.45),
    }  # fmt: skip
    rows = [
        student(name, 0.9 - 0.4 * error, int(2 ** (10 + 10 * size)), 0.5 * 4**time)
        for name, (error, size, time) in places.items()
    ]
    assert non_dominated(np.array(list(places.values()))).all()
    assert knee([TEACHER, *rows]).student.student == "towards"


def test_knee_counts_doublings_not_parameters():
    # On a log scale a straight line with one bump, on a linear scale a deep curve.
    errors = [1.0, 0.7, 0.667, 0.5, 0.333, 0.167, 0.0]
    rows = [student(f"k{i}", 0.9 - 0.4 * e, 1000 * 2**i, 0.1 * 2**i) for i, e in enumerate(errors)]
    assert knee([TEACHER, *rows]).student.student == "k1"


def test_knee_of_degenerate_fronts():
    one = student("one", 0.8, 100, 1.0)
    two = student("two", 0.7, 50, 0.5)
    three = student("three", 0.6, 25, 0.25)
    assert knee([TEACHER, one]).student == one
    assert knee([TEACHER, one, two]).student == one
    assert knee([TEACHER, one, two, three]).student == two
    # All objectives equal: one student is left.
    twins = [TEACHER, one, dataclasses.replace(one, student="twin")]
    assert knee(twins).student == knee(twins[::-1]).student
    # A dominated student is never the knee.
    worse = student("worse", 0.65, 60, 0.6)
    assert knee([TEACHER, worse, one, two, three]).student == two


def test_weighted():
    assert weighted(ROWS, {"accuracy": 1}).student.student == "d1"
    assert weighted(ROWS, {"latency": 3.0, "accuracy": 0}).student.student == "d4"
    assert weighted(ROWS, {"params": 1e300, "accuracy": 1e-300}).student.student == "d4"
    both = weighted(ROWS, {"accuracy": 1, "latency": 1, "params": 0.5})
    assert both.student.student == "d2"
    assert "accuracy 1, latency 1, params 0.5" in both.reason
    assert weighted(ROWS, {"accuracy": 1}, Constraints(max_latency_ms=0.9)).student.student == "d3"


@pytest.mark.parametrize(
    "weights",
    [{}, {"accuracy": 0}, {"speed": 1}, {"latency": -1}, {"latency": math.nan},
     {"latency": math.inf}, {"accuracy": 1, "params": -0.1}],
)  # fmt: skip
def test_bad_weights(weights):
    with pytest.raises(UserError, match="expected accuracy, params, latency"):
        weighted(ROWS, weights)


STUDENT_ROWS = st.builds(
    lambda name, accuracy, parameters, latency: student(name, accuracy, parameters, latency),
    st.uuids().map(str),
    st.sampled_from([0.1, 0.5, 0.6, 0.9]) | st.floats(0, 1),
    st.sampled_from([1, 10, 1000]) | st.integers(1, 2**40),
    st.sampled_from([0.1, 0.2, 3.0]) | st.floats(1e-6, 1e6),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(STUDENT_ROWS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_every_way_picks_a_non_dominated_student_whatever_the_order(rows, rng):
    shuffled = [TEACHER, *rows]
    rng.shuffle(shuffled)
    weights = {"accuracy": 1, "latency": 1, "params": 1}
    for way in (choose, knee, lambda r: weighted(r, weights)):
        found = way([TEACHER, *rows]).student
        again = way(shuffled).student
        key = ("accuracy", "parameters", "latency_ms")
        assert [getattr(found, k) for k in key] == [getattr(again, k) for k in key]
        for other in rows:
            assert not (
                other.accuracy > found.accuracy
                and other.parameters < found.parameters
                and other.latency_ms < found.latency_ms
            )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 12))
def test_finalists_are_a_spread_of_the_front(seed, size, count):
    rng = np.random.default_rng(seed)
    values = np.stack(
        [rng.uniform(0, 1, size), 2 ** rng.uniform(8, 24, size), 2 ** rng.uniform(-3, 3, size)], 1
    )
    picked = pick_finalists(values, count)
    front = np.flatnonzero(non_dominated(values))
    assert len(picked) == len(set(picked)) == min(count, len(front))
    assert set(picked) <= set(front.tolist())
    assert picked == pick_finalists(values, count)
    assert picked == pick_finalists(values, count + 1)[: len(picked)]
    if count >= 4 and size:
        assert set(values.argmin(axis=0).tolist()) <= set(picked)


def test_finalists_skip_the_hopeless():
    values = np.array([[0.9, 10, 0.1], [0.2, 1000, 1.0], [0.1, 4000, 2.0], [0.5, 100, 0.4]])
    assert 0 in pick_finalists(values, 4)
    assert set(pick_finalists(values, 4, min_accuracy=0.3)) == {1, 2, 3}
    assert len(pick_finalists(values, 4, min_accuracy=0.99)) == 4
    failed = np.array([[1.0, math.inf, math.inf], [0.5, math.nan, 1.0]])
    assert pick_finalists(failed, 4) == []
    with pytest.raises(UserError, match="0 finalists"):
        pick_finalists(values, 0)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FRACTIONS = st.floats(0, 1).map(abs)
POSITIVE = st.floats(1e-300, 1e300)
COUNTS = st.integers(1, 10**17)
ANY_STUDENT = st.builds(
    Student, TEXT.filter(bool), st.sampled_from(["searched", "distilled"]), FRACTIONS, FRACTIONS,
    st.none() | FRACTIONS, COUNTS, COUNTS, POSITIVE, POSITIVE, POSITIVE, POSITIVE, COUNTS,
    st.sampled_from(["", "students/a b,c.onnx"]), TEXT.filter(bool), TEXT,
)  # fmt: skip
ANY_STUDENT |= ANY_STUDENT.map(
    lambda row: dataclasses.replace(row, accuracy=None, stage="searched")
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_STUDENT, max_size=4, unique_by=lambda r: (r.student, r.stage)))
def test_csv_round_trip_is_exact(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("front")
    rows = [*rows, TEACHER]
    write_front(folder, rows)
    assert read_front(folder) == read_front(folder / "pareto.csv") == rows
    twin = json.loads((folder / "pareto.json").read_text())
    assert twin == [dataclasses.asdict(row) for row in rows]
    assert sorted(entry.name for entry in folder.iterdir()) == ["pareto.csv", "pareto.json"]


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    row = student("n", np.float64(0.1), np.int64(5), np.float32(0.5))
    write_front(tmp_path / "pareto.csv", [TEACHER, row])
    assert read_front(tmp_path)[1] == row


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("latency_ms_low", "low", "line 1: 0 columns latency_ms_low, expected 1"),
        ("macs", "student", "line 1: 2 columns student, expected 1"),
        ("14000000", "many", "line 2, column parameters: 'many'; expected a positive whole number"),
        ("14000000", "1_0", "line 2, column parameters"),
        ("14000000", "0", "line 2, column parameters"),
        ("14000000", "9" * 5000, "line 2, column parameters"),
        ("0.93", "nan", "line 2, column accuracy: 'nan'; expected a fraction"),
        ("0.93", "93", "line 2, column accuracy: '93'; expected a fraction between 0 and 1"),
        ("0.93", "", "line 2, column accuracy: empty"),
        ("0.92,", ",", "line 4, column accuracy: empty"),
        ("3.6", "inf", "line 2, column latency_ms_low: 'inf'; expected a positive number"),
        ("3.6", "1e999", "line 2, column latency_ms_low"),
        ("3.6", "-3.6", "line 2, column latency_ms_low"),
        ("teacher,teacher", "teacher,searched", "0 rows have 'teacher' in column stage"),
        ("teacher,teacher", "teacher,tutor", "line 2, column stage: 'tutor'; expected one of"),
        ("d1.onnx", "../d1.onnx", "line 4, column onnx"),
        ("d1.onnx", "/d1.onnx", "line 4, column onnx"),
        ("a summary\n", "a summary,more\n", "line 2: 16 cells, expected 15"),
        ("d2,distilled", "d1,distilled", "line 5, column student: 'd1' was distilled before"),
        ("s1,searched", "s1,teacher", "2 rows have 'teacher' in column stage, expected 1"),
        ("a summary", '"a summary', "no readable CSV"),
    ],
)
def test_damaged_csv_names_line_and_column(tmp_path, old, new, message):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_front(tmp_path)


def test_a_front_without_a_teacher_or_a_file(tmp_path):
    with pytest.raises(UserError, match="does not exist; expected the front"):
        read_front(tmp_path)
    write_front(tmp_path, ROWS[1:])
    with pytest.raises(UserError, match="0 rows have 'teacher'"):
        read_front(tmp_path)


def test_mutated_csv_never_raises_anything_else(tmp_path):
    write_front(tmp_path, ROWS)
    path = tmp_path / "pareto.csv"
    healthy = path.read_bytes()
    pieces = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"-", b"e9", b"nan", b"teacher", b"0" * 9]
    for seed in range(600):
        rng = random.Random(seed)
        data = healthy
        for _ in range(rng.choice([1, 1, 3, 30])):
            start = rng.randrange(len(data) + 1)
            end = start + rng.choice([0, 1, 1, 8, 200])
            data = data[:start] + rng.choice(pieces) * rng.randrange(3) + data[end:]
        path.write_bytes(data)
        try:
            rows = read_front(tmp_path)
            choose(rows)
            knee(rows)
        except UserError as error:
            assert "\n" not in str(error)
