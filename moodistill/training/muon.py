"""Muon (Jordan et al. 2024): orthogonalised momentum for the convolutions of a teacher."""

from __future__ import annotations

import torch
from torch import nn

from moodistill.teacher.task import TrainConfig

SGD_LR = 0.03  # peak rate of what Muon does not train: biases, norms, first and linear layers


def orthogonalise(matrix: torch.Tensor, steps: int = 5, mixed: bool = False) -> torch.Tensor:
    """Nearest semi-orthogonal matrix to `(rows, columns)`, roughly, by Newton-Schulz steps.

    Coefficients from Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
    (2024). With `mixed` the products are in bfloat16, as there: singular values end between 0.7
    and 1.2 either way.
    """
    transpose = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if transpose else matrix
    x = x / (x.norm() + 1e-7)
    if mixed:
        x = x.bfloat16()
    # Every step multiplies by a polynomial of the Gram matrix: the wide matrix is needed only at
    # both ends.
    gram = x @ x.T
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if transpose else x


class Optimizer:
    """Muon for convolutions behind the first, SGD with Nesterov momentum for all other tensors.

    A convolution in front of a BN layer is free in its scale: it is kept at the norm
    `sqrt(out_channels)`, so `lr` is the relative size of one step (as in Jordan's airbench).
    """

    def __init__(self, model: nn.Module, config: TrainConfig, mixed: bool = False) -> None:
        self.config, self.mixed = config, mixed
        self.parameters = dict(model.named_parameters())
        self.momentum = {k: torch.zeros_like(v) for k, v in self.parameters.items()}
        convs = [k for k, v in self.parameters.items() if v.ndim == 4]
        self.muon = set(convs[1:])

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """One update; `fraction` in [0, 1] scales every learning rate."""
        config = self.config
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            buffer = self.momentum[name].mul_(config.momentum).add_(parameter.grad)
            update = parameter.grad.add(buffer, alpha=config.momentum)
            if name in self.muon:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                direction = orthogonalise(update.flatten(1), mixed=self.mixed).view_as(parameter)
                parameter.add_(direction, alpha=-config.lr * fraction)
            else:
                rate = SGD_LR * fraction
                if parameter.ndim > 1:
                    parameter.mul_(1 - rate * config.weight_decay)
                parameter.add_(update, alpha=-rate)
            parameter.grad = None
