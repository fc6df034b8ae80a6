"""The model that screens offspring: what it learns, when it is not listened to, what it saves."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT
from helpers.searches import CONFIG, LAYOUT, make, recorded
from scipy.stats import spearmanr

from moodistill.errors import UserError
from moodistill.evolution.driver import SearchConfig, hypervolume
from moodistill.evolution.operators import DensitySampling
from moodistill.evolution.surrogate import TRUSTED, Surrogate, features, most_volume
from moodistill.genome.canonical import canonical
from moodistill.genome.layout import SEARCHED
from moodistill.genome.ranks import write_rank
from moodistill.genome.resolve import resolve
from moodistill.pareto.geometry import shrunk
from moodistill.pareto.objectives import DEFAULT, Limits, objective_values


def students(count, seed):
    """Canonical genomes `(count, n)` and what they score `(count, 3)`."""
    rng = np.random.default_rng(seed)
    drawn = DensitySampling(LAYOUT, 8)._do(None, count, random_state=rng)
    genomes = np.array([canonical(LAYOUT, genome, 8) for genome in drawn])
    return genomes, np.array([objective_values(recorded(g), DEFAULT) for g in genomes])


@pytest.fixture
def taught():
    surrogate = Surrogate(LAYOUT)
    genomes, values = students(40, seed=1)
    surrogate.learn(genomes, values, np.ones(40, bool))
    return surrogate


def test_it_ranks_students_that_it_has_not_seen(taught):
    genomes, values = students(40, seed=2)
    predicted = taught.predict(genomes)
    for column in range(3):
        assert spearmanr(predicted[:, column], values[:, column]).statistic > 0.9
    taught.learn(genomes, values, np.ones(40, bool))
    assert taught.correlation == pytest.approx(spearmanr(predicted[:, 0], values[:, 0]).statistic)
    assert taught.trusted


@pytest.mark.parametrize("network", ["chain", "vgg16", "resnet18"])
def test_features_hold_what_a_genome_means(network, request):
    layout = LAYOUT if network == "chain" else request.getfixturevalue(network).layout
    rng = np.random.default_rng(3)
    drawn = DensitySampling(layout, 8)._do(None, 30, random_state=rng)
    genomes = np.array([canonical(layout, genome, 8) for genome in drawn])
    rows = features(layout, genomes)
    assert np.isfinite(rows).all() and len(rows) == 30
    seen = set()
    # One by one they are the same, and the last is the logarithm of all weights.
    assert np.allclose(rows[7], features(layout, genomes[7:8])[0])
    for genome, row in zip(genomes, rows, strict=True):
        structure = resolve(layout, genome)
        kept = {
            name: np.bincount(g.block[structure.kept[name]], minlength=g.blocks)
            for name, g in layout.groups.items()
            if name in structure.kept
        }
        weights = 0
        seen |= {*structure.kernels, *structure.ranks}
        for name, connected in structure.connected.items():
            outputs = np.concatenate([kept[g] for g in layout.by_name[name].groups])
            inputs = np.concatenate([kept[g] for g in structure.source[name]])
            taps = np.prod(structure.kernels.get(name, layout.by_name[name].kernel))
            if name in structure.ranks:
                weights += structure.ranks[name] * (int(inputs.sum()) * taps + int(outputs.sum()))
            else:
                weights += int(outputs @ connected @ inputs) * taps
        assert 2 ** row[-1] == pytest.approx(1 + weights)
    assert network == "chain" or len(seen) > 5


def test_features_tell_kernels_and_ranks_apart(vgg16):
    layout = vgg16.layout
    genomes = np.tile(layout.teacher(), (4, 1))
    layout.view(genomes[1], "kernel/features.10")[0] = False
    write_rank(layout.view(genomes[2], "rank/features.10"), layout.ranked["features.10"].ranks, 48)
    layout.view(genomes[3], "rank/features.10")[-1] = False
    rows = features(layout, genomes)
    assert len(np.unique(rows, axis=0)) == 4
    total = 2 ** rows[:, -1]
    assert total[0] - total[1] == pytest.approx(128 * 128 * 6)
    assert total[0] - total[2] == pytest.approx(128 * 128 * 9 - 48 * (128 * 9 + 128))
    assert total[0] > total[3] > total[2]


def test_it_says_nothing_before_it_knows_enough():
    surrogate = Surrogate(LAYOUT)
    genomes, values = students(8, seed=1)
    surrogate.learn(genomes, values, np.ones(8, bool))
    assert surrogate.predict(genomes) is None
    assert surrogate.order(genomes, values[0], np.full(3, np.inf), 8) is None


def test_it_is_not_listened_to_once_it_was_wrong(taught):
    genomes, values = students(40, seed=2)
    wrong = np.random.default_rng(0).permutation(values)
    taught.learn(genomes, wrong, np.ones(40, bool))
    assert taught.correlation < TRUSTED and not taught.trusted
    assert taught.order(genomes, values[0], np.full(3, np.inf), 40) is None
    for seed in range(3, 9):  # it learns on, and may come back
        taught.learn(*students(40, seed), np.ones(40, bool))
    assert taught.trusted


def test_failed_students_teach_it_nothing(taught):
    genomes, values = students(20, seed=2)
    worst = np.array([1.0, 1e12, 1e12])
    broken = np.vstack([values[:10], np.tile(worst, (10, 1))])
    taught.learn(genomes, broken, np.arange(20) < 10)
    other = Surrogate(LAYOUT)
    other.learn(*students(40, seed=1), np.ones(40, bool))
    other.learn(genomes[:10], values[:10], np.ones(10, bool))
    assert np.array_equal(taught.predict(genomes), other.predict(genomes))


def test_few_offspring_that_all_add_something_are_put_in_order(taught):
    genomes, values = students(120, seed=5)
    reference, free = students(40, seed=1)[1][0], np.full(3, np.inf)
    best = taught.order(genomes, reference, free, 120)[:1]
    assert list(taught.order(genomes[best], reference, free, 24)) == [0]


def test_what_it_chooses_adds_more_than_what_it_leaves(taught):
    genomes, values = students(120, seed=5)
    known = students(40, seed=1)[1]
    reference, free = known[0], np.full(3, np.inf)
    order = taught.order(genomes, reference, free, 120)
    assert sorted(order) == list(range(120))
    assert list(order) == list(taught.order(genomes, reference, free, 120))

    def volume(rows):
        return hypervolume(np.vstack([known, rows]), reference)

    added = volume(values[order[:20]])
    assert added > volume(values[order[-20:]])
    rng = np.random.default_rng(0)
    drawn = [volume(values[rng.choice(120, 20, replace=False)]) for _ in range(10)]
    assert added > np.median(drawn)


def test_the_greedy_order_is_that_of_counting_everything_again():
    rng = np.random.default_rng(0)
    points, predicted = rng.random((2000, 3)), rng.random((60, 3))
    reference, most = np.ones(3), np.full(3, np.inf)
    covered = (shrunk(predicted, reference)[:, None] <= points[None]).all(axis=2)
    expected, free = [], np.ones(len(points), dtype=bool)
    while (gains := (covered & free).sum(axis=1)).any():
        expected.append(int(gains.argmax()))
        free &= ~covered[expected[-1]]
    assert len(expected) > 10
    assert list(most_volume(predicted, points, most, reference)) == expected


def test_what_is_predicted_beyond_a_limit_comes_last(taught):
    genomes, values = students(120, seed=5)
    limit = float(np.quantile(values[:, 2], 0.4))
    most = np.array(Limits(max_latency_ms=limit).most(DEFAULT))
    chosen = taught.order(genomes, values[0], most, 24)[:24]
    assert np.mean(values[chosen, 2] <= limit * 1.1) > 0.9
    assert Limits(min_accuracy=0.7, max_parameters=5).most(("accuracy", "parameters", "macs")) == (
        pytest.approx(0.3), 5, np.inf,
    )  # fmt: skip


def test_limits_that_nobody_meets_leave_an_order(taught):
    genomes, values = students(60, seed=5)
    order = taught.order(genomes, values[0], np.array([1.0, 1.0, 0.0]), 60)
    assert sorted(order) == list(range(60))


def test_students_beyond_a_limit_are_in_nobodys_way():
    """Also of what is no objective: nothing in their objectives gives them away."""
    genomes, values = students(60, seed=1)
    best = values.argmin(axis=0)[0]
    ideal = values.copy()
    ideal[best] = values.min(axis=0) / [1, 2, 2]  # would leave nothing to add
    allowed = np.arange(60) != best
    free, offspring = np.full(3, np.inf), students(60, seed=2)[0]

    def first(allowed):
        surrogate = Surrogate(LAYOUT)
        surrogate.learn(genomes, ideal, np.ones(60, bool), allowed)
        known = ideal[allowed]
        chosen = surrogate.predict(offspring)[surrogate.order(offspring, values[0], free, 1)[0]]
        return not (known <= chosen).all(axis=1).any()

    assert first(allowed)  # adds something to the front of those that are allowed
    assert not first(np.ones(60, bool))


def volume(folder, **changes):
    store, search = make(folder, replace(CONFIG, population=16, **changes))
    with store:
        list(search.run())
        return store.generations()[-1].hypervolume


def test_screening_is_worth_evaluations(tmp_path):
    """On average of five seeds: far more than as many without a model have, and about what twice as
    many have, which is near all that there is to be had here (the next test is of real students)."""
    volumes = {"screened": [], "blind": [], "twice": []}
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name, changes in (
            ("screened", {"generations": 8}),
            ("blind", {"generations": 8, "screen": 1}),
            ("twice", {"generations": 16, "screen": 1}),
        ):
            changes = {**changes, "seed": seed, "connections": SEARCHED}
            volumes[name].append(volume(folder / name, **changes))
    screened, blind, twice = (np.mean(volumes[name]) for name in ("screened", "blind", "twice"))
    assert screened > 1.02 * blind and screened > 0.99 * twice


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_half_the_evaluations_were_enough(monkeypatch, model):
    """Of the bench's students: 80 with the model cover more than 160 without it."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from search_records import hypervolume, runs_of

    records = json.loads((ROOT / f"results/bench/search-{model}.json").read_text())
    ours, blind = runs_of(records, "ours"), runs_of(records, "no-screening")
    assert ours and blind
    assert min(hypervolume(run, 80) for run in ours) > max(hypervolume(run) for run in blind)


def test_the_driver_reports_the_correlation(tmp_path):
    store, search = make(tmp_path / "on", CONFIG)
    with store:
        found = {p.generation: p.correlation for p in search.run() if p.generation_done}
    assert found[1] is None and found[2] is None  # 12 students are too few to learn from
    assert all(-1 <= found[number] <= 1 for number in range(3, 7))
    store, search = make(tmp_path / "off", replace(CONFIG, screen=1))
    with store:
        assert all(progress.correlation is None for progress in search.run())


def test_no_screening_below_one():
    with pytest.raises(UserError, match="screen is 0; expected at least 1"):
        SearchConfig(screen=0)
