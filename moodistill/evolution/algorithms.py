"""pymoo's algorithms, and the operators of ours that they breed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.base.genetic import GeneticAlgorithm
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.algorithms.moo.sms import SMSEMOA
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.sampling import Sampling
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.ref_dirs import get_reference_directions

from moodistill.evolution.operators import (
    CanonicalRepair,
    ComposedMutation,
    ConnectionMutation,
    DensitySampling,
    LayerCrossover,
    MaskMutation,
)
from moodistill.genome.layout import GenomeLayout


def log_crowding(F: np.ndarray, **kwargs: object) -> np.ndarray:
    """NSGA-II's crowding distance with all costs on a logarithmic scale.

    Halving a small student is worth as much as halving a large one; dominance does not change.
    """
    scaled = F.copy()
    scaled[:, 1:] = np.log2(np.maximum(scaled[:, 1:], 1e-9))
    return get_crowding_function("cd").do(scaled, **kwargs)


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


def default_operators(layout: GenomeLayout, step: int) -> Operators:
    """Ours, for widths of whole multiples of `step`."""
    return Operators(
        DensitySampling(layout, step),
        LayerCrossover(layout),
        ComposedMutation(
            [(MaskMutation(layout, step), 0.7), (ConnectionMutation(layout, step=step), 0.7)]
        ),
        CanonicalRepair(layout, step),
    )
