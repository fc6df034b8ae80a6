"""The settings of a run, each said once.

The options of the command line, the keywords of `moodistill.search`, the keys of a `--config` file,
the refusal of changed settings at a resume, and the table in the documentation are all made from
the fields of `Settings`. To add a setting, add a field here (and, if it belongs to `RunConfig`, a
keyword to `search`: a test holds the two together). Loads nothing heavy.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moodistill.errors import UserError
from moodistill.io.fields import convert

NETWORK = "network and data"
BUDGET = "budget"
GOALS = "objectives and limits"
LAYERS = "layers"
LATENCY = "latency"
INT8 = "INT8"
OUTPUT = "output"
MACHINES = "more processes and machines (extra: distributed)"
GROUPS = (NETWORK, BUDGET, GOALS, LAYERS, LATENCY, INT8, OUTPUT, MACHINES)

# The keywords of `search` that are whole parts of a `RunConfig`, and where they are in it.
PARTS = {"limits": "search.limits", "latency": "latency", "int8": "int8", "rules": "rules"}


@dataclass(frozen=True)
class Setting:
    """What is known of one setting.

    Attributes:
        name: in messages and files; a keyword of `search`, unless it lies in one of `PARTS`.
        type: of its value, without None.
        group: of `GROUPS`.
        help: what it is, without its default.
        path: where its value goes: a dotted field of `RunConfig`; or `own.`, `places.` or
            `cluster.` and a field of `OwnTask`, `Places` or `ClusterConfig`; empty if to none.
        default: its value where none is given; a text says what decides it.
        flags: of the command line, the first one is shown.
        metavar: what stands for its value in the help.
        repeated: whether its option is given once for each value.
        least: smallest number allowed.
    """

    name: str
    type: Any
    group: str
    help: str
    path: str
    default: Any
    flags: tuple[str, ...]
    metavar: str | None
    repeated: bool
    least: int | None

    @property
    def has_no(self) -> bool:
        """Whether an option switches it off: what is off unless it is given needs none."""
        return self.type is bool and self.default is not False

    @property
    def full_help(self) -> str:
        """With the default."""
        if self.default is None or self.default is False:
            return self.help
        return f"{self.help} (default: {_text(self.default)})"


def _setting(
    group: str,
    help: str,
    path: str = "",
    default: Any = None,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    repeated: bool = False,
    least: int | None = None,
) -> Any:
    """A field of `Settings`; see `Setting`."""
    known = {
        "group": group, "help": help, "path": path, "default": default, "flags": flags,
        "metavar": metavar, "repeated": repeated, "least": least,
    }  # fmt: skip
    return field(default=None, metadata=known)


@dataclass(frozen=True)
class Settings:
    """What a user has set; None is not given."""

    model: str | None = _setting(NETWORK, "a problem's name (vgg16, resnet18, digits) or file")
    teacher: str | None = _setting(
        NETWORK,
        "function that builds your own network, in place of a model",
        metavar="MODULE:CALLABLE",
    )
    weights: Path | None = _setting(
        NETWORK, "the teacher's weights (.safetensors, or .pt of a state dict)", "places.weights"
    )
    data: Path | None = _setting(
        NETWORK,
        "your own images or .npy arrays, one folder per class; or a .npz, or a .csv table",
        "own.data",
        metavar="PATH",
    )
    size: tuple[int, ...] | None = _setting(
        NETWORK, "size of your own images in pixels: one number, or height and width", "own.size",
        (32, 32), least=1,
    )  # fmt: skip
    channels: int | None = _setting(
        NETWORK, "channels of your own images: 3 (RGB), 1 or 4", "own.channels", 3
    )
    resize: str | None = _setting(
        NETWORK, "how your own images are brought to that size: squash, crop or letterbox",
        "own.resize", "squash",
    )  # fmt: skip
    shorter_side: int | None = _setting(
        NETWORK, "shorter side of an image before its centre is cropped, in pixels",
        "own.shorter_side", "the size", least=1,
    )  # fmt: skip
    fill: int | None = _setting(NETWORK, "value of a letterbox's borders", "own.fill", 0)
    interpolation: str | None = _setting(
        NETWORK, "one of nearest, box, bilinear, hamming, bicubic, lanczos", "own.interpolation",
        "bilinear",
    )  # fmt: skip
    channel_order: str | None = _setting(
        NETWORK, "RGB, or BGR as OpenCV reads images", "own.channel_order",
        "RGB",
    )  # fmt: skip
    exif: bool | None = _setting(
        NETWORK, "turn your own images as their EXIF tag says", "own.exif", True
    )
    mean: tuple[float, ...] | None = _setting(
        NETWORK,
        "channel means of pixels in [0, 1], as in the teacher's training",
        "own.mean",
        "measured",
    )
    std: tuple[float, ...] | None = _setting(
        NETWORK, "standard deviations of pixels in [0, 1], likewise", "own.std", "measured"
    )
    weights_key: str | None = _setting(
        NETWORK, "which weights of a file that holds several; an average (EMA) if not given",
        "places.weights_key", metavar="KEY",
    )  # fmt: skip
    heads: tuple[str, ...] | None = _setting(
        NETWORK, "what an output means: classification, segmentation, multilabel, regression or "
        "fidelity (to the teacher, without labels), perhaps with a metric (regression:mae); of "
        "several outputs NAME=KIND each", "own.heads", flags=("--head",),
        metavar="KIND", repeated=True,
    )  # fmt: skip
    expect_accuracy: float | None = _setting(
        NETWORK, "refuse a teacher whose accuracy is more than 0.02 below this fraction",
        "places.expected_accuracy", metavar="FRACTION",
    )  # fmt: skip
    data_dir: Path | None = _setting(
        NETWORK, "folder of a problem's data", "places.data_dir", "$MOODISTILL_DATA, then data/"
    )
    images_in_memory: bool | None = _setting(
        NETWORK, "hold all of your own images in memory; otherwise they are read when needed",
        "places.images_in_memory", "while they take at most a quarter of it",
    )  # fmt: skip
    preset: str | None = _setting(BUDGET, "quick, standard or thorough", "preset", "quick")
    population: int | None = _setting(
        BUDGET, "students per generation", "search.population", 32, least=1
    )
    generations: int | None = _setting(
        BUDGET, "generations of the search", "search.generations", "the preset's", least=1
    )
    finalists: int | None = _setting(
        BUDGET, "students that are distilled and exported", "finalists", "the preset's", least=1
    )
    distill_steps: int | None = _setting(
        BUDGET,
        "training steps of 64 images for each finalist",
        "distill.steps",
        "the preset's",
        least=1,
    )
    calibration_images: int | None = _setting(
        BUDGET, "training images that every student is solved on", "calibration.images", 512,
        metavar="N", least=1,
    )  # fmt: skip
    score_images: int | None = _setting(
        BUDGET, "validation images that every student is scored on", "recipe.validation_images",
        1000, metavar="N", least=1,
    )  # fmt: skip
    screen: int | None = _setting(
        BUDGET, "a surrogate pre-selects 1 in N offspring; 1 disables it",
        "search.screen", 24, metavar="N",
    )  # fmt: skip
    seeded: float | None = _setting(
        BUDGET, "share of the first generation that is the best by tables of single changes; 0 "
        "measures no tables",
        "search.seeded", 0.75, metavar="SHARE",
    )  # fmt: skip
    seed: int | None = _setting(BUDGET, "random seed of the search", "search.seed", 0)
    finalists_within: float | None = _setting(
        BUDGET, "accuracy that a finalist may lack before its distillation, a fraction",
        "finalists_within", 0.1, metavar="FRACTION",
    )  # fmt: skip
    flip: bool | None = _setting(
        BUDGET, "distil finalists on mirrored images, too", "distill.flip",
        "as a problem's teacher was trained, else yes",
    )  # fmt: skip
    objectives: tuple[str, ...] | None = _setting(
        GOALS, "accuracy and some of parameters, latency, macs, size, memory",
        "search.objectives", ("accuracy", "parameters", "latency"), metavar="NAME,NAME",
    )  # fmt: skip
    algorithm: str | None = _setting(GOALS, "nsga2, nsga3 or sms", "search.algorithm", "nsga2")
    min_accuracy: float | None = _setting(
        GOALS, "hard limit, a fraction, of students before distillation",
        "search.limits.min_accuracy", "two fifths of the way from chance to the teacher",
    )  # fmt: skip
    max_latency_ms: float | None = _setting(
        GOALS, "hard limit, measured in ONNX Runtime", "search.limits.max_latency_ms"
    )
    max_parameters: float | None = _setting(
        GOALS, "hard limit, parameters of the student", "search.limits.max_parameters",
        flags=("--max-parameters", "--max-params"),
    )  # fmt: skip
    max_macs: float | None = _setting(
        GOALS, "hard limit, multiply-accumulates of one image", "search.limits.max_macs"
    )
    max_size_bytes: float | None = _setting(
        GOALS, "hard limit, of the float ONNX file", "search.limits.max_size_bytes"
    )
    max_memory_bytes: float | None = _setting(
        GOALS, "hard limit, weights and largest activations, computed",
        "search.limits.max_memory_bytes",
    )  # fmt: skip
    connections: tuple[str, ...] | None = _setting(
        LAYERS, "kinds to search: some of kernels, ranks, merges, bypasses, blocks; or none",
        "search.connections", ("kernels", "ranks", "merges", "bypasses"), metavar="KIND,KIND",
    )  # fmt: skip
    keep: tuple[str, ...] | None = _setting(
        LAYERS,
        "keep all outputs and connections of this layer",
        "rules.keep",
        metavar="LAYER",
        repeated=True,
    )
    opaque: tuple[str, ...] | None = _setting(
        LAYERS, "leave this module whole: it is not traced, every student has it", "rules.opaque",
        metavar="MODULE", repeated=True,
    )  # fmt: skip
    min_width: dict[str, int] | None = _setting(
        LAYERS, "smallest number of outputs of a layer", "rules.least", metavar="LAYER=N",
        repeated=True,
    )  # fmt: skip
    max_width: dict[str, int] | None = _setting(
        LAYERS, "largest number of outputs of a layer", "rules.most", metavar="LAYER=N",
        repeated=True,
    )  # fmt: skip
    simd_step: int | None = _setting(
        LAYERS, "channels per SIMD block; widths are whole blocks", "search.simd_step",
        "probed on this device", least=1,
    )  # fmt: skip
    threads: int | None = _setting(
        LATENCY, "threads of ONNX Runtime", "latency.threads", 1, least=1
    )
    batch: int | None = _setting(LATENCY, "images per timed call", "latency.batch", 1, least=1)
    provider: str | None = _setting(
        LATENCY, "execution provider of ONNX Runtime", "latency.provider", "CPUExecutionProvider"
    )
    int8_twins: bool | None = _setting(
        INT8, "make an INT8 twin of each finalist", "int8.wanted", True,
        flags=("--int8",),
    )  # fmt: skip
    int8_max_loss: float | None = _setting(
        INT8, "validation accuracy that an INT8 twin may lose, a fraction", "int8.max_loss", 0.01,
        metavar="FRACTION",
    )  # fmt: skip
    out: Path | None = _setting(OUTPUT, "new run folder", default="results/<model>-<time>")
    progress: str | None = _setting(
        OUTPUT, "auto (live in a terminal, else plain), plain, json (one object per line, for "
        "logs) or quiet (the result only)", default="auto", metavar="HOW",
    )  # fmt: skip
    tensorboard: Path | None = _setting(
        OUTPUT, "write curves for TensorBoard to this folder (extra: tensorboard)", metavar="DIR"
    )
    device: str | None = _setting(
        MACHINES, "what students are solved, scored and trained on: auto (an accelerator that is "
        "there), cpu, cuda, cuda:N, mps or xpu", "places.device", "auto",
    )  # fmt: skip
    torch_threads: int | None = _setting(
        MACHINES, "threads for everything but latency", "places.threads", least=1
    )
    workers: int | None = _setting(
        MACHINES, "processes on this machine", "cluster.workers", metavar="N"
    )
    scheduler: str | None = _setting(
        MACHINES, "a Dask scheduler, tcp://host:port", "cluster.scheduler", metavar="ADDRESS"
    )
    latency_on: tuple[str, ...] | None = _setting(
        MACHINES, "devices to time on; the latency on the first is the objective",
        "cluster.latency_on", metavar="NAME,...",
    )  # fmt: skip
    worst_latency: bool | None = _setting(
        MACHINES, "the objective is the largest latency over all devices", "cluster.worst_latency",
        False,
    )  # fmt: skip
    tls_ca: Path | None = _setting(
        MACHINES, "certificate authority", "cluster.tls_ca", metavar="PEM"
    )
    tls_cert: Path | None = _setting(
        MACHINES, "certificate of this machine", "cluster.tls_cert", metavar="PEM"
    )
    tls_key: Path | None = _setting(
        MACHINES, "private key of this machine", "cluster.tls_key", metavar="PEM"
    )
    patience: float | None = _setting(
        MACHINES, "seconds without any worker after which the run stops", "cluster.patience_s",
        60.0, metavar="SECONDS",
    )  # fmt: skip
    wait: bool | None = _setting(
        MACHINES, "report it and wait for a worker instead of stopping", "cluster.wait", False
    )

    def __post_init__(self) -> None:
        """Refuse numbers that are too small to mean anything."""
        for name, value in self.given().items():
            least = SETTINGS[name].least
            smallest = min(value, default=least) if isinstance(value, tuple) else value
            if least is not None and smallest is not None and smallest < least:
                raise UserError(
                    f"`{name}` is {_text(value)}; expected a whole number of at least {least}"
                )
        if self.progress is not None and self.progress not in MODES:
            raise UserError(f"`progress` is {self.progress!r}; expected one of {', '.join(MODES)}")

    def given(self) -> dict[str, Any]:
        """The settings that have a value, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if getattr(self, f.name) is not None}  # fmt: skip

    def part(self, owner: str) -> dict[str, Any]:
        """What is given of `own`, `places` or `cluster`, by the field that it is for."""
        return {
            SETTINGS[name].path.removeprefix(f"{owner}."): value
            for name, value in self.given().items()
            if SETTINGS[name].path.startswith(f"{owner}.")
        }

    def over(self, others: Settings) -> Settings:
        """These, and of the `others` what is not among them."""
        return Settings(**{**others.given(), **self.given()})


MODES = ("auto", "plain", "json", "quiet")


def _described() -> dict[str, Setting]:
    hints = get_type_hints(Settings)
    found = {}
    for one in fields(Settings):
        known = dict(one.metadata)
        known["flags"] = known["flags"] or ("--" + one.name.replace("_", "-"),)
        found[one.name] = Setting(one.name, without_none(hints[one.name]), **known)
    return found


def without_none(hint: Any) -> Any:
    """The one type in `T | None`; any other as it is."""
    inner = [one for one in get_args(hint) if one is not type(None)]
    return inner[0] if get_origin(hint) is UnionType and len(inner) == 1 else hint


SETTINGS = _described()


def flat(**parts: Any) -> dict[str, Any]:
    """Settings by name from some of `PARTS`; what is None in them is left out."""
    found = {}
    for name, part in parts.items():
        if part is None:
            continue
        for one in SETTINGS.values():
            owner, _, attribute = one.path.rpartition(".")
            if owner == PARTS[name]:
                found[one.name] = getattr(part, attribute)
    return {name: value for name, value in found.items() if value is not None}


def read_settings(path: Path) -> Settings:
    """The settings in a TOML file, a key each.

    Raises:
        UserError: if it cannot be read, or a key or a value is none of a setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML ({error}); expected lines like seed = 1") from error
    return convert(values, Settings, str(path))


def markdown_table() -> str:
    """All settings by group, for the documentation."""
    lines = []
    for group in GROUPS:
        lines += [f"### {group[:1].upper()}{group[1:]}", "", "| setting | option | default | |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for one in SETTINGS.values():
            if one.group == group:
                flags = [*one.flags, *([f"--no-{one.flags[0][2:]}"] if one.has_no else [])]
                options = ", ".join(f"`{flag}`" for flag in flags)
                default = "" if one.default is None else _text(one.default)
                lines.append(f"| `{one.name}` | {options} | {default} | {one.help} |")
        lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{name}={one}" for name, one in value.items()]
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
