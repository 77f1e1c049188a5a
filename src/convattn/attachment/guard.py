"""What happens when a layer with attention is replaced or removed: nothing is lost in silence.

Assignments such as `model.fc = nn.Linear(512, 7)` end in the dictionary in which a module holds its children; where
attention stands below, this dictionary is a `Children`.
"""

import warnings
from typing import Any

from torch import nn

from convattn.attachment.tensors import INNER
from convattn.attachment.wrapper import ATTENTION, Attached, AttachedHead, layer_of, site_of
from convattn.errors import AttachError


class Children(dict[str, Any]):
    """The children of a module in a network with attention.

    - A new layer in the place of one with attention gets the attention: a new classifier, a layer that was converted.
    - Where a part of the network is replaced with all attention in it, the next call of the new part warns of it.
    - To remove such a layer or part, or to put None there, is refused.
    """

    def __setitem__(self, key: str, new: Any) -> None:
        old = self.get(key)
        if isinstance(old, nn.Module) and new is not old:
            # a layer that was put at another place before, as `Sequential.insert` does, is not lost
            moved = any(child is old for name, child in self.items() if name != key)
            lost = [] if moved else _lost(old, new)
            if lost and new is None:
                self._refuse(key)
            if lost and _is_merged_with_a_norm(self, key, new):
                raise AttachError(
                    f"{key!r} has attention between a layer and the norm behind it, and the new layer has a bias, as "
                    f"one merged with that norm has: convattn.detach or convattn.fold the network first, or attach "
                    f"at='block'. The model was not changed."
                )
            if lost and _takes_over(old, new):
                # the attention inside of the layer is gone all the same
                lost = _lost(layer_of(old), new)
                old.add_module(INNER, new)
                new = old
            if lost:
                new.register_forward_pre_hook(_Lost(lost))
        super().__setitem__(key, new)

    def __delitem__(self, key: str) -> None:
        self._refuse_with_attention(key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        self._refuse_with_attention(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        self._refuse_with_attention(next(reversed(self), ""))
        return super().popitem()

    def clear(self) -> None:
        for key in self:
            self._refuse_with_attention(key)
        super().clear()

    def update(self, *args: Any, **options: Any) -> None:
        for key, value in dict(*args, **options).items():
            self[key] = value

    def put(self, key: str, module: Any) -> None:
        """Put a module there, whatever stood there."""
        super().__setitem__(key, module)

    def _refuse_with_attention(self, key: str) -> None:
        if isinstance(self.get(key), nn.Module) and _lost(self[key], None):
            self._refuse(key)

    def _refuse(self, key: str) -> None:
        raise AttachError(
            f"{key!r} has attention, which would go with it: convattn.detach the network first, or put another layer "
            f"there, which gets the attention. The model was not changed."
        )

    def __reduce__(self) -> Any:
        return Children, (dict(self),)


class _Lost:
    """Says once that attention is gone with the part of the network that it stood in."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any) -> None:
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
        warnings.warn(
            f"The attention at {', '.join(self.names)} is gone: the part of the network that it stood in was replaced "
            f"by this {type(module).__name__}. Attach it again with convattn.attach(..., where=...), or "
            f"convattn.detach the rest.",
            stacklevel=2,
        )


def guard(model: nn.Module) -> bool:
    """Let the modules above attention hold their children in `Children`, and all others as before.

    Returns:
        Whether there is attention in the model.
    """
    return _guard(model, {})


def _guard(module: nn.Module, done: dict[nn.Module, bool]) -> bool:
    if module in done:
        return done[module]
    # a part that holds itself is no way to attention
    done[module] = False
    below = [_guard(child, done) for child in module._modules.values() if child is not None]
    has_attention = any(below)
    if not isinstance(module, Attached):
        children = module._modules
        if has_attention and type(children) is not Children:
            vars(module)["_modules"] = Children(children)
        elif not has_attention and type(children) is Children:
            vars(module)["_modules"] = dict(children)
    done[module] = has_attention or isinstance(module, Attached)
    return done[module]


def _takes_over(old: nn.Module, new: nn.Module) -> bool:
    """Whether a new layer gets the attention of the one before it."""
    if not isinstance(old, Attached) or isinstance(new, Attached):
        return False
    # a head stands beside a pooling, which is no longer there
    return not (isinstance(old, AttachedHead) and type(new) is nn.Identity)


def _is_merged_with_a_norm(children: dict[str, Any], key: str, new: Any) -> bool:
    """Whether a layer without bias, which has attention behind it and then a norm, is to become one with a bias."""
    old = children[key]
    if type(old) is not Attached or type(new) is not type(layer_of(old)):
        return False
    if getattr(layer_of(old), "bias", 0) is not None or getattr(new, "bias", None) is None:
        return False
    names = list(children)
    following = children[names[names.index(key) + 1]] if key != names[-1] else None
    return isinstance(following, nn.modules.batchnorm._BatchNorm)


def _lost(old: nn.Module, new: Any) -> list[str]:
    """The sites whose attention stands in a module, and not in another one."""
    kept = set(new.modules()) if isinstance(new, nn.Module) else set()
    # a copy of a wrapper around the same attention is as good
    wrappers = [module for module in old.modules() if isinstance(module, Attached)]
    gone = [wrapper for wrapper in wrappers if wrapper._modules[ATTENTION] not in kept]
    return list(dict.fromkeys(map(site_of, gone)))
