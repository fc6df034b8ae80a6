"""Operators: copies, their own random state only, whole steps, canonical children."""

import random

import numpy as np
import pytest
import torch
from helpers import random_genome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymoo.core.population import Population

from moodistill.evolution.operators import (
    CanonicalRepair,
    ComposedMutation,
    ConnectionMutation,
    DensitySampling,
    LayerCrossover,
    MaskMutation,
    SeenElimination,
)
from moodistill.evolution.operators.widths import kept_taps, noisy_top, snap, useful_ranks
from moodistill.genome.canonical import canonical
from moodistill.genome.ranks import read_rank
from moodistill.genome.resolve import resolve
from moodistill.student.builder import build_student

STEP = 8


@pytest.fixture(params=["digits", "vgg16", "resnet18"])
def layout(request):
    return request.getfixturevalue(request.param).layout


def parents(layout, count, seed=0):
    rng = np.random.default_rng(seed)
    made = [random_genome(layout, rng, bypass=True) for _ in range(count)]
    return np.array([canonical(layout, genome, STEP) for genome in made])


def mutations(layout):
    mask, connection = MaskMutation(layout, STEP), ConnectionMutation(layout)
    return [mask, connection, ComposedMutation([(mask, 0.7), (connection, 0.7)])]


def changed(layout, before, after, kind):
    """Number of slices of one kind that differ."""
    names = [name for name in layout.slices if name.startswith(f"{kind}/")]
    return sum(bool((before != after)[layout.slices[name]].any()) for name in names)


def test_mutations_copy_and_draw_from_the_given_state_only(layout):
    genomes = parents(layout, 6)
    for mutation in mutations(layout):
        before = genomes.copy()
        np.random.seed(3)
        state = np.random.get_state()[1].copy()
        first, again, other = (
            mutation._do(None, genomes, random_state=np.random.default_rng(seed))
            for seed in (1, 1, 2)
        )
        assert (np.random.get_state()[1] == state).all()
        assert (genomes == before).all() and not np.shares_memory(first, genomes)
        assert first.shape == genomes.shape and first.dtype == bool
        assert (first == again).all() and (first != other).any() and (first != genomes).any()


def test_crossover_and_sampling_draw_from_the_given_state_only(layout):
    pairs = np.stack([parents(layout, 5, 0), parents(layout, 5, 1)])
    crossover, sampling = LayerCrossover(layout), DensitySampling(layout, STEP)
    before = pairs.copy()
    state = np.random.get_state()[1].copy()
    drawn, sampled = [], []
    for seed in (1, 1, 2):
        drawn.append(crossover._do(None, pairs, random_state=np.random.default_rng(seed)))
        sampled.append(sampling._do(None, 6, random_state=np.random.default_rng(seed)))
    assert (np.random.get_state()[1] == state).all()
    assert (pairs == before).all() and not np.shares_memory(drawn[0], pairs)
    for first, again, other in (drawn, sampled):
        assert (first == again).all() and (first != other).any()


def test_sampling_runs_from_the_teacher_to_a_few_per_cent(digits):
    layout = digits.layout
    sampling = DensitySampling(layout, STEP)
    genomes = sampling._do(None, 32, random_state=np.random.default_rng(0))
    assert genomes.shape == (32, layout.length) and genomes.dtype == bool
    assert genomes[0].all() and not genomes[1:].all(axis=1).any()
    repaired = CanonicalRepair(layout, STEP)._do(None, genomes)
    counts = np.array(
        [build_student(digits.graph, layout, genome).parameters for genome in repaired]
    )
    share = counts / counts[0]
    assert share.min() < 0.05 and 0.5 < share[1:5].max() < 1.0
    histogram, _ = np.histogram(share, bins=[0.0, 0.05, 0.2, 0.4, 1.01])
    assert (histogram >= 3).all(), histogram
    # The shares fall along the population.
    assert np.corrcoef(np.arange(32), np.log(share))[0, 1] < -0.8
    for kind in ("mask", "block", "bypass", "merge", "kernel", "rank"):
        touched = [changed(layout, genomes[0], genome, kind) > 0 for genome in genomes[1:]]
        assert any(touched), kind
        assert kind == "mask" or not all(touched), kind


def test_sampled_widths_are_whole_steps(layout):
    for genome in DensitySampling(layout, STEP)._do(
        None, 12, random_state=np.random.default_rng(1)
    ):
        for name, shape in layout.shapes.items():
            width = layout.view(genome, name).sum()
            if name.startswith("mask/"):
                assert width > 0 and (width % STEP == 0 or width == shape[0])


def test_mask_mutation_moves_by_whole_steps(layout):
    genomes = parents(layout, 30)
    mutated = MaskMutation(layout, STEP)._do(None, genomes, random_state=np.random.default_rng(5))
    moved = []
    for before, after in zip(genomes, mutated, strict=True):
        for kind in ("block", "merge", "bypass", "kernel", "rank"):
            assert changed(layout, before, after, kind) == 0
        for name, shape in layout.shapes.items():
            if not name.startswith("mask/"):
                continue
            old, new = layout.view(before, name), layout.view(after, name)
            if (old != new).any():
                assert new.sum() > 0 and (new.sum() % STEP == 0 or new.sum() == shape[0])
                moved.append(int(new.sum()) - int(old.sum()))
                # A width that moves keeps most of what it has.
                assert (old & new).sum() >= 0.6 * min(old.sum(), new.sum())
    assert min(moved) <= -STEP and max(moved) >= STEP
    assert len(moved) > len(genomes)


def test_mask_mutation_prefers_the_important(vgg16):
    layout = vgg16.layout
    group = layout.groups["features.24"]
    mutation = MaskMutation(layout, STEP, groups=1e9, scale=1.0)
    genomes = np.tile(layout.teacher(), (40, 1))
    mutated = mutation._do(None, genomes, random_state=np.random.default_rng(0))
    rank = np.argsort(np.argsort(group.importance)) / group.size
    kept = [layout.view(genome, "mask/features.24").copy() for genome in mutated]
    shares = [
        rank[mask].mean() - rank[~mask].mean() for mask in kept if 0 < mask.sum() < group.size
    ]
    assert len(shares) > 5 and np.mean(shares) > 0.2


def test_connection_mutation_flips_every_kind_of_connection(layout):
    genomes = parents(layout, 100)
    mutated = ConnectionMutation(layout)._do(None, genomes, random_state=np.random.default_rng(2))
    kinds = {"block": 0, "merge": 0, "bypass": 0}
    for before, after in zip(genomes, mutated, strict=True):
        assert changed(layout, before, after, "mask") == 0
        for kind in kinds:
            count = changed(layout, before, after, kind)
            assert count <= 1
            kinds[kind] += count
    assert kinds["block"] > 5 and kinds["bypass"] > 20
    for kind in ("kernel", "rank"):
        counts = [changed(layout, *pair, kind) for pair in zip(genomes, mutated, strict=True)]
        assert 20 < np.count_nonzero(counts) < 80 and max(counts) < 8, (kind, counts)
    assert (kinds["merge"] > 10) if layout.merges else kinds["merge"] == 0


def test_connection_mutation_moves_kernels_and_ranks_by_small_steps(layout):
    """One ring on one axis; one rank up or down of those that save something at its width."""
    rng = np.random.default_rng(0)
    moves = {"kernel": [], "rank": []}
    for kind, rates in (("kernel", {"rank": 0.0}), ("rank", {"kernel": 0.0})):
        rates = {"blocks": 0.0, "bypass": 0.0, "merge": 0.0, kind: 1.0, **rates}
        mutation = ConnectionMutation(layout, **rates, step=STEP)
        before = parents(layout, 60)
        for _ in range(3):
            after = mutation._do(None, before, random_state=rng)
            for pair in zip(before, after, strict=True):
                moves[kind] += list((ring_moves if kind == "kernel" else rank_moves)(layout, *pair))
            before = after
    for kind, found in moves.items():
        assert min(found) < 0 < max(found), kind


def ring_moves(layout, before, after):
    for node in layout.kernels.values():
        old, new = (kept_taps(layout, genome, node) for genome in (before, after))
        change = np.subtract(new, old)
        if change.any():
            assert sorted(np.abs(change)) == [0, 2]
            yield int(change.sum())


def rank_moves(layout, before, after):
    for path, layer in layout.ranked.items():
        views = [layout.view(genome, f"rank/{path}") for genome in (before, after)]
        old, new = (read_rank(view, layer.ranks) for view in views)
        if old == new:
            continue
        useful = useful_ranks(layout, before, layer, STEP)
        places = [useful.index(rank) if rank in useful else len(useful) for rank in (old, new)]
        assert places[0] != places[1] and new in (*useful, None)
        if places[0] < len(useful):
            assert abs(places[0] - places[1]) == 1
        else:
            assert places[1] >= len(useful) // 2 - 1
        yield places[1] - places[0]


def test_sampled_ranks_are_whole_steps_that_save_something(layout):
    drawn = DensitySampling(layout, STEP)._do(None, 40, random_state=np.random.default_rng(1))
    found = 0
    for genome in drawn:
        for path, layer in layout.ranked.items():
            rank = read_rank(layout.view(genome, f"rank/{path}"), layer.ranks)
            if rank is not None:
                found += 1
                assert rank in useful_ranks(layout, genome, layer, STEP)
    assert found > 20


def test_widths_tell_which_ranks_are_useful(vgg16):
    layout = vgg16.layout
    layer, genome = layout.ranked["features.7"], layout.teacher()
    assert useful_ranks(layout, genome, layer, 32) == [32, 64, 96]
    layout.view(genome, "mask/features.7")[32:] = False
    assert useful_ranks(layout, genome, layer, 8) == [8, 16, 24]  # 576 * 32 / 608 is 30.3
    layout.view(genome, "kernel/features.7")[:] = False
    assert useful_ranks(layout, genome, layer, 8) == [8, 16]  # 64 * 32 / 96 is 21.3
    assert useful_ranks(layout, genome, layer, 48) == []


def test_mutation_of_a_full_rank_without_a_use_leaves_it(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    for name in layout.shapes:
        if name.startswith("mask/"):
            layout.view(genome, name)[8:] = False
    mutation = ConnectionMutation(
        layout, blocks=0.0, bypass=0.0, merge=0.0, kernel=0.0, rank=1.0, step=16
    )
    again = mutation._do(None, np.tile(genome, (20, 1)), random_state=np.random.default_rng(0))
    assert (again == genome).all()


def test_connection_mutation_both_ways_and_by_energy(vgg16):
    layout = vgg16.layout
    mutation = ConnectionMutation(layout, blocks=1.0, bypass=1.0)
    teacher = np.tile(layout.teacher(), (300, 1))
    mutated = mutation._do(None, teacher, random_state=np.random.default_rng(0))
    lost, kept = [], []
    for genome in mutated:
        for layer in layout.layers:
            if f"block/{layer.name}" not in layout.slices:
                continue
            view = layout.view(genome, f"block/{layer.name}")
            if view.shape == (4, 4) and not view.all():
                rank = np.argsort(np.argsort(layer.energy, axis=None)).reshape(view.shape)
                lost.append(rank[~view].mean())
                kept.append(rank[view].mean())
    assert len(lost) > 50
    assert np.mean(lost) < np.mean(kept) - 2
    assert not mutated[:, layout.slices["bypass/features.27"]].all()
    # From the empty vector things come back.
    back = mutation._do(None, ~teacher, random_state=np.random.default_rng(0))
    assert back[:, [s.start for n, s in layout.slices.items() if n.startswith("bypass/")]].any()


def test_composed_mutation_always_changes_something(layout):
    genomes = np.tile(layout.teacher(), (40, 1))
    never = ComposedMutation([(MaskMutation(layout, STEP, groups=1e9), 0.0)])
    mutated = never._do(None, genomes, random_state=np.random.default_rng(0))
    assert (mutated != genomes).any(axis=1).mean() > 0.8
    both = ComposedMutation(
        [(MaskMutation(layout, STEP), 0.5), (ConnectionMutation(layout), 0.0)]
    )._do(None, genomes, random_state=np.random.default_rng(0))
    for before, after in zip(genomes, both, strict=True):
        assert changed(layout, before, after, "bypass") == 0


def test_crossover_takes_every_bit_from_a_parent(layout):
    pairs = np.stack([parents(layout, 30, 0), parents(layout, 30, 1)])
    children = LayerCrossover(layout)._do(None, pairs, random_state=np.random.default_rng(0))
    assert (children.sum(axis=0) == pairs.sum(axis=0)).all()  # bit by bit a permutation
    assert (children[0] != pairs[0]).any(axis=1).mean() > 0.8
    assert (children[0] != pairs[1]).any(axis=1).mean() > 0.8


def test_crossover_moves_whole_layers(layout):
    """A group's mask and the connections and bypasses that write it stay together."""
    ones, zeros = layout.teacher(), ~layout.teacher()
    pairs = np.stack([np.tile(ones, (60, 1)), np.tile(zeros, (60, 1))])
    children = LayerCrossover(layout, within=0.0)._do(
        None, pairs, random_state=np.random.default_rng(0)
    )
    for child in children[0]:
        for name in layout.shapes:
            view = layout.view(child, name)
            assert view.all() or not view.any(), name
        for layer in layout.layers:
            if layout.groups[layer.groups[0]].frozen:
                continue
            for kind in ("block", "bypass"):
                if f"{kind}/{layer.name}" in layout.slices:
                    assert (
                        layout.view(child, f"{kind}/{layer.name}").flat[0]
                        == layout.view(child, f"mask/{layer.groups[0]}")[0]
                    )
    blockwise = LayerCrossover(layout, within=1.0)._do(
        None, pairs, random_state=np.random.default_rng(0)
    )
    partly = 0
    for child in blockwise[0]:
        for group in layout.groups.values():
            if not group.frozen:
                view = layout.view(child, f"mask/{group.name}")
                partly += 0 < view.sum() < group.size
                for block in range(group.blocks):
                    members = view[group.block == block]
                    assert members.all() or not members.any()
    assert partly > 10


def test_every_gene_is_inherited_from_either_parent(layout):
    """No slice stays with its first parent for ever."""
    pairs = np.stack([np.tile(layout.teacher(), (200, 1)), np.tile(~layout.teacher(), (200, 1))])
    child = LayerCrossover(layout)._do(None, pairs, random_state=np.random.default_rng(0))[0]
    stuck = [name for name, place in layout.slices.items() if child[:, place].all()]
    assert not stuck


@pytest.mark.parametrize("step", [1, 8, 16])
def test_children_are_canonical_after_repair(layout, step):
    pairs = np.stack([parents(layout, 8, 0), parents(layout, 8, 1)])
    rng = np.random.default_rng(0)
    children = LayerCrossover(layout)._do(None, pairs, random_state=rng).reshape(16, -1)
    for mutation in mutations(layout):
        children = mutation._do(None, children, random_state=rng)
    given = children.copy()
    repaired = CanonicalRepair(layout, step)._do(None, children)
    assert (children == given).all() and repaired.dtype == bool
    for genome in repaired:
        assert (canonical(layout, genome, step) == genome).all()
        assert resolve(layout, genome, step).source == resolve(layout, genome).source


def test_seen_genomes_are_eliminated():
    seen = SeenElimination()
    rows = np.random.default_rng(0).random((6, 30)) < 0.5
    seen.seen.add(np.packbits(rows[1]).tobytes())
    pop = Population.new("X", rows[[0, 1, 2, 2, 3, 4]])
    kept = seen.do(pop, Population.new("X", rows[[3, 5]]))
    assert (kept.get("X") == rows[[0, 2, 4]]).all()
    # Genomes that were only looked at are not remembered.
    assert len(seen.do(Population.new("X", rows[[0, 2]]))) == 2
    assert len(seen.do(Population.new("X", rows[[1]]))) == 0


@pytest.mark.parametrize(
    ("width", "expected"), [(0.0, 8), (3, 8), (11, 8), (13, 16), (60.4, 64), (70, 64), (1e9, 64)]
)
def test_snap(width, expected):
    assert snap(width, 64, 8) == expected


def test_snap_of_a_group_that_is_no_whole_number_of_steps():
    assert snap(20, 20, 8) == 20 and snap(15, 20, 8) == 16 and snap(3, 4, 8) == 4


def test_noisy_top(vgg16):
    group = vgg16.layout.groups["features.0"]
    best = np.argsort(-group.importance)[:16]
    exact = noisy_top(group, 16, 0.0, np.random.default_rng(0))
    assert set(np.flatnonzero(exact)) == set(best)
    noisy = [noisy_top(group, 16, 0.3, np.random.default_rng(s)) for s in range(20)]
    assert all(mask.sum() == 16 for mask in noisy)
    assert len({mask.tobytes() for mask in noisy}) > 10
    assert np.mean([mask[best].mean() for mask in noisy]) > 0.6
    assert noisy_top(group, 0, 0.3, np.random.default_rng(0)).sum() == 1


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_operators_take_any_bits_and_leave_global_random_states_alone(layout, seed, bits, density):
    """Whatever state the process is in, one generator gives one result."""
    rng = np.random.default_rng(bits)
    genomes = rng.random((6, layout.length)) < density
    results = []
    for outside in (1, 2):
        random.seed(outside)
        np.random.seed(outside)
        torch.manual_seed(outside)
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        own = np.random.default_rng(seed)
        pairs = np.stack([genomes[:3], genomes[3:]])
        made = [LayerCrossover(layout)._do(None, pairs, random_state=own).reshape(6, -1)]
        made += [m._do(None, made[-1], random_state=own) for m in mutations(layout)]
        made.append(DensitySampling(layout, STEP)._do(None, 6, random_state=own))
        made += [CanonicalRepair(layout, STEP)._do(None, one) for one in made]
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()
        assert torch.equal(torch.get_rng_state(), states[2])
        assert all(one.shape == genomes.shape and one.dtype == bool for one in made)
        results.append(np.array(made))
    assert (results[0] == results[1]).all()
