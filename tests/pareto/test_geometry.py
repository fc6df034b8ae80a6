"""Geometry: dominance against brute force, and a spread of finalists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.pareto.geometry import non_dominated, pick_finalists


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
    assert pick_finalists(values, 4, min_accuracy=0.99) == [2]  # the most accurate
    failed = np.array([[1.0, math.inf, math.inf], [0.5, math.nan, 1.0]])
    assert pick_finalists(failed, 4) == []
    with pytest.raises(UserError, match="0 finalists"):
        pick_finalists(values, 0)
