"""Old import path, kept for problem files written before: import it from `moodistill`."""

from moodistill.teacher.weights import load_weights

__all__ = ["load_weights"]
