"""What inheritance and importance need of the teacher: samples of every layer, cached."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moodistill.accelerator import device_of, exact_convolutions, needs_memory
from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.io.cache import read_cached, save_cached
from moodistill.io.cache_dir import cache_key, cached
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv
from moodistill.teacher.weights import network_digest

FEW_PIXELS = 8000  # sampled however large the network is
MOST_BYTES = 512 * 2**20  # of the samples of a network that is content with fewer than it asks
FEW_IMAGES = 64  # however large they are
MOST_MAP_BYTES = 2 * 2**30  # of the largest map of all images, several of which are held at once
Samples = dict[str, torch.Tensor]  # by layer


@dataclass(frozen=True)
class CalibrationConfig:
    """What is sampled in the calibration pass (training split only).

    Attributes:
        images: how many go through the teacher.
        pixels: of every layer's input.
        patches: places of the output of every convolution larger than 1x1.
        seed: of the draw of places.
    """

    images: int = 512
    pixels: int = 64_000
    patches: int = 8_000
    seed: int = 0


@dataclass(frozen=True)
class TeacherSamples:
    """What the teacher's layers read and give at fixed places of the calibration images.

    Attributes:
        images: `(n, C, H, W)` normalised calibration images.
        inputs: for every layer, `(pixels, channels)` sampled inputs (before a flatten).
        outputs: for every convolution larger than 1x1, `(patches, channels)` sampled outputs.
        config: how they were drawn; with fewer pixels than asked where a network is large.
    """

    images: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    config: CalibrationConfig

    def to(self, device: torch.device) -> TeacherSamples:
        """The same on a device, where every student's solve reads them."""
        # Convolutions run up to twice as fast on maps whose channels lie together.
        layout = torch.channels_last if self.images.ndim == 4 else torch.contiguous_format
        return replace(
            self,
            images=self.images.to(device).contiguous(memory_format=layout),
            inputs={name: rows.to(device) for name, rows in self.inputs.items()},
            outputs={name: rows.to(device) for name, rows in self.outputs.items()},
        )


def affordable(graph: TeacherGraph, config: CalibrationConfig) -> CalibrationConfig:
    """The configuration with what fits into memory: `images` and `pixels` halved as need be.

    Until the largest map of all images takes no more than `MOST_MAP_BYTES` and the samples of all
    layers no more than `MOST_BYTES`; never below `FEW_IMAGES` and `FEW_PIXELS`.
    """
    largest = 4 * max(step.form.area * step.form.channels for step in graph.steps)
    images = config.images
    while images * largest > MOST_MAP_BYTES and images > FEW_IMAGES:
        images = max(images // 2, FEW_IMAGES)
    config = replace(config, images=images)
    forms = [graph.step(layer.inputs[0]).form for layer in graph.layers]

    given = sum(
        min(config.patches, config.images * layer.form.area) * layer.form.channels
        for layer in graph.layers
        if reads_patches(graph.layer_module(layer.name))
    )

    def size(pixels: int) -> int:
        read = sum(min(pixels, config.images * f.area) * f.channels for f in forms)
        return 4 * (read + given)

    pixels = config.pixels
    while size(pixels) > MOST_BYTES and pixels > FEW_PIXELS:
        pixels = max(pixels // 2, FEW_PIXELS)
    return replace(config, pixels=pixels)


def sample_positions(count: int, area: int, most: int, seed: int) -> torch.Tensor:
    """At most so many flat indices into `(count, area)`, equal for all maps of one resolution."""
    total = count * area
    if total <= most:
        return torch.arange(total)
    rng = np.random.default_rng([seed, area])
    return torch.from_numpy(np.sort(rng.choice(total, most, replace=False)))


def output_positions(values: torch.Tensor, config: CalibrationConfig) -> torch.Tensor:
    """Flat indices into a layer's output `(N, C, *size)` or one of its size."""
    count, _, *size = values.shape
    index = sample_positions(count, math.prod(size), config.patches, config.seed)
    return index.to(values.device)


def sample_pixels(values: torch.Tensor, repeat: int, config: CalibrationConfig) -> torch.Tensor:
    """Sampled rows `(pixels, channels)` of a map `(n, C, H, W)` or features `(n, C * repeat)`."""
    if values.ndim == 2:
        values = values.unflatten(1, (-1, repeat))
    values = _with_two_axes(values)
    count, _, height, width = values.shape
    index = sample_positions(count, height * width, config.pixels, config.seed)
    return _at(values, index.to(values.device))


def _with_two_axes(values: torch.Tensor) -> torch.Tensor:
    """A map of any size as `(N, C, H, W)`, its places in the same order."""
    if values.ndim == 3:
        return values.unsqueeze(2)
    return values.flatten(3) if values.ndim == 5 else values


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `(n, C)` of a map `(N, C, *size)` at flat indices into `(N, *size)`."""
    values = _with_two_axes(values)
    _, _, height, width = values.shape
    image, place = index // (height * width), index % (height * width)
    # Not flattened first: a map whose channels lie together would be copied as a whole.
    return values[image, :, place // width, place % width]


def as_map(values: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """A layer's input with its channels on the first axis behind the batch's."""
    last = isinstance(layer, torch.nn.Linear) and values.ndim > 2
    return values.movedim(-1, 1) if last else values


@torch.no_grad()
def collect_samples(
    graph: TeacherGraph,
    data: ImageData,
    config: CalibrationConfig,
    cache_dir: Path | None,
    teacher_digest: str,
) -> TeacherSamples:
    """One pass of the teacher over the calibration images, or its result from the cache.

    The cache file is keyed by teacher, data and configuration; a damaged one is made again.

    Raises:
        UserError: names the first layer whose samples are not finite.
    """
    config = affordable(graph, config)
    images = data.calibration(config.images)
    device = device_of(graph.module)
    made_of = (teacher_digest, network_digest(graph.module), data.digest, config)
    key = cache_key(*made_of, *([] if device.type == "cpu" else [device.type]))
    path = cache_dir / f"samples-{key}.safetensors" if cache_dir else None

    def read(path: Path) -> tuple[Samples, Samples]:
        stored = _unpacked(read_cached(path))
        # Earlier versions kept whatever they saw.
        if set(stored[0]) != {layer.name for layer in graph.layers} or _broken(*stored):
            raise ValueError("samples of other layers, or not finite")
        return stored

    def write(made: tuple[Samples, Samples], path: Path) -> None:
        kinds = zip(("inputs", "outputs"), made, strict=True)
        save_cached({f"{kind}.{n}": v for kind, of in kinds for n, v in of.items()}, path)

    found = cached(path, read, lambda: _collected(graph, images, config), write)
    return TeacherSamples(images, *found, config)


def _collected(
    graph: TeacherGraph, images: torch.Tensor, config: CalibrationConfig
) -> tuple[Samples, Samples]:
    """Inputs and outputs of the layers by one pass over all images."""
    device, what = device_of(graph.module), f"the maps of {len(images)} calibration images"
    inputs: Samples = {}
    outputs: Samples = {}
    handles = []
    for layer in graph.layers:
        repeat = graph.step(layer.inputs[0]).form.repeat

        def hook(module, args, output, name=layer.name, repeat=repeat):  # type: ignore
            if name not in inputs:  # a shared layer is sampled at its first call
                inputs[name] = sample_pixels(as_map(args[0], module), repeat, config)
                if reads_patches(module):
                    outputs[name] = _at(output, output_positions(output, config))

        handles.append(graph.layer_module(layer.name).register_forward_hook(hook))
    try:
        # All images at once: every layer samples its pixels over the whole set.
        with exact_convolutions(), needs_memory(device, what, "set fewer `calibration_images`"):
            graph.module(images.to(device, copy=True))  # some networks work in place on their input
    finally:
        for handle in handles:
            handle.remove()
    broken = _broken(inputs, outputs)
    if broken:
        raise UserError(
            f"the teacher's layer {broken} NaN or infinity on images of the data; expected "
            "finite numbers: check its weights, and `mean` and `std` of the data"
        )
    here = [{name: rows.cpu() for name, rows in found.items()} for found in (inputs, outputs)]
    return here[0], here[1]


def _unpacked(stored: Samples) -> tuple[Samples, Samples]:
    """Inputs and outputs by layer from the cache's names."""
    parts: dict[str, Samples] = {"inputs": {}, "outputs": {}}
    for key, value in stored.items():
        kind, _, name = key.partition(".")
        parts.setdefault(kind, {})[name] = value
    return parts["inputs"], parts["outputs"]


def _broken(inputs: Samples, outputs: Samples) -> str:
    """The first layer that reads or gives NaN or infinity, and where; empty if none does."""
    for name, rows in inputs.items():
        if not torch.isfinite(rows).all():
            return f"{name} reads"
        if name in outputs and not torch.isfinite(outputs[name]).all():
            return f"{name} gives"
    return ""


def reads_patches(layer: torch.nn.Module) -> bool:
    """Whether a layer reads more than one pixel at a time."""
    return isinstance(layer, Conv) and set(layer.kernel_size) != {1}
