"""Images and arrays in three splits: CIFAR-10, digits, folders, data sets.

May know: `io`, `heads`. Nothing of networks, genomes or searches.
Begin with `images.ImageData`, which all loaders return.
"""

from moodistill.data.array_files import load_arrays
from moodistill.data.arrays import ArrayData, from_arrays
from moodistill.data.cifar10 import load_cifar10
from moodistill.data.datasets import from_datasets
from moodistill.data.digits import load_digits
from moodistill.data.folders import load_image_folder
from moodistill.data.images import ImageData, Split
from moodistill.data.preparation import Preparation
from moodistill.data.table import DataTable

__all__ = [
    "ArrayData",
    "DataTable",
    "ImageData",
    "Preparation",
    "Split",
    "from_arrays",
    "from_datasets",
    "load_arrays",
    "load_cifar10",
    "load_digits",
    "load_image_folder",
]
