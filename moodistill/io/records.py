"""Records in JSON files: strict JSON, and dataclasses whose fields have their types (msgspec).

Unknown keys are passed over, so that files of a newer version stay readable. Settings are stricter:
see `fields`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from moodistill.errors import UserError

T = TypeVar("T")

_MISMATCH = re.compile(r"Expected `(?P<type>[^`]*)`(?P<length> of length \d+)?, got .*", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_NAMES = {"array": "list"}  # of msgspec, in Python's words


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
        return msgspec.convert(value, cls, str_keys=True, builtin_types=(bytes,), dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), value)) from error
    except (OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def _decode(cls: type, value: Any) -> Any:
    if cls is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `{cls.__name__}`, got `{type(value).__name__}`")


def _explain(message: str, values: Any) -> str:
    """One line of a message of msgspec: field, found value and expected type."""
    what, _, place = message.partition(" - at ")
    path = place.replace("`key` in ", "a key of ").replace("`$.", "").replace("`$", "")
    path = path.strip("`").replace("[...]", "")
    missing = _MISSING.fullmatch(what)
    if missing:
        return f"{path + '.' if path else ''}{missing['name']} is missing"
    name = path or "the whole file"
    mismatch = _MISMATCH.fullmatch(what)
    if not mismatch:
        return f"{name}: {what[:1].lower()}{' '.join(what[1:].split())}"
    words = mismatch["type"].split(" | ")
    expected = " or ".join(_NAMES.get(word, word) for word in words if word != "null")
    found = _shown(path.removeprefix("a key of "), values)
    return f"{name} is {found}; expected {expected}{mismatch['length'] or ''}"


def _shown(path: str, values: Any) -> str:
    """The value at a path as msgspec writes it, at most 40 characters."""
    for key in re.findall(r"[^.\[\]]+|\[\d+\]", path):
        try:
            values = values[int(key[1:-1]) if key.startswith("[") else key]
        except (KeyError, IndexError, TypeError):  # below a key, which msgspec does not name
            break
    text = " ".join(repr(values).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
