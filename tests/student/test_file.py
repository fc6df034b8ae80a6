"""Student files: an exact round trip, and every damage is told in one line."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from helpers import random_genome

from moodistill.errors import UserError
from moodistill.genome.canonical import canonical
from moodistill.io.tensorfile import read_safetensors
from moodistill.student.builder import build_student
from moodistill.student.file import load_student, save_student
from moodistill.student.inherit import inherit


def made(context, genome):
    student = build_student(context.graph, context.layout, genome)
    inherit(student, context.graph, context.samples)
    return student


@pytest.fixture(scope="module")
def genome(digits):
    """Masks, a split layer, a bypassed layer and a dropped edge."""
    layout = digits.layout
    genome = layout.teacher()
    layout.view(genome, "mask/block2a.0")[:40] = False
    layout.view(genome, "block/conv4.0")[0, 1:] = False
    layout.view(genome, "bypass/hidden")[0] = False
    layout.view(genome, "merge/add")[0] = False
    return canonical(layout, genome, 8)


@pytest.fixture(scope="module")
def stored(digits, genome, tmp_path_factory):
    """A student's file, and its logits on a few images."""
    student = made(digits, genome)
    path = tmp_path_factory.mktemp("students") / "student.safetensors"
    save_student(student, digits.layout, genome, path, "digits")
    with torch.no_grad():
        return path.read_bytes(), student.module(pictures())


@pytest.fixture(scope="module")
def untrained(digits):
    return digits.task.build()


def pictures():
    return torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(path, teacher):
    student, genome = load_student(path, teacher, (1, 32, 32))
    with torch.no_grad():
        return student.module(pictures()), genome


def parts(data):
    """A safetensors file's header and its tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, tensors):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def test_round_trip_from_architecture_and_file_alone(digits, untrained, tmp_path):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        genome = random_genome(digits.layout, rng, bypass=True)
        genome = canonical(digits.layout, genome, (1, 8)[seed % 2])
        student = made(digits, genome)
        path = tmp_path / "deep" / f"{seed}.safetensors"
        save_student(student, digits.layout, genome, path, "digits")
        found, restored = logits(path, untrained)
        assert (restored == genome).all()
        with torch.no_grad():
            assert torch.equal(found, student.module(pictures()))
        _, metadata = read_safetensors(path)
        assert metadata["task"] == "digits" and metadata["moodistill_format"] == "5"
    assert not [p for p in path.parent.iterdir() if p.suffix != ".safetensors"]


def test_a_genome_that_needs_repair_is_refused_or_comes_back(digits, untrained, tmp_path):
    """The repair knows energies and importances that the file does not hold."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        genome = rng.random(digits.layout.length) < 0.3
        student = build_student(digits.graph, digits.layout, genome)
        path = tmp_path / f"{seed}.safetensors"
        try:
            save_student(student, digits.layout, genome, path, "digits")
        except ValueError:
            continue
        found, _ = logits(path, untrained)
        with torch.no_grad():
            assert torch.equal(found, student.module(pictures()))


def test_teacher_weights_are_not_used(stored, untrained, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(stored[0])
    with torch.no_grad():
        for tensor in untrained.state_dict().values():
            tensor.zero_()
    assert torch.equal(logits(path, untrained)[0], stored[1])


def test_a_truncated_file_is_a_user_error(stored, untrained, tmp_path):
    data, _ = stored
    path = tmp_path / "s.safetensors"
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"s\.safetensors"):
            logits(path, untrained)
    with pytest.raises(UserError, match="does not exist"):
        logits(tmp_path / "none.safetensors", untrained)
    with pytest.raises(UserError):
        logits(tmp_path, untrained)


def test_another_architecture_is_a_user_error(stored, vgg16, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(stored[0])
    with pytest.raises(UserError, match="does not describe a student of VGG"):
        load_student(path, vgg16.teacher, (3, 32, 32))


def test_a_teacher_file_is_no_student_file(digits, untrained):
    with pytest.raises(UserError, match="no student file"):
        logits(digits.task.weights, untrained)


@pytest.mark.parametrize("key", ["moodistill_format", "genome", "blocks", "frozen"])
def test_missing_metadata_is_a_user_error(stored, untrained, tmp_path, key):
    header, tensors = parts(stored[0])
    del header["__metadata__"][key]
    path = tmp_path / "s.safetensors"
    path.write_bytes(joined(header, tensors))
    match = "no student file" if key == "moodistill_format" else key
    with pytest.raises(UserError, match=match) as caught:
        logits(path, untrained)
    assert "\n" not in str(caught.value)


def odd_values(metadata):
    """Metadata that is well-formed where it is read first and odd behind that."""
    blocks = json.loads(metadata["blocks"])
    group = "conv3.0"
    values = blocks[group]

    def with_blocks(value):
        return {"blocks": json.dumps({**blocks, group: value})}

    yield from (
        with_blocks(value)
        for value in (
            [], None, 3, "0", {}, [[0]] * len(values), [[b] for b in values], [None] * len(values),
            ["a"] * len(values), values[:-1], [*values[:-1], -1], [*values[:-1], len(values)],
            [*values[:-1], 10**30], [*values[:-1], 1e300], [*values[:-1], 0.5], [True] * len(values),
            [len(values) - 1] * len(values), [5] * len(values), [0, 3] * (len(values) // 2),
        )
    )  # fmt: skip
    yield {"blocks": metadata["blocks"].replace("[0", "[Infinity", 1)}
    yield {"blocks": metadata["blocks"].replace("[0", "[NaN", 1)}
    yield {"blocks": json.dumps({**blocks, "more": [0]})}
    yield {"blocks": json.dumps({k: v for k, v in blocks.items() if k != group})}
    yield from ({"blocks": text} for text in ("", "{", "[]", "null", "3", "[" * 100_000))
    yield from (
        {"frozen": text}
        for text in ("[]", "{}", "null", "3", "[3]", "[[]]", '"output"', '["output"]', '["input"]',
                     '["output", "input", "conv3.0"]', "[" * 100_000)
    )  # fmt: skip
    genome = metadata["genome"]
    yield from (
        {"genome": text}
        for text in ("", "0", "zz", genome[2:], genome + "00", "00" * (len(genome) // 2),
                     "ff" * (len(genome) // 2), "0f" * (len(genome) // 2), "é" * len(genome))
    )  # fmt: skip
    yield {"moodistill_format": "2"}
    yield {"moodistill_format": ""}
    # Both the groups without a mask and the genome: consistent in length, and wrong.
    length = len(genome) // 2
    for extra in (b"\xff", b"\0", b"\x5a"):
        for frozen in ("[]", '["input"]', '["output"]'):
            longer = (bytes.fromhex(genome) + extra * 4)[: length + 2]
            for size in (length, length + 1, length + 2):
                yield {"genome": longer[:size].hex().ljust(2 * size, "0"), "frozen": frozen}


def test_odd_metadata_is_a_user_error_or_the_same_student(stored, untrained, tmp_path):
    data, expected = stored
    header, tensors = parts(data)
    path = tmp_path / "s.safetensors"
    refused, wrong = 0, []
    for change in odd_values(header["__metadata__"]):
        path.write_bytes(
            joined({**header, "__metadata__": {**header["__metadata__"], **change}}, tensors)
        )
        label = str(change)[:70]
        try:
            found, _ = logits(path, untrained)
            if not torch.equal(found, expected):
                wrong.append(f"another student: {label}")
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                wrong.append(f"several lines: {label}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}: {label}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert refused > 40


def flipped(data, low, high, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(low, high)
        changed[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return bytes(changed)


def test_flipped_metadata_is_a_user_error_or_the_same_student(stored, untrained, tmp_path):
    data, expected = stored
    (length,) = struct.unpack("<Q", data[:8])
    path = tmp_path / "s.safetensors"
    refused, wrong = 0, []
    for seed in range(250):
        path.write_bytes(flipped(data, 0, 8 + length, random.Random(seed)))
        try:
            found, _ = logits(path, untrained)
            if not torch.equal(found, expected):
                wrong.append(f"another student: seed {seed}")
        except UserError:
            refused += 1
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}: seed {seed}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert refused > 100


def test_flipped_genomes_are_a_user_error_or_the_same_student(digits, stored, genome, untrained,
                                                              tmp_path):  # fmt: skip
    """Every single bit of the genome, still valid hex: shapes alone do not tell all of them."""
    data, expected = stored
    header, tensors = parts(data)
    path = tmp_path / "s.safetensors"
    wrong = []
    rng = np.random.default_rng(0)
    named = [n for n in digits.layout.slices if not n.startswith("mask/")]
    bits = [b for n in named for b in range(*digits.layout.slices[n].indices(len(genome)))]
    for bit in sorted(rng.permutation(bits)[:60]):
        other = genome.copy()
        other[bit] = not other[bit]
        metadata = {**header["__metadata__"], "genome": digits.layout.pack(other).hex()}
        path.write_bytes(joined({**header, "__metadata__": metadata}, tensors))
        try:
            found, _ = logits(path, untrained)
        except UserError:
            continue
        if not torch.equal(found, expected):
            names = [n for n, s in digits.layout.slices.items() if s.start <= bit < s.stop]
            wrong.append(f"bit {bit} of {names}")
    assert not wrong, f"loaded another student: {wrong}"


def test_a_flipped_merge_edge_does_not_go_unnoticed(digits, untrained, tmp_path):
    """Without the identity of a residual block every tensor keeps its name and shape."""
    layout = digits.layout
    genome = layout.teacher()
    path = tmp_path / "s.safetensors"
    save_student(made(digits, genome), layout, genome, path, "digits")
    expected, _ = logits(path, untrained)
    header, tensors = parts(path.read_bytes())
    layout.view(genome, "merge/add")[1] = False
    metadata = {**header["__metadata__"], "genome": layout.pack(genome).hex()}
    path.write_bytes(joined({**header, "__metadata__": metadata}, tensors))
    try:
        found, _ = logits(path, untrained)
    except UserError:
        return
    assert torch.equal(found, expected)


def test_flipped_weights_are_noticed(stored, untrained, tmp_path):
    data, _ = stored
    (length,) = struct.unpack("<Q", data[:8])
    path = tmp_path / "s.safetensors"
    for seed in range(20):
        path.write_bytes(flipped(data, 8 + length, len(data), random.Random(seed)))
        with pytest.raises(UserError, match="does not have the digest"):
            logits(path, untrained)


def test_not_a_number_is_refused(digits, genome, untrained, tmp_path):
    student = made(digits, genome)
    with torch.no_grad():
        student.module.get_parameter("output.weight")[0, 0] = float("nan")
    path = tmp_path / "s.safetensors"
    save_student(student, digits.layout, genome, path, "digits")
    with pytest.raises(UserError, match=r"output\.weight holds NaN"):
        logits(path, untrained)
