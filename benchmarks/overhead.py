"""What attention adds to a training step, and what attaching takes beside an inference.

Candidates in turn in one process, medians and ratios with quartiles.

python benchmarks/overhead.py [--side 64] [--batch 16] [--repeats 20]
"""

import argparse
import platform
from collections.abc import Callable, Mapping

import timm
import torch
from timm.layers import SqueezeExcite
from timm.layers.cbam import CbamModule
from torch import nn

import convattn
from convattn import cost

SHAPES = ((16, 64, 56, 56), (16, 256, 28, 28), (16, 512, 7, 7))


def main() -> None:
    """Print tables: modules against timm's, whole networks against the plain one, and attaching against inference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        channels = shape[1]
        modules = {
            "timm SE": SqueezeExcite(channels),
            "our SE": convattn.nn.SqueezeExcite(channels),
            "timm CBAM": CbamModule(channels),
            "our CBAM": convattn.nn.CBAM(channels),
        }
        _table(f"module, forward and backward, {shape}", {n: _step(m, x) for n, m in modules.items()}, given.repeats)
    images = torch.randn(given.batch, 3, given.side, given.side)
    networks: dict[str, nn.Module] = {"plain": timm.create_model("resnet18", num_classes=10)}
    for name in ("se", "cbam", "dual"):
        networks[name] = convattn.attach(timm.create_model("resnet18", num_classes=10), name, start="paper")
    title = f"ResNet-18, training step, {tuple(images.shape)}"
    _table(title, {name: _step(network, images) for name, network in networks.items()}, given.repeats)
    for name in ("resnet50", "efficientnet_b0", "mobilenetv3_small_100"):
        _attaching(name, torch.randn(given.batch, 3, given.side, given.side), given.repeats)


def _attaching(name: str, images: torch.Tensor, repeats: int) -> None:
    network = timm.create_model(name).eval()
    planned = convattn.plan(network, "cbam", example=images)

    @torch.no_grad()
    def inference() -> None:
        network(images)

    steps: dict[str, Callable[[], object]] = {
        "inference": inference,
        "plan": lambda: convattn.plan(network, "cbam", example=images),
        "attach+detach": lambda: convattn.detach(convattn.attach(network, planned)),
    }
    _table(f"{name}, CBAM planned at {len(planned)} sites, {tuple(images.shape)}", steps, repeats)


def _step(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(x).sum().backward()

    return step


def _table(title: str, steps: Mapping[str, Callable[[], object]], repeats: int) -> None:
    times, ratios = cost.interleaved(steps, repeats=repeats)
    print(f"\n{title}\n{'':13} {'ms':>9} {'quartiles':>19} {'ratio':>7} {'quartiles':>13}")
    for name, time in times.items():
        ratio = ratios[name]
        spread = f"{time.low:.2f}-{time.high:.2f}"
        print(f"{name:13} {time.median:9.2f} {spread:>19} {ratio.median:7.2f} {ratio.low:6.2f}-{ratio.high:.2f}")


if __name__ == "__main__":
    main()
