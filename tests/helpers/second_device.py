"""A second device without an accelerator: tensors with real numbers that claim to be elsewhere.

torch's backend for Python is registered under the name `npy`. Its tensors wrap ones on the CPU, on
which every operation is computed; but an operation that is given tensors of both devices fails, as
it would with an accelerator. What passes has left nothing on the CPU, and its numbers are real.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "npy"
_BETWEEN = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class There(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
        return computed(operation, arguments, keywords or {})


def computed(operation, arguments, keywords):
    """The operation on the CPU; its results are where its tensors are."""
    given = [t for t in pytree.tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
    there = [t for t in given if isinstance(t, There)]
    here = [t for t in given if not isinstance(t, There) and t.ndim > 0]
    if there and here and operation not in _BETWEEN:
        shapes = [tuple(t.shape) for t in here]
        raise RuntimeError(f"{operation}: tensors of two devices meet; on the CPU are {shapes}")
    target = keywords.get("device")
    moves = target is not None
    if moves:
        keywords = {**keywords, "device": torch.device("cpu")}
    by_raw = {id(t.raw): t for t in there}
    raw = pytree.tree_map(lambda t: t.raw if isinstance(t, There) else t, (arguments, keywords))
    found = operation(*raw[0], **raw[1])
    stays = torch.device(target).type == NAME if moves else bool(there)
    if operation is torch.ops.aten.copy_.default:  # into its first argument, in place
        return arguments[0]
    if operation is torch.ops.aten._to_copy.default and moves and not stays:
        # What is brought back to the CPU is no view of what is there.
        return found.clone() if any(found is t.raw for t in there) else found

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or not stays:
            return value
        return by_raw.get(id(value)) if id(value) in by_raw else There(value)

    return pytree.tree_map(wrapped, found)


class _Mode(TorchDispatchMode):
    """Sees what makes tensors, which no tensor that is given tells."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        return computed(operation, arguments, keywords or {})


class _Module:
    """What torch asks of a backend."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        return None

    @staticmethod
    def current_device():
        return 0


_registered = False


@contextmanager
def second_device():
    """The device, within a `with` block."""
    global _registered
    if not _registered:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME, _Module())
        _registered = True
    with _Mode():
        yield torch.device(NAME)
