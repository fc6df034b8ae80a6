"""What moodistill makes of torchvision's (and timm's) classification networks: one row for each.

python scripts/check_networks.py                          # every one of torchvision's
python scripts/check_networks.py resnet50 densenet121 --size 224
python scripts/check_networks.py --timm ghostnet_100 res2net50_26w_4s
python scripts/check_networks.py --timm --no-latency      # a list of timm's, and a table by family
"""

import argparse
import gc
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
    "network", "trace s", "groups", "frozen", "whole", "sites", "merge edges", "bypasses",
    "build s", "vs masked", "parameters", "ONNX", "writer", "latency",
)  # fmt: skip
OUTCOMES = ("works", "works in part", "refused", "wrong", "traceback")
MOST_APART = 1e-3
# Small ones of timm's families, of every kind that may be put on a small device.
TIMM = [
    "resnet18", "resnet26d", "resnet26t", "resnet50_gn", "resnetblur50", "seresnet18",
    "ecaresnet26t", "resnext26ts", "seresnext26d_32x4d", "legacy_seresnet18", "resnetv2_18",
    "resnetv2_18d", "resnetrs50", "test_resnet", "wide_resnet50_2", "skresnet18",
    "skresnext50_32x4d", "resnest14d", "resnest26d", "res2net50_26w_4s", "res2next50", "vgg11",
    "vgg11_bn", "densenet121", "rdnet_tiny", "dla34", "dla46_c", "dla46x_c", "dpn48b", "dpn68",
    "vovnet39a", "ese_vovnet19b_dw", "cspresnet50", "cspdarknet53", "cs3darknet_focus_s",
    "cs3darknet_s", "cspnext_tiny", "darknet17", "selecsls42", "hrnet_w18_small", "xception41",
    "legacy_xception", "inception_v3", "inception_v4", "efficientnet_b0", "efficientnet_lite0",
    "efficientnet_es", "efficientnet_b0_gn", "efficientnetv2_rw_t", "tf_efficientnet_b0",
    "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "mixnet_s", "tf_mixnet_s", "mnasnet_small",
    "mobilenetv1_100", "mobilenetv2_035", "mobilenetv2_100", "mobilenetv3_small_050",
    "mobilenetv3_large_100", "tf_mobilenetv3_small_075", "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium", "fbnetc_100", "fbnetv3_b", "spnasnet_100", "semnasnet_075",
    "lcnet_050", "tinynet_e", "hardcorenas_a", "ghostnet_050", "ghostnet_100", "ghostnetv2_100",
    "repghostnet_050", "rexnet_100", "regnetx_002", "regnety_002", "regnetz_005", "regnetv_040",
    "nfnet_f0", "dm_nfnet_f0", "eca_nfnet_l0", "nf_regnet_b0", "nf_resnet26", "repvgg_a0",
    "mobileone_s0", "gernet_s", "gcresnet33ts", "eca_botnext26ts_256", "sebotnet33ts_256",
    "halonet26t", "lambda_resnet26t", "bat_resnext26ts", "hgnet_tiny", "hgnetv2_b0",
    "lcnetv2_small", "starnet_s1", "fasternet_t0", "tresnet_m", "convmixer_768_32", "convnext_atto",
    "convnextv2_atto", "convnext_atto_ols", "inception_next_atto", "edgenext_xx_small",
    "mambaout_femto", "repvit_m0_9", "fastvit_t8", "mobilevit_xxs", "mobilevitv2_050",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0",
    "poolformer_s12", "poolformerv2_s12", "levit_128s", "shvit_s1", "swiftformer_xs", "pvt_v2_b0",
    "mixer_s32_224", "resmlp_12_224", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
]  # fmt: skip


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

        return timm.create_model(name, num_classes=20)
    import torchvision

    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    return torchvision.models.get_model(name, **options)


def family(name, from_timm):
    """The module in which a network is defined."""
    try:
        return type(build(name, from_timm)).__module__.rpartition(".")[2]
    except Exception:  # it cannot be built at all
        return ""


@torch.no_grad()
def draw(network, images):
    """Batch statistics of `images`, then scales, shifts and statistics drawn at random."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                # A layer scale of 1e-6 would hide its branch; one number may scale all of it.
                parameter.uniform_(*((0.5, 1.5) if parameter.numel() > 1 else (0.1, 0.3)))
        elif not module.weight.any():
            module.weight.normal_(0.0, 0.05)  # a head that begins at zero
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm in norms:
        spread = norm.running_var.sqrt()
        norm.running_mean.add_(torch.randn(norm.num_features) * 0.2 * spread)
        norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.5, 1.5))
    if not torch.isfinite(network.eval()(images)).all():
        for norm in norms:  # deviations that grow from layer to layer
            norm.reset_running_stats()


def takes(network, size):
    """Whether a network takes images of this size."""
    try:
        network.eval()(torch.zeros(1, 3, size, size))
    except Exception:  # whatever its code raises
        return False
    return True


def share_whole(graph):
    """Share of the parameters in layers that nothing can be taken from."""
    frozen = graph.grouping.frozen
    total = sum(p.numel() for p in graph.module.parameters())
    cut = sum(
        graph.layer_module(layer.target).weight.numel()
        for layer in graph.layers
        if any(group not in frozen for group in (*layer.groups, *layer.reads))
    )
    return 1 - cut / total


def outcome(row):
    """Which of `OUTCOMES` a row is."""
    for kind in ("refused", "traceback"):
        if kind in row:
            return kind
    if max(float(row["vs masked"]), float(row["ONNX"])) > MOST_APART:
        return "wrong"
    return "works in part" if row["whole"] else "works"


def print_families(rows):
    """A table of outcomes by family."""
    print(f"\n| family | networks | {' | '.join(OUTCOMES)} |\n|{' --- |' * (len(OUTCOMES) + 2)}")
    families = sorted({row.get("family", "") for row in rows})
    for family in (*families, None):
        mine = [row for row in rows if family is None or row.get("family", "") == family]
        counts = [sum(outcome(row) == kind for row in mine) for kind in OUTCOMES]
        cells = ["all" if family is None else family, len(mine), *(c or "" for c in counts)]
        print(f"| {' | '.join(map(str, cells))} |")


def relative(found, expected):
    """Largest difference of logits, relative to an image's largest logit."""
    largest = expected.abs().amax(1).clamp_min(1e-9)  # a student may be without any branch
    return float(((found - expected).abs().amax(1) / largest).max())


@torch.no_grad()
def check(name, from_timm, size, measure):
    """The row of one network; `refused` names why there is none."""
    import onnxruntime

    network = build(name, from_timm)
    if from_timm and not takes(network, size):
        size = network.default_cfg["input_size"][1]
    data = NoiseData(size)
    row = {"network": name, "family": type(network).__module__.rpartition(".")[2]}
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
    row["whole"] = f"{100 * share_whole(graph):.0f}%" if graph.whole else ""
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
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    names = arguments.networks or (TIMM if arguments.timm else [])
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
        except Exception as error:  # whatever a network meets: the others are still checked
            kind = "refused" if isinstance(error, UserError) else "traceback"
            said = str(error).splitlines()[0] if str(error) else ""
            said = said if kind == "refused" else f"{type(error).__name__}: {said}"
            row = {"network": name, "family": family(name, arguments.timm), kind: said}
            print(f"| {name} | {kind}: {said} |", flush=True)
        gc.collect()
        rows.append(row)
        if arguments.json:
            write_json_atomic(arguments.json, rows)
    print_families(rows)
    for name, groups in left_whole.items():
        print(f"\n{name} leaves whole: {'; '.join(sorted(set(groups.values())))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
