"""Objects from files, typed by their dataclasses; one line names what a file has wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from moodistill.errors import UserError

T = TypeVar("T")

_MISMATCH = re.compile(r"Expected `(?P<type>[^`]*)`(?P<length> of length \d+)?, got .*", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_NAMES = {"array": "list"}  # of msgspec, in Python's words


def convert(values: Any, cls: type[T], source: str) -> T:
    """The dataclass `cls` from plain values; fields that `values` lacks have their defaults.

    Args:
        values: as JSON or TOML gives them.
        cls: a dataclass, whose fields may be dataclasses.
        source: the file, named in every message.

    Raises:
        UserError: if a key is unknown (names the nearest known one), or a value is missing, has
            another type or is refused by its dataclass.
    """
    _refuse_unknown(values, cls, source)
    try:
        return msgspec.convert(values, cls, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_explain(str(error), values)}") from error
    except UserError as error:
        raise UserError(f"{source}: {str(error).replace('`', '')}") from error


def nearest(name: str, known: Collection[str]) -> str:
    """What to say of an unknown name: the nearest known one, or all of them."""
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean {found[0]}?" if found else f"expected one of {', '.join(known)}"


def missing_fields(values: Any, cls: type, path: str = "") -> list[str]:
    """Dotted names of the fields, at any depth, that `values` lacks and that have defaults."""
    missing = []
    for name, hint in _hints(cls).items():
        if name not in values:
            missing.append(path + name)
        elif (inner := _dataclass_in(hint)) is not None and isinstance(values[name], Mapping):
            missing += missing_fields(values[name], inner, f"{path}{name}.")
    return missing


def _refuse_unknown(values: Any, cls: type, source: str, path: str = "") -> None:
    if not isinstance(values, Mapping):
        return  # a wrong type, of which the conversion says more
    hints = _hints(cls)
    for name, value in values.items():
        if name not in hints:
            known = [path + one for one in hints]
            shown = f"{path}{str(name)[:40]}"
            raise UserError(f"{source}: unknown key {shown!r}; {nearest(shown, known)}")
        inner = _dataclass_in(hints[name])
        if inner is not None:
            _refuse_unknown(value, inner, source, f"{path}{name}.")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or that it may be beside None."""
    for one in (hint, *get_args(hint)):
        if is_dataclass(one):
            return one  # type: ignore[return-value]
    return None


def _decode(cls: type, value: Any) -> Any:
    if cls is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `{cls.__name__}`, got `{type(value).__name__}`")


def _explain(message: str, values: Any) -> str:
    """One line of a message of msgspec: field, found value and expected type."""
    what, _, place = message.partition(" - at `$")
    path = place.removesuffix("`").removeprefix(".").replace("[...]", "")
    missing = _MISSING.fullmatch(what)
    if missing:
        return f"{path + '.' if path else ''}{missing['name']} is missing"
    name = path or "the whole file"
    mismatch = _MISMATCH.fullmatch(what)
    if not mismatch:
        return f"{name}: {what[:1].lower()}{' '.join(what[1:].split())}"
    words = mismatch["type"].split(" | ")
    expected = " or ".join(_NAMES.get(word, word) for word in words if word != "null")
    return f"{name} is {_shown(path, values)}; expected {expected}{mismatch['length'] or ''}"


def _shown(path: str, values: Any) -> str:
    """The value at a path as msgspec writes it, at most 40 characters."""
    for key in re.findall(r"[^.\[\]]+|\[\d+\]", path):
        values = values[int(key[1:-1]) if key.startswith("[") else key]
    text = repr(values)
    return text if len(text) <= 40 else f"{text[:37]}..."
