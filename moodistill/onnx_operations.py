"""How torch's operations are said in ONNX: tables that `onnx_graph` reads."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NO_OPS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Identity)
JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "Add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "Mul"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "Sub"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "Div"),
}
MUTATING = (
    operator.iadd, operator.imul, operator.isub, operator.itruediv, "add_", "mul_", "sub_", "div_",
)  # fmt: skip
REDUCING = {
    torch.mean: "GlobalAveragePool", "mean": "GlobalAveragePool",
    torch.amax: "GlobalMaxPool", "amax": "GlobalMaxPool",
}  # fmt: skip
MOVES = (torch.permute, "permute", torch.narrow, torch.unflatten, *REDUCING)

# A step of a program: kind, operands (0 is the input, n the n-th step), tensors, attributes.
Step = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, float]]
Program = Callable[[Any, int], list[Step] | None]


def _one(kind: str, **attributes: str | float) -> Program:
    """A single operation; attributes are numbers, or names of the module's own."""

    def program(module: Any, rank: int) -> list[Step]:
        values = {
            name: float(getattr(module, value) if isinstance(value, str) else value)
            for name, value in attributes.items()
        }
        return [(kind, (0,), (), values)]

    return program


def _gelu(module: Any, rank: int) -> list[Step]:
    if module.approximate == "none":  # the form that ONNX Runtime fuses
        return [
            ("Div", (0,), (math.sqrt(2),), {}), ("Erf", (1,), (), {}), ("Add", (2,), (1.0,), {}),
            ("Mul", (0, 3), (), {}), ("Mul", (4,), (0.5,), {}),
        ]  # fmt: skip
    return [
        ("Mul", (0, 0), (), {}), ("Mul", (1, 0), (), {}), ("Mul", (2,), (0.044715,), {}),
        ("Add", (0, 3), (), {}), ("Mul", (4,), (math.sqrt(2 / math.pi),), {}),
        ("Tanh", (5,), (), {}), ("Add", (6,), (1.0,), {}), ("Mul", (0, 7), (), {}),
        ("Mul", (8,), (0.5,), {}),
    ]  # fmt: skip


def _softplus(module: Any, rank: int) -> list[Step] | None:
    return [("Softplus", (0,), (), {})] if module.beta == 1 else None


def _prelu(module: Any, rank: int) -> list[Step]:
    slope = module.weight
    if len(slope) > 1:
        slope = slope.reshape(-1, *(1,) * (rank - 1))
    return [("PRelu", (0,), (slope,), {})]


ACTIVATIONS: dict[type[nn.Module], Program] = {
    nn.ReLU: _one("Relu"),
    nn.LeakyReLU: _one("LeakyRelu", alpha="negative_slope"),
    nn.Hardswish: _one("HardSwish"),
    nn.Hardsigmoid: _one("HardSigmoid", alpha=1 / 6, beta=0.5),
    nn.Sigmoid: _one("Sigmoid"),
    nn.Tanh: _one("Tanh"),
    nn.ELU: _one("Elu", alpha="alpha"),
    nn.CELU: _one("Celu", alpha="alpha"),
    nn.SELU: _one("Selu"),
    nn.Softsign: _one("Softsign"),
    nn.ReLU6: lambda m, rank: [("Clip", (0,), (0.0, 6.0), {})],
    nn.Hardtanh: lambda m, rank: [("Clip", (0,), (m.min_val, m.max_val), {})],
    nn.SiLU: lambda m, rank: [("Sigmoid", (0,), (), {}), ("Mul", (0, 1), (), {})],
    nn.Mish: lambda m, rank: [
        ("Softplus", (0,), (), {}), ("Tanh", (1,), (), {}), ("Mul", (0, 2), (), {}),
    ],
    nn.LogSigmoid: lambda m, rank: [
        ("Neg", (0,), (), {}), ("Softplus", (1,), (), {}), ("Neg", (2,), (), {}),
    ],
    nn.GELU: _gelu,
    nn.Softplus: _softplus,
    nn.PReLU: _prelu,
}  # fmt: skip


def _pad(pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module:
    """`F.pad` over height and width; what has no form here comes back as it cannot be written."""
    if mode != "constant" or len(pad) not in (2, 4):
        return nn.ReflectionPad2d(0)
    return nn.ConstantPad2d(tuple(pad) + (0,) * (4 - len(pad)), value or 0.0)


_POOL = ("kernel_size", "stride", "padding")
# Functions and methods as the module they stand for, with the order of their arguments.
AS_MODULE: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), (nn.ReLU, ("inplace",))),
    F.relu6: (nn.ReLU6, ("inplace",)),
    F.silu: (nn.SiLU, ("inplace",)),
    F.mish: (nn.Mish, ("inplace",)),
    F.hardswish: (nn.Hardswish, ("inplace",)),
    F.hardsigmoid: (nn.Hardsigmoid, ("inplace",)),
    F.hardtanh: (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.celu: (nn.CELU, ("alpha", "inplace")),
    F.selu: (nn.SELU, ("inplace",)),
    F.gelu: (nn.GELU, ("approximate",)),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.softsign: (nn.Softsign, ()),
    F.logsigmoid: (nn.LogSigmoid, ()),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), (nn.Sigmoid, ())),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), (nn.Tanh, ())),
    F.dropout: (nn.Identity, ("p", "training", "inplace")),
    F.dropout2d: (nn.Identity, ("p", "training", "inplace")),
    F.pad: (_pad, ("pad", "mode", "value")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    F.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode")),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    **dict.fromkeys((torch.flatten, "flatten"), (nn.Flatten, ("start_dim", "end_dim"))),
}  # fmt: skip
