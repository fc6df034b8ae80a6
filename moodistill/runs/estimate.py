"""About how long a run takes on this machine, from the teacher's speed."""

from __future__ import annotations

import time

import torch
from torch import nn

from moodistill.accelerator import mixed_precision
from moodistill.config import RunConfig
from moodistill.heads.outputs import outputs_of
from moodistill.student.context import TeacherContext

STUDENT = 0.25  # of the teacher's time, an average student of a search
MEASURING_SECONDS = 0.6  # building, exporting and timing one student


def estimate_seconds(context: TeacherContext, config: RunConfig, stored: int) -> dict[str, float]:
    """Seconds for the `search`, the `finalists` and the `front`'s accuracy.

    Args:
        context: its teacher is timed on 64 images.
        config: the run's.
        stored: evaluations that are answered from the store.
    """
    images = context.samples.images[:64]
    with torch.no_grad():
        _run(context.solver.module, images[:8])
        began = time.perf_counter()
        _run(context.solver.module, images)
    per_image = (time.perf_counter() - began) / len(images)
    data, search = context.data, config.search
    inherited = 1.5 * config.calibration.images  # a solve costs half of the pass again
    count = max(0, search.population * search.generations - stored)
    passes = config.recipe.validation_images + inherited
    searching = count * (STUDENT * per_image * passes + MEASURING_SECONDS)
    step = config.distill.batch_size * per_image
    training = (
        0.35 if mixed_precision(context.device) else 0.8
    )  # a student's step, in forward passes of the teacher
    checks = 0.2 * per_image * (2 * len(data.validation) + len(data.test))
    finalists = config.finalists * (config.distill.steps * step * training + checks)
    finalists += min(config.distill.steps, config.distill.view_count) * step
    # The front, about one and a half populations, is checked on all validation images.
    passes = len(data.validation) + inherited
    front = 1.5 * search.population * STUDENT * per_image * passes
    return {"search": searching, "finalists": finalists, "front": front}


def _run(network: nn.Module, images: torch.Tensor) -> None:
    for output in outputs_of(network(images)).values():
        output.cpu()  # an accelerator has only begun when it returns
