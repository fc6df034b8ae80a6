"""Our search against pruning libraries, plain operators and itself without its ingredients.

python scripts/bench_search.py --model vgg16 --evaluations 160 --seeds 3
python scripts/bench_search.py --model vgg16 --table-only

Every arm scores the same number of students by the same measures and keeps them in a store of its
own: run the command again to carry on. Needs `pip install -e ".[bench]"` for Torch-Pruning.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
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

    def points(self, arm: str, seed: int) -> list[Evaluation]:
        """What an arm scored, in order, without failures."""
        folder = self.folder / f"{arm}-{seed}"
        if not (folder / "run.json").exists():
            return []
        with Store.open(folder, readonly=True) as store:
            return [one for one in store.all()[: self.count] if one.latency is not None]


def hypervolume(points: list[Evaluation], teacher: Evaluation, chance: float) -> float:
    """The search's own, with accuracy counted from chance."""
    rows = np.array([objective_values(one, DEFAULT) for one in [teacher, *points]], dtype=float)
    rows[:, 0] = np.minimum(1.0, rows[:, 0] / (1.0 - chance))
    return normalised_hypervolume(rows[1:], rows[0])


def best_within(points: list[Evaluation], limit_ms: float) -> Evaluation | None:
    """The most accurate student of at most `limit_ms`."""
    fitting = [one for one in points if one.latency and one.latency.latency_ms <= limit_ms]
    return max(fitting, key=lambda one: one.accuracy, default=None)


def distilled(bench: Bench, arm: str, one: Evaluation, steps: int) -> float:
    """Validation accuracy (all held-out images) after distillation; kept beside the stores."""
    path = bench.folder / "distilled.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = f"{arm} {one.genome_hash} {steps}"
    if key not in known:
        context = bench.context
        config = replace(DistillConfig(), steps=steps)
        if one.genome:
            mode = "slice" if arm in ("no-inheritance", "l1") else "student"
            recipe = replace(bench.recipe, inherit=InheritConfig(mode=mode))
            module = make_student(context, context.layout.unpack(one.genome), recipe).module
        else:
            points = torch_pruning_points(context, bench.count, bench.step)
            network = next(network for name, network in points if name == one.summary)
            module = torch.fx.symbolic_trace(network)
        targets = SoftTargets(
            context.graph.module, context.data, config, default_cache_dir(), context.teacher_digest
        )
        module = distill(module, targets, config)
        targets.save()
        known[key] = student_accuracy(module, context.data, context.data.validation)
        write_json_atomic(path, known)
    return known[key]


def table(
    bench: Bench, teacher: Evaluation, arms: list[str], seeds: int,
    final: Callable[[str, Evaluation], float] | None,
) -> str:  # fmt: skip
    """The table in Markdown: median over seeds, and the range of the hypervolume."""
    assert teacher.latency is not None
    chance = 1.0 / len(bench.context.data.labels)
    limits = [share * teacher.latency.latency_ms for share in SHARES]
    lines = [
        "| arm | hypervolume (range) | " + " | ".join(f"1/{round(1 / s)}" for s in SHARES)
        + " | 1/4 distilled |",
        "| --- |" + " --- |" * (len(SHARES) + 2),
    ]  # fmt: skip
    for arm in arms:
        runs = [p for p in (bench.points(arm, seed) for seed in range(seeds)) if p]
        if not runs:
            continue
        volumes = [hypervolume(points, teacher, chance) for points in runs]
        cells = []
        for limit in limits:
            found = [best_within(points, limit) for points in runs]
            cells.append(f"{np.median([one.accuracy if one else 0 for one in found]):.1%}")
        last = "-"
        quarter = [best_within(points, limits[1]) for points in runs]
        if final is not None and all(quarter):
            last = f"{np.median([final(arm, one) for one in quarter if one]):.1%}"
        lines.append(
            f"| {arm} | {np.median(volumes):.4f} ({min(volumes):.4f}-{max(volumes):.4f}) | "
            + " | ".join(cells) + f" | {last} |"
        )  # fmt: skip
    return "\n".join(lines)


def figure(bench: Bench, teacher: Evaluation, arms: list[str], seeds: int, path: Path) -> None:
    """Hypervolume against evaluations, median over seeds."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chance = 1.0 / len(bench.context.data.labels)
    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    places = np.unique(np.linspace(8, bench.count, 20).astype(int))
    for arm in arms:
        runs = [p for p in (bench.points(arm, seed) for seed in range(seeds)) if p]
        if runs:
            curves = [[hypervolume(p[:n], teacher, chance) for n in places] for p in runs]
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
    parser.add_argument("--distill-steps", type=int, default=0, help="0: no distillation")
    parser.add_argument("--folder", type=Path, help="of the stores (default results/bench-<model>)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--table-only", action="store_true", help="from what the stores hold")
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
    folder = arguments.folder or Path("results") / f"bench-{arguments.model}"
    step = probe_simd(None, default_cache_dir()).step
    bench = Bench(context, folder, step, arguments.evaluations)
    calibration = folder / "teacher.json"
    stored = json.loads(calibration.read_text()) if calibration.exists() else {}
    with LatencyMeter(
        teacher_onnx(context), context.data.input_shape,
        teacher_latency_ms=stored.get("teacher_latency_ms"),
    ) as meter:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        record = {"teacher_latency_ms": meter.teacher_latency_ms, "device": device_fingerprint()}
        write_json_atomic(calibration, record)
        teacher = Evaluator(context, bench.recipe, meter.measure).evaluate(context.layout.teacher())
        if not arguments.table_only:
            for seed in range(arguments.seeds):
                for arm in arms:
                    # Nothing is drawn in these two: one seed says it all.
                    if seed == 0 or arm not in ("torch-pruning", "l1"):
                        bench.run(arm, seed, meter)
    steps = arguments.distill_steps
    final = (lambda arm, one: distilled(bench, arm, one, steps)) if steps else None
    text = table(bench, teacher, arms, arguments.seeds, final)
    print(text)
    name = f"search-{arguments.model}"
    write_atomic(arguments.out / f"{name}.md", f"{text}\n".encode())
    figure(bench, teacher, arms, arguments.seeds, arguments.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
