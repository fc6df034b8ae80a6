"""Training a teacher: Muon on the matrices, SGD on the rest, small images first."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moodistill.accelerator import CPU, in_bfloat16, mixed_precision, needs_memory, own_draws
from moodistill.data.images import ImageData, Split
from moodistill.errors import UserError
from moodistill.io.atomic import write_json_atomic
from moodistill.io.measuring import training_step
from moodistill.io.tensorfile import save_atomic
from moodistill.progress import Reporter, make_reporter
from moodistill.teacher.answers import answers_of
from moodistill.teacher.task import Task, TrainConfig
from moodistill.teacher.weights import half_precision
from moodistill.training.batches import TrainBatches
from moodistill.training.checkpoint import Checkpoint
from moodistill.training.muon import Optimizer

CHECKPOINT_SECONDS = 300.0


def accuracy(model: nn.Module, data: ImageData, split: Split) -> float:
    """The data's metric of `model` (in eval mode) on `split`: accuracy unless another is given."""
    return data.score(answers_of(model, data, split.images), split)


def train_teacher(
    task: Task,
    data: ImageData,
    out: Path,
    device: torch.device = CPU,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train `task`'s teacher, resuming from `out`'s `.checkpoint`, and write weights and a report.

    Returns the report that is also written beside the weights as JSON. `reporter` None shows a bar
    in a terminal and a line an epoch elsewhere.

    Raises:
        UserError: if the checkpoint belongs to another configuration, the task has none, or the
            loss is not finite, or the device's memory too small.
    """
    config = task.train
    if config is None:
        raise UserError(f"{task.name} does not say how it is trained: its TASK has train=None")
    only = data.meaning.only
    if not data.pictures or only is None or only.kind != "classification" or only.gives not in (
        None, "logits",
    ):  # fmt: skip
        raise UserError(
            f"{task.name} is no classifier of images with logits as its output; train it with code "
            "of your own, and give its weights"
        )
    with own_draws(device):
        torch.manual_seed(config.seed)
        # Convolutions run up to a tenth faster on images whose channels lie together.
        model = task.build().to(device).to(memory_format=torch.channels_last)
        reporter = reporter or make_reporter("auto")
        try:
            training = _Training(task, config, data, out, device, model)
            what = f"batches of {config.batch_size} images"
            with needs_memory(device, what, "train with a smaller batch_size"):
                training.run(reporter)
        finally:
            reporter.close()
    model.eval()
    weights = half_precision({k: v.cpu() for k, v in model.state_dict().items()})
    save_atomic(weights, out)
    model.load_state_dict(weights, strict=False)  # the report is of the weights as written
    report = {
        "task": task.name,
        "validation_accuracy": accuracy(model, data, data.validation),
        "test_accuracy": accuracy(model, data, data.test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(training.seconds),
        "device": str(device),
        "precision": "bfloat16" if training.mixed else "float32",
        "data_digest": data.digest,
        "recipe": asdict(config),
        "validation_curve": training.curve,
    }
    write_json_atomic(out.with_suffix(".json"), report)
    training.checkpoint.unlink(missing_ok=True)
    return report


class _Training:
    """The steps of one training.

    Attributes:
        checkpoint: the file that it is carried on from.
        mixed: whether passes run in bfloat16.
        seconds: that all steps took, pauses left out, in earlier processes too.
        curve: accuracy on the validation images after each epoch.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        data: ImageData,
        out: Path,
        device: torch.device,
        model: nn.Module,
    ) -> None:
        self.config, self.data, self.device, self.model = config, data, device, model
        self.mixed = mixed_precision(device)
        self.optimizer = Optimizer(model, config, self.mixed)
        self.batches = TrainBatches(data, config)
        self.checkpoint = out.with_suffix(".checkpoint")
        self.signature = json.dumps({"task": task.name, "data": data.digest, **asdict(config)})
        self.start, self.seconds = 0, 0.0
        self.curve: list[float] = []
        if self.checkpoint.exists():
            self._carry_on()

    def _carry_on(self) -> None:
        found = Checkpoint.read(self.checkpoint)
        if found.signature != self.signature:
            raise UserError(
                f"{self.checkpoint} was written by another configuration; delete it or name "
                "another file for the weights"
            )
        found.restore(self.model, self.optimizer.momentum)
        self.start, self.seconds, self.curve = found.step, found.seconds, list(found.curve)

    def _save(self, step: int) -> None:
        Checkpoint(
            self.signature, step, self.model.state_dict(), self.optimizer.momentum, self.seconds,
            tuple(self.curve),
        ).save(self.checkpoint)  # fmt: skip

    def run(self, reporter: Reporter) -> None:
        """All steps that are left, with a checkpoint every few minutes and after every epoch."""
        batches = self.batches
        done = np.concatenate([[0], np.cumsum(batches.pixels)]).round().astype(int)
        began, seconds_before = time.monotonic(), self.seconds
        saved, paused = began, 0.0
        self.model.train()
        self.shown = batches.following(self.start)
        with reporter.stage("training", int(done[-1]), "images") as stage:
            for step in range(self.start, batches.steps):
                with training_step() as waited:
                    loss = self._step(step)
                paused += waited
                epoch, place = divmod(step, batches.steps_per_epoch)
                stage.update(
                    int(done[step + 1]), epoch=epoch + 1, size=batches.sizes[step],
                    loss=f"{loss:.3f}",
                )  # fmt: skip
                ended = place + 1 == batches.steps_per_epoch
                if ended:
                    self.model.eval()
                    with training_step() as waited:
                        reached = accuracy(self.model, self.data, self.data.validation)
                    paused += waited
                    self.curve.append(reached)
                    self.model.train()
                now = time.monotonic()
                self.seconds = seconds_before + now - began - paused
                if ended:
                    rate = (now - began - paused) / (done[step + 1] - done[self.start])
                    left = rate * (done[-1] - done[step + 1])
                    reporter.say(
                        f"epoch {epoch + 1} of {batches.steps // batches.steps_per_epoch}: loss "
                        f"{loss:.3f}, validation accuracy {reached:.4f}; "
                        f"{_minutes(self.seconds)} so far, about {_minutes(left)} to go",
                        epoch=epoch + 1, loss=loss, validation_accuracy=reached,
                        seconds=round(self.seconds), seconds_left=round(left),
                    )  # fmt: skip
                if ended or now - saved > CHECKPOINT_SECONDS:
                    self._save(step + 1)
                    saved = now

    def _step(self, step: int) -> float:
        """One update; returns its loss."""
        config, steps = self.config, self.batches.steps
        torch.manual_seed(config.seed + step)  # of dropout, also where it is carried on
        images, labels = next(self.shown)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with in_bfloat16(self.device):
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels.to(self.device), label_smoothing=config.smoothing)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} in step {step + 1} of {steps}; expected a number: "
                f"train with a smaller lr than {config.lr:g}"
            )
        loss.backward()
        ramp = max(1.0, config.warmup * steps)
        self.optimizer.step(min((step + 1) / ramp, (steps - step) / (steps - ramp + 1)))
        return loss.item()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"
