"""Attach to every kind of convolutional network: the smallest of every timm file, and all that torchvision builds.

For segmentation and detection, torchvision's and Unets of segmentation_models_pytorch, attention is in the encoder.

python benchmarks/sweep.py [--only resnet] [--jobs 2] [--attention se] [--markdown FILE]

For each network whose features are a map, and each place: the number of sites; whether the output of the fresh
attention is equal to the bit, in eval and in train mode; whether the gradient of the output reaches every site; whether
moved gates change the output; whether `detach` brings the network back. Weights are random, and no norm is zero, so
that no branch is silent. At the end every failure is named with its reason, and the exit status is 1 if there is any.
"""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

import convattn
from convattn.attachment import attached
from convattn.errors import AttachError

Buffers = list[tuple[torch.Tensor, torch.Tensor]]

PLACES = ("residual", "block", "stage", "final", "pool")
# the part of networks for segmentation and detection that makes the features
ENCODERS = {"smp": "encoder", "segmentation": "backbone", "detection": "backbone"}
UNETS = (
    "resnet18",
    "vgg11_bn",
    "densenet121",
    "mobilenet_v2",
    "efficientnet-b0",
    "timm-regnetx_002",
    "mit_b0",
    "tu-convnext_atto",
)
SIDES = (64, 96, 128, 160, 224, 256, 299)


@dataclass(frozen=True)
class Row:
    """What was seen at one place of one network; `failure` is empty where all is well."""

    network: str
    place: str
    side: int
    sites: int
    skipped: int
    seconds: float
    failure: str


def main() -> None:
    """Print a table, row by row, and the failures at its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--attention", default="se", help="the gate; the head is always dual")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    begun = time.perf_counter()
    names = [name for name in _names(given.jobs) if given.only in name]
    print(f"{len(names)} networks, torch {torch.__version__}, timm {timm.__version__}", flush=True)
    rows: list[Row] = []
    header = f"{'network':42} {'place':9} {'side':>4} {'sites':>5} {'skipped':>7} {'s':>6}  result"
    print(header, flush=True)
    for found in _parallel(_swept, [(name, given.attention) for name in names], given.jobs):
        rows += found
        for row in found:
            print(_line(row), flush=True)
    failures = [row for row in rows if row.failure]
    networks = {row.network for row in rows if row.sites}
    summary = (
        f"{len(networks)} networks with maps, {sum(row.sites > 0 for row in rows)} places, "
        f"{sum(row.sites for row in rows)} sites, {len(failures)} failures, {time.perf_counter() - begun:.0f} s"
    )
    print(f"\n{summary}")
    for row in failures:
        print(f"  {row.network} at {row.place}: {row.failure}")
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(_markdown(rows, summary))
    sys.exit(bool(failures))


def _line(row: Row) -> str:
    result = row.failure or ("ok" if row.sites else "no such place")
    return (
        f"{row.network:42} {row.place:9} {row.side:4} {row.sites:5} {row.skipped:7} {row.seconds:6.1f}  {result[:90]}"
    )


def _markdown(rows: list[Row], summary: str) -> str:
    modules = (torch, timm, torchvision, smp)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    about = f"The sites at each place. {summary} with {os.cpu_count()} cores; {versions}; {date.today()}."
    lines = [f"{about}\n", "| network | " + " | ".join(PLACES) + " |", "|---" * (len(PLACES) + 1) + "|"]
    by_network: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_network.setdefault(row.network, {})[row.place] = row
    for name, places in sorted(by_network.items()):
        cells = [_cell(places.get(place)) for place in PLACES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None or not (row.sites or row.failure):
        return ""
    return f"{row.sites} **{row.failure}**" if row.failure else str(row.sites)


def _parallel(function: Callable[..., Any], arguments: list[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = [pool.submit(function, *one) for one in arguments]
        for future in as_completed(futures):
            yield future.result()


def _one_thread() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _names(jobs: int) -> list[str]:
    """The smallest network of every timm file, and all of torchvision's classification."""
    files = timm.list_modules()
    smallest = [name for name in _parallel(_smallest, [(file,) for file in files], jobs) if name]
    names = sorted(f"timm:{name}" for name in smallest)
    names += [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    for kind in ("segmentation", "detection"):
        module = getattr(torchvision.models, kind)
        names += [f"{kind}:{name}" for name in torchvision.models.list_models(module=module)]
    return names + [f"smp:{encoder}" for encoder in UNETS]


def _smallest(file: str) -> str | None:
    """The network of a file with the fewest parameters."""
    counts = {}
    for name in timm.list_models(module=file):
        try:
            with torch.device("meta"):
                counts[name] = sum(one.numel() for one in timm.create_model(name).parameters())
        except Exception as error:
            print(f"not built without memory: {name} ({type(error).__name__}: {error})", file=sys.stderr)
    return min(counts, key=lambda name: counts[name], default=None)


def _swept(name: str, attention: str) -> list[Row]:
    source, _, bare = name.partition(":")
    torch.manual_seed(0)
    try:
        model = _built(source, bare)
        _wake(model)
        # detectors take targets in training
        modes = (False,) if source == "detection" else (False, True)
        x = _example(model.eval(), modes)
        if source == "timm" and not _has_map(model, x):
            return []
    except Exception as error:
        return [Row(name, "all", 0, 0, 0, 0.0, _reason(error))]
    rows: list[Row] = []
    where = f"{ENCODERS[source]}*" if source in ENCODERS else None
    for place in PLACES:
        # the last map and the pooling head of a network for segmentation or detection are not its encoder's
        if (place == "block" and rows[0].sites) or (where and place in ("final", "pool")):
            continue
        begun = time.perf_counter()
        sites, skipped, failure = _tried(model, place, "dual" if place == "pool" else attention, x, where, modes)
        rows.append(Row(name, place, x.shape[-1], sites, skipped, time.perf_counter() - begun, failure))
    return rows


def _built(source: str, name: str) -> nn.Module:
    if source == "timm":
        return timm.create_model(name)
    if source == "smp":
        return smp.Unet(name, encoder_weights=None)
    extra: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if source in ENCODERS:
        extra["weights_backbone"] = None
    if source == "detection":
        # let random weights detect something, on small images: what finds nothing cannot change
        if "rcnn" in name:
            extra |= {"box_score_thresh": 0.0, "rpn_score_thresh": 0.0, "box_detections_per_img": 10}
        else:
            extra["score_thresh"] = 0.0
        if name.startswith("ssd"):
            # all that is found, so that every map has a part in it; of one class, since that takes its time
            extra |= {"topk_candidates": 10_000, "detections_per_img": 10_000, "nms_thresh": 1.0, "num_classes": 2}
        else:
            extra |= {"min_size": 128, "max_size": 160}
    return torchvision.models.get_model(name, **extra)


def _wake(model: nn.Module) -> None:
    """Let no branch be silent: scales away from 0, where many networks start. No gradient but that of the gates."""
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.0)
            elif not parameter.any() or parameter.std() < 1e-3:
                nn.init.normal_(parameter, std=0.02)


def _example(model: nn.Module, modes: tuple[bool, ...]) -> torch.Tensor:
    """Two images of the smallest size that the network takes."""
    error: Exception | None = None
    for side in SIDES:
        x = torch.randn(2, 3, side, side)
        try:
            # some networks have more branches in training
            for training in modes:
                _run(model, x, training, _buffers(model))
            return x
        except Exception as caught:
            error = caught
    raise error or RuntimeError("no size")


def _has_map(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the features, before they are pooled or flattened, are a map of more than two dimensions."""
    forward = getattr(model, "forward_features", None)
    if forward is not None:
        with torch.no_grad():
            y = forward(x)
        return isinstance(y, torch.Tensor) and y.dim() == 4
    return not hasattr(model, "encoder")


def _tried(
    model: nn.Module, place: str, attention: str, x: torch.Tensor, where: str | None, modes: tuple[bool, ...]
) -> tuple[int, int, str]:
    """The sites, the sums and places left out, and the first failure."""
    state, keys = _buffers(model), list(model.state_dict())
    modules = dict(model.named_modules())
    try:
        plan = convattn.plan(model, attention, at=place, example=x, where=where)
    except AttachError as error:
        return 0, 0, "" if place in ("residual", "block", "pool") else _reason(error)
    try:
        before = {mode: _run(model, x, mode, state) for mode in modes}
        failure = _checked(model, plan, x, state, keys, before)
    except Exception as error:
        failure = _reason(error)
    convattn.detach(model)
    now = dict(model.named_modules())
    if now.keys() != modules.keys() or any(now[key] is not modules[key] for key in now):
        failure = failure or "detach does not bring the layers back"
    return len(plan), len(plan.skipped), failure


def _checked(
    model: nn.Module,
    plan: convattn.Plan,
    x: torch.Tensor,
    state: Buffers,
    keys: list[str],
    before: dict[bool, torch.Tensor],
) -> str:
    if not before[False].isfinite().all():
        return "the plain network gives no finite output"
    convattn.attach(model, plan)
    if [key for key in model.state_dict() if key in set(keys)] != keys:
        return "the keys of the state dict are others"
    for mode, y in before.items():
        if not torch.equal(_run(model, x, mode, state), y):
            return f"the output is not equal at the start in {'train' if mode else 'eval'} mode"
    wrappers = attached(model.eval())
    _output(model(x)).square().sum().backward()
    silent = [name for name, one in wrappers if not _has_gradient(one.attention.strength)]
    if silent:
        return f"no gradient at {silent[0]} and {len(silent) - 1} more"
    for _, wrapper in wrappers:
        nn.init.constant_(wrapper.attention.strength, 0.9)
    if torch.equal(_run(model, x, False, state), before[False]):
        return "the moved gates change nothing"
    convattn.detach(model)
    if not torch.equal(_run(model, x, False, state), before[False]):
        return "the output is another one after detach"
    return ""


def _has_gradient(strength: torch.Tensor) -> bool:
    return strength.grad is not None and bool(strength.grad.any()) and bool(strength.grad.isfinite().all())


def _buffers(model: nn.Module) -> Buffers:
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def _run(model: nn.Module, x: torch.Tensor, training: bool, state: Buffers) -> torch.Tensor:
    """The output, with the random numbers and the batch-norm statistics that every run starts from."""
    torch.manual_seed(1)
    with torch.no_grad():
        y = _output(model.train(training)(x))
        for buffer, value in state:
            buffer.copy_(value)
    return y


def _output(y: Any) -> torch.Tensor:
    """The logits, or the first output of those that give several, or all numbers of a detection in a row."""
    if isinstance(y, list):
        return torch.cat([value.float().flatten() for one in y for value in one.values()])
    return y if isinstance(y, torch.Tensor) else next(iter(y.values() if isinstance(y, dict) else y))


def _reason(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, AttachError):
        return first
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    main()
