"""The wrapper that stands where a layer stood: the layer, then its attention.

To everything outside it is transparent: the names of parameters and the keys of the state dict are those of the plain
network, with the attention's own under `<layer>.attention.`. A wrapper and no forward hook, because fusing and
converting passes drop hooks silently; a child module and no subclass of the layer, because they replace layers by type.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# distinctive, since it is taken out of keys wherever it stands
INNER = "convattn_inner"
ATTENTION = "attention"


class Attached(nn.Module):
    """A layer with attention on its output."""

    # a scripted wrapper has its layer as an attribute
    __jit_unused_properties__ = ("inner",)

    def __init__(self, inner: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.add_module(INNER, inner)
        self.attention = attention
        self.register_load_state_dict_post_hook(_name_plainly)  # type: ignore[no-untyped-call]
        self.training = inner.training

    @property
    def inner(self) -> nn.Module:
        """The layer as it was."""
        return self._modules[INNER]  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, gated."""
        return self.attention(self.convattn_inner(x))  # type: ignore[no-any-return]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a child; converting passes put another inner layer in place this way."""
        super().add_module(name, module)
        if name == INNER and module is not None:
            # one dictionary for both: whoever swaps, moves or deletes a tensor of the layer does so here as well
            self._parameters = module._parameters
            self._buffers = module._buffers
            self._non_persistent_buffers_set = module._non_persistent_buffers_set

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules below, those of the layer under the names that they have in the plain network."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        dot = prefix + "." if prefix else ""
        for name, child in self.inner._modules.items():
            if child is not None:
                yield from child.named_modules(memo, dot + name, remove_duplicate)
        # last and once: its tensors have been listed as the wrapper's and its children's
        if remove_duplicate and self.inner not in memo:
            memo.add(self.inner)
            yield dot + INNER, self.inner
        yield from self.attention.named_modules(memo, dot + ATTENTION, remove_duplicate)

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """The state dict, the layer's entries under the keys that they have in the plain network."""
        state = super().state_dict(*args, prefix=prefix, **options)
        for key in [key for key in state if key.startswith(f"{prefix}{INNER}.")]:
            state[prefix + key[len(prefix) + len(INNER) + 1 :]] = state.pop(key)
        metadata = getattr(state, "_metadata", {})
        for key in [key for key in metadata if key.startswith(prefix + INNER)]:
            metadata[(prefix + key[len(prefix) + len(INNER) + 1 :]).rstrip(".")] = metadata.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # called before the children load: hand them the layer's entries; the wrapper has none of its own
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if not key.startswith(f"{prefix}{ATTENTION}."):
                state_dict[f"{prefix}{INNER}.{key[len(prefix) :]}"] = state_dict.pop(key)

    def _apply(self, fn: Any, recurse: bool = True) -> "Attached":
        # the tensors are the layer's: applied to there
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # what is the layer's is set there, as it is read there
        inner = self.__dict__.get("_modules", {}).get(INNER)
        if inner is not None and name not in self.__dict__ and name not in self._modules and hasattr(inner, name):
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if INNER not in modules:
                raise
            return getattr(modules[INNER], name)


class AttachedLast(Attached):
    """A layer with attention on its output, whose channels are the last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, gated."""
        y = self.convattn_inner(x)
        return self.attention(y.movedim(-1, 1)).movedim(1, -1)  # type: ignore[no-any-return]


class AttachedHead(Attached):
    """A pooling layer with a head beside it that sees the same map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled map, blended with the head's vector, in the shape that the layer gives."""
        return self.attention(x, self.convattn_inner(x))  # type: ignore[no-any-return]


class BlendedHead(nn.Module):
    """A pooling head beside a network's own pooling: y = pooled + strength * (head(x) - pooled).

    Without `strength`, y is the head's vector.
    """

    strength: nn.Parameter | None

    def __init__(self, head: nn.Module, *, start: str) -> None:
        super().__init__()
        self.head = head
        self.register_parameter("strength", nn.Parameter(torch.zeros(1)) if start == "identity" else None)

    def forward(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """A map and its pooled version to the blended one, of the latter's shape and dtype."""
        vector: torch.Tensor = self.head(x).reshape(pooled.shape).to(pooled.dtype)
        strength = self.strength
        if strength is None:
            return vector
        return pooled + (strength * (vector - pooled)).to(pooled.dtype)


def _name_plainly(module: nn.Module, incompatible: Any) -> None:
    for keys in incompatible:
        keys[:] = [key.replace(f"{INNER}.", "") for key in keys]
