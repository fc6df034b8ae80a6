"""The Python interface: search, open a run, choose, take a student out.

import moodistill

run = moodistill.search(network, train, validation, test, out="results/mine")
student = run.choose(max_latency_ms=2.0)
network = student.to_torch()
student.export("my_student")
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.accelerator import AUTO
from moodistill.bundle.int8 import Int8Config
from moodistill.bundle.model import ShipOptions
from moodistill.config import Budget, RunConfig, new_config, refuse_changes
from moodistill.data.arrays import arrays_of, from_arrays, is_array, split_of_arrays
from moodistill.data.datasets import from_datasets, from_splits
from moodistill.data.images import ImageData, Metric, fraction_right
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError
from moodistill.io.cache import default_cache_dir
from moodistill.io.tensorfile import save_atomic
from moodistill.latency.device import check_provider
from moodistill.latency.meter import LatencyConfig
from moodistill.latency.simd import probe_simd
from moodistill.pareto import choose
from moodistill.pareto import table as front
from moodistill.pareto.objectives import Limits
from moodistill.pareto.table import SUFFIX, FrontRow
from moodistill.progress import Mode, Reporter, make_reporter
from moodistill.runs.backend import Places
from moodistill.runs.export import export_student, rebuild_student
from moodistill.runs.moved import moved_config
from moodistill.runs.run import resume_run, start_run
from moodistill.settings import Settings, flat
from moodistill.storage.folder import RUN_FILE
from moodistill.teacher.blocks import LayerRules
from moodistill.teacher.plain import copied, refuse_unready
from moodistill.teacher.task import Task
from moodistill.teacher.weights import read_state

TEACHER_FILE = "teacher.safetensors"


@dataclass(frozen=True)
class RunStudent:
    """One student of a run's front.

    Attributes:
        run: that it belongs to.
        row: what was measured; see `front.FrontRow`.
        reason: why it was chosen, empty if it was asked for by name.
    """

    run: Run
    row: FrontRow
    reason: str = ""

    def to_torch(self) -> fx.GraphModule:
        """The network, normalised inputs `(N, C, ...)` to logits, in eval mode.

        Several outputs come in a dict by their names.

        Distilled weights if it was distilled, else the inherited ones. Of an INT8 student this is
        the float one that it was made from.
        """
        return rebuild_student(self.run.folder, self.row.student, self.run.task).student.module

    def distil(self, steps: int, progress: Mode = "auto") -> RunStudent:
        """Distil it for `steps` steps and make it a finalist; returns it as measured then.

        Raises:
            UserError: if the run's search has not ended.
        """
        name = self.row.student.removesuffix(SUFFIX)
        budget = Budget(distill_steps=steps, students=(name,))
        resume_run(self.run.folder, budget, Places(), make_reporter(progress), self.run.task)
        return self.run.student(name)

    def export(
        self,
        out: str | Path,
        *,
        input: str = "uint8",
        softmax: bool = False,
        int8: bool = False,
        opset: int | None = None,
        batch: int | None = None,
    ) -> Path:
        """Write a bundle; returns the path of its `model.onnx`.

        Args:
            out: the folder.
            input: `uint8` or `float32` pixels from 0 to 255, or `normalised` images.
            softmax: probabilities instead of logits.
            int8: quantise, if that is faster on the run's device.
            opset: of the file; None for the lowest that its operations need.
            batch: images that the file takes at once; None leaves that free.

        Raises:
            UserError: if the file does not pass the comparison with torch, or INT8 is no gain.
        """
        options = ShipOptions(input, softmax, opset, batch)
        return export_student(
            self.run.folder, self.row.student, Path(out), options, int8, task=self.run.task
        ).path

    def _repr_html_(self) -> str:
        reason = f"<p>{html.escape(self.reason)}</p>" if self.reason else ""
        return reason + _html_table([self.row])


@dataclass(frozen=True)
class Run:
    """A run's folder and its task."""

    folder: Path
    task: Task

    @property
    def front(self) -> list[FrontRow]:
        """The teacher, the finalists and the rest of the front."""
        return front.read_front(self.folder)

    def student(self, name: str) -> RunStudent:
        """A student of the front by its id.

        Raises:
            UserError: if there is none.
        """
        rows = {row.student: row for row in self.front if row.stage != "teacher"}
        if name not in rows:
            raise UserError(f"unknown student {name!r}; expected one of {', '.join(rows)}")
        return RunStudent(self, rows[name])

    def choose(
        self,
        *,
        max_latency_ms: float | None = None,
        max_parameters: float | None = None,
        min_accuracy: float | None = None,
        max_size_bytes: float | None = None,
        knee: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> RunStudent:
        """The most accurate student within limits, the knee of those, or the best weighted sum.

        Raises:
            UserError: if no student keeps the limits; says how close the best comes.
        """
        limits = choose.Constraints(max_latency_ms, max_parameters, min_accuracy, max_size_bytes)
        rows = self.front
        if knee:
            choice = choose.knee(rows, limits)
        elif weights is not None:
            choice = choose.weighted(rows, weights, limits)
        else:
            choice = choose.choose(rows, limits)
        reason = f"{choice.reason}; against the teacher: {choice.gives_up}"
        return RunStudent(self, choice.student, reason)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self.folder))}</p>{_html_table(self.front)}"


def search(
    teacher: nn.Module,
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    out: str | Path,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: Metric = fraction_right,
    preparation: Preparation | None = None,
    heads: Any = None,
    inputs: str | None = None,
    preset: str | None = None,
    generations: int | None = None,
    finalists: int | None = None,
    distill_steps: int | None = None,
    calibration_images: int | None = None,
    score_images: int | None = None,
    population: int | None = None,
    seed: int | None = None,
    objectives: Sequence[str] | None = None,
    algorithm: str | None = None,
    screen: int | None = None,
    seeded: float | None = None,
    finalists_within: float | None = None,
    connections: Sequence[str] | None = None,
    simd_step: int | None = None,
    limits: Limits | None = None,
    latency: LatencyConfig | None = None,
    int8: Int8Config | None = None,
    rules: LayerRules | None = None,
    flip: bool | None = None,
    device: str = AUTO,
    images_in_memory: bool | None = None,
    progress: Mode = "auto",
) -> Run:
    """Search for a front of smaller networks than `teacher`; carries on a run that `out` holds.

    Args:
        teacher: a trained network, traceable by `torch.fx`; it is not changed.
        train, validation, test: map-style datasets of `(image, label)` (see
            `from_datasets`) or of images alone, or pairs of a uint8 array `(N, H, W, C)` and labels
            `(N,)`, or arrays without labels. Signals, volumes and other inputs that are no pictures
            come as floats `(N, C, *size)`, from datasets with `inputs="arrays"`.
            `train` calibrates and distils, `validation` scores and chooses, `test` chooses
            nothing (None takes half of `validation` for it). Or `train` alone: an `ImageData`, as
            `load_image_folder` gives it, with its labels, normalisation and metric.
        out: the run's folder. The teacher's weights are kept beside it, in
            `<out>.teacher.safetensors`. Of a run that it holds already only the budget may change
            (`preset` and the next three).
        labels: names of the classes.
        mean, std: of each channel of pixels in [0, 1], as the teacher was trained with; None
            measures them on `train`.
        metric: `(logits (n, classes), labels (n,)) -> [0, 1]`, larger is better, in place of
            accuracy everywhere.
        preparation: how the datasets prepare the images of files; None reads it from
            torchvision's transforms (see `from_datasets`). Where it is not known, a shipped
            `run.py` takes images of exactly the input's size alone.
        heads: what the network's outputs mean: a `Head` or its kind (`classification`,
            `segmentation`, `multilabel`, `regression`, `fidelity`), or a dict of them by the names
            of several outputs (a tuple's are `output_0`, ...). None is a classifier; without
            labels, and for outputs that are not named, students are compared with the teacher's
            own outputs.
        inputs: `pictures` or `arrays`; None takes uint8 and what looks like images as pictures,
            other arrays as they are.
        preset: `quick` (the default of a new run), `standard` or `thorough`; the next three replace
            its numbers.
        generations, finalists, distill_steps: of the search and of its finalists.
        calibration_images: training images that every student is solved on (512).
        score_images: validation images that every student is scored on (1,000).
        population: students a generation (32).
        seed: of the search (0).
        objectives: `accuracy` and some of `parameters`, `latency`, `macs`, `size`, `memory` (the
            first three).
        algorithm: `nsga2` (default), `nsga3` or `sms`.
        screen: a surrogate pre-selects 1 in this many offspring (24); 1 disables it.
        seeded: share of the first generation from tables of single changes (0.75).
        finalists_within: accuracy that a finalist may lack before it is distilled (0.1).
        connections: kinds that are searched, of `kernels`, `ranks`, `merges`, `bypasses` and
            `blocks` (`merges` and `bypasses`).
        simd_step: channels per SIMD block; None probes this device.
        limits: hard ones (None in them, of a run that is carried on: as it has them).
        latency: threads, batch and execution provider.
        int8: whether and when finalists get an INT8 twin.
        rules: layers to leave alone, modules not to look into, and bounds of widths.
        flip: whether finalists are distilled on mirrored images, too (yes); not for text.
        device: that students are solved, scored and distilled on: `cpu`, `cuda`, `cuda:N`, `mps`
            or `xpu`; `auto` takes an accelerator that is there. Latency is measured on the CPU.
        images_in_memory: whether datasets are held in memory, or read whenever an image is needed;
            None holds them where they take at most a quarter of it.
        progress: `auto`, `plain`, `json` or `quiet`.

    Raises:
        UserError: if the network, the data or a setting cannot be used, or `out` holds a run of
            others; one line says why.
    """
    refuse_unready(teacher)
    reporter = make_reporter(progress)
    try:
        data = _image_data(
            train, validation, test, labels, mean, std, metric, preparation, heads, inputs,
            images_in_memory, reporter,
        )  # fmt: skip
    except BaseException:
        reporter.close()  # it may have shown how far the reading of the images is
        raise
    settings = Settings(
        preset=preset, generations=generations, finalists=finalists, distill_steps=distill_steps,
        calibration_images=calibration_images, score_images=score_images,
        population=population, seed=seed, objectives=_tuple(objectives), algorithm=algorithm,
        screen=screen, seeded=seeded, finalists_within=finalists_within,
        connections=_tuple(connections), simd_step=simd_step, flip=flip,
        **flat(limits=limits, latency=latency, int8=int8, rules=rules),
    )  # fmt: skip
    folder, weights = Path(out), _weights_beside(Path(out))
    task = Task(
        name=type(teacher).__name__,
        build=_copies_of(teacher),
        load_data=lambda _: data,
        weights=weights,
        train=None,
    )
    if (folder / RUN_FILE).is_file():
        refuse_changes(RunConfig.read(folder), settings, folder)
        _refuse_another(teacher, weights)
        resume_run(folder, Budget.of(settings), Places(device=device), reporter, task)
        return Run(folder, task)
    save_atomic({k: v.clone() for k, v in teacher.state_dict().items()}, weights)
    latency = latency or LatencyConfig()
    check_provider(latency.provider)
    if simd_step is None:
        settings = replace(settings, simd_step=probe_simd(latency, default_cache_dir()).step)
    start_run(new_config(task.name, settings), folder, Places(device=device), reporter, task)
    return Run(folder, task)


def _tuple(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _weights_beside(out: Path) -> Path:
    """Where the teacher's weights of the run in `out` are kept."""
    place = out.resolve()
    return place.with_name(f"{place.name}.{TEACHER_FILE}")


def _refuse_another(teacher: nn.Module, weights: Path) -> None:
    """Refuse a teacher with other weights than those in the file of a run that is carried on."""
    if not weights.is_file():
        return  # what reads it says so
    kept, given = read_state(weights), teacher.state_dict()
    same = kept.keys() == given.keys() and all(torch.equal(kept[k], given[k].cpu()) for k in kept)
    if not same:
        raise UserError(
            f"the teacher has other weights than {weights}, with which the run was started; give "
            "those, or another out"
        )


def open_run(
    folder: str | Path,
    task: Task | None = None,
    *,
    network: str | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> Run:
    """A run made before on the command line, or, with its `task`, by `search`.

    Whether what is given is the run's is told by digests when it is first used.

    Args:
        folder: the run's, wherever it lies now.
        task: None loads the one that it was started with.
        network: where that was a file or a module: the `MODULE:CALLABLE`, `FILE.py:CALLABLE` or
            problem file, if it lies elsewhere now.
        weights: file of the teacher's weights, likewise.
        data: folder of images of your own, likewise.
        data_dir: folder of a problem's data.

    Raises:
        UserError: if the folder is no run, or something that its task needs is not there.
    """
    folder = Path(folder)
    config = RunConfig.read(folder)
    places = Places(network, _path(data), _path(weights), data_dir=_path(data_dir))
    if task is not None:
        if places != Places():
            raise UserError("a task names its network, weights and data itself; give it alone")
        return Run(folder, task)
    task = moved_config(folder, config, places).task()
    load, there = task.load_data, places.data_dir
    return Run(folder, task if there is None else replace(task, load_data=lambda _: load(there)))


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)


def _copies_of(teacher: nn.Module) -> Callable[[], nn.Module]:
    kept = copied(teacher).cpu().eval()
    return lambda: copied(kept)


def _image_data(
    train: Any,
    validation: Any,
    test: Any,
    labels: Any,
    mean: Any,
    std: Any,
    metric: Metric,
    preparation: Preparation | None,
    heads: Any = None,
    inputs: str | None = None,
    in_memory: bool | None = None,
    reporter: Reporter | None = None,
) -> ImageData:
    if inputs not in (None, "pictures", "arrays"):
        raise UserError(f"inputs is {inputs!r}; expected pictures or arrays")
    if isinstance(train, ImageData):
        others = (validation, test, labels, mean, std, preparation, heads, inputs)
        if any(one is not None for one in others) or metric is not fraction_right:
            raise UserError(
                "an ImageData has all splits, labels, normalisation, metric, heads and preparation "
                "itself; give it alone"
            )
        return train
    if validation is None:
        raise UserError("validation is not given; expected a dataset, or an ImageData as train")
    given = {"train": train, "validation": validation, "test": test}
    given = {name: one for name, one in given.items() if one is not None}
    held = [is_array(one) or (isinstance(one, tuple) and len(one) == 2) for one in given.values()]
    if any(held) and not all(held):
        raise UserError("give all splits as arrays, or all as datasets")
    if not any(held):
        if inputs != "arrays":
            return from_datasets(
                train, validation, test, labels=labels, mean=mean, std=std, metric=metric,
                preparation=preparation, heads=heads, in_memory=in_memory, reporter=reporter,
            )  # fmt: skip
        splits = {name: arrays_of(one, name) for name, one in given.items()}
    else:
        splits = {name: split_of_arrays(one, name, inputs) for name, one in given.items()}
        pixels = all(s.images.dtype == np.uint8 and s.images.ndim == 4 for s in splits.values())
        if pixels and inputs != "arrays":
            return from_splits(
                "own", splits, labels, mean, std, metric, preparation, heads=heads
            )  # fmt: skip
    if preparation is not None:
        raise UserError("a preparation is of pictures; leave it out for arrays")
    return from_arrays("own", splits, labels, mean, std, metric, heads)


def _html_table(rows: Sequence[FrontRow]) -> str:
    metric = rows[0].metric if rows else "accuracy"
    head = ("student", "stage", metric, "test", "parameters", "latency, ms", "x faster")
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in rows:
        test = "" if row.test_accuracy is None else f"{row.test_accuracy:.4f}"
        cells = (
            row.student, row.stage, f"{row.validation_accuracy:.4f}", test,
            f"{row.parameters:,}", f"{row.latency_ms:.4g}",
            f"{row.teacher_latency_ms / row.latency_ms:.2f}",
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
