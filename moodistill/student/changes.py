"""How far single changes of the teacher move its outputs: the errors that a search begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from moodistill.genome.layout import GenomeLayout
from moodistill.student.builder import build_student
from moodistill.student.inherit import InheritConfig, Walk
from moodistill.student.network import Student
from moodistill.student.slicing import Unit
from moodistill.teacher.divergence import divergence
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.samples import TeacherSamples


@dataclass(frozen=True)
class _Touched:
    """What a change touches.

    Attributes:
        same: names of nodes whose values are the teacher's.
        solved: targets of the units that are solved.
        last: the name of the last node that a solved unit, or a norm behind it, has.
    """

    same: set[str]
    solved: set[str]
    last: str | None


class ChangeErrors:
    """Measures genomes that differ from the teacher's in one gene.

    What a change touches is solved in closed form from `samples`; the rest of the teacher stays as
    it is, and what lies before the change is computed once for all of them. The error is measured
    on other images.

    Args:
        graph, layout: of the teacher.
        samples: of a few calibration images.
        images: `(n, C, H, W)` normalised images that the error is measured on.
        config: how weights are inherited.
    """

    @torch.no_grad()
    def __init__(
        self,
        graph: TeacherGraph,
        layout: GenomeLayout,
        samples: TeacherSamples,
        images: torch.Tensor,
        config: InheritConfig | None = None,
    ) -> None:
        self.graph, self.layout, self.samples = graph, layout, samples
        self.config = config or InheritConfig()
        whole = build_student(graph, layout, layout.teacher())
        self.units = {unit.target: unit for unit in whole.units}
        self.nodes = {node.name: node for node in whole.module.graph.nodes}
        pictures = images.ndim == 4
        layout_ = torch.channels_last if pictures else torch.contiguous_format
        self.images = images.contiguous(memory_format=layout_)
        # Values of all nodes, on the images of the solve and on those of the error.
        self.calibrated = _values(whole, samples.images.contiguous(memory_format=layout_), {})
        self.held = _values(whole, self.images, {})
        self.answers = self.held["output"]

    @torch.no_grad()
    def error(self, genome: np.ndarray) -> float:
        """The divergence of a changed network's outputs from the teacher's (`divergence`)."""
        student = build_student(self.graph, self.layout, genome)
        touched = self._touched(student)
        if touched.solved:
            walk = Walk(student, self.graph, self.samples, self.config)
            known = {name: self.calibrated[name] for name in touched.same}
            walk.run(known, touched.solved, touched.last)
        known = {name: self.held[name] for name in touched.same}
        return divergence(_values(student, self.images, known)["output"], self.answers)

    def _touched(self, student: Student) -> _Touched:
        units = {unit.target: unit for unit in student.units}
        solved = {t for t, unit in units.items() if not _reads_alike(unit, self.units.get(t))}
        changed = solved | {
            t for t, unit in units.items() if t not in self.units or not _alike(unit, self.units[t])
        }
        ends = solved | {unit.expand for t, unit in units.items() if t in solved and unit.expand}
        norms = {norm.target for norm in student.norms}
        same: set[str] = set()
        last = None
        for node in student.module.graph.nodes:
            target = str(node.target)
            behind = target in norms and any(str(n.target) in ends for n in node.all_input_nodes)
            if node.op == "call_module" and (target in ends or behind):
                last = node.name
            if node.op == "output" or not self._same_call(node) or target in changed:
                continue
            if all(source.name in same for source in node.all_input_nodes):
                same.add(node.name)
        return _Touched(same, solved, last)

    def _same_call(self, node: fx.Node) -> bool:
        """Whether the teacher has the same call."""
        own = self.nodes.get(node.name)
        return (
            own is not None
            and own.target == node.target
            and [n.name for n in own.all_input_nodes] == [n.name for n in node.all_input_nodes]
        )


def _values(student: Student, images: torch.Tensor, known: dict[str, Any]) -> dict[str, Any]:
    """Values of all nodes by name, of which some are known."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.name not in values:
                values[n.name] = super().run_node(n)
            return values[n.name]

    values = dict(known)
    Recorder(student.module, garbage_collect_values=False).run(images)
    return values


def _reads_alike(unit: Unit, whole: Unit | None) -> bool:
    return (
        whole is not None
        and unit.through == whole.through
        and unit.taps == whole.taps
        and unit.rank == whole.rank
        and len(unit.inputs) == len(whole.inputs)
        and all(map(np.array_equal, unit.inputs, whole.inputs))
    )


def _alike(unit: Unit, whole: Unit) -> bool:
    return _reads_alike(unit, whole) and all(map(np.array_equal, unit.outputs, whole.outputs))
