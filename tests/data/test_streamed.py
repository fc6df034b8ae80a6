"""Images that do not fit into memory: read when they are needed, the same as if they were held."""

import hashlib
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moodistill.data import memory
from moodistill.data.datasets import from_datasets, from_splits
from moodistill.data.digests import former_digest
from moodistill.data.folders import load_image_folder
from moodistill.data.images import Split, sha256_array
from moodistill.data.kept_index import FolderIndex
from moodistill.data.streamed import StreamedImages, batches, read_batches
from moodistill.errors import UserError
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.onnx.writer import to_onnx
from moodistill.progress import Reporter
from moodistill.teacher.answers import logits_of
from moodistill.teacher.task import TrainConfig
from moodistill.training.batches import TrainBatches
from moodistill.training.distill import DistillConfig, SoftTargets, distill

SIZE = (12, 10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Three classes of 60 images of several sizes, one of them turned by its tag."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(60):
            size = (14, 11) if number % 2 else (12, 10)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
        tmp_path / "p" / "cat" / "3.jpg", exif=exif
    )
    return tmp_path / "p"


def both(folder):
    return [load_image_folder(folder, SIZE, in_memory=held) for held in (True, False)]


class Told(Reporter):
    """Counts what is said of a stage."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def stage(self, name, total, unit):
        self.stages.append((name, total))
        return super().stage(name, total, unit)

    def update(self, stage, done, facts):
        self.done = done


def network(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def test_streamed_images_are_those_that_are_held(folder):
    held, streamed = both(folder)
    assert isinstance(streamed.train.images, StreamedImages)
    assert isinstance(held.train.images, np.ndarray)
    # Digest, normalisation and table: a run may be carried on either way.
    for name in ("digest", "mean", "std", "table", "cut", "labels"):
        assert getattr(held, name) == getattr(streamed, name)
    for part in ("train", "validation", "test"):
        one, other = getattr(held, part), getattr(streamed, part)
        assert one.files == other.files and (one.labels == other.labels).all()
        assert one.images.shape == other.images.shape
        assert (one.images == other.images[:]).all()
    assert torch.equal(held.calibration(70), streamed.calibration(70))
    assert held.table.turned == 1


def test_indexing_gives_what_an_array_gives(folder):
    held, streamed = both(folder)
    array, images = held.train.images, streamed.train.images
    some = np.array([5, 0, 100, 5])
    for which in (some, slice(3, 9), slice(None, None, 7), slice(0, 0)):
        assert (images[which] == array[which]).all() and images[which].shape == array[which].shape
    assert (images[-1] == array[-1]).all() and images.ndim == array.ndim
    part = streamed.train.behind(20).part(slice(None, None, 3)).ordered(some[:2])
    assert isinstance(part.images, StreamedImages)  # nothing has been read yet
    assert (part.held().images == array[20::3][some[:2]]).all()
    assert [len(one) for one in batches(images, 50)] == [50, 50, 45]
    for found, numbers in zip(
        read_batches(images, [some, some[:1]]), (some, some[:1]), strict=True
    ):
        assert (found == array[numbers]).all()


def test_teacher_and_onnx_answers_are_the_same(folder):
    held, streamed = both(folder)
    model = network()
    one, other = (logits_of(model, data, data.train.images) for data in (held, streamed))
    assert np.array_equal(one, other)
    file = to_onnx(torch.fx.symbolic_trace(model), held.input_shape)
    reached = [onnx_accuracy(file, data, data.train, 2) for data in (held, streamed)]
    assert reached[0] == reached[1] == np.mean(one.argmax(1) == held.train.labels)


def test_distillation_and_teacher_training_see_the_same(folder):
    held, streamed = both(folder)
    config = DistillConfig(steps=4, batch_size=8, views=3)
    made = []
    for data in (held, streamed):
        targets = SoftTargets(network(), data, config, None, "")
        student = torch.fx.symbolic_trace(network())
        made.append(distill(student, targets, config).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    shown = [
        list(TrainBatches(d, TrainConfig(phases=((2, 12),), batch_size=32)).following(3))
        for d in (held, streamed)
    ]
    assert len(shown[0]) == 5
    for one, other in zip(*shown, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_callers_draws_are_not_touched(folder):
    _, streamed = both(folder)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(batches(streamed.train.images, 64))
    assert torch.equal(torch.rand(2), expected)


def test_a_later_start_reads_only_what_has_changed(folder):
    first, told = Told(), Told()
    before = load_image_folder(folder, SIZE, in_memory=False, reporter=first)
    assert first.stages == [("indexing the images", 181)] and first.done == 181
    again = load_image_folder(folder, SIZE, in_memory=False, reporter=told)
    assert told.stages == [] and again.digest == before.digest and again.table == before.table
    # One file gets other pixels, one comes and one goes.
    Image.new("RGB", (7, 7), "red").save(folder / "dog" / "4.png")
    Image.new("RGB", (7, 7), "blue").save(folder / "dog" / "x.png")
    (folder / "emu" / "5.png").unlink()
    settings = before.preparation.settings()
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    index = FolderIndex(folder, 3, settings)
    index.update(files, Reporter())
    assert index.read == 2
    held, streamed = both(folder)
    assert held.digest == streamed.digest != before.digest
    # Another preparation gives other pixels: an index of its own.
    other = FolderIndex(folder, 3, settings | {"exif": False})
    other.update(files, Reporter())
    assert other.read == len(files)


def test_an_interrupted_index_is_kept(folder):
    class Stopped(Told):
        def update(self, stage, done, facts):
            if done >= 64:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_image_folder(folder, SIZE, in_memory=False, reporter=Stopped())
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    index = FolderIndex(folder, 3, load_image_folder(folder, SIZE).preparation.settings())
    index.update(files, Reporter())
    assert 0 < index.read <= 181 - 64


def test_a_damaged_index_is_made_again(folder):
    before = load_image_folder(folder, SIZE, in_memory=False)
    (path,) = (folder.parent / "cache").glob("images-*.npz")
    for content in (b"", path.read_bytes()[:2000], b"PK nothing"):
        path.write_bytes(content)
        assert load_image_folder(folder, SIZE, in_memory=False).digest == before.digest


def test_damaged_files_are_all_named(folder):
    for name in ("cat/1.png", "emu/9.png"):
        (folder / name).write_bytes(b"none")
    messages = []
    for held in (True, False):
        with pytest.raises(UserError) as caught:
            load_image_folder(folder, SIZE, in_memory=held)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "2 file(s)" in messages[0]
    assert "cat/1.png" in messages[0] and "emu/9.png" in messages[0]


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_file_that_changes_during_a_run_is_named(folder, change):
    data = load_image_folder(folder, SIZE, in_memory=False)
    file = data.train.files[60]
    if change == "gone":
        os.unlink(file)
    else:
        Image.new("RGB", (7, 7)).save(file)
    for read in (lambda: data.train.images[60], lambda: list(batches(data.train.images, 32))):
        with pytest.raises(UserError) as caught:
            read()
        assert file in str(caught.value) and "\n" not in str(caught.value)


def test_what_takes_more_than_a_quarter_of_memory_is_streamed(folder, monkeypatch):
    needed = 181 * 12 * 10 * 3
    monkeypatch.setattr(memory, "memory_bytes", lambda: 4 * needed)
    assert isinstance(load_image_folder(folder, SIZE).train.images, np.ndarray)
    monkeypatch.setattr(memory, "memory_bytes", lambda: 4 * needed - 4)
    assert isinstance(load_image_folder(folder, SIZE).train.images, StreamedImages)
    assert isinstance(load_image_folder(folder, SIZE, in_memory=True).train.images, np.ndarray)
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match="`images_in_memory` is True, but 181 images take"):
        load_image_folder(folder, SIZE, in_memory=True)
    assert memory.are_held(10, 10, False) is False


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text("12345\n")
    monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "none")))
    assert memory.memory_bytes() == 12345
    limit.write_text("max\n")
    assert memory.memory_bytes() > 2**28


class Numbers:
    """A dataset of arrays; `noise` makes every reading another one."""

    def __init__(self, count, seed, noise=False):
        self.pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)
        self.noise = noise

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        pixels = self.pixels[index]
        if self.noise:
            pixels = np.random.default_rng(time.perf_counter_ns()).permutation(pixels)
        return pixels, index % 3


def test_datasets_are_streamed_by_themselves():
    given = Numbers(90, 0), Numbers(31, 1)
    held, streamed = (from_datasets(*given, in_memory=one) for one in (True, False))
    assert isinstance(streamed.validation.images, StreamedImages)
    for name in ("digest", "mean", "std", "table"):
        assert getattr(held, name) == getattr(streamed, name)
    assert (held.test.images == streamed.test.images[:]).all()
    assert (held.train.labels == streamed.train.labels).all()


def test_a_dataset_with_random_transforms_cannot_be_streamed():
    with pytest.raises(UserError, match="train image 0 is another each time it is read"):
        from_datasets(Numbers(60, 0, noise=True), Numbers(20, 1), in_memory=False)
    from_datasets(Numbers(60, 0, noise=True), Numbers(20, 1))  # one reading of it is held


class Broken(Numbers):
    def __getitem__(self, index):
        if index == 77:
            raise RuntimeError("no such\nrow")
        return super().__getitem__(index)


def test_what_a_dataset_raises_is_one_line():
    with pytest.raises(UserError) as caught:
        from_datasets(Broken(90, 0), Numbers(20, 1), in_memory=False)
    assert "RuntimeError: no such row" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="train image 80 is"):
        from_datasets(Uneven(90, 0), Numbers(20, 1), in_memory=False)


class Uneven(Numbers):
    def __getitem__(self, index):
        pixels, label = super().__getitem__(index)
        return (pixels[1:] if index == 80 else pixels), label


def test_runs_of_an_earlier_version_know_their_images():
    """Its digest was one of all pixels at once."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
    split = Split(pixels, np.arange(8) % 2)
    data = from_splits("own", {"train": split, "validation": split}, None, (0.5,), (0.25,))

    parts = [
        sha256_array(one.images) + sha256_array(one.labels)
        for one in (data.train, data.validation, data.test)
    ]
    expected = hashlib.sha256(f"{''.join(parts)} (0.5,) (0.25,)".encode()).hexdigest()
    assert former_digest(data) == expected != data.digest
    assert replace(data, mean=(0.4,)).digest == data.digest  # it is made once
