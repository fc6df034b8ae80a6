"""What a run says while it works: live in a terminal, plain lines, JSON lines, or nothing."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TextIO

from moodistill.errors import UserError

Mode = Literal["auto", "plain", "json", "quiet"]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows


class Reporter:
    """Plain lines, as for a log file; the other reporters say the same in another way."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def say(self, text: str, **facts: Any) -> None:
        """One line; `facts` are the same for a program."""
        print(text, file=self.stream, flush=True)

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Stage]:
        """A piece of work of `total` units, within a `with` block."""
        return nullcontext(Stage(self))

    def table(self, make: Callable[[], Table]) -> None:
        """The best of what has been found so far; only a live display makes and shows it."""

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Figures of a finished generation, for curves; `step` students have been evaluated."""

    def update(self, stage: Stage, done: int, facts: dict[str, Any]) -> None:
        """Called by `Stage.update`."""

    def close(self) -> None:
        """The run is over."""


class Stage:
    """How far one piece of work is."""

    def __init__(self, reporter: Reporter, handle: Any = None) -> None:
        self.reporter = reporter
        self.handle = handle

    def update(self, done: int, **facts: Any) -> None:
        """`done` units are finished; `facts` are shown beside it."""
        self.reporter.update(self, done, facts)


class Percents:
    """Tells a stage of many small steps at most about a hundred times how far it is."""

    def __init__(self, stage: Stage, total: int) -> None:
        self.stage, self.total = stage, total
        self._told = 0

    def update(self, done: int) -> None:
        """`done` units are finished."""
        if done >= self.total or done - self._told >= self.total / 100:
            self._told = done
            self.stage.update(done)


class QuietReporter(Reporter):
    """Nothing: errors and results are printed by the command itself."""

    def say(self, text: str, **facts: Any) -> None:
        """Say nothing."""


class JsonReporter(Reporter):
    """One JSON object a line: `event`, `time` (seconds since the epoch) and its facts."""

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, default=str)
        print(line, file=self.stream, flush=True)

    def say(self, text: str, **facts: Any) -> None:
        """One object with the text."""
        self._write("message", {"text": text, **facts})

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """Objects at the beginning, at every update and at the end."""
        self._write("begin", {"stage": name, "total": total, "unit": unit})
        yield Stage(self, name)
        self._write("end", {"stage": name})

    def measured(self, step: int, values: dict[str, float]) -> None:
        """One object."""
        self._write("measured", {"step": step, **values})

    def update(self, stage: Stage, done: int, facts: dict[str, Any]) -> None:
        """One object."""
        self._write("progress", {"stage": stage.handle, "done": done, **facts})


class LiveReporter(Reporter):
    """A bar with ETA, and beneath it the best students so far; messages scroll above."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream or sys.stderr)
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._group = Group
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[facts]}"),
        )  # fmt: skip
        self._live = Live(self._bars, console=Console(file=self.stream), refresh_per_second=4)

    def say(self, text: str, **facts: Any) -> None:
        """One line above the bars; behind them, once they are gone, as ever."""
        if self._live.is_started:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """One bar, which goes when the stage ends; the first one starts the display."""
        # Not before: bad input ends a run early, with the terminal as it was.
        self._live.start()
        task = self._bars.add_task(name, total=total, facts="")
        yield Stage(self, task)
        self._bars.remove_task(task)
        self._live.update(self._bars)

    def update(self, stage: Stage, done: int, facts: dict[str, Any]) -> None:
        """Move the bar."""
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        self._bars.update(stage.handle, completed=done, facts=text)

    def table(self, make: Callable[[], Table]) -> None:
        """Show the table beneath the bars."""
        from rich.table import Table as RichTable

        header, rows = make()
        table = RichTable(box=None, header_style="bold")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._live.update(self._group(self._bars, table))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()


class TensorBoardReporter(Reporter):
    """What another reporter says, and curves in a folder that TensorBoard reads."""

    def __init__(self, inner: Reporter, folder: Path) -> None:
        """Wrap `inner`.

        Raises:
            UserError: if TensorBoard is not installed.
        """
        super().__init__(inner.stream)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"`tensorboard` (here {folder}) needs the package tensorboard ({error}); "
                'install it with: pip install -e ".[tensorboard]"'
            ) from error
        self.inner = inner
        self._writer = SummaryWriter(str(folder))

    def say(self, text: str, **facts: Any) -> None:
        """Said by the other."""
        self.inner.say(text, **facts)

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Stage]:
        """A stage of the other."""
        return self.inner.stage(name, total, unit)

    def table(self, make: Callable[[], Table]) -> None:
        """Shown by the other."""
        self.inner.table(make)

    def measured(self, step: int, values: dict[str, float]) -> None:
        """A point of each curve."""
        self.inner.measured(step, values)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left, and close the other."""
        self._writer.close()
        self.inner.close()


def make_reporter(mode: Mode) -> Reporter:
    """The reporter of a mode; `auto` is live in a terminal and plain elsewhere.

    From here on a name that the terminal's encoding lacks is escaped: it ends no run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if mode == "json":
        return JsonReporter()
    if mode == "quiet":
        return QuietReporter()
    if mode == "auto" and sys.stderr.isatty():
        return LiveReporter()
    return Reporter()
