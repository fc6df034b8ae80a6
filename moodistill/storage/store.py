"""The store of a run: every evaluation and generation in SQLite.

An evaluation is on disk before the search goes on, so a killed run loses at most the student that
was being scored. One process writes at a time (`.lock`); any number may read.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from moodistill.errors import UserError
from moodistill.io.atomic import TEMPORARY
from moodistill.io.records import convert
from moodistill.pareto.evaluation import Evaluation
from moodistill.storage.folder import RUN_FILE
from moodistill.storage.lock import _guard, _release_lock, _take_lock

DATABASE = "evaluations.sqlite"
SCHEMA_VERSION = 2
_COLUMNS = (
    "genome_hash, genome, accuracy, parameters, macs, size_bytes, latency_ms, latency_ms_low, "
    "latency_ms_high, latency_ratio, samples, seconds, failure, summary, memory_bytes, error"
)
_TIMES = ("latency_ms", "latency_ms_low", "latency_ms_high", "latency_ratio")
_SCHEMA = f"""
CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, genome_hash TEXT NOT NULL UNIQUE,
    genome BLOB NOT NULL, accuracy REAL NOT NULL, parameters INTEGER NOT NULL,
    macs INTEGER NOT NULL, size_bytes INTEGER NOT NULL, latency_ms REAL, latency_ms_low REAL,
    latency_ms_high REAL, latency_ratio REAL, samples TEXT, seconds TEXT NOT NULL, failure TEXT,
    summary TEXT NOT NULL, memory_bytes INTEGER NOT NULL, timestamp TEXT NOT NULL, error REAL);
CREATE TABLE generations (
    number INTEGER PRIMARY KEY, offspring_hash TEXT NOT NULL, seconds REAL NOT NULL,
    front_size INTEGER NOT NULL, hypervolume REAL NOT NULL, evaluations INTEGER NOT NULL);
PRAGMA user_version = {SCHEMA_VERSION};
"""
_WHY_DIVERGED = (
    "the code, a library or a setting changed since: resume with the versions in run.json, or "
    "start anew in another folder"
)


class ReplayDiverged(UserError):
    """A resumed search bred other offspring than the run it continues."""


@dataclass(frozen=True)
class Generation:
    """One finished generation.

    Attributes:
        number: counted from 1.
        offspring_hash: digest of the offspring's genome hashes, in order.
        seconds: wall time of the generation when it was first run.
        front_size: students that no other student dominates.
        hypervolume: of that front.
        evaluations: students stored when the generation ended.
    """

    number: int
    offspring_hash: str
    seconds: float
    front_size: int
    hypervolume: float
    evaluations: int


class Store:
    """The evaluations of one run; made by `Store.create` or `Store.open`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._connection = connection
        self._lock = lock

    @classmethod
    def create(cls, folder: Path, lock: int | None = None) -> Store:
        """Start an empty store in `folder` (made if needed) and become its writer.

        `lock` is that of `writer_lock`, None to take it.
        """
        with _guard(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder) if lock is None else lock
        try:
            database = folder / DATABASE
            if database.exists():
                raise UserError(f"{database} exists; resume its run, or take another folder")
            with _guard(database):
                _make_database(database)
                connection = _connect(database, readonly=False)
        except BaseException:
            _release_lock(lock)
            raise
        return cls(folder, connection, lock)

    @classmethod
    def open(cls, folder: Path, readonly: bool = False) -> Store:
        """Open the store of an existing run, as its writer unless `readonly`.

        Raises:
            UserError: if the folder is no run, its database is damaged, or another process writes.
        """
        database = folder / DATABASE
        for expected in (folder / RUN_FILE, database):
            if not expected.is_file():
                raise UserError(
                    f"{folder} is not a run: expected {expected.name} in it; "
                    "name the folder that a search wrote"
                )
        lock = None if readonly else _take_lock(folder)
        connection = None
        try:
            with _guard(database):
                if not database.stat().st_size:  # of which SQLite would delete the log
                    raise sqlite3.DatabaseError("file is empty")
                # Checked by a reader: a writer that closes would put the log into a damaged file.
                connection = _connect(database, readonly=True)
                _check(connection, database)
                if not readonly:
                    connection.close()
                    connection = _connect(database, readonly=False)
                    _add_new_columns(connection)
        except BaseException:
            if connection is not None:
                connection.close()
            _release_lock(lock)
            raise
        return cls(folder, connection, lock)

    def add(self, evaluation: Evaluation, number: int | None = None) -> None:
        """Store one evaluation; it is on disk when this returns.

        `number` is its place in the search, None the next one.

        Raises:
            ValueError: if the genome is stored already, a number is NaN, or the store is read-only.
        """
        self._must_write()
        latency = evaluation.latency
        times: list[float | None] = [None] * 4
        samples = None
        if latency is not None:
            measured = (latency.latency_ms, latency.low_ms, latency.high_ms, latency.ratio)
            times = [float(value) for value in measured]
            raw = {"samples_ms": latency.samples_ms, "reference_ms": latency.reference_ms}
            samples = json.dumps({k: [float(v) for v in values] for k, values in raw.items()})
        # SQLite stores NaN as NULL, which would come back as "not measured".
        if any(value is not None and math.isnan(value) for value in (evaluation.accuracy, *times)):
            raise ValueError(f"evaluation {evaluation.genome_hash} holds NaN and is not stored")
        seconds = json.dumps({k: float(v) for k, v in evaluation.seconds.items()})
        # float() and int() because sqlite3 stores NumPy scalars as blobs.
        row = (
            number, evaluation.genome_hash, bytes(evaluation.genome), float(evaluation.accuracy),
            int(evaluation.parameters), int(evaluation.macs), int(evaluation.size_bytes),
            *times, samples, seconds, evaluation.failure, evaluation.summary,
            int(evaluation.memory_bytes), evaluation.error,
            datetime.now(UTC).isoformat(timespec="milliseconds"),
        )  # fmt: skip
        marks = ", ".join("?" * len(row))
        with self._guard():
            try:
                self._connection.execute(
                    f"INSERT INTO evaluations (number, {_COLUMNS}, timestamp) VALUES ({marks})", row
                )
            except sqlite3.IntegrityError as error:
                taken = "SELECT genome_hash FROM evaluations WHERE number = ?"
                known = self._connection.execute(taken, (number,)).fetchone()
                if known is not None and known[0] != evaluation.genome_hash:
                    raise ReplayDiverged(
                        f"{self.folder}: student {number} is {evaluation.genome_hash}, but the run "
                        f"stored {known[0]}; {_WHY_DIVERGED}"
                    ) from error
                raise ValueError(f"{evaluation.genome_hash} is not stored: {error}") from error

    def get(self, genome_hash: str) -> Evaluation | None:
        """The evaluation of a genome, or None if it was never scored."""
        with self._guard(ValueError, TypeError):
            query = f"SELECT {self._columns} FROM evaluations WHERE genome_hash = ?"
            row = self._connection.execute(query, (genome_hash,)).fetchone()
            return None if row is None else _evaluation(row)

    def all(self) -> list[Evaluation]:
        """Every evaluation, in the search's order."""
        return list(self.numbered().values())

    def numbered(self) -> dict[int, Evaluation]:
        """Every evaluation by its place in the search, the first one 0."""
        with self._guard(ValueError, TypeError):
            query = f"SELECT {self._columns}, number FROM evaluations ORDER BY number"
            rows = self._connection.execute(query)
            return {number - 1: _evaluation(tuple(row)) for *row, number in rows}

    def __len__(self) -> int:
        """How many evaluations are stored."""
        with self._guard():
            return self._connection.execute("SELECT count(*) FROM evaluations").fetchone()[0]

    def add_generation(
        self, number: int, offspring_hash: str, seconds: float, front_size: int, hypervolume: float
    ) -> None:
        """Store one finished generation; one that is stored already is left as it is.

        Raises:
            ReplayDiverged: if `number` is stored with another `offspring_hash`.
        """
        self._must_write()
        find = "SELECT offspring_hash FROM generations WHERE number = ?"
        with self._guard():
            known = self._connection.execute(find, (int(number),)).fetchone()
            if known is None:
                self._connection.execute(
                    "INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?)",
                    (int(number), offspring_hash, float(seconds), int(front_size),
                     float(hypervolume), len(self)),
                )  # fmt: skip
            elif known[0] != offspring_hash:
                raise ReplayDiverged(
                    f"{self.folder}: generation {number} bred offspring {offspring_hash[:12]}, "
                    f"but the run stored {known[0][:12]}; {_WHY_DIVERGED}"
                )

    def generations(self) -> list[Generation]:
        """Every finished generation, by number."""
        query = "SELECT * FROM generations ORDER BY number"
        with self._guard():
            return [Generation(*row) for row in self._connection.execute(query)]

    def close(self) -> None:
        """Close the database and let go of the lock; may be called twice."""
        self._connection.close()
        _release_lock(self._lock)
        self._lock = None

    def __enter__(self) -> Store:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    @cached_property
    def _columns(self) -> str:
        """What is read; runs of earlier versions that are only read lack the last column."""
        names = [row[1] for row in self._connection.execute("PRAGMA table_info(evaluations)")]
        return _COLUMNS if "error" in names else _COLUMNS.replace(", error", ", NULL AS error")

    def _must_write(self) -> None:
        if self._lock is None:
            raise ValueError(f"the store of {self.folder} is read-only or closed")

    def _guard(self, *also: type[Exception]) -> Any:
        return _guard(self.folder / DATABASE, *also)


def _make_database(database: Path) -> None:
    """An empty store, made aside: a kill leaves none or a whole one."""
    temporary = database.with_name(f".{database.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.executescript(f"PRAGMA journal_mode = OFF;BEGIN;{_SCHEMA}COMMIT;")
        finally:
            connection.close()
        os.replace(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def _connect(database: Path, readonly: bool) -> sqlite3.Connection:
    address = f"{database.resolve().as_uri()}?mode={'ro' if readonly else 'rwc'}"
    writable = os.access(database.parent, os.W_OK)
    if readonly and not writable and not database.with_name(f"{DATABASE}-wal").exists():
        address += "&immutable=1"  # WAL mode otherwise needs to create files next to the database
    connection = sqlite3.connect(address, uri=True, isolation_level=None)
    if not readonly:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
    return connection


def _add_new_columns(connection: sqlite3.Connection) -> None:
    """Complete the table of a run that an earlier version began."""
    names = [row[1] for row in connection.execute("PRAGMA table_info(evaluations)")]
    if "error" not in names:
        connection.execute("ALTER TABLE evaluations ADD COLUMN error REAL")


def _check(connection: sqlite3.Connection, database: Path) -> None:
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(str(found).splitlines()[-1])
    log = database.with_name(f"{DATABASE}-wal")
    if not (log.exists() and log.stat().st_size):
        # The check above takes the missing end of the last page for zeros.
        pages, size = (
            connection.execute(f"PRAGMA page_{k}").fetchone()[0] for k in ("count", "size")
        )
        if database.stat().st_size < pages * size:
            raise sqlite3.DatabaseError("file is cut off")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"schema version {version}, expected {SCHEMA_VERSION}")


def _evaluation(row: tuple[Any, ...]) -> Evaluation:
    """A row of the table as an `Evaluation`; its columns have the names of the fields.

    Raises:
        ValueError: names the column that does not hold what it should.
    """
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    times = [values.pop(name) for name in _TIMES]
    samples = values.pop("samples")
    if samples is not None:
        named = zip(("latency_ms", "low_ms", "high_ms", "ratio"), times, strict=True)
        values["latency"] = {**dict(named), **json.loads(samples)}
    else:
        values["latency"] = None
    values["seconds"] = json.loads(values["seconds"])
    return convert(values, Evaluation)
