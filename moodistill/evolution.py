"""The only NSGA-II driver: ask, answer from the store or evaluate, tell."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.base.genetic import GeneticAlgorithm
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.algorithms.moo.sms import SMSEMOA
from pymoo.core.crossover import Crossover
from pymoo.core.evaluator import Evaluator as PymooEvaluator
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.sampling import Sampling
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.problems.static import StaticProblem
from pymoo.util.ref_dirs import get_reference_directions

from moodistill.errors import UserError
from moodistill.evaluation import Evaluation
from moodistill.genome import GenomeLayout
from moodistill.objectives import DEFAULT, Limits, check_objectives
from moodistill.operators import (
    CanonicalRepair,
    ComposedMutation,
    ConnectionMutation,
    DensitySampling,
    LayerCrossover,
    MaskMutation,
    SeenElimination,
)
from moodistill.pareto import non_dominated
from moodistill.problem import Score, StructuralDistillationProblem
from moodistill.store import Store

MAX_ALIKE_FAILURES = 8


@dataclass(frozen=True)
class SearchConfig:
    """NSGA-II's settings.

    Attributes:
        population: students a generation.
        generations: the initial one included.
        simd_step: widths are whole multiples of it.
        limits: students beyond one are infeasible; a least accuracy keeps the search from
            spending itself on tiny networks that guess.
        objectives: names of `moodistill.objectives.MEASURES`, `accuracy` first.
        algorithm: a key of `ALGORITHMS`.
    """

    population: int = 32
    generations: int = 5
    seed: int = 0
    simd_step: int = 8
    limits: Limits = Limits()
    objectives: tuple[str, ...] = DEFAULT
    algorithm: str = "nsga2"

    def __post_init__(self) -> None:
        if check_objectives(self.objectives) != tuple(self.objectives):
            raise UserError(f"objectives are {', '.join(self.objectives)}; expected accuracy first")
        if self.algorithm not in ALGORITHMS:
            raise UserError(
                f"unknown algorithm {self.algorithm!r}; expected one of {', '.join(ALGORITHMS)}"
            )
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; expected a whole number of at least 0")
        if self.population < 4:
            raise UserError(f"population {self.population} is too small; expected at least 4")
        if self.generations < 1:
            raise UserError(f"generations {self.generations} is too small; expected at least 1")


@dataclass(frozen=True)
class Progress:
    """What the driver reports after each evaluation and, with `done`, each generation."""

    generation: int
    evaluated: int
    replayed: int
    front_size: int
    hypervolume: float
    generation_done: bool
    last: Evaluation


def log_crowding(F: np.ndarray, **kwargs: object) -> np.ndarray:
    """NSGA-II's crowding distance with all costs on a logarithmic scale.

    Halving a small student is worth as much as halving a large one; dominance does not change.
    """
    scaled = F.copy()
    scaled[:, 1:] = np.log2(np.maximum(scaled[:, 1:], 1e-9))
    return get_crowding_function("cd").do(scaled, **kwargs)


def hypervolume(objectives: np.ndarray, reference: np.ndarray) -> float:
    """Normalised hypervolume of `(n, m)` [error, costs...] against the teacher's `(m,)`.

    Axes: accuracy above 0, and log2 of how many times smaller each cost is, up to 1,024 times; the
    reference point is accuracy 0 at the teacher's costs. In [0, 1].
    """
    if not len(objectives):
        return 0.0
    smaller = np.log2(reference[None, 1:] / objectives[:, 1:]) / 10.0
    points = np.column_stack([objectives[:, 0], 1.0 - np.clip(smaller, 0.0, 1.0)])
    return float(HV(ref_point=np.ones(points.shape[1]))(points))


def _nsga2(settings: dict[str, Any], problem: Problem) -> GeneticAlgorithm:
    return NSGA2(**settings, survival=RankAndCrowding(crowding_func=log_crowding))


def _nsga3(settings: dict[str, Any], problem: Problem) -> GeneticAlgorithm:
    size = settings["pop_size"]
    directions = get_reference_directions("energy", problem.n_obj, size, seed=1)
    return NSGA3(directions, **settings)


# pymoo's own, all with our operators. Only NSGA-II's crowding is on logarithmic axes. SPEA2 is left
# out: with one seed it breeds other students each time, so its runs could not be resumed.
ALGORITHMS: dict[str, Callable[[dict[str, Any], Problem], GeneticAlgorithm]] = {
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "sms": lambda settings, problem: SMSEMOA(**settings),
}


@dataclass(frozen=True)
class Operators:
    """What a genetic algorithm samples, breeds and repairs with."""

    sampling: Sampling
    crossover: Crossover
    mutation: Mutation
    repair: Repair


def default_operators(layout: GenomeLayout, step: int, kept: np.ndarray | None = None) -> Operators:
    """Ours; bits in `kept` `(n_var,)` stay True in every genome."""
    return Operators(
        DensitySampling(layout, step),
        LayerCrossover(layout),
        ComposedMutation([(MaskMutation(layout, step), 0.7), (ConnectionMutation(layout), 0.7)]),
        CanonicalRepair(layout, step, kept),
    )


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
        evaluate: Callable[[np.ndarray], Evaluation],
        operators: Operators | None = None,
    ) -> None:
        self.layout = layout
        self.config = config
        self.store = store
        self.evaluate = evaluate
        self.problem = StructuralDistillationProblem(
            layout.length,
            lambda x: [self._answer(g)[0] for g in x],
            config.limits,
            config.objectives,
        )
        self.seen = SeenElimination()
        operators = operators or default_operators(layout, config.simd_step)
        settings = {
            "pop_size": config.population,
            "eliminate_duplicates": self.seen,
            **vars(operators),
        }
        self.algorithm = ALGORITHMS[config.algorithm](settings, self.problem)
        self.algorithm.setup(
            self.problem, termination=("n_gen", config.generations), seed=config.seed, verbose=False
        )

    def _answer(self, genome: np.ndarray) -> tuple[Evaluation, bool]:
        """An evaluation and whether it came from the store."""
        found = self.store.get(self.layout.digest(genome))
        if found is not None:
            return found, True
        made = self.evaluate(genome)
        self.store.add(made)
        return made, False

    def run(self) -> Iterator[Progress]:
        """Run all generations, yielding after every evaluation; everything is stored at once."""
        evaluated = replayed = alike = 0
        failure: str | None = None
        reference: np.ndarray | None = None
        front = np.empty((0, len(self.config.objectives)))
        while self.algorithm.has_next():
            began = time.perf_counter()
            offspring = self.algorithm.ask()
            if offspring is None or len(offspring) == 0:
                break
            number = self.algorithm.n_gen
            genomes = offspring.get("X").astype(bool)
            digests = [self.layout.digest(genome) for genome in genomes]
            evaluations = []
            for index, genome in enumerate(genomes):
                answer, from_store = self._answer(genome)
                evaluations.append(answer)
                evaluated += 1
                if evaluated == 1 and answer.failure is not None:
                    raise UserError(
                        f"the teacher itself could not be scored ({answer.failure}); "
                        "expected a network that runs in ONNX Runtime on this machine"
                    )
                replayed += from_store
                same = answer.failure is not None and answer.failure == failure
                failure, alike = answer.failure, alike + 1 if same and not from_store else 1
                if failure is not None and not from_store and alike >= MAX_ALIKE_FAILURES:
                    raise RepeatedFailure(
                        f"{alike} students in a row failed alike ({failure}); everything so far is "
                        f"kept: mend the cause and continue with --resume {self.store.folder}"
                    )
                if reference is None:
                    # The first genome is the teacher: its objectives are the reference.
                    reference = self.problem.score([answer]).F[0]
                front = _extended(front, self.problem.score([answer]))
                last = index + 1 == len(genomes)
                volume = hypervolume(front, reference) if last else 0.0
                if last:
                    generation_hash = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
                    self.store.add_generation(
                        number, generation_hash, time.perf_counter() - began, len(front), volume
                    )
                    self.seen.seen.update(np.packbits(g).tobytes() for g in genomes)
                    score = self.problem.score(evaluations)
                    static = StaticProblem(self.problem, F=score.F, G=score.G)
                    PymooEvaluator().eval(static, offspring)
                    self.algorithm.tell(infills=offspring)
                yield Progress(number, evaluated, replayed, len(front), volume, last, answer)


def _extended(front: np.ndarray, score: Score) -> np.ndarray:
    """The non-dominated rows `(n, m)` of a front and newly scored feasible students."""
    merged = np.vstack([front, score.F[(score.G <= 0).all(axis=1)]])
    return merged[non_dominated(merged)] if len(merged) else merged
