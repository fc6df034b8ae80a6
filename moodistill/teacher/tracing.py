"""From a network to one flat fx graph of modules and functions, with shapes and no side shows.

The network is traced down to the modules of `torch.nn` (`value_tracer`). Afterwards weights that
are computed from parameters are folded, functional layers become modules, and what does nothing in
evaluation (dropout calls, stochastic depth, assertions) is taken out.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.teacher.operations import CONVS
from moodistill.teacher.plain import plain_network
from moodistill.teacher.value_tracer import INPLACE_CALLS, ValueTracer, said


def flat_graph(
    network: nn.Module, input_shape: tuple[int, ...], opaque: Collection[str] = ()
) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace a network in evaluation mode; every node's `meta` holds what it computes.

    `meta["value"]` is a fake tensor (shapes only) for `PICTURES` images, or a plain value;
    `meta["where"]` the file and line of the network's code. The network's own tensors are shared,
    not copied, where it holds them as they are used (see `plain_network`).

    Returns:
        The graph, and the modules in it that are left whole as they are, with the reason.

    Raises:
        UserError: if it cannot be traced or does not take such an input.
    """
    name = type(network).__name__
    network = plain_network(network)
    unknown = sorted(set(opaque) - {path for path, _ in network.named_modules()})
    if unknown:
        raise UserError(f"{name} has no module {unknown[0]!r} that could be left whole")
    tracer = ValueTracer(input_shape, opaque)
    before = set(vars(network))
    try:
        graph = tracer.trace(network)
    except Exception as error:
        raise UserError(
            f"{name} cannot be traced by torch.fx with input {(1, *input_shape)}: {said(error)}; "
            "expected a CNN whose own forward can be followed (put what cannot into a submodule: "
            "that is then left whole)"
        ) from error
    module = fx.GraphModule(network, graph, name)
    for made in set(vars(network)) - before:  # constants that torch.fx keeps at its root
        delattr(network, made)
    _drop_assertions(module.graph)
    # Before anything unused is taken out: what works in place is used by who reads its input later.
    _order_inplace(module)
    module.graph.eliminate_dead_code()
    _fold_tensors(module)
    module.graph.eliminate_dead_code()
    _calls_to_modules(module)
    _drop_no_ops(module)
    module.graph.eliminate_dead_code()
    # A new one holds what the graph uses and nothing else.
    return fx.GraphModule(module, module.graph, name), tracer.left


def is_tensor(node: fx.Node) -> bool:
    """Whether the node computes one tensor."""
    return isinstance(node.meta.get("value"), torch.Tensor)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)


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
            known[node] = node.meta["value"]  # no fake one: it hangs on no image
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
    kind = next(kind for kind, axes in CONVS.items() if axes == len(kernel))
    made = nn.utils.skip_init(
        kind, inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups,
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


def _softmax(dim, _stacklevel=3, dtype=None, kind=nn.Softmax):  # type: ignore
    if dtype not in (None, torch.float32):
        raise ValueError("another precision")
    return kind(dim)


def _with(module: nn.Module, weight: Any, bias: Any) -> nn.Module:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = isinstance(tensor, nn.Parameter)
            setattr(module, name, tensor if own else nn.Parameter(tensor.detach()))
    return module.eval()


_MODULES: dict[Any, tuple[str, Callable[..., nn.Module]]] = {
    F.batch_norm: ("norm", _norm),
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), ("conv", _conv)
    ),
    F.linear: ("linear", _linear),
    F.layer_norm: ("norm", _layer_norm),
    F.group_norm: ("norm", _group_norm),
    F.pixel_shuffle: ("shuffle", lambda upscale_factor: nn.PixelShuffle(upscale_factor)),
    F.pixel_unshuffle: ("shuffle", lambda downscale_factor: nn.PixelUnshuffle(downscale_factor)),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), ("softmax", _softmax)),
    **dict.fromkeys(
        (F.log_softmax, torch.log_softmax, "log_softmax"),
        ("softmax", partial(_softmax, kind=nn.LogSoftmax)),
    ),
}


def _calls_to_modules(module: fx.GraphModule) -> None:
    """Functional layers with constant tensors become modules, named after the weight's owner."""
    graph = module.graph
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _MODULES:
            continue
        suffix, make = _MODULES[node.target]
        if node.target is F.batch_norm:
            kinds = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
            make = partial(make, kind=kinds.get(node.meta["value"].ndim, nn.BatchNorm1d))
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
        others = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n not in sources}
        inside = any(name.startswith(f"{owner}.") for name in called | others)
        if not owner or owner in called or inside:
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
        for source in sources:  # before its module is missed
            if not source.users:
                graph.erase_node(source)


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
        return node.target in INPLACE_CALLS or bool(node.kwargs.get("inplace", False))
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


DROPOUTS = (
    "stochastic_depth", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout",
)  # fmt: skip


def _drop_no_ops(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.args:
            continue
        source = node.args[0]
        training = node.kwargs.get("training", node.args[-1] if len(node.args) > 1 else None)
        name = getattr(node.target, "__name__", node.target)
        # torchvision's stochastic depth; the name says it without the dependency.
        resting = name in DROPOUTS and training is False
        if isinstance(source, fx.Node) and resting:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
