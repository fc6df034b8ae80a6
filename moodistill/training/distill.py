"""Distilling a student with the teacher's soft targets, computed once for a fixed set of views."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.accelerator import device_of, in_bfloat16, needs_memory, own_draws
from moodistill.data.images import ImageData
from moodistill.data.streamed import read_batches
from moodistill.errors import UserError
from moodistill.heads.losses import Tensors, distillation_loss
from moodistill.heads.outputs import OUTPUT, outputs_of
from moodistill.io.cache import read_cached, save_cached
from moodistill.io.cache_dir import cache_key, read_or_none
from moodistill.teacher.weights import network_digest
from moodistill.training.checkpoint import Checkpoint
from moodistill.training.views import view

CHECKPOINT_SECONDS = 60.0
MOST_BYTES = 2**30  # of the teacher's outputs that are kept; others are computed anew


@dataclass(frozen=True)
class DistillConfig:
    """A finalist's budget.

    Attributes:
        steps: SGD steps of `batch_size` images.
        lr: peak rate of up to 1,000 steps; a closed-form start wants a small one. Longer
            distillations take a larger one, by the cube root of their length.
        temperature: of the soft targets (Hinton et al. 2015).
        hard: weight of the cross-entropy with the labels beside the soft targets.
        views: batches of augmented training images whose teacher logits are cached, at least;
            longer distillations have more and go through them again in another order.
        pad, flip: the augmentation of the views.
    """

    steps: int = 100
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 4.0
    hard: float = 0.1
    views: int = 1000
    pad: int = 4
    flip: bool = True
    seed: int = 0

    @property
    def peak_lr(self) -> float:
        """The peak rate of this many steps."""
        return self.lr * float(np.cbrt(max(1.0, self.steps / 1000)))

    @property
    def view_count(self) -> int:
        """Batches of views of this many steps."""
        return max(self.views, self.steps // 2)


class SoftTargets:
    """Augmented training batches and the teacher's outputs of them, cached on disk by batch."""

    def __init__(
        self,
        teacher: nn.Module,
        data: ImageData,
        config: DistillConfig,
        cache_dir: Path | None,
        teacher_digest: str,
    ) -> None:
        self.teacher = teacher.eval()
        self.data = data
        self.config = config
        self.device = device_of(teacher)
        made_of = (teacher_digest, network_digest(teacher), data.digest)
        parts: tuple[object, ...] = (*made_of, config.batch_size, config.pad, config.flip)
        if self.device.type != "cpu":  # its answers differ a little
            parts = (*parts, self.device.type)
        self.key = cache_key(parts, config.seed)
        self.path = cache_dir / f"logits-{self.key}.safetensors" if cache_dir else None
        self.logits: dict[str, torch.Tensor] = read_or_none(self.path, read_cached) or {}
        self.saved = len(self.logits)
        self.names = tuple(data.meaning.by_output)
        self.kept_bytes = sum(tensor.nbytes for tensor in self.logits.values())

    def batch(self, index: int) -> tuple[torch.Tensor, Tensors]:
        """Images `(B, C, H, W)` and targets by name of view batch `index`; always the same."""
        return next(self.batches([index]))

    def batches(self, order: Sequence[int]) -> Iterator[tuple[torch.Tensor, Tensors]]:
        """The batches of these numbers one after another; streamed images are read ahead."""
        train, config = self.data.train, self.config
        chosen = (self._draw(index)[0] for index in order)
        for index, pixels in zip(order, read_batches(train.images, chosen), strict=True):
            numbers, rng = self._draw(index)
            targets = {name: array[numbers] for name, array in train.targets.items()}
            yield view(self.data, pixels, targets, config.pad, config.flip, rng)

    def _draw(self, index: int) -> tuple[np.ndarray, np.random.Generator]:
        """Numbers `(B,)` of the images in a batch, and what its views are drawn with."""
        rng = np.random.default_rng([self.config.seed, index])
        count, size = len(self.data.train), self.config.batch_size
        return rng.choice(count, size, replace=count < size), rng

    @torch.no_grad()
    def soft(self, index: int, images: torch.Tensor) -> Tensors:
        """The teacher's outputs `(B, ...)` by name of view batch `index`."""
        start = f"{index}."
        known = {
            name: self.logits[key]
            for name in self.names
            if (key := str(index) if name == OUTPUT else start + name) in self.logits
        }
        if known and len(known) == len(self.names):
            return known
        with in_bfloat16(self.device):
            given = outputs_of(self.teacher(images.to(self.device)))
        found = {name: tensor.float().cpu() for name, tensor in given.items()}
        size = sum(tensor.nbytes for tensor in found.values())
        if self.kept_bytes + size <= MOST_BYTES:  # maps of all views would not fit into memory
            self.kept_bytes += size
            for name, tensor in found.items():
                self.logits[str(index) if name == OUTPUT else start + name] = tensor
        return found

    def save(self) -> None:
        """Write what has been computed, so that the next finalist or run has it."""
        if self.path is not None and len(self.logits) > self.saved:
            save_cached(self.logits, self.path)
            self.saved = len(self.logits)


def distill(
    student: fx.GraphModule,
    targets: SoftTargets,
    config: DistillConfig,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> fx.GraphModule:
    """A distilled copy of `student` in eval mode, computed where the teacher of `targets` is.

    SGD with Nesterov momentum, 10% warm-up, then a cosine; soft targets at `temperature` with the
    weight `1 - hard`, scaled by its square. Forward and backward passes run in bfloat16 where the
    processor has instructions for it. `report(step, loss)` is called after each step. Every minute
    the file `checkpoint` is written, and what another process left there is carried on to the same
    end.

    Raises:
        FloatingPointError: if the loss is not finite.
        UserError: if the device's memory is too small.
    """
    # Convolutions train up to a third faster on images whose channels lie together.
    device = targets.device
    model = copy.deepcopy(student).train().to(device)
    if len(targets.data.input_shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    heads = targets.data.meaning
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    parameters: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay}, {"params": plain},
    ]  # fmt: skip
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.peak_lr, momentum=config.momentum, nesterov=True,
    )  # fmt: skip
    views = min(config.view_count, config.steps)
    too_large = f"batches of {config.batch_size} images", "distil fewer students at a time"
    warmup = max(1, config.steps // 10)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    signature = f"{asdict(config)} {config.peak_lr} {views} {seed} {targets.key} {shapes}"
    start = 0 if checkpoint is None else _carry_on(checkpoint, signature, model, optimizer)
    saved = time.monotonic()
    order = _order(start, config.steps, views, seed)
    shown = targets.batches(order)
    with own_draws(device), needs_memory(device, *too_large):
        for step in range(start, config.steps):
            torch.manual_seed(seed + step)  # of dropout, also where it is carried on
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)))
            for group in optimizer.param_groups:
                group["lr"] = config.peak_lr * rate
            index, (images, labels) = order[step - start], next(shown)
            soft = targets.soft(index, images)
            images = _laid_out(images.to(device))
            with in_bfloat16(device):
                given = outputs_of(model(images))
            found = {name: tensor.float() for name, tensor in given.items()}
            loss = distillation_loss(
                heads, found, _on(soft, device), _on(labels, device), config.temperature,
                config.hard,
            )  # fmt: skip
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the distillation loss became {loss.item()} at step {step}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if report is not None:
                report(step + 1, loss.item())
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                targets.save()
                momentum = _momentum(model, optimizer)
                Checkpoint(signature, step + 1, model.state_dict(), momentum).save(checkpoint)
                saved = time.monotonic()
    model = model.eval()
    if len(targets.data.input_shape) == 3:
        model = model.to(memory_format=torch.contiguous_format)
    return model.cpu()


def _on(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _order(start: int, end: int, views: int, seed: int) -> list[int]:
    """Which batch of views each step from `start` on sees: all in turn, shuffled anew each time."""
    epochs = {step // views for step in range(start, end)}
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(views) for epoch in epochs}
    return [int(shuffled[step // views][step % views]) for step in range(start, end)]


def _laid_out(images: torch.Tensor) -> torch.Tensor:
    """Images with their channels together; signals and volumes as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _momentum(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, torch.Tensor]:
    """SGD's momentum of each parameter by name; zeros before its first step."""
    return {
        name: optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        for name, parameter in model.named_parameters()
    }


def _carry_on(path: Path, signature: str, model: nn.Module, optimizer: torch.optim.SGD) -> int:
    """Restore the checkpoint of this very distillation; steps done, 0 if there is none."""
    try:
        found = Checkpoint.read(path) if path.exists() else None
    except UserError:
        return 0
    if found is None or found.signature != signature:
        return 0
    found.restore(model, _momentum(model, optimizer))
    return found.step
