"""Traces a network while two batches of fake tensors run along.

Whatever is no tensor and is equal for both batches is a constant of the network: sizes, tests on
shapes, lengths, tuples of tensors. So only what depends on the images' values stops the trace.
A submodule whose code cannot be followed is left whole, as one operation.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import Attribute
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.heads.outputs import given_as, outputs_of
from moodistill.teacher.decompose import REPLACED_CALLS, REPLACED_MODULES
from moodistill.teacher.operations import ACTIVATION_CALLS, ACTIVATIONS, LAYERS, NORMS
from moodistill.teacher.rearrange import PICTURES

INPLACE_CALLS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
)  # fmt: skip
_LIBRARIES = tuple(
    str(Path(str(place)).parent) + os.sep for place in (torch.__file__, Path(__file__).parent)
)


class ValueProxy(fx.Proxy):
    """A value of the network while it is traced; what it is can be asked as of a tensor."""

    tracer: ValueTracer

    @property
    def value(self) -> Any:
        """A fake tensor for `PICTURES` images, a parameter, or a number that hangs on them."""
        return self.node.meta["value"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """For `isinstance` in the network's code."""
        return torch.Tensor if isinstance(self.value, torch.Tensor) else type(self.value)

    def __getattr__(self, name: str) -> Any:
        if name in ("node", "tracer"):
            raise AttributeError(name)
        if callable(getattr(self.value, name)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        length = len(self.value)
        if length != len(self.node.meta["more"]):
            raise UserError("the code depends on the number of images in a batch")
        return length

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])  # type: ignore[index]

    def _known(self) -> Any:
        """The value of what hangs on no image (a parameter)."""
        if isinstance(self.value, FakeTensor):
            raise UserError("the code depends on the values in the images (a test on a tensor)")
        if not isinstance(self.value, torch.Tensor):
            raise UserError("the code depends on the number of images in a batch")
        return self.value

    def __bool__(self) -> bool:
        return bool(self._known())

    def __int__(self) -> int:
        return int(self._known())

    def __float__(self) -> float:
        return float(self._known())

    def __index__(self) -> int:
        return operator.index(self._known())


class ValueTracer(fx.Tracer):
    """Traces a network; every node's `meta` holds its `value` and what it is for `more` images.

    Attributes:
        left: modules that could not be followed or are to be left whole, and why.
    """

    def __init__(self, input_shape: tuple[int, ...], opaque: Collection[str] = ()) -> None:
        super().__init__()
        self.left = {path: "it is named as opaque" for path in opaque}
        self.opaque = set(opaque)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = tuple(
            self._mode.from_tensor(torch.zeros(count, *input_shape))
            for count in (PICTURES, PICTURES + 1)
        )
        self._evaluating = False
        self._tensors: dict[str, nn.Parameter] = {}
        self._parameters: dict[int, str] = {}
        self._proxies: dict[str, Any] = {}
        self._batch: Any = None

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore
        """Trace `root`; raises whatever its code does where that cannot be followed."""
        self._tensors = dict(root.named_parameters())
        self._parameters = {id(p): name for name, p in self._tensors.items()}
        with torch.no_grad():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One image batch goes in; all other arguments keep their defaults."""
        names = list(inspect.signature(root_fn).parameters.values())[1:]
        needed = [
            p.name for p in names
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]  # fmt: skip
        if len(needed) > 1:
            raise UserError(
                f"the network has a second input {needed[1]!r}; expected one image (give a "
                "wrapper whose forward takes the image alone)"
            )
        if not names or names[0].kind is names[0].KEYWORD_ONLY:
            raise UserError("the network's forward takes no image; expected forward(self, image)")
        fixed = names[0].kind is not names[0].VAR_POSITIONAL
        picture = self.create_proxy("placeholder", names[0].name if fixed else "input", (), {})
        self._batch = picture.size(0)

        def forward(root: nn.Module, picture: Any) -> Any:
            return given_as(outputs_of(root_fn(root, picture)))

        return forward, [self.root, picture]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own modules, and those to be left whole."""
        return module_qualified_name in self.opaque or super().is_leaf_module(
            m, module_qualified_name
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Parameters are recorded; everything else is taken as it is."""
        if self._evaluating or not isinstance(attr_val, nn.Parameter):
            return attr_val
        name = self._parameters.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a module's code, or leave it whole where it cannot be followed."""
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            replacement = REPLACED_MODULES.get(type(m))
            result = replacement(m, *args, **kwargs) if replacement else None
            return self._call(path, args, kwargs) if result is None else result
        last = next(iter(reversed(self.graph.nodes)), None)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            first = getattr(error, "first", error)
            self._forget_behind(last)
            try:
                result = self._call(path, args, kwargs)
            except Exception:
                raise error from None
            self.left[path] = f"its code cannot be followed: {said(first)}"
            return result

    def _call(self, path: str, args: Any, kwargs: Any) -> Any:
        return self.create_proxy("call_module", path, args, kwargs)

    def _forget_behind(self, last: fx.Node | None) -> None:
        """Take back what was recorded behind a node."""
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        nodes = set(self.graph.nodes)
        self._proxies = {n: p for n, p in self._proxies.items() if p.node in nodes}

    def create_arg(self, a: Any) -> Any:
        """Arguments of nodes; proxies pass for tensors, so they are looked for first."""
        if type(a) is ValueProxy:
            return a.node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> ValueProxy:
        """A proxy whose value is known."""
        return ValueProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Record an operation; returns a proxy, or the constant that it gives."""
        replacement = REPLACED_CALLS.get(target) if kind == "call_function" else None
        if replacement is not None:
            result = replacement(*args, **kwargs)
            if result is not None:
                return result
        value, more = self._evaluated(kind, target, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        node = proxy.node
        node.meta["value"], node.meta["more"] = value, more
        place = _users_line()
        if place:
            node.meta["where"] = place
        return self._result(proxy, value, more)

    def _result(self, proxy: Any, value: Any, more: Any) -> Any:
        """What the network's code gets of a node: constants and containers as they are."""
        if isinstance(value, torch.Tensor):
            return proxy
        if not holds_tensor(value):
            if value == more:
                return value
            if (type(value), value, more) == (int, PICTURES, PICTURES + 1):
                # One name for the size of the batch, whatever tensor it was asked of.
                return proxy if self._batch is None else self._batch
            if not isinstance(value, tuple | list):
                return proxy
        item = operator.getitem
        if isinstance(value, dict):
            named = {key: item(proxy, key) for key in value}
            return named if type(value) is dict else type(value)(**named)
        if isinstance(value, tuple | list):
            if len(value) != len(more):
                return proxy
            entries = [item(proxy, index) for index in range(len(value))]
            if isinstance(value, torch.Size):
                return tuple(entries)
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        if dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value)]
            return dataclasses.replace(value, **{f: getattr(proxy, f) for f in fields})  # type: ignore
        return proxy

    # Values

    def _evaluated(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What an operation gives for both numbers of images."""
        if kind == "placeholder":
            return self._inputs[0], self._inputs[1]
        if kind == "get_attr":
            return self._tensors[target], self._tensors[target]
        kept, self._evaluating = self._evaluating, True
        proxies: list[ValueProxy] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda a: proxies.append(a) if type(a) is ValueProxy else None
        )
        metas = [proxy.node.meta for proxy in proxies]
        try:
            results = []
            for key in ("value", "more"):
                fake = any(_is_fake(meta[key]) for meta in metas)
                arguments, keywords = fx.node.map_aggregate((args, kwargs), partial(_of, key))
                results.append(self._run(kind, target, arguments, keywords, fake))
                if all(meta["value"] is meta["more"] for meta in metas):
                    return results[0], results[0]
            return results[0], results[1]
        finally:
            self._evaluating = kept

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any, fake: bool) -> Any:
        if not fake:
            if _overwrites(kind, target, kwargs):
                args = fx.node.map_aggregate(args, _cloned)
            return self._apply(kind, target, args, kwargs)
        if kind == "call_module":
            module = self.root.get_submodule(target)
            # Shapes stay; running these on fake tensors would take most of the time.
            if isinstance(module, (*NORMS, *ACTIVATIONS)) and len(args) == 1:
                return args[0]
        elif target in _SAME_SHAPE and args and isinstance(args[0], FakeTensor):  # noqa: SIM102
            if not any(isinstance(a, FakeTensor) for a in (*args[1:], *kwargs.values())):
                return args[0]
        try:
            with self._mode:
                return self._apply(kind, target, args, kwargs)
        except Exception:
            if kind != "call_module" or type(module) in _OWN_SHAPES:
                raise
            # Code that looks at values runs on real tensors only.
            real = fx.node.map_aggregate((args, kwargs), _real)
            result = self._apply(kind, target, *real)  # type: ignore[misc]
            return fx.node.map_aggregate(result, self._faked)

    def _apply(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            first, *rest = args
            return getattr(first, target)(*rest, **kwargs)
        return target(*args, **kwargs)

    def _faked(self, value: Any) -> Any:
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


_SAME_SHAPE = {F.batch_norm, *ACTIVATION_CALLS} - {"float"}
_OWN_SHAPES = LAYERS


def holds_tensor(value: Any) -> bool:
    """Whether a node's value is a tensor or has one in it."""
    if isinstance(value, tuple | list):
        return any(holds_tensor(part) for part in value)
    if isinstance(value, dict):
        return any(holds_tensor(part) for part in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds_tensor(part) for part in vars(value).values())
    return isinstance(value, torch.Tensor)


def _of(key: str, argument: Any) -> Any:
    return argument.node.meta[key] if type(argument) is ValueProxy else argument


def _is_fake(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_is_fake(part) for part in value)
    if isinstance(value, dict):
        return any(_is_fake(part) for part in value.values())
    return isinstance(value, FakeTensor) or (
        dataclasses.is_dataclass(value) and holds_tensor(value)
    )


def said(error: BaseException) -> str:
    """An error's first line, and the file and line of the network's code that raised it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if not f.filename.startswith(_LIBRARIES)), None)
    return f"{lines[0]} ({Path(place.filename).name}:{place.lineno})" if place else lines[0]


def _users_line() -> str:
    """File and line of the network's code that runs now."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def _overwrites(kind: str, target: Any, kwargs: Any) -> bool:
    if kind == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    return target in INPLACE_CALLS or bool(kwargs.get("inplace", False))


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _real(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return value
