"""What a comparison needs of the machine: disk, memory and time, before anything is begun.

What cannot be had is refused with the figure. Disk is known, memory and time are estimated.
"""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from convattn import cost, files
from convattn.compare.display import duration
from convattn.compare.options import Options
from convattn.data import array_bytes
from convattn.errors import InvalidOption

# of a process beside what it trains: Python, PyTorch and the libraries of networks
PROCESS_BYTES = 700_000_000
# weights, gradients, momentum and the weights of the best epoch; and of these what a checkpoint holds
COPIES, IN_CHECKPOINT = 4, 3
FLOAT_BYTES = 4
# of the class probabilities of an image, compressed with its path
PREDICTION_BYTES = 10
# a year is more than anybody waits
LONGEST_HOURS = 8760.0
# what is said where it takes less, since the first steps and the last ones take time too
LEAST_SECONDS = 100.0
# a number that a message need not tell to the digit
MANY = 10**15
# images of the step that is timed; of large ones two
TIMED = 8


@dataclass(frozen=True)
class Needs:
    """What a comparison needs: bytes on disk, and seconds with so many runs at a time; nan where they are not known."""

    disk: int
    jobs: int
    seconds: float

    def sentence(self, folder: Path) -> str:
        """The needs in words, beside what there is."""
        room = f"Needs {files.size(self.disk)} in {folder}, where {files.size(files.free_bytes(folder))} are free"
        if math.isnan(self.seconds):
            return f"{room}."
        at_once = f"{self.jobs} run{'s' if self.jobs > 1 else ''} at a time"
        return f"{room}, and roughly {duration(max(LEAST_SECONDS, self.seconds))} with {at_once}."


def needs(options: Options, images: int, size: int, network: nn.Module, folder: Path) -> Needs:
    """What a comparison needs.

    Args:
        options: of the comparison.
        images: their number.
        size: their side in pixels.
        network: the baseline's.
        folder: of the comparison.

    Raises:
        InvalidOption: more than the machine has, with the figure.
    """
    disk = _check_disk(options, images, size, network, folder)
    memory = memory_of_run(options, images, size, network)
    if options.device == "cpu" and memory / 2 > total_memory():
        raise InvalidOption(
            f"compare: a training step of {min(options.batch_size, images):,} images of {size} pixels needs about "
            f"{files.size(memory)} of memory, and this machine has {files.size(total_memory())}: lower --batch-size or "
            f"--image-size."
        )
    jobs = options.jobs or default_jobs(options, memory)
    return Needs(disk, jobs, _check_time(options, images, size, network, min(jobs, count_runs(options))))


def check_more(options: Options, done: int, network: nn.Module, folder: Path) -> None:
    """Raise `InvalidOption` where a folder that has some runs already is to have more than its disk can hold."""
    needed, free = (count_runs(options) - done) * _weight_bytes(network), files.free_bytes(folder)
    if needed > free:
        raise InvalidOption(
            f"compare: {_many(count_runs(options) - done)} more runs need {files.size(needed)} of disk, and "
            f"{files.size(free)} are free in {folder}: add fewer seeds, or make room."
        )


def count_runs(options: Options) -> int:
    """The number of trainings that are planned, those that tune the learning rate left out."""
    return len(options.names) * options.seeds * (options.folds or 1)


def _check_disk(options: Options, images: int, size: int, network: nn.Module, folder: Path) -> int:
    """The bytes that a comparison writes at least: the decoded images, and of each run weights and predictions.

    Raises:
        InvalidOption: the disk of the folder has not as many.
    """
    array, runs = array_bytes(images, size), count_runs(options)
    weights = _weight_bytes(network)
    # at least a tenth of the images is tested by every run
    needed = array + runs * (weights + PREDICTION_BYTES * images // 10) + IN_CHECKPOINT * weights
    free = files.free_bytes(folder)
    if needed > free:
        several = "--seeds" if options.seeds >= (options.folds or 1) else "--folds"
        lower = "--image-size" if array > runs * weights else several
        raise InvalidOption(
            f"compare: {images:,} images of {size} pixels and {_many(runs)} runs need {files.size(needed)} of disk, "
            f"and {files.size(free)} are free in {folder}: make room, give another --out, or lower {lower}."
        )
    return needed


def memory_of_run(options: Options, images: int, size: int, network: nn.Module) -> int:
    """The bytes of memory that a run takes, estimated from the maps of a forward pass of a batch."""
    batch = min(options.batch_size, images)
    return PROCESS_BYTES + COPIES * _weight_bytes(network) + _map_bytes(network, batch, size)


def _check_time(options: Options, images: int, size: int, network: nn.Module, jobs: int) -> float:
    """The seconds that all runs take, estimated from steps of the baseline; nan if it has none.

    Raises:
        InvalidOption: more than a year.
    """
    if options.train is not None:
        return math.nan
    cores = torch.get_num_threads()
    torch.set_num_threads(options.threads or cores)
    try:
        seconds = _seconds_an_image(network, size, torch.device(options.device)) * images
    # a network that does not take the images is told of with its reason, later
    except Exception:
        return math.nan
    finally:
        torch.set_num_threads(cores)
    total = float(min(count_runs(options) * options.epochs, MANY)) * seconds / jobs
    if total / 3600 > LONGEST_HOURS:
        raise InvalidOption(
            f"compare: {_many(count_runs(options))} runs of {_many(options.epochs)} epochs take about "
            f"{total / 3600:,.0f} hours on this machine: lower --seeds or --epochs, or take fewer images."
        )
    return total


def _many(count: int) -> str:
    return f"{count:,}" if count < MANY else f"more than {MANY:.0e}"


def default_threads(options: Options) -> int:
    """The threads of a run: its share of the processor where all runs are at work, all of it where a GPU is."""
    cores = torch.get_num_threads()
    return cores if options.device != "cpu" else max(1, cores // count_runs(options))


def default_jobs(options: Options, memory: int) -> int:
    """The runs at a time: as many as the processor and the memory that is free allow, one on a GPU."""
    if options.device != "cpu":
        return 1
    return max(1, min(torch.get_num_threads() // (options.threads or 1), free_memory() // memory, count_runs(options)))


def total_memory() -> int:
    """The bytes of memory of the machine, or that a container may take."""
    limits = [_first_number(Path("/sys/fs/cgroup/memory.max"))]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([limit for limit in limits if limit is not None], default=1 << 62)


def free_memory() -> int:
    """The bytes of memory that new processes may take; where the system does not tell, what the machine has."""
    free = total_memory()
    used = _first_number(Path("/sys/fs/cgroup/memory.current"))
    if used is not None and _first_number(Path("/sys/fs/cgroup/memory.max")) is not None:
        free -= used
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return free
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(free, *available)


def _weight_bytes(network: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def _first_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _map_bytes(network: nn.Module, batch: int, size: int) -> int:
    """The bytes of the outputs of all layers for a batch, from a forward pass without any numbers; 0 if it has none."""
    total = 0

    def add(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * FLOAT_BYTES

    try:
        shadow = copy.deepcopy(network).to("meta")
        for module in shadow.modules():
            if not list(module.children()):
                module.register_forward_hook(add)
        shadow.train()(torch.empty(batch, 3, size, size, device="meta"))
    # whatever the code of a network raises where tensors hold no numbers
    except Exception:
        return 0
    return total


def _seconds_an_image(network: nn.Module, size: int, device: torch.device) -> float:
    """The seconds of a training step for an image, the best of three."""
    network = copy.deepcopy(network).to(device).train()
    x = torch.randn(TIMED if size <= 64 else 2, 3, size, size, device=device)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)

    def step() -> None:
        F.cross_entropy(network(x), labels).backward()  # type: ignore[no-untyped-call]

    return min(cost.rounds({"step": step}, repeats=3, device=device)["step"]) / 1000 / len(x)
