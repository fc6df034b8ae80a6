"""What decides a run's result: presets and the configuration stored in `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from moodistill.bundle.int8 import Int8Config
from moodistill.data.cut import CUT_FILE
from moodistill.errors import UserError
from moodistill.evolution.driver import SearchConfig
from moodistill.genome.layout import FORMER_CONNECTIONS
from moodistill.io.fields import convert, missing_fields
from moodistill.latency.meter import LatencyConfig
from moodistill.pareto.objectives import check_objectives
from moodistill.progress import Reporter
from moodistill.settings import SETTINGS, Settings
from moodistill.storage.folder import RUN_FILE, read_run
from moodistill.student.evaluator import Recipe
from moodistill.teacher.blocks import LayerRules
from moodistill.teacher.samples import CalibrationConfig
from moodistill.teacher.task import OwnTask, Task, load_task
from moodistill.training.distill import DistillConfig


@dataclass(frozen=True)
class Preset:
    """What a preset sets; everything else is the same in all of them."""

    generations: int
    finalists: int
    distill_steps: int


PRESETS = {
    "quick": Preset(generations=5, finalists=4, distill_steps=100),
    "standard": Preset(generations=13, finalists=6, distill_steps=500),
    "thorough": Preset(generations=60, finalists=10, distill_steps=10_000),
}
# Settings that may change when a run is resumed.
BUDGET = ("preset", "generations", "finalists", "distill_steps")
# What runs of earlier versions had, which do not say so in `run.json`.
EARLIER: dict[str, Any] = {
    "search.connections": tuple(FORMER_CONNECTIONS),
    "rules.opaque": (),
    "own.module_folder": None,
    "weights": None,
    "weights_key": None,
    "search.seeded": 0.0,
}


@dataclass(frozen=True)
class Budget:
    """What may change when a run is resumed; None keeps what the run or the preset has.

    With `students` (their names) nothing is searched and these alone are distilled; the run keeps
    its own budget.
    """

    preset: str | None = None
    generations: int | None = None
    finalists: int | None = None
    distill_steps: int | None = None
    students: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name in BUDGET[1:]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` is {value}; expected a whole number of at least 1")

    @staticmethod
    def of(settings: Settings, students: tuple[str, ...] = ()) -> Budget:
        """What `settings` say of it."""
        return Budget(**{name: getattr(settings, name) for name in BUDGET}, students=students)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result but the machine; stored in `run.json`.

    `weights` (a path) and `weights_key` are of a problem's teacher, if they are not the problem's;
    those of an `own` teacher are in it.
    """

    model: str
    preset: str
    search: SearchConfig
    recipe: Recipe
    calibration: CalibrationConfig
    distill: DistillConfig
    finalists: int
    finalists_within: float = 0.1
    latency: LatencyConfig = LatencyConfig()
    int8: Int8Config = Int8Config()
    own: OwnTask | None = None
    rules: LayerRules = field(default_factory=LayerRules)
    weights: str | None = None
    weights_key: str | None = None

    @staticmethod
    def from_dict(stored: Any, source: str = "run.json") -> RunConfig:
        """The inverse of `asdict`; what a run of an earlier version lacks has its default.

        Raises:
            UserError: if a field is missing, unknown, of another type or out of its range; names
                the file and the field.
        """
        config = convert(_with_earlier(stored), RunConfig, source)
        _check_numbers(asdict(replace(config, own=None)), source)
        return config

    @staticmethod
    def read(folder: Path) -> RunConfig:
        """That of a run in a folder, whose own images are cut as the run has cut them.

        Raises:
            UserError: if the folder is no run, or its `run.json` is damaged.
        """
        config = RunConfig.from_dict(read_run(folder).get("config", {}), str(folder / RUN_FILE))
        cut = folder / CUT_FILE
        if config.own is None or not cut.is_file():
            return config
        return replace(config, own=replace(config.own, cut=str(cut)))

    def task(self, in_memory: bool | None = None, reporter: Reporter | None = None) -> Task:
        """The task that it names, with the weights that it names.

        Args:
            in_memory: whether own images are held, as `load_image_folder` takes it.
            reporter: is told how far their reading is.

        Raises:
            UserError: if there is none.
        """
        task = load_task(self.model, self.own, in_memory, reporter)
        if self.own is not None:
            return task
        return replace(
            task,
            weights=task.weights if self.weights is None else Path(self.weights),
            weights_key=self.weights_key or task.weights_key,
        )

    def with_weights(self, weights: Path | None, key: str | None) -> RunConfig:
        """The same with other weights of the teacher, or another set of a file; None keeps them."""
        if self.own is not None:
            own = self.own
            path = own.weights if weights is None else str(weights.resolve())
            own = replace(own, weights=path, weights_key=key or own.weights_key)
            return replace(self, own=own)
        given = self.weights if weights is None else str(weights.resolve())
        return replace(self, weights=given, weights_key=key or self.weights_key)

    def with_budget(self, budget: Budget) -> RunConfig:
        """The same run with other generations and another finalists' budget."""
        preset = get_preset(budget.preset) if budget.preset else None
        generations, finalists, steps = (
            (preset.generations, preset.finalists, preset.distill_steps)
            if preset
            else (self.search.generations, self.finalists, self.distill.steps)
        )
        return replace(
            self,
            preset=budget.preset or self.preset,
            search=replace(self.search, generations=budget.generations or generations),
            distill=replace(self.distill, steps=budget.distill_steps or steps),
            finalists=budget.finalists or finalists,
        )


def new_config(
    model: str, settings: Settings, own: OwnTask | None = None, base: RunConfig | None = None
) -> RunConfig:
    """The configuration of a new run.

    Args:
        model: a problem's name or file, or where the builder of an `own` teacher is.
        settings: whatever is None in them is that of `base`, or of the preset.
        own: weights and images of a teacher that no problem file describes.
        base: of a run that is started anew, else the defaults.

    Raises:
        UserError: if a setting cannot be used.
    """
    base = base or _defaults(model)
    values = {
        SETTINGS[name].path: value
        for name, value in settings.given().items()
        if name not in BUDGET and _is_of_config(SETTINGS[name].path)
    }
    if settings.objectives is not None:
        values["search.objectives"] = check_objectives(settings.objectives)
    return _replaced(replace(base, model=model, own=own).with_budget(Budget.of(settings)), values)


def changed_settings(config: RunConfig, settings: Settings) -> list[str]:
    """What is given of another value than a run has, in words; its budget may differ."""
    changed = []
    for name, value in settings.given().items():
        path = SETTINGS[name].path if name != "model" else name
        if name in BUDGET or not _is_of_config(path):
            continue
        stored = _value_at(config, path)
        if _comparable(name, stored) != _comparable(name, value):
            changed.append(f"{name} {_shown(stored)}, not {_shown(value)}")
    return changed


def refuse_changes(config: RunConfig, settings: Settings, folder: Path) -> None:
    """Refuse a resume of the run in `folder` by settings other than it was started with.

    Raises:
        UserError: names each setting, with both values.
    """
    changed = changed_settings(config, settings)
    if changed:
        raise UserError(
            f"{folder} was started with {'; with '.join(changed)}; leave that out, or start a new "
            "run in another folder"
        )


def refuse_older(stored: Any, folder: Path) -> None:
    """Refuse to carry on a run whose `config` in `run.json` does not say all of this version.

    Raises:
        UserError: names what is not said.
    """
    missing = missing_fields(_with_earlier(stored), RunConfig)
    if missing:
        raise UserError(
            f"{folder} was started by another version (run.json does not say "
            f"{', '.join(missing)}) and cannot be carried on: choose and export from it, or start "
            "a new run in another folder"
        )


def get_preset(name: str) -> Preset:
    """A preset by name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _defaults(model: str) -> RunConfig:
    preset = PRESETS["quick"]
    config = RunConfig(
        model=model, preset="quick", search=SearchConfig(), recipe=Recipe(),
        calibration=CalibrationConfig(), distill=DistillConfig(), finalists=preset.finalists,
    )  # fmt: skip
    return config.with_budget(Budget("quick"))


def _is_of_config(path: str) -> bool:
    """Whether a setting's path leads into `RunConfig`."""
    owner = path.partition(".")[0]
    return owner in RunConfig.__dataclass_fields__ and owner != "own"


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass with other values at dotted fields."""
    changed = {path: value for path, value in values.items() if "." not in path}
    for part in {path.partition(".")[0] for path in values if "." in path}:
        inner = {
            path.removeprefix(f"{part}."): value
            for path, value in values.items()
            if path.startswith(f"{part}.")
        }
        changed[part] = _replaced(getattr(config, part), inner)
    return replace(config, **changed)


def _value_at(config: RunConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def _with_earlier(stored: Any) -> Any:
    """What `run.json` says, and what runs of earlier versions had where they do not say it.

    They said the SIMD step twice, for the search and for the recipe.
    """
    if not isinstance(stored, Mapping):
        return stored
    full = {k: dict(v) if isinstance(v, Mapping) else v for k, v in stored.items()}
    for path, value in EARLIER.items():
        part, _, name = path.rpartition(".")
        owner = full.get(part) if part else full
        if isinstance(owner, dict):
            owner.setdefault(name, value)
    search, recipe = full.get("search", {}), full.get("recipe", {})
    twice = isinstance(search, dict) and isinstance(recipe, dict) and "simd_step" in recipe
    if twice and recipe["simd_step"] == search.get("simd_step"):
        full["recipe"] = {k: v for k, v in recipe.items() if k != "simd_step"}
    return full


def _comparable(name: str, value: Any) -> Any:
    """Objectives and connections are the same in any order, a list is as good as a tuple."""
    if name in ("objectives", "connections"):
        return set(value)
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        value = [f"{name}={bound}" for name, bound in value.items()]
    return (",".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


# May be zero.
_FROM_ZERO = {
    "seed", "min_accuracy", "ridge", "scarce", "hard", "momentum", "weight_decay", "pad",
    "seeded",
}  # fmt: skip


def _check_numbers(values: Mapping[str, Any], source: str, path: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_numbers(value, source, f"{path}{name}.")
        elif (
            name != "max_loss"
            and type(value) in (int, float)
            and not (0 <= value < 1e15 and (value > 0 or name in _FROM_ZERO))
        ):
            least = "from 0" if name in _FROM_ZERO else "above 0"
            raise UserError(
                f"{source}: {path}{name} is {str(value)[:40]}; expected a number {least} and "
                "below 1e15"
            )
