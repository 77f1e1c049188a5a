"""Residual networks for small images (He et al., 2016, section 4.2): ResNet-20 to ResNet-110.

State-dict keys and the parameter-free shortcut are those of the published CIFAR-10 checkpoints
(`resnet20-12fca82f.th` and its siblings), which therefore load as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from convattn import checks
from convattn.nn import AvgPool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        channels_in: channels of x.
        channels: channels of y.
        stride: of the first convolution.
        shortcut: where the shape changes, `"A"` (every second position, missing channels zero; no parameters) or
            `"B"` (1x1 convolution and batch norm).
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int = 1, shortcut: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # a layer and no function, so that the network can be cut into a chain of layers
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = _shortcut(channels_in, channels, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map (B, channels_in, H, W) to (B, channels, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))  # type: ignore[no-any-return]


class PadShortcut(nn.Module):
    """Option A: every `stride`-th position, and zeros for the channels that x does not have."""

    def __init__(self, missing: int, stride: int) -> None:
        super().__init__()
        self.missing = missing
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map (B, C, H, W) to (B, C + missing, H / stride, W / stride)."""
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))


class CifarResNet(nn.Module):
    """A residual network of three stages with 16, 32 and 64 channels.

    Args:
        blocks: blocks in each stage.
        classes: width of the classifier.
        shortcut: `"A"` or `"B"`, see `BasicBlock`.
        width: factor on the channels of each stage, rounded to whole ones.
    """

    def __init__(self, blocks: int, *, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> None:
        super().__init__()
        checks.positive("CifarResNet", "classes", classes)
        checks.choice("CifarResNet", "shortcut", shortcut, ("A", "B"))
        # the narrowest has a channel in each stage, the widest takes days to train
        checks.between("CifarResNet", "width", width, 1 / 16, 64)
        first, second, third = (round(width * channels) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, 1, shortcut)
        self.layer2 = _stage(first, second, blocks, 2, shortcut)
        self.layer3 = _stage(second, third, blocks, 2, shortcut)
        self.avgpool = AvgPool(third)
        self.linear = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x))  # type: ignore[no-any-return]


def resnet20(*, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> CifarResNet:
    """ResNet-20: with 10 classes 269,722 parameters, with shortcut B 272,474."""
    return CifarResNet(3, classes=classes, shortcut=shortcut, width=width)


def resnet32(*, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> CifarResNet:
    """ResNet-32."""
    return CifarResNet(5, classes=classes, shortcut=shortcut, width=width)


def resnet44(*, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> CifarResNet:
    """ResNet-44."""
    return CifarResNet(7, classes=classes, shortcut=shortcut, width=width)


def resnet56(*, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> CifarResNet:
    """ResNet-56."""
    return CifarResNet(9, classes=classes, shortcut=shortcut, width=width)


def resnet110(*, classes: int = 10, shortcut: str = "A", width: float = 1.0) -> CifarResNet:
    """ResNet-110."""
    return CifarResNet(18, classes=classes, shortcut=shortcut, width=width)


NETWORKS: dict[str, Callable[..., CifarResNet]] = {
    build.__name__: build for build in (resnet20, resnet32, resnet44, resnet56, resnet110)
}


def _stage(channels_in: int, channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride=stride, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def _shortcut(channels_in: int, channels: int, stride: int, shortcut: str) -> nn.Module:
    if shortcut == "A":
        return PadShortcut(channels - channels_in, stride)
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
