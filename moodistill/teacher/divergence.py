"""How far a student's outputs are from the teacher's: a student's error."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def divergence(found: torch.Tensor, teacher: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of the classes' probabilities, in nats.

    Args:
        found: logits `(N, classes)` of a student.
        teacher: the teacher's.

    Returns:
        At least 0; infinite where an output is no number.
    """
    logs, wanted = F.log_softmax(found.float(), 1), F.log_softmax(teacher.float(), 1)
    apart = float(F.kl_div(logs, wanted, reduction="batchmean", log_target=True))
    return max(apart, 0.0) if math.isfinite(apart) else math.inf
