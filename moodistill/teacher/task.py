"""What a file in `problems/` describes: a teacher, its data, how it is trained."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from moodistill.data.array_files import holds_arrays, load_arrays
from moodistill.data.cut import Cut
from moodistill.data.folders import load_image_folder
from moodistill.data.images import ImageData
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError
from moodistill.heads.heads import Heads
from moodistill.progress import Reporter


@dataclass(frozen=True)
class TrainConfig:
    """How a teacher is trained.

    Attributes:
        phases: `(epochs, height of the images)` in order: small images first save time.
        lr: peak of Muon's rate, relative to the norm of a kernel.
        warmup: share of the steps in which the rate rises; then it falls to zero in a line.
        pad: pixels that a view is shifted by, at most.
        flip: whether an image is mirrored in every other epoch.
        cutout: pixels of the side of a square that is painted over; 0 paints none.
        smoothing: share of a label that is spread over all classes.
    """

    phases: tuple[tuple[int, int], ...] = ((3, 16), (3, 24), (2, 32))
    batch_size: int = 512
    lr: float = 0.15
    momentum: float = 0.85
    weight_decay: float = 5e-4
    warmup: float = 0.1
    pad: int = 3
    flip: bool = True
    cutout: int = 0
    smoothing: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One search task.

    Attributes:
        name: also the name of the file in `problems/`.
        build: the untrained teacher, traceable by `torch.fx`.
        load_data: from a data folder (or None for the default one) to the data in memory.
        weights: the trained teacher's file: safetensors, or what `torch.save` wrote.
        weights_key: of the set of weights in it, where it holds several.
        train: how `scripts/train_teacher.py` trains it; None if it cannot.
    """

    name: str
    build: Callable[[], nn.Module]
    load_data: Callable[[Path | None], ImageData]
    weights: Path
    train: TrainConfig | None = TrainConfig()
    weights_key: str | None = None

    @property
    def mirrored(self) -> bool:
        """Whether the teacher saw mirrored images; taken for granted where that is not known."""
        return self.train is None or self.train.flip


def available_tasks() -> list[str]:
    """Names of the modules in `problems/`."""
    spec = importlib.util.find_spec("problems")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


@dataclass(frozen=True)
class OwnTask:
    """A teacher and images that no problem file describes.

    Attributes:
        weights: path of the teacher's weights.
        data: folder of images, one folder a class (see `data.folders.load_image_folder`), or
            arrays (see `data.array_files.load_arrays`).
        size: `(height, width)` that images are brought to.
        channels: 1, 3 or 4.
        mean, std: that the teacher was trained with; None measures them.
        weights_key: which set of weights to take of a file that holds several.
        resize, interpolation, channel_order, exif, shorter_side, fill: how images are prepared;
            see `Preparation`.
        heads: what the network's outputs mean, as `Heads.parse` takes it; empty for a classifier,
            or, of data without labels, fidelity.
        cut: path of the file that says which image is in which split; None cuts anew.
        module_folder: that the module of the network's builder is imported from; None for one that
            is installed, and for a file.
    """

    weights: str
    data: str
    size: tuple[int, int] = (32, 32)
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    weights_key: str | None = None
    resize: str = "squash"
    interpolation: str = "bilinear"
    channel_order: str = "RGB"
    exif: bool = True
    shorter_side: int | None = None
    fill: int = 0
    heads: tuple[str, ...] = ()
    cut: str | None = None
    module_folder: str | None = None

    def __post_init__(self) -> None:
        """Refuse a preparation that cannot be."""
        self.preparation.check_channels(self.channels)

    @property
    def preparation(self) -> Preparation:
        """How images become the network's input."""
        return Preparation(
            self.resize, self.size, self.interpolation, self.channel_order, self.exif,
            self.shorter_side, self.fill,
        )  # fmt: skip

    def load(self, in_memory: bool | None = None, reporter: Reporter | None = None) -> ImageData:
        """The images, prepared, or arrays as they are.

        Raises:
            UserError: as `load_image_folder` and `load_arrays` do; the arguments are the former's.
        """
        heads = Heads.parse(self.heads) if self.heads else None
        if holds_arrays(Path(self.data)):
            return load_arrays(Path(self.data), mean=self.mean, std=self.std, heads=heads)
        return load_image_folder(
            Path(self.data), channels=self.channels, mean=self.mean, std=self.std,
            cut=None if self.cut is None else Cut.read(Path(self.cut)),
            in_memory=in_memory, reporter=reporter, heads=heads, **asdict(self.preparation),
        )  # fmt: skip


def load_task(
    name: str,
    own: OwnTask | None = None,
    in_memory: bool | None = None,
    reporter: Reporter | None = None,
) -> Task:
    """The `TASK` of `problems/<name>.py` or of a Python file, or one made from `MODULE:CALLABLE`.

    A problem file or module is code and is executed: load only what you trust.

    Args:
        name: a problem's name, the path of a file ending in `.py`, or, with `own`, where the
            teacher's builder is: `package.module:build` or `file.py:build`.
        own: weights and data for such a builder.
        in_memory, reporter: of own images, see `load_image_folder`.

    Raises:
        UserError: if there is no such problem, or it defines no `TASK` or builder.
    """
    if builder_of(name)[1]:
        if own is None:
            raise UserError(
                f"{name!r} names a teacher without weights and data; give `weights` and `data`"
            )
        return _own_task(name, own, in_memory, reporter)
    if name.endswith(".py"):
        module = _module_of_file(name)
    else:
        names = available_tasks()
        if name not in names:
            raise UserError(
                f"unknown model {name!r}; expected one of {', '.join(names)}, "
                "or the path of a problem file ending in .py (a run made by moodistill.search is "
                "opened from Python)"
            )
        module = importlib.import_module(f"problems.{name}")
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"problem {name!r} defines no TASK; expected TASK = Task(...)")
    return task


def builder_of(name: str) -> tuple[str, str]:
    """The module or file and the builder that `MODULE:CALLABLE` names; no builder of a problem."""
    if name.endswith(".py") or ":" not in name:  # a path on Windows has a colon, too
        return name, ""
    place, _, builder = name.rpartition(":")
    return place, builder


def module_folder(name: str) -> str | None:
    """The folder that `MODULE:CALLABLE` is imported from, as seen from the current one.

    None for a file, for a module that is installed, and for one that is nowhere.
    """
    place, builder = builder_of(name)
    if not builder or place.endswith(".py"):
        return None
    with _first_on_path(""):
        try:
            spec = importlib.util.find_spec(place.partition(".")[0])
        except (ImportError, ValueError):
            return None
    if spec is None:
        return None
    packages = list(spec.submodule_search_locations or ())
    origin = packages[0] if packages else spec.origin
    if origin is None:
        return None
    folder = Path(origin).resolve().parent
    installed = {"site-packages", "dist-packages"} & set(folder.parts)
    standard = folder == Path(sysconfig.get_path("stdlib")).resolve()
    return None if installed or standard else str(folder)


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Let modules be found in a folder before all others, in the current one if it is empty."""
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _importable(folder: Path) -> None:
    """Let modules in a folder be imported from now on, behind all others of their names."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _module_of_file(name: str) -> ModuleType:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{name} does not exist; expected a Python file")
    # A name of our own: a problem file may be called like a module of somebody else.
    module_name = f"moodistill_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that its classes know where they come from
    _importable(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); run it with python to see "
            "where it fails"
        ) from error
    return module


def _module(place: str, folder: str | None) -> ModuleType:
    """A module of `folder`; None looks into the current one first, as `python -m` does."""
    try:
        with _first_on_path(folder or ""):
            return importlib.import_module(place)
    except ImportError as error:
        was = f"; it was in {folder}" if folder else ""
        raise UserError(
            f"{place} cannot be imported ({error}){was}: give `teacher` as MODULE:CALLABLE in the "
            "folder that the module is in, or as FILE.py:CALLABLE"
        ) from error
    finally:
        _importable(Path(folder) if folder else Path.cwd())


def _own_task(name: str, own: OwnTask, in_memory: bool | None, reporter: Reporter | None) -> Task:
    place, attribute = builder_of(name)
    module = _module_of_file(place) if place.endswith(".py") else _module(place, own.module_folder)
    build = getattr(module, attribute, None)
    if not callable(build):
        raise UserError(f"{place} has no callable {attribute!r}; expected one that gives a network")

    def checked_build() -> nn.Module:
        try:
            network = build()
        except ImportError as error:
            raise UserError(f"{name} cannot build its network ({error})") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"{name} gives a {type(network).__name__}, expected a torch.nn.Module")
        return network

    return Task(
        name=attribute,
        build=checked_build,
        load_data=lambda _: own.load(in_memory, reporter),
        weights=Path(own.weights),
        train=None,
        weights_key=own.weights_key,
    )
