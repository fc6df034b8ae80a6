"""The only NSGA-II driver: ask, answer from the store or evaluate, tell."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pymoo.core.evaluator import Evaluator as PymooEvaluator
from pymoo.core.population import Population
from pymoo.core.repair import NoRepair, Repair
from pymoo.indicators.hv import HV
from pymoo.problems.static import StaticProblem

from moodistill.errors import UserError
from moodistill.evolution.algorithms import ALGORITHMS, Operators, default_operators
from moodistill.evolution.executor import Executor
from moodistill.evolution.operators import SeededSampling, SeenElimination
from moodistill.evolution.problem import WORST_COST, Score, StructuralDistillationProblem
from moodistill.evolution.seeds import find_seeds
from moodistill.evolution.surrogate import Surrogate
from moodistill.evolution.tables import Tables
from moodistill.genome.layout import CONNECTIONS, SEARCHED, GenomeLayout
from moodistill.pareto.evaluation import Evaluation
from moodistill.pareto.geometry import non_dominated, shrunk
from moodistill.pareto.objectives import DEFAULT, Limits, check_objectives
from moodistill.storage.store import Store

MAX_ALIKE_FAILURES = 8
ROUND = 8  # offspring bred for each scored student before those that look best breed again
EXPLORED = 1 / 8  # of a generation is drawn blindly, or the model would only see what it likes


@dataclass(frozen=True)
class SearchConfig:
    """NSGA-II's settings.

    Attributes:
        population: students a generation.
        generations: the initial one included.
        simd_step: widths are whole multiples of it.
        limits: students beyond one are infeasible; a least accuracy keeps the search from
            spending itself on tiny networks that guess.
        objectives: names of `moodistill.pareto.objectives.MEASURES`, `accuracy` first.
        algorithm: a key of `ALGORITHMS`.
        screen: offspring bred for each one that is scored; a model of the scores chooses. Beyond
            the first `ROUND` those bred that look best so far. 1 disables it.
        connections: the kinds (`genome.CONNECTIONS`) that are searched; of others none is lost.
        seeded: share of the first generation that the tables give, where there are any.
    """

    population: int = 32
    generations: int = 5
    seed: int = 0
    simd_step: int = 8
    limits: Limits = Limits()
    objectives: tuple[str, ...] = DEFAULT
    algorithm: str = "nsga2"
    screen: int = 24
    connections: tuple[str, ...] = SEARCHED
    seeded: float = 0.75

    def __post_init__(self) -> None:
        if check_objectives(self.objectives) != tuple(self.objectives):
            raise UserError(f"objectives are {', '.join(self.objectives)}; expected accuracy first")
        if self.algorithm not in ALGORITHMS:
            raise UserError(
                f"unknown algorithm {self.algorithm!r}; expected one of {', '.join(ALGORITHMS)}"
            )
        for kind in self.connections:
            if kind not in CONNECTIONS:
                raise UserError(
                    f"unknown connections {kind!r}; expected some of {', '.join(CONNECTIONS)}"
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; expected a whole number from 0 to 4294967295")
        if self.population < 4:
            raise UserError(f"population {self.population} is too small; expected at least 4")
        if self.screen < 1:
            raise UserError(
                f"screen is {self.screen}; expected at least 1, which disables pre-selection"
            )
        if not 0 <= self.seeded <= 1:
            raise UserError(
                f"seeded is {self.seeded}; expected a share from 0, which is none, to 1"
            )
        if self.generations < 1:
            raise UserError(f"generations {self.generations} is too small; expected at least 1")


@dataclass(frozen=True)
class Progress:
    """What the driver reports after each evaluation and, with `generation_done`, each generation.

    `correlation` is the surrogate's, of predicted and measured accuracy in the last generation.
    """

    generation: int
    evaluated: int
    replayed: int
    front_size: int
    hypervolume: float
    generation_done: bool
    last: Evaluation
    correlation: float | None = None


def hypervolume(objectives: np.ndarray, reference: np.ndarray) -> float:
    """Normalised hypervolume of `(n, m)` [error, costs...] against the teacher's `(m,)`.

    Axes: accuracy above 0, and log2 of how many times smaller each cost is, up to 1,024 times; the
    reference point is accuracy 0 at the teacher's costs. In [0, 1].
    """
    if not len(objectives):
        return 0.0
    points = shrunk(objectives, reference)
    return float(HV(ref_point=np.ones(points.shape[1]))(points))


class _Keeping(Repair):
    """Sets the bits `(n_var,)` that are not searched, then repairs.

    Before anything else sees a child: what the surrogate would hold against it is not in it.
    """

    def __init__(self, kept: np.ndarray, repair: Repair) -> None:
        super().__init__()
        self.kept, self.repair = kept, repair

    def _do(self, problem: Any, X: np.ndarray, **kwargs: Any) -> np.ndarray:
        """`(n, n_var)` genomes to repaired copies."""
        genomes = X.astype(bool) | self.kept
        return np.asarray(self.repair._do(problem, genomes, **kwargs))


class RepeatedFailure(UserError):
    """Student after student failed for the same reason: something besides them is wrong."""


class Search:
    """A deterministic NSGA-II over genomes, replayed from a store.

    Given a seed and the objective values it was told, the loop always asks for the same genomes:
    to resume is to run it again with every finished evaluation answered from the store.
    """

    def __init__(
        self,
        layout: GenomeLayout,
        config: SearchConfig,
        store: Store,
        executor: Executor,
        operators: Operators | None = None,
        tables: Tables | None = None,
    ) -> None:
        """Ready to run.

        `operators` None takes ours; `tables` are what it begins with, None for random students.
        """
        self.layout = layout
        self.config = config
        self.store = store
        self.executor = executor
        self.unsearched = layout.unsearched(config.connections)
        self.problem = StructuralDistillationProblem(
            layout.length,
            lambda x: self._evaluations(x),  # a bound method would be copied with its search
            config.limits,
            config.objectives,
        )
        self.seen = SeenElimination()
        operators = operators or default_operators(layout, config.simd_step)
        if tables is not None:
            seeds = find_seeds(layout, tables, config.simd_step, self.unsearched)
            operators = replace(
                operators, sampling=SeededSampling(seeds, operators.sampling, config.seeded)
            )
        self.operators = operators
        settings = {
            "pop_size": config.population,
            "n_offsprings": min(config.screen, ROUND) * config.population,
            "eliminate_duplicates": self.seen,
            **vars(operators),
            "repair": _Keeping(self.unsearched, operators.repair),
        }
        if config.screen > 1:
            # Only what is scored is repaired, in `_screened`.
            settings["repair"] = _Keeping(self.unsearched, NoRepair())
        self.algorithm = ALGORITHMS[config.algorithm](settings, self.problem)
        objectives = config.objectives
        latency = objectives.index("latency") if "latency" in objectives else None
        self.surrogate = Surrogate(layout, tables, latency)
        self.algorithm.setup(
            self.problem, termination=("n_gen", config.generations), seed=config.seed, verbose=False
        )

    def _evaluations(self, genomes: np.ndarray) -> list[Evaluation]:
        """For who evaluates the problem by itself."""
        answers = {i: e for i, e, _ in self._answers(list(genomes), [None] * len(genomes))}
        return [answers[index] for index in range(len(genomes))]

    def _answers(
        self, genomes: Sequence[np.ndarray], numbers: Sequence[int | None]
    ) -> Iterator[tuple[int, Evaluation, bool]]:
        """Index, evaluation and whether it came from the store; each is stored as it ends.

        A student's number is its place in the search, whatever the order of finishing.
        """
        missing = []
        for index, genome in enumerate(genomes):
            found = self.store.get(self.layout.digest(genome))
            if found is not None:
                yield index, found, True
            else:
                missing.append(index)
        for place, made in self.executor.map([genomes[index] for index in missing]):
            self.store.add(made, numbers[missing[place]])
            yield missing[place], made, False

    def run(self) -> Iterator[Progress]:
        """Run all generations, yielding after every evaluation; everything is stored at once."""
        evaluated = replayed = 0
        failures = _AlikeFailures(self.store.folder)
        reference: np.ndarray | None = None
        front = np.empty((0, len(self.config.objectives)))
        while self.algorithm.has_next():
            began = time.perf_counter()
            offspring = self.algorithm.ask()
            number = self.algorithm.n_gen
            if offspring is not None:
                offspring = self._screened(offspring, number, reference)
            if offspring is None or len(offspring) == 0:
                break
            genomes = offspring.get("X").astype(bool)
            digests = [self.layout.digest(genome) for genome in genomes]
            evaluations: dict[int, Evaluation] = {}
            places = range(evaluated + 1, evaluated + 1 + len(genomes))
            for index, answer, from_store in self._answers(genomes, places):
                evaluations[index] = answer
                evaluated += 1
                if places[index] == 1 and genomes[index].all():
                    self._check_teacher(answer)
                replayed += from_store
                failures.add(answer.failure, from_store)
                front = _extended(front, self.problem.score([answer]))
                last = len(evaluations) == len(genomes)
                volume = 0.0
                if last:
                    ordered = [evaluations[i] for i in range(len(genomes))]
                    if reference is None:
                        # The first genome is the teacher: its objectives are the reference, and
                        # its accuracy is enough.
                        self.problem.enough = ordered[0].accuracy
                        reference = self.problem.score(ordered[:1]).F[0]
                        front = _extended(front[:0], self.problem.score(ordered))
                    volume = hypervolume(front, reference)
                    self._tell(offspring, ordered, number, digests, began, len(front), volume)
                found = self.surrogate.correlation
                yield Progress(number, evaluated, replayed, len(front), volume, last, answer, found)

    def _check_teacher(self, answer: Evaluation) -> None:
        """Stop a search that could find nothing."""
        if answer.failure is not None:
            raise UserError(
                f"the teacher itself could not be scored ({answer.failure}); "
                "expected a network that runs in ONNX Runtime on this machine"
            )
        floor = self.config.limits.min_accuracy or 0.0
        if answer.accuracy < floor:
            raise UserError(
                f"the teacher itself reaches {answer.accuracy:.4f} on the validation images, less "
                f"than the {floor} asked for by `min_accuracy`; give a smaller one"
            )

    def _screened(
        self, offspring: Population, generation: int, reference: np.ndarray | None
    ) -> Population:
        """As many of the offspring as are scored in a generation, repaired."""
        count = self.config.population
        if self.config.screen == 1 or len(offspring) == 0:
            return offspring
        genomes = offspring.get("X").astype(bool)
        order = np.arange(len(genomes))
        if reference is not None:
            rng = np.random.default_rng([self.config.seed, generation])
            drawn = min(len(genomes), max(1, round(EXPLORED * count)))
            blind = rng.choice(len(genomes), drawn, replace=False)
            genomes = np.vstack([genomes, self._solved()])
            genomes, best = self._bred(genomes, reference, rng)
            if best is not None:
                # All of them once more, for searches that run out of new students; who was taken
                # is known by then.
                order = np.concatenate([blind, best, np.arange(len(genomes))])
        chosen: list[int] = []
        known = set(self.seen.seen)
        for index in order:
            (genomes[index],) = self.operators.repair._do(self.problem, genomes[index : index + 1])
            key = np.packbits(genomes[index]).tobytes()
            if key not in known:
                known.add(key)
                chosen.append(int(index))
            if len(chosen) == count:
                break
        return Population.new(X=genomes[chosen])

    def _solved(self) -> np.ndarray:
        """`(n, length)` genomes that are best by the tables as the surrogate has corrected them."""
        if (
            self.surrogate.tables is None
            or self.surrogate.predict(self.layout.teacher()[None]) is None
        ):
            return np.empty((0, self.layout.length), dtype=bool)
        return find_seeds(
            self.layout, self.surrogate.tables, self.config.simd_step, self.unsearched
        )

    def _bred(
        self, genomes: np.ndarray, reference: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Offspring `(n, length)`, with those that the best of them breed, and their order."""
        count, total = self.config.population, self.config.screen * self.config.population
        most = np.array(self.config.limits.most(self.config.objectives))
        while True:
            # Twice as many as are wanted: repair makes some of them equal.
            best = self.surrogate.order(genomes, reference, most, 2 * count)
            if best is None or len(genomes) >= total:
                return genomes, best
            matings = (min(ROUND * count, total - len(genomes)) + 1) // 2  # two children each
            pairs = rng.integers(min(count, len(best)), size=(2, matings))
            children = self.operators.crossover._do(
                self.problem, genomes[best[pairs]], random_state=rng
            ).reshape(-1, self.layout.length)
            children = self.operators.mutation._do(self.problem, children, random_state=rng)
            genomes = np.vstack([genomes, children | self.unsearched])

    def _tell(
        self,
        offspring: Population,
        evaluations: list[Evaluation],
        number: int,
        digests: list[str],
        began: float,
        front_size: int,
        volume: float,
    ) -> None:
        """Store a finished generation and let the algorithm select."""
        generation_hash = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        seconds = time.perf_counter() - began
        self.store.add_generation(number, generation_hash, seconds, front_size, volume)
        genomes = offspring.get("X").astype(bool)
        self.seen.seen.update(np.packbits(g).tobytes() for g in genomes)
        score = self.problem.score(evaluations)
        if self.config.screen > 1:
            usable = score.F[:, 1] < WORST_COST
            errors = np.array([np.nan if e.error is None else e.error for e in evaluations])
            self.surrogate.learn(genomes, score.F, usable, np.all(score.G <= 0, axis=1), errors)
        static = StaticProblem(self.problem, F=score.F, G=score.G)
        PymooEvaluator().eval(static, offspring)
        self.algorithm.tell(infills=offspring)


class _AlikeFailures:
    """Stops a search in which one student after another fails for the same reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reason: str | None = None
        self.count = 0

    def add(self, reason: str | None, from_store: bool) -> None:
        same = reason is not None and reason == self.reason
        self.reason, self.count = reason, self.count + 1 if same and not from_store else 1
        if reason is not None and not from_store and self.count >= MAX_ALIKE_FAILURES:
            raise RepeatedFailure(
                f"{self.count} students in a row failed alike ({reason}); everything so far is "
                f"kept: mend the cause and resume {self.folder}"
            )


def _extended(front: np.ndarray, score: Score) -> np.ndarray:
    """The non-dominated rows `(n, m)` of a front and newly scored feasible students."""
    merged = np.vstack([front, score.F[(score.G <= 0).all(axis=1)]])
    return merged[non_dominated(merged)] if len(merged) else merged
