"""Runs that were searched when there were no kernels and ranks: they open, but do not go on."""

import numpy as np
import pytest

from moodistill.data.images import metric_name
from moodistill.errors import UserError
from moodistill.runs.compatibility import check_origin, check_resumed
from moodistill.student.builder import build_student
from moodistill.teacher.weights import network_digest


def test_an_earlier_run_is_of_this_teacher_but_cannot_be_resumed(digits, tmp_path):
    stored = {
        "data_digest": digits.data.digest,
        "metric": metric_name(digits.data),
        "teacher_digest": digits.teacher_digest,
        "network_digest": network_digest(digits.graph.module),
        "genome_bits": digits.layout.former_length,
        "teacher_latencies_ms": {"here": 1.0},
    }
    assert digits.layout.former_length < digits.layout.length
    check_origin(tmp_path, stored, digits)
    with pytest.raises(UserError, match="earlier version, without kernels and ranks: start a new"):
        check_resumed(tmp_path, stored, digits, None)
    with pytest.raises(UserError, match=f"of 9 genome bits, found one of {digits.layout.length}"):
        check_origin(tmp_path, {**stored, "genome_bits": 9}, digits)


def test_students_of_an_earlier_run_are_what_they_were(digits):
    """Their packed genomes end before the bits of kernels and ranks."""
    layout = digits.layout
    genome = layout.teacher()
    layout.view(genome, "mask/conv4.0")[::2] = False
    packed = np.packbits(genome[: layout.former_length]).tobytes()
    found = layout.unpack(packed)
    assert (found == genome).all()
    student = build_student(digits.graph, layout, found)
    assert student.parameters == build_student(digits.graph, layout, genome).parameters
    assert not any(unit.expand for unit in student.units)
