"""Training that can be carried on: weights, momentum and step in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.io.tensorfile import read_safetensors, save_atomic


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stood.

    Attributes:
        signature: of what is trained, and how; a file of another one must not be carried on.
        step: steps done.
        model: its state dict.
        momentum: of each parameter by name.
        seconds: that it took so far, where they are counted.
        curve: accuracy on the validation images after each epoch, where it is measured.
    """

    signature: str
    step: int
    model: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]
    seconds: float = 0.0
    curve: tuple[float, ...] = ()

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        tensors = {f"model.{name}": tensor.cpu() for name, tensor in self.model.items()}
        tensors |= {f"momentum.{name}": tensor.cpu() for name, tensor in self.momentum.items()}
        facts = {
            "signature": self.signature,
            "step": str(self.step),
            "seconds": str(self.seconds),
            "curve": json.dumps(self.curve),
        }
        save_atomic(tensors, path, facts)

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """What `save` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        tensors, facts = read_safetensors(path)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "momentum": {}}
        try:
            for key, tensor in tensors.items():
                kind, _, name = key.partition(".")
                parts[kind][name] = tensor
            step, seconds = int(facts["step"]), float(facts["seconds"])
            curve = tuple(float(value) for value in json.loads(facts.get("curve", "[]")))
            return Checkpoint(
                facts["signature"], step, parts["model"], parts["momentum"], seconds, curve
            )
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is no checkpoint ({error}); delete it") from error

    def restore(self, model: nn.Module, momentum: dict[str, torch.Tensor]) -> None:
        """Copy weights and momentum into those of a training that is to go on."""
        model.load_state_dict(self.model)
        for name, buffer in momentum.items():
            buffer.copy_(self.momentum[name])
