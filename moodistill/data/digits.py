"""scikit-learn's handwritten digits, with fixed splits: data that need no network."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from moodistill.data.images import ImageData, Split, sha256_array
from moodistill.data.preparation import Preparation


def load_digits() -> ImageData:
    """scikit-learn's 1,797 digits, upsampled from 8x8 to 32x32; needs no network.

    A fixed permutation gives 1,097 training, 350 validation and 350 test images, one channel.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    small = torch.from_numpy(raw.images / 16.0 * 255.0).float()[:, None]
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    images = large.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    labels = raw.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    train, validation, test = (
        Split(images[part], labels[part]) for part in np.split(order, [1097, 1447])
    )
    return ImageData(
        "digits",
        train=train,
        validation=validation,
        test=test,
        mean=(0.305,),
        std=(0.345,),
        labels=tuple(str(i) for i in range(10)),
        digest=hashlib.sha256((sha256_array(images) + sha256_array(labels)).encode()).hexdigest(),
        preparation=Preparation(),  # they are of that size already; other images are squashed
    )
