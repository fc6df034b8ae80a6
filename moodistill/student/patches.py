"""What a layer reads at one place of its output: its patch, all taps of all input channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moodistill.teacher.kernels import Conv, padding_of


def output_size(layer: Conv, size: Sequence[int]) -> tuple[int, ...]:
    """The size of a convolution's output from that of its input, such as `(H, W)`."""
    if layer.padding == "same":
        return tuple(size)
    return tuple(
        (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for length, pad, dilation, kernel, stride in zip(
            size, padding_of(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )


def sample_patches(source: torch.Tensor, layer: Conv, positions: torch.Tensor) -> torch.Tensor:
    """Patches of a map at some places of a convolution's output.

    Args:
        source: `(N, C, *size)`; fastest where its channels lie together.
        layer: the convolution that would read it (of any width: only its geometry counts).
        positions: `(n,)` flat indices into its output `(N, *size)`.

    Returns:
        `(n, taps * C)`, tap by tap; zero where a tap lies in the padding.
    """
    _, channels, *size = source.shape
    given, device = output_size(layer, size), positions.device
    axes = len(size)
    pixel = (positions // math.prod(given)).view(-1, *[1] * axes)  # (n, 1, ...), one axis a tap's
    outside = torch.zeros(1, dtype=torch.bool, device=device)
    for axis, length in enumerate(size):
        place = positions // math.prod(given[axis + 1 :]) % given[axis]
        reach = torch.arange(layer.kernel_size[axis], device=device) * layer.dilation[axis]
        at = place[:, None] * layer.stride[axis] + reach - padding_of(layer)[axis]
        at = at.view(len(positions), *[1] * axis, -1, *[1] * (axes - axis - 1))
        outside = outside | (at < 0) | (at >= length)
        pixel = pixel * length + at.clamp(0, length - 1)
    # One gather of whole pixels: no copy first where the channels of a pixel lie together.
    taps = source.movedim(1, -1).reshape(-1, channels).index_select(0, pixel.flatten())
    taps[outside.flatten()] = 0.0
    return taps.view(len(positions), -1)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A kernel `(O, C, *taps)` as a matrix `(O, taps * C)` for patches."""
    return weight.flatten(2).transpose(1, 2).flatten(1)


def as_kernel(matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `as_matrix`; `shape` is `(O, C, *taps)`."""
    outputs, channels, *size = shape
    return matrix.reshape(outputs, -1, channels).transpose(1, 2).reshape(outputs, channels, *size)
