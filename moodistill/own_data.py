"""Old import path, kept for problem files written before: import these from `moodistill`."""

from moodistill.data import from_datasets, load_image_folder

__all__ = ["from_datasets", "load_image_folder"]
