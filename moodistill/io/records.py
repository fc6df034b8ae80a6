"""Records in JSON files: strict JSON, and dataclasses whose fields have their types (msgspec).

Unknown keys are passed over, so that files of a newer version stay readable; who must not misread
one refuses it by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from moodistill.errors import UserError

T = TypeVar("T")

_MISMATCH = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<found>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_NAMES = {"array": "list", "null": "None"}  # of JSON, in Python's words


def read_record(path: Path, cls: type[T], advice: str) -> T:
    """What a JSON file holds.

    Args:
        path: the file.
        cls: a dataclass, or any type that JSON can be.
        advice: what to do about a damaged file, the end of the message.

    Raises:
        UserError: if the file cannot be read or is damaged; names the file, the field and what was
            expected of it.
    """
    try:
        return parse_json(path.read_bytes(), cls)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from error


@overload
def parse_json(data: bytes | str) -> Any: ...
@overload
def parse_json(data: bytes | str, cls: type[T]) -> T: ...
def parse_json(data: bytes | str, cls: Any = Any) -> Any:
    """Strict JSON as a value of `cls`.

    Raises:
        ValueError: says in one line what is wrong, and in which field; NaN, infinity and very deep
            nesting are wrong.
    """
    try:
        # Not msgspec's own parser, which refuses names of files that are no UTF-8.
        value = json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is no readable JSON ({error})") from error
    return value if cls is Any else convert(value, cls)


def convert(value: Any, cls: type[T]) -> T:
    """A value of `cls` from plain values: dicts become dataclasses, lists tuples, ints floats.

    Raises:
        ValueError: names the field that is missing or has another type, and what was expected.
    """
    try:
        return msgspec.convert(value, cls, str_keys=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error))) from error
    except (OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def typed(cls: type[T], values: Mapping[str, Any]) -> T:
    """`convert`, where an unknown key is a ValueError as well."""
    unknown = values.keys() - {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    return convert(values, cls)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def _explain(message: str) -> str:
    """A message of msgspec with the field first, as `latency.samples_ms[1]`."""
    what, _, place = message.partition(" - at ")
    field = place.replace("`key` in ", "a key of ").replace("`$.", "").replace("`$", "").strip("`")
    if missing := _MISSING.fullmatch(what):
        return f"{field + '.' if field else ''}{missing['name']} is missing"
    name = field or "the whole"
    if mismatch := _MISMATCH.fullmatch(what):
        words = [_NAMES.get(word, word) for word in mismatch["expected"].split(" | ")]
        found = _NAMES.get(mismatch["found"], mismatch["found"])
        return f"{name} is of type {found}, expected {' or '.join(words)}"
    return f"{name}: {what[:1].lower()}{' '.join(what[1:].split())}"
