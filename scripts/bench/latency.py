"""Repeatability of latencies: the same students measured twice, idle and beside a busy process.

python scripts/bench/latency.py --model vgg16

Prints the rank correlation (Spearman) and the median difference of the two measurements
(docs/method.md).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.genome.canonical import canonical
from moodistill.genome.layout import SEARCHED
from moodistill.io.atomic import write_json_atomic
from moodistill.io.cache import default_cache_dir
from moodistill.latency.device import check_provider, device_fingerprint
from moodistill.latency.meter import LatencyConfig, LatencyMeter
from moodistill.latency.simd import probe_simd
from moodistill.onnx.writer import to_onnx
from moodistill.student.builder import build_student
from moodistill.student.context import load_context
from moodistill.student.evaluator import teacher_onnx
from moodistill.teacher.task import load_task

# One thread that multiplies matrices for ever, as a training job beside us would.
NEIGHBOUR = "import numpy as np\na = np.ones((512, 512), np.float32)\nwhile True: a @ a"


def measure(context, models, config, calibrated):
    """Milliseconds and seconds spent, one of each a model, in a process of its own."""
    latencies, seconds = [], []
    shape = context.data.input_shape
    with LatencyMeter(teacher_onnx(context), shape, config, teacher_latency_ms=calibrated) as meter:
        for model in models:
            began = time.perf_counter()
            latencies.append(meter.measure(model).latency_ms)
            seconds.append(time.perf_counter() - began)
        return np.array(latencies), np.array(seconds), meter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--provider", default=LatencyConfig.provider)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    arguments = parser.parse_args()
    try:
        config = LatencyConfig(arguments.threads, arguments.batch, arguments.provider)
        check_provider(config.provider)
        context = load_context(load_task(arguments.model), arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    probe = probe_simd(config, default_cache_dir())
    sampling = DensitySampling(context.layout, probe.step)
    rng = np.random.default_rng(0)
    # The first one is the teacher itself, which is the reference already.
    genomes = sampling._do(None, arguments.students + 1, random_state=rng)[1:]
    layout = context.layout
    genomes = [canonical(layout, g | layout.unsearched(SEARCHED), probe.step) for g in genomes]
    models = [
        to_onnx(build_student(context.graph, layout, g).module, context.data.input_shape)
        for g in genomes
    ]
    first, seconds, meter = measure(context, models, config, None)
    calibrated = meter.teacher_latency_ms
    again, _, quiet = measure(context, models, config, calibrated)
    neighbour = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR], env={**os.environ, "OMP_NUM_THREADS": "1",
                                                "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        busy, _, loud = measure(context, models, config, calibrated)
    finally:
        neighbour.kill()
        neighbour.wait()

    device = device_fingerprint(config)
    print(
        f"{len(models)} students of {arguments.model}, teacher {calibrated:.2f} ms, "
        f"{min(first):.2f} to {max(first):.2f} ms; SIMD step {probe.step}; {device['cpu']}, "
        f"{device['cores']} cores, {config.threads} thread(s), batch {config.batch}\n"
    )
    print("| second measurement | Spearman | median difference | largest | repeated windows |")
    print("| --- | --- | --- | --- | --- |")
    rows = {"quiet": (again, quiet), "busy neighbour": (busy, loud)}
    for name, (values, one) in rows.items():
        apart = np.abs(values / first - 1)
        print(
            f"| {name} | {spearmanr(first, values).statistic:.4f} | {np.median(apart):.1%} "
            f"| {apart.max():.1%} | {one.rejected_windows} |"
        )
    small = seconds[first < 2.0]
    if len(small):
        print(
            f"\nseconds for one structure below 2 ms: median {np.median(small):.2f}, "
            f"largest {small.max():.2f} ({len(small)} of them); all: "
            f"median {np.median(seconds):.2f}, largest {seconds.max():.2f}"
        )
    print("\nwidth  latency / that of 64 channels (chain of 3x3 convolutions)")
    for width, ratio in probe.ratios.items():
        print(f"{width:5}  {ratio:.3f}  {'#' * round(40 * ratio)}")
    if arguments.json:
        record = {"first_ms": first.tolist(), "again_ms": again.tolist(), "busy_ms": busy.tolist()}
        write_json_atomic(arguments.json, {"device": device, **record, "simd": probe.ratios})
    return 0


if __name__ == "__main__":
    sys.exit(main())
