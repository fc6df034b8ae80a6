"""Tables of single changes, and the genomes that are best by them."""

import numpy as np
import pytest
from helpers.searches import CONFIG, LAYOUT, make

from moodistill.evolution.operators import DensitySampling
from moodistill.evolution.seeds import Seeding, find_seeds
from moodistill.evolution.tables import LayerTimes, Tables, single_changes
from moodistill.genome.canonical import canonical

STEP = 8
NOTHING_KEPT = np.zeros(LAYOUT.length, dtype=bool)
MACS = LayerTimes.by_macs()


def tables(error=lambda gene, level: 0.1):
    """Every layer costs its multiply-accumulates, every change what `error` says."""
    errors = {}
    for change in single_changes(LAYOUT, STEP, NOTHING_KEPT):
        errors.setdefault(change.gene, {})[change.level] = error(change.gene, change.level)
    return Tables(errors, MACS, {layer.name: 16 for layer in LAYOUT.layers})


def lost_channels(gene, level):
    """Channels of `conv0` are dear, others cheap; so are bypasses."""
    if gene.startswith("bypass/"):
        return 10.0
    return (64 - level[0]) / 64 * (1.0 if gene == "mask/conv0" else 0.01)


def test_every_change_is_of_one_gene_and_from_the_mildest():
    changes = list(single_changes(LAYOUT, STEP, NOTHING_KEPT))
    widths = [c.level[0] for c in changes if c.gene == "mask/conv2"]
    assert widths == sorted(widths, reverse=True) and widths[-1] == STEP
    for change in changes:
        lost = {n for n, place in LAYOUT.slices.items() if not change.genome[place].all()}
        assert lost == {change.gene}
        assert np.array_equal(change.genome, canonical(LAYOUT, change.genome, STEP))
    assert {c.gene for c in changes if c.gene.startswith("bypass/")} == {
        f"bypass/conv{i}" for i in range(1, 6)
    }


def test_kinds_that_are_not_searched_are_not_changed():
    kept = LAYOUT.unsearched(("merges",))
    assert {c.gene.partition("/")[0] for c in single_changes(LAYOUT, STEP, kept)} == {"mask"}


def test_times_of_layers_that_were_measured_are_found_again():
    rng = np.random.default_rng(0)
    sizes = np.column_stack(
        [rng.integers(8, 512, 60), rng.integers(8, 512, 60), rng.choice([1, 9], 60),
         rng.choice([16, 64, 256], 60)]
    )  # fmt: skip
    times = 1e-6 * sizes.prod(axis=1) ** 0.9
    values = np.array([100.0, 200.0, 400.0])
    fitted = LayerTimes.fit(sizes, times, values, 0.5 + 0.01 * values)
    found = fitted.layer(sizes[:, 0], sizes[:, 1], sizes[:, 2], 64.0) - 0.01 * sizes[:, 1] * 64
    at_64 = sizes[:, 3] == 64
    assert found[at_64] == pytest.approx(times[at_64], rel=0.1)
    assert fitted.per_value == pytest.approx(0.01) and fitted.constant == pytest.approx(0.5)


def test_the_estimate_adds_errors_and_layers():
    made = tables(lost_channels)
    genome = LAYOUT.teacher()
    LAYOUT.view(genome, "mask/conv1")[32:] = False
    LAYOUT.view(genome, "bypass/conv4")[0] = False
    errors, times = made.estimate(LAYOUT, np.array([LAYOUT.teacher(), genome]))
    assert errors == pytest.approx([0.0, 10.0 + 0.5 * 0.01], rel=1e-6)
    # conv1 writes and conv2 reads half as much, conv4 is gone: of 5 layers of 64 x 64 ...
    layers = np.array([3 * 64, *[64 * 64] * 5, 64 * 10], dtype=float)
    left = layers * [1, 0.5, 0.5, 1, 0, 1, 1]
    assert times[1] / times[0] == pytest.approx(left.sum() / layers.sum(), rel=1e-6)


def test_tables_are_corrected_by_what_students_show():
    """Bypasses turn out four times as dear as alone, widths half as dear."""
    made = tables(lambda gene, level: 0.02 if "bypass" in gene else lost_channels(gene, level) / 20)
    drawn = DensitySampling(LAYOUT, STEP)._do(None, 80, random_state=np.random.default_rng(0))[1:]
    parts = made.parts(LAYOUT, drawn)
    true = sum((4.0 if "bypass" in gene else 0.5) * each for gene, each in parts.items()) + 1e-6
    before = np.abs(np.log(made.estimate(LAYOUT, drawn)[0] / true))
    corrected = made.corrected(LAYOUT, drawn, true)
    after = np.abs(np.log(corrected.estimate(LAYOUT, drawn)[0] / true))
    assert np.median(after) < 0.5 * np.median(before)
    bypass, width = ("bypass/conv3", (0,)), ("mask/conv3", (32,))
    scales = [
        corrected.errors[gene][level] / made.errors[gene][level] for gene, level in (bypass, width)
    ]
    assert scales[0] > 1.2 > 0.9 > scales[1]
    assert made.errors["bypass/conv3"][(0,)] == 0.02


def test_nothing_is_corrected_by_students_that_guess():
    made = tables(lost_channels)
    drawn = DensitySampling(LAYOUT, STEP)._do(None, 20, random_state=np.random.default_rng(0))
    assert made.corrected(LAYOUT, drawn, np.full(20, 2.0)) is made


def test_seeds_lose_what_is_cheap_first():
    seeds = find_seeds(LAYOUT, tables(lost_channels), STEP, NOTHING_KEPT)
    widths = np.array([[LAYOUT.view(g, f"mask/conv{i}").sum() for i in range(6)] for g in seeds])
    small = widths[widths.sum(axis=1) < 5 * 64]
    assert len(small) and (small[:, 0] >= small[:, 2]).all() and (small[:, 0] > 8).any()
    for seed in seeds:
        assert np.array_equal(seed, canonical(LAYOUT, seed, STEP))
    times = tables(lost_channels).estimate(LAYOUT, seeds)[1]
    assert (np.diff(times) <= 0).all() and times[0] / times[-1] > 4


def test_no_single_change_of_a_width_betters_a_seed():
    seeding = Seeding(LAYOUT, tables(lost_channels), STEP, NOTHING_KEPT)
    price = 0.5
    (found,) = seeding.genomes(0.0, [price])
    base = value(seeding, found, price)
    for name, domain in seeding.domains.items():
        group = LAYOUT.groups[name]
        for width in domain:
            other = found.copy()
            order = np.argsort(-group.importance, kind="stable")
            LAYOUT.view(other, f"mask/{name}")[:] = False
            LAYOUT.view(other, f"mask/{name}")[order[:width]] = True
            assert value(seeding, other, price) >= base - 1e-9


def value(seeding, genome, price):
    errors, times = seeding.tables.estimate(LAYOUT, genome[None])
    return float(errors[0] + price * times[0] / seeding.teacher_ms)


def test_layers_are_bypassed_where_that_costs_nothing():
    def error(gene, level):
        return 0.0 if gene == "bypass/conv3" else lost_channels(gene, level)

    seeding = Seeding(LAYOUT, tables(error), STEP, NOTHING_KEPT)
    (found,) = seeding.genomes(0.0, [0.1])
    assert not LAYOUT.view(found, "bypass/conv3")[0] and LAYOUT.view(found, "bypass/conv2")[0]


def test_a_search_begins_with_the_teacher_and_seeds(tmp_path):
    made = tables(lost_channels)
    store, search = make(tmp_path, CONFIG, tables=made)
    with store:
        list(search.run())
        first = [LAYOUT.unpack(one.genome) for one in store.all()[: CONFIG.population]]
    assert first[0].all()
    seeds = find_seeds(LAYOUT, made, CONFIG.simd_step, search.unsearched)
    known = {genome.tobytes() for genome in first}
    taken = round(CONFIG.seeded * (CONFIG.population - 1))
    assert sum(seed.tobytes() in known for seed in seeds) == min(taken, len(seeds)) > 3
