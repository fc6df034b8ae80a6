"""What a network answers to images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from moodistill.accelerator import device_of
from moodistill.data.images import ImageData
from moodistill.data.streamed import Images, batches
from moodistill.teacher import plain


@torch.no_grad()
def logits_of(model: nn.Module, data: ImageData, images: Images) -> np.ndarray:
    """Logits `(N, classes)` of `model` (in eval mode) for uint8 `(N, H, W, C)`."""
    device = device_of(model)
    answers = []
    for pixels in batches(images, data.at_once(500)):
        prepared = data.normalise(pixels).to(device)
        answers.append(plain.logits_of(model(prepared)).cpu().numpy())
    return np.concatenate(answers)
