"""Seconds per evaluation by stage, and peak memory (the table in docs/results.md).

python scripts/bench/evaluation.py --model vgg16

Scores the first students that a search would draw, one after another in this process. Compare two
versions in one session on one machine.
"""

import argparse
import resource
import sys
from pathlib import Path

import numpy as np

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.genome.layout import SEARCHED
from moodistill.latency.meter import LatencyMeter
from moodistill.latency.simd import probe_simd
from moodistill.student.context import load_context, use_threads
from moodistill.student.evaluator import Evaluator, Recipe, teacher_onnx
from moodistill.teacher.task import load_task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--students", type=int, default=24)
    arguments = parser.parse_args()
    use_threads(None)
    try:
        context = load_context(load_task(arguments.model), arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    step = probe_simd().step
    sampling = DensitySampling(context.layout, step)
    genomes = sampling._do(None, arguments.students, random_state=np.random.default_rng(0))
    genomes |= context.layout.unsearched(SEARCHED)
    with LatencyMeter(teacher_onnx(context), context.data.input_shape) as meter:
        evaluator = Evaluator(context, Recipe(), meter.measure, step)
        done = [evaluator.evaluate(genome) for genome in genomes]
    failed = [one.failure for one in done if one.failure]
    stages = {k: [one.seconds.get(k, 0.0) for one in done] for k in done[0].seconds}
    stages["total"] = [sum(one.seconds.values()) for one in done]
    print(f"{len(done)} students of {arguments.model}, {len(failed)} failed\n")
    print("| stage | median s | 90% s | largest s |")
    print("| --- | --- | --- | --- |")
    for name, values in stages.items():
        middle, high = np.quantile(values, [0.5, 0.9])
        print(f"| {name} | {middle:.2f} | {high:.2f} | {max(values):.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"\npeak memory of the main process: {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
