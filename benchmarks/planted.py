"""Comparisons on real images whose answer is known beforehand, through `convattn.compare.run`.

python benchmarks/planted.py [--seeds 5] [--out FOLDER] [--markdown FILE]

On three random splits of the digits of scikit-learn: the baseline against itself with other seeds, which is not worth
it and whose interval should hold 0; a network that is shown every second training image only, which loses; and the
first of these comparisons once more where 50 test images are among the training images, which is no verdict at all.
"""

import argparse
import shutil
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset

import convattn.compare
from convattn import networks

TESTS, LEAKED, EPOCHS = 500, 50, 6
# where the seeds of the baseline against itself begin
OTHER = 1000


def plain(seed: int) -> nn.Module:
    """The baseline."""
    return networks.create("resnet20", classes=10)


def itself(seed: int) -> nn.Module:
    """The same from other initial weights, marked for `train` to take another order of images."""
    torch.manual_seed(OTHER + seed)
    network = plain(seed)
    network.order_from = OTHER
    return network


def half(seed: int) -> nn.Module:
    """The same, marked for `train` to hide half of the training images from it."""
    network = plain(seed)
    network.sees_half = True
    return network


def train(model: nn.Module, split: Any, seed: int) -> torch.Tensor:
    """Train with stochastic gradient descent, and return the probabilities of the test images."""
    images = Subset(split.train, range(0, len(split.train), 2)) if hasattr(model, "sees_half") else split.train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(getattr(model, "order_from", 0) + seed)
    batches = DataLoader(images, batch_size=64, shuffle=True, generator=order)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * len(batches))
    model.train()
    for _ in range(EPOCHS):
        for x, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x).softmax(1) for x, _ in DataLoader(split.test, batch_size=250)])


def main() -> None:
    """Print the table, and write it to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep data and comparisons in this folder")
    parser.add_argument("--jobs", type=int, default=2, help="networks that are trained at a time")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        lines = [
            f"{given.seeds} seeds of ResNet-20, {EPOCHS} epochs, {TESTS} test images of scikit-learn's digits. "
            f"convattn {convattn.__version__}, PyTorch {torch.__version__}; {date.today()}.\n",
            "| split | variant | gain, points | 95 % interval | verdict | headline |",
            "|---|---|---|---|---|---|",
        ]
        print("\n".join(lines), flush=True)
        for number in range(3):
            for leaked in (0, LEAKED) if number == 0 else (0,):
                lines += _rows(folder, number, leaked, given.seeds, given.jobs)
                print("\n".join(lines[-2:]), flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


def _rows(folder: Path, number: int, leaked: int, seeds: int, jobs: int) -> list[str]:
    name = f"split{number}" + (f"-{leaked}-leaked" if leaked else "")
    data = _write(folder / name, number, leaked)
    results = convattn.compare.run(
        data,
        backbone=plain,
        variants={"itself": itself, "half": half},
        train=train,
        seeds=seeds,
        jobs=jobs,
        out=folder / f"{name}-compared",
        quiet=True,
    )
    return [
        f"| {name} | {one['name']} | {one['gain_points']:+.2f} | {one['interval95'][0]:+.2f} to "
        f"{one['interval95'][1]:+.2f} | {one['verdict']} | {results['headline']} |"
        for one in results["variants"]
    ]


def _write(folder: Path, number: int, leaked: int) -> Path:
    """Class folders of a random split; so many test images are training images as well."""
    shutil.rmtree(folder, ignore_errors=True)
    digits = load_digits()
    order = np.random.default_rng(number).permutation(len(digits.target))
    parts = {"test": order[:TESTS], "train": np.concatenate([order[TESTS:], order[:leaked]])}
    for part, places in parts.items():
        for place in places:
            path = folder / part / str(digits.target[place]) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[place] * 255 / 16).astype(np.uint8)).save(path)
    return folder


if __name__ == "__main__":
    main()
