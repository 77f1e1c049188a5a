"""What each variant costs, measured in turn with the baseline, with no run active."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convattn import cost
from convattn.compare.options import Options
from convattn.data import Images
from convattn.train import Run, RunSpec, write

COST = "cost.json"
ROUNDS = 20
# for each of the three measurements
SECONDS = 20.0


def measure(options: Options, specs: list[RunSpec], images: Images, folder: Path) -> dict[str, Any]:
    """Parameters, multiply-adds and latency of every variant, the baseline first; from a file if measured before."""
    path = folder / COST
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    torch.set_num_threads(specs[0].threads)
    device = torch.device(options.device)
    runs = {spec.variant: Run(spec, images, folder) for spec in specs}
    first = next(iter(runs.values()))
    size = min(options.batch_size, len(first.split.train))
    x = torch.randn(size, 3, images.size, images.size, device=device)
    labels = torch.randint(0, len(images.classes), (size,), device=device)
    found: dict[str, Any] = {
        name: {
            "parameters": cost.parameters(run.network),
            "multiply_adds": cost.multiply_adds(run.network, x[:1]),
            "latency": {},
        }
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
            found[name]["latency"][f"{kind}_ms"] = asdict(times[name])
            found[name]["latency"][f"{kind}_ratio"] = asdict(ratios[name])
    write(path, json.dumps(found, indent=1))
    return found


def _train_step(run: Run, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        run.network.train()
        run.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(run.network(x), labels).backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()

    return step


def _inference(network: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        network.eval()
        with torch.no_grad():
            network(x)

    return step
