"""The least sum of terms, against trying everything."""

import itertools

import numpy as np
import pytest

from moodistill.evolution import elimination
from moodistill.evolution.elimination import Term, minimise, total

GRAPHS = {
    "chain": [("a",), ("a", "b"), ("b", "c"), ("c", "d")],
    "star": [("a", "b"), ("a", "c"), ("a", "d"), ("d",)],
    "cycle": [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")],
    "of three": [("a", "b", "c"), ("c", "d"), ()],
    "apart": [("a", "b"), ("c",), ("d",)],
}
SIZES = {"a": 3, "b": 4, "c": 2, "d": 5}


def drawn(graph, seed):
    rng = np.random.default_rng(seed)
    return [Term(names, rng.normal(size=[SIZES[n] for n in names])) for names in graph]


def least(terms):
    return min(
        total(terms, dict(zip(SIZES, places, strict=True)))
        for places in itertools.product(*(range(size) for size in SIZES.values()))
    )


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_least_of_all(graph):
    for seed in range(20):
        terms = drawn(graph, seed)
        assert total(terms, minimise(terms)) == pytest.approx(least(terms))


def test_what_can_never_be_is_not_chosen():
    term = Term(("a",), np.array([np.inf, 2.0, np.inf]))
    assert minimise([term]) == {"a": 1}


def test_where_the_tables_would_be_too_large_no_single_change_lowers_the_sum(monkeypatch):
    monkeypatch.setattr(elimination, "LARGEST_TABLE", 1)
    elimination._order.cache_clear()
    for seed in range(10):
        terms = drawn(GRAPHS["cycle"], seed)
        found = minimise(terms)
        for name, size in SIZES.items():
            for place in range(size):
                assert total(terms, found) <= total(terms, {**found, name: place}) + 1e-12
    elimination._order.cache_clear()
