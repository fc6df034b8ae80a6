"""Reads what moves channels about: which channels of which steps are where afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.teacher.rearrange import NEXT_PICTURE, PICTURES, Form
from moodistill.teacher.recorder import NotUnderstood, Recorder


class Mover(Recorder):
    """Adds rearrangements."""

    def _numbers(self, node: fx.Node) -> Any:
        if node in self.raw:
            return self.raw[node]
        if node in self.of:
            step = self.of[node]
            if step.form.kind == "whole":
                raise NotUnderstood(self.whole[step.name])
            return self.elements.number(step.name, step.form)
        if node in self.constants:
            raise NotUnderstood(
                f"a constant tensor ({node.target}) among moved channels: unsupported"
            )
        return node.meta["value"]

    def _concatenate(self, node: fx.Node) -> bool:
        """Whether the node is a plain concatenation of maps, which needs no numbers; adds it."""
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        parts = [self.of.get(part) for part in node.args[0]] if node.args else []  # type: ignore
        first = parts[0] if parts else None
        if node.target not in (torch.cat, torch.concat) or axis != 1 or first is None:
            return False
        steps = [p for p in parts if p is not None and p.form.kind == "map"]
        if len(steps) < len(parts) or any(s.form.size != first.form.size for s in steps):
            return False
        names = list(dict.fromkeys(step.name for step in steps))
        origin = np.concatenate(
            [
                np.stack(
                    [np.full(s.form.channels, names.index(s.name)), np.arange(s.form.channels)], 1
                )
                for s in steps
            ]
        )
        channels = np.concatenate([step.channels for step in steps])
        form = Form("map", len(channels), first.form.size)
        self._add(node, "rearrange", form, channels, tuple(self.steps[n] for n in names), origin)
        return True

    def _rearrange(self, node: fx.Node, module: nn.Module | None) -> None:
        if module is None and node.target in (torch.cat, torch.concat) and self._concatenate(node):
            return
        arguments = fx.node.map_arg(node.args, self._numbers)
        keywords = fx.node.map_arg(node.kwargs, self._numbers)
        if module is not None:
            result = module(*arguments, **keywords)
        elif node.op == "call_method":
            first, *rest = arguments
            # The numbers need not lie in memory as the network's tensors do.
            method = "reshape" if node.target == "view" else str(node.target)
            result = getattr(first, method)(*rest, **keywords)
        else:
            result = node.target(*arguments, **keywords)  # type: ignore
        before = [self.moved_by[s] for s in node.all_input_nodes if s in self.moved_by]
        self.moved_by[node] = before[0] if before else f"{self._called(node)} ({self._place(node)})"
        if not isinstance(result, torch.Tensor):
            self.raw[node] = result
            return
        self._shape(node)
        if len(result) != PICTURES or not (result[1] - result[0] == NEXT_PICTURE).all():
            raise NotUnderstood(
                f"{self._called(node)} ({self._place(node)}) mixes images, or moves the first "
                "axis, that of the batch"
            )
        found = self.elements.read(result[0].contiguous())
        if found is None:
            self.raw[node] = result
            return
        form, names, origin = found
        sources = tuple(self.steps[name] for name in names)
        channels = np.empty(form.channels, dtype=int)
        for index, source in enumerate(sources):
            mine = origin[:, 0] == index
            channels[mine] = source.channels[origin[mine, 1]]
        self._add(node, "rearrange", form, channels, sources, origin)
