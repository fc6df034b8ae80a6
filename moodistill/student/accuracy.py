"""The accuracy of a student in torch, as it inherits and as it is."""

from __future__ import annotations

import torch
from torch import fx

from moodistill.data.images import ImageData, Split
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.onnx.writer import to_onnx
from moodistill.student.evaluator import Recipe


def student_accuracy(module: fx.GraphModule, data: ImageData, split: Split) -> float:
    """Fraction of `split` that a student classifies correctly in ONNX Runtime."""
    model = to_onnx(module, data.input_shape)
    return onnx_accuracy(model, data, split, torch.get_num_threads())


def inherited_accuracy(
    module: fx.GraphModule, data: ImageData, recipe: Recipe, searched: float
) -> float:
    """Accuracy on all validation images of a student as the search scored it.

    `searched`, its accuracy there, is of the first `recipe.validation_images` of them: where the
    metric is the fraction that is right, only the others are looked at.
    """
    if not data.by_accuracy:
        return student_accuracy(module, data, data.validation)
    others = data.validation.behind(recipe.validation_images)
    if not len(others):
        return searched
    total = len(data.validation)
    right = round(searched * (total - len(others)))
    right += round(student_accuracy(module, data, others) * len(others))
    return right / total
