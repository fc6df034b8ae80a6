"""Students against an independently masked teacher: same genome, same logits."""

import operator
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import random_genome
from torch import fx, nn
from torch.nn.utils import parametrize

from moodistill.genome import GenomeLayout, Group, canonical, resolve
from moodistill.graph import trace
from moodistill.inherit import inherit
from moodistill.layout import build_layout, skeleton
from moodistill.recipe import count_macs
from moodistill.statistics import CalibrationConfig, TeacherSamples
from moodistill.student import build_student

MAKERS = {"vgg16": (14_991_946, 1e5), "resnet18": (11_173_962, None)}


class _Masked(fx.Interpreter):
    """Runs the teacher with masked weights and without the dropped inputs of each Add.

    Nothing works in place here, so no masked value can leak into another one.
    """

    def __init__(self, prepared, structure):
        super().__init__(prepared.graph.module)
        self.structure = structure
        self.merges = {s.node: s.name for s in prepared.graph.steps if s.kind == "merge"}
        self.weights = {}
        for step in prepared.graph.layers:
            if step.name not in structure.live:
                continue
            module = prepared.graph.layer_module(step.name)
            out_block = prepared.layout.groups[step.group].block
            in_block = prepared.layout.groups[step.reads].block
            mask = structure.kept[step.reads][None, :].astype(np.float32)
            mask = mask * structure.connected[step.name][out_block][:, in_block]
            if isinstance(module, nn.Conv2d):
                mask = mask[:, :, None, None]
            else:
                mask = np.repeat(mask, module.in_features // len(in_block), axis=1)
            self.weights[step.name] = module.weight * torch.from_numpy(mask)

    def run_node(self, node):
        if node in self.merges and self.merges[node] not in self.structure.live:
            return None
        return super().run_node(node)

    def call_module(self, target, args, kwargs):
        (value,) = args
        module = self.module.get_submodule(target)
        if value is None or (isinstance(module, nn.Conv2d | nn.Linear) and target not in self.weights):
            return None  # not live
        if isinstance(module, nn.Conv2d):
            return nn.functional.conv2d(
                value, self.weights[target], module.bias, module.stride, module.padding
            )
        if isinstance(module, nn.Linear):
            return nn.functional.linear(value, self.weights[target], module.bias)
        if isinstance(module, nn.ReLU):
            return torch.relu(value)
        return module(value)

    def call_function(self, target, args, kwargs):
        if target in (operator.add, operator.iadd, torch.add):
            node = next(n for n in self.merges if n.name == self.current)
            kept = self.structure.merges[self.merges[node]]
            chosen = [value for value, on in zip(args, kept, strict=True) if on]
            return chosen[0] if len(chosen) == 1 else chosen[0] + chosen[1]
        if args[0] is None:
            return None
        return super().call_function(target, args, kwargs)
