"""How far single changes of the teacher move its outputs: the errors that a search begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from moodistill.genome.layout import GenomeLayout
from moodistill.heads.heads import Heads
from moodistill.heads.outputs import outputs_of
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
        samples: of a few calibration images; on the device that all is computed on.
        images: `(n, C, H, W)` normalised images that the error is measured on.
        heads: what the outputs mean.
    """

    @torch.no_grad()
    def __init__(
        self,
        graph: TeacherGraph,
        layout: GenomeLayout,
        samples: TeacherSamples,
        images: torch.Tensor,
        heads: Heads,
    ) -> None:
        self.graph, self.layout, self.samples = graph, layout, samples
        self.heads, self.config = heads, InheritConfig()
        self.device = samples.images.device
        self.solver = graph.on(self.device)
        whole = self._student(layout.teacher())
        self.units = {unit.target: unit for unit in whole.units}
        self.nodes = {node.name: node for node in whole.module.graph.nodes}
        pictures = images.ndim == 4
        layout_ = torch.channels_last if pictures else torch.contiguous_format
        self.images = images.to(self.device).contiguous(memory_format=layout_)
        # Values of all nodes, on the images of the solve and on those of the error.
        self.calibrated = _values(whole, samples.images.contiguous(memory_format=layout_), {})
        self.held = _values(whole, self.images, {})
        self.answers = outputs_of(self.held["output"])

    @torch.no_grad()
    def error(self, genome: np.ndarray) -> float:
        """The divergence of a changed network's outputs from the teacher's (`divergence`)."""
        student = self._student(genome)
        touched = self._touched(student)
        if touched.solved:
            walk = Walk(student, self.solver, self.samples, self.config)
            known = {name: self.calibrated[name] for name in touched.same}
            walk.run(known, touched.solved, touched.last)
        known = {name: self.held[name] for name in touched.same}
        found = outputs_of(_values(student, self.images, known)["output"])
        return divergence(self.heads, found, self.answers)

    def _student(self, genome: np.ndarray) -> Student:
        student = build_student(self.graph, self.layout, genome)
        student.module.to(self.device)
        return student

    def _touched(self, student: Student) -> _Touched:
        """Follow a change to the units that are solved: those that it alters, or its first readers.

        What reads a solved unit reads nearly what it read before and is left as it is.
        """
        units = {unit.target: unit for unit in student.units}
        expands = {unit.expand: target for target, unit in units.items() if unit.expand}
        solved = {t for t, unit in units.items() if not _reads_alike(unit, self.units.get(t))}
        same: set[str] = set()
        mended: set[str] = set()  # nodes behind a solved unit
        for node in student.module.graph.nodes:
            target, sources = str(node.target), {n.name for n in node.all_input_nodes}
            unit = units.get(target)
            if sources <= same and self._same_call(node) and self._as_before(unit, target, expands):
                same.add(node.name)
                continue
            if unit is not None and not sources <= same and not sources & mended:
                solved.add(target)
            if target in solved or expands.get(target) in solved or sources & mended:
                mended.add(node.name)
        return _Touched(same - {"output"}, solved, self._last(student, units, solved))

    def _as_before(self, unit: Unit | None, target: str, expands: dict[str, str]) -> bool:
        """Whether a node's module, if it is of a unit, is the teacher's."""
        if unit is None:
            return target not in expands
        return target in self.units and _alike(unit, self.units[target])

    @staticmethod
    def _last(student: Student, units: dict[str, Unit], solved: set[str]) -> str | None:
        """The last node that a solved unit has, or a norm right behind one."""
        ends = {units[target].expand or target for target in solved}
        norms = {norm.target for norm in student.norms}
        last = None
        for node in student.module.graph.nodes:
            target = str(node.target)
            behind = target in norms and any(str(n.target) in ends for n in node.all_input_nodes)
            if node.op == "call_module" and (target in ends or behind):
                last = node.name
        return last

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
