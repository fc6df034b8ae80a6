"""Baselines of `scripts/bench/search.py`: Torch-Pruning, and uniform widths by L1 norm.

Pruned networks are scored by the same measures as students: the ONNX file's accuracy, and its
latency beside the teacher.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from moodistill.latency.meter import LatencyMeter
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.onnx.writer import structure_hash, to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.student.context import TeacherContext

METHODS = ("magnitude", "bn_scale", "taylor")


def score(
    context: TeacherContext, module: nn.Module, meter: LatencyMeter, name: str, images: int
) -> tuple[Evaluation, fx.GraphModule]:
    """One pruned network by the search's own measures, and its traced form."""
    began = time.perf_counter()
    traced = fx.symbolic_trace(module.eval())
    model = to_onnx(traced, context.data.input_shape)
    latency: Latency = meter.measure(model, structure_hash(traced))
    split = context.data.validation.head(images)
    reached = onnx_accuracy(model, context.data, split, torch.get_num_threads())
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    parameters = sum(p.numel() for p in module.parameters())
    seconds = {"score": time.perf_counter() - began}
    return Evaluation(
        digest, b"", reached, parameters, 0, len(model), latency, seconds, None, name
    ), traced


@torch.no_grad()
def recalibrate(module: nn.Module, images: torch.Tensor) -> None:
    """Batch statistics over `images`, cumulative, as the search's students get them."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    for batch in images.split(128):
        module(batch)
    for norm in norms:
        norm.momentum = 0.1
    module.eval()


def torch_pruning(
    context: TeacherContext, method: str, spread: str, ratio: float, step: int
) -> nn.Module:
    """The teacher pruned by Torch-Pruning to `1 - ratio` of its widths, statistics recalibrated.

    `spread` is `uniform` (every layer alike) or `global` (one ranking over all layers).
    """
    import torch_pruning as tp

    model = copy.deepcopy(_teacher(context)).eval()
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "bn_scale": tp.importance.BNScaleImportance(),
        "taylor": tp.importance.GroupTaylorImportance(),
    }[method]
    if method == "taylor":
        split = context.data.train.head(512)
        for start in range(0, len(split), 128):
            images = context.data.normalise(split.images[start : start + 128])
            labels = torch.from_numpy(split.labels[start : start + 128])
            F.cross_entropy(model(images), labels).backward()
    output = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, context.samples.images[:1], importance, pruning_ratio=ratio,
        global_pruning=spread == "global", ignored_layers=[output], round_to=step,
        max_pruning_ratio=0.95,
    )  # fmt: skip
    pruner.step()
    for parameter in model.parameters():
        parameter.grad = None
    recalibrate(model, context.samples.images)
    return model


def _teacher(context: TeacherContext) -> nn.Module:
    from moodistill.teacher.weights import load_weights

    return load_weights(context.task.build(), context.task.weights)


def torch_pruning_points(
    context: TeacherContext, count: int, step: int
) -> Iterator[tuple[str, nn.Module]]:
    """About `count` networks: three importances, uniform and global, a sweep of widths each."""
    each = max(1, count // (2 * len(METHODS)))
    for share in np.geomspace(0.85, 0.1, each):
        for method in METHODS:
            for spread in ("uniform", "global"):
                name = f"{method} {spread} {share:.3f}"
                yield name, torch_pruning(context, method, spread, 1.0 - float(share), step)


def l1_widths(context: TeacherContext, share: float, step: int) -> np.ndarray:
    """A genome with `share` of every width, the channels of largest L1 weight norm kept."""
    layout = context.layout
    genome = layout.teacher()
    for group in layout.groups.values():
        if group.frozen:
            continue
        norms = np.zeros(group.size)
        for layer in layout.layers:
            if group.name in layer.groups:
                weight = context.graph.layer_module(layer.name).weight.detach()
                norms += weight.abs().flatten(1).sum(1).numpy()
        width = min(group.size, max(step, round(share * group.size / step) * step))
        mask = layout.view(genome, f"mask/{group.name}")
        mask[:] = False
        mask[np.argsort(-norms, kind="stable")[:width]] = True
    return genome
