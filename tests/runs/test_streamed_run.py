"""A run whose images are read when they are needed, and carried on with images in memory."""

import json

import numpy as np
import pytest
from PIL import Image

from moodistill.config import Budget, new_config
from moodistill.data import kept_index
from moodistill.data.digits import load_digits
from moodistill.pareto.table import read_front
from moodistill.progress import QuietReporter
from moodistill.runs.backend import Places
from moodistill.runs.run import resume_run, start_run
from moodistill.settings import Settings
from moodistill.teacher.task import OwnTask
from problems.digits import TASK


@pytest.fixture
def own(tmp_path):
    """The digits as files, 60 a class, and their teacher."""
    digits = load_digits()
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in np.flatnonzero(digits.train.labels == label)[:60]:
            path = tmp_path / "images" / str(label) / f"{number}.png"
            Image.fromarray(digits.train.images[number, :, :, 0]).save(path)
    return OwnTask(
        str(TASK.weights), str(tmp_path / "images"), channels=1, mean=digits.mean, std=digits.std
    )


def test_a_streamed_run_is_carried_on_in_memory(own, tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))
    settings = Settings(
        population=4, generations=1, finalists=1, distill_steps=2, simd_step=8, int8_twins=False,
        objectives=("accuracy", "macs"), calibration_images=64,
    )  # fmt: skip
    config, out = new_config("problems.digits:DigitsNet", settings, own), tmp_path / "run"
    places = Places(threads=1, device="cpu", images_in_memory=False)
    start_run(config, out, places, QuietReporter())
    stored = json.loads((out / "run.json").read_text())
    assert stored["status"] == "finished" and list((tmp_path / "cache").glob("images-*.npz"))
    streamed = {row.student: row.validation_accuracy for row in read_front(out)}
    # In memory nothing asks the index.
    monkeypatch.setattr(kept_index.FolderIndex, "update", lambda *_: pytest.fail("indexed"))
    held = Places(threads=1, device="cpu", images_in_memory=True)
    resume_run(out, Budget(finalists=2), held, QuietReporter())
    assert json.loads((out / "run.json").read_text())["data_digest"] == stored["data_digest"]
    found = {row.student: row.validation_accuracy for row in read_front(out)}
    assert found["teacher"] == streamed["teacher"] > 0.9
