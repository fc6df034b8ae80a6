"""What a layer reads at one place of its output: its patch, all taps of all input channels."""

from __future__ import annotations

import torch
from torch import nn

from moodistill.teacher.kernels import padding_of


def output_size(layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """`(H, W)` of the output of a convolution from that of its input."""
    if layer.padding == "same":
        return size
    sizes = [
        (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for length, pad, dilation, kernel, stride in zip(
            size, padding_of(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return sizes[0], sizes[1]


def sample_patches(source: torch.Tensor, layer: nn.Conv2d, positions: torch.Tensor) -> torch.Tensor:
    """Patches of a map at some places of a convolution's output.

    Args:
        source: `(N, C, H, W)`; fastest where its channels lie together.
        layer: the convolution that would read it (of any width: only its geometry counts).
        positions: `(n,)` flat indices into its output `(N, H', W')`.

    Returns:
        `(n, taps * C)`, tap by tap; zero where a tap lies in the padding.
    """
    _, channels, height, width = source.shape
    rows, columns = output_size(layer, (height, width))
    image, place = positions // (rows * columns), positions % (rows * columns)
    pad_y, pad_x = padding_of(layer)
    reach_y, reach_x = (
        torch.arange(kernel, device=positions.device) * dilation - pad
        for kernel, dilation, pad in zip(
            layer.kernel_size, layer.dilation, (pad_y, pad_x), strict=True
        )
    )
    y = (place // columns * layer.stride[0])[:, None, None] + reach_y[:, None]  # (n, h, 1)
    x = (place % columns * layer.stride[1])[:, None, None] + reach_x  # (n, 1, w)
    outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixel = ((image[:, None, None] * height + y) * width + x).flatten()
    # One gather of whole pixels: no copy first where the channels of a pixel lie together.
    taps = source.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, pixel)
    taps[outside.flatten()] = 0.0
    return taps.view(len(positions), -1)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A kernel `(O, C, h, w)` as a matrix `(O, taps * C)` for patches."""
    return weight.flatten(2).transpose(1, 2).flatten(1)


def as_kernel(matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `as_matrix`; `shape` is `(O, C, h, w)`."""
    outputs, channels, *size = shape
    return matrix.reshape(outputs, -1, channels).transpose(1, 2).reshape(outputs, channels, *size)
