import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moodistill.errors import UserError
from moodistill.latency import worker as latency_worker
from moodistill.latency.device import check_provider, device_fingerprint
from moodistill.latency.meter import LatencyConfig, LatencyError, LatencyMeter
from moodistill.latency.simd import probe_simd, simd_step_of

SHAPE = (8, 24, 24)


def convolutions(depth, width=8):
    """An ONNX file of `depth` equal 3x3 convolutions."""
    nodes, tensors, value = [], [], "input"
    rng = np.random.default_rng(0)
    for i in range(depth):
        weight = rng.standard_normal((width, width, 3, 3), np.float32) * 0.1
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        value = f"r{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], axis=1))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", width])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()


REFERENCE = convolutions(4)


@pytest.fixture(scope="module")
def meter():
    with LatencyMeter(REFERENCE, SHAPE) as meter:
        yield meter


def gone(process):
    """Whether the process has ended and was waited for."""
    if process.returncode is None:
        return False
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    return True


def test_more_work_takes_longer(meter):
    small, large = meter.measure(convolutions(2)), meter.measure(convolutions(16))
    assert large.latency_ms > 2 * small.latency_ms
    for latency in (small, large):
        assert latency.low_ms <= latency.latency_ms <= latency.high_ms
        assert latency.latency_ms == pytest.approx(latency.ratio * meter.teacher_latency_ms)
        assert 8 <= len(latency.samples_ms) == len(latency.reference_ms) <= 200
        ratios = np.divide(latency.samples_ms, latency.reference_ms)
        assert latency.ratio == pytest.approx(np.median(ratios))


def test_reference_against_itself(meter):
    assert 0.7 <= meter.measure(REFERENCE).ratio <= 1.4


def test_cache(meter):
    first = meter.measure(REFERENCE, key="same")
    assert meter.measure(b"never looked at", key="same") is first
    assert meter.measure(REFERENCE, key="other") is not first


def test_rounds_are_bounded(meter):
    window = {"min_rounds": 3, "max_rounds": 5, "target": 0.0, "max_seconds": 60}
    assert len(meter.measure(REFERENCE, **window).samples_ms) == 5
    window = {"min_rounds": 4, "max_rounds": 50, "target": 0.0, "max_seconds": 0}
    assert len(meter.measure(REFERENCE, **window).samples_ms) == 4
    with pytest.raises(UserError, match="min_rounds is 9"):
        meter.measure(REFERENCE, min_rounds=9, max_rounds=5)


@pytest.mark.parametrize("model", [b"", b"garbage", REFERENCE[:-400]], ids=["empty", "junk", "cut"])
def test_bad_model(meter, model):
    with pytest.raises(LatencyError) as caught:
        meter.measure(model, key="bad")
    assert str(caught.value) and "\n" not in str(caught.value)
    assert meter.measure(REFERENCE).ratio > 0


def test_killed_worker(meter):
    calibrated = meter.teacher_latency_ms
    process = meter._worker.process
    process.kill()
    time.sleep(0.2)
    assert meter.measure(REFERENCE).ratio > 0  # found dead before the request: just replaced
    assert gone(process)

    process = meter._worker.process
    process.send_signal(signal.SIGSTOP)  # it takes the request but dies before it answers
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(LatencyError, match="exit code -9"):
        meter.measure(REFERENCE)
    assert gone(process)
    assert meter.measure(REFERENCE).ratio > 0
    assert meter.teacher_latency_ms == calibrated


def test_interrupt_does_not_leave_an_answer_behind(meter, monkeypatch):
    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latency_worker, "read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            meter.measure(REFERENCE)
    assert len(meter.measure(REFERENCE, min_rounds=3, max_rounds=3).samples_ms) == 3


def test_timeout():
    with LatencyMeter(REFERENCE, SHAPE, teacher_latency_ms=2.0) as meter:
        assert meter.teacher_latency_ms == 2.0
        meter._timeout_s = 0.5
        process = meter._worker.process
        with pytest.raises(LatencyError, match="within 0.5 s"):
            meter.measure(REFERENCE, min_rounds=10**6, max_rounds=10**6)
        assert gone(process)
        meter._timeout_s = 60
        latency = meter.measure(REFERENCE)
        assert latency.latency_ms == pytest.approx(2.0 * latency.ratio)


def test_confirm(meter):
    worker = meter._worker
    files = {"a": convolutions(2), "b": convolutions(12), "teacher": REFERENCE}
    models = {name: partial(bytes, file) for name, file in files.items()}
    done = []
    found = meter.confirm(models, report=done.append)
    assert list(found) == list(models) and done == [3]
    assert all(len(latency.samples_ms) == 64 for latency in found.values())
    assert all(latency.p90_ms >= latency.latency_ms for latency in found.values())
    assert meter.measure(REFERENCE, max_rounds=20).p90_ms is None
    assert found["a"].reference_ms == found["b"].reference_ms
    assert found["a"].latency_ms < found["b"].latency_ms
    assert 0.7 <= found["teacher"].ratio <= 1.4
    assert meter._worker is worker and worker.alive
    with pytest.raises(LatencyError, match="model broken"):
        meter.confirm({"fine": lambda: REFERENCE, "broken": lambda: b"junk"}, rounds=4)
    assert meter.confirm({}) == {}


def test_confirm_in_parts(meter, monkeypatch):
    monkeypatch.setattr("moodistill.latency.meter.CONFIRMED_TOGETHER", 2)
    opened, done = [], []

    def model(depth):
        opened.append(depth)
        return convolutions(depth)

    models = {str(depth): partial(model, depth) for depth in (2, 3, 4, 16, 17)}
    found = meter.confirm(models, rounds=6, report=done.append)
    assert list(found) == list(models) and done == [2, 4, 5]
    assert sorted(opened) == [2, 3, 4, 16, 17]
    assert max(found[n].latency_ms for n in "234") < min(found[n].latency_ms for n in ("16", "17"))


def test_windows_with_an_unsteady_reference_are_repeated(meter, monkeypatch):
    worker = latency_worker.Worker()
    start = {"input_shape": SHAPE, "threads": 1, "batch": 1, "provider": latency_worker.CPU}
    worker.start({**start, "seed": 0, "calibrate": False}, REFERENCE)
    answers = iter([True, False])
    monkeypatch.setattr(latency_worker, "unsteady", lambda times: next(answers))
    window = {"min_rounds": 2, "max_rounds": 2, "target": 0.0, "max_seconds": 1}
    answer = worker.confirm({"models": [["a", len(REFERENCE)]], **window}, REFERENCE)
    assert answer["rejected_windows"] == 1
    monkeypatch.setattr(latency_worker, "unsteady", lambda times: True)
    assert worker.measure(window, REFERENCE)["rejected_windows"] == 2


def test_uint8_input_and_batch():
    model = onnx.load_from_string(REFERENCE)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.input[0].name = "pixels"
    model.graph.node.insert(0, helper.make_node("Cast", ["pixels"], ["input"], to=1))
    with LatencyMeter(REFERENCE, SHAPE, LatencyConfig(batch=4)) as batches:
        four = batches.teacher_latency_ms
        assert 0.5 < batches.measure(model.SerializeToString()).ratio < 3
    with LatencyMeter(REFERENCE, SHAPE) as single:
        assert four > 2 * single.teacher_latency_ms


def test_provider_that_does_not_start():
    with pytest.raises(LatencyError, match="reference model"):
        LatencyMeter(REFERENCE, SHAPE, LatencyConfig(provider="NoSuchExecutionProvider"))
    with pytest.raises(UserError, match="CPUExecutionProvider"):
        check_provider("NoSuchExecutionProvider")
    check_provider("CPUExecutionProvider")


def test_no_process_is_left():
    meter = LatencyMeter(REFERENCE, SHAPE, LatencyConfig(threads=2))
    first = meter._worker.process
    meter.close()
    meter.close()
    assert gone(first) and first.returncode == 0
    assert meter.measure(REFERENCE).ratio > 0  # closing is not final
    second = meter._worker.process
    meter.close()
    assert gone(second)


def test_bad_reference_and_settings():
    with pytest.raises(LatencyError, match="reference model"):
        LatencyMeter(b"junk", SHAPE)
    with pytest.raises(UserError, match="threads is 0"):
        LatencyConfig(threads=0)
    with pytest.raises(UserError, match="teacher_latency_ms is 0"):
        LatencyMeter(REFERENCE, SHAPE, teacher_latency_ms=0)


def test_worker_leaves_when_its_parent_dies():
    script = (
        "import sys, os\n"
        "from moodistill.latency.meter import _WorkerProcess\n"
        "worker = _WorkerProcess()\n"
        "print(worker.process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # ended, though nobody has reaped the orphan yet
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_no_torch():
    script = "import sys, moodistill.latency.meter, moodistill.latency.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_unsteady_windows():
    steady = np.full(20, 1.0) + np.linspace(0, 0.05, 20)
    assert not latency_worker.unsteady(steady)
    assert latency_worker.unsteady(np.r_[steady[:10], steady[10:] * 1.3])
    assert latency_worker.unsteady(np.r_[steady[:10] * 1.3, steady[10:]])
    assert latency_worker.unsteady(np.r_[steady[:10], 2.5])
    assert not latency_worker.unsteady(np.r_[steady, steady, 2.5])


def test_order_interval_covers_the_median():
    rng = np.random.default_rng(0)
    for n in (8, 30, 101):
        hits = 0
        for _ in range(1000):
            low, high = latency_worker.order_interval(rng.standard_normal(n))
            hits += low <= 0 <= high
        assert 920 <= hits <= 995


def test_device_fingerprint():
    fingerprint = device_fingerprint(LatencyConfig(threads=2))
    assert fingerprint["threads"] == 2 and fingerprint["cores"] >= 1
    assert fingerprint["provider"] == "CPUExecutionProvider"
    assert fingerprint["onnxruntime"] and fingerprint["cpu"] and fingerprint["options"]


def test_simd_step_from_a_sweep():
    widths = range(32, 65, 4)
    for step in (4, 8, 16, 32):
        # A device that computes whole blocks only.
        ratios = {w: (-(-w // step) * step / 64) ** 2 for w in widths}
        assert simd_step_of(ratios) == step
    noise = np.random.default_rng(0)
    noisy = {w: (-(-w // 8) * 8 / 64) ** 2 * noise.uniform(0.98, 1.02) for w in widths}
    assert simd_step_of(noisy) == 8


def test_probe_on_this_device_is_kept(tmp_path):
    probe = probe_simd(None, tmp_path)
    assert probe.step in (4, 8, 16, 32) and list(probe.ratios) == list(range(32, 65, 4))
    assert probe.ratios[64] == 1.0 and probe.ratios[32] < 0.7
    (stored,) = tmp_path.iterdir()
    stored.write_text(json.dumps({"step": 24, "ratios": {}}))
    assert probe_simd(None, tmp_path).step == 24
    stored.write_text("{}")
    assert probe_simd(None, tmp_path).step != 24


def test_the_profile_names_every_layer_with_its_sizes():
    with LatencyMeter(convolutions(1), SHAPE) as meter:
        layers, rest = meter.profile(convolutions(3))
    # Outputs may be counted in whole blocks of the processor's layout.
    assert [row[0] for row in layers] == [8, 8, 8] and [row[2] for row in layers] == [9] * 3
    assert [row[3] for row in layers] == [24 * 24] * 3
    assert all(row[1] in (8, 16) for row in layers)
    assert all(row[4] > 0 for row in layers) and rest > 0


def test_a_profile_of_what_cannot_be_run_leaves_the_meter_usable():
    with LatencyMeter(convolutions(1), SHAPE) as meter:
        with pytest.raises(LatencyError):
            meter.profile(b"no model")
        assert meter.profile(convolutions(1))[0]
