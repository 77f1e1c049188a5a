"""The wrapper that stands where a layer stood: the layer, then its attention.

To everything outside it is transparent: the names of parameters and the keys of the state dict are those of the plain
network, with the attention's own under `<layer>.attention.`. A wrapper and no forward hook, because fusing and
converting passes drop hooks silently; a child module and no subclass of the layer, because they replace layers by type.
A walk over modules meets the wrapper, the layer, and each tensor at the layer alone.
"""

import copy
import functools
import inspect
import linecache
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final, get_type_hints

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

from convattn import ops
from convattn.attachment import callers, merging
from convattn.attachment.tensors import INNER, LayerName, LayerTensors
from convattn.errors import AttachError
from convattn.nn.base import Gate

ATTENTION = "attention"

# operators of PyTorch, each with the arguments behind its first one and with its options
Functions = tuple[tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]


class Walks(threading.local):
    """The wrappers at which the walks of a thread over modules are at the moment."""

    def __init__(self) -> None:
        self.at: list[nn.Module] = []


WALKS = Walks()


class Attached(nn.Module):
    """A layer with attention on its output.

    Args:
        inner: the layer.
        attention: what stands behind it; it takes and gives maps with their channels in the second dimension.
        site: what was planned for this place.
        channels_last: whether the layer's maps have their channels in the last dimension.

    Attributes:
        inner: the layer as it was.
        site: what was planned for this place.

    Of whatever the layer has itself, and be it of these two names, the wrapper's is the layer's; so inside of this
    package they are `layer_of(wrapper)` and `convattn_site`.
    """

    __jit_ignored_attributes__ = ("convattn_site",)

    # distinctive as well: other names are read from the layer and set there
    convattn_last: Final[bool]

    def __init__(
        self, inner: nn.Module, attention: nn.Module, *, site: Any = None, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.convattn_site = site
        self.convattn_last = channels_last
        self.add_module(INNER, inner)
        self.attention = attention
        for kind in ("_parameters", "_buffers"):
            vars(self)[kind] = LayerTensors(kind, self._modules)
        self.register_load_state_dict_post_hook(_name_plainly)  # type: ignore[no-untyped-call]
        self.training = inner.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, gated."""
        if not is_scripting():
            y = self.convattn_normed(x)
            if y is not None:
                return y
        return self.convattn_gated(self.convattn_inner(x))

    @torch.jit.unused
    def convattn_normed(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same for a norm, in fewer passes; None where that cannot be."""
        attention = self._modules[ATTENTION]
        if isinstance(attention, Gate) and not self.convattn_last:
            return attention.behind(layer_of(self), x)
        return None

    def convattn_gated(self, y: torch.Tensor) -> torch.Tensor:
        """A map of the layer's memory order, gated."""
        if self.convattn_last:
            return self.attention(y.movedim(-1, 1)).movedim(1, -1)  # type: ignore[no-any-return]
        return self.attention(y)  # type: ignore[no-any-return]

    def convattn_map(self, x: torch.Tensor) -> torch.Tensor:
        """A map with its channels in the second dimension."""
        return x.movedim(-1, 1) if self.convattn_last else x

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter at the layer."""
        layer_of(self).register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Register a buffer at the wrapper itself: a profiler counts at the layer and here, each by itself."""
        kept = set(self._non_persistent_buffers_set) - {name}
        self._non_persistent_buffers_set = kept if persistent else kept | {name}
        dict.__setitem__(self._buffers, name, tensor)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules below, those of the layer under the names that they have in the plain network."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield from _visit(prefix, self)
        dot, layer = prefix + "." if prefix else "", layer_of(self)
        for name, module in layer.named_modules(memo, prefix, remove_duplicate):
            yield (LayerName(dot + INNER) if module is layer else name), module
        for name, child in self._modules.items():
            if child is not None and name != INNER:
                yield from child.named_modules(memo, dot + name, remove_duplicate)

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """The state dict, the layer's entries under the keys that they have in the plain network."""
        state = super().state_dict(*args, prefix=prefix, **options)
        # those behind them too, so that the order stays
        moved = False
        for key in list(state):
            moved = moved or key.startswith(f"{prefix}{INNER}.")
            if moved:
                value = state.pop(key)
                state[_plain_key(key, prefix)] = value
        metadata = getattr(state, "_metadata", {})
        for key in [key for key in metadata if key.startswith(prefix + INNER)]:
            metadata[_plain_key(f"{key}.", prefix).rstrip(".")] = metadata.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # called before the children load: hand the layer its entries
        own = [name for name in self._modules if name != INNER]
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key[len(prefix) :]
            if name.partition(".")[0] not in own and not self._buffers.has_own(name):  # type: ignore[attr-defined]
                state_dict[f"{prefix}{INNER}.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get(INNER)
        if inner is not None and name == INNER:
            # sharding and checkpointing wrappers put themselves around the layer this way
            self.add_module(name, value)
        elif inner is None or (self._is_own(name) and not _is_forward_of(inner, name, value)):
            super().__setattr__(name, value)
        elif hasattr(inner, name) or isinstance(value, torch.Tensor):
            # what is the layer's is set there, as it is read there
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        inner = self.__dict__.get("_modules", {}).get(INNER)
        if inner is None or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(inner, name)

    def _is_own(self, name: str) -> bool:
        # of the class too: `__class__` and `_compiled_call_impl` are those of whoever is asked to change
        own = name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        return own or (isinstance(self._buffers, LayerTensors) and self._buffers.has_own(name))

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        inner = modules.get(INNER)
        if inner is None:
            return super().__getattr__(name)
        buffers = self.__dict__["_buffers"]
        if buffers.has_own(name):
            return buffers[name]
        if name == "parametrizations" and not is_compiling():
            merging.refuse_by_class(site_of(self), callers.names(6))
            # those of the layer are removed at the layer as well
            raise AttributeError(f"{type(self).__name__!r} has no parametrizations, but its layer may have some.")
        own = {"inner": inner, "site": self.__dict__.get("convattn_site")}
        value = getattr(inner, name, own[name]) if name in own else getattr(inner, name)
        if is_compiling():
            return value
        if isinstance(value, torch.Tensor):
            merging.refuse_to_merge(site_of(self), name, callers.names(1)[0])
            if any(wrapper is self for wrapper in WALKS.at) and not callers.does(callers.READS):
                raise AttributeError(
                    f"{name!r} is that of the layer inside, to which this walk over modules comes next."
                )
        elif merging.METHODS.fullmatch(name) and getattr(value, "__self__", None) is inner:
            return functools.partial(_merge_inside, self, name)
        return value

    # a container is indexed, counted and gone through as before
    def __len__(self) -> int:
        return len(layer_of(self))  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return not hasattr(type(layer_of(self)), "__len__") or bool(layer_of(self))

    def __iter__(self) -> Iterator[Any]:
        return iter(layer_of(self))  # type: ignore[call-overload,no-any-return]

    def __getitem__(self, key: Any) -> Any:
        return layer_of(self)[key]  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        layer_of(self)[key] = value  # type: ignore[operator]

    def __delitem__(self, key: Any) -> None:
        del layer_of(self)[key]  # type: ignore[operator]

    def __contains__(self, key: Any) -> bool:
        return key in layer_of(self)  # type: ignore[operator]


def _visit(prefix: str, wrapper: Attached) -> Iterator[tuple[str, nn.Module]]:
    """A wrapper in a walk: until the walk goes on, it has no tensors, which are the layer's that comes next.

    Whoever collects what has an attribute `weight` would find each tensor twice.
    """
    if is_compiling():
        yield prefix, wrapper
        return
    at = WALKS.at
    at.append(wrapper)
    try:
        yield prefix, wrapper
    finally:
        # of several walks at once, each takes back its own
        at.remove(wrapper)


def layer_of(module: nn.Module) -> nn.Module:
    """The layer inside a wrapper; any other module as it is."""
    return module._modules[INNER] if isinstance(module, Attached) else module  # type: ignore[return-value]


def site_of(wrapper: Attached) -> str:
    """The name of the site of a wrapper, or the class of its layer where it was not planned."""
    return getattr(wrapper.convattn_site, "name", type(layer_of(wrapper)).__name__)


def _plain_key(key: str, prefix: str) -> str:
    """A key of the state dict as it is in the plain network."""
    inner = f"{prefix}{INNER}."
    return prefix + key[len(inner) :] if key.startswith(inner) else key


def _is_forward_of(layer: nn.Module, name: str, value: Any) -> bool:
    """Whether a layer is given another forward of its own, as detection code does when it has merged its layers."""
    return name == "forward" and getattr(value, "__self__", None) is layer


def _merge_inside(wrapper: Attached, name: str, *args: Any, **options: Any) -> Any:
    """Call a method that merges the layers inside of a wrapped one, and keep the attention.

    Raises:
        AttachError: it gives weights for somebody else to merge.
    """
    layer = layer_of(wrapper)
    found = getattr(layer, name)(*args, **options)
    if isinstance(found, nn.Module):
        if found is not layer:
            wrapper.add_module(INNER, found)
        return wrapper
    if found is None:
        # a walk over all modules comes to the layer too, whose parts are gone now
        vars(layer)[name] = _merged_before
    elif not args and not options:
        merging.refuse_weights(site_of(wrapper), name)
    return found


def _merged_before() -> None:
    """What the method of a layer that was merged does from then on: nothing."""


def like(layer: nn.Module, model: nn.Module) -> torch.Tensor:
    """A tensor of the device and the dtype that a layer has, or else its network."""
    parameters = chain(layer.parameters(), model.parameters())
    return next((one for one in parameters if one.is_floating_point()), torch.empty(0))


class AttachedMany(Attached):
    """A layer that takes more than one tensor, with attention on its output."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output, gated."""
        return self.convattn_gated(self.convattn_inner(*args, **kwargs))

    def __prepare_scriptable__(self) -> "AttachedMany":
        """The same with the arguments of the layer by name: a script knows no others."""
        scripted = copy.copy(self)
        scripted.__class__ = type("AttachedMany", (AttachedMany,), {"forward": _with_arguments_of(layer_of(self))})
        return scripted

    def __reduce_ex__(self, protocol: Any) -> Any:
        # PyTorch puts what it scripts into the network, and copies know its class by name
        return _many, (), vars(self)


def _many() -> AttachedMany:
    """A wrapper that is still to get its parts."""
    return AttachedMany.__new__(AttachedMany)


def _with_arguments_of(layer: nn.Module) -> Any:
    """The forward of a wrapper with the arguments of a layer, their types and defaults, as a function with source."""
    parameters = list(inspect.signature(layer.forward).parameters.values())
    types = get_type_hints(layer.forward)
    scope: dict[str, Any] = {"Tensor": torch.Tensor}
    arguments = []
    for parameter in parameters:
        scope[f"type_{parameter.name}"] = types.get(parameter.name, torch.Tensor)
        scope[f"default_{parameter.name}"] = parameter.default
        default = "" if parameter.default is parameter.empty else f" = default_{parameter.name}"
        arguments.append(f"{parameter.name}: type_{parameter.name}{default}")
    names = ", ".join(parameter.name for parameter in parameters)
    lines = [
        f"def forward(self, {', '.join(arguments)}) -> Tensor:\n",
        f"    return self.convattn_gated(self.convattn_inner({names}))\n",
    ]
    # TorchScript reads the source of what it compiles
    file = f"<forward of a wrapped {type(layer).__name__} ({names})>"
    linecache.cache[file] = (len("".join(lines)), None, lines, file)
    exec(compile("".join(lines), file, "exec"), scope)
    return scope["forward"]


class AttachedBefore(Attached):
    """A layer with attention on its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for the gated input."""
        return self.convattn_inner(self.convattn_gated(x))  # type: ignore[no-any-return]


class AttachedHead(Attached):
    """A pooling layer with a head beside it that sees the same map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled map, blended with the head's vector, in the shape that the layer gives."""
        return self.attention(self.convattn_map(x), self.convattn_inner(x))  # type: ignore[no-any-return]


class AttachedMap(Attached):
    """A layer whose map is pooled by a function, which no module can stand for.

    What the head adds to the pooled vector is added to every position of the map: the mean and the maximum of a map
    move with it by just that.
    """

    convattn_pool: Final[str]
    convattn_dimensions: Final[int]

    def __init__(self, inner: nn.Module, attention: nn.Module, *, pool: str, dimensions: int, **options: Any) -> None:
        super().__init__(inner, attention, **options)
        self.convattn_pool = pool
        self.convattn_dimensions = dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's map, shifted."""
        y = self.convattn_inner(x)
        z = self.convattn_map(y)
        pooled = ops.squeeze(z, self.convattn_pool, self.convattn_dimensions)
        shift = torch.nan_to_num(self.attention(z, pooled) - pooled)
        shifted = z + ops.broadcast(shift, self.convattn_dimensions)
        return shifted.movedim(1, -1) if self.convattn_last else shifted


class AttachedBranch(Attached):
    """A layer that is the whole branch beside a shortcut, with attention on that shortcut: see `AttachedShortcut`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, and what attention changes of the block's input."""
        return self.convattn_inner(x) + (self.convattn_gated(x) - x)  # type: ignore[no-any-return]


class Passage(threading.local):
    """Where a layer leaves a map for attention that stands further on, for the time of one forward pass of a thread."""

    x: torch.Tensor | None = None
    # kept for a part of the network that is computed again for the gradient
    last: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The map, once: nothing is left until the next pass, but for what a backward pass computes again.

        Raises:
            AttachError: nothing was left.
        """
        x, self.x = self.x, None
        if x is not None:
            self.last = x if torch.is_grad_enabled() else None
            return x
        if self.last is None or torch._C._current_graph_task_id() == -1:
            raise AttachError(
                "A layer with attention was called without the one before it that leaves its map. In a checkpoint of "
                "one of them alone, use_reentrant=False is needed."
            )
        return self.last

    def __reduce__(self) -> Any:
        # copies begin with nothing
        return Passage, ()


class Passing(Attached):
    """A layer that leaves a map in a passage or takes it from there."""

    def __init__(self, inner: nn.Module, attention: nn.Module, passage: Passage, **options: Any) -> None:
        super().__init__(inner, attention, **options)
        self.convattn_passage = passage

    def __prepare_scriptable__(self) -> Any:
        """Refuse to be scripted, before anything is: modules of a script share nothing.

        Raises:
            AttachError: always.
        """
        raise AttachError(
            f"Attention at {self.convattn_site.name!r} takes the map of another layer, which torch.jit.script cannot "
            f"express; torch.export and torch.jit.trace can."
        )


class AttachedSource(Passing):
    """A layer that leaves its map in a passage; it has no attention of its own."""

    def __init__(self, inner: nn.Module, passage: Passage, **options: Any) -> None:
        super().__init__(inner, nn.Identity(), passage, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output as it is."""
        y = self.convattn_inner(x)
        self.convattn_passage.x = y
        return y  # type: ignore[no-any-return]


class AttachedInputSource(AttachedSource):
    """A layer that leaves its input in a passage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output as it is."""
        self.convattn_passage.x = x
        return self.convattn_inner(x)  # type: ignore[no-any-return]


class AttachedShortcut(Passing):
    """The last layer of a branch whose shortcut is the block's input itself, with attention on that shortcut.

    What attention changes of the input, which an `AttachedInputSource` at the first layer leaves, is added to the
    branch: the sum with the shortcut is then that of the branch and of the gated input.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, and what attention changes of the block's input."""
        y, shortcut = self.convattn_inner(x), self.convattn_passage.take()
        return y + (self.convattn_gated(shortcut) - shortcut)  # type: ignore[no-any-return]


class AttachedVector(Passing):
    """A layer that takes a vector pooled by a function, with a head on the map that was pooled.

    The map is that of an `AttachedSource`, after the functions that the network applies to it before it pools: each
    is named as an operator of PyTorch, with its further arguments and options.
    """

    def __init__(
        self,
        inner: nn.Module,
        attention: nn.Module,
        passage: Passage,
        functions: Functions,
        **options: Any,
    ) -> None:
        super().__init__(inner, attention, passage, **options)
        self.convattn_functions = functions

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """The layer's output for the vector, blended with the head's."""
        x = self.convattn_passage.take()
        for name, arguments, options in self.convattn_functions:
            x = getattr(torch.ops.aten, name)(x, *arguments, **dict(options))
        return self.convattn_inner(self.attention(self.convattn_map(x), pooled))  # type: ignore[no-any-return]


class Blended(nn.Module):
    """Any module from maps to maps of the same shape, blended from outside: y = x + strength * (module(x) - x).

    Without `strength`, y is the module's.
    """

    strength: nn.Parameter | None

    def __init__(self, module: nn.Module, *, start: str) -> None:
        super().__init__()
        self.module = module
        self.register_parameter("strength", nn.Parameter(torch.zeros(1)) if start == "identity" else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map to one of the same shape and dtype."""
        y: torch.Tensor = self.module(x).type_as(x)
        strength = self.strength
        if strength is None:
            return y
        return x + (strength * torch.nan_to_num(y - x)).type_as(x)


class BlendedHead(nn.Module):
    """A pooling head beside a network's own pooling: y = pooled + strength * (head(x) - pooled).

    Without `strength`, y is the head's vector. A head whose vector is not as wide as the pooled one is followed by a
    linear map to that width, so that the classifier behind stays.
    """

    strength: nn.Parameter | None

    def __init__(self, head: nn.Module, *, width: int, features: int, start: str) -> None:
        super().__init__()
        self.head = head
        self.project = nn.Linear(features, width) if features != width else None
        self.register_parameter("strength", nn.Parameter(torch.zeros(1)) if start == "identity" else None)

    def vector(self, x: torch.Tensor) -> torch.Tensor:
        """The head's vector (B, width) of a map (B, C, *spatial)."""
        y: torch.Tensor = self.head(x)
        project = self.project
        return y if project is None else project(y)

    def forward(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """A map and its pooled version to the blended one, of the latter's shape and dtype."""
        vector = self.vector(x)
        if not is_scripting():
            _check_pooled(vector, pooled)
        vector = vector.reshape_as(pooled).type_as(pooled)
        strength = self.strength
        if strength is None:
            return vector
        return pooled + (strength * torch.nan_to_num(vector - pooled)).type_as(pooled)


@torch.jit.unused
def _check_pooled(vector: torch.Tensor, pooled: torch.Tensor) -> None:
    """Raise `AttachError` where the network no longer pools to a vector as wide as the head's."""
    # a trace knows no shapes, or warns of each that is looked at
    if isinstance(pooled, Proxy) or is_tracing():  # type: ignore[no-untyped-call]
        return
    if vector.numel() != pooled.numel():
        raise AttachError(
            f"The attached pooling head gives a vector of shape {tuple(vector.shape)}, and the network's own pooling "
            f"now gives {tuple(pooled.shape)}: it was replaced after the head was attached. convattn.detach the "
            f"network, or put a global pooling back."
        )


def _name_plainly(module: nn.Module, incompatible: Any) -> None:
    for keys in incompatible:
        keys[:] = [key.replace(f"{INNER}.", "") for key in keys]
