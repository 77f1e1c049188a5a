"""Small checkpoints with random gates, and images to show them on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convattn.attachment import attached
from convattn.showing import canvas
from convattn.train import checkpoint

# dollars are not the beginning of a formula
CLASSES = ["cat", "$5 and $10", "dog"]
# a block whose activations work in place, and a layer that is called twice
OWN = """
from torch import nn

from convattn.networks import CifarResNet


class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = BasicBlock(6)
        self.unused = nn.Conv2d(6, 6, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.pool(self.block(self.stem(x))).flatten(1))


def small(classes):
    return Small(classes)


def resnet8(classes):
    return CifarResNet(1, classes=classes)
"""


def make_random(network: nn.Module, strengths: list[float]) -> None:
    """Random gates, and random batch-norm statistics, so that no gate is constant by construction."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for place, (_, wrapper) in enumerate(attached(network)):
        for parameter in wrapper.attention.parameters():
            nn.init.normal_(parameter, 0.1, 0.5, generator=generator)
        if wrapper.attention.strength is not None:
            nn.init.constant_(wrapper.attention.strength, strengths[place % len(strengths)])


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: encoding them takes most of the time, and no test looks at single dots."""
    monkeypatch.setattr(canvas, "DOTS", 40)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of networks of one's own."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return str(path)


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory, own: str) -> Callable[..., Path]:
    """Write a checkpoint of a variant, and return its path."""

    def write(variant: str, *, backbone: str = "small", start: str = "identity", size: int = 16) -> Path:
        about: dict[str, Any] = {
            "backbone": f"{own}:{backbone}",
            "variant": variant,
            "start": start,
            "classes": CLASSES,
            "image_size": size,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
        }
        torch.manual_seed(0)
        network = checkpoint.build(about)
        make_random(network, [0.7, -0.4, 0.0, 0.2])
        path = tmp_path_factory.mktemp("run") / "weights.safetensors"
        checkpoint.save(path, network, about)
        return path

    return write


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of 16 pixels without loss, two of them of the same name."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = [folder / name for name in ("cats/one.png", "dogs/one.png", "dogs/two.png")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths
