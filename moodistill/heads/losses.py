"""What a student is taught for each output: the teacher's answer, and the targets where there are.

Soft targets at a temperature `T`, scaled by its square (Hinton et al. 2015), at every place of a
map; for values the squared error relative to the variance of the teacher's, so that one learning
rate does for all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from moodistill.heads.head import CLASSES, Head
from moodistill.heads.heads import Heads

Tensors = Mapping[str, torch.Tensor]  # by the name of the output
SMALLEST = 1e-12  # probability whose logarithm is taken


def distillation_loss(
    heads: Heads, student: Tensors, teacher: Tensors, targets: Tensors, temperature: float,
    hard: float,
) -> torch.Tensor:  # fmt: skip
    """The mean of the outputs' losses by their weights; a scalar.

    Args:
        heads: of all outputs.
        student, teacher: outputs `(N, ...)` by name.
        targets: of outputs that have some.
        temperature: of the soft targets.
        hard: weight of the loss with the targets, `1 - hard` that of the soft ones.
    """
    scored = heads.scored
    total = sum(head.weight for head in scored.values())
    parts = [
        head.weight / total * _loss(
            head, student[name], teacher[name], targets.get(name), temperature, hard
        )
        for name, head in scored.items()
    ]  # fmt: skip
    return torch.stack(parts).sum()


def _loss(
    head: Head, found: torch.Tensor, soft: torch.Tensor, targets: torch.Tensor | None,
    temperature: float, hard: float,
) -> torch.Tensor:  # fmt: skip
    if head.loss is not None:
        result: torch.Tensor = head.loss(found, soft, targets)
        return result
    if head.kind == "fidelity":
        return _relative_error(found, soft, soft)
    if head.kind == "regression":
        taught = _relative_error(found, soft, soft)
        if targets is None:
            return taught
        wanted = targets.reshape(found.shape).to(found.dtype)
        return (1 - hard) * taught + hard * _relative_error(found, wanted, soft)
    found, soft = _logits(head, found), _logits(head, soft)
    if head.kind == "multilabel":
        pull = F.binary_cross_entropy_with_logits(
            found / temperature, torch.sigmoid(soft / temperature)
        )
        own = None if targets is None else F.binary_cross_entropy_with_logits(
            found, targets.to(found.dtype)
        )  # fmt: skip
    else:
        pull = _divergence(found, soft, temperature)
        own = None if targets is None else F.cross_entropy(
            found, targets, ignore_index=head.ignore if head.kind == "segmentation" else -100
        )  # fmt: skip
    if own is None:
        return temperature**2 * pull
    return (1 - hard) * temperature**2 * pull + hard * own


def _divergence(found: torch.Tensor, soft: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of classes `(N, K, ...)`, mean of all places."""
    if found.ndim > 2:
        found, soft = (t.flatten(2).transpose(1, 2).flatten(0, 1) for t in (found, soft))
    return F.kl_div(
        F.log_softmax(found / temperature, 1), F.log_softmax(soft / temperature, 1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip


def _relative_error(found: torch.Tensor, wanted: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Squared error over the variance of the teacher's values around their channels' means."""
    others = (0, *range(2, soft.ndim))
    spread = (soft - soft.mean(others, keepdim=True)).pow(2).mean()
    return (found - wanted).pow(2).mean() / spread.clamp_min(SMALLEST)


def _logits(head: Head, values: torch.Tensor) -> torch.Tensor:
    """Logits of an output that may hold probabilities, up to a constant of each place."""
    if head.gives in (None, "logits"):
        return values
    if head.gives == "log_probabilities" and head.kind in CLASSES:
        return values
    if head.gives == "log_probabilities":
        values = values.exp()
    logarithm = values.clamp_min(SMALLEST).log()
    return logarithm if head.kind in CLASSES else logarithm - (1 - values).clamp_min(SMALLEST).log()
