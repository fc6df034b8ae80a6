"""Choosing: constraints, the knee, weights, and what a refusal says."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from helpers.rows import ROWS, TEACHER, student
from hypothesis import given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.pareto.choose import Constraints, choose, knee, weighted
from moodistill.pareto.geometry import non_dominated


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
