"""Where a run's network, weights and images lie now; that they are the run's is told by digests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.runs.backend import Places
from moodistill.teacher.task import builder_of, module_folder


def moved_config(folder: Path, config: RunConfig, places: Places) -> RunConfig:
    """The configuration of the run in `folder`, with what lies elsewhere now.

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
    config = config.with_weights(places.weights, None)
    config = replace(config, model=places.network or config.model)
    own = config.own
    if own is not None and places.network is not None:
        own = replace(own, module_folder=module_folder(places.network))
    if own is not None and places.data is not None:
        own = replace(own, data=str(places.data.resolve()))
    config = replace(config, own=own)
    _refuse_absent(folder, config)
    return config


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
    if own is not None and not Path(own.data).is_dir():
        absent.append(f"its images, which were in {own.data} (`data`)")
    if absent:
        raise UserError(f"{folder} lacks {'; and '.join(absent)}: give the new place")
