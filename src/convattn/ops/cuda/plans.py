"""Which kernels compute a forward or a backward pass, in what order, and where what lies that they hand on.

A plan is made once for each form of the maps and gates. Small results lie in two pieces of memory: one that is kept for
the backward pass and one that is not. To start kernels by what was compiled before takes a tenth of the time that
Triton takes to find it, which matters: a small map is computed faster than one kernel is found.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import torch
import triton

Tensor = torch.Tensor
# enough for a GPU to be busy
PROGRAMS = 512
# positions that a program takes of a plane, at most so many of a row, and elements of what is not the map, fewer where
# it sums up parts of them
PLANE, COLUMNS, FLAT, SUMMED = 256, 64, 1024, 256
# samples, at most, and channels that a program takes of small maps (B, C)
BATCHES, FEW_CHANNELS = 128, 8
# samples, hidden units and channels that a program takes of an MLP: where channels are summed over, where units are,
# and where samples are
OVER_CHANNELS = {"BLOCK_B": 16, "BLOCK_H": 16, "BLOCK_C": 128}
OVER_UNITS = {"BLOCK_B": 16, "BLOCK_H": 16, "BLOCK_C": 64}
OVER_SAMPLES = {"BLOCK_B": 64, "BLOCK_H": 16, "BLOCK_C": 16, "num_warps": 2}
# what a program takes of a map, with channels first, last, and last where there are few positions: elements, how many
# of them lie together, warps, and stages of the loop or tiles one after the other; the fastest on an H200 in bfloat16,
# of 17 for (256, 256, 56, 56), with channels last also of some thirty for the maps of a ResNet-50 behind their norms
TILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pool": ((2048, 64, 4, 3), (1024, 64, 2, 4), (2048, 512, 2, 3)),
    "summarise": ((512, 64, 1, 3), (2048, 64, 2, 3), (1024, 64, 2, 4)),
    "apply": ((2048, 64, 4, 1), (2048, 128, 4, 1), (4096, 64, 4, 1)),
    "grad_gates": ((2048, 64, 2, 3), (1024, 64, 2, 3), (2048, 1024, 2, 3)),
    "grad_summary": ((1024, 64, 1, 3), (2048, 512, 2, 3), (2048, 1024, 2, 3)),
    "grad_input": ((8192, 128, 8, 1), (4096, 64, 4, 1), (4096, 64, 4, 1)),
}
FEW = 512
ONCE = ("apply", "grad_input")
# Triton takes constants too when what was compiled is started
_PLACED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


class Mlp(NamedTuple):
    """The form of a channel gate."""

    pools: tuple[str, ...]
    activation: str
    gate: str
    width: int


class Window(NamedTuple):
    """The form of a spatial gate."""

    sides: tuple[int, ...]
    # of the two planes and of the taps of a plane
    strides: tuple[int, int]
    # whether there is a norm between the logits and the gate
    normed: bool
    training: bool
    eps: float
    momentum: float

    @property
    def extent(self) -> dict[str, int]:
        """The three sides by name."""
        return dict(zip(("DEEP", "HIGH", "WIDE"), (1,) * (3 - len(self.sides)) + self.sides, strict=True))


class Norm(NamedTuple):
    """The form of a norm before the gates."""

    training: bool
    eps: float
    momentum: float


class Form(NamedTuple):
    """All that a plan depends on."""

    batch: int
    channels: int
    positions: tuple[int, ...]
    last: bool
    device: Any
    # of each tensor from outside, by name; absent ones are left out
    kinds: tuple[tuple[str, torch.dtype], ...]
    mlp: Mlp | None = None
    window: Window | None = None
    parallel: bool = False
    norm: Norm | None = None

    @property
    def pools(self) -> dict[str, int]:
        """Which poolings there are: whether they begin with the mean, and how many."""
        pools = self.mlp.pools if self.mlp else ("mean", "max")
        return {"FIRST": 0 if "mean" in pools else 1, "POOLS": len(pools)}

    @property
    def plane(self) -> tuple[int, ...]:
        """Depth, height and width: a sequence is a plane of one row."""
        return (1,) * (3 - len(self.positions)) + self.positions


class Step(NamedTuple):
    """A kernel, how many programs of it, and what it is given."""

    name: str
    grid: tuple[int, ...]
    tensors: tuple[str, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]


class Plan:
    """Steps, and the places of what lies in pieces of memory, by name."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.there = dict(form.kinds)
        self.count = math.prod(form.positions)
        self.steps: list[Step] = []
        self.places: dict[str, tuple[str, int, int, torch.dtype]] = {}
        self.sizes = {"kept": 0, "scratch": 0}
        self.compiled: list[Any] = []

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return name in self.there or name in self.places

    def hold(self, slab: str, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        """Have a place for a small result."""
        size = math.prod(sizes) * dtype.itemsize // 4
        self.places[name] = (slab, self.sizes[slab], size, dtype)
        # each begins where vectors may
        self.sizes[slab] += -(-size // 64) * 64

    def part(self, name: str, of: str, number: int, count: int) -> None:
        """Have a name for one of several results that lie together."""
        slab, offset, size, dtype = self.places[of]
        self.places[name] = (slab, offset + number * size // count, size // count, dtype)

    def step(self, name: str, grid: tuple[int, ...], tensors: str, *numbers: float, **constants: Any) -> None:
        """Add a kernel. A tensor that is absent is not read, so that another one stands in its place."""
        given = tuple(one if self.has(one) else "x" for one in tensors.split())
        self.steps.append(Step(name, grid, given, numbers, constants))

    def run(self, tensors: dict[str, Tensor], kernels: Any) -> None:
        """Start all kernels on the current device. The tensors come in the same order each time."""
        at = [one.data_ptr() for one in tensors.values()]
        aligned = not functools.reduce(operator.or_, at) % 16
        if self.compiled and aligned:
            stream = torch._C._cuda_getCurrentRawStream(self.form.device)
            for start, grid, how, places, rest in self.compiled:
                start(*grid, stream, *how, *[at[number] + offset for number, offset in places], *rest)
            return
        order = {name: number for number, name in enumerate(tensors)}
        places = {name: (number, 0) for name, number in order.items()}
        for name, (slab, offset, size, dtype) in self.places.items():
            tensors[name] = tensors[slab][offset : offset + size].view(dtype)
            places[name] = (order[slab], 4 * offset)
        compiled = []
        for step in self.steps:
            kernel = getattr(kernels, step.name)
            given = [tensors[name] for name in step.tensors]
            found = kernel[step.grid](*given, *step.numbers, **step.constants)
            # in the order of the kernel's own parameters, without what is for the compiler
            rest = [step.constants[name] for name in kernel.arg_names if name in step.constants]
            compiled.append((found, (*step.grid, 1, 1)[:3], [places[name] for name in step.tensors], rest))
        if aligned and _PLACED and all(one[0] is not None for one in compiled):
            self.compiled = [
                (one.run, grid, (one.function, one.packed_metadata, None, None, None), of, (*step.numbers, *rest))
                for step, (one, grid, of, rest) in zip(self.steps, compiled, strict=True)
            ]

    def tile(self, name: str) -> dict[str, Any]:
        """Channels and positions that a program takes at once, and how it is built."""
        elements, together, warps, loop = TILES[name][self.form.last * (1 if self.count >= FEW else 2)]
        along, across = self.form.channels, self.count
        if not self.form.last:
            along, across = across, along
        together = min(together, triton.next_power_of_2(along))
        other = min(elements // together, triton.next_power_of_2(across))
        block_c, block_n = (together, other) if self.form.last else (other, together)
        full = self.form.channels % block_c == 0 and self.count % block_n == 0
        found: dict[str, Any] = {"FULL": full, "LONG": self.form.channels * self.count >= 1 << 31}
        found |= {"BLOCK_C": block_c, "BLOCK_N": block_n, "num_warps": warps}
        if name in ONCE:
            steps = min(loop, max(1, self.count // block_n))
            full = full and self.count % (block_n * steps) == 0
            return found | {"STEPS": steps, "FULL": full}
        return found | {"STAGES": loop}

    def blocks_c(self, tile: dict[str, int]) -> int:
        """Tiles along the channels."""
        return -(-self.form.channels // tile["BLOCK_C"])

    def blocks_n(self, tile: dict[str, int]) -> int:
        """Tiles along the positions, or groups of those that a program takes one after the other."""
        return -(-self.count // (tile["BLOCK_N"] * tile.get("STEPS", 1)))

    def every(self, tile: dict[str, int]) -> tuple[int, int, int]:
        """Programs for all tiles of the map."""
        return self.blocks_n(tile), self.blocks_c(tile), self.form.batch

    def shares(self, blocks: int, programs: int) -> int:
        """Into how many parts so many tiles are shared out, where there are programs for each part otherwise."""
        return min(blocks, -(-PROGRAMS // (self.form.batch * programs)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, positions, and the strides of both."""
        channels, count = self.form.channels, self.count
        return channels, count, *((1, channels) if self.form.last else (count, 1))


@functools.lru_cache(maxsize=256)
def forward(form: Form) -> Plan:
    """The gated map, and what is kept."""
    plan = Plan(form)
    _kept(plan)
    norm, gated = form.norm is not None, form.mlp is not None
    if form.mlp is not None:
        _pool(plan)
        _mlp(plan, form.mlp)
    if form.window is not None:
        tile = plan.tile("summarise")
        see = gated and not form.parallel
        grid = (plan.blocks_n(tile), form.batch)
        plan.step("summarise", grid, "x gate factors planes", *plan.shape, NORM=norm, GATED=see, **tile)
        _window(plan, form.window)
    tile = plan.tile("apply")
    there = {"NORM": norm, "CHANNEL": gated, "SPATIAL": plan.has("spatial"), "SHORTCUT": plan.has("shortcut")}
    plan.step("apply", plan.every(tile), "x gate factors spatial shortcut y", *plan.shape, **there, **tile)
    return plan


@functools.lru_cache(maxsize=256)
def backward(form: Form) -> Plan:
    """The gradients of the map and of all that the gates and a norm before them are made of."""
    plan = Plan(form)
    _kept(plan)
    see = form.mlp is not None and not form.parallel
    tile = plan.tile("grad_gates")
    blocks_c, blocks_n = plan.blocks_c(tile), plan.blocks_n(tile)
    # what lies together in memory is not shared out
    parts = plan.shares(blocks_n, blocks_c) if form.last else blocks_n
    groups = blocks_c if form.last else plan.shares(blocks_c, blocks_n)
    _grad_gates(plan, tile, parts, groups, see=see)
    if form.window is not None:
        _grad_window(plan, form.window, groups)
    if form.mlp is not None:
        _grad_mlp(plan, form.mlp, parts, see=see)
    if form.window is not None or plan.has("strength"):
        _finish(plan)
    if plan.has("dx"):
        _grad_input(plan, given=True, see=see)
    return plan


@functools.lru_cache(maxsize=64)
def pooling(form: Form) -> Plan:
    """Means and maxima over positions."""
    plan = Plan(form)
    plan.hold("kept", "pools", 2, form.batch, form.channels)
    _pool(plan)
    return plan


@functools.lru_cache(maxsize=64)
def grad_pooling(form: Form) -> Plan:
    """The gradient of that, from the maxima in `top` and the gradients of both in `dpools`."""
    plan = Plan(form)
    parts = _grad_summary(plan, summary=False, maximum=True)
    plan.hold("scratch", "plus", 2, form.batch, form.channels)
    elements = form.batch * form.channels
    plan.step("share", (-(-elements // FLAT),), "dpools counts plus", elements, plan.count, parts, BLOCK=FLAT)
    _grad_input(plan, given=False, see=False)
    return plan


def _kept(plan: Plan) -> None:
    """The places of what is kept for the backward pass."""
    form = plan.form
    small = (form.batch, form.channels)
    if form.mlp is not None:
        pools, width = form.pools["POOLS"], form.mlp.width
        plan.hold("kept", "pools", pools, *small)
        plan.hold("kept", "first_of_pools", pools, form.batch, width)
        plan.hold("kept", "hidden", form.batch, width)
        plan.hold("kept", "logits", *small)
        plan.hold("kept", "gate", *small)
        if form.norm is None:
            plan.part("top", "pools", pools - 1, pools)
    if form.norm is not None:
        plan.hold("kept", "affine", 4, form.channels)
        plan.hold("kept", "hat", *small)
        plan.hold("kept", "top", *small)
        plan.hold("kept", "factors", 2, *small)
    if form.window is not None:
        plan.hold("kept", "planes", 2, form.batch, plan.count)
        plan.part("maxima", "planes", 1, 2)
        plan.hold("kept", "of_window", form.batch, plan.count)
        plan.hold("kept", "spatial", form.batch, plan.count)
        plan.hold("kept", "used", 2)


def _pool(plan: Plan) -> None:
    form, tile = plan.form, plan.tile("pool")
    parts = plan.shares(plan.blocks_n(tile), plan.blocks_c(tile))
    plan.hold("scratch", "parts", parts, 4 if form.norm else 2, form.batch, form.channels)
    grid = (plan.blocks_c(tile), parts, form.batch)
    plan.step("pool", grid, "x parts", *plan.shape, MOMENTS=form.norm is not None, **tile)
    if form.norm is None:
        blocks = -(-form.batch * form.channels // FLAT)
        plan.step("pooled", (blocks,), "parts pools", form.channels, form.batch, parts, **form.pools, BLOCK_C=FLAT)
        return
    training, eps, momentum = form.norm
    there = {"TRAINING": training, "FOLLOW": plan.has("bn_tracked")}
    there |= {"WEIGHT": plan.has("bn_weight"), "BIAS": plan.has("bn_bias")}
    tile = _tile_of_batch(form)
    blocks = -(-form.channels // tile["BLOCK_C"])
    given = "x parts bn_mean bn_var bn_tracked bn_weight bn_bias affine bn_moments hat pools top"
    numbers = (*plan.shape[:3], form.batch, parts, eps, momentum)
    plan.step("normalise", (blocks,), given, *numbers, **form.pools, **there, **tile)


def _tile_of_batch(form: Form) -> dict[str, int]:
    """How many samples and channels of small maps a program takes that goes through all samples."""
    return {"BLOCK_B": min(BATCHES, triton.next_power_of_2(form.batch)), "BLOCK_C": FEW_CHANNELS}


def _mlp(plan: Plan, mlp: Mlp) -> None:
    form = plan.form
    pools = len(mlp.pools)
    rows = pools * form.batch
    given = "pools first first_bias first_of_pools"
    there = {"BIAS": plan.has("first_bias")}
    grid = _grid(OVER_CHANNELS, "BLOCK_H", mlp.width, rows)
    plan.step("mlp_first", grid, given, form.channels, mlp.width, rows, **there, **OVER_CHANNELS, num_warps=2)
    plan.step(
        "mlp_second",
        _grid(OVER_UNITS, "BLOCK_C", form.channels, form.batch),
        "first_of_pools second second_bias strength affine hidden logits gate factors",
        form.channels,
        mlp.width,
        form.batch,
        POOLS=pools,
        ACTIVATION=mlp.activation,
        GATE=mlp.gate,
        BIAS=plan.has("second_bias"),
        STRENGTH=plan.has("strength"),
        NORM=form.norm is not None,
        **OVER_UNITS,
    )


def _grid(tile: dict[str, int], side: str, count: int, rows: int) -> tuple[int, int]:
    """Programs for so many units or channels and rows of an MLP."""
    return -(-count // tile[side]), -(-rows // tile["BLOCK_B"])


def _window(plan: Plan, window: Window) -> None:
    form, tile = plan.form, _tile_of_plane(plan.form)
    blocks = _tiles_of_plane(form)
    trained = window.training and window.normed
    if trained:
        plan.hold("scratch", "window_parts", form.batch * blocks, 3)
    given = "planes weight of_window window_parts"
    grid = (blocks, form.batch)
    there = {"MOMENTS": trained} | window.extent | tile
    plan.step("convolve", grid, given, *form.plane, *window.strides, **there, num_warps=2)
    plan.step(
        "gate",
        (-(-form.batch * plan.count // FLAT),),
        "of_window window_parts mean var tracked norm_weight norm_bias strength spatial used moments",
        form.batch,
        plan.count,
        form.batch * blocks,
        window.eps,
        window.momentum,
        NORM=window.normed,
        TRAINING=trained,
        FOLLOW=plan.has("tracked"),
        WEIGHT=plan.has("norm_weight"),
        BIAS=plan.has("norm_bias"),
        STRENGTH=plan.has("strength"),
        BLOCK=FLAT,
    )


def _tile_of_plane(form: Form) -> dict[str, int]:
    """How many columns and places a program takes of a plane."""
    columns = min(COLUMNS, triton.next_power_of_2(form.plane[2]))
    rows = min(PLANE // columns, triton.next_power_of_2(form.plane[0] * form.plane[1]))
    return {"COLS": columns, "BLOCK": columns * rows}


def _tiles_of_plane(form: Form) -> int:
    deep, height, width = form.plane
    tile = _tile_of_plane(form)
    return -(-deep * height // (tile["BLOCK"] // tile["COLS"])) * -(-width // tile["COLS"])


def _lines(form: Form) -> tuple[int, int, int]:
    """Lines of a window, into how many parts tiles are shared out for each, and how long lines are."""
    if form.window is None:
        return 1, 1, 1
    extent = form.window.extent
    lines = extent["DEEP"] * extent["HIGH"]
    parts = max(1, min(form.batch * _tiles_of_plane(form), PROGRAMS, 4 * PROGRAMS // lines))
    return lines, parts, triton.next_power_of_2(extent["WIDE"])


def _grad_gates(plan: Plan, tile: dict[str, Any], parts: int, groups: int, *, see: bool) -> None:
    form = plan.form
    norm, gated, windowed = form.norm is not None, form.mlp is not None, form.window is not None
    if gated:
        plan.hold("scratch", "by_channel", parts, 2 if norm else 1, form.batch, form.channels)
    if windowed:
        plan.hold("scratch", "by_place", groups, form.batch, plan.count)
        plan.hold("scratch", "places", groups, form.batch, plan.count)
    there = {"NORM": norm, "CHANNEL": gated, "SPATIAL": windowed, "GATED": see, "COUNT": windowed}
    given = "x dy gate factors affine spatial maxima by_channel by_place places"
    plan.step("grad_gates", (parts, groups, form.batch), given, *plan.shape, LAST=form.last, **there, **tile)


def _grad_window(plan: Plan, window: Window, groups: int) -> None:
    form = plan.form
    count = -(-form.batch * plan.count // FLAT)
    plan.hold("scratch", "window_parts", count, 3, dtype=torch.float64)
    for name in ("behind", "dlogits_of_window"):
        plan.hold("scratch", name, form.batch, plan.count)
    plan.hold("scratch", "dplanes", 2, form.batch, plan.count)
    plan.hold("scratch", "strength_of_window", 1)
    for name in ("grad_norm_weight", "grad_norm_bias"):
        if not plan.has(name):
            plan.hold("scratch", name, 1)
    there = {"NORM": window.normed, "WEIGHT": plan.has("norm_weight"), "STRENGTH": plan.has("strength")}
    given = "of_window by_place places used norm_weight norm_bias strength behind window_parts"
    more = {"BIAS": plan.has("norm_bias"), "BLOCK": FLAT}
    plan.step("grad_gate", (count,), given, form.batch, plan.count, groups, window.eps, **there, **more)
    given = "of_window behind window_parts used norm_weight weight places grad_norm_weight grad_norm_bias "
    given += "strength_of_window dlogits_of_window dplanes"
    tile, grid = _tile_of_plane(form), (_tiles_of_plane(form), form.batch)
    numbers = (*form.plane, *window.strides, form.channels, count, window.eps)
    plan.step("grad_planes", grid, given, *numbers, TRAINING=window.training, **there, **window.extent, **tile)
    lines, parts, across = _lines(form)
    plan.hold("scratch", "weight_parts", 2, lines, parts, across)
    given = "planes dlogits_of_window weight_parts"
    numbers = (form.batch, *form.plane)
    plan.step("grad_weight", (lines, parts), given, *numbers, ACROSS=across, **window.extent, **tile, num_warps=2)


def _grad_summary(plan: Plan, *, summary: bool, maximum: bool) -> int:
    """What comes by the summary, and how often maxima are there; in how many parts."""
    form, tile = plan.form, plan.tile("grad_summary")
    norm = form.norm is not None
    parts = plan.shares(plan.blocks_n(tile), plan.blocks_c(tile))
    if summary:
        plan.hold("scratch", "by_summary", parts, 2 if norm else 1, form.batch, form.channels)
    if maximum:
        plan.hold("scratch", "counts", parts, form.batch, form.channels)
    if summary or maximum:
        there = {"NORM": norm, "SUMMARY": summary, "COUNT": maximum}
        given = "x gate factors affine maxima dplanes top by_summary counts"
        grid = (plan.blocks_c(tile), parts, form.batch)
        plan.step("grad_summary", grid, given, *plan.shape, **there, **tile)
    return parts


def _grad_mlp(plan: Plan, mlp: Mlp, shares: int, *, see: bool) -> None:
    form = plan.form
    small, norm = (form.batch, form.channels), form.norm is not None
    summary, maximum = see and form.window is not None, "max" in mlp.pools
    others = _grad_summary(plan, summary=summary, maximum=maximum)
    blocks, pools = _blocks_of_sums(form), len(mlp.pools)
    for name in ("number", "dlogits", "times"):
        plan.hold("scratch", name, *small)
    plan.hold("scratch", "sums", 2, *small)
    plan.hold("scratch", "plus", 2, *small)
    plan.hold("scratch", "dfirst", pools, form.batch, mlp.width)
    plan.hold("scratch", "by_hat", form.channels)
    plan.hold("scratch", "strengths", blocks, dtype=torch.float64)
    plan.step(
        "grad_logits",
        (blocks,),
        "by_channel by_summary counts logits strength affine sums number dlogits strengths",
        form.channels,
        plan.count,
        form.batch,
        shares,
        others,
        GATE=mlp.gate,
        NORM=norm,
        SUMMARY=summary,
        COUNT=maximum,
        STRENGTH=plan.has("strength"),
        BLOCK_C=SUMMED,
    )
    sizes = (form.channels, mlp.width, form.batch)
    more: dict[str, Any] = {"POOLS": pools, "ACTIVATION": mlp.activation} | OVER_CHANNELS
    grid = _grid(OVER_CHANNELS, "BLOCK_H", mlp.width, form.batch)
    plan.step("grad_mlp_second", grid, "dlogits second first_of_pools dfirst", *sizes, **more)
    more = {"SHARED": not norm} | form.pools | OVER_UNITS
    given = "dfirst first number plus"
    grid = _grid(OVER_UNITS, "BLOCK_C", form.channels, form.batch)
    plan.step("grad_mlp_first", grid, given, form.channels, plan.count, mlp.width, form.batch, **more)
    more = {"POOLS": pools, "BIAS_FIRST": plan.has("first_bias"), "BIAS_SECOND": plan.has("second_bias")}
    given = "dfirst pools dlogits hidden grad_first grad_first_bias grad_second grad_second_bias"
    grid = (-(-mlp.width // OVER_SAMPLES["BLOCK_H"]), -(-form.channels // OVER_SAMPLES["BLOCK_C"]))
    plan.step("grad_mlp_weights", grid, given, *sizes, **more, **OVER_SAMPLES)
    if form.norm is not None:
        there = {"TRAINING": form.norm.training, "WEIGHT": plan.has("bn_weight"), "BIAS": plan.has("bn_bias")}
        given = "gate affine hat top sums number plus times by_hat grad_bn_weight grad_bn_bias"
        tile = _tile_of_batch(form)
        blocks = -(-form.channels // tile["BLOCK_C"])
        numbers = (form.channels, plan.count, form.batch)
        plan.step("grad_norm", (blocks,), given, *numbers, MAX=maximum, **there, **tile)


def _blocks_of_sums(form: Form) -> int:
    return -(-form.batch * form.channels // SUMMED)


def _grad_input(plan: Plan, *, given: bool, see: bool) -> None:
    form, tile = plan.form, plan.tile("grad_input")
    pools = form.pools
    there = {
        "GIVEN": given,
        "NORM": form.norm is not None,
        "THROUGH": form.norm is not None and form.norm.training,
        "CHANNEL": form.mlp is not None,
        "SPATIAL": form.window is not None,
        "GATED": see,
        "POOLED": plan.has("plus"),
        "MAX": plan.has("plus") and pools["FIRST"] + pools["POOLS"] == 2,
    }
    tensors = "x dy gate factors affine times by_hat spatial maxima dplanes top plus dx"
    plan.step("grad_input", plan.every(tile), tensors, *plan.shape, **there, **tile)


def _finish(plan: Plan) -> None:
    form = plan.form
    lines, parts, across = _lines(form)
    there = {"WINDOW": form.window is not None, "STRENGTH": plan.has("strength"), "BY_CHANNEL": plan.has("strengths")}
    wide = form.window.sides[-1] if form.window is not None else 1
    more = {"WIDE": wide, "ACROSS": across, "OF_PARTS": triton.next_power_of_2(parts)}
    given = "weight_parts strengths strength_of_window grad_weight grad_strength"
    plan.step("finish", (2 * lines,), given, parts, _blocks_of_sums(form), **there, **more)
