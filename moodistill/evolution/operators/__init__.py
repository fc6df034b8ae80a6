"""pymoo operators on genomes, one idea a file."""

from moodistill.evolution.operators.compose import ComposedMutation
from moodistill.evolution.operators.connection_mutation import ConnectionMutation
from moodistill.evolution.operators.crossover import LayerCrossover
from moodistill.evolution.operators.mask_mutation import MaskMutation
from moodistill.evolution.operators.repair import CanonicalRepair, SeenElimination
from moodistill.evolution.operators.sampling import DensitySampling, SeededSampling

__all__ = [
    "CanonicalRepair",
    "ComposedMutation",
    "ConnectionMutation",
    "DensitySampling",
    "LayerCrossover",
    "MaskMutation",
    "SeededSampling",
    "SeenElimination",
]
