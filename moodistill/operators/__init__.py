"""pymoo operators on genomes, one idea a file."""

from moodistill.operators.compose import ComposedMutation
from moodistill.operators.connection_mutation import ConnectionMutation
from moodistill.operators.crossover import LayerCrossover
from moodistill.operators.mask_mutation import MaskMutation
from moodistill.operators.repair import CanonicalRepair, SeenElimination
from moodistill.operators.sampling import DensitySampling

__all__ = [
    "CanonicalRepair",
    "ComposedMutation",
    "ConnectionMutation",
    "DensitySampling",
    "LayerCrossover",
    "MaskMutation",
    "SeenElimination",
]
