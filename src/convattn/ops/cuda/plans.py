"""Which kernels compute a forward or a backward pass, in what order, and where what lies that they hand on.

A plan is made once for each form of the maps and gates. Small results lie in two pieces of memory: one that is kept for
the backward pass and one that is not. To start kernels by what was compiled before takes a tenth of the time that
Triton takes to find it, which matters: a small map is computed faster than one kernel is found.
"""

import functools
import operator
from typing import Any, NamedTuple

import torch
import triton

Tensor = torch.Tensor
# enough for a GPU to be busy
PROGRAMS = 512
# positions that a program takes of a plane, and elements of what is not the map
PLANE, FLAT = 256, 1024
# samples and channels that a program takes of small maps (B, C), and hidden units and channels of an MLP's weights
BATCHES = {"BLOCK_B": 32, "BLOCK_C": 16}
WEIGHTS = {"BLOCK_H": 16, "BLOCK_C": 128}
PRODUCTS = {"BLOCK_H": 16, "BLOCK_C": 32, "BLOCK_B": 32}
# what a program takes of a map, with channels first, last, and last where there are few positions: elements, how many
# of them lie together, warps, stages of the loop and how often it is unrolled, or tiles one after the other; the
# fastest of sixteen on an H200
TILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pool": ((2048, 64, 4, 3, 1), (2048, 64, 4, 3, 1), (4096, 1024, 4, 3, 1)),
    "summarise": ((4096, 64, 4, 3, 1), (4096, 64, 4, 3, 1), (4096, 256, 4, 3, 1)),
    "apply": ((4096, 64, 4, 1), (4096, 64, 4, 1), (4096, 64, 4, 1)),
    "grad_gates": ((4096, 64, 4, 1, 1), (2048, 128, 4, 1, 1), (2048, 256, 4, 1, 1)),
    "grad_summary": ((2048, 64, 4, 3, 1), (4096, 64, 4, 3, 1), (4096, 1024, 4, 3, 1)),
    "grad_input": ((4096, 64, 4, 2), (4096, 64, 4, 1), (4096, 64, 4, 1)),
}
FEW = 512
ONCE = ("apply", "grad_input")
# Triton takes constants too when what was compiled is started
_PLACED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


class Form(NamedTuple):
    """All that a plan depends on."""

    batch: int
    channels: int
    positions: tuple[int, ...]
    last: bool
    device: Any
    # of each tensor from outside, by name; absent ones are left out
    kinds: tuple[tuple[str, torch.dtype], ...]
    # pools, activation, gate activation and hidden width
    mlp: tuple[tuple[str, ...], str, str, int] | None = None
    # sides, strides of planes and taps, whether in training, and eps
    window: tuple[tuple[int, ...], tuple[int, int], bool, float] | None = None
    parallel: bool = False
    # whether in training, and eps
    norm: tuple[bool, float] | None = None
    # momentum, how many values the moments are of, and whether the average of all is followed
    running: tuple[float, float, bool] | None = None


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
        self.count = 1
        for size in form.positions:
            self.count *= size
        self.steps: list[Step] = []
        self.places: dict[str, tuple[str, int, int, torch.dtype]] = {}
        self.sizes = {"kept": 0, "scratch": 0}
        self.compiled: list[Any] = []

    def has(self, *names: str) -> bool:
        """Whether there is something of each of these names."""
        return all(name in self.there or name in self.places for name in names)

    def hold(self, slab: str, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        """Have a place for a small result."""
        size = dtype.itemsize // 4
        for one in sizes:
            size *= one
        self.places[name] = (slab, self.sizes[slab], size, dtype)
        # each begins where vectors may
        self.sizes[slab] += -(-size // 64) * 64

    def step(self, name: str, grid: tuple[int, ...], tensors: str, *numbers: float, **constants: Any) -> None:
        """Add a kernel. A tensor that is absent is not read, so that another one stands in its place."""
        given = tuple(one if self.has(one) else "x" for one in tensors.split())
        self.steps.append(Step(name, grid, given, numbers, constants))

    def run(self, tensors: dict[str, Tensor], kernels: Any) -> None:
        """Start all kernels on the current device."""
        at = {name: one.data_ptr() for name, one in tensors.items()}
        aligned = not functools.reduce(operator.or_, at.values()) % 16
        if self.compiled and aligned:
            slabs = {"kept": at["kept"], "scratch": at["scratch"]}
            for name, (slab, offset, _, _) in self.places.items():
                at[name] = slabs[slab] + 4 * offset
            stream = torch._C._cuda_getCurrentRawStream(self.form.device)
            for compiled, grid, names, rest in self.compiled:
                pointers = [at[name] for name in names]
                how = (compiled.function, compiled.packed_metadata, None, None, None)
                compiled.run(*grid, stream, *how, *pointers, *rest)
            return
        for name, (slab, offset, size, dtype) in self.places.items():
            tensors[name] = tensors[slab][offset : offset + size].view(dtype)
        compiled = []
        for step in self.steps:
            kernel = getattr(kernels, step.name)
            given = [tensors[name] for name in step.tensors]
            found = kernel[step.grid](*given, *step.numbers, **step.constants)
            # in the order of the kernel's own parameters, without what is for the compiler
            rest = [step.constants[name] for name in kernel.arg_names if name in step.constants]
            compiled.append((found, (*step.grid, 1, 1)[:3], step.tensors, (*step.numbers, *rest)))
        if aligned and _PLACED and all(one[0] is not None for one in compiled):
            self.compiled = compiled

    def tile(self, name: str) -> dict[str, Any]:
        """Channels and positions that a program takes at once, and how it is built."""
        elements, together, warps, *loop = TILES[name][self.form.last * (1 if self.count >= FEW else 2)]
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
            steps = min(loop[0], max(1, self.count // block_n))
            full = full and self.count % (block_n * steps) == 0
            return found | {"STEPS": steps, "FULL": full}
        return found | {"STAGES": loop[0], "UNROLL": loop[1]}

    def blocks_c(self, tile: dict[str, int]) -> int:
        """Tiles along the channels."""
        return -(-self.form.channels // tile["BLOCK_C"])

    def blocks_n(self, tile: dict[str, int]) -> int:
        """Tiles along the positions, or groups of those that a program takes one after the other."""
        return -(-self.count // (tile["BLOCK_N"] * tile.get("STEPS", 1)))

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
    gated = plan.has("gate")
    norm = form.norm is not None
    if gated:
        _pool(plan)
        _mlp(plan)
    if form.window is not None:
        tile = plan.tile("summarise")
        grid: tuple[int, ...] = (plan.blocks_n(tile), form.batch)
        see = gated and not form.parallel
        plan.step("summarise", grid, "x gate factors planes", *plan.shape, NORM=norm, GATED=see, **tile)
        _window(plan)
    tile = plan.tile("apply")
    there = {"NORM": norm, "CHANNEL": gated, "SPATIAL": plan.has("spatial"), "SHORTCUT": plan.has("shortcut")}
    grid = (plan.blocks_n(tile), plan.blocks_c(tile), form.batch)
    plan.step("apply", grid, "x gate factors spatial shortcut y", *plan.shape, **there, **tile)
    return plan


@functools.lru_cache(maxsize=256)
def following(form: Form) -> Plan:
    """Running statistics after those of a batch."""
    plan = Plan(form)
    assert form.running is not None  # noqa: S101
    momentum, count, average = form.running
    plan.steps.append(
        Step(
            "follow",
            (1,),
            ("x", "var", "tracked", "moments"),
            (momentum, count, form.channels),
            {"AVERAGE": average, "BLOCK": 1024},
        )
    )
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
    """The gradient of that: of `pools` the maxima, of `given` the gradients of both."""
    plan = Plan(form)
    tile = plan.tile("grad_summary")
    parts = plan.shares(plan.blocks_n(tile), plan.blocks_c(tile))
    plan.hold("scratch", "counts", parts, form.batch, form.channels)
    _count(plan, tile, parts, summary=False)
    tile = plan.tile("grad_input")
    grid = (plan.blocks_n(tile), plan.blocks_c(tile), form.batch)
    names = ("GIVEN", "NORM", "THROUGH", "CHANNEL", "SPATIAL", "GATED", "POOLED", "MAX")
    there = {name: name in ("POOLED", "MAX") for name in names}
    plan.hold("scratch", "shared", 2, form.batch, form.channels)
    step = form.batch * form.channels
    plan.step("share", (-(-step // FLAT),), "given counts shared", step, plan.count, parts, BLOCK=FLAT)
    plan.step("grad_input", grid, "x x x x x x x x x x top shared dx", *plan.shape, **there, **tile)
    return plan


def _kept(plan: Plan) -> None:
    """The places of what is kept for the backward pass."""
    form = plan.form
    small = (form.batch, form.channels)
    if form.mlp is not None:
        pools, _, _, width = form.mlp
        plan.hold("kept", "pools", len(pools), *small)
        plan.hold("kept", "first_of_pools", len(pools), form.batch, width)
        plan.hold("kept", "hidden", form.batch, width)
        plan.hold("kept", "logits", *small)
        plan.hold("kept", "gate", *small)
    if form.norm is not None:
        plan.hold("kept", "affine", 4, form.channels)
        plan.hold("kept", "hat", *small)
        plan.hold("kept", "top", *small)
        plan.hold("kept", "factors", 2, *small)
    if form.window is not None:
        plan.hold("kept", "planes", 2, form.batch, plan.count)
        plan.hold("kept", "of_window", form.batch, plan.count)
        plan.hold("kept", "spatial", form.batch, plan.count)
        plan.hold("kept", "used", 2)


def _pools(form: Form) -> dict[str, int]:
    """Which poolings there are: how many, and whether they begin with the mean."""
    pools = form.mlp[0] if form.mlp else ("mean", "max")
    return {"FIRST": 0 if "mean" in pools else 1, "POOLS": len(pools)}


def _pool(plan: Plan) -> None:
    form, tile = plan.form, plan.tile("pool")
    parts = plan.shares(plan.blocks_n(tile), plan.blocks_c(tile))
    plan.hold("scratch", "parts", parts, 4 if form.norm else 2, form.batch, form.channels)
    grid: tuple[int, ...] = (plan.blocks_c(tile), parts, form.batch)
    plan.step("pool", grid, "x parts", *plan.shape, MOMENTS=form.norm is not None, **tile)
    if form.norm is None:
        grid = (-(-form.batch * form.channels // FLAT),)
        plan.step("pooled", grid, "parts pools", form.channels, form.batch, parts, **_pools(form), BLOCK_C=FLAT)
        return
    training, eps = form.norm
    there = {"TRAINING": training, "WEIGHT": plan.has("bn_weight"), "BIAS": plan.has("bn_bias")}
    grid = (-(-form.channels // BATCHES["BLOCK_C"]),)
    given = "x parts bn_mean bn_var bn_weight bn_bias affine bn_moments hat pools top"
    plan.step("normalise", grid, given, *plan.shape[:3], form.batch, parts, eps, **_pools(form), **there, **BATCHES)


def _mlp(plan: Plan) -> None:
    form = plan.form
    assert form.mlp is not None  # noqa: S101
    pools, activation, gate, width = form.mlp
    sizes = (form.channels, width)
    blocks_h, blocks_c = -(-width // WEIGHTS["BLOCK_H"]), -(-form.channels // WEIGHTS["BLOCK_C"])
    given = "pools first first_bias first_of_pools"
    grid = (blocks_h, len(pools) * form.batch)
    plan.step("mlp_first", grid, given, *sizes, BIAS=plan.has("first_bias"), **WEIGHTS)
    plan.step(
        "mlp_second",
        (blocks_c, form.batch),
        "first_of_pools second second_bias strength affine hidden logits gate factors",
        *sizes,
        POOLS=len(pools),
        ACTIVATION=activation,
        GATE=gate,
        BIAS=plan.has("second_bias"),
        STRENGTH=plan.has("strength"),
        NORM=form.norm is not None,
        **WEIGHTS,
    )


def _window(plan: Plan) -> None:
    form = plan.form
    assert form.window is not None  # noqa: S101
    sides, strides, training, eps = form.window
    blocks = -(-plan.count // PLANE)
    trained = training and plan.has("mean")
    if trained:
        plan.hold("scratch", "window_parts", form.batch * blocks, 2)
    given = "planes weight of_window window_parts"
    more = _sides(sides) | {"MOMENTS": trained, "BLOCK": PLANE}
    plan.step("convolve", (blocks, form.batch), given, *_plane(form), *strides, **more)
    plan.step(
        "gate",
        (-(-form.batch * plan.count // FLAT),),
        "of_window window_parts mean var norm_weight norm_bias strength spatial used moments",
        form.batch,
        plan.count,
        eps,
        NORM=plan.has("mean"),
        TRAINING=trained,
        WEIGHT=plan.has("norm_weight"),
        BIAS=plan.has("norm_bias"),
        STRENGTH=plan.has("strength"),
        OF_PARTS=PLANE,
        BLOCK=FLAT,
    )


def _plane(form: Form) -> tuple[int, ...]:
    """Depth, height and width: a sequence is a plane of one row."""
    return (1,) * (3 - len(form.positions)) + form.positions


def _sides(sides: tuple[int, ...]) -> dict[str, int]:
    deep, high, wide = (1,) * (3 - len(sides)) + sides
    return {"DEEP": deep, "HIGH": high, "WIDE": wide}


@functools.lru_cache(maxsize=256)
def backward(form: Form) -> Plan:
    """The gradients of the map and of all that the gates and a norm before them are made of."""
    plan = Plan(form)
    _kept(plan)
    gated, windowed, norm = plan.has("gate"), form.window is not None, form.norm is not None
    small = (form.batch, form.channels)
    see = gated and not form.parallel
    sums = 2 if norm else 1
    maximum = _pools(form)["FIRST"] + _pools(form)["POOLS"] == 2 and gated
    tile = plan.tile("grad_gates")
    blocks_c, blocks_n = plan.blocks_c(tile), plan.blocks_n(tile)
    along, groups = (blocks_n, blocks_c) if form.last else (blocks_n, plan.shares(blocks_c, blocks_n))
    if form.last:
        along = plan.shares(blocks_n, blocks_c)
    if gated:
        plan.hold("scratch", "by_channel", along, sums, *small)
    if windowed:
        plan.hold("scratch", "by_place", groups, form.batch, plan.count)
        plan.hold("scratch", "places", groups, form.batch, plan.count)
    there = {"NORM": norm, "CHANNEL": gated, "SPATIAL": windowed, "GATED": see, "COUNT": windowed}
    given = "x dy gate factors affine spatial planes_max by_channel by_place places"
    if windowed:
        _second(plan, "planes", "planes_max")
    grid = (along, groups, form.batch)
    plan.step("grad_gates", grid, given, *plan.shape, LAST=form.last, **there, **tile)
    if windowed:
        _grad_window(plan, groups)
    if gated:
        tile = plan.tile("grad_summary")
        others = plan.shares(plan.blocks_n(tile), plan.blocks_c(tile))
        summary = windowed and see
        if summary:
            plan.hold("scratch", "by_summary", others, sums, *small)
        if maximum:
            plan.hold("scratch", "counts", others, *small)
        if maximum and not norm:
            _second(plan, "pools", "top", first=_pools(form)["POOLS"] - 1)
        if summary or maximum:
            _count(plan, tile, others, summary=summary, count=maximum)
        _grad_mlp(plan, along, others, summary=summary, maximum=maximum)
    if plan.has("grad_weight") or plan.has("grad_strength"):
        _finish(plan)
    if plan.has("dx"):
        tile = plan.tile("grad_input")
        grid = (plan.blocks_n(tile), plan.blocks_c(tile), form.batch)
        there = {"GIVEN": True, "NORM": norm, "THROUGH": norm and form.norm is not None and form.norm[0]}
        there |= {"CHANNEL": gated, "SPATIAL": windowed, "GATED": see, "POOLED": gated, "MAX": maximum}
        given = "x dy gate factors affine times by_hat spatial planes_max dplanes top plus dx"
        plan.step("grad_input", grid, given, *plan.shape, **there, **tile)
    return plan


def _second(plan: Plan, of: str, name: str, first: int = 1) -> None:
    """A name for what comes behind the first of several maps in one place."""
    slab, offset, size, dtype = plan.places[of]
    half = size // 2 if first else 0
    plan.places[name] = (slab, offset + half, size - half, dtype)


def _count(plan: Plan, tile: dict[str, Any], parts: int, *, summary: bool, count: bool = True) -> None:
    norm = plan.form.norm is not None
    there = {"NORM": norm, "SUMMARY": summary, "COUNT": count}
    grid = (plan.blocks_c(tile), parts, plan.form.batch)
    given = "x gate factors affine planes_max dplanes top by_summary counts"
    plan.step("grad_summary", grid, given, *plan.shape, **there, **tile)


def _grad_window(plan: Plan, groups: int) -> None:
    form = plan.form
    assert form.window is not None  # noqa: S101
    sides, strides, training, eps = form.window
    count = -(-form.batch * plan.count // FLAT)
    plan.hold("scratch", "window_parts", count, 3, dtype=torch.float64)
    for name in ("behind", "dlogits_of_window"):
        plan.hold("scratch", name, form.batch, plan.count)
    plan.hold("scratch", "dplanes", 2, form.batch, plan.count)
    plan.hold("scratch", "strength_of_window", 1)
    there = {"NORM": plan.has("mean"), "WEIGHT": plan.has("norm_weight"), "STRENGTH": plan.has("strength")}
    given = "of_window by_place places used norm_weight norm_bias strength behind window_parts"
    more = {"BIAS": plan.has("norm_bias"), "BLOCK": FLAT}
    plan.step("grad_gate", (count,), given, form.batch, plan.count, groups, eps, **there, **more)
    given = "of_window behind window_parts used norm_weight weight places grad_norm_weight grad_norm_bias "
    given += "strength_of_window dlogits_of_window dplanes"
    more = {"TRAINING": training, "BLOCK": PLANE} | _sides(sides)
    for name in ("grad_norm_weight", "grad_norm_bias"):
        if not plan.has(name):
            plan.hold("scratch", name, 1)
    grid = (-(-plan.count // PLANE), form.batch)
    plan.step("grad_planes", grid, given, *_plane(form), *strides, form.channels, count, eps, **there, **more)
    rows, parts, across = _rows(form)
    plan.hold("scratch", "weight_parts", rows, parts, across)
    given = "planes dlogits_of_window weight_parts"
    more = _sides(sides) | {"ACROSS": across, "BLOCK": min(2 * PLANE, triton.next_power_of_2(plan.count))}
    plan.step("grad_weight", (rows, parts), given, form.batch, *_plane(form), **more)


def _grad_mlp(plan: Plan, shares: int, others: int, *, summary: bool, maximum: bool) -> None:
    form = plan.form
    assert form.mlp is not None  # noqa: S101
    pools, activation, gate, width = form.mlp
    small, norm = (form.batch, form.channels), form.norm is not None
    blocks = -(-form.batch * form.channels // FLAT)
    for name in ("number", "dlogits", "times"):
        plan.hold("scratch", name, *small)
    plan.hold("scratch", "sums", 2, *small)
    plan.hold("scratch", "plus", 2, *small)
    plan.hold("scratch", "dfirst", len(pools), form.batch, width)
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
        GATE=gate,
        NORM=norm,
        SUMMARY=summary,
        COUNT=maximum,
        STRENGTH=plan.has("strength"),
        BLOCK_C=FLAT,
    )
    sizes = (form.channels, width)
    blocks_h, blocks_c = -(-width // WEIGHTS["BLOCK_H"]), -(-form.channels // WEIGHTS["BLOCK_C"])
    more: dict[str, Any] = {"POOLS": len(pools), "ACTIVATION": activation} | WEIGHTS
    given = "dlogits second first_of_pools dfirst"
    plan.step("grad_mlp_second", (blocks_h, form.batch), given, *sizes, **more)
    more = {"SHARED": not norm} | _pools(form) | WEIGHTS
    given = "dfirst first number plus"
    plan.step("grad_mlp_first", (blocks_c, form.batch), given, form.channels, plan.count, width, **more)
    more = {"POOLS": len(pools), "BIAS_FIRST": plan.has("first_bias"), "BIAS_SECOND": plan.has("second_bias")}
    given = "dfirst pools dlogits hidden grad_first grad_first_bias grad_second grad_second_bias"
    grid: tuple[int, ...] = (-(-width // PRODUCTS["BLOCK_H"]), -(-form.channels // PRODUCTS["BLOCK_C"]))
    plan.step("grad_mlp_weights", grid, given, *sizes, form.batch, **more, **PRODUCTS)
    if form.norm is not None:
        there = {"TRAINING": form.norm[0], "WEIGHT": plan.has("bn_weight"), "BIAS": plan.has("bn_bias")}
        given = "gate affine hat top sums number plus times by_hat grad_bn_weight grad_bn_bias"
        grid = (-(-form.channels // BATCHES["BLOCK_C"]),)
        sizes = (form.channels, plan.count)
        plan.step("grad_norm", grid, given, *sizes, form.batch, MAX=maximum, **there, **BATCHES)


def _rows(form: Form) -> tuple[int, int, int]:
    """Rows of a window over both planes, into how many parts samples are shared out for each, and how long rows are."""
    if form.window is None:
        return 1, 1, 1
    sides = _sides(form.window[0])
    rows = 2 * sides["DEEP"] * sides["HIGH"]
    return rows, max(1, min(form.batch, 4 * PROGRAMS // rows)), triton.next_power_of_2(sides["WIDE"])


def _finish(plan: Plan) -> None:
    form = plan.form
    rows, parts, across = _rows(form)
    there = {"WINDOW": form.window is not None, "STRENGTH": plan.has("strength"), "BY_CHANNEL": plan.has("strengths")}
    wide = form.window[0][-1] if form.window is not None else 1
    more = {"WIDE": wide, "ACROSS": across, "OF_PARTS": triton.next_power_of_2(parts)}
    given = "weight_parts strengths strength_of_window grad_weight grad_strength"
    count = -(-form.batch * form.channels // FLAT)
    plan.step("finish", (rows,), given, parts, count, **there, **more)
