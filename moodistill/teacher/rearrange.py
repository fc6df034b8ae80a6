"""What an operation that only moves data about (cat, chunk, view, permute ...) does to channels.

The operation is run on numbers that name every element, so that any chain of them is understood by
what it does: where the outcome has its channels on one axis again and every channel its pixels in
order, it is a selection of its sources' channels. A channel shuffle is such a chain.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

REARRANGING_CALLS = (
    torch.cat, torch.concat, torch.chunk, torch.split, torch.unbind, torch.stack, torch.narrow,
    torch.reshape, torch.flatten, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.unflatten, torch.movedim, operator.getitem, "chunk", "split", "split_with_sizes",
    "unbind", "narrow", "view", "reshape", "flatten", "permute", "transpose", "squeeze",
    "unsqueeze", "unflatten", "movedim", "expand", "contiguous", "clone", "detach",
)  # fmt: skip
REARRANGING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
PICTURES = 2  # in the batch that shapes are propagated with: an operation that mixes them shows
NEXT_PICTURE = 1 << 50  # added to the numbers of a second image


@dataclass(frozen=True)
class Form:
    """How a value lies in memory.

    `map` `(C, *size)`, `last` `(*size, C)`, `vector` `(C,)` or `flat` `(C * area,)`; `whole` is
    anything else, of any shape and as if of one channel: it is only handed on as it is.

    Attributes:
        kind: one of these five.
        channels: C.
        size: `(H, W)` of an image, `(L,)` of a signal or of tokens, `(D, H, W)` of a volume;
            `(1, 1)` for a vector.
    """

    kind: str
    channels: int
    size: tuple[int, ...]

    @property
    def area(self) -> int:
        """Pixels per channel."""
        return math.prod(self.size)

    @property
    def axis(self) -> int:
        """The channels' axis in a batch."""
        return -1 if self.kind == "last" else 1

    @property
    def repeat(self) -> int:
        """Features per channel along the channels' axis."""
        return self.area if self.kind == "flat" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        return {
            "map": (self.channels, *self.size),
            "last": (*self.size, self.channels),
            "vector": (self.channels,),
            "flat": (self.channels * self.area,),
            "whole": (),
        }[self.kind]


def map_form(shape: tuple[int, ...]) -> Form:
    """The form of a `(C, *size)` or `(C,)` value."""
    if len(shape) == 1:
        return Form("vector", shape[0], (1, 1))
    return Form("map", shape[0], tuple(shape[1:]))


class Elements:
    """Numbers for the elements of values, and what a tensor of such numbers says."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.starts: list[int] = []
        self.forms: list[Form] = []
        self.used = 0

    def number(self, name: str, form: Form) -> torch.Tensor:
        """`(2, *form.shape)` numbers, those of a value the same whenever it is asked for."""
        if name not in self.names:
            self.names.append(name)
            self.starts.append(self.used)
            self.forms.append(form)
            self.used += form.channels * form.area
        start = self.starts[self.names.index(name)]
        count = form.channels * form.area
        ids = torch.arange(start, start + count).reshape(form.channels, *form.size)
        ids = ids.movedim(0, -1) if form.kind == "last" else ids.reshape(form.shape)
        return torch.stack([ids, ids + NEXT_PICTURE])

    def read(self, ids: torch.Tensor) -> tuple[Form, tuple[str, ...], np.ndarray] | None:
        """Form, source values and `(channels, 2)` origin (source index, channel), if it has one.

        `ids` is `(*shape)`, of the first image.
        """
        if ids.numel() == 0:
            return None
        flat = ids.reshape(-1).numpy()
        starts = np.array(self.starts)
        source = np.searchsorted(starts, flat, side="right") - 1
        sources, index = np.unique(source, return_inverse=True)
        forms = [self.forms[s] for s in sources]
        if len({form.area for form in forms}) != 1:
            return None
        area = forms[0].area
        local = flat - starts[source]
        channel, pixel = local // area, local % area
        origin = np.stack([index.reshape(-1), channel], axis=1)
        for form in self._candidates(tuple(ids.shape), forms):
            lead = (form.area, form.channels)
            if form.kind == "last":
                pixels, origins = pixel.reshape(lead), origin.reshape(*lead, 2).swapaxes(0, 1)
                pixels = pixels.T
            else:
                pixels, origins = pixel.reshape(lead[::-1]), origin.reshape(*lead[::-1], 2)
            whole = (pixels == np.arange(area)).all() and (origins == origins[:, :1]).all()
            if whole:
                names = tuple(self.names[s] for s in sources)
                return form, names, origins[:, 0]
        return None

    @staticmethod
    def _candidates(shape: tuple[int, ...], forms: list[Form]) -> list[Form]:
        """Forms of this shape with as many pixels a channel as the sources have."""
        area = forms[0].area
        if len(shape) > 1:
            found = []
            if math.prod(shape[1:]) == area:
                found.append(Form("map", shape[0], shape[1:]))
            if math.prod(shape[:-1]) == area:
                found.append(Form("last", shape[-1], shape[:-1]))
            return found
        if shape[0] % area:
            return []
        if area == 1:
            return [Form("vector", shape[0], (1, 1))]
        sizes = {form.size for form in forms}
        return [Form("flat", shape[0] // area, sizes.pop())] if len(sizes) == 1 else []
