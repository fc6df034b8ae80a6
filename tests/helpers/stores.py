"""Evaluations and run folders for stores."""

from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.storage.folder import (
    new_run_folder,
    write_run,
)
from moodistill.storage.store import Store


def evaluation(number: int) -> Evaluation:
    value = 0.1 + number / 3
    latency = Latency(value, value / 2, value * 2, 0.5, (value, 0.3), (1.0, 0.1 + 0.2))
    return Evaluation(f"{number:08x}", bytes([number % 256]) * 9, 0.7, 100, 2, 3, latency)


def run_folder(path, count=0):
    folder = new_run_folder(path)
    write_run(folder, {"seed": 1})
    with Store.create(folder) as store:
        for number in range(count):
            store.add(evaluation(number))
    return folder
