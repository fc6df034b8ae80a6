"""A cluster's workers as an executor and a distiller; the driver's side of `remote`'s scoring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moodistill.cluster import tasks as remote
from moodistill.cluster.client import Cluster
from moodistill.cluster.meter import DeviceMeters
from moodistill.errors import UserError
from moodistill.finalists.distil import (
    RESULT_FILE,
    Distiller,
    Finalist,
    finished_before,
    is_better,
    parse_finalist,
    read_finalist,
)
from moodistill.genome.layout import GenomeLayout
from moodistill.io.atomic import write_atomic, write_json_atomic
from moodistill.latency.meter import LatencyError
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.training.distill import DistillConfig

if TYPE_CHECKING:
    from distributed import Future

BATCHES = 4  # students a worker of this machine scores before latencies are measured


class DaskExecutor:
    """Scores students on a cluster's workers.

    With `DeviceMeters` each student goes on to the device as soon as it is scored. Without one
    latencies are measured here: at once if the workers are elsewhere; if they were started on this
    machine, in batches while they rest, since nothing else may run beside a measurement.
    """

    def __init__(
        self,
        cluster: Cluster,
        layout: GenomeLayout,
        setup: remote.ScoreSetup,
        meter: DeviceMeters | None,
        measure: Callable[[bytes, str], Latency] | None,
        score: Callable[[remote.ScoreSetup, bytes], remote.Scored] = remote.score,
    ) -> None:
        self.score = score  # what a worker calls; benchmarks put in one that sleeps
        self.cluster = cluster
        self.layout = layout
        self.setup = setup
        self.meter = meter
        self.measure = measure

    def map(self, genomes: Sequence[np.ndarray]) -> Iterator[tuple[int, Evaluation]]:
        """As `Executor.map`, in the order of finishing."""
        workers = self.cluster.config.workers
        batch = len(genomes) if workers is None else BATCHES * workers
        for start in range(0, len(genomes), max(1, batch)):
            part = genomes[start : start + batch]
            for index, evaluation in self._part(part, rest=workers is not None):
                yield start + index, evaluation

    def _part(self, genomes: Sequence[np.ndarray], rest: bool) -> Iterator[tuple[int, Evaluation]]:
        devices = [meter.resource for meter in self.meter.timing] if self.meter else []
        resources = [remote.STUDENTS, *devices]
        packed = [self.layout.pack(genome) for genome in genomes]
        setups = [self.setup] * len(packed)
        submitted = self.cluster.submit_all(self.score, remote.STUDENTS, setups, packed)
        if self.meter:
            submitted = [self.meter.submit(future) for future in submitted]
        futures = {future: index for index, future in enumerate(submitted)}
        scored: list[tuple[int, remote.Scored]] = []
        try:
            for future, result in self.cluster.results(futures, resources):
                index = futures[future]
                found = self._found(result, genomes[index])
                if isinstance(found, Evaluation):
                    yield index, found
                elif rest:
                    scored.append((index, found))
                else:
                    yield index, self._timed(found)
        finally:
            self.cluster.client.cancel(list(futures))
        for index, one in sorted(scored, key=lambda pair: pair[0]):
            yield index, self._timed(one)

    def _found(self, found: Any, genome: np.ndarray) -> Evaluation | remote.Scored:
        if isinstance(found, remote.WorkerMismatch):
            raise found
        if isinstance(found, Exception):
            # A student that takes its worker with it again and again is a row with a reason.
            lines = str(found).strip().splitlines() or [""]
            failure = f"{type(found).__name__}: {lines[0][:200]}"
            return Evaluation(
                self.layout.digest(genome), self.layout.pack(genome), 0.0, 0, 0, 0, None,
                failure=failure,
            )  # fmt: skip
        assert isinstance(found, Evaluation | remote.Scored)
        if isinstance(found, remote.Scored) and found.evaluation.failure is not None:
            return found.evaluation
        return found

    def _timed(self, one: remote.Scored) -> Evaluation:
        assert self.measure is not None
        began = time.perf_counter()
        try:
            latency = self.measure(one.model, one.key)
        except LatencyError as error:
            failure = f"LatencyError: {error}"
            return replace(one.evaluation, accuracy=0.0, failure=failure)
        seconds = one.evaluation.seconds | {"latency": time.perf_counter() - began}
        return replace(one.evaluation, latency=latency, seconds=seconds)


def distil_there(cluster: Cluster, setup: remote.ScoreSetup, config: DistillConfig) -> Distiller:
    """Distils finalists side by side on a cluster's workers; their files come back."""

    def distil(
        students: Mapping[str, Evaluation], folder: Path, report: Callable[[str, int, float], None]
    ) -> Iterator[tuple[str, Finalist | Exception]]:
        futures: dict[Future, str] = {}
        for name, evaluation in students.items():
            before = finished_before(folder / name, evaluation, config)
            if before is not None:
                yield name, before
            else:
                future = cluster.submit(remote.distil, remote.STUDENTS, setup, evaluation, name)
                futures[future] = name
        try:
            for future, found in cluster.results(futures, [remote.STUDENTS]):
                name = futures[future]
                if isinstance(found, remote.WorkerMismatch):
                    raise found
                if isinstance(found, Exception):
                    # Also one that takes its worker with it again and again.
                    yield name, found
                    continue
                result = _keep(folder / name, found)
                yield name, result or UserError("its worker sent no complete result")
        finally:
            cluster.client.cancel(list(futures))

    return distil


def _keep(folder: Path, files: Mapping[str, bytes]) -> Finalist | None:
    """Write a finalist's files, the result last, unless an earlier one is better."""
    earlier, found = read_finalist(folder), parse_finalist(files.get(RESULT_FILE, b""))
    if earlier and found and is_better(earlier, found.genome_hash, found.accuracy):
        found = replace(earlier, budget=found.budget)
        write_json_atomic(folder / RESULT_FILE, asdict(found))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == RESULT_FILE):
        write_atomic(folder / Path(name).name, files[name])
    return read_finalist(folder)
