"""The state that the stages of a run share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moodistill.config import RunConfig
from moodistill.progress import Reporter
from moodistill.runs.accuracies import Accuracies
from moodistill.runs.backend import Backend
from moodistill.storage.folder import student_folder
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.context import TeacherContext


@dataclass(frozen=True)
class Session:
    """A run in progress in this process: what its stages read, and where they write.

    Attributes:
        folder: the run's.
        store: of all evaluations, open for writing.
        config: what decides the result.
        context: the teacher and its data.
        backend: what scores, times and distils.
        reporter: hears how far it is.
        students: names of those that alone are to be distilled, of a search that has ended; empty
            for the run itself.
        accuracies: on all held-out images, as far as they are known.
        seconds: what each stage took in this process, in their order.
    """

    folder: Path
    store: Store
    config: RunConfig
    context: TeacherContext
    backend: Backend
    reporter: Reporter
    students: tuple[str, ...] = ()
    accuracies: Accuracies = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = Accuracies(self.folder / "accuracies.json")
        object.__setattr__(self, "accuracies", known)

    @property
    def device(self) -> dict[str, Any]:
        """Fingerprint of the device that latencies are of."""
        return self.backend.timing.device

    def searched(self) -> Searched | None:
        """What the store holds now; None if not even the teacher was scored."""
        return Searched.read(self.store, self.config.search.limits, self.config.search.objectives)

    def student_folder(self, name: str) -> Path:
        """Where a student's files are."""
        return student_folder(self.folder, name)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of a block to those of a stage, however it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    def tell(self, text: str) -> None:
        """Say something that nobody may be there to hear any more."""
        with suppress(OSError):
            self.reporter.say(text)
