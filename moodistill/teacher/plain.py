"""A network made plain before it is traced: float32, weights stored as they are used, one output.

What cannot be made plain is refused here, all of it in one line.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from moodistill.errors import UserError


def plain_network(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, float32, its parametrised weights folded.

    The network itself where nothing is to be done, else a copy: the given one is not changed.

    Raises:
        UserError: if it is no module of Python, or has layers that are not ready for use.
    """
    refuse_unready(network)
    folded = [name for name, module in network.named_modules() if _hooked(module) or (
        parametrize.is_parametrized(module))]  # fmt: skip
    wide = {t.dtype for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()}
    if not folded and wide <= {torch.float32}:
        return network.eval()
    made = copied(network)
    for name in folded:
        module = made.get_submodule(name)
        for kind in _hooked(module):
            remove = remove_weight_norm if kind == "WeightNorm" else remove_spectral_norm
            remove(module)
        if parametrize.is_parametrized(module):
            _fold(module)
    return made.float().eval()


def _fold(module: nn.Module) -> None:
    """Store parametrised tensors as they are used.

    Not by `remove_parametrizations`: it changes the class, which the module shares with the one
    that it is a copy of.
    """
    tensors = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))


def copied(network: nn.Module) -> nn.Module:
    """A deep copy, of networks with computed weights (the older `weight_norm`), too.

    Raises:
        UserError: if Python cannot copy it.
    """
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())  # a hook computes it anew at every call
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever the modules' own code raises
        raise UserError(
            f"{type(network).__name__} cannot be copied ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); expected a network that "
            "copy.deepcopy takes: keep no open files, locks or computed tensors in it"
        ) from error


def refuse_unready(network: nn.Module) -> None:
    """Refuse what has no weights yet, or is no plain module.

    Raises:
        UserError: names all such layers.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the teacher is a {type(network).__name__}; expected a torch.nn.Module")
    if isinstance(network, torch.jit.ScriptModule):
        raise UserError(
            f"the teacher is compiled ({type(network).__name__}), its code cannot be followed; "
            "give the Python network that it was made from"
        )
    names = [
        name
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if nn.parameter.is_lazy(tensor)
    ]
    if names:
        raise UserError(
            f"{type(network).__name__} has lazy layers that were never called (their sizes are "
            f"not known): {', '.join(names)}; call the network on one image first"
        )
    aware = [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if type(module).__module__.startswith("torch.ao.")
    ]
    if aware:
        raise UserError(
            f"{type(network).__name__} is prepared for quantisation: {', '.join(aware[:4])}"
            f"{f' and {len(aware) - 4} more' if len(aware) > 4 else ''}; give the float network "
            "(INT8 twins of the finalists are made here)"
        )


def _hooked(module: nn.Module) -> list[str]:
    """The older reparametrisations of a module, which work by hooks."""
    kinds = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    return [kind for kind in kinds if kind in ("WeightNorm", "SpectralNorm")]
