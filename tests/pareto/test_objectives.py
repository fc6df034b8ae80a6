"""Objectives, hard limits, and the memory that a model needs."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moodistill.errors import UserError
from moodistill.onnx.memory import peak_memory_bytes
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.objectives import DEFAULT, Limits, check_objectives, objective_values

ONE = Evaluation("a", b"", 0.8, 1000, 5000, 4100, Latency(2.0, 1.9, 2.1, 0.5), memory_bytes=9000)
FAILED = Evaluation("b", b"", 0.0, 10, 10, 10, None, failure="ValueError: no")


def test_values_by_name():
    assert objective_values(ONE, DEFAULT) == (pytest.approx(0.2), 1000, 2.0)
    assert objective_values(ONE, ("accuracy", "macs", "size", "memory"))[1:] == (5000, 4100, 9000)
    assert objective_values(FAILED, DEFAULT) is None


def test_accuracy_beyond_what_is_enough_counts_for_nothing():
    assert objective_values(ONE, DEFAULT, enough=0.7) == (pytest.approx(0.3), 1000, 2.0)
    assert objective_values(ONE, DEFAULT, enough=0.9) == objective_values(ONE, DEFAULT)


def test_accuracy_comes_first():
    assert check_objectives(["latency", "accuracy"]) == ("accuracy", "latency")


@pytest.mark.parametrize(
    "names",
    [[], ["accuracy"], ["latency", "macs"], ["accuracy", "speed"], ["accuracy", "macs", "macs"]],
)
def test_impossible_objectives_are_refused(names):
    with pytest.raises(UserError, match="expected"):
        check_objectives(names)


def test_limits():
    assert Limits().keeps(ONE) and not Limits().keeps(FAILED)
    limits = Limits(0.5, max_latency_ms=1.0, max_parameters=2000)
    assert limits.violations(ONE) == (pytest.approx(-0.3), -0.5, 1.0)
    assert limits.violations(FAILED) == (1.0, 1.0, 1.0)
    assert not limits.keeps(ONE) and Limits(max_latency_ms=2.0).keeps(ONE)


@pytest.mark.parametrize(
    "settings", [{"min_accuracy": 85}, {"max_latency_ms": 0}, {"max_macs": -1}, {"max_parameters": math.nan},
     {"max_latency_ms": math.inf}, {"max_macs": 1e15}]
)  # fmt: skip
def test_impossible_limits_are_refused(settings):
    with pytest.raises(UserError, match="expected"):
        Limits(**settings)


def test_memory_by_hand():
    """input 1x4x8x8 -> conv 8 -> relu -> add of both; 1,024 and 2,048 bytes a tensor."""
    weight = numpy_helper.from_array(np.zeros((8, 4, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Add", ["c", "r"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8, 8, 8])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert peak_memory_bytes(model.SerializeToString()) == 3 * 2048 + 128


def test_memory_of_a_student_is_less_than_its_teachers(digits):
    from moodistill.student.builder import build_student

    layout, shape = digits.layout, digits.data.input_shape
    half = layout.teacher()
    for name, group in layout.groups.items():
        if not group.frozen:
            layout.view(half, f"mask/{name}")[::2] = False
    small = to_onnx(build_student(digits.graph, layout, half).module, shape)
    teacher = to_onnx(digits.graph.module, shape)
    assert peak_memory_bytes(small) < 0.6 * peak_memory_bytes(teacher)
    onnx.checker.check_model(small)
