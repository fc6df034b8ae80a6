"""pymoo operators on genomes, one idea a file."""

from moodistill.search.operators.compose import ComposedMutation
from moodistill.search.operators.connection_mutation import ConnectionMutation
from moodistill.search.operators.crossover import LayerCrossover
from moodistill.search.operators.mask_mutation import MaskMutation
from moodistill.search.operators.repair import CanonicalRepair, SeenElimination
from moodistill.search.operators.sampling import DensitySampling

__all__ = [
    "CanonicalRepair",
    "ComposedMutation",
    "ConnectionMutation",
    "DensitySampling",
    "LayerCrossover",
    "MaskMutation",
    "SeenElimination",
]
