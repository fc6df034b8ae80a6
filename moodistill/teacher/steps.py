"""One value of a traced network: what made it, how it lies in memory, whose channels it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import fx

from moodistill.teacher.rearrange import Form


@dataclass(frozen=True, eq=False)
class Step:
    """One live value of the traced teacher.

    Attributes:
        name: for a layer its module path, else the fx node's name.
        kind: input, layer, merge (an Add of equals), gate (another operation of two values),
            norm, channelwise (depthwise and grouped convolutions, scales), mixing (a norm over
            channels), activation, spatial, rearrange, opaque (left whole) or output.
        node: the fx node.
        inputs: names of the steps it reads.
        form: of its output.
        channels: numbers of its output's channels while the graph is read.
        groups: the channel groups in its output, in order of their first channel.
        owner: `(channels,)` index into `groups`.
        place: `(channels,)` index of the channel's class within its group.
        reads: for a layer, the groups of its input.
        origin: for a rearrangement, `(channels, 2)`: which input, and which of its channels.
        shared: for a layer, whether its module is called more than once.
        again: for a shared layer, whether this is not its first call.
    """

    name: str
    kind: str
    node: fx.Node
    inputs: tuple[str, ...]
    form: Form
    channels: np.ndarray
    groups: tuple[str, ...] = ()
    owner: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    place: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    reads: tuple[str, ...] = ()
    origin: np.ndarray | None = None
    shared: bool = False
    again: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its output, without the batch axis."""
        return self.form.shape

    @property
    def target(self) -> str:
        """Module path of a step that calls a module."""
        return str(self.node.target)
