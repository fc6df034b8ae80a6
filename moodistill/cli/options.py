"""Options of the command line from the settings, and settings from what was given."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from moodistill.errors import UserError
from moodistill.settings import GROUPS, SETTINGS, Setting, Settings

if TYPE_CHECKING:
    from moodistill.runs.backend import Places


# Where a run's network, weights and images are: all this may have moved since.
PLACES = ("model", "teacher", "weights", "data", "data_dir")


def number(text: str) -> float:
    """An argument that is a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def add_settings(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """An option for every setting, in groups."""
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for one in SETTINGS.values():
            if one.group == title and one.name not in leave_out:
                add_setting(group, one)


def add_setting(group: argparse._ActionsContainer, one: Setting) -> None:
    """The option of one setting; it is None unless it is given."""
    if one.name == "progress":
        _add_progress(group, one)
        return
    group.add_argument(*one.flags, dest=one.name, default=None, help=one.full_help,
                       **_parsing(one))  # fmt: skip


def given_settings(arguments: argparse.Namespace) -> Settings:
    """The settings that were given as options."""
    values = {name: getattr(arguments, name, None) for name in SETTINGS}
    return Settings(**{name: _value(SETTINGS[name], value)
                       for name, value in values.items() if value is not None})  # fmt: skip


def given_places(settings: Settings) -> Places:
    """Where the network, weights and images of a run that was made before are now."""
    from moodistill.runs.backend import Places

    if settings.teacher is not None and settings.model is not None:
        raise UserError("`teacher` and `model` both name a network; give one of them")
    network = absolute(settings.teacher or settings.model)
    return Places(network=network, data=settings.data, **settings.part("places"))


def absolute(model: str | None) -> str | None:
    """A model with the whole path of its file: a run is carried on from anywhere."""
    from moodistill.teacher.task import builder_of

    if model is None:
        return None
    file, builder = builder_of(model)
    if not file.endswith(".py"):
        return model
    return f"{Path(file).resolve()}{':' if builder else ''}{builder}"


def with_flags(message: str) -> str:
    """A message in which settings in backticks are named by their options."""

    def flag(found: re.Match[str]) -> str:
        one = SETTINGS.get(found[1])
        return one.flags[0] if one else found[0]

    return re.sub(r"`(\w+)`", flag, message)


def _add_progress(group: argparse._ActionsContainer, one: Setting) -> None:
    how = group.add_mutually_exclusive_group()
    how.add_argument("--progress", metavar=one.metavar, help=one.full_help)
    for flag in ("quiet", "json"):
        how.add_argument(
            f"--{flag}", dest="progress", action="store_const", const=flag,
            help=f"the same as --progress {flag}",
        )  # fmt: skip


def _parsing(one: Setting) -> dict[str, Any]:
    """How argparse reads a value of the setting's type."""
    metavar = {} if one.metavar is None else {"metavar": one.metavar}
    inner = get_args(one.type)
    if one.type is bool:
        return {"action": argparse.BooleanOptionalAction if one.has_no else "store_true"}
    if get_origin(one.type) is tuple and inner[0] in (int, float):
        return {"type": _SCALARS[inner[0]], "nargs": "+", **metavar}
    if get_origin(one.type) is dict:
        return {"type": _width, "action": "append", **metavar}
    if get_origin(one.type) is tuple:
        return {"action": "append", **metavar} if one.repeated else metavar
    return {"type": _SCALARS[one.type], **metavar}


_SCALARS: dict[Any, Any] = {int: int, float: number, str: str, Path: Path}


def _value(one: Setting, found: Any) -> Any:
    """What argparse has read as a value of the setting's type."""
    if get_origin(one.type) is dict:
        return dict(found)
    if get_origin(one.type) is not tuple:
        return found
    if isinstance(found, str):
        found = [] if found == "none" else found.split(",")
    return tuple(found)


def _width(text: str) -> tuple[str, int]:
    name, separator, value = text.rpartition("=")
    if not separator or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected LAYER=NUMBER")
    return name, int(value)
