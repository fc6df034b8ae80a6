"""How far single changes of the teacher move its outputs: the errors that a search begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import fx

from moodistill.genome.layout import GenomeLayout
from moodistill.student.builder import build_student
from moodistill.student.inherit import InheritConfig, Walk
from moodistill.student.network import Student
from moodistill.student.slicing import Unit
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.samples import TeacherSamples


class ChangeErrors:
    """Measures genomes that differ from the teacher's in one gene.

    What a change touches is solved in closed form; the rest of the teacher stays as it is, and what
    lies before the change is computed once for all of them.
    """

    @torch.no_grad()
    def __init__(
        self, graph: TeacherGraph, layout: GenomeLayout, samples: TeacherSamples,
        config: InheritConfig | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.layout, self.samples = graph, layout, samples
        self.config = config or InheritConfig()
        whole = build_student(graph, layout, layout.teacher())
        self.units = {unit.target: unit for unit in whole.units}
        walk = Walk(whole, graph, samples, self.config)
        self.outputs = walk.run(solved=(), keep=True)
        self.values = walk.values
        self.nodes = {node.name: node for node in whole.module.graph.nodes}
        self.variance = float(self.outputs.var(0).mean().clamp_min(1e-12))

    @torch.no_grad()
    def error(self, genome: np.ndarray) -> float:
        """Mean squared difference to the teacher's outputs, relative to their variance.

        Infinite where an output is.
        """
        student = build_student(self.graph, self.layout, genome)
        known, solved = self._untouched(student)
        walk = Walk(student, self.graph, self.samples, self.config)
        outputs = walk.run(known=known, solved=solved)
        found = float((outputs - self.outputs).square().mean()) / self.variance
        return found if np.isfinite(found) else float("inf")

    def _untouched(self, student: Student) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Values that are the teacher's, by node name; and the units to be solved."""
        units = {unit.target: unit for unit in student.units}
        solved = {t for t, unit in units.items() if not _reads_alike(unit, self.units.get(t))}
        changed = solved | {
            t for t, unit in units.items() if t not in self.units or not _alike(unit, self.units[t])
        }
        known: dict[str, torch.Tensor] = {}
        for node in student.module.graph.nodes:
            if node.op == "output" or not self._same_call(node) or str(node.target) in changed:
                continue
            if all(source.name in known for source in node.all_input_nodes):
                known[node.name] = self.values[node.name]
        return known, solved

    def _same_call(self, node: fx.Node) -> bool:
        """Whether the teacher has the same call."""
        own = self.nodes.get(node.name)
        return (
            own is not None
            and own.target == node.target
            and [n.name for n in own.all_input_nodes] == [n.name for n in node.all_input_nodes]
        )


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


def measured(
    errors: ChangeErrors, genomes: Iterable[np.ndarray], report: Callable[[int], None] | None = None
) -> list[float]:
    """Error of each genome; `report` hears how many are done."""
    found = []
    for genome in genomes:
        found.append(errors.error(genome))
        if report is not None:
            report(len(found))
    return found
