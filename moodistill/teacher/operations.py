"""Which operations of a network are understood, by what they do to channels."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Norms over the channels of one picture: they read all of a value's channels at once.
MIXING = (nn.LayerNorm, nn.GroupNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.GELU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh,
    nn.LogSigmoid, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Identity,
)  # fmt: skip
ACTIVATION_CALLS = (
    F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.gelu,
    F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.hardtanh, F.logsigmoid,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.exp, torch.abs,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_",
)  # fmt: skip
SPATIAL = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
    nn.ConstantPad2d, nn.Upsample,
)  # fmt: skip
SPATIAL_CALLS = (
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d,
    F.pad, F.interpolate,
)  # fmt: skip
REDUCING_CALLS = (torch.mean, "mean", torch.amax, "amax")
# Operations of two values, by the function that the student calls.
JOINS: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), torch.add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), torch.mul),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), torch.sub),
    **dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, "div", "div_"), torch.div
    ),
}  # fmt: skip
SUPPORTED = (
    "convolutions, Linear, norms, element-wise activations, pooling, Add, Mul and whatever moves "
    "channels about (cat, chunk, view, permute)"
)


def called(module: nn.Module, target: Any, is_module: bool) -> str:
    """The name of what a node calls, for messages."""
    if is_module:
        return type(module.get_submodule(str(target))).__name__
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
