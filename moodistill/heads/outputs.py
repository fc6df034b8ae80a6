"""The outputs of a network by name, whatever containers it gives them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

OUTPUT = "logits"  # the name of a network's only output


def outputs_of(given: Any) -> dict[str, Any]:
    """What a network gives, by name and in order.

    An only tensor is called `OUTPUT`. Entries of a dict have their keys, those of a tuple or list
    are `output_0`, `output_1`, ...; nested names are joined by dots. Of an output object with
    `logits` (as Hugging Face's) these alone are taken. What is no tensor (None, a number) is left
    out.

    Args:
        given: a network's output; tensors, proxies and nodes of a trace pass through.
    """
    logits = None if type(given) is dict else _logits(given)
    if logits is not None:
        return {OUTPUT: logits}
    found: dict[str, Any] = {}
    _collect(given, "", found)
    return {OUTPUT: next(iter(found.values()))} if len(found) == 1 else found


def _logits(given: Any) -> Any:
    if isinstance(given, Mapping):
        return given.get("logits")
    return getattr(given, "logits", None) if _is_container(given) else None


def _is_container(given: Any) -> bool:
    return (
        isinstance(given, tuple | list | Mapping)
        or (dataclasses.is_dataclass(given) and not isinstance(given, type))
        or hasattr(given, "logits")
    )


def _collect(given: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(given, Mapping):
        parts = {str(key): value for key, value in given.items()}
    elif isinstance(given, tuple) and hasattr(given, "_fields"):
        parts = dict(zip(given._fields, given, strict=True))
    elif isinstance(given, tuple | list):
        parts = {f"output_{place}": value for place, value in enumerate(given)}
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        parts = {one.name: getattr(given, one.name) for one in dataclasses.fields(given)}
    else:
        if given is not None and not isinstance(given, int | float | str):
            found[name] = given
        return
    for key, value in parts.items():
        _collect(value, f"{name}.{key}" if name else key, found)


def given_as(found: Mapping[str, Any]) -> Any:
    """Named outputs as a traced network gives them: one alone as it is, several in a dict."""
    return found[OUTPUT] if list(found) == [OUTPUT] else dict(found)
