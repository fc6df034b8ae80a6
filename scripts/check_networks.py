"""What moodistill makes of torchvision's (and timm's) classification networks: one row for each.

python scripts/check_networks.py                          # every one of torchvision's
python scripts/check_networks.py resnet50 densenet121 --size 224
python scripts/check_networks.py --timm ghostnet_100 res2net50_26w_4s
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.genome.canonical import canonical
from moodistill.io.atomic import write_json_atomic
from moodistill.latency.meter import LatencyMeter
from moodistill.onnx.graph import OnnxGraph
from moodistill.onnx.ops import UnsupportedOperation
from moodistill.onnx.writer import to_onnx
from moodistill.student.builder import build_student
from moodistill.student.context import check_graph
from moodistill.teacher.blocks import build_layout
from moodistill.teacher.graph import trace
from moodistill.teacher.samples import CalibrationConfig, collect_samples
from moodistill.testing.masked import masked_logits

STEP = 8
IMAGES = 4
LEAST_SIZE = {"inception_v3": 96}
COLUMNS = (
    "network", "trace s", "groups", "frozen", "sites", "merge edges", "bypasses", "build s",
    "vs masked", "parameters", "ONNX", "writer", "latency",
)  # fmt: skip


class NoiseData:
    """Calibration images of noise; all that `collect_samples` asks of a data set."""

    digest = ""

    def __init__(self, size):
        self.images = torch.randn(IMAGES, 3, size, size)

    def calibration(self, count):
        """`(n, 3, H, W)` images."""
        return self.images[:count]


def build(name, from_timm):
    """A network with random weights."""
    torch.manual_seed(0)
    if from_timm:
        import timm

        return timm.create_model(name)
    import torchvision

    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    return torchvision.models.get_model(name, **options)


@torch.no_grad()
def draw(network, images):
    """Batch statistics of `images`, then scales, shifts and statistics drawn at random."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(0.5, 1.5)  # a layer scale of 1e-6 would hide its branch
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm in norms:
        norm.running_mean.add_(torch.randn(norm.num_features) * 0.2)
        norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.5, 1.5))
    network.eval()


def relative(found, expected):
    """Largest difference of logits, relative to an image's largest logit."""
    return float(((found - expected).abs().amax(1) / expected.abs().amax(1)).max())


@torch.no_grad()
def check(name, from_timm, size, measure):
    """The row of one network; `refused` names why there is none."""
    import onnxruntime

    network = build(name, from_timm)
    data = NoiseData(size)
    row = {"network": name}
    shape = (3, size, size)
    trace(network, shape)  # what is refused is refused before anything is run
    draw(network, data.images)
    began = time.perf_counter()
    graph = trace(network, shape)
    row["trace s"] = f"{time.perf_counter() - began:.1f}"
    config = CalibrationConfig(images=IMAGES, pixels=500)
    layout = build_layout(graph, collect_samples(graph, data, config, None, ""))
    row["groups"] = len(layout.groups)
    row["frozen"] = sum(g.frozen for g in layout.groups.values())
    row["sites"] = sum(name.startswith("block/") for name in layout.slices)
    row["merge edges"] = sum(len(m.inputs) for m in layout.merges)
    row["bypasses"] = sum(layer.bypassable for layer in layout.layers)
    check_graph(network, graph, layout, data.images)
    genome = layout.teacher()
    DensitySampling(layout, STEP).draw(genome, 0.5, np.random.default_rng(1))
    for layer in layout.layers:
        if layer.bypassable:  # what is read past a bypass has no masked twin
            layout.view(genome, f"bypass/{layer.name}")[0] = True
    genome = canonical(layout, genome, STEP)
    began = time.perf_counter()
    student = build_student(graph, layout, genome)
    row["build s"] = f"{time.perf_counter() - began:.2f}"
    found = student.module(data.images)
    row["vs masked"] = f"{relative(found, masked_logits(graph, layout, genome, data.images)):.0e}"
    total = sum(p.numel() for p in graph.module.parameters())
    row["parameters"] = f"{student.parameters / 1e6:.2f} / {total / 1e6:.2f} M"
    file = to_onnx(student.module, shape)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: data.images.numpy()})
    row["ONNX"] = f"{relative(torch.from_numpy(logits), found):.0e}"
    try:
        OnnxGraph(student.module, shape)
        row["writer"] = "own"
    except UnsupportedOperation as reason:
        row["writer"] = f"torch ({reason})"
    if measure:
        teacher = to_onnx(build_student(graph, layout, layout.teacher()).module, shape)
        with LatencyMeter(teacher, shape) as meter:
            ratio = meter.measure(file).latency_ms / meter.teacher_latency_ms
        row["latency"] = f"{ratio:.2f}"
    row["left whole"] = graph.uncut()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="names; default: all of torchvision's")
    parser.add_argument("--timm", action="store_true", help="the names are timm's")
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    names = arguments.networks
    if not names:
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    rows = []
    left_whole = {}
    for name in names:
        size = max(arguments.size, LEAST_SIZE.get(name, 0))
        try:
            row = check(name, arguments.timm, size, not arguments.no_latency)
            print(f"| {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |", flush=True)
            left_whole |= {name: row["left whole"]} if row["left whole"] else {}
        except (UserError, RuntimeError, AssertionError) as error:
            row = {"network": name, "refused": str(error).splitlines()[0]}
            print(f"| {name} | refused: {row['refused']} |", flush=True)
        rows.append(row)
        if arguments.json:
            write_json_atomic(arguments.json, rows)
    for name, groups in left_whole.items():
        print(f"\n{name} leaves whole: {'; '.join(f'{g} ({why})' for g, why in groups.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
