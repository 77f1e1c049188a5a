"""What each variant costs, measured in turn with the baseline, with no run active."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convattn import cost, files
from convattn.compare.options import Options
from convattn.data import Images
from convattn.train import Run, RunSpec, checkpoint
from convattn.train.recipe import LONGEST_GRADIENT

COST = "cost.json"
ROUNDS = 20
# of the upper quartile of the ratio of a network to which something was added
FASTEST = 0.95
# for each of the three measurements
SECONDS = 20.0


def measure(options: Options, specs: list[RunSpec], images: Images, folder: Path) -> dict[str, Any]:
    """The cost of every variant, the baseline first; from a file if measured before.

    Of each its `parameters`, `multiply_adds` of an inference of one image, `file_bytes` of its weights as safetensors,
    `peak_bytes` of a training step beyond weights, optimizer state and the batch, and `latency`: times, throughput,
    the number of threads that they were measured with, and which of the times are `unclear`.
    """
    path = folder / COST
    measured = files.read_intact(path)
    if measured is not None:
        return measured["networks"]  # type: ignore[no-any-return]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    runs = {spec.variant: Run(spec, images, folder) for spec in specs}
    first = next(iter(runs.values()))
    size = min(options.batch_size, len(first.split.train))
    x = torch.randn(size, 3, images.size, images.size, device=device)
    labels = torch.randint(0, len(images.classes), (size,), device=device)
    costs = {
        name: _sizes(run.network, x[:1]) | {"latency": {"threads": threads, "unclear": []}}
        for name, run in runs.items()
    }
    kinds: dict[str, Callable[[Run], Callable[[], object]]] = {
        "train_step": lambda run: _train_step(run, x, labels),
        "inference": lambda run: _inference(run.network, x[:1]),
        "inference_batch": lambda run: _inference(run.network, x),
    }
    for kind, step in kinds.items():
        steps = {name: step(run) for name, run in runs.items()}
        times, ratios = cost.interleaved(steps, repeats=ROUNDS, seconds=SECONDS, device=device)
        for name in runs:
            latency = costs[name]["latency"]
            latency |= {f"{kind}_ms": asdict(times[name]), f"{kind}_ratio": asdict(ratios[name])}
            if not _is_clear(ratios[name], name not in options.builds):
                latency["unclear"].append(kind)
            if kind == "inference_batch":
                latency |= _throughput(times[name], ratios[name], size)
    for name, run in runs.items():
        costs[name]["peak_bytes"] = _peak_bytes(run, x, labels)
    files.write_json(path, {"networks": costs})
    return costs


def note(costs: Mapping[str, Any]) -> str | None:
    """What is to be said where times cannot be told, and how to measure them again; None where all are clear."""
    names = [name for name, measured in costs.items() if measured["latency"]["unclear"]]
    if not names:
        return None
    return (
        f"The times of {', '.join(names)} cannot be told: while they were measured, the machine was busy with other "
        f"work. On a quiet machine, `convattn report FOLDER --measure` measures them again."
    )


def _is_clear(ratio: cost.Spread, added: bool) -> bool:
    """Whether a ratio to the baseline can be told; what is added to a network cannot make it faster."""
    return ratio.is_clear and not (added and ratio.high < FASTEST)


def _sizes(network: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    return {
        "parameters": cost.parameters(network),
        "multiply_adds": cost.multiply_adds(network, x),
        "file_bytes": len(checkpoint.serialized(network)),
    }


def _peak_bytes(run: Run, x: torch.Tensor, labels: torch.Tensor) -> int:
    # the steps before have left gradients, which a step begins without, and the optimizer's state, which stays
    run.optimizer.zero_grad(set_to_none=True)
    peak = cost.peak_bytes(_train_step(run, x, labels), x.device)
    run.optimizer.zero_grad(set_to_none=True)
    return peak


def _throughput(times_ms: cost.Spread, ratios: cost.Spread, images: int) -> dict[str, Any]:
    return {
        "throughput_images_per_second": asdict(times_ms.rate(1000 * images)),
        "throughput_ratio": asdict(ratios.rate(1)),
    }


def _train_step(run: Run, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        run.network.train()
        run.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(run.network(x), labels).backward()  # type: ignore[no-untyped-call]
        # as in training, where it takes time for every parameter
        nn.utils.clip_grad_norm_(run.network.parameters(), LONGEST_GRADIENT)
        run.optimizer.step()

    return step


def _inference(network: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        network.eval()
        with torch.no_grad():
            network(x)

    return step
