"""What the kernel and rank genes of a convolution or linear layer may do to it."""

from __future__ import annotations

import torch
from torch import nn

from moodistill.genome.ranks import rank_levels

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Conv | Transposed | nn.Linear


def weight_of(layer: Layer) -> torch.Tensor:
    """A layer's weight as `(outputs, inputs, *kernel)`, whatever order it is stored in."""
    return layer.weight.transpose(0, 1) if isinstance(layer, Transposed) else layer.weight


def padding_of(conv: Conv) -> tuple[int, ...]:
    """Padding before the first pixel of each axis, of a padding in words too."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    assert not isinstance(conv.padding, str)
    return tuple(conv.padding)


def rings_of(conv: Conv) -> tuple[int, ...]:
    """Rings of taps by axis that may go: the padding, lowered by one tap for each, stays >= 0.

    None of an even kernel, which has no centre.
    """
    spans = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding == "same" and any(span % 2 for span in spans):
        return (0,) * len(spans)  # padded more behind than before, which numbers cannot say
    return tuple(
        min((k - 1) // 2, p // d) if k % 2 else 0
        for k, p, d in zip(conv.kernel_size, padding_of(conv), conv.dilation, strict=True)
    )


def ranks_of(layer: Layer) -> tuple[int, ...]:
    """The ranks below the full one that a layer may have; none of a grouped convolution."""
    if isinstance(layer, Conv) and layer.groups > 1:
        return ()
    outputs = len(layer.weight)
    return rank_levels(layer.weight.numel() // outputs, outputs)
