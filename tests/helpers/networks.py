"""Networks made ready for a comparison of students with their masked teachers."""

import numpy as np
import torch
from torch import nn

from helpers import random_genome
from moodistill.genome.canonical import canonical
from moodistill.student.builder import build_student
from moodistill.teacher.blocks import build_layout
from moodistill.teacher.graph import trace
from moodistill.teacher.operations import NORMS
from moodistill.teacher.samples import CalibrationConfig, collect_samples
from moodistill.testing.masked import masked_logits

SIZE = 16


def conv(inputs, outputs, kernel=3, groups=1, stride=1):
    """A convolution with its norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Prepared:
    """A drawn network with its graph, samples and layout."""

    def __init__(self, network, size=SIZE, shape=None):
        self.network = network
        shape = shape or (3, size, size)
        self.images = torch.randn(6, *shape)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, NORMS):
                    module.momentum = 1.0  # one pass sets the statistics
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
            network.train()(self.images)
            for module in network.eval().modules():
                if isinstance(module, NORMS):
                    module.running_mean.add_(torch.randn(module.num_features) * 0.2)
                    module.running_var.mul_(torch.empty(module.num_features).uniform_(0.5, 1.5))
        self.graph = trace(network, shape)
        config = CalibrationConfig(images=6, pixels=600)
        self.digest, self.calibration = "", lambda count: self.images
        self.samples = collect_samples(self.graph, self, config, None, "")
        self.layout = build_layout(self.graph, self.samples)

    def genome(self, seed, step=1):
        """A canonical random genome without bypasses (they have no masked twin)."""
        genome = random_genome(self.layout, np.random.default_rng(seed))
        return canonical(self.layout, genome, step)


def worst(found, expected):
    """Largest difference of logits, relative to an image's largest."""
    found, expected = found.detach(), expected.detach()
    scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1e-3)
    return float(((found - expected).abs() / scale).max())


@torch.no_grad()
def check(prepared, seeds):
    widths = set()
    for seed in seeds:
        step = (1, 4, 8)[seed % 3]
        genome = prepared.genome(seed, step)
        assert (canonical(prepared.layout, genome, step) == genome).all()
        student = build_student(prepared.graph, prepared.layout, genome)
        expected = masked_logits(prepared.graph, prepared.layout, genome, prepared.images)
        assert worst(student.module(prepared.images), expected) < 1e-4, seed
        widths.add(student.parameters)
    return widths
