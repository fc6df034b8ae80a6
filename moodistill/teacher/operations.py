"""Which operations of a network are understood, by what they do to channels."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CONVS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # and the axes of their size
# Their weights have inputs first, outputs second.
TRANSPOSED: dict[type, int] = {
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
# Exactly these: what is derived from them may do more.
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Norms over the channels of one image: they read all of a value's channels at once.
MIXING = (nn.LayerNorm, nn.GroupNorm)
SHUFFLES = (nn.PixelShuffle, nn.PixelUnshuffle)
SOFTMAX = (nn.Softmax, nn.LogSoftmax)  # as they are: what is derived from them may do more
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.GELU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh,
    nn.LogSigmoid, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.RReLU,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.Identity,
)  # fmt: skip
ACTIVATION_CALLS = (
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh,
    F.gelu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.hardtanh, F.logsigmoid,
    F.threshold, F.hardshrink, F.softshrink, F.tanhshrink,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.clip, torch.exp, torch.abs, torch.neg,
    torch.pow, torch.square, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.clamp_min,
    torch.clamp_max, torch.log, torch.log1p, torch.expm1, torch.erf, torch.sin, torch.cos,
    torch.sign, torch.floor, torch.ceil, torch.round,
    operator.neg, operator.pos, operator.abs, operator.pow,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", "clip", "clip_",
    "exp", "abs", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "clamp_min", "clamp_min_",
    "clamp_max", "clamp_max_", "log", "log1p", "expm1", "erf", "sin", "cos", "sign", "floor",
    "ceil", "round", "float",
)  # fmt: skip
SPATIAL = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
SPATIAL_CALLS = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d,
    F.adaptive_max_pool2d, F.adaptive_max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.adaptive_avg_pool1d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool1d, F.lp_pool2d, F.lp_pool3d,
    F.pad, F.interpolate, F.instance_norm,
)  # fmt: skip
# Along the axes of the size only.
MOVING_CALLS = (torch.flip, "flip", torch.roll, "roll")
REDUCING_CALLS = (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.amin, "amin")
# Operations of two values, by the function that the student calls.
JOINS: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), torch.add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), torch.mul),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), torch.sub),
    **dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, "div", "div_"), torch.div
    ),
    **dict.fromkeys((torch.maximum, "maximum"), torch.maximum),
    **dict.fromkeys((torch.minimum, "minimum"), torch.minimum),
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
