"""A run's Dask workers: found or started, checked, waited for; the driver's side of `remote`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moodistill.cluster import tasks as remote
from moodistill.errors import UserError
from moodistill.latency.meter import LatencyConfig, LatencyError
from moodistill.version import __version__

if TYPE_CHECKING:
    from distributed import Client, Future

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
            raise UserError("give either `workers` (processes here) or a `scheduler` (an address)")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"`workers` is {self.workers}; expected a whole number of at least 1")
        if self.latency_on and self.scheduler is None:
            raise UserError(
                "`latency_on` names a worker of a running scheduler: give the `scheduler` too"
            )
        names = self.latency_on
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", n) for n in names):
            raise UserError(
                f"`latency_on` is {','.join(names)!r}; expected different names of letters, "
                "digits, dots, dashes and underscores, with commas between them"
            )
        if self.worst_latency and len(names) < 2:
            raise UserError("`worst_latency` is over several devices: name them by `latency_on`")
        given = [p for p in (self.tls_ca, self.tls_cert, self.tls_key) if p is not None]
        if given and len(given) != 3:
            raise UserError("TLS needs all three of `tls_ca`, `tls_cert` and `tls_key`")
        for path in given:
            if not path.is_file():
                raise UserError(f"{path} does not exist; expected a PEM file")
        encrypted = (self.scheduler or "").startswith("tls://")
        if given and not encrypted:
            raise UserError(f"with TLS the scheduler is tls://..., not {self.scheduler}")
        if encrypted and not given:
            raise UserError(
                f"{self.scheduler} asks for certificates; give `tls_ca`, `tls_cert` and `tls_key`"
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
            from moodistill import version

            return version.__version__

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
            future = self.submit(remote.probe_step, resource, __version__, config)
            try:
                steps.append(int(self.result(future, resource)))
            except LatencyError as error:
                raise UserError(f"{name} cannot be timed: {error}") from error
        return max(steps)

    def submit(self, function: Callable[..., Any], resource: str, *arguments: Any) -> Future:
        """A task for a worker with a resource."""
        # pure=False: two students may be alike to Dask, and a latency is never the same twice.
        return self.client.submit(function, *arguments, resources={resource: 1}, pure=False)

    def submit_all(
        self, function: Callable[..., Any], resource: str, *columns: Sequence[Any]
    ) -> list[Future]:
        """As `submit` for many at once, which costs the driver a fraction of as many calls."""
        return self.client.map(function, *columns, resources={resource: 1}, pure=False)

    def result(self, future: Future, resource: str) -> Any:
        """A task's result; refuses or waits while nobody is there to do it."""
        ((_, found),) = self.results([future], [resource])
        if isinstance(found, UserError | LatencyError):
            raise found
        if isinstance(found, Exception):
            lines = str(found).strip().splitlines() or [""]
            raise LatencyError(
                f"a worker with the resource {resource!r} failed: {type(found).__name__}: "
                f"{lines[0][:200]}"
            ) from found
        return found

    def results(
        self, futures: Collection[Future], resources: Sequence[str]
    ) -> Iterator[tuple[Future, Any]]:
        """Futures with their results or exceptions, as they end; says so if nobody does them.

        Raises:
            UserError: after `patience_s` without a worker of one of the resources, unless the
                configuration says to wait.
        """
        from distributed import CancelledError, wait

        pending = set(futures)
        gone: dict[str, float] = {}
        said: set[str] = set()
        while pending:
            try:
                done = wait(pending, timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                done = set()
            except CancelledError as error:
                raise UserError(
                    "the scheduler was restarted or its connection lost; everything so far is "
                    "kept: resume the run"
                ) from error
            pending -= done
            yield from self._gathered(done)
            if not done:
                self._look(resources, gone, said)

    def _gathered(self, done: Collection[Future]) -> Iterator[tuple[Future, Any]]:
        """Results fetched together, since each fetch is a journey of its own; else the errors."""
        good = [future for future in done if future.status == "finished"]
        try:
            found = self.client.gather(good)
        except Exception:
            # A result was lost with its worker and could not be made again: one by one, then.
            good, found = [], []
        yield from zip(good, found, strict=True)
        for future in set(done) - set(good):
            try:
                yield future, future.result()
            except Exception as error:
                yield future, error

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
                    f"{message}; everything so far is kept: start one and resume the run"
                )
            said.add(resource)
            self.say(f"{message}; waiting for one")
