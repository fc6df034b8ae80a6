"""Scoring students in torch on an accelerator, a sample of them against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from moodistill.accelerator import exact_convolutions, in_batches, needs_memory
from moodistill.data.images import ImageData, Split
from moodistill.onnx.runtime import outputs

AT_ONCE = 256  # images; fewer where the device's memory is short
CHECKED_SHARE = 16  # one student in so many is compared
COMPARED = 64  # images that it is compared on
MOST_APART = 1e-2  # of the largest logit


class TorchScorer:
    """Scores students of one data set on a device; the images are taken there once.

    Passes are in float32, as in ONNX Runtime, whose answers are those that count in the end.
    """

    def __init__(self, data: ImageData, split: Split, device: torch.device) -> None:
        self.data, self.device = data, device
        self.split = split.held()
        what = f"{len(split)} images to score on"
        with needs_memory(device, what, "set fewer `score_images`"):
            self.images = data.normalise(self.split.images[:]).to(device)

    @torch.no_grad()
    def logits(self, module: fx.GraphModule) -> np.ndarray:
        """`(N, classes)` of a student on the device."""

        def run(start: int, end: int) -> torch.Tensor:
            images = self.images[start:end]
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            found: torch.Tensor = module(images)
            return found.cpu()

        advice = "give the device to this run alone"
        with exact_convolutions(), needs_memory(self.device, "a student and one image", advice):
            return torch.cat(in_batches(run, len(self.images), AT_ONCE)).numpy()

    def check(self, logits: np.ndarray, model: bytes) -> None:
        """Compare logits with those of a student's ONNX file.

        Raises:
            ArithmeticError: if they differ by more than `MOST_APART`.
        """
        some = self.split.head(COMPARED)
        found = np.concatenate(list(outputs(model, self.data, some, torch.get_num_threads())))
        expected = logits[: len(found)]
        apart = float(np.abs(found - expected).max() / max(1.0, float(np.abs(found).max())))
        if not apart <= MOST_APART:
            raise ArithmeticError(
                f"ONNX Runtime and torch on {self.device} differ by {apart:.2g} of the largest "
                f"logit (at most {MOST_APART:g} allowed)"
            )


def is_checked(digest: str) -> bool:
    """Whether the student of a genome's digest is compared: the same ones in every run."""
    return int(digest[:8], 16) % CHECKED_SHARE == 0
