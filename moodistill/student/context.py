"""A teacher made ready for a search: its graph, samples, layout and data, loaded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moodistill.accelerator import CPU
from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout
from moodistill.heads.outputs import outputs_of
from moodistill.io.cache import default_cache_dir
from moodistill.io.tensorfile import file_digest
from moodistill.student.builder import build_student
from moodistill.teacher.blocks import LayerRules, build_layout
from moodistill.teacher.graph import TeacherGraph, trace
from moodistill.teacher.meaning import fitted_data
from moodistill.teacher.plain import copied
from moodistill.teacher.samples import CalibrationConfig, TeacherSamples, collect_samples
from moodistill.teacher.task import Task
from moodistill.teacher.weights import load_weights

CHECKED = 8  # images that the traced network is compared on
MOST_APART = 1e-3
Outputs = Mapping[str, torch.Tensor]  # by name


@dataclass(frozen=True)
class TeacherContext:
    """Everything that scoring a student needs of its teacher.

    Attributes:
        graph: on the CPU, where students are cut out of it.
        samples: on the device.
        device: that students are solved, scored and distilled on.
        on_device: the graph with its weights there; None where that is the CPU.
    """

    task: Task
    graph: TeacherGraph
    samples: TeacherSamples
    layout: GenomeLayout
    data: ImageData
    teacher_digest: str
    device: torch.device = CPU
    on_device: TeacherGraph | None = None

    @property
    def solver(self) -> TeacherGraph:
        """The graph with its weights on the device."""
        return self.graph if self.on_device is None else self.on_device


def load_context(
    task: Task,
    data_dir: Path | None = None,
    calibration: CalibrationConfig | None = None,
    cache_dir: Path | None = None,
    rules: LayerRules | None = None,
    say: Callable[[str], None] | None = None,
    check: Callable[[nn.Module, ImageData], None] | None = None,
    device: torch.device = CPU,
) -> TeacherContext:
    """Load a task's data and teacher and prepare them for a search.

    `say` is told which of several sets of weights was taken; `check` sees the teacher before
    anything is computed at length. Teacher and samples are taken to `device`.

    Raises:
        UserError: if data or weights are missing, damaged or of another architecture.
    """
    path = task.weights
    if not path.is_file():
        advice = ", or train them first with: moodistill teacher"
        raise UserError(
            f"teacher weights {path} do not exist; give their file as `weights`"
            + (advice if task.train else "")
        )
    teacher = load_weights(task.build(), path, task.weights_key, say)
    data = task.load_data(data_dir)
    graph = trace(teacher, data.input_shape, rules.opaque if rules else ())
    data = fitted_data(data, graph, lambda: teacher)
    there = graph.on(device)
    if check is not None:
        check(teacher if there is graph else copied(teacher).to(device), data)
    digest = weights_digest(task)
    samples = collect_samples(
        there, data, calibration or CalibrationConfig(), cache_dir or default_cache_dir(), digest
    )
    layout = build_layout(graph, samples, rules)
    check_graph(teacher, graph, layout, data.calibration(CHECKED))
    if there is graph:
        return TeacherContext(task, graph, samples, layout, data, digest)
    return TeacherContext(task, graph, samples.to(device), layout, data, digest, device, there)


def weights_digest(task: Task) -> str:
    """Hex digest of the teacher's weights: of their file, and of which set of it is taken."""
    digest = file_digest(task.weights)
    if task.weights_key is None:
        return digest
    return hashlib.sha256(f"{digest} {task.weights_key}".encode()).hexdigest()


@torch.no_grad()
def check_graph(
    teacher: nn.Module, graph: TeacherGraph, layout: GenomeLayout, images: torch.Tensor
) -> None:
    """Compare a network with the student of its own genome, on some images, output by output.

    Tracing follows operations, not memory: what a network does by side effects (in-place work on
    views, hooks) may be lost, and would be lost in every student.

    Raises:
        UserError: if their outputs differ, or an image's outputs hang on the others in its batch.
    """
    expected = outputs_of(teacher.eval()(images.clone()))
    student = build_student(graph, layout, layout.teacher()).module
    found = outputs_of(student(images.clone()))
    apart = _apart(found, expected, expected)
    if not apart < MOST_APART:
        raise UserError(
            f"{type(teacher).__name__} computes something else once it is traced (logits differ by "
            f"{apart:.2g} of the largest): expected a network without side effects, such as "
            "in-place operations on slices or views, or forward hooks"
        )
    if graph.whole and len(images) > 1:
        # What is not understood may compute with the other images of a batch.
        one = outputs_of(student(images[:1].clone()))
        alone = _apart(one, {name: values[:1] for name, values in found.items()}, expected)
        if not alone < MOST_APART:
            raise UserError(
                f"{type(teacher).__name__} mixes images: for one image its logits differ by "
                f"{alone:.2g} of the largest from those in a batch; left whole in it are: "
                f"{graph.describe_uncut()}"
            )


def _apart(found: Outputs, wanted: Outputs, whole: Outputs) -> float:
    """The largest difference of outputs by name, relative to the largest of `whole`."""
    if found.keys() != wanted.keys():
        return float("inf")
    return max(
        float((found[name].float() - values.float()).abs().max())
        / float(whole[name].float().abs().max().clamp_min(1.0))
        for name, values in wanted.items()
    )


def default_threads() -> int:
    """Threads for torch: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(threads: int | None) -> None:
    """Set torch's threads for everything but the latency measurement."""
    torch.set_num_threads(threads or default_threads())
