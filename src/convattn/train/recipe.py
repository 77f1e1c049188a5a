"""How every network is trained, baseline and variants alike."""

import math
from dataclasses import dataclass

import torch
from torch import nn

# of all steps: the learning rate rises before it falls
WARMUP = 0.05
MOMENTUM = 0.9
# heads without a norm diverge at the customary learning rate once in a while; healthy gradients are shorter
LONGEST_GRADIENT = 5.0


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum, clipped gradients, warm-up and a cosine to zero.

    Weight decay is for weights of two and more dimensions: not for biases, norms and `strength`.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """The optimizer of a network."""
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=MOMENTUM, nesterov=True)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step out of `steps`, a pure function."""
        warm = max(1, round(WARMUP * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
