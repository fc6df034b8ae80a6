"""Our search against pruning libraries, plain operators and itself without its ingredients.

python scripts/bench_search.py --model vgg16 --evaluations 160 --seeds 3
python scripts/bench_search.py --model vgg16 --table-only

Every arm scores the same number of students by the same measures and keeps them in a store of its
own: run the command again to carry on. Table and figure are made from `<out>/search-<model>.json`;
an arm that is there is not run again. Needs `pip install -e ".[bench]"` for Torch-Pruning.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers import l1_widths, score, torch_pruning_points
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.sampling.rnd import BinaryRandomSampling
from tqdm import tqdm

from moodistill.context import TeacherContext, default_cache_dir, load_context, use_threads
from moodistill.device import device_fingerprint, probe_simd
from moodistill.distill import DistillConfig, SoftTargets, distill
from moodistill.errors import UserError
from moodistill.evaluation import Evaluation
from moodistill.evolution import Operators, Search, SearchConfig, default_operators
from moodistill.evolution import hypervolume as normalised_hypervolume
from moodistill.executor import SerialExecutor
from moodistill.files import write_atomic, write_json_atomic
from moodistill.inherit import InheritConfig
from moodistill.latency import LatencyMeter
from moodistill.objectives import DEFAULT, objective_values
from moodistill.operators import DensitySampling
from moodistill.recipe import Evaluator, Recipe, make_student, student_accuracy, teacher_onnx
from moodistill.store import Store
from moodistill.task import load_task

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the teacher's latency
QUARTER = 1 / 4
ARMS = {
    "ours": "our search",
    "torch-pruning": "Torch-Pruning: magnitude, BN scale, Taylor; uniform and global",
    "l1": "uniform widths by L1 norm",
    "random": "our sampling, no search",
    "plain": "pymoo's binary sampling, uniform crossover, bit flips",
    "no-blocks": "ours without block connections",
    "no-merges": "ours without merge edges",
    "no-bypasses": "ours without bypass edges",
    "no-inheritance": "ours with plain slicing",
    "no-mutation": "ours with bit flips for our mutations",
    "no-screening": "ours without the model that screens offspring",
}


class Bench:
    """What all arms share."""

    def __init__(self, context: TeacherContext, folder: Path, step: int, count: int) -> None:
        self.context, self.folder, self.step, self.count = context, folder, step, count
        self.recipe = Recipe(simd_step=step)

    def meter(self) -> LatencyMeter:
        """Measures latency, with the teacher's as it was when this folder was begun."""
        path = self.folder / "teacher.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        made = LatencyMeter(
            teacher_onnx(self.context), self.context.data.input_shape,
            teacher_latency_ms=stored.get("teacher_latency_ms"),
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"teacher_latency_ms": made.teacher_latency_ms})
        return made

    def run(self, arm: str, seed: int, meter: LatencyMeter) -> None:
        """Run one arm to its end, from its store where it was begun."""
        folder = self.folder / f"{arm}-{seed}"
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / "run.json", {"arm": arm, "seed": seed})
            Store.create(folder).close()
        with Store.open(folder) as store:
            if len(store) >= self.count:
                return
            if arm == "torch-pruning":
                self._peer(store, meter)
            elif arm in ("l1", "random"):
                self._one_by_one(store, meter, arm, seed)
            else:
                self._search(store, meter, arm, seed)

    def _peer(self, store: Store, meter: LatencyMeter) -> None:
        known = {one.summary for one in store.all()}
        points = torch_pruning_points(self.context, self.count, self.step)
        for name, module in tqdm(points, total=self.count, desc="torch-pruning", disable=None):
            if name not in known and len(store) < self.count:
                images = self.recipe.validation_images
                store.add(score(self.context, module, meter, name, images)[0])

    def _one_by_one(self, store: Store, meter: LatencyMeter, arm: str, seed: int) -> None:
        layout = self.context.layout
        recipe = self.recipe
        if arm == "l1":
            recipe = replace(recipe, inherit=InheritConfig(mode="slice"))
            shares = np.geomspace(0.95, 0.08, self.count)
            genomes = [l1_widths(self.context, float(s), self.step) for s in shares]
        else:
            sampling = DensitySampling(layout, self.step)
            rng = np.random.default_rng(seed)
            genomes = []
            for share in np.exp(rng.uniform(np.log(0.12), np.log(0.8), 2 * self.count)):
                genomes.append(layout.teacher())
                sampling.draw(genomes[-1], float(share), rng)
        evaluator = Evaluator(self.context, recipe, meter.measure)
        repair = default_operators(layout, self.step).repair
        for genome in tqdm(repair._do(None, np.array(genomes)), desc=arm, disable=None):
            if len(store) < self.count and store.get(layout.digest(genome)) is None:
                store.add(evaluator.evaluate(genome))

    def _search(self, store: Store, meter: LatencyMeter, arm: str, seed: int) -> None:
        layout, recipe = self.context.layout, self.recipe
        population = 32
        config = SearchConfig(
            population=population,
            generations=-(-self.count // population),
            seed=seed,
            simd_step=self.step,
        )
        if arm in ("plain", "no-screening"):
            config = replace(config, screen=1)
        kept = np.zeros(layout.length, dtype=bool)
        kind = {"no-blocks": "block/", "no-merges": "merge/", "no-bypasses": "bypass/"}.get(arm)
        for name, place in layout.slices.items():
            if kind and name.startswith(kind):
                kept[place] = True
        operators = default_operators(layout, self.step, kept)
        if arm == "no-inheritance":
            recipe = replace(recipe, inherit=InheritConfig(mode="slice"))
        elif arm == "no-mutation":
            operators = replace(operators, mutation=BitflipMutation())
        elif arm == "plain":
            operators = Operators(
                BinaryRandomSampling(), UniformCrossover(), BitflipMutation(), operators.repair
            )
        evaluator = Evaluator(self.context, recipe, meter.measure)
        search = Search(layout, config, store, SerialExecutor(evaluator.evaluate), operators)
        total = population * config.generations
        with tqdm(total=total, desc=f"{arm} {seed}", disable=None) as bar:
            for _ in search.run():
                bar.update(1)

    def record(self, arm: str, seed: int, teacher: Evaluation) -> dict[str, Any]:
        """What is kept of an arm's run: every student's measures, the best at a quarter."""
        with Store.open(self.folder / f"{arm}-{seed}", readonly=True) as store:
            students = [one for one in store.all()[: self.count] if one.latency is not None]
        points = np.array([objective_values(one, DEFAULT) for one in students])
        reference = objective_values(teacher, DEFAULT)
        assert reference is not None
        record: dict[str, Any] = {
            "device": device_fingerprint(),
            "evaluations": self.count,
            "chance": 1.0 / len(self.context.data.labels),
            "teacher": list(reference),
            "students": points.round(6).tolist(),
        }
        best = best_within(points, reference[-1] * QUARTER)
        if best is not None:
            one = students[best]
            record["quarter"] = {"genome": one.genome.hex(), "name": one.summary, "distilled": {}}
        return record

    def distilled(self, arm: str, quarter: dict[str, Any], steps: int) -> float:
        """Accuracy of all held-out images of a record's student after `steps` of distillation."""
        context = self.context
        config = replace(DistillConfig(), steps=steps)
        if quarter["genome"]:
            mode = "slice" if arm in ("no-inheritance", "l1") else "student"
            recipe = replace(self.recipe, inherit=InheritConfig(mode=mode))
            genome = context.layout.unpack(bytes.fromhex(quarter["genome"]))
            module = make_student(context, genome, recipe).module
        else:
            points = torch_pruning_points(context, self.count, self.step)
            network = next(network for name, network in points if name == quarter["name"])
            module = torch.fx.symbolic_trace(network)
        targets = SoftTargets(
            context.graph.module, context.data, config, default_cache_dir(), context.teacher_digest
        )
        module = distill(module, targets, config)
        targets.save()
        return student_accuracy(module, context.data, context.data.validation)


def hypervolume(record: dict[str, Any], count: int | None = None, least: float = 0.0) -> float:
    """The search's own of the first `count` students, with accuracy counted from chance.

    Those of an accuracy below `least` are left out.
    """
    students = [one for one in record["students"][:count] if 1.0 - one[0] >= least]
    rows = np.array([record["teacher"], *students], dtype=float)
    rows[:, 0] = np.minimum(1.0, rows[:, 0] / (1.0 - record["chance"]))
    return normalised_hypervolume(rows[1:], rows[0])


def best_within(points: np.ndarray, limit_ms: float) -> int | None:
    """The place of the most accurate among `(n, 3)` [error, parameters, ms] within `limit_ms`."""
    fitting = np.flatnonzero(points[:, 2] <= limit_ms)
    return int(fitting[np.argmin(points[fitting, 0])]) if len(fitting) else None


def relative(record: dict[str, Any]) -> np.ndarray:
    """`(n, 3)` of a record: error, and parameters and latency as shares of the teacher's."""
    return np.array(record["students"]) / [1.0, *record["teacher"][1:]]


def table(records: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown: medians over seeds, and the range of the hypervolume."""
    lines = [
        "| arm | seeds | hypervolume (range) | of students of 50% and more | "
        + " | ".join(f"1/{round(1 / s)}" for s in SHARES) + " | 1/4 distilled |",
        "| --- |" + " --- |" * (len(SHARES) + 4),
    ]  # fmt: skip
    for arm in ARMS:
        runs = runs_of(records, arm)
        if not runs:
            continue
        volumes = [hypervolume(run) for run in runs]
        half = np.median([hypervolume(run, least=0.5) for run in runs])
        cells = []
        for share in SHARES:
            found = [(run, best_within(np.array(relative(run)), share)) for run in runs]
            best = [0.0 if i is None else 1 - run["students"][i][0] for run, i in found]
            cells.append(f"{np.median(best):.1%}" if any(best) else "none")
        final = [max(run.get("quarter", {}).get("distilled", {}).items(), default=None,
                     key=lambda item: int(item[0])) for run in runs]  # fmt: skip
        last = f"{np.median([value for _, value in final if value]):.1%}" if all(final) else "-"
        lines.append(
            f"| {arm} | {len(runs)} | {np.median(volumes):.4f} "
            f"({min(volumes):.4f}-{max(volumes):.4f}) | {half:.4f} | "
            + " | ".join(cells)
            + f" | {last} |"
        )
    for arm in ("torch-pruning", "l1"):
        counts = [beaten(peer, run) for peer in runs_of(records, arm)
                  for run in runs_of(records, "ours")]  # fmt: skip
        if counts:
            lines += ["", f"Students of {arm} that one of ours is at least as accurate and as fast "
                      f"as, by seed of ours: {', '.join(counts)}."]  # fmt: skip
    return "\n".join(lines)


def beaten(peer: dict[str, Any], run: dict[str, Any]) -> str:
    """How many students of `peer` are no better in accuracy and latency than one of `run`'s."""
    theirs, mine = relative(peer)[:, [0, 2]], relative(run)[:, [0, 2]]
    count = int((mine[None] <= theirs[:, None]).all(axis=2).any(axis=1).sum())
    return f"{count} of {len(theirs)}"


def runs_of(records: dict[str, dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """An arm's records, by seed."""
    return [record for name, record in records.items() if name.rpartition("-")[0] == arm]


def figure(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Hypervolume against evaluations, median over seeds."""
    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    for arm in ARMS:
        runs = runs_of(records, arm)
        if runs:
            least = min(len(run["students"]) for run in runs)
            places = np.unique(np.linspace(8, least, 20).astype(int))
            curves = [[hypervolume(run, n) for n in places] for run in runs]
            axes.plot(places, np.median(curves, axis=0), label=arm)
    axes.set_xlabel("students evaluated")
    axes.set_ylabel("hypervolume")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    FigureCanvasAgg(picture)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--evaluations", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS), help="some of: " + ", ".join(ARMS))
    parser.add_argument(
        "--distill-steps",
        type=int,
        default=0,
        help="of the best student at a quarter of the latency",
    )
    parser.add_argument("--folder", type=Path, help="of the stores (default results/bench-<model>)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--table-only", action="store_true", help="from the records there are")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    use_threads(None)
    try:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise UserError(f"unknown arm {unknown[0]!r}; expected some of {', '.join(ARMS)}")
        context = load_context(load_task(arguments.model), arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = arguments.out / f"search-{arguments.model}.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    bench = Bench(
        context,
        arguments.folder or Path("results") / f"bench-{arguments.model}",
        probe_simd(None, default_cache_dir()).step,
        arguments.evaluations,
    )

    def keep() -> None:
        write_json_atomic(path, records)
        write_atomic(path.with_suffix(".md"), f"{table(records)}\n".encode())
        figure(records, path.with_suffix(".png"))

    # Nothing is drawn in two of them: one seed says it all.
    wanted = [(arm, seed) for seed in range(arguments.seeds) for arm in arms
              if seed == 0 or arm not in ("torch-pruning", "l1")]  # fmt: skip
    missing = [
        (arm, seed)
        for arm, seed in wanted
        if records.get(f"{arm}-{seed}", {}).get("evaluations") != arguments.evaluations
    ]
    if missing and not arguments.table_only:
        with bench.meter() as meter:
            evaluator = Evaluator(context, bench.recipe, meter.measure)
            teacher = evaluator.evaluate(context.layout.teacher())
            for arm, seed in missing:
                bench.run(arm, seed, meter)
                records[f"{arm}-{seed}"] = bench.record(arm, seed, teacher)
                keep()
    steps = str(arguments.distill_steps)
    for arm, seed in wanted if arguments.distill_steps else []:
        quarter = records.get(f"{arm}-{seed}", {}).get("quarter")
        if quarter and steps not in quarter["distilled"]:
            quarter["distilled"][steps] = bench.distilled(arm, quarter, int(steps))
            keep()
    if not records:
        print(f"error: no {path}; run without --table-only", file=sys.stderr)
        return 2
    keep()
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
