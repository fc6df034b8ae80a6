"""Accuracy before distillation by the way of inheritance (the tables in docs/method.md).

python scripts/bench/inherit.py --model vgg16

Students of uniform widths, of the strongest connections, and without one layer or branch each;
1,000 validation images; weights sliced, solved with the teacher's channels, solved with the
student's.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from moodistill.errors import UserError
from moodistill.student.builder import build_student
from moodistill.student.context import TeacherContext, load_context, use_threads
from moodistill.student.inherit import InheritConfig, Mode, inherit
from moodistill.teacher.task import load_task
from moodistill.training.teacher import accuracy

MODES: tuple[Mode, ...] = ("slice", "student", "patches")


def uniform_width(context: TeacherContext, share: float) -> np.ndarray:
    """The most important `share` of every group's channels."""
    layout = context.layout
    genome = layout.teacher()
    for group in layout.groups.values():
        if not group.frozen:
            mask = layout.view(genome, f"mask/{group.name}")
            mask[:] = False
            mask[np.argsort(-group.importance, kind="stable")[: int(group.size * share)]] = True
    return genome


def strongest_connections(context: TeacherContext, share: float) -> np.ndarray:
    """For every output block the `share` of input blocks with most energy."""
    layout = context.layout
    genome = layout.teacher()
    for layer in layout.layers:
        if f"block/{layer.name}" in layout.slices and layer.energy is not None:
            bits = layout.view(genome, f"block/{layer.name}")
            count = max(1, round(share * bits.shape[1]))
            bits[:] = False
            for row, energy in enumerate(layer.energy):
                bits[row, np.argsort(-energy, kind="stable")[:count]] = True
    return genome


def bypass(context: TeacherContext, layers: list[str]) -> np.ndarray:
    """The teacher without some layers."""
    genome = context.layout.teacher()
    for name in layers:
        context.layout.view(genome, f"bypass/{name}")[0] = False
    return genome


def drop_branch(context: TeacherContext, merge: str) -> np.ndarray:
    """The teacher without the first input of one Add (in ResNets the residual branch)."""
    genome = context.layout.teacher()
    context.layout.view(genome, f"merge/{merge}")[0] = False
    return genome


def cases(context: TeacherContext) -> dict[str, np.ndarray]:
    """Named genomes: widths, connections, bypasses, merge edges."""
    layout = context.layout
    made = {
        f"{100 * share:g}% of every width": uniform_width(context, share)
        for share in (0.75, 0.5, 0.375, 0.25, 0.125)
    }
    for share in (0.75, 0.5):
        made[f"{share:.0%} of connections"] = strongest_connections(context, share)
    passable = [layer.name for layer in layout.layers if layer.bypassable]
    for name in passable:
        made[f"without {name}"] = bypass(context, [name])
    deep = [
        n for n in ("features.27", "features.34", "features.37", "features.40") if n in passable
    ]
    if deep:
        made["without " + ", ".join(deep)] = bypass(context, deep)
    for merge in layout.merges:
        made[f"without the branch of {merge.name}"] = drop_branch(context, merge.name)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="validation images")
    parser.add_argument(
        "--widest", type=int, default=InheritConfig.widest, help="unknowns of a patch solve"
    )
    arguments = parser.parse_args()
    use_threads(None)
    try:
        context = load_context(load_task(arguments.model), arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    validation = context.data.validation.head(arguments.images)
    teacher = accuracy(context.graph.module, context.data, validation)
    print(f"teacher: {teacher:.4f} on {len(validation)} validation images, no training below\n")
    print("| student | parameters | " + " | ".join(MODES) + " | seconds (student) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, genome in cases(context).items():
        scores = []
        for mode in MODES:
            began = time.perf_counter()
            student = build_student(context.graph, context.layout, genome)
            inherit(
                student,
                context.graph,
                context.samples,
                InheritConfig(mode=mode, widest=arguments.widest),
            )
            seconds = time.perf_counter() - began
            scores.append(f"{accuracy(student.module, context.data, validation):.4f}")
        print(
            f"| {name} | {student.parameters:,} | {' | '.join(scores)} | {seconds:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
