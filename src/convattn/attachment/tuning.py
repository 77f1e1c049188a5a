"""What fine-tuning needs: groups for the optimizer, and the base network frozen."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from convattn import checks
from convattn.attachment import classifier, freezing
from convattn.attachment.attaching import attached
from convattn.attachment.plans import UNCHANGED
from convattn.errors import InvalidOption, UnknownName

CLASSIFIER = "classifier"


def parameter_groups(
    model: nn.Module,
    lr: float,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    classifier_lr: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer: base, attention and classifier, with and without decay.

    Weights of two and more dimensions decay; biases, norms and `strength` do not. The classifier is what `freeze_base`
    takes for it.

    Args:
        model: the network.
        lr: learning rate of the base network.
        gate_lr: learning rate of what was attached; `lr` if None.
        weight_decay: of the weights of two and more dimensions.
        classifier_lr: learning rate of the classifier; `lr` if None, as without groups.

    Returns:
        Dictionaries with the keys `name`, `params`, `lr` and `weight_decay`, none of them without parameters.

    Raises:
        InvalidOption: a negative number.

    Example:
        >>> from convattn import attach, networks
        >>> model = attach(networks.resnet20(), "cbam")
        >>> groups = parameter_groups(model, lr=0.01, gate_lr=0.1, weight_decay=5e-4, classifier_lr=0.02)
        >>> [group["name"] for group in groups if "without" not in group["name"]]
        ['base', 'attention', 'classifier']
    """
    rates = {
        "base": lr,
        "attention": lr if gate_lr is None else gate_lr,
        CLASSIFIER: lr if classifier_lr is None else classifier_lr,
    }
    numbers = (("lr", lr), ("gate_lr", rates["attention"]), ("weight_decay", weight_decay))
    for name, value in (*numbers, ("classifier_lr", rates[CLASSIFIER])):
        checks.between("parameter_groups", name, value, 0, float("inf"))
    part_of = {parameter: CLASSIFIER for layer in classifier.find(model) or () for parameter in layer.parameters()}
    # a head that is attached to the classifier is attention
    part_of |= {
        parameter: "attention" for _, wrapper in attached(model) for parameter in wrapper.attention.parameters()
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, decays): {
            "name": part + ("" if decays else " without decay"),
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part, rate in rates.items()
        for decays in (True, False)
    }
    norms = {one for name, one in _owned(model) if "norm" in name.lower()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and parameter not in norms and name.rpartition(".")[2] != "bias"
            groups[part_of.get(parameter, "base"), decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _owned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter with the class of the module that it is of."""
    return [(type(one).__name__, each) for one in model.modules() for each in one.parameters(recurse=False)]


def freeze_base(model: nn.Module, keep: str | Sequence[str] | None = CLASSIFIER) -> nn.Module:
    """Let only what was attached and the classifier be trained, in place, and return the model.

    What is frozen has no gradients, and its norms keep their statistics: they stay in eval mode, also after
    `model.train()`. Dropout follows the mode of the model, since it has no statistics. Norms inside attention and
    inside of what is kept are trained. Layers that are put in place later are not frozen: call it again, which starts
    anew. `unfreeze_base` and `detach` undo it; `save` holds what was kept.

    Args:
        model: the network.
        keep: what is trained beside attention: `"classifier"` (default), names of modules and parameters
            (`"classifier"` may be among them), or None for nothing. The classifier is what the network says itself
            (`get_classifier()`), or has one of the usual names (`fc`, `classifier`, `head` and the like), or else the
            layer of weights that gives the output, such as the last convolution of a U-Net; an encoder has none.
            What else is new, such as a decoder, has to be named. A module is trained with its parts and their
            statistics, a parameter alone.

    Raises:
        InvalidOption: `keep` is something else, or it cannot be told what the classifier is.
        UnknownName: the network has nothing of that name.

    Example:
        The usual stages, gates and classifier first, then all at lower rates:

        >>> import torch
        >>> from convattn import attach, networks
        >>> model = freeze_base(attach(networks.resnet20(classes=7), "cbam"))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.05))
        >>> [group["name"] for group in optimizer.param_groups if "without" not in group["name"]]
        ['attention', 'classifier']
        >>> model = unfreeze_base(model)
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-5, gate_lr=1e-3, classifier_lr=1e-4))
        >>> [group["name"] for group in optimizer.param_groups if "without" not in group["name"]]
        ['base', 'attention', 'classifier']
    """
    freezing.freeze(model, *_kept(freezing.unwrapped(model), keep))
    for _, wrapper in attached(model):
        wrapper.attention.requires_grad_(True)
    return model


def unfreeze_base(model: nn.Module) -> nn.Module:
    """Undo `freeze_base`, in place, and return the model; `save` then holds the whole network.

    What could be trained before `freeze_base` can be trained again, and norms take the mode of the model.

    Example:
        >>> from convattn import attach, networks
        >>> model = unfreeze_base(freeze_base(attach(networks.resnet20(), "se")))
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
    """
    freezing.release(model)
    freezing.note_trained(model)
    return model


def _kept(model: nn.Module, keep: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The modules and parameters that are to be trained."""
    names = [] if keep is None else [keep] if keep == CLASSIFIER else keep
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InvalidOption(
            f"freeze_base: keep must be {CLASSIFIER!r}, None, or a list of names of modules and parameters, "
            f"got {keep!r}. {UNCHANGED}"
        )
    modules = {name: one for name, one in model.named_modules(remove_duplicate=False) if name}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept: tuple[list[nn.Module], list[nn.Parameter]] = [], []
    for name in names:
        found = classifier.find(model) if name == CLASSIFIER else []
        if found is None:
            raise InvalidOption(
                f"freeze_base: which layers of {type(model).__name__} are its classifier cannot be told, since it has "
                f"none of the usual names and does not run on random images: name them with keep=[...], or freeze all "
                f"with keep=None. {UNCHANGED}"
            )
        kept[0].extend(found)
        if name in modules:
            kept[0].append(modules[name])
        elif name in parameters:
            kept[1].append(parameters[name])
        elif name != CLASSIFIER:
            raise UnknownName(
                f"freeze_base: {type(model).__name__} has no module or parameter {name!r}. "
                f"{checks.suggestion(name, {*modules, *parameters})} {UNCHANGED}"
            )
    return kept
