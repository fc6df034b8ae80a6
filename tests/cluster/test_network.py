"""Between machines: encrypted connections, and two hosts that are network namespaces."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from helpers.dask import end, environment  # noqa: F401

pytest.importorskip("distributed")
pytest.importorskip("trustme")

import trustme

from moodistill.cluster.client import ClusterConfig, connect
from moodistill.errors import UserError

pytestmark = pytest.mark.distributed

TINY = [
    "--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
    "--no-int8", "--simd-step", "8",
]  # fmt: skip
HERE, THERE = "10.77.0.1", "10.77.0.2"


def start(*arguments, inside=None, **environ):
    """One of Dask's commands, in a network namespace if one is named."""
    prefix = ["ip", "netns", "exec", inside] if inside else []
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, **environ},
    )  # fmt: skip


def address_of(file, process):
    while not file.exists() or not file.read_text():
        assert process.poll() is None, "the scheduler did not start"
        time.sleep(0.05)
    return json.loads(file.read_text())["address"]


@pytest.fixture
def papers(tmp_path):
    """Files of an authority and a certificate by it, in a folder by name."""

    def issue(name):
        folder = tmp_path / name
        folder.mkdir()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        one = authority.issue_cert("127.0.0.1")
        one.private_key_pem.write_to_path(folder / "key.pem")
        one.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        return folder

    return issue


def options(folder, suffix=""):
    names = {"ca" + suffix: "ca.pem", "cert": "cert.pem", "key": "key.pem"}
    return [part for n, file in names.items() for part in ("--tls-" + n, str(folder / file))]


def test_a_run_over_tls_and_strangers_are_refused(papers, call, tmp_path):
    ours, strange = papers("ours"), papers("strange")
    file = tmp_path / "scheduler.json"
    common = ["--host", "127.0.0.1", "--protocol", "tls", "--no-dashboard"]
    processes = [
        start("scheduler", *common, "--port", "0", "--scheduler-file", str(file),
              *options(ours, "-file"))
    ]  # fmt: skip
    try:
        address = address_of(file, processes[0])
        assert address.startswith("tls://127.0.0.1:")
        for resource in ("student=1", "latency:edge=1"):
            processes.append(
                start("worker", address, *common, "--nthreads", "1", "--resources", resource,
                      *options(ours, "-file"))
            )  # fmt: skip
        out = tmp_path / "run"
        places = ["--scheduler", address, "--latency-on", "edge"]
        call("run", "--model", "digits", "--out", out, *places, *options(ours), *TINY)
        run = json.loads((out / "run.json").read_text())
        assert run["status"] == "finished" and run["latency_on"] == "edge"
        theirs = {"tls_" + name: strange / f"{name}.pem" for name in ("ca", "cert", "key")}
        with (
            pytest.raises(UserError, match=f"no Dask scheduler answers at {address}"),
            connect(ClusterConfig(scheduler=address, patience_s=1, **theirs), print),
        ):
            pass
        # Neither does the scheduler speak without encryption.
        plain = address.replace("tls://", "tcp://")
        with (
            pytest.raises(UserError, match="no Dask scheduler answers"),
            connect(ClusterConfig(scheduler=plain, patience_s=1), print),
        ):
            pass
    finally:
        end(*processes)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them; names of the first and the second."""
    names = [f"moodistill{os.getpid()}{letter}" for letter in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.decode()[:80]}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns",
           names[1])  # fmt: skip
        for name, address in zip(names, (HERE, THERE), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def run_inside(name, *arguments):
    command = [
        "ip", "netns", "exec", name, sys.executable, str(ROOT / "scripts/run_nsga.py"), *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_device_on_another_host_and_a_cable_that_is_pulled(hosts, tmp_path):
    driver, device = hosts
    file = tmp_path / "scheduler.json"
    # How soon a silent host counts as gone is Dask's to say: five minutes unless told.
    soon = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "4s"}
    processes = [
        start("scheduler", "--host", HERE, "--port", "8786", "--no-dashboard", "--scheduler-file",
              str(file), inside=driver, **soon)
    ]  # fmt: skip
    try:
        address = address_of(file, processes[0])
        assert address == f"tcp://{HERE}:8786"
        for inside, host, resource in (
            (driver, HERE, "student=1"), (device, THERE, "latency:edge=1"),
        ):  # fmt: skip
            processes.append(
                start("worker", address, "--host", host, "--nthreads", "1", "--no-dashboard",
                      "--resources", resource, inside=inside)
            )  # fmt: skip
        out = tmp_path / "run"
        places = ["--scheduler", address, "--latency-on", "edge", "--patience", "60"]
        first = run_inside(driver, "--model", "digits", "--out", str(out), *places, *TINY)
        said = first.communicate(timeout=300)[0]
        assert first.returncode == 0, said
        assert json.loads((out / "run.json").read_text())["status"] == "finished"
        # More students, but the cable is pulled on the way.
        places[-1] = "2"
        more = run_inside(driver, "--resume", str(out), "--generations", "40", *places)
        processes.append(more)
        for line in more.stdout:
            if line.startswith("generation 3:"):
                break
        ip("-n", device, "link", "set", "cable", "down")
        said = more.communicate(timeout=120)[0]
        assert more.returncode == 2, said
        assert "no worker with the resource 'latency:edge' for 2 s" in said
        assert "everything so far is kept" in said and "Traceback" not in said
    finally:
        end(*processes)


def listening(name):
    """Local addresses of the sockets that wait for connections in a namespace."""
    found = subprocess.run(
        ["ip", "netns", "exec", name, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    lines = [line.split() for line in found]
    return {cells[1].rpartition(":")[0] for cells in lines if len(cells) > 3 and cells[3] == "0A"}


def test_workers_of_this_machine_listen_on_loopback_alone(hosts, tmp_path):
    out = tmp_path / "run"
    run = run_inside(
        hosts[0], "--model", "digits", "--out", str(out), "--workers", "2", *TINY,
        "--generations", "50",
    )  # fmt: skip
    try:
        seen = set()
        for line in run.stdout:
            if line.startswith("generation 1:"):
                seen = listening(hosts[0])
                break
        assert seen == {"0100007F"}, "loopback, and something does listen"
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
