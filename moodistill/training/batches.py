"""What a teacher sees in each step of its training: the same for the same recipe and seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from moodistill.data.images import ImageData
from moodistill.data.streamed import read_batches
from moodistill.data.targets import one_of
from moodistill.teacher.task import TrainConfig
from moodistill.training.augment import alternating_flips, augment, cutout


class TrainBatches:
    """The batches of a training, each made from its number alone, so that any step may be next.

    Attributes:
        steps: of the whole training.
        steps_per_epoch: images that fill no batch are left out of an epoch; of fewer images
            than one batch all are one.
        sizes: height of the images in each step.
        pixels: of each step, all together, relative to one image in full size; what a step costs.
    """

    def __init__(self, data: ImageData, config: TrainConfig) -> None:
        self.data, self.config = data, config
        self.steps_per_epoch = max(1, len(data.train) // config.batch_size)
        self.sizes = [
            size for epochs, size in config.phases for _ in range(epochs * self.steps_per_epoch)
        ]
        self.steps = len(self.sizes)
        self.full = data.input_shape[1]
        self.pixels = (np.array(self.sizes) / self.full) ** 2 * config.batch_size
        self.fill = np.round(255 * np.array(data.mean)).clip(0, 255).astype(np.uint8)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images `(B, C, H, W)` and labels `(B,)` of a step."""
        return self._shown(step, self.data.train.images[self._chosen(step)])

    def following(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of this step and of all behind it; streamed images are read ahead."""
        steps = range(step, self.steps)
        chosen = (self._chosen(one) for one in steps)
        for one, pixels in zip(steps, read_batches(self.data.train.images, chosen), strict=True):
            yield self._shown(one, pixels)

    def _chosen(self, step: int) -> np.ndarray:
        """Numbers `(B,)` of the training images in a step."""
        config = self.config
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(self.data.train))
        return order[place * config.batch_size : (place + 1) * config.batch_size]

    def _shown(self, step: int, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        config, train, index = self.config, self.data.train, self._chosen(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([config.seed, epoch, place])
        flips = alternating_flips(len(train), epoch, config.seed)[index] if config.flip else False
        views = augment(pixels, config.pad, flips, rng)
        if config.cutout:
            views = cutout(views, config.cutout, self.fill, rng)
        images = self.data.normalise(views)
        if self.sizes[step] != self.full:
            width = max(1, round(self.sizes[step] * self.data.input_shape[2] / self.full))
            shape = (self.sizes[step], width)
            images = F.interpolate(images, shape, mode="bilinear", antialias=True)
        return images, torch.from_numpy(one_of(train.targets)[index])
