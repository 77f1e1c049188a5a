"""What fine-tuning needs: groups for the optimizer, and the base network held still."""

from typing import Any

from torch import nn

from convattn import checks
from convattn.attachment.attaching import attached


def parameter_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of a network in groups for an optimizer: base and attention, with and without decay.

    Weights of two and more dimensions decay; biases, norms and `strength` do not.

    Args:
        model: the network.
        lr: learning rate of the base network.
        gate_lr: learning rate of what was attached; `lr` if None.
        weight_decay: of the weights of two and more dimensions.

    Returns:
        Dictionaries with the keys `name`, `params`, `lr` and `weight_decay`, none of them without parameters.

    Raises:
        InvalidOption: a negative number.

    Example:
        >>> from convattn import attach, networks
        >>> model = attach(networks.resnet20(), "cbam")
        >>> [group["name"] for group in parameter_groups(model, lr=0.01, gate_lr=0.1, weight_decay=5e-4)]
        ['base', 'base without decay', 'attention', 'attention without decay']
    """
    gate_lr = lr if gate_lr is None else gate_lr
    for name, value in (("lr", lr), ("gate_lr", gate_lr), ("weight_decay", weight_decay)):
        checks.between("parameter_groups", name, value, 0, float("inf"))
    added = {parameter for _, wrapper in attached(model) for parameter in wrapper.attention.parameters()}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {
        (of_attention, decays): {
            "name": ("attention" if of_attention else "base") + ("" if decays else " without decay"),
            "params": [],
            "lr": gate_lr if of_attention else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for of_attention in (False, True)
        for decays in (True, False)
    }
    norms = {one for name, one in _owned(model) if "norm" in name.lower()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and parameter not in norms and name.rpartition(".")[2] != "bias"
            groups[parameter in added, decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _owned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter with the class of the module that it is of."""
    return [(type(one).__name__, each) for one in model.modules() for each in one.parameters(recurse=False)]


def freeze_base(model: nn.Module) -> nn.Module:
    """Let only what was attached be trained, in place, and return the model.

    The statistics of batch norm still move in train mode; `model.requires_grad_(True)` undoes it.

    Example:
        >>> from convattn import attach, networks
        >>> model = freeze_base(attach(networks.resnet20(), "se"))
        >>> all(".attention." in name for name, one in model.named_parameters() if one.requires_grad)
        True
    """
    model.requires_grad_(False)
    for _, wrapper in attached(model):
        wrapper.attention.requires_grad_(True)
    return model
