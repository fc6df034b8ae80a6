"""Throughput of one driver: rates with workers that only sleep (the table in docs/scaling.md).

python scripts/bench/scaling.py --run results/my_run

Also prints the seconds of each stage of an evaluation, and the bytes that it sends, from a run.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from moodistill.cluster import tasks as remote
from moodistill.cluster.client import Cluster, ClusterConfig, connect
from moodistill.cluster.executor import DaskExecutor
from moodistill.errors import UserError
from moodistill.evolution.driver import Search, SearchConfig
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.storage.store import Store
from moodistill.student.context import load_context
from moodistill.teacher.task import load_task

SETUP = remote.ScoreSetup(remote.__version__, "x" * 2500, "", "", "", None, None, 1)


def napping(seconds):
    """Stands in for `remote.score`: sleeps and makes up a result that depends on the genome.

    It knows nothing but its seconds: like `remote.score` it must be small to send.
    """

    def score(setup, packed):
        time.sleep(seconds)
        parameters = int.from_bytes(packed, "big").bit_count()
        digest = hashlib.sha256(packed).hexdigest()
        # Something to be learnt, or the search would soon cease to listen to its model.
        kept = parameters / (8 * len(packed))
        accuracy = 0.1 + 0.8 * kept + 0.05 * int(digest[-6:], 16) / 0xFFFFFF
        made = Evaluation(digest[:16], packed, accuracy, parameters, parameters, 1, None)
        return remote.Scored(made, b"", str(parameters))

    return score


def timed(model, key):
    """A made-up latency."""
    ms = int(key) / 1000
    return Latency(ms, ms, ms, ms)


def search(cluster, layout, score, population, generations, screen):
    """Seconds of a search, and how many students it scored."""
    config = SearchConfig(
        population=population, generations=generations, simd_step=8, screen=screen
    )
    executor = DaskExecutor(cluster, layout, SETUP, None, timed, score)
    list(executor.map([layout.teacher()] * cluster.resources()[remote.STUDENTS]))  # warm up
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.json").write_text("{}", "utf-8")
        with Store.create(Path(folder)) as store:
            began = time.perf_counter()
            list(Search(layout, config, store, executor).run())
            return time.perf_counter() - began, len(store)


def stages(run):
    """Median seconds of every stage, and median bytes of the files."""
    with Store.open(run, readonly=True) as store:
        found = [e for e in store.all() if e.failure is None]
    names = found[0].seconds
    seconds = {name: statistics.median(e.seconds[name] for e in found) for name in names}
    return seconds, statistics.median(e.size_bytes for e in found), len(found[0].genome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vgg16", help="whose genomes are bred")
    parser.add_argument("--run", type=Path, help="a finished run, for the cost of its stages")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--many", type=int, default=64, help="simulated workers, in one process")
    parser.add_argument("--nap", type=float, default=1.0, help="seconds of an evaluation")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    try:
        layout = load_context(load_task(arguments.model), arguments.data_dir).layout
        with connect(ClusterConfig(workers=arguments.workers), print) as cluster:
            score = napping(arguments.nap)
            population = 4 * arguments.workers
            for screen in (1, SearchConfig().screen):
                seconds, count = search(cluster, layout, score, population, 5, screen)
                ideal = count * arguments.nap / arguments.workers
                print(
                    f"{arguments.workers} workers, evaluations of {arguments.nap:g} s, --screen "
                    f"{screen}: {count} in {seconds:.1f} s, {ideal / seconds:.1%} of the ideal "
                    f"rate; {1000 * (seconds - ideal) / count:.1f} ms of the driver an evaluation"
                )
        from distributed import Client, LocalCluster

        with (
            LocalCluster(
                n_workers=arguments.many, threads_per_worker=1, processes=False,
                dashboard_address=None, resources={remote.STUDENTS: 1}, silence_logs="CRITICAL",
                memory_limit=0,  # all share one process: none may pause for what the others hold
            ) as local,
            Client(local) as client,
        ):  # fmt: skip
            config = ClusterConfig(scheduler=local.scheduler_address)
            many = Cluster(client, config, print)
            seconds, count = search(many, layout, napping(0.0), 2 * arguments.many, 5, 1)
        print(
            f"{arguments.many} workers, evaluations of no time, --screen 1: {count / seconds:.0f} "
            "a second is the driver's ceiling"
        )
        if arguments.run is not None:
            costs, size, genome = stages(arguments.run)
            total = sum(costs.values())
            print("seconds a student: " + ", ".join(f"{k} {v:.2f}" for k, v in costs.items()))
            print(f"bytes a student: genome {genome}, set-up {len(SETUP.config)}, file {size:,.0f}")
            busy = total - costs.get("latency", 0.0)
            print(f"one driver feeds {count / seconds * busy:.0f} workers of this speed")
            print(
                f"one device, at {costs.get('latency', 0.0):.2f} s a student, keeps "
                f"{busy / max(costs.get('latency', 0.0), 1e-9):.0f} workers busy"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
