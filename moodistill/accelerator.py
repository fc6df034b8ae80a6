"""What inheritance, scoring and training compute on: found, checked, and what suits it.

Latency is not measured here: that is ONNX Runtime's, whatever device computes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import nn

from moodistill.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")
AUTO = "auto"
EXPECTED = "expected auto, cpu, cuda, cuda:N, mps or xpu"
_PREFERRED = ("cuda", "xpu", "mps")  # where one of them is there


def find_device(name: str = AUTO) -> torch.device:
    """The device of a name, once a tensor has been made on it; `auto` takes what is there.

    Raises:
        UserError: if there is no such device, or this torch cannot use it.
    """
    if name == AUTO:
        return next((torch.device(kind) for kind in _PREFERRED if device_count(kind)), CPU)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` is {name!r}; {EXPECTED}") from error
    if device.type == "cpu":
        return CPU
    if device.type == "meta":
        raise UserError(f"`device` is {name!r}, which holds no numbers; {EXPECTED}")
    count = device_count(device.type)
    if device.index is not None and 0 < count <= device.index:
        raise UserError(
            f"`device` is {name}, there are {count}: expected {device.type}:0"
            + (f" to {device.type}:{count - 1}" if count > 1 else "")
        )
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by the kind of device
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"`device` is {name}, which cannot be used here ({reason}); expected cpu, or a torch "
            "and a driver that can"
        ) from error
    return device


def device_count(kind: str) -> int:
    """How many devices of a kind this torch can use."""
    module = getattr(torch, kind, None)
    try:
        if module is None or not module.is_available():
            return 0
        return int(module.device_count())
    except (AttributeError, RuntimeError, AssertionError):
        return 0


def described(device: torch.device) -> str:
    """A device with the name of its hardware, for people."""
    if device.type not in ("cuda", "xpu"):
        return str(device)
    return f"{device} ({getattr(torch, device.type).get_device_name(device)})"


def device_of(module: nn.Module) -> torch.device:
    """Where a network's weights are; the CPU if it has none."""
    return next((tensor.device for tensor in module.parameters()), CPU)


def mixed_precision(device: torch.device = CPU) -> bool:
    """Whether bfloat16 is faster: on accelerators, and on processors with instructions for it.

    With AMX it is 2 to 2.5 times as fast, with AVX-512 BF16 1.7 times; where a processor has
    neither it is slower. Not on devices that torch has no autocast for.
    """
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return device.type in ("xpu", "mps")
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in older versions of torch
    found = capabilities() if capabilities is not None else {}
    return bool(found.get("amx_bf16", False) or found.get("avx512_bf16", False))


def in_bfloat16(device: torch.device) -> AbstractContextManager[object]:
    """A block whose passes run in bfloat16 where that is faster."""
    mixed = mixed_precision(device)
    return torch.autocast(device.type if mixed else "cpu", torch.bfloat16, enabled=mixed)


def exact_convolutions() -> AbstractContextManager[object]:
    """A block whose convolutions on a GPU are in whole float32, as ONNX Runtime's are."""
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, allow_tf32=False, benchmark=False
    )


def in_double(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in float64, on its device if that can (Apple's cannot), else on the CPU."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """A block whose random draws leave those of the caller as they were."""
    if device.type not in ("cuda", "xpu"):
        with torch.random.fork_rng(devices=[]):
            yield
        return
    index = getattr(torch, device.type).current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        yield


@contextmanager
def needs_memory(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """A block that a device's memory must be enough for.

    Raises:
        UserError: if it is not; says `what` did not fit, and what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory for {what}; {advice}, or compute on the CPU (`device`)"
        ) from error


def in_batches(run: Callable[[int, int], T], count: int, size: int) -> list[T]:
    """`run(start, end)` over `count` things, at most `size` at once, fewer where memory is short.

    Raises:
        torch.OutOfMemoryError: if one alone does not fit.
    """
    found, start = [], 0
    while start < count:
        try:
            found.append(run(start, min(start + size, count)))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = math.ceil(size / 2)
            continue
        start += size
    return found
