"""What the kernels take by a GPU's own count of its time: on maps alone and behind a norm, and in a ResNet-50.

Where the host cannot start kernels as fast as they end, this is what is left of a time taken from the host, which is
given beside it for the network. For the host's times on maps there is `convattn bench --device cuda`.

python benchmarks/on_cuda.py [--dtype bfloat16] [--images 256] [--repeats 12]
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from convattn import attachment, cost, networks
from convattn.attachment.wrapper import Attached
from convattn.nn import CBAM
from convattn.tables import aligned

# the kernels that pass over the map, and how often each reads or writes it
PASSES = {"pool": 1, "summarise": 1, "apply": 2, "grad_gates": 2, "grad_summary": 1, "grad_input": 3}
SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
DEVICE = torch.device("cuda")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {given.dtype}, {given.images} images\n")
    columns = [on_map(given.images, 256, 56, dtype, last=last, norm=False) for last in (False, True)]
    print(table(["kernel", "passes", "channels first", "channels last"], columns))
    columns = [on_map(given.images, *shape, dtype, last=True, norm=True) for shape in SHAPES]
    print(table(["behind a norm", "passes", *(str((given.images, c, side, side)) for c, side in SHAPES)], columns))
    print(in_network(given.images, dtype, given.repeats))


def by_kernel(step: Callable[[], object], steps: int = 5) -> Counter[str]:
    """Microseconds of the device for each kernel in a step."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / steps
    return times


def on_map(images: int, channels: int, side: int, dtype: torch.dtype, *, last: bool, norm: bool) -> Counter[str]:
    """The kernels of a training step of CBAM on a map, with what a copy of the map takes."""
    kind = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(images, channels, side, side, device=DEVICE, dtype=dtype).contiguous(memory_format=kind)
    other = torch.empty_like(x)
    copy = by_kernel(lambda: other.copy_(x)).total()
    module: nn.Module = CBAM(channels, bias=False)
    if norm:
        module = Attached(nn.BatchNorm2d(channels), module)
    module.to(DEVICE).train()
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            y = module(x)
        y.backward(other)

    return by_kernel(step) + Counter({"copy": copy})


def table(head: list[str], columns: list[Counter[str]]) -> str:
    """A row for each kernel that passes over the map, and what they come to beside a copy, which passes twice."""
    rows = [head]
    rows += [[name, str(PASSES[name]), *(f"{times[name]:.0f}" for times in columns)] for name in PASSES]
    whole = [times.total() - times["copy"] for times in columns]
    small = [every - sum(times[name] for name in PASSES) for every, times in zip(whole, columns, strict=True)]
    count = sum(PASSES.values())
    rate = [count / 2 * times["copy"] / every for every, times in zip(whole, columns, strict=True)]
    rows.append(["on small maps", "", *(f"{one:.0f}" for one in small)])
    rows.append(["together", str(count), *(f"{one:.0f}" for one in whole)])
    rows.append(["part of a copy's rate", "", *(f"{one:.2f}" for one in rate)])
    return lines(rows) + "\n"


def lines(rows: list[list[str]]) -> str:
    """A table, numbers to the right."""
    return "\n".join(aligned(rows, "<" + ">" * (len(rows[0]) - 1)))


def in_network(images: int, dtype: torch.dtype, repeats: int) -> str:
    """A training step of a ResNet-50 with CBAM beside one without, channels last."""
    batch = torch.randn(images, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    plain, with_cbam = networks.create("resnet50"), networks.create("resnet50")
    attachment.attach(with_cbam, "cbam", start="paper")
    steps = {"network alone": training(plain, batch, dtype), "with CBAM": training(with_cbam, batch, dtype)}
    counted = {name: by_kernel(step).total() / 1000 for name, step in steps.items()}
    timed = cost.rounds(steps, repeats=repeats, device=DEVICE)
    alone, beside = timed.values()
    ratio = cost.Spread.of([one / other for one, other in zip(beside, alone, strict=True)])
    device = counted["with CBAM"] / counted["network alone"]
    return lines(
        [
            ["milliseconds of a ResNet-50", *steps, "ratio"],
            ["by the device", *(f"{one:.1f}" for one in counted.values()), f"{device:.3f}"],
            [
                "from the host",
                *(f"{statistics.median(one):.1f}" for one in timed.values()),
                f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})",
            ],
        ]
    )


def training(network: nn.Module, batch: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A step of training, without an optimiser."""
    network.to(DEVICE).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = network(batch).float().square().mean()
        loss.backward()

    return step


if __name__ == "__main__":
    main()
