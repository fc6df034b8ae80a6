"""Inheritance, scoring, distillation and training on another device than the CPU.

Without an accelerator that is a second device with real numbers, which refuses to mix with the CPU
(`helpers.second_device`). `pytest -m cuda` does the same on a GPU.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_genome
from helpers.second_device import NAME, second_device

from moodistill import accelerator
from moodistill.accelerator import find_device, in_batches, needs_memory
from moodistill.cluster.tasks import device_here
from moodistill.config import Budget, new_config
from moodistill.errors import UserError
from moodistill.progress import QuietReporter
from moodistill.runs.backend import Places
from moodistill.runs.compatibility import device_of_resumed
from moodistill.runs.run import resume_run, start_run
from moodistill.settings import Settings
from moodistill.student import torch_scorer
from moodistill.student.builder import build_student
from moodistill.student.changes import ChangeErrors
from moodistill.student.context import load_context
from moodistill.student.evaluator import Evaluator, Recipe, make_student
from moodistill.student.inherit import inherit
from moodistill.student.slicing import low_rank
from moodistill.teacher.samples import CalibrationConfig
from moodistill.teacher.task import TrainConfig, load_task
from moodistill.training.distill import DistillConfig, SoftTargets, distill
from moodistill.training.teacher import train_teacher

CALIBRATION = CalibrationConfig(images=64, pixels=2000, patches=1000)


@pytest.fixture(params=[NAME, pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    monkeypatch.setattr(accelerator, "mixed_precision", lambda device=None: False)
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with second_device() as found:
        yield found


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def contexts(device, kept):
    """The digits' teacher on the CPU and on the device."""
    task = load_task("digits")
    return [
        load_context(task, calibration=CALIBRATION, cache_dir=kept, device=one)
        for one in (torch.device("cpu"), device)
    ]


def genomes(layout, count=4):
    rng = np.random.default_rng(1)
    return [random_genome(layout, rng, bypass=True) for _ in range(count)]


def alike(one, other, device):
    """Equal numbers: the second device computes as the CPU does, a GPU nearly so."""
    assert one.keys() == other.keys()
    tolerance = 0.0 if device.type == NAME else 1e-2
    for name, tensor in one.items():
        assert other[name].device.type == "cpu"
        assert torch.allclose(tensor.double(), other[name].double(), tolerance, tolerance), name


def test_samples_are_taken_there_once(contexts, device):
    here, there = contexts
    for name, rows in there.samples.inputs.items():
        assert rows.device.type == device.type
        assert torch.allclose(rows.cpu(), here.samples.inputs[name], 1e-3, 1e-3)
    assert there.samples.images.device.type == device.type
    assert next(there.solver.module.parameters()).device.type == device.type
    assert next(there.graph.module.parameters()).device.type == "cpu"


def test_a_student_inherits_the_same_weights(contexts, device):
    here, there = contexts
    for genome in genomes(here.layout):
        one, other = (make_student(context, genome, Recipe()) for context in contexts)
        alike(one.module.state_dict(), other.module.state_dict(), device)


@pytest.mark.parametrize("mode", ["student", "slice"])
def test_every_mode_of_inheritance(contexts, device, mode):
    recipe = Recipe(inherit=replace(Recipe().inherit, mode=mode))
    genome = genomes(contexts[0].layout, 1)[0]
    one, other = (make_student(context, genome, recipe) for context in contexts)
    alike(one.module.state_dict(), other.module.state_dict(), device)


def test_merges_bypasses_ranks_and_taps_of_a_larger_network(resnet18, device):
    """Without an image file or ONNX: what is solved there is what is solved here."""
    there = replace(resnet18.graph, module=copy.deepcopy(resnet18.graph.module).to(device))
    samples = resnet18.samples.to(device)
    rng = np.random.default_rng(3)
    genome = random_genome(resnet18.layout, rng, bypass=True)
    one, other = (build_student(resnet18.graph, resnet18.layout, genome) for _ in range(2))
    inherit(one, resnet18.graph, resnet18.samples)
    other.module.to(device)
    inherit(other, there, samples)
    alike(one.module.state_dict(), other.module.cpu().state_dict(), device)


def test_low_rank_on_the_device(device):
    matrix = torch.randn(7, 12)
    for given in (matrix, matrix.T.contiguous()):
        first, last = low_rank(given.to(device), 3)
        assert first.device.type == device.type
        expected = torch.linalg.svd(given)
        best = expected.U[:, :3] @ torch.diag(expected.S[:3]) @ expected.Vh[:3]
        assert torch.allclose(last.cpu() @ first.cpu(), best, atol=1e-4)


def test_errors_of_single_changes_are_the_same(contexts, device):
    images = contexts[0].data.normalise(contexts[0].data.validation.images[:40])
    found = [ChangeErrors(c.graph, c.layout, c.samples, images, c.data.meaning) for c in contexts]
    for genome in genomes(contexts[0].layout, 2):
        one, other = (errors.error(genome) for errors in found)
        assert other == pytest.approx(one, rel=1e-6 if device.type == NAME else 0.05) and one > 0


def test_a_score_is_that_of_onnx_runtime(contexts, device):
    scored = [
        [Evaluator(context, Recipe(), None, 8).score(genome) for genome in genomes(context.layout)]
        for context in contexts
    ]
    for one, other in zip(*scored, strict=True):
        assert one.evaluation.failure is None is other.evaluation.failure
        assert abs(one.evaluation.accuracy - other.evaluation.accuracy) <= 0.003
        assert one.key == other.key and other.evaluation.seconds["accuracy"] > 0
        if device.type == NAME:
            assert one.model == other.model


def test_the_first_student_and_a_share_of_the_others_are_compared(contexts, monkeypatch):
    compared = []
    real = torch_scorer.TorchScorer.check
    monkeypatch.setattr(
        torch_scorer.TorchScorer, "check", lambda s, a, b: compared.append(1) or real(s, a, b)
    )
    monkeypatch.setattr("moodistill.student.evaluator.is_checked", lambda digest: False)
    evaluator = Evaluator(contexts[1], Recipe(), None, 8)
    some = genomes(contexts[1].layout, 3)
    for genome in some:
        assert evaluator.evaluate(genome).failure is None
    assert len(compared) == 1
    monkeypatch.setattr("moodistill.student.evaluator.is_checked", lambda digest: True)
    evaluator.evaluate(some[0])
    assert len(compared) == 2
    shares = [torch_scorer.is_checked(f"{n:08x}ab") for n in range(160)]
    assert sum(shares) == 10


def test_a_student_whose_file_answers_otherwise_fails(contexts, monkeypatch):
    real = torch_scorer.outputs
    monkeypatch.setattr(
        torch_scorer,
        "outputs",
        lambda *a: ({n: r + 0.5 * abs(r).max() for n, r in rows.items()} for rows in real(*a)),
    )
    found = Evaluator(contexts[1], Recipe(), None, 8).evaluate(genomes(contexts[1].layout, 1)[0])
    assert "differ by" in found.failure and "at most 0.01 allowed" in found.failure


def test_distillation_ends_with_the_same_weights(contexts, device, tmp_path):
    config = DistillConfig(steps=5, batch_size=8, views=3)
    genome = genomes(contexts[0].layout, 1)[0]
    made, keys = [], []
    for context in contexts:
        student = make_student(context, genome, Recipe()).module
        targets = SoftTargets(context.solver.module, context.data, config, tmp_path, "digest")
        made.append(distill(student, targets, config, 1).state_dict())
        keys.append(targets.key)
    alike(*made, device)
    assert keys[0] != keys[1]  # the cache keeps the answers of two kinds of devices apart


def test_an_interrupted_distillation_is_carried_on_there(contexts, device, tmp_path, monkeypatch):
    monkeypatch.setattr("moodistill.training.distill.CHECKPOINT_SECONDS", -1.0)
    config = DistillConfig(steps=5, batch_size=8, views=3)
    context = contexts[1]
    student = make_student(context, genomes(context.layout, 1)[0], Recipe()).module
    targets = SoftTargets(context.solver.module, context.data, config, None, "")

    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student, targets, config, 1, stop, tmp_path / "c")
    steps = []
    found = distill(student, targets, config, 1, lambda s, _: steps.append(s), tmp_path / "c")
    alike(distill(student, targets, config, 1).state_dict(), found.state_dict(), device)
    assert steps == [4, 5]


def test_a_teacher_is_trained_there(device, tmp_path):
    task = replace(load_task("digits"), train=TrainConfig(phases=((1, 32),), batch_size=200))
    data = task.load_data(None)
    small = replace(data, train=data.train.head(400), test=data.test.head(50))
    reports = []
    for one in (torch.device("cpu"), device):
        path = tmp_path / f"{one.type}.safetensors"
        reports.append(train_teacher(task, small, path, one, QuietReporter()))
    assert abs(reports[0]["test_accuracy"] - reports[1]["test_accuracy"]) <= 0.05
    assert reports[1]["device"] == str(device)


def test_a_run_on_the_device_is_carried_on_there_alone(device, tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))
    settings = Settings(
        population=4, generations=1, finalists=1, distill_steps=2, simd_step=8, int8_twins=False,
        calibration_images=64, score_images=50,
    )  # fmt: skip
    config, out = new_config("digits", settings), tmp_path / "run"
    there = Places(threads=1, device=device.type)
    start_run(config, out, there, QuietReporter())
    stored = json.loads((out / "run.json").read_text())
    assert stored["status"] == "finished" and stored["computed_on"] == device.type
    assert stored["config"]["calibration"]["images"] == 64
    with pytest.raises(UserError, match=f"was computed on {device.type}, not on cpu"):
        resume_run(out, Budget(generations=2), replace(there, device="cpu"), QuietReporter())


def test_auto_takes_what_is_there_and_a_resume_what_the_run_had(monkeypatch, tmp_path):
    assert device_of_resumed(tmp_path, {}, "auto") == "cpu"
    monkeypatch.setattr(accelerator, "device_count", lambda kind: 0)
    assert find_device("auto") == find_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(accelerator, "device_count", lambda kind: int(kind == "xpu"))
    assert find_device("auto").type == "xpu"
    assert device_of_resumed(tmp_path, {"computed_on": "cpu"}, "auto") == "cpu"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "`device` is 'gpu'; expected auto, cpu, cuda, cuda:N, mps or xpu"),
        ("cuda:x", "`device` is 'cuda:x'; expected"),
        ("meta", "holds no numbers"),
    ],
)
def test_a_device_that_is_none(name, words):
    with pytest.raises(UserError) as caught:
        find_device(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("command", [("run",), ("teacher",)])
def test_a_device_that_is_not_there_ends_a_command_with_2(call, tmp_path, command):
    error = call(
        *command, "--model", "digits", "--device", "cuda", "--out", tmp_path / "r", code=2
    ).stderr
    assert "--device is cuda, which cannot be used here" in error
    assert not (tmp_path / "r").exists()


def test_a_number_that_is_too_large(monkeypatch):
    monkeypatch.setattr(accelerator, "device_count", lambda kind: 2)
    with pytest.raises(UserError, match="is cuda:2, there are 2: expected cuda:0 to cuda:1"):
        find_device("cuda:2")


def test_batches_shrink_where_memory_is_short():
    asked = []

    def run(start, end):
        asked.append(end - start)
        if end - start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(start, end))

    assert sum(in_batches(run, 10, 10), []) == list(range(10))
    assert asked == [10, 5, 3, 3, 3, 1]
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(lambda start, end: run(0, 9), 5, 8)


def test_too_little_memory_is_one_line(contexts, monkeypatch):
    words = "cuda has too little memory for x; do y, or compute on"
    with pytest.raises(UserError, match=words), needs_memory(torch.device("cuda"), "x", "do y"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moodistill.student.evaluator.inherit", full)
    found = Evaluator(contexts[1], Recipe(), None, 8).evaluate(contexts[1].layout.teacher())
    assert "too little memory for a student and 64 calibration images" in found.failure


def test_too_little_memory_shows_before_a_run_begins(device, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moodistill.student.torch_scorer.in_batches", full)
    config = new_config("digits", Settings(simd_step=8, calibration_images=64, score_images=50))
    with pytest.raises(UserError, match="has too little memory for a student and one image"):
        start_run(config, tmp_path / "run", Places(device=device.type), QuietReporter())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "place", "own", "count", "expected"),
    [
        ("cuda", 0, None, 4, "cuda:0"),
        ("cuda", 3, None, 4, "cuda:3"),
        ("cuda", 5, None, 4, "cuda:1"),  # more workers than devices: several share one
        ("cuda", 2, None, 1, "cuda:0"),
        ("cuda:1", 2, None, 4, "cuda:1"),
        ("cuda", None, None, 4, "cuda"),  # elsewhere, and it says nothing
        ("cuda", None, "cuda:2", 4, "cuda:2"),
        ("cuda", 0, None, 0, "cuda"),  # refused when it is looked for
        ("cpu", 1, None, 0, "cpu"),
    ],
)
def test_workers_take_a_device_each(monkeypatch, asked, place, own, count, expected):
    monkeypatch.setattr("moodistill.cluster.tasks.device_count", lambda kind: count)
    assert device_here(asked, place, own) == expected


def test_a_worker_of_another_kind_is_refused():
    with pytest.raises(UserError, match="MOODISTILL_DEVICE is cpu, the run computes on cuda"):
        device_here("cuda", None, "cpu")
