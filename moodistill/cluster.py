"""Dask's workers as an executor and as a latency meter; the driver's side of `remote`."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moodistill import __version__, remote
from moodistill.distill import DistillConfig
from moodistill.errors import UserError
from moodistill.evaluation import Evaluation, Latency
from moodistill.files import write_atomic
from moodistill.finalists import RESULT_FILE, Distiller, Finalist, finished_before, read_finalist
from moodistill.genome import GenomeLayout
from moodistill.latency import CONFIRMED_ROUNDS, LatencyConfig, LatencyError, timed_together

if TYPE_CHECKING:
    from distributed import Client, Future

BATCHES = 4  # students a worker of this machine scores before latencies are measured
LOOK_SECONDS = 1.0  # between two looks at which workers are there


@dataclass(frozen=True)
class ClusterConfig:
    """Where students are scored and timed.

    Attributes:
        workers: processes to start on this machine; None if `scheduler` is given.
        scheduler: address of a running Dask scheduler, `tcp://...` or `tls://...`.
        latency_on: names of devices that time models; none times them on this machine. The first
            one's latency is the objective, the others' are measured for the exported front.
        worst_latency: the objective is the largest latency over all devices instead.
        tls_ca, tls_cert, tls_key: PEM files of a TLS connection.
        patience_s: how long nobody may be there to do a task before the run says so.
        wait: whether the run then waits on; else it stops and can be resumed.
    """

    workers: int | None = None
    scheduler: str | None = None
    latency_on: tuple[str, ...] = ()
    worst_latency: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    patience_s: float = 60.0
    wait: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if (self.workers is None) == (self.scheduler is None):
            raise UserError("give either --workers N (processes here) or --scheduler ADDRESS")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; expected a whole number of at least 1")
        if self.latency_on and self.scheduler is None:
            raise UserError(
                "--latency-on names a worker of a running scheduler: give its --scheduler ADDRESS"
            )
        names = self.latency_on
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", n) for n in names):
            raise UserError(
                f"--latency-on is {','.join(names)!r}; expected different names of letters, "
                "digits, dots, dashes and underscores, with commas between them"
            )
        if self.worst_latency and len(names) < 2:
            raise UserError("--worst-latency is over several devices: give --latency-on NAME,NAME")
        given = [p for p in (self.tls_ca, self.tls_cert, self.tls_key) if p is not None]
        if given and len(given) != 3:
            raise UserError("TLS needs all three of --tls-ca, --tls-cert and --tls-key")
        for path in given:
            if not path.is_file():
                raise UserError(f"{path} does not exist; expected a PEM file")
        encrypted = (self.scheduler or "").startswith("tls://")
        if given and not encrypted:
            raise UserError(f"with TLS the scheduler is tls://..., not {self.scheduler}")
        if encrypted and not given:
            raise UserError(
                f"{self.scheduler} asks for certificates; give --tls-ca, --tls-cert and --tls-key"
            )

    @property
    def place(self) -> str | None:
        """Where latencies are of, in words; a resumed run must have the same."""
        names = ",".join(self.latency_on)
        return f"the worst of {names}" if self.worst_latency else names or None


@contextmanager
def connect(config: ClusterConfig, say: Callable[[str], None]) -> Iterator[Cluster]:
    """Workers to score on, started here or found at the scheduler's address.

    Raises:
        UserError: if Dask is not installed, nobody answers, or a worker has another version.
    """
    try:
        from distributed import Client, LocalCluster, Security
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; install with: pip install 'moodistill[distributed]'"
        ) from error
    if config.scheduler is None:
        # On loopback: nothing listens beyond this machine unless a scheduler of the user's does.
        local = LocalCluster(
            n_workers=config.workers, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address=None, resources={remote.STUDENTS: 1}, memory_limit=0,
            silence_logs="CRITICAL",
        )  # fmt: skip
        with local, Client(local) as client:
            yield Cluster(client, config, say)
        return
    security = None
    if config.tls_ca is not None:
        security = Security(
            tls_ca_file=str(config.tls_ca), tls_client_cert=str(config.tls_cert),
            tls_client_key=str(config.tls_key), require_encryption=True,
        )  # fmt: skip
    try:
        client = Client(config.scheduler, security=security, timeout=20)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Dask scheduler answers at {config.scheduler} ({error}); start one with: "
            "dask scheduler"
        ) from error
    with client:
        yield Cluster(client, config, say)


class Cluster:
    """The workers of one run."""

    def __init__(self, client: Client, config: ClusterConfig, say: Callable[[str], None]) -> None:
        self.client = client
        self.config = config
        self.say = say
        for resource in (remote.STUDENTS, *(remote.DEVICE + name for name in config.latency_on)):
            self._wait_for(resource)
        self._check_versions()

    def resources(self) -> dict[str, int]:
        """How many workers there are with each resource."""
        found: dict[str, int] = {}
        for worker in self.client.scheduler_info(n_workers=-1)["workers"].values():
            for name in worker["resources"]:
                found[name] = found.get(name, 0) + 1
        return found

    def _wait_for(self, resource: str) -> None:
        end = time.monotonic() + self.config.patience_s
        while resource not in (found := self.resources()):
            if time.monotonic() > end:
                raise UserError(
                    f"no worker with the resource {resource!r} within {self.config.patience_s:g} s "
                    f"(found: {', '.join(sorted(found)) or 'none'}); start one with: dask worker "
                    f'{self.config.scheduler} --nthreads 1 --resources "{resource}=1"'
                )
            time.sleep(0.2)

    def _check_versions(self) -> None:
        def version() -> str:
            import moodistill

            return moodistill.__version__

        names = self.client.scheduler_info(n_workers=-1)["workers"]
        for address, found in self.client.run(version, on_error="return").items():
            if found != __version__:
                name = names[address]["name"] if address in names else "?"
                said = found if isinstance(found, str) else f"none ({found})"
                raise UserError(
                    f"worker {name} at {address} has moodistill {said}, this machine has "
                    f"{__version__}; install the same there"
                )

    def probe_step(self, config: LatencyConfig) -> int:
        """Channels per SIMD block of the device that counts; the widest of all if the worst does.

        A width that is a multiple of the widest is one of the others' too: all are powers of two.
        """
        names = self.config.latency_on
        steps = []
        for name in names if self.config.worst_latency else names[:1]:
            resource = remote.DEVICE + name
            future = self._submit(remote.probe_step, resource, __version__, config)
            steps.append(int(self.result(future, resource)))
        return max(steps)

    def _submit(self, function: Callable[..., Any], resource: str, *arguments: Any) -> Future:
        # pure=False: two students may be alike to Dask, and a latency is never the same twice.
        return self.client.submit(function, *arguments, resources={resource: 1}, pure=False)

    def result(self, future: Future, resource: str) -> Any:
        """A task's result; refuses or waits while nobody is there to do it."""
        for _ in self.finished({future: None}, [resource]):
            pass
        return future.result()

    def finished(self, futures: Mapping[Future, Any], resources: Sequence[str]) -> Iterator[Future]:
        """Futures as they end; says so if nobody is there to do them.

        Raises:
            UserError: after `patience_s` without a worker of one of the resources, unless the
                configuration says to wait.
        """
        from distributed import wait

        pending = set(futures)
        gone: dict[str, float] = {}
        said: set[str] = set()
        while pending:
            try:
                done = wait(pending, timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                done = set()
            for future in done:
                pending.discard(future)
                yield future
            if not done:
                self._look(resources, gone, said)

    def _look(self, resources: Sequence[str], gone: dict[str, float], said: set[str]) -> None:
        found = self.resources()
        for resource in resources:
            if resource in found:
                gone.pop(resource, None)
                if resource in said:
                    said.discard(resource)
                    self.say(f"a worker with the resource {resource!r} is back")
                continue
            since = gone.setdefault(resource, time.monotonic())
            if time.monotonic() - since < self.config.patience_s or resource in said:
                continue
            message = f"no worker with the resource {resource!r} for {self.config.patience_s:g} s"
            if not self.config.wait:
                raise UserError(
                    f"{message}; everything so far is kept: start one and carry on with --resume"
                )
            said.add(resource)
            self.say(f"{message}; waiting for one")


class RemoteMeter:
    """One named device: models go there as ONNX bytes, raw timings come back.

    Attributes:
        teacher_latency_ms: the calibrated time of the teacher on the device.
        device: its fingerprint.
        rejected_windows: windows timed again because the teacher's time drifted.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        reference: bytes,
        input_shape: tuple[int, int, int],
        config: LatencyConfig,
        teacher_latency_ms: float | None,
    ) -> None:
        self.cluster = cluster
        self.resource = remote.DEVICE + name
        self.rejected_windows = 0
        # One copy on the device, not one a task; as a task's result it is made again where a
        # device that was gone comes back (scattered data would be lost).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is large
            self.reference = cluster._submit(remote.hold, self.resource, reference)
        setup = remote.TimeSetup(__version__, input_shape, config, teacher_latency_ms)
        future = cluster._submit(remote.calibrate, self.resource, setup, self.reference)
        scale, self.device = cluster.result(future, self.resource)
        self.teacher_latency_ms = float(scale)
        self.setup = replace(setup, teacher_latency_ms=self.teacher_latency_ms)

    def submit(self, scored: Future) -> Future:
        """A task that adds the latency to a scored student, from worker to worker."""
        return self.cluster._submit(
            remote.time_model, self.resource, self.setup, self.reference, scored
        )

    def confirm(self, files: Mapping[str, bytes], rounds: int) -> Future:
        """A task that times several models side by side."""
        return self.cluster._submit(
            remote.confirm_models, self.resource, self.setup, self.reference, dict(files), rounds
        )


class DeviceMeters:
    """`LatencyMeter` on the named devices of a cluster.

    Attributes:
        device: fingerprint of the first device.
        elsewhere: latencies that `confirm` found, by device and model; empty if there is one
            device alone.
    """

    def __init__(
        self,
        cluster: Cluster,
        reference: bytes,
        input_shape: tuple[int, int, int],
        config: LatencyConfig,
        calibrated: Mapping[str, float] | None,
    ) -> None:
        self.cluster = cluster
        self.meters = {
            name: RemoteMeter(
                cluster, name, reference, input_shape, config, (calibrated or {}).get(name)
            )
            for name in cluster.config.latency_on
        }
        self.first = next(iter(self.meters.values()))
        self.device = self.first.device
        self.elsewhere: dict[str, dict[str, Latency]] = {}

    @property
    def timing(self) -> list[RemoteMeter]:
        """The devices that the search waits for."""
        return list(self.meters.values()) if self.cluster.config.worst_latency else [self.first]

    @property
    def teacher_latency_ms(self) -> float:
        """The calibrated time of the teacher, as the objective has it."""
        return max(meter.teacher_latency_ms for meter in self.timing)

    @property
    def rejected_windows(self) -> int:
        """Windows timed again because the teacher's time drifted."""
        return sum(meter.rejected_windows for meter in self.meters.values())

    def submit(self, scored: Future) -> Future:
        """A task that adds the objective's latency to a scored student, from worker to worker."""
        timed = [meter.submit(scored) for meter in self.timing]
        if len(timed) == 1:
            return timed[0]
        return self.cluster._submit(remote.slowest, self.first.resource, timed)

    def confirm(
        self,
        models: Mapping[str, Callable[[], bytes]],
        rounds: int = CONFIRMED_ROUNDS,
        report: Callable[[int], None] | None = None,
    ) -> dict[str, Latency]:
        """As `LatencyMeter.confirm`, on all devices at once."""
        found: dict[str, dict[str, Latency]] = {name: {} for name in self.meters}
        for files in timed_together(models, seed=0):
            futures = {name: meter.confirm(files, rounds) for name, meter in self.meters.items()}
            for name, future in futures.items():
                meter = self.meters[name]
                latencies, rejected = self.cluster.result(future, meter.resource)
                meter.rejected_windows += rejected
                found[name] |= latencies
            if report is not None:
                report(len(found[name]))
        if len(self.meters) > 1:
            self.elsewhere = found
        objective = [found[name] for name, meter in self.meters.items() if meter in self.timing]
        return {
            model: max((one[model] for one in objective), key=lambda latency: latency.latency_ms)
            for model in models
        }

    def close(self) -> None:
        """Nothing to end here: the devices' processes stay for the next run."""

    def __enter__(self) -> DeviceMeters:  # noqa: D105
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        self.close()


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
        futures: dict[Future, int] = {}
        devices = [meter.resource for meter in self.meter.timing] if self.meter else []
        resources = [remote.STUDENTS, *devices]
        for index, genome in enumerate(genomes):
            packed = self.layout.pack(genome)
            future = self.cluster._submit(self.score, remote.STUDENTS, self.setup, packed)
            futures[self.meter.submit(future) if self.meter else future] = index
        scored: list[tuple[int, remote.Scored]] = []
        try:
            for future in self.cluster.finished(futures, resources):
                index = futures[future]
                found = self._found(future, genomes[index])
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

    def _found(self, future: Future, genome: np.ndarray) -> Evaluation | remote.Scored:
        try:
            found = future.result()
        except remote.WorkerMismatch:
            raise
        except Exception as error:
            # A student that takes its worker with it again and again is a row with a reason.
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0][:200]}"
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
                future = cluster._submit(remote.distil, remote.STUDENTS, setup, evaluation, name)
                futures[future] = name
        try:
            for future in cluster.finished(futures, [remote.STUDENTS]):
                name = futures[future]
                try:
                    files = future.result()
                except remote.WorkerMismatch:
                    raise
                except Exception as error:
                    # Also one that takes its worker with it again and again.
                    yield name, error
                    continue
                result = _keep(folder / name, files)
                yield name, result or UserError("its worker sent no complete result")
        finally:
            cluster.client.cancel(list(futures))

    return distil


def _keep(folder: Path, files: Mapping[str, bytes]) -> Finalist | None:
    """Write a finalist's files, the result last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == RESULT_FILE):
        write_atomic(folder / Path(name).name, files[name])
    return read_finalist(folder)
