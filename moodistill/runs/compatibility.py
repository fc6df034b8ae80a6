"""What a run is refused for, before it begins or is carried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moodistill.accelerator import AUTO
from moodistill.config import RunConfig
from moodistill.data.digests import former_digest
from moodistill.data.images import ImageData, metric_name
from moodistill.errors import UserError
from moodistill.runs.backend import HERE
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.context import TeacherContext
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.weights import is_other_network, network_digest
from moodistill.training.teacher import accuracy

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster

# Where earlier versions had what is a metric now.
EARLIER_METRICS = {"moodistill.data.fraction_right": "moodistill.data.images.fraction_right"}


def least_accuracy(context: TeacherContext, config: RunConfig) -> float:
    """Two fifths of the way from chance to the teacher, a fraction.

    From below, distillation brings no student to where it is of use. Chance is one class of all
    for accuracy, 0 for other metrics that are known by name, which an answer that is always the
    same gets (about). Where it lies for a metric of the user's is not known: 0 is returned.

    Raises:
        UserError: if the teacher itself has learnt next to nothing.
    """
    data = context.data
    if not data.meaning.known_metric:
        return 0.0
    chance = 1.0 / len(data.labels) if data.by_accuracy else 0.0
    images = data.validation.head(config.recipe.validation_images)
    reached = accuracy(context.solver.module, data, images)
    expected = chance + (0.2 if data.by_accuracy else 0.05) * (1.0 - chance)
    if reached < expected:
        raise UserError(
            f"the teacher itself reaches {data.metric_label} {reached:.4f} on the validation "
            f"images, expected at least {expected:.4f}: are weights, size, mean, std and the "
            "order of the classes those that it was trained with?"
        )
    return round(chance + 0.4 * (reached - chance), 4)


def check_resumed(
    folder: Path, stored: Mapping[str, Any], context: TeacherContext, cluster: Cluster | None
) -> dict[str, float]:
    """Compare teacher, data and devices with those that `run.json` (`stored`) names.

    Returns the teacher's calibrated ms by device.

    Raises:
        UserError: if the run cannot be carried on with them.
    """
    check_origin(folder, stored, context)
    if stored.get("genome_bits") != context.layout.length:
        raise UserError(
            f"{folder} was searched by an earlier version, without kernels and ranks: start a new "
            "run, or go on with that version; choose, report, verify and export work as before"
        )
    place = cluster.config.place if cluster is not None else None
    if stored.get("latency_on") != place:
        raise UserError(
            f"{folder} has latencies of {stored.get('latency_on') or 'this machine'}, not of "
            f"{place or 'this machine'}; resume it with the same `latency_on`"
        )
    scales = stored.get("teacher_latencies_ms")
    devices = (cluster.config.latency_on if cluster is not None else ()) or (HERE,)
    if not isinstance(scales, dict) or not all(
        type(scales.get(name)) in (int, float) and 0 < scales[name] < 1e15 for name in devices
    ):
        raise UserError(
            f"{folder} has teacher_latencies_ms {str(scales)[:40]!r} in run.json, expected "
            f"positive numbers for {', '.join(devices)}: restore run.json from a copy"
        )
    return scales


def device_of_resumed(folder: Path, stored: Mapping[str, Any], asked: str) -> str:
    """The name of the device to carry a run on with: of the kind that `run.json` (`stored`) names.

    Raises:
        UserError: if another kind is asked for.
    """
    known = str(stored.get("computed_on", "cpu"))
    kind = asked.partition(":")[0]
    if kind not in (AUTO, known):
        raise UserError(
            f"{folder} was computed on {known}, not on {kind}, and the answers of two kinds of "
            f"devices differ a little: resume it with `device` {known}, or start a new run"
        )
    return known if kind == AUTO else asked


def check_origin(folder: Path, stored: Mapping[str, Any], context: TeacherContext) -> None:
    """Compare teacher and data with those that `run.json` (`stored`) names.

    Raises:
        UserError: if one of them is another.
    """
    check_data(folder, stored, context.data)
    check_weights(folder, stored, context.task.weights, context.teacher_digest)
    layout, known = context.layout, stored.get("genome_bits")
    if known not in (layout.length, layout.former_length):
        raise UserError(
            f"{folder} was started with a network of {known} genome bits, found one of "
            f"{layout.length}; give the same network"
        )
    check_network(folder, stored, context.graph)


def check_weights(folder: Path, stored: Mapping[str, Any], path: Path, found: str) -> None:
    """Refuse other weights, which are in `path`, than `run.json` (`stored`) names."""
    known = str(stored.get("teacher_digest"))
    if known != found:
        raise UserError(
            f"{folder} was started with another teacher: {path} has digest {found[:12]}, expected "
            f"{known[:12]}; give the same `weights`"
        )


def check_data(folder: Path, stored: Mapping[str, Any], data: ImageData) -> None:
    """Refuse other images, normalisation or metric than `run.json` (`stored`) names."""
    known = str(stored.get("data_digest"))
    # What an earlier version had can be told from the pixels alone, so it is asked last.
    if known != data.digest and (data.table is None or known != former_digest(data)):
        raise UserError(
            f"{folder} was started with other images: {data.folder or data.name} has "
            f"digest {data.digest[:12]}, expected {known[:12]}; give the same, normalised and "
            "prepared alike"
        )
    metric, found = str(stored.get("metric")), metric_name(data)
    if found not in (metric, EARLIER_METRICS.get(metric)):
        raise UserError(
            f"{folder} was started with metric {metric}, found {found}; give the same metric"
        )


def check_network(folder: Path, stored: Mapping[str, Any], graph: TeacherGraph) -> None:
    """Refuse a network that computes something else by the same weights."""
    known = str(stored.get("network_digest"))
    found = network_digest(graph.module)
    if is_other_network(known, found):
        raise UserError(
            f"{folder} was started with another network of the same weights (its forward or its "
            f"layers' options have changed: digest {found.rpartition('/')[2]}, expected "
            f"{known.rpartition('/')[2]}): give the old one, or start a new run"
        )


def compare_devices(folder: Path, before: Any, now: Mapping[str, Mapping[str, Any]]) -> str:
    """Compare fingerprints by name with those that a run in `folder` was started on.

    Returns what is to be said of a smaller difference, empty if there is none.

    Raises:
        UserError: if a processor is another: ratios of two to the teacher's time cannot be mixed.
    """
    notes = []
    for name, device in now.items():
        known = before.get(name) if isinstance(before, Mapping) else None
        if not isinstance(known, Mapping):
            continue
        for part in ("cpu", "simd", "machine"):
            if known.get(part) != device.get(part):
                raise UserError(
                    f"{folder} has latencies of {known.get('cpu')!r}, {name} is now "
                    f"{device.get('cpu')!r} ({part} differs), and the two cannot be mixed: resume "
                    "it there, or start a new run here"
                )
        old, new = known.get("onnxruntime"), device.get("onnxruntime")
        if old != new:
            notes.append(
                f"{name} has ONNX Runtime {new}, {old} when the run was started: latencies may "
                "differ a little"
            )
    return "; ".join(notes)


def check_students(
    folder: Path, store: Store, config: RunConfig, names: Sequence[str], ended: bool
) -> None:
    """Refuse to distil what is no student of a search that has ended."""
    if not ended:
        raise UserError(
            f"the search in {folder} has not ended: carry it on without naming a student first"
        )
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    for name in names:
        if searched is None or name not in searched.students:
            raise UserError(
                f"{folder} has no student {name!r} that works and is within the limits; expected "
                "one of those in pareto.csv"
            )
