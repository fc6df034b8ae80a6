"""Where a run's network, weights and images lie now; that they are the run's is told by digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.runs.backend import Places
from moodistill.storage.folder import read_run
from moodistill.teacher.task import builder_of, module_folder


def moved_config(folder: Path, config: RunConfig, places: Places) -> RunConfig:
    """The configuration of the run in `folder`, with what lies elsewhere now.

    What is not given is where it was last found, or where it was at first.

    Raises:
        UserError: if something is given that this run does not use, or is neither where it was nor
            given.
    """
    if config.own is None:
        _refuse_for_problem(folder, config, places)
    else:
        _refuse_for_own(folder, config, places)
    key = config.weights_key if config.own is None else config.own.weights_key
    if places.weights_key is not None and places.weights_key != key:
        raise UserError(
            f"{folder} was started with weights_key {key or 'none'}, not {places.weights_key}; "
            "leave that out, or start a new run in another folder"
        )
    now = _last_places(read_run(folder)) | _given_places(places)
    weights = now.get("weights")
    config = config.with_weights(None if weights is None else Path(weights), None)
    own = config.own
    if own is not None and "network" in now:
        own = replace(own, module_folder=now["module_folder"])
    if own is not None and "data" in now:
        own = replace(own, data=now["data"])
    config = replace(config, model=now.get("network", config.model), own=own)
    _refuse_absent(folder, config)
    return config


def new_places(stored: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """What `run.json` (`stored`) is to say besides of places; nothing if none is given."""
    given = _given_places(places)
    return {"places": _last_places(stored) | given} if given else {}


def _given_places(places: Places) -> dict[str, Any]:
    """Whole paths of what is given."""
    paths = {"weights": places.weights, "data": places.data}
    found: dict[str, Any] = {k: str(v.resolve()) for k, v in paths.items() if v is not None}
    if places.network is not None:
        found |= {"network": places.network, "module_folder": module_folder(places.network)}
    return found


def _last_places(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Where network, weights and images were last, as `run.json` says; without what has gone."""
    last = stored.get("places")
    if not isinstance(last, Mapping):
        return {}
    texts = {name: value for name, value in last.items() if isinstance(value, str)}
    found: dict[str, Any] = {
        name: path
        for name, path in texts.items()
        if name in ("weights", "data") and Path(path).exists()
    }
    folder = texts.get("module_folder")
    if "network" in texts and Path(folder or builder_of(texts["network"])[0]).exists():
        found |= {"network": texts["network"], "module_folder": folder}
    return found


def _refuse_for_problem(folder: Path, config: RunConfig, places: Places) -> None:
    if places.data is not None:
        raise UserError(
            f"`data` is for a network of your own, and {folder} was started with the problem "
            f"{config.model}: give `data_dir`, if its data lie elsewhere"
        )
    given = places.network
    moved = given is not None and given.endswith(".py") and config.model.endswith(".py")
    if given not in (None, config.model) and not moved:
        raise UserError(
            f"{folder} was started with model {config.model}, not {given}; leave that out, or "
            "start a new run in another folder"
        )


def _refuse_for_own(folder: Path, config: RunConfig, places: Places) -> None:
    if places.data_dir is not None:
        raise UserError(
            f"`data_dir` is for a problem's data, and {folder} was started with images of your "
            "own: give `data`, if they lie elsewhere"
        )
    if places.network is not None and not builder_of(places.network)[1]:
        raise UserError(
            f"{folder} was started with the teacher {config.model}, not with the model "
            f"{places.network}; give `teacher`, if its file lies elsewhere"
        )


def _refuse_absent(folder: Path, config: RunConfig) -> None:
    """Name at once all that is not there."""
    own, absent = config.own, []
    file, builder = builder_of(config.model)
    if file.endswith(".py") and not Path(file).is_file():
        name = "teacher" if builder else "model"
        absent.append(f"its network, which was in {file} (`{name}` says where it is now)")
    weights = config.weights if own is None else own.weights
    if weights is not None and not Path(weights).is_file():
        absent.append(f"its teacher's weights, which were in {weights} (`weights`)")
    if own is not None and not Path(own.data).exists():
        absent.append(f"its images, which were in {own.data} (`data`)")
    if absent:
        raise UserError(f"{folder} lacks {'; and '.join(absent)}: give the new place")
