"""Output and gradients of a module, by name, and the truth of them."""

import copy

import torch
from torch import nn

from convattn import ops


def gradients(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [x, *parameters], dy)
    return dict(zip(["y", "x", *names], [y.detach(), *found], strict=True))


def truth(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same in float64 by plain PyTorch."""
    return gradients(copy.deepcopy(module).double(), x.double(), dy.double())


def unsteadiness(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float]:
    """By how much plain PyTorch is off in float32, or results change where numbers change in their last bit.

    No float32 can be much more exact: the gradient of a scalar, such as the norm's weight, is a sum whose terms cancel.
    """

    def shaken(one: torch.Tensor, phase: int) -> torch.Tensor:
        # where equal values stay equal, so do maxima
        return one.double() * (1 + 2**-23 * torch.sin(1e4 * one.double() + phase))

    expected = truth(module, x, dy)
    with ops.use("reference"):
        plain = gradients(copy.deepcopy(module), x, dy)
    found = {name: float((plain[name] - one).abs().max()) for name, one in expected.items()}
    # one change alone may happen to cancel as well
    for phase in range(4):
        other = copy.deepcopy(module).double()
        for parameter in other.parameters():
            parameter.data = shaken(parameter.data, phase)
        for name, one in gradients(other, shaken(x, phase), shaken(dy, phase)).items():
            found[name] = max(found[name], float((one - expected[name]).abs().max()))
    return found


def check(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, found: dict[str, torch.Tensor] | None = None) -> None:
    """Output and gradients of a module, or given ones, against float64: 1e-5 of the largest, or what float32 allows."""
    expected, unsteady = truth(module, x, dy), unsteadiness(module, x, dy)
    for name, one in (gradients(module, x, dy) if found is None else found).items():
        error = float((one.double() - expected[name]).abs().max())
        assert error <= max(1e-5 * float(expected[name].abs().max()), 30 * unsteady[name], 1e-20), name
