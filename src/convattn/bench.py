"""What attention costs here, beside what others ask for it: candidates in turn in one process, with the same weights.

Before anything is timed, outputs and gradients of all candidates are compared. A ratio is one round's; given are the
median and the quartiles over the rounds.
"""

import copy
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from convattn import attachment, checks, cost, files, networks, ops
from convattn.errors import InvalidOption
from convattn.nn import CBAM, SqueezeExcite
from convattn.tables import aligned

OPS = ("cbam", "se")
OTHERS = ("timm", "torchvision", "compile", "plain")
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
# small to large, wide to narrow: the maps of a ResNet-50, and one of a single image
SHAPES = ((1, 64, 112, 112), (16, 64, 56, 56), (8, 256, 56, 56), (16, 256, 56, 56), (16, 512, 14, 14), (16, 2048, 7, 7))
SMALL = (1, 64, 7, 7)
# the same for a GPU, of which one map has to fill more than its cache
GPU_SHAPES = (
    (1, 64, 112, 112),
    (256, 256, 56, 56),
    (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 1024, 14, 14),
    (64, 2048, 7, 7),
)
DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Step = Callable[[], object]


class Place(NamedTuple):
    """Where is measured, and with which numbers."""

    device: torch.device
    dtype: torch.dtype

    def mixed(self) -> torch.autocast:
        """In which a network computes with numbers of this type."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


@dataclass
class Row:
    """One measurement: a map or a network, in training or inference."""

    where: str
    memory_format: str
    what: str
    milliseconds: dict[str, cost.Spread]
    # our time over that of each other candidate; of a network, the time of each candidate over the plain network's
    ratios: dict[str, cost.Spread]
    # bytes kept for the backward pass beside the input, in training
    kept_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Result:
    """All rows of a run, and what they were measured on."""

    op: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    maps: list[Row] = field(default_factory=list)
    networks: list[Row] = field(default_factory=list)


def run(
    op: str = "cbam",
    *,
    network: str | None = None,
    against: Iterable[str] = ("timm", "plain"),
    shapes: Iterable[tuple[int, ...]] | None = None,
    repeats: int = 11,
    batch: int = 8,
    side: int = 224,
    device: str = "cpu",
    dtype: str = "float32",
    said: Callable[[str], object] = lambda line: None,
    result: Result | None = None,
) -> "Result":
    """Measure one module on maps, and if asked, a network with it.

    Args:
        op: `"cbam"` or `"se"`.
        network: a network as for `compare`, or None for maps only.
        against: any of `"timm"` (its module), `"compile"` (that compiled), `"torchvision"` (squeeze-and-excitation
            only) and `"plain"` (ours in plain PyTorch).
        shapes: of maps (B, C, H, W); None for those of a ResNet-50, for a GPU larger ones.
        repeats: rounds of the candidates.
        batch, side: images for the network.
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`: of maps and modules; a network computes with it under autocast.
        said: called with each line when it is measured.
        result: an empty one to fill, for whoever wants to have what was measured before an interruption.

    Raises:
        InvalidOption: an option out of its range, or a device that is not there.
    """
    checks.choice("bench", "op", op, OPS)
    checks.choice("bench", "device", device, DEVICES)
    checks.choice("bench", "dtype", dtype, DTYPES)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("bench: device: PyTorch finds no CUDA device here.")
    others = list(against)
    for one in others:
        checks.choice("bench", "each of against", one, OTHERS)
    for name, value in (("repeats", repeats), ("batch", batch), ("image-size", side)):
        checks.positive("bench", name, value)
    place = Place(torch.device(device), DTYPES[dtype])
    if shapes is None:
        shapes = SHAPES if device == "cpu" else GPU_SHAPES
    shapes = [tuple(shape) for shape in shapes]
    if any(len(shape) != 4 or min(shape) < 1 for shape in shapes):
        raise InvalidOption(f"bench: shapes are (batch, channels, height, width), got {shapes}.")
    result = result if result is not None else Result()
    result.op, result.machine = op, _machine(place)
    for shape in (*shapes, SMALL):
        for memory_format in FORMATS:
            for row in _on_map(op, shape, memory_format, others, repeats, place):
                result.maps.append(row)
                said("  ".join(_cells(row, others)))
    if network is not None:
        for memory_format in FORMATS:
            row = _on_network(op, network, memory_format, others, repeats, (batch, 3, side, side), place)
            result.networks.append(row)
            said("  ".join(_network_cells(row)))
    return result


def _on_map(
    op: str, shape: tuple[int, ...], memory_format: str, others: list[str], repeats: int, place: Place
) -> Iterable[Row]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=place.device, dtype=place.dtype)
    x = x.contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    dy = torch.randn_like(x)
    where = str(shape)
    for training in (True, False):
        # what was compiled is for one map, in one mode
        torch.compiler.reset()
        modules = _modules(op, shape[1], others)
        for module in modules.values():
            module.train(training).to(place.device)
        if place.dtype is torch.float32:
            _agree(modules, x, dy)
        else:
            # in half precision other elements may be the largest, so that they are compared in single precision
            known = {name: module for name, module in modules.items() if name != "compile"}
            _agree(known, x.detach().float().requires_grad_(), dy.float())
        for module in modules.values():
            module.to(place.dtype)
        make = _training if training else _inference
        steps = {name: make(module, x, dy) for name, module in modules.items()}
        steps["floor"] = _copying(x, dy) if training else _copying(x)
        # what takes a millisecond or less, a single disturbance hides
        more = 20 if x.numel() <= 1 << 18 else 5 if x.numel() <= 1 << 20 else 1
        times = cost.rounds(steps, repeats=more * repeats, device=place.device)
        # read and written once each way: x, y; and in the backward pass x, dy, dx. A copy reads one and writes one.
        times["floor"] = [value * (1.25 if training else 1) for value in times["floor"]]
        ratios = {name: _ratio(times["ours"], values) for name, values in times.items() if name != "ours"}
        kept = {name: cost.saved_bytes(module, x) for name, module in modules.items()} if training else {}
        spreads = {name: cost.Spread.of(values) for name, values in times.items()}
        yield Row(where, memory_format, "forward+backward" if training else "inference", spreads, ratios, kept)


def _on_network(
    op: str, network: str, memory_format: str, others: list[str], repeats: int, shape: tuple[int, ...], place: Place
) -> Row:
    torch.manual_seed(0)
    images = torch.randn(shape, device=place.device).contiguous(memory_format=FORMATS[memory_format])
    built = {"network alone": networks.create(network), "ours": networks.create(network)}
    attachment.attach(built["ours"], op, start="paper")
    if "timm" in others and (theirs := _theirs(op, network)) is not None:
        built["timm"] = theirs
    if "plain" in others:
        built["plain"] = _Plain(attachment.attach(networks.create(network), op, start="paper"))
    for one in built.values():
        one.to(place.device).to(memory_format=FORMATS[memory_format])
    steps = {name: _training_of(one, images, place) for name, one in built.items()}
    times = cost.rounds(steps, repeats=repeats, device=place.device)
    ratios = {name: _ratio(values, times["network alone"]) for name, values in times.items() if name != "network alone"}
    with place.mixed():
        kept = {name: cost.saved_bytes(one, images) for name, one in built.items()}
    spreads = {name: cost.Spread.of(values) for name, values in times.items()}
    return Row(f"{network}, {tuple(shape)}", memory_format, "training step", spreads, ratios, kept)


def _modules(op: str, channels: int, others: list[str]) -> dict[str, nn.Module]:
    """The candidates with the weights of one of them; ours first."""
    checks.extra("timm", "The benchmark")
    from timm.layers.cbam import CbamModule
    from timm.layers.squeeze_excite import SEModule

    ours: Any
    theirs: Any
    if op == "cbam":
        theirs, ours = CbamModule(channels), CBAM(channels, bias=False, norm_momentum=0.1)
        # a running variance of 1 says little of an inference
        nn.init.uniform_(theirs.spatial.conv.bn.running_var, 0.5, 2)
        nn.init.uniform_(theirs.spatial.conv.bn.running_mean, -1, 1)
        pairs = {"channel.fc1": "channel.fc1", "channel.fc2": "channel.fc2", "spatial.conv": "spatial.conv.conv"}
        ours.spatial.norm.load_state_dict(theirs.spatial.conv.bn.state_dict())
    else:
        theirs = SEModule(channels)
        ours, pairs = SqueezeExcite(channels, hidden=theirs.fc1.out_channels, bias=True), {"fc1": "fc1", "fc2": "fc2"}
    _copy_weights(theirs, ours, pairs)
    found: dict[str, Any] = {"ours": ours}
    if "timm" in others:
        found["timm"] = theirs
    if "torchvision" in others and op == "se":
        from torchvision.ops import SqueezeExcitation

        found["torchvision"] = SqueezeExcitation(channels, theirs.fc1.out_channels)
        found["torchvision"].load_state_dict(theirs.state_dict())
    if "compile" in others:
        from torch._inductor import config

        # in this process: those that it starts otherwise come up while the first map is measured
        config.compile_threads = 1
        found["compile"] = torch.compile(copy.deepcopy(theirs), fullgraph=True)
    if "plain" in others:
        found["plain"] = _Plain(copy.deepcopy(ours))
    return found


def _copy_weights(source: nn.Module, target: nn.Module, pairs: Mapping[str, str]) -> None:
    with torch.no_grad():
        for ours, theirs in pairs.items():
            for name, one in target.get_submodule(ours).named_parameters():
                one.copy_(source.get_submodule(theirs).get_parameter(name).view_as(one))


class _Plain(nn.Module):
    """A module in plain PyTorch, as it is without fused operators."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        """What the module makes of x."""
        with ops.use("reference"):
            return self.module(x)


def _theirs(op: str, network: str) -> nn.Module | None:
    """The same network of timm with timm's module, where timm builds one."""
    timm = checks.extra("timm", "The benchmark")
    name = network.removeprefix("timm:")
    if name not in timm.list_models():
        return None
    try:
        return timm.create_model(name, block_args={"attn_layer": op})  # type: ignore[no-any-return]
    except TypeError:
        return None


def _training(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(dy)

    return step


def _training_of(network: nn.Module, images: torch.Tensor, place: Place) -> Step:
    network.train()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with place.mixed():
            loss = network(images).float().square().mean()
        loss.backward()

    return step


def _inference(module: nn.Module, x: torch.Tensor, _: torch.Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def _copying(*maps: torch.Tensor) -> Step:
    """Copies of maps to new ones that are there at the same time, as a pass needs y and dx."""

    def step() -> None:
        copies = [one.detach().clone(memory_format=torch.preserve_format) for one in maps]
        del copies

    return step


def _agree(modules: Mapping[str, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> None:
    """Raise unless all candidates give the same output and the same gradient of the map."""
    found = {}
    for name, module in modules.items():
        buffers = {key: value.clone() for key, value in module.state_dict().items()}
        # convolutions in fewer bits are no disagreement
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = module(x)
            found[name] = (y.detach(), *torch.autograd.grad(y, x, dy))
        module.load_state_dict(buffers)
    for name, theirs in found.items():
        for one, other in zip(found["ours"], theirs, strict=True):
            # where two numbers are nearly the largest, the last bit decides which of them gets a gradient
            off = ~torch.isclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
            if int(off.sum()) > 1e-6 * off.numel():
                raise RuntimeError(f"bench: {name} computes something else than ours, so that times say nothing.")


def _ratio(one: list[float], other: list[float]) -> cost.Spread:
    return cost.Spread.of([a / b for a, b in zip(one, other, strict=True)])


def _machine(place: Place) -> dict[str, str]:
    timm = checks.extra("timm", "The benchmark")
    model = platform.processor() or platform.machine()
    if (known := Path("/proc/cpuinfo")).exists():
        lines = [line for line in known.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    found = {"processor": model, "threads": str(torch.get_num_threads())}
    if place.device.type == "cuda":
        import triton

        found |= {"device": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda), "triton": triton.__version__}
    else:
        found["large pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    return found | {
        "dtype": str(place.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "system": platform.platform(terse=True),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
    }


def _cells(row: Row, others: list[str]) -> list[str]:
    ours = row.milliseconds["ours"].median
    cells = [row.where, row.memory_format, row.what, f"{ours:.3f}" if ours < 1 else f"{ours:.1f}"]
    for name in (*others, "floor"):
        spread = row.ratios.get(name)
        cells.append("" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})")
    kept = row.kept_bytes
    cells.append(f"{kept['ours'] / kept['timm']:.2f}" if kept.get("timm") else "")
    return cells


def _network_cells(row: Row) -> list[str]:
    cells = [row.where, row.memory_format]
    alone = row.kept_bytes["network alone"]
    for name in ("ours", "timm", "plain"):
        spread = row.ratios.get(name)
        if spread is None:
            cells += ["", ""]
            continue
        cells.append(f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})")
        cells.append(f"{(row.kept_bytes[name] - alone) / 2**20:+.0f}")
    return cells


def tables(result: Result, against: list[str]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows of cells, the first row being the heads."""
    found = []
    heads = ["map", "channels", "what", "ours, ms"]
    heads += [f"over {name}" for name in against] + ["over the byte floor", "kept, over timm's"]
    found.append((f"{result.op} on maps", [heads, *(_cells(row, against) for row in result.maps)]))
    if result.networks:
        heads = ["network", "channels"]
        for name in ("ours", "timm's", "in plain PyTorch"):
            heads += [f"{name}, over the network alone", "MiB kept"]
        found.append((f"{result.op} in a network, training step", [heads, *map(_network_cells, result.networks)]))
    return found


def text(result: Result, against: list[str]) -> str:
    """The tables as text, columns under one another."""
    blocks = [f"{title}\n" + "\n".join(aligned(rows, "<" * len(rows[0]))) for title, rows in tables(result, against)]
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    return "\n\n".join([*blocks, f"{machine}\n{NOTE}"])


NOTE = (
    "Ratios are medians over rounds (quartiles): below 1 ours is faster. The byte floor is what this machine takes to "
    "copy maps of this size to new ones, per byte that any implementation has to read or write."
)


def markdown(result: Result, against: list[str]) -> str:
    """The same as Markdown."""
    blocks = []
    for title, (heads, *rows) in tables(result, against):
        lines = [heads, ["---"] * len(heads), *rows]
        blocks.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    return "\n\n".join([f"Measured with {machine}. {NOTE}", *blocks]) + "\n"


def save(result: Result, against: list[str], folder: str | Path) -> Path:
    """Write results.json, table.md and figure.svg into a folder that is made if need be."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise InvalidOption(f"bench: {place} is not a folder.")
    place.mkdir(parents=True, exist_ok=True)
    files.write(place / "results.json", json.dumps(asdict(result), indent=1) + "\n")
    files.write(place / "table.md", markdown(result, against))
    _draw(result, against, place / "figure.svg")
    return place


def _draw(result: Result, against: list[str], path: Path) -> None:
    """A point with its quartiles for each map and candidate, below 1 where ours is faster."""
    figure_module = checks.extra("matplotlib.figure", "the figure")
    rows = result.maps
    figure = figure_module.Figure(figsize=(9, 0.26 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate([*against, "floor"]):
        there = [(number, row.ratios[name]) for number, row in enumerate(rows) if name in row.ratios]
        if not there:
            continue
        medians = [spread.median for _, spread in there]
        errors = [[s.median - s.low for _, s in there], [s.high - s.median for _, s in there]]
        axes.errorbar(
            medians,
            [number + 0.1 * place for number, _ in there],
            xerr=errors,
            fmt="osD^v"[place % 5],
            markersize=4,
            linewidth=1,
            label="the byte floor" if name == "floor" else name,
        )
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row.where} {row.memory_format}, {row.what}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of {result.op} over that of others (left of 1: ours is faster)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.08), ncols=5, frameon=False, fontsize=8)
    figure.savefig(path)
