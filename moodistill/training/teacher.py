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

from moodistill.data.images import ImageData, Split
from moodistill.errors import UserError
from moodistill.io.atomic import write_json_atomic
from moodistill.io.tensorfile import save_atomic
from moodistill.teacher.task import Task
from moodistill.teacher.weights import half_precision
from moodistill.training.augment import augment
from moodistill.training.checkpoint import Checkpoint
from moodistill.training.muon import Optimizer

CHECKPOINT_SECONDS = 300.0


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
