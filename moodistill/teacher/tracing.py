"""From a network to one flat fx graph of modules and functions, with shapes and no side shows.

`torch.fx` traces down to the modules of `torch.nn`. Afterwards constants are folded (sizes that do
not depend on the batch, weights computed from parameters), functional layers become modules, and
what does nothing in evaluation (dropout calls, stochastic depth, assertions) is taken out.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.teacher.operations import ACTIVATIONS, NORMS, SUPPORTED

PICTURES = 2  # in the batch that shapes are propagated with: an operation that mixes them shows
_INPLACE_CALLS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
)  # fmt: skip


def flat_graph(network: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """Trace a network in evaluation mode; every node's `meta` holds what it computes.

    `meta["value"]` is a fake tensor (shapes only) for `PICTURES` pictures, or a plain value.
    The network's own tensors are shared, not copied.

    Raises:
        UserError: if it cannot be traced or does not take such an input.
    """
    try:
        module = fx.symbolic_trace(network.eval())
        _refuse_attention(module)
        _drop_assertions(module.graph)
        _propagate(module, input_shape)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{type(network).__name__} cannot be traced by torch.fx with input "
            f"{(1, *input_shape)}: {reason[0]}; expected a CNN without data-dependent control flow"
        ) from error
    # Before anything unused is taken out: what works in place is used by who reads its input later.
    _order_inplace(module)
    module.graph.eliminate_dead_code()
    _fold_sizes(module.graph)
    _fold_tensors(module)
    module.graph.eliminate_dead_code()
    _calls_to_modules(module)
    _drop_no_ops(module)
    module.graph.eliminate_dead_code()
    # A new one holds what the graph uses and nothing else.
    return fx.GraphModule(module, module.graph, type(network).__name__)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node computes one tensor."""
    return isinstance(node.meta.get("value"), torch.Tensor)


class _Propagator(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, module: fx.GraphModule, key: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.key = key

    def run_node(self, n: fx.Node) -> Any:
        n.meta[self.key] = super().run_node(n)
        return n.meta[self.key]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Shapes stay; running these on fake tensors would take most of the time.
        if isinstance(self.fetch_attr(target), (*NORMS, *ACTIVATIONS)) and len(args) == 1:
            return args[0]
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def _propagate(module: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Shapes for `PICTURES` pictures, and for one more to see what depends on their number."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(inputs) > 1:
        raise UserError(f"the network has a second input {inputs[1].name!r}; expected one image")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for key, count in (("value", PICTURES), ("more", PICTURES + 1)):
        with mode:
            _Propagator(module, key).run(torch.zeros(count, *input_shape))


def _refuse_attention(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if isinstance(called, nn.MultiheadAttention):
                raise UserError(
                    f"operation MultiheadAttention (at {node.target}) is not supported: "
                    f"transformers are not; supported are {SUPPORTED}"
                )


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)


def _replace_arguments(node: fx.Node, new: dict[fx.Node, Any]) -> None:
    node.args = fx.node.map_arg(node.args, lambda n: new.get(n, n))
    node.kwargs = fx.node.map_arg(node.kwargs, lambda n: new.get(n, n))


def holds_tensor(value: Any) -> bool:
    """Whether a node's value is a tensor or has one in it."""
    if isinstance(value, tuple | list):
        return any(holds_tensor(part) for part in value)
    return isinstance(value, torch.Tensor)


def _fold_sizes(graph: fx.Graph) -> None:
    """Sizes and other plain values that do not depend on the number of pictures, as constants."""
    constants: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        _replace_arguments(node, constants)
        value = node.meta.get("value")
        plain = node.op in ("call_function", "call_method") and not holds_tensor(value)
        if plain and value == node.meta["more"]:
            constants[node] = tuple(value) if isinstance(value, torch.Size) else value


def _fold_tensors(module: fx.GraphModule) -> None:
    """Tensors computed from parameters alone (standardised weights, frozen norms) as buffers."""
    known: dict[fx.Node, Any] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(module)
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            if not all(source in known for source in node.all_input_nodes):
                continue
            arguments = fx.node.map_arg(node.args, lambda n: known[n])
            keywords = fx.node.map_arg(node.kwargs, lambda n: known[n])
            with torch.no_grad():
                if node.op == "call_method":
                    first, *rest = arguments
                    known[node] = getattr(first, str(node.target))(*rest, **keywords)
                else:
                    known[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
            if isinstance(known[node], torch.Tensor):
                name = f"_folded_{node.name}"
                if _is_view(known[node], [known[source] for source in node.all_input_nodes]):
                    known[node] = nn.Parameter(known[node])
                if isinstance(known[node], nn.Parameter):
                    module.register_parameter(name, known[node])
                else:
                    module.register_buffer(name, known[node])
                with graph.inserting_before(node):
                    made = graph.get_attr(name)
                made.meta = dict(node.meta)
                node.replace_all_uses_with(made)
                known[made] = known[node]


def _is_view(tensor: torch.Tensor, sources: list[Any]) -> bool:
    """Whether a tensor is a trained parameter in another shape."""
    return any(
        isinstance(s, nn.Parameter) and s.data_ptr() == tensor.data_ptr() and
        s.numel() == tensor.numel()
        for s in sources
    )  # fmt: skip


def _norm(running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
          eps=1e-5, kind=nn.BatchNorm2d):  # type: ignore # fmt: skip
    if training:
        raise ValueError("statistics of the batch, not stored ones")
    norm = kind(len(running_mean), eps, affine=weight is not None)
    norm.running_mean, norm.running_var = running_mean, running_var
    return _with(norm, weight, bias)


def _conv(weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore
    outputs, inputs, *kernel = weight.shape
    made = nn.utils.skip_init(
        nn.Conv2d, inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups,
        bias is not None,
    )  # fmt: skip
    return _with(made, weight, bias)


def _linear(weight, bias=None):  # type: ignore
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None)
    return _with(made, weight, bias)


def _layer_norm(normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore
    made = nn.LayerNorm(normalized_shape, eps, weight is not None, bias is not None)
    return _with(made, weight, bias)


def _group_norm(num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore
    return _with(nn.GroupNorm(num_groups, len(weight), eps, weight is not None), weight, bias)


def _with(module: nn.Module, weight: Any, bias: Any) -> nn.Module:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = isinstance(tensor, nn.Parameter)
            setattr(module, name, tensor if own else nn.Parameter(tensor.detach()))
    return module.eval()


_MODULES: dict[Any, tuple[str, Callable[..., nn.Module]]] = {
    F.batch_norm: ("norm", _norm),
    F.conv2d: ("conv", _conv),
    torch.conv2d: ("conv", _conv),
    F.linear: ("linear", _linear),
    F.layer_norm: ("norm", _layer_norm),
    F.group_norm: ("norm", _group_norm),
}


def _calls_to_modules(module: fx.GraphModule) -> None:
    """Functional layers with constant tensors become modules, named after the weight's owner."""
    graph = module.graph
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MODULES:
            continue
        suffix, make = _MODULES[node.target]
        if node.target is F.batch_norm and node.meta["value"].ndim == 2:
            make = partial(make, kind=nn.BatchNorm1d)
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        first, *rest = node.args
        sources = [n for n in node.all_input_nodes if n is not first]
        if any(n.op != "get_attr" for n in sources):
            continue
        arguments, keywords = fx.node.map_arg(
            (tuple(rest), node.kwargs), lambda n: operator.attrgetter(str(n.target))(module)
        )
        owner = str(sources[-1].target).rpartition(".")[0] if sources else ""
        try:
            made = make(*arguments, **keywords)
        except (TypeError, ValueError, IndexError):
            continue  # the reader refuses it by name
        if not owner or owner in called or any(c.startswith(f"{owner}.") for c in called):
            owner = f"{owner}.{suffix}" if owner else node.name
        while owner in called:
            owner += "_again"
        _set_submodule(module, owner, made)
        called.add(owner)
        with graph.inserting_before(node):
            new = graph.call_module(owner, (first,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _set_submodule(module: nn.Module, path: str, made: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        # The containers are the network's own: put in a copy of the shell, not of its contents.
        inner = getattr(module, parent, None)
        inner = copy.copy(inner) if isinstance(inner, nn.Module) else nn.Module()
        inner._modules = dict(inner._modules)
        module._modules[parent] = inner
        module = inner
    module._modules[name] = made


def is_inplace(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node overwrites its first input."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        return node.target in _INPLACE_CALLS or bool(node.kwargs.get("inplace", False))
    return False


def _order_inplace(module: fx.GraphModule) -> None:
    """Who reads a tensor after it was overwritten reads the operation that overwrote it."""
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and is_tensor(node) and is_inplace(module, node):
            for user in list(source.users):
                if place[user] > place[node]:
                    user.replace_input_with(source, node)


def _drop_no_ops(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.args:
            continue
        source = node.args[0]
        training = node.kwargs.get("training", node.args[-1] if len(node.args) > 1 else None)
        name = getattr(node.target, "__name__", node.target)
        # torchvision's stochastic depth; the name says it without the dependency.
        resting = name in ("stochastic_depth", "dropout", "dropout2d") and training is False
        if isinstance(source, fx.Node) and resting:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
