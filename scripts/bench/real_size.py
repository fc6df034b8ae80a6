"""One evaluation of a network of real size: seconds of each stage, and peak memory.

python scripts/bench/real_size.py --network resnet50

The network is torchvision's at 224x224, with random weights (time and memory do not depend on
them) and batch statistics of the images. The images are noise in a temporary folder, streamed. The
student keeps the given share of every width.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from images import make_folder  # beside this file

from moodistill.data.folders import load_image_folder
from moodistill.genome.canonical import canonical
from moodistill.io.tensorfile import save_atomic
from moodistill.student.context import load_context, use_threads
from moodistill.student.evaluator import Evaluator, Recipe
from moodistill.teacher.samples import CalibrationConfig
from moodistill.teacher.task import Task

SIZE = 224


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(weights=None, num_classes=10)


@torch.no_grad()
def settle(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Batch statistics as a trained network has them, so that no value explodes."""
    model.train()
    for _ in range(10):
        model(images)
    model.eval()


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--width", type=float, default=0.5, help="share of every width that stays")
    parser.add_argument("--calibration-images", type=int, default=CalibrationConfig().images)
    parser.add_argument("--score-images", type=int, default=Recipe().validation_images)
    arguments = parser.parse_args()
    use_threads(None)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        for split, count in (("train", 600), ("val", arguments.score_images), ("test", 20)):
            make_folder(folder / split, count, 256)
        began = time.perf_counter()
        data = load_image_folder(folder, (SIZE, SIZE), in_memory=False)
        seconds["index"] = time.perf_counter() - began
        model = network(arguments.network)
        settle(model, data.calibration(32))
        weights = Path(place) / "teacher.safetensors"
        save_atomic({k: v.clone() for k, v in model.state_dict().items()}, weights)
        task = Task(arguments.network, lambda: network(arguments.network), lambda _: data, weights)
        began = time.perf_counter()
        calibration = CalibrationConfig(images=arguments.calibration_images)
        context = load_context(task, calibration=calibration, cache_dir=Path(place) / "cache")
        seconds["teacher"] = time.perf_counter() - began
        genome = context.layout.teacher()
        for name in context.layout.groups:
            if f"mask/{name}" in context.layout.slices:
                mask = context.layout.view(genome, f"mask/{name}")
                mask[np.argsort(context.layout.groups[name].importance)] = np.arange(len(mask)) >= (
                    1 - arguments.width
                ) * len(mask)
        genome = canonical(context.layout, genome, 8)
        evaluator = Evaluator(context, Recipe(validation_images=arguments.score_images), None, 8)
        began, used = time.perf_counter(), time.process_time()
        found = evaluator.evaluate(genome)
        used = time.process_time() - used
        seconds["evaluation"] = time.perf_counter() - began
    seconds |= found.seconds
    print(
        json.dumps(
            {
                "network": arguments.network,
                "failure": found.failure,
                "parameters": found.parameters,
                "macs": found.macs,
                "calibration_images": context.samples.config.images,
                "scored_images": len(evaluator.validation),
                "seconds": {name: round(value, 1) for name, value in seconds.items()},
                "evaluation_cpu_seconds": round(used, 1),
                "peak_gib": round(peak_gib(), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
