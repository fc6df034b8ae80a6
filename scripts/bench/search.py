"""The search against pruning libraries, random draws and itself without each of its parts.

python scripts/bench/search.py --model vgg16 --evaluations 160 --seeds 3
python scripts/bench/search.py --model vgg16 --evaluations 160 --seeds 3 --min-accuracy 0.42
python scripts/bench/search.py --model vgg16 --table-only

Every arm scores the same number of students by the same measures and stores them: run the command
again to continue. Table and figure (docs/comparison.md) are made from `<out>/search-<model>.json`
(`search-<model>-limited.json` with `--min-accuracy`). An arm and seed that is in the file is not
run again; delete its line and its store to do so. Torch-Pruning comes with the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import l1_widths, score, torch_pruning_points
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.sampling.rnd import BinaryRandomSampling
from rich.progress import track
from search_records import ARMS, Records, best_within, keep, table

from moodistill.errors import UserError
from moodistill.evolution.algorithms import Operators, default_operators
from moodistill.evolution.driver import Search, SearchConfig
from moodistill.evolution.executor import SerialExecutor
from moodistill.evolution.operators import DensitySampling
from moodistill.evolution.tables import Tables
from moodistill.genome.layout import CONNECTIONS, SEARCHED
from moodistill.io.atomic import write_json_atomic
from moodistill.io.cache import default_cache_dir
from moodistill.latency.device import device_fingerprint
from moodistill.latency.meter import LatencyMeter
from moodistill.latency.simd import probe_simd
from moodistill.pareto.evaluation import Evaluation
from moodistill.pareto.objectives import DEFAULT, Limits, objective_values
from moodistill.runs.tables import make_tables, read_tables, write_tables
from moodistill.storage.store import Store
from moodistill.student.accuracy import student_accuracy
from moodistill.student.context import TeacherContext, load_context, use_threads
from moodistill.student.evaluator import Evaluator, Recipe, make_student, teacher_onnx
from moodistill.student.inherit import Mode
from moodistill.teacher.task import load_task
from moodistill.training.distill import DistillConfig, SoftTargets, distill

SILENT = not sys.stdout.isatty()  # whether bars are left out
# Arms that search other kinds of connections than the default.
OTHER_KINDS: dict[str, tuple[str, ...]] = {
    "only-kernels": ("kernels",),
    "only-ranks": ("ranks",),
    "only-merges": ("merges",),
    "only-bypasses": ("bypasses",),
    "no-connections": (),
    "with-blocks": tuple(CONNECTIONS),
    "former": ("merges", "bypasses"),
    "former-widths": (),
}
# Arms that inherit in another way than the default.
OTHER_MODES: dict[str, Mode] = {
    "no-inheritance": "slice", "l1": "slice", "former": "student", "former-widths": "student",
}  # fmt: skip
NO_TABLES = ("no-tables", "plain", "no-inheritance", "former", "former-widths")


class Bench:
    """What all arms share."""

    def __init__(
        self, context: TeacherContext, folder: Path, step: int, count: int, limits: Limits
    ) -> None:
        self.context, self.folder, self.step, self.count = context, folder, step, count
        self.limits = limits
        self.recipe = Recipe()

    def meter(self) -> LatencyMeter:
        """Measures latency, with the teacher's as it was when this folder was begun."""
        path = self.folder / "teacher.json"
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        made = LatencyMeter(
            teacher_onnx(self.context), self.context.data.input_shape,
            teacher_latency_ms=stored.get("teacher_latency_ms"),
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"teacher_latency_ms": made.teacher_latency_ms})
        return made

    def tables(self, kinds: tuple[str, ...], meter: LatencyMeter) -> Tables:
        """The tables of some kinds of connections, measured once."""
        path = self.folder / f"tables-{'-'.join(kinds) or 'widths'}.json"
        if not path.exists():
            kept = self.context.layout.unsearched(kinds)
            write_tables(path, make_tables(self.context, meter.profile, self.step, kept))
        return read_tables(path)

    def recipe_of(self, arm: str) -> Recipe:
        """How an arm's students are scored."""
        mode = OTHER_MODES.get(arm, self.recipe.inherit.mode)
        return replace(self.recipe, inherit=replace(self.recipe.inherit, mode=mode))

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
        for name, module in track(points, "torch-pruning", self.count, disable=SILENT):
            if name not in known and len(store) < self.count:
                images = self.recipe.validation_images
                store.add(score(self.context, module, meter, name, images)[0])

    def _one_by_one(self, store: Store, meter: LatencyMeter, arm: str, seed: int) -> None:
        layout = self.context.layout
        recipe = self.recipe_of(arm)
        if arm == "l1":
            shares = np.geomspace(0.95, 0.08, self.count)
            genomes = [l1_widths(self.context, float(s), self.step) for s in shares]
        else:
            sampling = DensitySampling(layout, self.step)
            rng = np.random.default_rng(seed)
            genomes = []
            for share in np.exp(rng.uniform(np.log(0.12), np.log(0.8), 2 * self.count)):
                genomes.append(layout.teacher())
                sampling.draw(genomes[-1], float(share), rng)
            genomes = [genome | layout.unsearched(SEARCHED) for genome in genomes]
        evaluator = Evaluator(self.context, recipe, meter.measure, self.step)
        repair = default_operators(layout, self.step).repair
        for genome in track(repair._do(None, np.array(genomes)), arm, disable=SILENT):
            if len(store) < self.count and store.get(layout.digest(genome)) is None:
                store.add(evaluator.evaluate(genome))

    def _search(self, store: Store, meter: LatencyMeter, arm: str, seed: int) -> None:
        layout, recipe = self.context.layout, self.recipe_of(arm)
        population = min(32, self.count)
        config = SearchConfig(
            population=population,
            generations=-(-self.count // population),
            seed=seed,
            simd_step=self.step,
            limits=self.limits,
        )
        if arm in ("plain", "no-screening"):
            config = replace(config, screen=1)
        if arm in OTHER_KINDS:
            config = replace(config, connections=OTHER_KINDS[arm])
        operators = default_operators(layout, self.step)
        if arm == "no-mutation":
            operators = replace(operators, mutation=BitflipMutation())
        elif arm == "plain":
            operators = Operators(
                BinaryRandomSampling(), UniformCrossover(), BitflipMutation(), operators.repair
            )
        evaluator = Evaluator(self.context, recipe, meter.measure, self.step)
        tables = None if arm in NO_TABLES else self.tables(config.connections, meter)
        search = Search(
            layout, config, store, SerialExecutor(evaluator.evaluate), operators, tables
        )
        total = population * config.generations
        for _ in track(search.run(), f"{arm} {seed}", total, disable=SILENT):
            pass

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
            "min_accuracy": self.limits.min_accuracy,
            "chance": 1.0 / len(self.context.data.labels),
            "teacher": list(reference),
            "students": points.round(6).tolist(),
        }
        best = best_within(points, reference[-1] / 4)
        if best is not None:
            one = students[best]
            record["quarter"] = {"genome": one.genome.hex(), "name": one.summary, "distilled": {}}
        return record

    def distilled(self, arm: str, quarter: dict[str, Any], steps: int) -> float:
        """Accuracy of all held-out images of a record's student after `steps` of distillation."""
        context = self.context
        config = replace(DistillConfig(), steps=steps)
        if quarter["genome"]:
            genome = context.layout.unpack(bytes.fromhex(quarter["genome"]))
            module = make_student(context, genome, self.recipe_of(arm)).module
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
    parser.add_argument(
        "--min-accuracy",
        type=float,
        default=0.0,
        help="a limit of the searches; run_nsga sets one of its own (vgg16 0.42)",
    )
    parser.add_argument("--folder", type=Path, help="of the stores (default results/bench-<name>)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--table-only", action="store_true", help="from the records there are")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    name = Path(arguments.model).stem + ("-limited" if arguments.min_accuracy else "")
    arguments.folder = arguments.folder or Path("results") / f"bench-{name}"
    path = arguments.out / f"search-{name}.json"
    records = json.loads(path.read_text("utf-8")) if path.exists() else {}
    try:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise UserError(f"unknown arm {unknown[0]!r}; expected some of {', '.join(ARMS)}")
        if arguments.table_only and not records:
            raise UserError(f"{path} has no records; run without --table-only")
        for one in records.values():
            if arguments.min_accuracy != one.get("min_accuracy", 0.0):
                raise UserError(
                    f"{path} has runs of --min-accuracy {one.get('min_accuracy', 0.0)}; give the "
                    "same, or another --out and --folder"
                )
        if not arguments.table_only:
            run(arguments, arms, records, path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep(records, path)
    print(table(records))
    return 0


def run(arguments: argparse.Namespace, arms: list[str], records: Records, path: Path) -> None:
    """Whatever is missing in the records: searches, then distillations."""
    use_threads(None)
    context = load_context(load_task(arguments.model), arguments.data_dir)
    bench = Bench(
        context,
        arguments.folder,
        probe_simd(None, default_cache_dir()).step,
        arguments.evaluations,
        Limits(arguments.min_accuracy),
    )
    # Nothing is drawn in two of them: one seed says it all.
    wanted = [(arm, seed) for seed in range(arguments.seeds) for arm in arms
              if seed == 0 or arm not in ("torch-pruning", "l1")]  # fmt: skip
    missing = [
        (arm, seed)
        for arm, seed in wanted
        if records.get(f"{arm}-{seed}", {}).get("evaluations") != arguments.evaluations
    ]
    if missing:
        with bench.meter() as meter:
            evaluator = Evaluator(context, bench.recipe, meter.measure, bench.step)
            teacher = evaluator.evaluate(context.layout.teacher())
            for arm, seed in missing:
                bench.run(arm, seed, meter)
                records[f"{arm}-{seed}"] = bench.record(arm, seed, teacher)
                keep(records, path)
    steps = str(arguments.distill_steps)
    for arm, seed in wanted if arguments.distill_steps else []:
        quarter = records.get(f"{arm}-{seed}", {}).get("quarter")
        if quarter and steps not in quarter["distilled"]:
            quarter["distilled"][steps] = bench.distilled(arm, quarter, int(steps))
            keep(records, path)


if __name__ == "__main__":
    sys.exit(main())
