"""Training a teacher: Muon on the matrices, SGD on the rest, small pictures first."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from moodistill.checkpoint import Checkpoint
from moodistill.data import ImageData, Split
from moodistill.errors import UserError
from moodistill.files import write_json_atomic
from moodistill.task import Task, TrainConfig
from moodistill.teachers import half_precision, save_atomic

CHECKPOINT_SECONDS = 300.0
SGD_LR = 0.03  # peak rate of what Muon does not train: biases, norms, first and linear layers


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix to `(rows, columns)`, roughly, by Newton-Schulz steps.

    Coefficients from Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
    (2024).
    """
    transpose = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if transpose else matrix
    x = x / (x.norm() + 1e-7)
    # Every step multiplies by a polynomial of the Gram matrix: the wide matrix is needed only at
    # both ends.
    gram = x @ x.T
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if transpose else x


class Optimizer:
    """Muon for convolutions behind the first, SGD with Nesterov momentum for all other tensors.

    A convolution in front of a BN layer is free in its scale: it is kept at the norm
    `sqrt(out_channels)`, so `lr` is the relative size of one step (as in Jordan's airbench).
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.momentum = {k: torch.zeros_like(v) for k, v in self.parameters.items()}
        convs = [k for k, v in self.parameters.items() if v.ndim == 4]
        self.muon = set(convs[1:])

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """One update; `fraction` in [0, 1] scales every learning rate."""
        config = self.config
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            buffer = self.momentum[name].mul_(config.momentum).add_(parameter.grad)
            update = parameter.grad.add(buffer, alpha=config.momentum)
            if name in self.muon:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                direction = orthogonalise(update.flatten(1)).view_as(parameter)
                parameter.add_(direction, alpha=-config.lr * fraction)
            else:
                rate = SGD_LR * fraction
                if parameter.ndim > 1:
                    parameter.mul_(1 - rate * config.weight_decay)
                parameter.add_(update, alpha=-rate)
            parameter.grad = None


def augment(images: np.ndarray, pad: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Random crop with reflected padding and horizontal flip of uint8 `(N, H, W, C)`."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    shifts = rng.integers(0, 2 * pad + 1, size=(2, count, 1))
    top, left = shifts[0] + np.arange(height), shifts[1] + np.arange(width)
    if flip:
        turned = rng.random(count) < 0.5
        left[turned] = left[turned, ::-1]
    return padded[np.arange(count)[:, None, None], top[:, :, None], left[:, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData, split: Split) -> float:
    """The data's metric of `model` (in eval mode) on `split`: accuracy unless another is given."""
    device = next(model.parameters()).device
    batch = data.at_once(500)
    answers = []
    for start in range(0, len(split), batch):
        images = data.normalise(split.images[start : start + batch]).to(device)
        answers.append(model(images).cpu().numpy())
    return data.score(np.concatenate(answers), split.labels)


def train_teacher(task: Task, data: ImageData, out: Path, device: str = "cpu") -> dict:
    """Train `task`'s teacher, resuming from `out`'s `.checkpoint`, and write weights and a report.

    Returns the report that is also written beside the weights as JSON.

    Raises:
        UserError: if the checkpoint belongs to another configuration, or the task has none.
    """
    config = task.train
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"--device {device} cannot be used ({reason}); expected cpu or cuda"
        ) from error
    if config is None:
        raise UserError(f"{task.name} does not say how it is trained: its TASK has train=None")
    torch.manual_seed(config.seed)
    # Convolutions run up to a tenth faster on pictures whose channels lie together.
    model = task.build().to(device).to(memory_format=torch.channels_last)
    optimizer = Optimizer(model, config)
    # Of fewer pictures than a batch all are one.
    steps_per_epoch = max(1, len(data.train) // config.batch_size)
    sizes = [size for epochs, size in config.phases for _ in range(epochs * steps_per_epoch)]
    checkpoint = out.with_suffix(".checkpoint")
    signature = json.dumps({"task": task.name, "data": data.digest, **asdict(config)})
    start, seconds = 0, 0.0
    if checkpoint.exists():
        found = Checkpoint.read(checkpoint)
        if found.signature != signature:
            raise UserError(
                f"{checkpoint} was written by another configuration; delete it or name another "
                "--out"
            )
        found.restore(model, optimizer.momentum)
        start, seconds = found.step, found.seconds

    full = data.input_shape[1]
    costs = np.array([(size / full) ** 2 for size in sizes]) * config.batch_size
    bar = tqdm(total=round(costs.sum()), initial=round(costs[:start].sum()), unit="img")
    began = saved = time.monotonic()
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))
    model.train()
    for step in range(start, len(sizes)):
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data.train))
        index = order[place * config.batch_size : (place + 1) * config.batch_size]
        rng = np.random.default_rng([config.seed, epoch, place])
        images = data.normalise(augment(data.train.images[index], config.pad, config.flip, rng)).to(
            device
        )
        if sizes[step] != full:
            shape = (sizes[step], max(1, round(sizes[step] * data.input_shape[2] / full)))
            images = F.interpolate(images, shape, mode="bilinear", antialias=True)
        labels = torch.from_numpy(data.train.labels[index]).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast:
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        ramp = max(1.0, config.warmup * len(sizes))
        optimizer.step(min((step + 1) / ramp, (len(sizes) - step) / (len(sizes) - ramp + 1)))
        bar.update(round(costs[: step + 1].sum()) - bar.n)
        bar.set_postfix(loss=f"{loss.item():.3f}", size=sizes[step], epoch=epoch + 1)
        now = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS or place + 1 == steps_per_epoch:
            Checkpoint(
                signature, step + 1, model.state_dict(), optimizer.momentum, seconds + now - began
            ).save(checkpoint)
            saved = now
        if place + 1 == steps_per_epoch:
            model.eval()
            reached = accuracy(model, data, data.validation.head(1000))
            tqdm.write(f"epoch {epoch + 1}: validation accuracy {reached:.4f} (first 1,000)")
            model.train()
    bar.close()
    model.eval()
    weights = half_precision({k: v.cpu() for k, v in model.state_dict().items()})
    save_atomic(weights, out)
    model.load_state_dict(weights, strict=False)  # the report is of the weights as written
    report = {
        "task": task.name,
        "validation_accuracy": accuracy(model, data, data.validation),
        "test_accuracy": accuracy(model, data, data.test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(seconds + time.monotonic() - began),
        "device": device,
        "data_digest": data.digest,
        "recipe": asdict(config),
    }
    write_json_atomic(out.with_suffix(".json"), report)
    checkpoint.unlink(missing_ok=True)
    return report
