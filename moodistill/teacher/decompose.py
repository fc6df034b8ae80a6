"""Operations that are traced as the simpler ones that they are made of.

Each gives None where it is to be recorded as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def _glu(x: Any, dim: int = -1) -> Any:
    one, other = x.chunk(2, dim)
    return one * torch.sigmoid(other)


def _padded_conv(conv: Any, x: Any) -> Any:
    """A convolution whose padding is not of zeros: the padding first."""
    if conv.padding_mode == "zeros":
        return None
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    call = _CONVS[type(conv)]
    return call(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


_INSTANCE_NORMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def _instance_norm(norm: Any, x: Any) -> Any:
    """Every channel by its own statistics, then a scale and a shift a channel."""
    axes = len(x.shape) - 2
    if norm.running_mean is not None or axes != _INSTANCE_NORMS[type(norm)]:
        return None
    x = F.instance_norm(x, eps=norm.eps)
    shape = (-1, *[1] * axes)
    if norm.weight is not None:
        x = x * norm.weight.reshape(shape)
    return x if norm.bias is None else x + norm.bias.reshape(shape)


REPLACED_CALLS: dict[Any, Callable[..., Any]] = {F.glu: _glu}
REPLACED_MODULES: dict[type, Callable[..., Any]] = {
    nn.GLU: lambda glu, x: _glu(x, glu.dim),
    **dict.fromkeys(_CONVS, _padded_conv),
    **dict.fromkeys(_INSTANCE_NORMS, _instance_norm),
}
