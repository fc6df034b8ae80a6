"""The masked teacher: what a student must compute, said without building it.

All modules keep their full size; what a genome takes away is set to zero where it would be read.
With plainly sliced weights a student's logits are those of the masked teacher. That is the proof
that a physical student means what its genome says, for any network that can be traced.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.resolve import resolve
from moodistill.genome.structure import Structure
from moodistill.heads.outputs import outputs_of
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv, Transposed, weight_of
from moodistill.teacher.steps import Step


@torch.no_grad()
def masked_logits(
    graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray, images: torch.Tensor
) -> torch.Tensor:
    """The first output, logits `(N, classes)`, of the masked teacher for `images` `(N, C, H, W)`.

    Raises:
        UserError: if the genome bypasses layers; what is read past them has no masked twin.
    """
    return next(iter(masked_outputs(graph, layout, genome, images).values()))


@torch.no_grad()
def masked_outputs(
    graph: TeacherGraph, layout: GenomeLayout, genome: np.ndarray, images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All outputs of the masked teacher by name; see `masked_logits`."""
    structure = resolve(layout, genome)
    if structure.bypassed:
        raise UserError(f"{', '.join(sorted(structure.bypassed))} bypassed: no masked teacher")
    return outputs_of(_Masked(graph, layout, structure).run(images))


class _Masked(fx.Interpreter):
    """Runs the teacher's own graph with masked weights."""

    def __init__(self, graph: TeacherGraph, layout: GenomeLayout, structure: Structure) -> None:
        super().__init__(graph.module)
        self.teacher = graph
        self.layout = layout
        self.structure = structure
        self.steps = {step.node: step for step in graph.steps}

    def run_node(self, n: fx.Node) -> Any:
        step = self.steps.get(n)
        if step is not None and step.kind == "merge" and n.target is not None:
            kept = self.structure.merges.get(step.name, (True, True))
            if not all(kept):
                chosen = n.args[kept.index(True)]
                assert isinstance(chosen, fx.Node)
                return self.env[chosen]
        if step is not None and step.kind == "layer" and step.name in self.structure.connected:
            (source,) = n.all_input_nodes
            return self._layer(step, self.env[source])
        if step is not None and step.kind == "channelwise" and n.op == "call_module":
            module = self.teacher.module.get_submodule(step.target)
            if isinstance(module, Conv):
                (source,) = n.all_input_nodes
                weight = self._tapped(step, module.weight)
                return module._conv_forward(self.env[source], weight, module.bias)
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Where an Add lost an input, two values share a tensor: nothing may work in place.
        cloned = fx.node.map_aggregate((args, kwargs), _cloned)
        return super().call_module(target, *cloned)  # type: ignore[misc]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, fx.node.map_aggregate(args, _cloned), kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method(target, fx.node.map_aggregate(args, _cloned), kwargs)

    def _layer(self, step: Step, values: torch.Tensor) -> torch.Tensor:
        layer = self.teacher.layer_module(step.target)
        source = self.teacher.step(step.inputs[0])
        rows, columns = self._blocks(step), self._blocks(source)
        connected = self.structure.connected[step.name][np.ix_(rows, columns)]
        kept = np.array([self._keeps(source, c) for c in range(source.form.channels)])
        mask = torch.from_numpy(connected & kept[None, :])
        weight = weight_of(layer).detach()
        if isinstance(layer, nn.Linear):
            weight = weight * mask.repeat_interleave(source.form.repeat, dim=1)
        else:
            mask = mask.reshape(*mask.shape, *[1] * len(layer.kernel_size))
            weight = weight * mask
            if isinstance(layer, Transposed):
                cut = {"weight": weight.transpose(0, 1)}
                return torch.func.functional_call(layer, cut, (values,))
            weight = self._tapped(step, weight)
        if step.target in self.structure.ranks:
            own = np.array([self._keeps(step, c) for c in range(step.form.channels)])
            weight = _approximated(weight, own, self.structure.ranks[step.target])
        if isinstance(layer, nn.Linear):
            return F.linear(values, weight, layer.bias)
        return layer._conv_forward(values, weight, layer.bias)

    def _tapped(self, step: Step, weight: torch.Tensor) -> torch.Tensor:
        """A convolution's weight with zeros at the taps that it lost."""
        sizes = weight.shape[2:]
        kept = self.structure.kernels.get(step.target, sizes)
        mask = torch.zeros(*sizes)
        middle = tuple(
            slice((size - left) // 2, (size + left) // 2)
            for size, left in zip(sizes, kept, strict=True)
        )
        mask[middle] = 1.0
        return weight.detach() * mask

    def _blocks(self, step: Step) -> np.ndarray:
        """`(channels,)`: every channel's block among those of all the step's groups."""
        starts = np.cumsum([0, *(self.layout.groups[name].blocks for name in step.groups)])
        blocks = [self.layout.groups[name].block for name in step.groups]
        pairs = zip(step.owner, step.place, strict=True)
        return np.array([starts[owner] + blocks[owner][place] for owner, place in pairs])

    def _keeps(self, step: Step, channel: int) -> bool:
        kept = self.structure.kept.get(step.groups[step.owner[channel]])
        return kept is not None and bool(kept[step.place[channel]])


def _approximated(weight: torch.Tensor, rows: np.ndarray, rank: int) -> torch.Tensor:
    """The weight whose kept rows `(outputs,)` are their best approximation of a rank."""
    matrix = weight[torch.from_numpy(rows)].reshape(int(rows.sum()), -1).double().numpy()
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    result = torch.zeros_like(weight)
    shape = (-1, *weight.shape[1:])
    result[torch.from_numpy(rows)] = torch.from_numpy(nearest).float().reshape(shape)
    return result


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
