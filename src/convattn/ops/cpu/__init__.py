"""The kernels of `kernels.cpp` as `fused` asks for them."""

import functools
import math
from typing import Any

import torch

from convattn.ops import between
from convattn.ops.cpu import library
from convattn.ops.cpu.library import DTYPES, FEW, FEW_PRODUCTS
from convattn.ops.gates import Gates, Kept, Mlp, Norm, Normed, Window, shapes_kept

Tensor = torch.Tensor
Maybe = Any
# given in place of the weights of an MLP and of a window that are not there
_NO_WEIGHTS = (None, None, None, None)
_NO_NORM = (False, 0.0, None, None, None, None, None)


def why_not_for(x: Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    if library.WHY_NOT is not None:
        return library.WHY_NOT
    if not x.is_cpu:
        return f"it is for maps on the CPU, not on {x.device.type}"
    if x.dtype not in DTYPES.values():
        return f"it is for float32 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    elements = x.numel()
    if elements == 0:
        return "the map is empty"
    if elements >= 1 << 31 and max(x.shape[1], elements // (x.shape[0] * x.shape[1])) >= 1 << 31:
        return "places in the map are counted in 32 bits"
    return None


def takes_running(mean: Tensor, var: Tensor, tracked: Tensor, moments: Tensor) -> bool:
    """Whether `follow` serves these."""
    if library.WHY_NOT is not None or tracked.dtype is not torch.int64:
        return False
    for one in (mean, var, tracked):
        if type(one) is not Tensor or not one.is_cpu or one.is_inference() or one.is_neg():
            return False
    return _ready(mean) and _ready(var) and _ready(moments)


def follow(mean: Tensor, var: Tensor, tracked: Tensor, momentum: float | None, moments: Tensor, count: int) -> None:
    """Let running mean and variance follow those of so many values: see `backends.follow`."""
    call = library.FUNCTIONS["follow", torch.float32]
    call(mean.numel(), count, -1.0 if momentum is None else momentum, moments, mean, var, tracked)
    # whoever has kept one for a gradient is told that it has changed
    torch.autograd.graph.increment_version((mean, var, tracked))


class Kernels:
    """See `gates.Steps`."""

    def __init__(self, x: Tensor) -> None:
        self.batch, self.channels = x.shape[:2]
        self.positions = x.shape[2:]
        self.x, self.dtype = x, x.dtype
        self.shape = _sizes(x.shape, not x.is_contiguous(), torch.get_num_threads(), None, None)[0]
        # whether the last pass went through the map from its end: see `turn` in maps.h
        self.back = False
        # where a norm rides along, its four numbers for each channel
        self.norm: Maybe = None

    @staticmethod
    def follows(norm: Norm | Window | None) -> bool:
        """None does: `follow` is called for those."""
        return False

    def normalise(self, x: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        """Means and maxima over positions of the map behind a norm (2, B, C), and what is kept."""
        batch, channels, count = self.shape[:3]
        small = torch.empty((7, batch, channels))
        mean, squares, largest, least, hat, pooled, top = range(
            small.data_ptr(), small.data_ptr() + 28 * batch * channels, 4 * batch * channels
        )
        self._call("statistics", x, mean, squares, largest, least)
        running = [] if norm.training else [_small(norm.mean), _small(norm.var)]
        moments = torch.stack(running) if running else torch.empty((2, channels))
        affine = torch.empty((4, channels))
        weights = (_small(norm.weight), _small(norm.bias))
        statistics, found = (mean, squares, largest, least), (affine, moments, hat, pooled, top)
        call = library.FUNCTIONS["normalise", torch.float32]
        call(batch, channels, count, norm.training, norm.eps, *statistics, *weights, *found)
        kept = Normed(affine, moments, small[4])
        self.restore(kept)
        return small[5:], kept

    def restore(self, kept: Normed) -> None:
        """Let a norm ride along in all that follows."""
        self.norm = kept.affine

    def pool(self, x: Tensor, mean: bool, maximum: bool) -> Tensor:
        """Means and maxima over positions (pools, B, C)."""
        found = torch.empty((2, self.batch, self.channels), dtype=torch.float32)
        self._call("pool", x, found, found.data_ptr() + 4 * self.batch * self.channels if maximum else None)
        return found if mean and maximum else found[:1] if mean else found[1:]

    @classmethod
    def at_once(
        cls, x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe, norm: Norm | None
    ) -> tuple[Tensor, Maybe, Kept, None] | None:
        """See `gates.Kernels`."""
        if norm is not None:
            return None
        moments = None if gates.spatial is None else _moments(gates.spatial)
        shape, of_mlp, of_window, size = _given(x, gates, moments)
        if size is None:
            return None
        y, kept = torch.empty_like(x), torch.empty(size)
        if strength is not None:
            strength = _small(strength)
        library.FUNCTIONS["gated", x.dtype](*shape, x, shortcut, y, strength, gates.parallel, *of_mlp, *of_window, kept)
        return y, moments, Kept(together=kept), None

    @classmethod
    def grad_at_once(
        cls,
        x: Tensor,
        dy: Tensor,
        gates: Gates,
        strength: Maybe,
        kept: Kept,
        needs_map: bool,
        norm: Norm | None,
        normed: Normed | None,
    ) -> tuple[Maybe, Maybe, tuple[Maybe, ...]] | None:
        """See `gates.Kernels`."""
        mlp, window, parallel = gates
        if norm is not None or (parallel and mlp is not None and window is not None):
            return None
        shape, of_mlp, of_window, size = _given(x, gates, None)
        if size is None:
            return None
        by_mlp: tuple[Maybe, ...] = (None,) * 4
        by_window: tuple[Maybe, ...] = (None,) * 3
        if mlp is not None:
            by_mlp = tuple([None if one is None else torch.empty_like(one) for one in mlp[3:]])
        if window is not None:
            of_norm = [None if one is None else torch.empty(1) for one in window[1:3]]
            by_window = torch.empty(window.weight.shape), *of_norm
        dx = torch.empty_like(x) if needs_map else None
        dstrength = None
        if strength is not None:
            dstrength, strength = torch.empty(1), _small(strength)
        together = kept.together
        if together is None:
            together = torch.cat([one.flatten() for one in kept if one is not None])
        maps = (x, dy, dx, strength, dstrength)
        library.FUNCTIONS["grad_gated", x.dtype](*shape, *maps, *of_mlp, *of_window, together, *by_mlp, *by_window)
        return dx, dstrength, (*by_mlp, *by_window)

    def apart(self, kept: Kept, gates: Gates) -> Kept:
        """See `gates.Steps`."""
        mlp = gates.channel
        if kept.together is None:
            return kept
        pools, width = (0, 0) if mlp is None else (len(mlp.pools), len(mlp.first))
        shapes = shapes_kept((self.batch, self.channels, *self.positions), pools, width, gates.spatial is not None)
        pieces = zip(shapes, kept.together.split([math.prod(shape) for shape in shapes.values()]), strict=True)
        return Kept(**{name: piece.view(shapes[name]) for name, piece in pieces})

    def grad_pool(self, x: Tensor, pooled: Tensor, dpooled: Tensor) -> Tensor:
        """The gradient of the map by its means and maxima over positions (2, B, C)."""
        places, _ = self.grad_summary(x, None, (None,) * 4, pooled[1], None)
        return self.grad_input(x, None, None, None, (None,) * 4, (pooled[1], dpooled[0], dpooled[1], places))

    def mlp(self, mlp: Mlp, pooled: Tensor) -> tuple[Tensor, Kept]:
        """The channel gate (B, C) of poolings, and what is kept."""
        _, given, _, _ = _given(self.x, Gates(mlp, None), None)
        if given is None:
            return between.mlp(mlp, pooled)
        pools, width = given[:2]
        first, hidden = torch.empty((pools, self.batch, width)), torch.empty((self.batch, width))
        logits, gate = torch.empty((self.batch, self.channels)), torch.empty((self.batch, self.channels))
        call = library.FUNCTIONS["mlp", torch.float32]
        call(self.batch, self.channels, *given, pooled, first, hidden, logits, gate)
        return gate, Kept(pooled, first, hidden, logits)

    def grad_mlp(self, mlp: Mlp, kept: Kept, dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Gradients of the poolings, and of the weights and biases."""
        _, given, _, _ = _given(self.x, Gates(mlp, None), None)
        if given is None:
            return between.grad_mlp(mlp, kept, dgate)
        dpooled = torch.empty_like(kept.pooled)
        grads = tuple(None if one is None else torch.empty_like(one) for one in mlp[3:])
        call = library.FUNCTIONS["grad_mlp", torch.float32]
        call(self.batch, self.channels, *given, *kept[:4], dgate, dpooled, *grads)
        return dpooled, grads

    def summarise(self, x: Tensor, channel: Maybe) -> Tensor:
        """Means and maxima over channels (2, B, *spatial)."""
        found = torch.empty((2, self.batch, *self.positions), dtype=torch.float32)
        maxima = found.data_ptr() + 4 * self.batch * self.shape[2]
        self._call("summarise", x, self.norm, channel, found, maxima)
        return found

    def apply(self, x: Tensor, channel: Maybe, spatial: Maybe, shortcut: Maybe) -> Tensor:
        """The map times its gates; with a shortcut relu(that + shortcut)."""
        y = torch.empty_like(x)
        self._call("apply", x, self.norm, channel, spatial, shortcut, y)
        return y

    def grad_gates(
        self, x: Tensor, dy: Tensor, channel: Maybe, spatial: Maybe, maximum: Maybe, gated: bool
    ) -> tuple[Maybe, Maybe, Maybe]:
        """Gradients of the gates, and where the given maxima over channels are."""
        # behind a norm it is two sums
        sums = (2,) if self.norm is not None else ()
        dchannel = None if channel is None else torch.empty((*sums, *channel.shape))
        dspatial = None if spatial is None else torch.empty_like(spatial)
        places = None if maximum is None else torch.empty((2, *maximum.shape), dtype=torch.int32)
        self._call("grad_gates", x, dy, self.norm, channel, spatial, maximum, gated, dchannel, dspatial, places)
        return dchannel, dspatial, places

    def grad_summary(
        self, x: Tensor, channel: Maybe, summary: tuple[Maybe, ...], maximum: Maybe, dchannel: Maybe
    ) -> tuple[Maybe, Maybe]:
        """Add to the gradient of the channel gate what comes by the summary; where the maxima over positions are."""
        places = None if maximum is None else torch.empty((2, *maximum.shape), dtype=torch.int32)
        hats = None if maximum is None or self.norm is None else torch.empty(maximum.shape)
        self._call("grad_summary", x, self.norm, channel, *summary, maximum, dchannel, places, hats)
        return places, None if hats is None or places is None else hats.div_(places[1])

    def grad_input(
        self,
        x: Tensor,
        dy: Maybe,
        channel: Maybe,
        spatial: Maybe,
        summary: tuple[Maybe, ...],
        pools: tuple[Maybe, ...],
        through: Maybe = None,
    ) -> Tensor:
        """The gradient of the map."""
        dx = torch.empty_like(x)
        self._call("grad_input", x, dy, self.norm, through, channel, spatial, *summary, *pools, dx)
        return dx

    def window(self, planes: Tensor, window: Window, strength: Maybe) -> tuple[Tensor, Tensor, Maybe]:
        """The spatial gate, the logits behind the convolution, and their moments in training."""
        moments = _moments(window)
        _, _, given, _ = _given(self.x, Gates(None, window), moments)
        if given is None:
            return between.window(planes, window, strength)
        logits, gate = torch.empty(planes.shape[1:]), torch.empty(planes.shape[1:])
        library.FUNCTIONS["window", torch.float32](self.batch, *given, _small(strength), planes, logits, gate)
        return gate, logits, moments

    def grad_window(
        self, planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the planes, of the weight, and of norm weight, norm bias and strength together (3)."""
        _, _, given, _ = _given(self.x, Gates(None, window), None)
        if given is None:
            return between.grad_window(planes, window, strength, kept, dgate)
        dplanes, dweight, sums = torch.empty_like(planes), torch.empty(window.weight.shape), torch.empty(3)
        maps = (_small(strength), planes, kept.window, dgate, sums, dplanes, dweight)
        library.FUNCTIONS["grad_window", torch.float32](self.batch, *given, *maps)
        return dplanes, dweight, sums

    def _call(self, name: str, *arguments: Any) -> None:
        self.back = not self.back
        library.FUNCTIONS[name, self.dtype](*self.shape, self.back, *arguments)


def _given(x: Tensor, gates: Gates, moments: Maybe) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """What the kernels take of a map's shape, of an MLP and of a window, and how many numbers a whole pass keeps.

    None for an MLP or a window that they do not compute, and for a pass that they do not compute at once. Mean and
    variance of a norm are written where `moments` are.
    """
    mlp, window, _ = gates
    known = sides = None
    weights: Maybe = _NO_WEIGHTS
    norm: Maybe = _NO_NORM
    ready = True
    if mlp is not None:
        pools, activation, gate, *weights = mlp
        known = (pools, activation, gate, weights[0].shape[0])
        for one in weights:
            ready = ready and (one is None or _ready(one))
    if window is not None:
        sides = window.weight.shape
        norm = window.training, window.eps, *map(_small, window[:5])
        if moments is not None:
            norm = *norm[:5], moments, moments.data_ptr() + 4
    shape, of_mlp, of_window, size = _sizes(x.shape, not x.is_contiguous(), torch.get_num_threads(), known, sides)
    return (
        shape,
        (*of_mlp, *weights) if of_mlp and ready else None,
        (*of_window, *norm) if of_window else None,
        size if ready else None,
    )


@functools.lru_cache(maxsize=1024)
def _sizes(
    shape: torch.Size,
    last: bool,
    threads: int,
    mlp: tuple[tuple[str, ...], str, str, int] | None,
    window: torch.Size | None,
) -> tuple[Maybe, Maybe, Maybe, int | None]:
    """What of that depends on sizes alone: an MLP is (pools, activation, gate, hidden width), a window its weight's."""
    batch, channels, *positions = shape
    count = math.prod(positions)
    of_mlp: Maybe = (0, 0, 1)
    of_window: Maybe = (0, 0, 0, 0, 1)
    size, whole = 0, True

    def threads_for(work: int) -> int:
        return 1 if work < FEW else threads

    if mlp is not None:
        pools, activation, gate, width = mlp
        products = width * len(pools) * batch * channels
        of_mlp = (len(pools), width, threads_for(products))
        size += batch * (channels * (len(pools) + 2) + width * (len(pools) + 1))
        whole = "mean" in pools
        if products > FEW_PRODUCTS or activation != "relu" or gate != "sigmoid":
            of_mlp = None
    if window is not None:
        # a sequence is a plane of one row
        rows, of_rows = (1,) * (2 - len(positions)), (1,) * (4 - len(window))
        of_window = (*rows, *positions, *of_rows, *window[2:], threads_for(batch * count * math.prod(window) // 16))
        size += 4 * batch * count
        if len(positions) > 2:
            of_window = None
    of_map = (batch, channels, count, last, threads_for(batch * channels * count))
    return of_map, of_mlp, of_window, size if whole and of_mlp and of_window else None


def _moments(window: Window) -> Maybe:
    """Where mean and variance of the logits are written to; None where they are not computed."""
    return torch.empty(2) if window.training and window.mean is not None else None


def _small(one: Maybe) -> Any:
    """A small tensor as the kernels read it: float32, in one piece."""
    return one if one is None or _ready(one) else one.to(torch.float32).contiguous()


def _ready(one: Tensor) -> bool:
    return one.dtype is torch.float32 and one.is_contiguous()
