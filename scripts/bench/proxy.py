"""Rank correlation of cheap scores with accuracy after distillation (the table in docs/method.md).

python scripts/bench/proxy.py --model vgg16 --students 24
python scripts/bench/proxy.py --model vgg16 --table-only

Kendall's tau over random students of all sizes, and within thirds of them by size, for each way of
inheritance with and without a few training steps. Every student is stored in
`<out>/proxy-<model>.json` when it is done: run the command again to continue.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy.stats import kendalltau

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.genome.canonical import canonical, summary
from moodistill.genome.layout import SEARCHED
from moodistill.io.atomic import write_atomic, write_json_atomic
from moodistill.io.cache import default_cache_dir
from moodistill.latency.simd import probe_simd
from moodistill.student.accuracy import student_accuracy
from moodistill.student.context import TeacherContext, load_context, use_threads
from moodistill.student.evaluator import Recipe, count_macs, make_student
from moodistill.student.inherit import InheritConfig, Mode
from moodistill.teacher.samples import collect_samples
from moodistill.teacher.task import load_task
from moodistill.training.distill import DistillConfig, SoftTargets, distill

MODES: dict[str, Mode] = {
    "plain slicing": "slice",
    "closed form, student's channels": "student",
    "closed form, whole patches": "patches",
}
SHORT = (20, 100)  # steps at a small rate behind the closed form
SMALL_RATE = 0.003
TURNS = 4
BANDS = 3  # of equally many students, by multiplications


def other_seed(context: TeacherContext, seed: int) -> TeacherContext:
    """The same teacher with other pixels sampled for the solve."""
    config = replace(context.samples.config, seed=seed)
    samples = collect_samples(
        context.graph, context.data, config, default_cache_dir(), context.teacher_digest
    )
    return replace(context, samples=samples)


def study(
    context: TeacherContext,
    other: TeacherContext,
    genome: np.ndarray,
    recipe: Recipe,
    targets: SoftTargets,
) -> dict:
    """Scores of one student (the search's images), and what a long distillation reaches (all)."""
    data, small = context.data, context.data.validation.head(recipe.validation_images)
    scores, seconds = {}, {}

    def scored(name: str, began: float, module) -> None:
        scores[name] = student_accuracy(module, data, small)
        seconds[name] = time.perf_counter() - began

    for name, mode in MODES.items():
        began = time.perf_counter()
        student = make_student(context, genome, replace(recipe, inherit=InheritConfig(mode=mode)))
        scored(name, began, student.module)
    again = make_student(other, genome, recipe)
    scores["other seed"] = student_accuracy(again.module, data, small)
    for count in SHORT:
        began = time.perf_counter()
        start = make_student(context, genome, recipe)
        config = DistillConfig(steps=count, lr=SMALL_RATE)
        scored(f"closed form + {count} steps", began, distill(start.module, targets, config))
    began = time.perf_counter()
    final = distill(student.module, targets, targets.config)
    targets.save()
    return {
        "summary": summary(context.layout, genome),
        "parameters": student.parameters,
        "macs": count_macs(student),
        "scores": scores,
        "seconds": seconds,
        "steps": targets.config.steps,
        "lr": targets.config.peak_lr,
        "reached": student_accuracy(final, data, data.validation),
        "seconds_long": time.perf_counter() - began,
    }


def table(records: list[dict], teacher_macs: int) -> str:
    """Kendall's tau by way of scoring, over all students and within bands of their cost."""
    records = sorted(records, key=lambda record: record["macs"])
    reached = np.array([record["reached"] for record in records])
    parts = np.array_split(np.arange(len(records)), BANDS)
    share = [[records[i]["macs"] / teacher_macs for i in (part[0], part[-1])] for part in parts]
    head = ["scored by", "tau", *(f"{low:.1%} to {high:.1%}" for low, high in share), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    macs = np.array([record["macs"] for record in records])
    # Larger students end up better: what a score adds to that is what it is worth.
    columns = {"its size alone (multiplications)": (macs, "-")}
    for name in records[0]["seconds"]:
        scores = np.array([record["scores"][name] for record in records])
        cost = np.median([record["seconds"][name] for record in records])
        columns[name] = (scores, f"{cost:.1f}")
    for name, (scores, cost) in columns.items():
        taus = [kendalltau(scores, reached).statistic]
        taus += [kendalltau(scores[part], reached[part]).statistic for part in parts]
        lines.append("| " + " | ".join([name, *(f"{tau:.2f}" for tau in taus), cost]) + " |")
    usual = list(MODES)[-1]
    apart = [abs(r["scores"][usual] - r["scores"]["other seed"]) for r in records]
    lines += [
        "",
        f"{len(records)} students, {records[0]['steps']} steps: {reached.min():.1%} to "
        f"{reached.max():.1%} of the validation images. Bands by multiplications, as shares of the "
        f"teacher's. Two seeds of the closed form differ by {100 * np.median(apart):.1f} points in "
        f"the median, {100 * max(apart):.1f} at most.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--students", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2000, help="of the long distillation")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--table-only", action="store_true", help="from the records there are")
    arguments = parser.parse_args()
    use_threads(None)
    try:
        if arguments.students < 2 * BANDS or arguments.steps < 1:
            raise UserError(f"give at least {2 * BANDS} --students and 1 of --steps")
        context = load_context(load_task(arguments.model), arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layout = context.layout
    step = probe_simd(None, default_cache_dir()).step
    # The first one is the teacher itself.
    sampling = DensitySampling(layout, step)
    rng = np.random.default_rng(0)
    genomes = sampling._do(None, arguments.students + 1, random_state=rng)[1:]
    path = arguments.out / f"proxy-{arguments.model}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    targets = SoftTargets(
        context.graph.module, context.data, DistillConfig(steps=arguments.steps),
        default_cache_dir(), context.teacher_digest,
    )  # fmt: skip
    recipe, other = Recipe(), other_seed(context, 1)
    records = []
    # From the smallest to the largest by turns: what is known early is of students of all sizes.
    turns = np.concatenate([genomes[::-1][start::TURNS] for start in range(TURNS)])
    for genome in track(turns, "students", disable=not sys.stdout.isatty()):
        genome = canonical(layout, genome | layout.unsearched(SEARCHED), step)
        key = f"{layout.digest(genome)[:16]}-{arguments.steps}"
        if key not in known and not arguments.table_only:
            known[key] = study(context, other, genome, recipe, targets)
            write_json_atomic(path, known)
        if key in known:
            records.append(known[key])
    if len(records) < 2 * BANDS:
        print(f"error: {path} has {len(records)} of these students; run without --table-only",
              file=sys.stderr)  # fmt: skip
        return 2
    teacher = make_student(context, layout.teacher(), recipe)
    text = table(records, count_macs(teacher))
    print(text)
    write_atomic(arguments.out / f"proxy-{arguments.model}.md", f"{text}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
