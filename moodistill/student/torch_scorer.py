"""Scoring students in torch on an accelerator, a sample of them against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from moodistill.accelerator import exact_convolutions, in_batches, needs_memory
from moodistill.data.images import ImageData, Split
from moodistill.heads.heads import Arrays
from moodistill.heads.outputs import outputs_of
from moodistill.onnx.runtime import outputs

AT_ONCE = 256  # images; fewer where the device's memory is short
CHECKED_SHARE = 16  # one student in so many is compared
COMPARED = 64  # images that it is compared on
MOST_APART = 1e-2  # of the largest value of an output


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
    def answers(self, module: fx.GraphModule) -> list[Arrays]:
        """A student's outputs `(n, ...)` by name, batch by batch."""

        def run(start: int, end: int) -> Arrays:
            images = self.images[start:end]
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            found = outputs_of(module(images))
            return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}

        advice = "give the device to this run alone"
        with exact_convolutions(), needs_memory(self.device, "a student and one image", advice):
            return in_batches(run, len(self.images), AT_ONCE)

    def check(self, answers: Sequence[Arrays], model: bytes) -> None:
        """Compare answers with those of a student's ONNX file.

        Raises:
            ArithmeticError: if they differ by more than `MOST_APART`.
        """
        some = self.split.head(COMPARED)
        files = list(outputs(model, self.data, some, torch.get_num_threads()))
        for name in answers[0]:
            found = np.concatenate([batch[name] for batch in files])
            expected = np.concatenate([batch[name] for batch in answers])[: len(found)]
            apart = float(np.abs(found - expected).max() / max(1.0, float(np.abs(found).max())))
            if not apart <= MOST_APART:
                raise ArithmeticError(
                    f"ONNX Runtime and torch on {self.device} differ by {apart:.2g} of the largest "
                    f"value of {name} (at most {MOST_APART:g} allowed)"
                )


def is_checked(digest: str) -> bool:
    """Whether the student of a genome's digest is compared: the same ones in every run."""
    return int(digest[:8], 16) % CHECKED_SHARE == 0
