"""Running ONNX files on real images: accuracy as the device will see it, not as torch does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import onnxruntime

from moodistill.data.images import ImageData, Split
from moodistill.data.streamed import batches
from moodistill.heads.outputs import OUTPUT

BATCH = 10  # a thread each: small batches stay in its cache


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A quiet session on the CPU; runs of one model with one number of threads are repeatable."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 `(N, H, W, C)` to `(N, C, H, W)`, as a bundle's model takes them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def outputs(
    model: bytes, data: ImageData, split: Split, threads: int, batch: int = BATCH
) -> Iterator[dict[str, np.ndarray]]:
    """The model's outputs `(n, ...)` by name, batch by batch and in order.

    An only output is called `OUTPUT`, whatever its name in the file is.

    Models that take uint8 pixels get them; of those that take floats, the ones whose input is
    called `pixels` get 0 to 255, those with `values` arrays as they are in the data, and all others
    normalised inputs. Each of `threads` threads runs
    whole batches: a third faster than all of them on one batch, and the sums within a batch do
    not depend on their number. A model without a free batch axis gets batches of its own size, the
    last one filled up with repeated images.
    """
    run = session(model, 1)
    first = run.get_inputs()[0]
    fixed = first.shape[0] if isinstance(first.shape[0], int) else None
    batch = fixed or batch

    names = [one.name for one in run.get_outputs()]
    keys = names if len(names) > 1 else [OUTPUT]

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        count = len(images)
        if fixed is not None:
            images = np.resize(images, (fixed, *images.shape[1:]))
        if first.type == "tensor(uint8)":
            feed = pixels(images)
        elif first.name == "pixels":
            feed = pixels(images).astype(np.float32)
        elif first.name == "values":
            feed = images
        else:
            feed = data.normalise(images).numpy()
        found = run.run(names, {first.name: feed})
        return {key: np.asarray(one)[:count] for key, one in zip(keys, found, strict=True)}

    with ThreadPoolExecutor(threads) as pool:
        # No more batches are read than the threads need: the images may not fit into memory.
        waiting: deque[Future[dict[str, np.ndarray]]] = deque()
        for images in batches(split.images, batch):
            waiting.append(pool.submit(answer, images))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def onnx_accuracy(model: bytes, data: ImageData, split: Split, threads: int) -> float:
    """The data's metric of an ONNX file on `split`: accuracy unless another is given."""
    return data.score(outputs(model, data, split, threads), split)
