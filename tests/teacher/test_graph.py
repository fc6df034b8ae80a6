"""Tracing: what is understood, and what is refused by name."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moodistill
from moodistill.errors import UserError
from moodistill.teacher.graph import trace

SHAPE = (3, 8, 8)
# Their job is to find a problem by its name, or to try the statistics of well-known data.
PROBLEM_FILES = ("task.py", "weights.py", "preparations.py")


class Net(nn.Module):
    """A stem of 8 channels, something in the middle, a linear head."""

    def __init__(self, middle=None, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)
        self.middle = middle

    def forward(self, x):
        x = self.norm(self.stem(x))
        if self.middle is not None:
            x = self.middle(self, x)
        return self.head(torch.flatten(self.pool(x), 1))


class Shared(Net):
    """Calls `middle` as a function of the whole network."""

    def forward(self, x):
        return self.middle(self, x)


def kinds(graph):
    return {step.name: step.kind for step in graph.steps}


@pytest.mark.parametrize(
    ("name", "middle", "modules"),
    [
        ("sort", lambda net, x: torch.sort(x)[0], {}),
        ("Softmax", lambda net, x: net.odd(x), {"odd": nn.Softmax(dim=2)}),
        (
            "ConvTranspose2d",
            lambda net, x: net.odd(x),
            {"odd": nn.ConvTranspose2d(8, 8, 1, groups=2)},
        ),
        (
            "InstanceNorm2d",
            lambda net, x: net.odd(x),
            {"odd": nn.InstanceNorm2d(8, track_running_stats=True)},
        ),
        ("permute", lambda net, x: x.permute(0, 1, 3, 2), {}),
        ("mean", lambda net, x: x.mean(1, keepdim=True) + x, {}),
        ("mean", lambda net, x: x.mean(2, keepdim=True) + x, {}),
        ("LocalResponseNorm", lambda net, x: net.odd(x), {"odd": nn.LocalResponseNorm(2)}),
        ("LayerNorm", lambda net, x: net.odd(x), {"odd": nn.LayerNorm((8, 8, 8))}),
        ("matmul", lambda net, x: torch.matmul(x, x), {}),
        ("Softmax", lambda net, x: F.softmax(x, dim=3), {}),
        ("chunk", lambda net, x: x.chunk(2, 3)[0], {}),
        ("add", lambda net, x: torch.add(x, net.conv(x), alpha=0.5), {}),
    ],
)
def test_an_unknown_operation_is_refused_by_name(name, middle, modules):
    with pytest.raises(UserError, match=name) as caught:
        trace(Net(middle, **modules), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("match", "odd"),
    [
        (r"odd: Linear on a tensor of shape \(8, 8, 8\)", nn.Linear(8, 8)),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(match, odd):
    with pytest.raises(UserError, match=match):
        trace(Net(lambda net, x: net.odd(x), odd=odd), SHAPE)


def test_a_norm_behind_a_flatten_is_refused():
    net = Shared(
        lambda net, x: net.last(net.odd(torch.flatten(net.stem(x), 1))),
        odd=nn.BatchNorm1d(512), last=nn.Linear(512, 4),
    )  # fmt: skip
    with pytest.raises(UserError, match="odd: BatchNorm behind a flatten"):
        trace(net, SHAPE)


class TwoInputs(Net):
    """Takes a second image."""

    def forward(self, x, other):
        return super().forward(x) + super().forward(other)


class Optional(Net):
    """Has a second input with a default."""

    def forward(self, x, factor=None):
        return super().forward(x)


def test_a_second_input_is_refused():
    with pytest.raises(UserError, match="second input 'other'.*wrapper"):
        trace(TwoInputs(), SHAPE)


def test_an_optional_argument_keeps_its_default():
    assert [step.kind for step in trace(Optional(), SHAPE).steps].count("input") == 1


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda net, x: net.conv(net.stem(x)), ["logits"]),
        (lambda net, x: (net.head(net.pool(net.stem(x)).flatten(1)), [net.conv(net.stem(x)), None]),
         ["output_0", "output_1.output_0"]),
        (lambda net, x: {"scores": net.head(net.pool(net.stem(x)).flatten(1))}, ["logits"]),
        (lambda net, x: F.softmax(net.head(net.pool(net.stem(x)).flatten(1)), -1), ["logits"]),
    ],
)  # fmt: skip
def test_outputs_of_any_form_are_read(forward, names):
    graph = trace(Shared(forward), SHAPE)
    assert list(graph.outputs) == names and not graph.whole
    frozen = {group for step in graph.outputs.values() for group in step.groups}
    assert frozen <= set(graph.grouping.frozen)
    assert list(graph.gives().values()) in ([], ["probabilities"])


def test_a_network_without_a_tensor_is_refused():
    with pytest.raises(UserError, match="gives no tensor"):
        trace(Shared(lambda net, x: None), SHAPE)
    with pytest.raises(UserError, match=r"output output_1 is a constant \(4, 8\)"):
        trace(Shared(lambda net, x: (net.conv(net.stem(x)), net.head.weight)), SHAPE)


def test_attention_is_refused_by_name():
    net = Shared(
        lambda net, x: net.last(net.odd(x.flatten(2), x.flatten(2), x.flatten(2))[0]),
        odd=nn.MultiheadAttention(64, 2), last=nn.Linear(64, 4),
    )  # fmt: skip
    with pytest.raises(UserError, match="could be cut: operation MultiheadAttention"):
        trace(net, SHAPE)


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x: net.conv(x) if x.sum() > 0 else x,
        lambda net, x: [x for _ in range(int(x.max()))][0],
        lambda net, x: 1 / 0,
    ],
)
def test_what_cannot_be_traced_is_refused_by_the_networks_name(middle):
    with pytest.raises(UserError, match="Net cannot be traced by torch.fx") as caught:
        trace(Net(middle), SHAPE)
    assert "\n" not in str(caught.value)


def test_a_wrong_input_shape_is_refused(capfd):
    with pytest.raises(UserError, match=r"input \(1, 1, 8, 8\)"):
        trace(Net(), (1, 8, 8))
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out  # one line for the user, from the caller


def test_a_view_across_pictures_is_refused():
    """Only the flatten of one image keeps channels apart."""
    with pytest.raises(UserError, match="output logits: .* mixes images"):
        trace(Shared(lambda net, x: net.head(net.stem(x).reshape(-1, 8))), SHAPE)


@pytest.mark.parametrize("name", ["input", "output", "add", "x", "relu", "flatten"])
def test_any_name_of_a_layer_will_do(name):
    """Names of modules, of traced operations and of the image do not get mixed up."""

    def forward(net, x):
        x = F.relu(net.stem(x))
        y = F.relu(getattr(net, name)(x))
        return net.head(torch.flatten(net.pool(net.conv(y) + x), 1))

    net = Shared(forward, **{name: nn.Conv2d(8, 12, 1), "conv": nn.Conv2d(12, 8, 1)})
    graph = trace(net, SHAPE)
    assert [step.name for step in graph.layers] == ["stem", name, "conv", "head"]
    assert [graph.groups[step.groups[0]] for step in graph.layers] == [8, 12, 8, 4]
    assert [graph.groups[step.reads[0]] for step in graph.layers] == [3, 8, 12, 8]
    assert len({step.name for step in graph.steps}) == len(graph.steps)


def test_a_layer_called_input_as_the_first_one():
    net = Shared(
        lambda net, x: net.head(torch.flatten(net.pool(net.input(x)), 1)),
        input=nn.Conv2d(3, 8, 1),
    )
    graph = trace(net, SHAPE)
    (first, head) = graph.layers
    assert first.reads[0] != first.groups[0] and head.reads[0] == first.groups[0]
    assert graph.groups[first.reads[0]] == 3 and graph.groups[first.groups[0]] == 8


def test_everything_that_is_supported():
    def forward(net, x):
        x = net.gelu(net.norm(net.stem(x)))
        y = torch.relu(net.conv(x))
        y += x
        x = torch.add(net.drop(y), x)
        x = F.max_pool2d(F.relu(x, inplace=True), 2)
        x = F.avg_pool2d(x, 2).relu()
        return net.last(net.bn(net.first(x.flatten(1))))

    net = Shared(
        forward, gelu=nn.GELU(), drop=nn.Dropout2d(), first=nn.Linear(32, 6),
        bn=nn.BatchNorm1d(6), last=nn.Linear(6, 4),
    )  # fmt: skip
    graph = trace(net, SHAPE)
    assert [step.name for step in graph.layers] == ["stem", "conv", "first", "last"]
    by_name = {step.name: step for step in graph.steps}
    assert by_name["stem"].groups[0] == by_name["conv"].groups[0] == "stem"
    assert by_name["flatten"].form.repeat == 4 and by_name["first"].form.repeat == 1
    assert sum(step.kind == "merge" for step in graph.steps) == 2
    assert graph.steps[-1].groups == ("last",) and graph.input_shape == SHAPE
    assert by_name["conv"].shape == (8, 8, 8) and by_name["first"].shape == (6,)


def test_dead_code_is_left_out():
    def forward(net, x):
        x = net.stem(x)
        torch.sort(x)
        net.conv(x)
        return net.head(torch.flatten(net.pool(x), 1))

    assert [step.name for step in trace(Shared(forward), SHAPE).layers] == ["stem", "head"]


def test_the_shipped_teachers(digits, vgg16, resnet18):
    counts = [(len(p.graph.layers), len(p.layout.merges)) for p in (digits, vgg16, resnet18)]
    assert counts == [(10, 2), (15, 0), (21, 8)]


@pytest.mark.parametrize("room", ["genome", "student", "teacher"])
def test_no_architecture_is_named(room):
    """General rules only: no name of an architecture, of its layers or of a problem in code."""
    files = sorted((Path(moodistill.__file__).parent / room).glob("*.py"))
    found = {path.name: named_words(path) for path in files if path.name not in PROBLEM_FILES}
    assert len(found) > 3 and not any(found.values()), found


def named_words(path):
    """Words in a module's code, but for docstrings, that name what no general rule should."""
    tree = ast.parse(path.read_text())
    words = []
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            docstrings.add(id(node.body[0].value))
        if isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.alias):
            words.append(node.name)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            words.append(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            words.append(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words += [node.value] if id(node) not in docstrings else []
    named = ("vgg", "resnet", "digits", "cifar", "downsample", "classifier", "shortcut", "problems")
    return [w for w in words for name in named if name in w.lower()]
