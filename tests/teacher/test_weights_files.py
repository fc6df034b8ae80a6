"""Checkpoints as people keep them: read, or refused by one line that says what the file is."""

import argparse
import gzip
import pathlib
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from moodistill.errors import UserError
from moodistill.teacher.weights import load_weights, read_state


def network(classes=4):
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 6, 3, bias=False), norm=nn.BatchNorm2d(6), relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), last=nn.Linear(6, classes),
        )
    )  # fmt: skip


def state_of(seed):
    torch.manual_seed(seed)
    return network().state_dict()


GOOD, OTHER = state_of(1), state_of(2)


def put(prefix, state=GOOD):
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(path, **given):
    """The weights that are taken of a file, and what is said."""
    said = []
    state = load_weights(network(), path, say=said.append, **given).state_dict()
    return state, said


def same(one, other):
    return all(torch.equal(one[name], other[name].float()) for name in GOOD if "num_" not in name)


class Settings:
    """An object of somebody's own."""

    def __init__(self):
        self.depth, self.inner = 3, {"a": [1, 2]}


def averaged():
    model = network()
    model.load_state_dict(GOOD)
    return AveragedModel(model).state_dict()


BESIDE = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/x"), inner=argparse.Namespace(a=1)),
    "best": np.float32(0.9), "epoch": np.int64(3), "curve": np.arange(5.0), "flag": np.bool_(True),
    "config": Settings(), "meters": defaultdict(list, loss=[1.0]), "when": pathlib.PurePath("a"),
    "names": {"a", "b"}, "kind": np.dtype("float32"),
}  # fmt: skip
ONE_SET = {
    "plain": GOOD,
    "net": {"net": GOOD},
    "odd name": {"my best weights": GOOD, "epoch": 3},
    "deep": {"checkpoint": {"trainer": {"module": GOOD}}},
    "in a list": [{"epoch": 1}, GOOD],
    "ddp of compiled": {"weights": put("module._orig_mod.")},
    "compiled of ddp": put("_orig_mod.module."),
    "fsdp": put("_fsdp_wrapped_module."),
    "three prefixes": put("model.module._orig_mod."),
    # DataParallel of one part alone, as the ImageNet example of torch has it.
    "wrapped inside": {n.replace("conv.", "conv.module."): v for n, v in GOOD.items()},
    "loss beside": {"state_dict": {**put("model."), "loss.weight": torch.ones(6)}},
    "thop": {**GOOD, "total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
    "no counters": {n: v for n, v in GOOD.items() if "num_" not in n},
    "double": {n: v.double() for n, v in GOOD.items()},
    "beside": {"state_dict": GOOD, **BESIDE},
    "swa": averaged(),
    "only ema": {"ema": GOOD, "updates": 3},
    "ema twice the same": {"model": GOOD, "ema": {n: v.clone() for n, v in GOOD.items()}},
    "optimizer": {
        "params": GOOD,
        "optimizer": torch.optim.Adam(network().parameters()).state_dict(),
    },
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ONE_SET)
def test_one_set_of_weights_is_found_wherever_it_is(name, old, tmp_path):
    if old and name == "beside":
        pytest.skip("the next test")
    path = tmp_path / "best.ckpt"
    torch.save(ONE_SET[name], path, _use_new_zipfile_serialization=not old)
    state, said = loaded(path)
    assert same(state, GOOD) and not said


def test_arguments_and_numbers_of_numpy_in_the_old_form(tmp_path):
    beside = {name: BESIDE[name] for name in ("args", "best", "curve", "meters")}
    torch.save({"model": GOOD, **beside}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(loaded(tmp_path / "a.pt")[0], GOOD)


TWO_SETS = {
    "torchvision": ({"model": OTHER, "model_ema": put("module.", GOOD)}, "model_ema", "model"),
    "timm": ({"state_dict": OTHER, "state_dict_ema": GOOD}, "state_dict_ema", "state_dict"),
    "ema first": ({"ema": GOOD, "net": OTHER}, "ema", "net"),
    "by prefix": (
        {"state_dict": {**put("model.", OTHER), **put("model_ema.module.", GOOD)}},
        "state_dict.model_ema", "state_dict.model",
    ),
    "nested": ({"ema": {"state_dict": GOOD}, "model": OTHER}, "ema.state_dict", "model"),
    "swa": ({"model": OTHER, "swa_model": averaged()}, "swa_model", "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_SETS)
def test_an_average_is_preferred_and_said(name, tmp_path):
    content, taken, left = TWO_SETS[name]
    path = tmp_path / "best.pth"
    torch.save(content, path)
    state, said = loaded(path)
    assert same(state, GOOD) and not same(state, OTHER)
    assert len(said) == 1 and f"{taken} is taken" in said[0]
    assert f"the key {left} names the other" in said[0]
    state, said = loaded(path, key=left)
    assert same(state, OTHER) and not said
    assert same(loaded(path, key=taken)[0], GOOD)


def test_a_word_is_written_where_nobody_else_says_it(tmp_path, capsys):
    torch.save({"model": OTHER, "ema": GOOD}, tmp_path / "best.pth")
    load_weights(network(), tmp_path / "best.pth")
    assert "ema is taken" in capsys.readouterr().err


def test_an_average_without_what_the_network_needs_is_passed_over_aloud(tmp_path):
    parameters = {n: v for n, v in GOOD.items() if "running" not in n and "num_" not in n}
    torch.save({"model": OTHER, "ema": parameters}, tmp_path / "best.pth")
    state, said = loaded(tmp_path / "best.pth")
    assert same(state, OTHER)
    assert "ema too, but it does not fit (norm.running_mean): model is taken" in said[0]
    with pytest.raises(UserError, match=r"best.pth \(ema\) does not fit .* 2 keys missing"):
        loaded(tmp_path / "best.pth", key="ema")


@pytest.mark.parametrize(
    "content",
    [{"student": OTHER, "teacher": GOOD}, {"a_ema": OTHER, "b_ema": GOOD, "model": state_of(3)}],
)
def test_where_nothing_decides_the_user_does(content, tmp_path):
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(
        UserError, match="different sets of weights that fit .*by its key as `weights_key`, such as"
    ):
        loaded(tmp_path / "best.pth")
    key = next(name for name, state in content.items() if state is GOOD)
    assert same(loaded(tmp_path / "best.pth", key=key)[0], GOOD)
    with pytest.raises(UserError, match=f"no weights called 'nets'; expected one of .*{key}"):
        loaded(tmp_path / "best.pth", key="nets")


def test_another_head_is_refused_by_its_shape(tmp_path):
    torch.save({"model": network(10).state_dict()}, tmp_path / "best.pth")
    with pytest.raises(UserError, match=r"2 shapes differ \(first: last.bias is \(10,\), expected"):
        loaded(tmp_path / "best.pth")


def test_formats_are_known_by_content(tmp_path):
    save_file(put("module."), tmp_path / "a.pt")
    assert same(loaded(tmp_path / "a.pt")[0], GOOD)
    torch.save(GOOD, tmp_path / "b.safetensors")
    assert same(loaded(tmp_path / "b.safetensors")[0], GOOD)
    assert same(read_state(tmp_path / "b.safetensors"), GOOD)


def whole(path):
    torch.save(network(), path)


def whole_beside(path):
    optimizer = torch.optim.SGD(network().parameters(), momentum=0.9).state_dict()
    torch.save({"model": network(), "optimizer": {**optimizer, "x": torch.ones(1)}}, path)


def script(path):
    torch.jit.save(torch.jit.trace(network().eval(), torch.zeros(1, 3, 8, 8)), path)


def exported(path):
    program = torch.export.export(network().eval(), (torch.zeros(1, 3, 8, 8),))
    with open(path, "wb") as stream:  # by another name than .pt2
        torch.export.save(program, stream)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"a": np.zeros(3)}))


def arrays(path):
    with open(path, "wb") as stream:
        np.savez(stream, a=np.zeros(3))


def array(path):
    with open(path, "wb") as stream:
        np.save(stream, np.zeros(3))


def archive(path):
    with zipfile.ZipFile(path, "w") as stream:
        stream.writestr("run/best.pth", b"x")


def cut_short(path):
    torch.save(GOOD, path)
    path.write_bytes(path.read_bytes()[:1500])


def onnx_model(path):
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), path)


def zipped(path):
    path.write_bytes(gzip.compress(b"x" * 100))


def text(content):
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    "make, what, remedy",
    [
        (whole, r"a whole pickled network \(torch.nn.*Sequential\)", "net.state_dict()"),
        (whole_beside, "a whole pickled network", "weights_only=False"),
        (script, "TorchScript", "torch.jit.load("),
        (exported, "torch.export", "torch.export.load("),
        (plain_pickle, "a Python pickle", "pickle.load("),
        (arrays, "NumPy arrays", "numpy.load("),
        (array, "one NumPy array", "torch.save("),
        (archive, "a zip archive that holds run/best.pth", "unpack"),
        (cut_short, "cut short", "fetch it again"),
        (onnx_model, "an ONNX model", "exported from"),
        (zipped, "compressed by gzip", "unpack"),
        (text("version https://git-lfs.github.com/spec/v1\noid 0\n"), "Git LFS", "git lfs pull"),
        (text("<!DOCTYPE html>\n<html>log in</html>"), "a web page", "download"),
        (text("404: Not Found"), "text", "torch.save("),
        (text(""), "empty", "again"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5", "torch.save("),
        (lambda path: path.write_bytes(bytes(range(256))), "no file of weights", "torch.save("),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_named_in_one_line(make, what, remedy, tmp_path):
    path = tmp_path / "best.pth"
    make(path)
    with pytest.raises(UserError, match=what) as error:
        loaded(path)
    message = str(error.value)
    assert remedy in message and str(path) in message
    assert "\n" not in message and "\x1b" not in message and len(message) < 600


@pytest.mark.parametrize("make", [whole, script])
def test_the_two_lines_that_are_named_make_a_file_that_is_read(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pth"
    make(path)
    with pytest.raises(UserError) as error:
        loaded(path)
    lines = str(error.value).partition(" by: ")[2].partition(" (the first")[0]
    exec(lines, {"torch": torch})
    loaded(tmp_path / "weights.pt")


def leave_a_trace():
    pathlib.Path("executed").touch()


class Evil:
    def __reduce__(self):
        return (leave_a_trace, ())


class Worse:
    def __reduce__(self):
        return (pathlib.Path("executed").touch, ())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beside", [Evil, Worse])
def test_nothing_in_a_file_is_run(beside, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("evil.pt")
    torch.save({"model": GOOD, "more": beside()}, path, _use_new_zipfile_serialization=not old)
    if beside is Evil and not old:
        assert same(loaded(path)[0], GOOD)
    else:  # names cannot be listed beforehand, or what would be made is itself called
        with pytest.raises(UserError, match="cannot be read as weights") as error:
            loaded(path)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    torch.save({"state_dict": Evil()}, "none.pt")
    with pytest.raises(UserError, match="no state dict"):
        loaded(pathlib.Path("none.pt"))
    assert not pathlib.Path("executed").exists()


def test_escape_codes_and_lines_of_torch_are_left_out(tmp_path, monkeypatch):
    torch.save(GOOD, tmp_path / "a.pt")

    def fails(*_, **__):
        raise RuntimeError("\n \x1b[1mWeights only\x1b[0m load failed.\nmore\x07\nlines")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "a.pt")
    assert "(Weights only load failed.)" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_numbers_are_refused(tmp_path):
    path, weight = tmp_path / "odd.pt", GOOD["conv.weight"]
    for odd, word in (
        (torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "quantised"),
        (weight.to_sparse(), "sparse"),
        (weight.to("meta"), "on no device"),
        (weight.to(torch.complex64), "complex64"),
        (weight.to(torch.int32), "int32"),
    ):
        torch.save({**GOOD, "conv.weight": odd}, path)
        with pytest.raises(UserError, match=f"conv.weight is {word}.*floating-point"):
            loaded(path)


def test_whole_numbers_of_a_network_stay_whole(tmp_path):
    class Indexed(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("index", torch.arange(3))
            self.register_buffer("mask", torch.tensor([True, False]))

    torch.save({**Indexed().state_dict(), "index": torch.tensor([2, 1, 0])}, tmp_path / "w.pt")
    found = load_weights(Indexed(), tmp_path / "w.pt").state_dict()
    assert found["index"].tolist() == [2, 1, 0] and found["index"].dtype == torch.int64
    assert found["mask"].dtype == torch.bool


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_alone_is_named(kind, wrapped, tmp_path):
    layer = nn.Linear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1, momentum=0.9) if kind != torch.optim.AdamW else (
        kind(layer.parameters()))  # fmt: skip
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    torch.save({"optimizer": state, "epoch": 3} if wrapped else state, tmp_path / "o.pt")
    with pytest.raises(UserError, match="the state of an optimizer alone"):
        loaded(tmp_path / "o.pt")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        loaded(tmp_path)
