"""How every network is trained, baseline and variants alike."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from convattn.attachment import parameter_groups

# of all steps: the learning rate rises before it falls
WARMUP = 0.05
MOMENTUM = 0.9
# heads without a norm diverge at the customary learning rate once in a while; healthy gradients are shorter
LONGEST_GRADIENT = 5.0


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum, clipped gradients, warm-up and a cosine to zero.

    Weight decay is for weights of two and more dimensions: not for biases, norms and `strength`. What was attached to a
    network may have a learning rate of its own, that of its highest step, on the same schedule.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    gate_learning_rate: float | None = None

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """The optimizer of a network."""
        groups = parameter_groups(network, self.learning_rate, self.gate_learning_rate, self.weight_decay)
        # the rate of a group changes from step to step, and this is what it is a share of
        groups = [{**group, "highest": group["lr"]} for group in groups]
        return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """Give every group of an optimizer its learning rate for a step out of `steps`."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, steps, group["highest"])

    def rate(self, step: int, steps: int, highest: float | None = None) -> float:
        """The learning rate of a step out of `steps`, a pure function; the highest is `learning_rate` if None."""
        highest = self.learning_rate if highest is None else highest
        warm = max(1, round(WARMUP * steps))
        if step < warm:
            return highest * (step + 1) / warm
        return highest * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
