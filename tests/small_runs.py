"""Small images of three colours and a small network: everything that a run needs, in a second."""

from pathlib import Path

import numpy as np
from PIL import Image

from convattn.data import Images, decode, open_source
from convattn.train import Recipe, RunSpec

CLASSES = ("blue", "green", "red")

NETWORK = """
import os
from pathlib import Path

import torch
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    def __init__(self, classes, dropout):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = BasicBlock(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(8, classes)

    def forward(self, x):
        return self.classifier(self.dropout(self.pool(self.block(self.stem(x))).flatten(1)))


def network(classes=3):
    return Network(classes, 0.0)


def dropping(classes=3):
    return Network(classes, 0.5)


class Breaking(Network):
    def forward(self, x):
        if self.training and hasattr(self.block.bn2, "attention") and Path(__file__).with_name("broken").exists():
            raise RuntimeError("no memory\\nfor more than one line")
        return super().forward(x)


def breaking(classes=3):
    return Breaking(classes, 0.0)


def traced(classes=3):
    # says which processes build it
    Path(__file__).with_name(f"process-{os.getpid()}").touch()
    return Network(classes, 0.0)


def plain(classes=3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def five(classes=3):
    return Network(5, 0.0)


def large(classes=3):
    too_large = nn.Conv2d(3, 3, 40)
    return nn.Sequential(BasicBlock(3), too_large, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))


def collapsing(classes=3):
    class Collapsing(Network):
        def forward(self, x):
            return super().forward(x) * (float("nan") if self.training else 1.0)

    return Collapsing(classes, 0.0)
"""


def pixels(label: int, random: np.random.Generator, *, height: int = 16, width: int = 16) -> np.ndarray:
    """An image of one class: its own colour a little brighter, in noise that leaves some images unclear."""
    image = random.normal(110, 60, size=(height, width, 3)) + random.normal(0, 30, size=3)
    image[..., 2 - label] += 50
    return image.clip(0, 255).astype(np.uint8)


def write_images(root: Path, *, count: int = 30, side: int = 16, seed: int = 0) -> Path:
    """A folder of three class folders with `count` images each."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels(label, random, height=side, width=side)).save(root / name / f"{index:03d}.png")
    return root


def write_parts(root: Path, **counts: int) -> Path:
    """A folder with parts, each of the given number of images in a class."""
    for seed, (part, count) in enumerate(counts.items()):
        write_images(root / part, count=count, seed=seed)
    return root


def write_network(folder: Path) -> Path:
    """A file with networks for `FILE.py:function`."""
    path = folder / "network.py"
    path.write_text(NETWORK, encoding="utf-8")
    return path


def decoded(data: Path, folder: Path, **options: int | None) -> Images:
    """The images of a data folder, decoded to another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = open_source(data).listing(folder / "unpacked")
    return decode(listing, folder, **{"image_size": None, "wanted_size": None, **options})


def spec(network: Path, function: str = "network", **changes: object) -> RunSpec:
    """A run of the small network."""
    settings = {
        "variant": "se",
        "seed": 0,
        "backbone": f"{network}:{function}",
        "weights": None,
        "start": "paper",
        "recipe": Recipe(epochs=3, batch_size=16, learning_rate=0.05, weight_decay=5e-4),
        "flip": True,
        "device": "cpu",
        "threads": 1,
    }
    return RunSpec(**{**settings, **changes})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder but what Python compiled: files with their bytes, folders with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
