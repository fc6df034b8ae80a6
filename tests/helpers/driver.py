"""Runs commands of moodistill in forked children of one warm process, and kills them on request.

`python tests/driver.py` reads a JSON request a line on stdin and answers with a JSON line; `Driver`
is its other end. A start of torch costs seconds, a fork some milliseconds. The driver computes nothing
itself, so that no threads are missing in its children.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RecordedMeter:
    """A table of latencies in place of a `LatencyMeter`: the answer follows from the model alone."""

    rejected_windows = 0
    elsewhere = {}

    def __init__(self, reference, input_shape, config=None, *, teacher_latency_ms=None, **_):
        self.teacher_latency_ms = teacher_latency_ms or 1.25

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass

    def measure(self, model, key=None, **_):
        at("measure")
        return self._answer(len(model), key.encode(), 12)

    def confirm(self, models, rounds=64, report=None):
        found = {}
        for name, make in models.items():
            at("confirm")
            model = make()
            found[name] = self._answer(len(model), model, rounds)
        return found

    def profile(self, model):
        """Times of layers that follow from their sizes, as if each had one pixel."""
        import math

        import onnx

        at("profile")
        layers = [
            [shape[1], shape[0], math.prod(shape[2:]), 1.0, 1e-6 * math.prod(shape)]
            for one in onnx.load_model_from_string(model).graph.initializer
            if len(shape := tuple(one.dims)) > 1
        ]
        return layers, 0.01

    def _answer(self, size, key, rounds):
        import numpy as np

        from moodistill.pareto.evaluation import Latency

        digest = hashlib.sha256(key).digest()
        noise = np.random.default_rng(list(digest[:8])).uniform(0.97, 1.03, (2, rounds))
        times = noise[0] * (0.02 + size / 1e6)
        ratio = float(np.median(times / noise[1]))
        scale = self.teacher_latency_ms
        return Latency(
            ratio * scale, 0.98 * ratio * scale, 1.02 * ratio * scale, ratio,
            tuple(times.tolist()), tuple(noise[1].tolist()),
        )  # fmt: skip


# What happens at the n-th passage of a point, in a child: {point: [n, action]}.
_planned: dict[str, list] = {}


def at(point):
    """Here a child may be killed (`kill`) or made to wait for ever (`hold`)."""
    plan = _planned.get(point)
    if plan is None:
        return
    plan[0] -= 1
    if plan[0] > 0:
        return
    if plan[1] == "hold":
        driver = os.getppid()
        while os.getppid() == driver:
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _plain(name):
    return re.sub("-[0-9a-f-]{16,}", "", name)  # keys of the cache's files


class _HalfStream:
    """A file that can be caught with half of its bytes written."""

    def __init__(self, stream, name):
        self._stream, self._name = stream, name

    def write(self, data):
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        at(f"half {self._name}")
        self._stream.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stream.close()


class _HookedOs:
    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, source, target):
        at(f"replace {_plain(Path(target).name)}")
        os.replace(source, target)
        at(f"replaced {_plain(Path(target).name)}")


def _around(owner, name, before, after=None):
    real = getattr(owner, name)

    def hooked(*arguments, **keywords):
        at(before)
        result = real(*arguments, **keywords)
        if after is not None:
            at(after)
        return result

    setattr(owner, name, hooked)


def lose_worker(process, how):
    """Have a latency worker take its next request and end by the signal `how` before it answers."""
    process.send_signal(signal.SIGSTOP)
    if how != signal.SIGSTOP:  # which hangs for ever

        def end():
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)

        threading.Timer(0.3, end).start()


def install_points():
    """Make every step of a run a point at which it can be killed."""
    from moodistill.finalists import confirm as confirmation
    from moodistill.finalists import distil as finalists
    from moodistill.io import atomic as files
    from moodistill.latency import meter as latency
    from moodistill.runs import finish as finishing
    from moodistill.runs import results, run
    from moodistill.storage import store
    from moodistill.student import evaluator as recipe

    real_request = latency._WorkerProcess.request

    def request(self, header, body, timeout_s):
        if _planned.get("worker") == header["op"]:
            lose_worker(self.process, signal.SIGKILL)
        return real_request(self, header, body, timeout_s)

    latency._WorkerProcess.request = request

    def hooked_open(path, mode):
        # ".run.json.123.tmp" is on the way to "run.json".
        return _HalfStream(open(path, mode), _plain(Path(path).name[1:].rsplit(".", 2)[0]))

    files.open, files.os, finalists.os = hooked_open, _HookedOs(), _HookedOs()
    _around(run.Store, "create", "create", "created")
    _around(recipe, "build_student", "build")
    _around(recipe, "inherit", "inherit")
    _around(recipe, "outputs", "score")
    _around(store.Store, "add", "add", "added")
    _around(store.Store, "add_generation", "generation", "generation stored")
    _around(finalists, "distill", "distil", "distilled")
    _around(finalists.SoftTargets, "soft", "distil step")
    _around(finalists, "save_student", "save student", "student saved")
    _around(finalists, "checked_onnx", "export", "exported")
    _around(confirmation, "to_onnx", "confirm structure")
    _around(finishing, "quantise_student", "quantise", "quantised")
    _around(finishing, "save_int8", "judge", "judged")
    _around(run, "score_front", "front", "front measured")
    _around(results, "write_table", "results", "results written")
    _around(results, "package_finalists", "package", "packaged")
    real = store._connect

    def connect(database, readonly):
        connection = real(database, readonly)
        if not readonly:
            # Every few steps of SQLite's machine, within statements.
            connection.set_progress_handler(lambda: at("sqlite"), 7)
        return connection

    store._connect = connect


def _child(request):
    """One command, in a fork; never returns."""
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            stream = os.open(request["log"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(stream, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(request["environment"])
        # A background job may inherit an ignored SIGINT; a terminal's program does not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if request["file_limit"] is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], hard))
        _planned.update(request["plan"])
        from small import make_small

        from moodistill import cli
        from moodistill.runs import backend as scoring
        from moodistill.student import evaluator as recipe

        # An evaluation of a tenth of a second; `run.json` says so, and a resume reads it there.
        make_small()
        recipe.Recipe.__init__.__defaults__ = (100, *recipe.Recipe.__init__.__defaults__[1:])
        if request["recorded"]:
            scoring.LatencyMeter = RecordedMeter
        install_points()
        command, *arguments = request["arguments"]
        code = cli.run_tool(command, arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid, cpu_seconds):
    """Exit status of a child, which is killed once it has used so much CPU time."""
    ticks = os.sysconf("SC_CLK_TCK")
    while cpu_seconds is not None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        if (int(words[11]) + int(words[12])) / ticks >= cpu_seconds:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    """Import everything that a run imports, then serve."""
    import importlib

    import torch

    for name in (
        "torch._dynamo", "sklearn.datasets", "matplotlib.figure", "matplotlib.ticker",
        "matplotlib.backends.backend_agg", "moodistill.runs.clean", "moodistill.onnx.quantise",
        "moodistill.runs.run", "moodistill.runs.backend", "moodistill.runs.export", "moodistill.bundle.verify", "problems.digits",
    ):  # fmt: skip
        importlib.import_module(name)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if request["op"] == "start":
            pid = os.fork()
            if pid == 0:
                answers.close()
                os.close(0)
                _child(request)
            answer["pid"] = pid
        else:
            answer["code"] = _wait(request["pid"], request["cpu_seconds"])
        print(json.dumps(answer), file=answers)


@dataclass(frozen=True)
class Done:
    """How a command ended; `code` is negative if a signal ended it."""

    code: int
    stdout: str
    stderr: str


class Driver:
    """A warm process that commands are forked from."""

    def __init__(self, folder, cache, hash_seed="0"):
        self.folder, self.count = folder, 0
        self.environment = {"MOODISTILL_CACHE": str(cache)}
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.ready = False

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the driver died"
        return json.loads(line)

    def _ask(self, **request):
        if not self.ready:
            # ONNX Runtime keeps one that sleeps; a fork of a process with more would be half of it.
            assert self._answer()["threads"] <= 2
            self.ready = True
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(
        self, *arguments, kill=None, hold=None, times=1, recorded=True, file_limit=None,
        environment=None, worker_dies=None,
    ):  # fmt: skip
        """Begin a command; `kill` or `hold` it when it passes a point for the `times`-th time.

        `worker_dies` is the request (`measure`, `confirm`) that kills a real latency worker.
        """
        self.count += 1
        log = str(self.folder / f"{self.count}.")
        plan = {kill or hold: [times, "kill" if kill else "hold"]} if kill or hold else {}
        if worker_dies:
            plan["worker"] = worker_dies
        answer = self._ask(
            op="start", arguments=[str(a) for a in arguments], plan=plan, recorded=recorded,
            log=log, file_limit=file_limit,
            environment={**self.environment, **(environment or {})},
        )  # fmt: skip
        return answer["pid"], log

    def wait(self, started, cpu_seconds=None):
        """Wait for a command's end; with `cpu_seconds`, kill it after so much CPU time."""
        pid, log = started
        code = self._ask(op="wait", pid=pid, cpu_seconds=cpu_seconds)["code"]
        texts = [Path(log + name).read_text(errors="replace") for name in ("out", "err")]
        return Done(code, *texts)

    def call(self, *arguments, cpu_seconds=None, **options):
        """Run a command to its end."""
        return self.wait(self.start(*arguments, **options), cpu_seconds)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


if __name__ == "__main__":
    main()
