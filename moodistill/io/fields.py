"""Settings from files: as `records` reads them, but an unknown key is refused by its nearest."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from moodistill.errors import UserError
from moodistill.io import records

T = TypeVar("T")


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
        return records.convert(values, cls)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
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
