"""What a network answers to images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from moodistill.data.images import ImageData
from moodistill.heads.outputs import outputs_of


@torch.no_grad()
def answers_of(
    model: nn.Module, data: ImageData, images: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """Outputs `(n, ...)` by name of `model` (in eval mode) for inputs, batch by batch."""
    device = next(model.parameters()).device
    batch = data.at_once(500)
    for start in range(0, len(images), batch):
        prepared = data.normalise(images[start : start + batch]).to(device)
        found = outputs_of(model(prepared))
        yield {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def logits_of(model: nn.Module, data: ImageData, images: np.ndarray) -> np.ndarray:
    """Logits `(N, classes)` of a classifier with one output (in eval mode) for inputs."""
    return np.concatenate([next(iter(b.values())) for b in answers_of(model, data, images)])
