"""The base network frozen: no gradients, and no statistics that move in train mode.

What is frozen is noted in attributes of the layers themselves, so that it goes with copies, pickles and parts of a
network; no module is replaced, and nothing is added to the state dict.
"""

from collections.abc import Collection, Iterable
from itertools import chain

import torch
from torch import nn

from convattn.attachment.wrapper import ATTENTION, Attached, layer_of

# of a layer: the names of its frozen tensors, and whether they were trainable before
FROZEN = "convattn_frozen"
# what trains and averages networks puts itself around them: by class, the name of the network inside
AROUND = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
}


class Hold:
    """Keeps a layer in eval mode, whatever mode the network is put into."""

    METHODS = ("train", "reset_running_stats")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.before = {name: vars(layer)[name] for name in self.METHODS if name in vars(layer)}

    def take(self) -> None:
        """Put this object's methods in place of the layer's."""
        vars(self.layer).update({name: getattr(self, name) for name in self.METHODS if hasattr(self.layer, name)})
        self.layer.training = False

    def release(self, mode: bool) -> None:
        """Give the layer its own methods back, and the mode of the network."""
        for name in self.METHODS:
            vars(self.layer).pop(name, None)
        vars(self.layer).update(self.before)
        self.layer.training = mode

    def train(self, mode: bool = True) -> nn.Module:
        """The parts of the layer follow the mode of the network, the layer does not."""
        type(self.layer).train(self.layer, mode)
        self.layer.training = False
        return self.layer

    def reset_running_stats(self) -> None:
        """Nothing: `torch.optim.swa_utils.update_bn` resets them and counts on train mode to fill them again."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of what `torch.compile`, data-parallel training and averaging put around it."""
    while type(model).__name__ in AROUND:
        model = getattr(model, AROUND[type(model).__name__])
    return model


def base_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of the plain network once, and nothing that was attached."""
    added = {part for wrapper in _wrappers(model) for part in wrapper.get_submodule(ATTENTION).modules()}
    layers = dict.fromkeys(map(layer_of, model.modules()))
    return [layer for layer in layers if layer not in added]


def freeze(model: nn.Module, modules: Collection[nn.Module], parameters: Collection[nn.Parameter]) -> None:
    """Freeze the base network but for modules, with all that is in them, and single parameters."""
    release(model)
    trained = {layer for module in modules for layer in base_layers(module)}
    kept = {id(one) for layer in trained for one in _tensors(layer).values()} | set(map(id, parameters))
    for layer in base_layers(model):
        own = {name: one for name, one in _tensors(layer).items() if id(one) not in kept}
        vars(layer)[FROZEN] = {name: one.requires_grad for name, one in own.items()}
        for one in layer._parameters.values():
            # quantised weights have no gradient
            if one is not None and (one.is_floating_point() or one.is_complex()):
                one.requires_grad_(id(one) in kept)
        if layer not in trained and _has_statistics(layer):
            Hold(layer).take()
    for wrapper in _wrappers(model):
        # seen from outside it is the layer
        if _hold_of(layer_of(wrapper)) is not None:
            Hold(wrapper).take()


def release(model: nn.Module) -> None:
    """Make a network as it was before it was frozen; what was trainable then is trainable again."""
    for layer in base_layers(model):
        for name, was_trainable in vars(layer).pop(FROZEN, {}).items():
            parameter = layer._parameters.get(name)
            if parameter is not None and was_trainable:
                parameter.requires_grad_(True)
    for module in list(model.modules()):
        for one in {module, layer_of(module)}:
            hold = _hold_of(one)
            if hold is not None:
                hold.release(model.training)


def note_trained(model: nn.Module, tensors: Iterable[torch.Tensor] = ()) -> None:
    """Have `trained_keys` name these tensors, and everything that is not frozen."""
    trained = set(map(id, tensors))
    for layer in base_layers(model):
        frozen = vars(layer).setdefault(FROZEN, {})
        for name, one in _tensors(layer).items():
            if id(one) in trained:
                frozen.pop(name, None)


def trained_keys(model: nn.Module) -> set[str]:
    """The keys in the state dict that are not frozen; none where a network was never frozen."""
    layers = base_layers(model)
    if not any(FROZEN in vars(layer) for layer in layers):
        return set()
    frozen = {
        id(one)
        for layer in layers
        for name, one in _tensors(layer).items()
        # someone else may have made it trainable again
        if name in vars(layer).get(FROZEN, {}) and not one.requires_grad
    }
    # by identity, since wrappers of others rename keys
    return {key for key, value in model.state_dict(keep_vars=True).items() if id(value) not in frozen}


def _wrappers(model: nn.Module) -> list[Attached]:
    return [one for one in model.modules() if isinstance(one, Attached)]


def _hold_of(layer: nn.Module) -> Hold | None:
    hold = getattr(vars(layer).get("train"), "__self__", None)
    return hold if isinstance(hold, Hold) else None


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    own = chain(layer._parameters.items(), layer._buffers.items())
    return {name: one for name, one in own if one is not None}


def _has_statistics(layer: nn.Module) -> bool:
    """Whether a layer may change its buffers in train mode: a norm, of activations or of weights.

    What has parts as well is one by name: a whole network may have a buffer, such as the mean of its images.
    """
    has_buffers = any(one is not None for one in layer._buffers.values())
    is_norm = "norm" in type(layer).__name__.lower() or "running_mean" in layer._buffers
    return has_buffers and (is_norm or next(layer.children(), None) is None)
