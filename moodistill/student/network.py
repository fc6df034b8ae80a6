"""A physical student and what its modules stand for in the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from moodistill.student.slicing import GroupedSlice, NormSlice, Unit


@dataclass(frozen=True)
class Student:
    """A physical student; `module` maps `(N, C, H, W)` to logits."""

    module: fx.GraphModule
    units: tuple[Unit, ...]
    norms: tuple[NormSlice, ...]
    grouped: tuple[GroupedSlice, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters (batch normalisation included, as the literature counts)."""
        return sum(p.numel() for p in self.module.parameters())
