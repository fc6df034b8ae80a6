"""What decides a run's result: presets and the configuration stored in `run.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moodistill.bundle.int8 import Int8Config
from moodistill.errors import UserError
from moodistill.genome.layout import FORMER_CONNECTIONS
from moodistill.io.records import typed
from moodistill.latency.meter import LatencyConfig
from moodistill.pareto.objectives import DEFAULT, Limits, check_objectives
from moodistill.search.driver import SearchConfig
from moodistill.student.evaluator import Recipe
from moodistill.student.inherit import InheritConfig
from moodistill.teacher.blocks import LayerRules
from moodistill.teacher.samples import CalibrationConfig
from moodistill.teacher.task import OwnTask
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
        for name in ("generations", "finalists", "distill_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected a whole number of at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result but the machine; stored in `run.json`."""

    model: str
    preset: str
    search: SearchConfig
    recipe: Recipe
    calibration: CalibrationConfig
    distill: DistillConfig
    finalists: int
    latency: LatencyConfig = LatencyConfig()
    int8: Int8Config = Int8Config()
    own: OwnTask | None = None
    rules: LayerRules = field(default_factory=LayerRules)

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> RunConfig:
        """The inverse of `asdict`.

        Raises:
            UserError: if a key is missing or unknown.
        """
        try:
            recipe, search = dict(stored["recipe"]), dict(stored["search"])
            search["limits"] = typed(Limits, search["limits"])
            search["objectives"] = tuple(search["objectives"])
            # Runs of earlier versions do not say: they searched all kinds that there were.
            search["connections"] = tuple(search.get("connections", FORMER_CONNECTIONS))
            recipe["inherit"] = typed(InheritConfig, recipe["inherit"])
            config = typed(RunConfig, {
                "model": stored["model"],
                "preset": stored["preset"],
                "search": typed(SearchConfig, search),
                "recipe": typed(Recipe, recipe),
                "calibration": typed(CalibrationConfig, stored["calibration"]),
                "distill": typed(DistillConfig, stored["distill"]),
                "finalists": stored["finalists"],
                "latency": typed(LatencyConfig, stored["latency"]),
                "int8": typed(Int8Config, stored["int8"]),
                "rules": _rules(stored["rules"]),
                "own": None if stored["own"] is None else _own_task(stored["own"]),
            })  # fmt: skip
            _check_numbers(asdict(replace(config, own=None)))
            return config
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"run.json does not hold a configuration of this version ({error}); "
                "start a new run with another --out"
            ) from error

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
    model: str,
    simd_step: int,
    *,
    preset: str | None = None,
    generations: int | None = None,
    finalists: int | None = None,
    distill_steps: int | None = None,
    population: int | None = None,
    seed: int | None = None,
    objectives: Sequence[str] | None = None,
    algorithm: str | None = None,
    screen: int | None = None,
    connections: Sequence[str] | None = None,
    limits: Limits | None = None,
    latency: LatencyConfig | None = None,
    int8: Int8Config | None = None,
    rules: LayerRules | None = None,
    flip: bool | None = None,
    own: OwnTask | None = None,
) -> RunConfig:
    """The configuration of a new run; whatever is None has its default, or its preset's value.

    Raises:
        UserError: if a setting cannot be used.
    """
    distill = DistillConfig()
    budget = Budget(preset, generations, finalists, distill_steps)
    settings = get_preset(preset or "quick")
    defaults = SearchConfig()
    return RunConfig(
        model=model,
        preset=preset or "quick",
        search=SearchConfig(
            population=defaults.population if population is None else population,
            generations=budget.generations or settings.generations,
            seed=defaults.seed if seed is None else seed,
            simd_step=simd_step,
            limits=limits or Limits(),
            objectives=check_objectives(DEFAULT if objectives is None else objectives),
            algorithm=algorithm or defaults.algorithm,
            screen=defaults.screen if screen is None else screen,
            connections=defaults.connections if connections is None else tuple(connections),
        ),
        recipe=Recipe(simd_step=simd_step),
        calibration=CalibrationConfig(),
        distill=replace(
            distill,
            steps=budget.distill_steps or settings.distill_steps,
            flip=distill.flip if flip is None else flip,
        ),
        finalists=budget.finalists or settings.finalists,
        latency=latency or LatencyConfig(),
        int8=int8 or Int8Config(),
        own=own,
        rules=rules or LayerRules(),
    )


def flat_settings(
    limits: Limits | None = None,
    latency: LatencyConfig | None = None,
    int8: Int8Config | None = None,
    rules: LayerRules | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What decides a run's result, one plain value an option; what is None is left out."""
    named = {
        **others,
        **(asdict(limits) if limits else {}),
        **(asdict(latency) if latency else {}),
        **({"int8_twins": int8.wanted, "int8_max_loss": int8.max_loss} if int8 else {}),
    }
    if rules:
        named |= {"keep": rules.keep, "min_width": rules.least, "max_width": rules.most}
    return {name: value for name, value in named.items() if value is not None}


def refuse_changes(config: RunConfig, given: Mapping[str, Any], folder: Path) -> None:
    """Refuse a resume of the run in `folder` by settings other than it was started with.

    Args:
        given: as `flat_settings` has them; what is not in it stays as it is.

    Raises:
        UserError: names each setting, with both values.
    """
    stored = flat_settings(
        config.search.limits,
        config.latency,
        config.int8,
        config.rules,
        model=config.model,
        flip=config.distill.flip,
        **{name: getattr(config.search, name) for name in _SEARCH},
    )
    changed = [
        f"{name} {_shown(stored.get(name))}, not {_shown(value)}"
        for name, value in given.items()
        if _comparable(name, stored.get(name)) != _comparable(name, value)
    ]
    if changed:
        raise UserError(
            f"{folder} was started with {'; with '.join(changed)}; leave that out, or start a new "
            "run in another folder"
        )


# Fields of SearchConfig that a resume cannot change.
_SEARCH = (
    "population", "seed", "objectives", "algorithm", "screen", "connections", "simd_step",
)  # fmt: skip


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
    return (",".join(value) or "none") if isinstance(value, list | tuple) else str(value)


def _rules(stored: dict[str, Any]) -> LayerRules:
    return typed(LayerRules, {**stored, "keep": tuple(stored["keep"])})


def _own_task(stored: dict[str, Any]) -> OwnTask:
    lists = {k: tuple(v) for k, v in stored.items() if isinstance(v, list)}
    return typed(OwnTask, {**stored, **lists})


# May be zero.
_FROM_ZERO = {
    "seed", "min_accuracy", "ridge", "scarce", "hard", "momentum", "weight_decay", "pad",
}  # fmt: skip


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_numbers(value)
        elif (
            name != "max_loss"
            and type(value) in (int, float)
            and not (0 <= value < 1e15 and (value > 0 or name in _FROM_ZERO))
        ):
            raise ValueError(f"{name} is {str(value)[:40]}")


def get_preset(name: str) -> Preset:
    """A preset by name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
