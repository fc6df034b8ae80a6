"""The NSGA-II driver on real layouts with recorded answers instead of measurements."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.searches import CONFIG, LAYOUT, chain_layout, make, recorded

from moodistill.errors import UserError
from moodistill.evolution.driver import RepeatedFailure, Search, SearchConfig, hypervolume
from moodistill.evolution.executor import SerialExecutor
from moodistill.evolution.problem import StructuralDistillationProblem
from moodistill.genome.layout import CONNECTIONS
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.objectives import Limits
from moodistill.runs.rows import exported_front
from moodistill.storage.searched import Searched
from moodistill.storage.store import ReplayDiverged, Store


def hashes(store):
    return [e.genome_hash for e in store.all()]


def test_first_is_the_teacher_and_every_genome_is_new(tmp_path):
    store, search = make(tmp_path, CONFIG)
    with store:
        list(search.run())
        done = store.all()
        assert len(done) == 72
        assert np.array_equal(LAYOUT.unpack(done[0].genome), LAYOUT.teacher())
        assert len({e.genome_hash for e in done}) == 72
        assert [g.number for g in store.generations()] == [1, 2, 3, 4, 5, 6]


class Backwards(SerialExecutor):
    """Answers in the order of finishing, the teacher last."""

    def map(self, genomes):
        yield from list(super().map(genomes))[::-1]


@pytest.mark.parametrize("floor", [0.9, 0.99999])
def test_who_finishes_first_is_not_taken_for_the_teacher(tmp_path, floor):
    store, search = make(tmp_path, replace(CONFIG, generations=2, limits=Limits(floor)))
    search.executor = Backwards(recorded)
    with store:
        assert list(search.run())[-1].evaluated == 24


def test_a_teacher_below_the_least_accuracy_is_refused(tmp_path):
    def evaluate(genome):
        return replace(recorded(genome), accuracy=0.5)

    store, search = make(tmp_path, replace(CONFIG, limits=Limits(0.6)), evaluate)
    search.executor = Backwards(evaluate)
    with store, pytest.raises(UserError, match="the teacher itself reaches 0.5000"):
        list(search.run())


@pytest.mark.parametrize(("population", "screen"), [(9, 9), (5, 11), (9, 1)])
def test_odd_numbers_breed(tmp_path, population, screen):
    config = replace(CONFIG, population=population, screen=screen, generations=4)
    store, search = make(tmp_path, config)
    with store:
        assert list(search.run())[-1].evaluated == 4 * population


def test_hard_limits_hold_for_what_is_measured_again(tmp_path):
    limits = Limits(max_latency_ms=0.3)
    config = replace(CONFIG, limits=limits, generations=8)
    store, search = make(tmp_path, config)
    with store:
        list(search.run())
        found = Searched.read(store, limits, config.objectives)
    slower, faster = Latency(0.31, 0.3, 0.32, 5.0), Latency(0.29, 0.28, 0.3, 5.0)
    first, second, *_ = found.front()
    again = {first: slower, second: faster}
    assert list(found.confirmed(again).students) == [second] and found.beyond(again) == [first]
    assert list(exported_front(found, again)) == [second]
    assert exported_front(found, {first: slower}) == {}
    assert exported_front(found, {}) == found.front()


def test_search_improves_on_its_first_generation(tmp_path):
    store, search = make(tmp_path, SearchConfig(population=24, generations=12, seed=1))
    with store:
        list(search.run())
        volumes = [g.hypervolume for g in store.generations()]
    assert volumes == sorted(volumes)
    assert volumes[-1] > 1.05 * volumes[0]


def test_connection_genes_are_searched(tmp_path):
    store, search = make(tmp_path, CONFIG)
    with store:
        list(search.run())
        genomes = np.array([LAYOUT.unpack(e.genome) for e in store.all()])
    for kind in ("mask", "block", "bypass"):
        chosen = [s for name, s in LAYOUT.slices.items() if name.startswith(kind)]
        bits = np.concatenate([genomes[:, s] for s in chosen], 1)
        assert not bits.all(), kind


@pytest.mark.parametrize("screen", [1, 24])
@pytest.mark.parametrize("kinds", [(), ("bypasses",), ("blocks", "merges")])
def test_connections_that_are_not_searched_stay(tmp_path, screen, kinds):
    config = replace(CONFIG, screen=screen, connections=kinds)
    store, search = make(tmp_path, config)
    seen_by_model = []
    predict = search.surrogate.predict
    search.surrogate.predict = lambda genomes: (seen_by_model.append(genomes), predict(genomes))[1]
    with store:
        list(search.run())
        genomes = np.array([LAYOUT.unpack(e.genome) for e in store.all()])
    for name, place in LAYOUT.slices.items():
        kind = name.split("/")[0]
        searched = kind == "mask" or any(CONNECTIONS[k] == f"{kind}/" for k in kinds)
        if not searched:
            assert genomes[:, place].all(), name
            assert all(some[:, place].all() for some in seen_by_model), name
    for kind in kinds:
        chosen = [s for name, s in LAYOUT.slices.items() if name.startswith(CONNECTIONS[kind])]
        assert not chosen or not np.concatenate([genomes[:, s] for s in chosen], 1).all(), kind
    assert len(seen_by_model) > 2 or screen == 1


@pytest.mark.parametrize("stop", [1, 5, 12, 13, 30, 71])
def test_resume_is_replay(tmp_path, stop):
    whole, search = make(tmp_path / "whole", CONFIG)
    with whole:
        list(search.run())
        expected, volumes = hashes(whole), [g.hypervolume for g in whole.generations()]
    evaluated = []

    def interrupted(genome):
        if len(evaluated) == stop:
            raise KeyboardInterrupt
        evaluated.append(genome)
        return recorded(genome)

    store, search = make(tmp_path / "part", CONFIG, interrupted)
    with store, pytest.raises(KeyboardInterrupt):
        list(search.run())
    fresh = []

    def counting(genome):
        fresh.append(genome)
        return recorded(genome)

    store, search = make(tmp_path / "part", CONFIG, counting)
    with store:
        last = list(search.run())[-1]
        assert hashes(store) == expected
        assert [g.hypervolume for g in store.generations()] == volumes
    assert last.replayed == stop and len(fresh) == 72 - stop


def test_more_generations_carry_on_a_finished_run(tmp_path):
    store, search = make(tmp_path, replace(CONFIG, generations=3))
    with store:
        list(search.run())
        first = hashes(store)
    store, search = make(tmp_path, CONFIG)
    with store:
        list(search.run())
        assert hashes(store)[: len(first)] == first and len(store) == 72


def test_a_replay_that_diverges_is_said(tmp_path):
    store, search = make(tmp_path, CONFIG)
    with store:
        list(search.run())
    store, search = make(tmp_path, SearchConfig(population=12, generations=6, seed=4, simd_step=8))
    with store, pytest.raises(ReplayDiverged):
        list(search.run())


def test_failed_students_are_rows_and_never_on_the_front(tmp_path):
    count = iter(range(1000))
    store, search = make(tmp_path, CONFIG, lambda g: recorded(g, fail=next(count) % 4 == 3))
    with store:
        last = list(search.run())[-1]
        failed = [e for e in store.all() if e.failure]
        assert len(failed) == 18 and last.evaluated == 72
    assert np.isfinite(last.hypervolume) and last.hypervolume > 0


def test_failures_that_repeat_stop_the_run_and_lose_nothing(tmp_path):
    count = iter(range(1000))
    store, search = make(tmp_path / "a", CONFIG, lambda g: recorded(g, fail=next(count) >= 20))
    with store:
        with pytest.raises(
            RepeatedFailure, match="8 students in a row failed alike.*mend the cause and resume"
        ):
            list(search.run())
        assert len(store) == 28
    store, search = make(tmp_path / "a", CONFIG)
    with store:  # the cause is mended: what failed stays failed, the rest goes on
        last = list(search.run())[-1]
        assert last.evaluated == 72 and last.replayed == 28
        assert sum(e.failure is not None for e in store.all()) == 8
    reasons = iter(f"ValueError: no {n}" for n in range(1000))
    store, search = make(
        tmp_path / "b", CONFIG,
        lambda g: recorded(g) if np.array_equal(g, LAYOUT.teacher())
        else replace(recorded(g, fail=True), failure=next(reasons)),
    )  # fmt: skip
    with store:  # different reasons are bad luck, not a cause
        assert list(search.run())[-1].evaluated == 72


@pytest.mark.parametrize("algorithm", ["nsga3", "sms"])
def test_other_algorithms_of_pymoo_search_and_replay(tmp_path, algorithm):
    config = replace(CONFIG, algorithm=algorithm, generations=4)
    store, search = make(tmp_path, config)
    with store:
        last = list(search.run())[-1]
        first = hashes(store)
        assert last.evaluated == 48 and len(set(first)) == 48 and last.hypervolume > 0
    fresh = []
    store, search = make(tmp_path, config, lambda g: fresh.append(g) or recorded(g))
    with store:
        assert list(search.run())[-1].replayed == 48 and fresh == []


def test_objectives_and_limits_steer_the_search(tmp_path):
    time = 0.3
    config = replace(
        CONFIG,
        objectives=("accuracy", "latency"),
        limits=Limits(max_latency_ms=time),
        generations=8,
    )
    store, search = make(tmp_path, config)
    with store:
        list(search.run())
        late = [e.latency.latency_ms for e in store.all()[-24:]]
        found = Searched.read(store, config.limits, config.objectives)
    assert np.mean(np.array(late) <= time) > 0.7  # the teacher takes 5 ms
    assert all(e.latency.latency_ms <= time for e in found.students.values())
    assert found.values().shape[1] == 2
    front = found.front()
    assert set(front) <= set(found.near_front(0.0)) < set(found.students)
    assert set(front) <= set(found.near_front(0.2))


def test_accuracy_is_the_first_objective():
    with pytest.raises(UserError, match="accuracy first"):
        SearchConfig(objectives=("latency", "accuracy"))


def test_problem_works_with_pymoo_alone():
    problem = StructuralDistillationProblem(
        LAYOUT.length, lambda x: [recorded(g, fail=i == 1) for i, g in enumerate(x)], Limits(0.3)
    )
    genomes = np.array([LAYOUT.teacher()] * 2)
    out = problem.evaluate(genomes, return_as_dictionary=True)
    assert out["F"].shape == (2, 3) and out["F"][0, 1] == 5 * 64 * 64
    assert tuple(out["F"][1]) == (1.0, 1e12, 1e12) and out["G"][1, 0] > 0 >= out["G"][0, 0]


def test_hypervolume_by_hand():
    reference = np.array([0.1, 1024.0, 8.0])
    # Half of the possible factor in both: 1 - 0.5 on both axes; accuracy 0.8.
    point = np.array([[0.2, 32.0, 8.0 / 32.0]])
    assert hypervolume(point, reference) == pytest.approx(0.8 * 0.5 * 0.5)
    assert hypervolume(np.array([[0.0, 2048.0, 16.0]]), reference) == 0.0


@pytest.mark.parametrize("settings", [{"population": 0}, {"population": 3}, {"generations": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match="expected at least"):
        SearchConfig(**settings)


def test_a_student_better_than_the_teacher_is_no_better_than_it(tmp_path):
    def evaluate(genome):
        one = recorded(genome)
        teacher = genome.all()
        return replace(one, accuracy=0.8 if teacher else 0.85 + 0.1 * one.accuracy)

    store, search = make(tmp_path, CONFIG, evaluate)
    with store:
        last = list(search.run())[-1]
        students = Searched.read(store, Limits(), CONFIG.objectives)
    # All are as accurate as is enough: the front is what is smallest and fastest.
    assert search.problem.enough == 0.8
    assert last.front_size == 1 and len(students.front()) == 1
    (best,) = students.front().values()
    assert best.parameters == min(one.parameters for one in students.students.values())


@pytest.mark.parametrize(("layers", "screen"), [(2, 1), (2, 8), (6, 24), (7, 24)])
def test_a_search_ends_when_every_student_was_scored(tmp_path, layers, screen):
    layout = chain_layout(layers=layers, channels=16)

    def evaluate(genome):
        size = int(genome.sum())
        return Evaluation(
            layout.digest(genome), layout.pack(genome), size / layout.length, size, size, 1,
            Latency(float(size), 1.0, 1.0, 1.0),
        )  # fmt: skip

    (tmp_path / "run.json").write_text("{}")
    with Store.create(tmp_path) as store:
        config = SearchConfig(population=8, generations=500, simd_step=16, screen=screen)
        list(Search(layout, config, store, SerialExecutor(evaluate)).run())
        assert 1 <= len(store.generations()) < 500
