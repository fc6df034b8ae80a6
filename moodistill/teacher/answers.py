"""What a network answers to images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from moodistill.accelerator import device_of
from moodistill.data.images import ImageData
from moodistill.data.streamed import Images, batches
from moodistill.heads.outputs import outputs_of


@torch.no_grad()
def answers_of(
    model: nn.Module, data: ImageData, images: Images
) -> Iterator[dict[str, np.ndarray]]:
    """Outputs `(n, ...)` by name of `model` (in eval mode) for inputs, batch by batch."""
    device = device_of(model)
    for pixels in batches(images, data.at_once(500)):
        found = outputs_of(model(data.normalise(pixels).to(device)))
        yield {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def logits_of(model: nn.Module, data: ImageData, images: Images) -> np.ndarray:
    """Logits `(N, classes)` of a classifier with one output (in eval mode) for inputs."""
    return np.concatenate([next(iter(b.values())) for b in answers_of(model, data, images)])
