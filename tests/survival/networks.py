"""Small networks of several forms, and attention that does something in them."""

import copy
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import update_bn

from convattn import attach
from convattn.attachment import attached
from convattn.networks import resnet20

SIDE = 32


class Unit(nn.Module):
    """A convolution, a norm and an activation, as in detection code: its network merges the first two."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Unit(width, width, 1), Unit(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cv2(self.cv1(x))


class Detector(nn.Module):
    """A network of units, whose `fuse` goes through all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            Unit(3, 16, stride=2), Bottleneck(16), Bottleneck(16), Unit(16, 32, stride=2), Bottleneck(32)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(x).mean((2, 3)))

    def fuse(self) -> nn.Module:
        for module in self.model.modules():
            if hasattr(module, "bn") and hasattr(module, "forward_fuse"):
                module.conv = fuse_conv_and_bn(module.conv, module.bn)
                delattr(module, "bn")
                module.forward = module.forward_fuse
        return self


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that computes what a convolution and a norm do."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    fused = copy.deepcopy(conv)
    fused.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1))
    fused.bias = nn.Parameter(bn.bias - bn.running_mean * scale)
    return fused


class Parallel(nn.Module):
    """Parallel convolutions and a shortcut, merged into one convolution by a method of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.small = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.merged: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged is not None:
            return self.act(self.merged(x))
        return self.act(self.large(x) + self.small(x) + self.norm(x))

    def get_equivalent_kernel_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        large, small = fuse_conv_and_bn(*self.large), fuse_conv_and_bn(*self.small)
        same = nn.Conv2d(len(large.bias), len(large.bias), 1, bias=False)
        same.weight.data = torch.eye(len(large.bias))[:, :, None, None]
        identity = fuse_conv_and_bn(same, self.norm)
        around = [nn.functional.pad(one.weight, [1] * 4) for one in (small, identity)]
        return large.weight + sum(around), large.bias + small.bias + identity.bias

    def switch_to_deploy(self) -> None:
        weight, bias = self.get_equivalent_kernel_bias()
        merged = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        merged.weight.data, merged.bias.data = weight.detach(), bias.detach()
        del self.large, self.small, self.norm
        self.merged = merged


class Reparameterised(nn.Module):
    """A network of blocks with parallel convolutions in them, as RepVGG is, with residual sums around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.stages = nn.Sequential(*[Around(16) for _ in range(3)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Around(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.out = Parallel(width), nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.mix(x))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet20(classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "detector": Detector,
    "reparameterised": Reparameterised,
}


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE)


def plain(name: str) -> nn.Module:
    """A network in eval mode, whose norms have random weights and statistics near those of its maps."""
    model = BUILDERS[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(std=0.1)
        # of other statistics nothing would be left of the image at the end
        update_bn([images(16)], model)
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
            # a channel that is next to constant would be blown up, and with it the rounding
            norm.running_var.clamp_(min=float(norm.running_var.mean()) / 4)
    return model.eval()


def with_attention(model: nn.Module, attention: str, at: str) -> nn.Module:
    """The network with attention that does something at every site."""
    torch.manual_seed(1)
    options = {"where": "*0*"} if at == "layer" else {}
    attach(model, attention, at=at, example=images(), **options)
    return stronger(model)


def stronger(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, wrapper in attached(model):
            wrapper.attention.strength.fill_(0.7)
    return model


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Between two outputs, relative to the larger numbers."""
    return float((y - expected).detach().abs().max() / expected.detach().abs().max())


def sites(model: nn.Module) -> list[str]:
    return [name for name, _ in attached(model)]
