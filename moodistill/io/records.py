"""Values that come from files: strict JSON, and dataclasses whose fields have their types."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def parse_json(data: bytes | str) -> Any:
    """Strict JSON.

    Raises:
        ValueError: whatever is wrong with it; NaN, infinity and very deep nesting are.
    """
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def typed(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls(**values)`, where every value must have its field's type.

    Raises:
        TypeError: if one has not, or if keys are missing or unknown.
    """
    hints: dict[str, Any] = _hints(cls)  # type: ignore[arg-type]
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name} is {str(value)[:40]!r}, expected {hints[name]}")
    return cls(**values)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        return type(value) is int or (hint is float and type(value) is float)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if inner[0] is float:  # raw timings: many, so without a call for each
            return isinstance(value, tuple | list) and {type(v) for v in value} <= {int, float}
        return isinstance(value, tuple | list) and all(_fits(v, inner[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    return hint is Any or isinstance(value, hint)
