"""How far a student's outputs are from the teacher's: a student's error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from moodistill.heads.heads import Heads
from moodistill.heads.losses import distillation_loss

Tensors = Mapping[str, torch.Tensor]  # by the name of the output


def divergence(heads: Heads, found: Tensors, teacher: Tensors) -> float:
    """What distillation at temperature 1 would lower, without any targets.

    Of classes the mean Kullback-Leibler divergence of their probabilities in nats; of values the
    squared error relative to their variance; of several outputs the mean by their weights.

    Args:
        heads: what the outputs mean.
        found: outputs `(N, ...)` of a student.
        teacher: the teacher's.

    Returns:
        At least 0; infinite where an output is no number.
    """
    # A loss of the user's own may need targets.
    plain = Heads({name: replace(head, loss=None) for name, head in heads.by_output.items()})
    apart = float(distillation_loss(plain, found, teacher, {}, 1.0, 0.0))
    return max(apart, 0.0) if math.isfinite(apart) else math.inf
