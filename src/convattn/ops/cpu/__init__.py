"""The kernels of `kernels.cpp` as `fused` asks for them."""

from typing import Any

import torch

from convattn.ops import between
from convattn.ops.cpu.library import FEW_PRODUCTS, SUFFIXES, loaded, threads_for, why_not
from convattn.ops.gates import Gates, Kept, Mlp, Norm, Normed, Window, shapes_kept

Tensor = torch.Tensor
Maybe = Any
# what a pass is given in place of an MLP or a window that is not there
_NO_MLP = (0, 0, 1, None, None, None, None)
_NO_WINDOW = (0, 0, 0, 0, 1, False, 0.0, None, None, None, None, None)


def why_not_for(x: Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    missing = why_not()
    if missing is not None:
        return missing
    if not x.is_cpu:
        return f"it is for maps on the CPU, not on {x.device.type}"
    if x.dtype not in SUFFIXES:
        return f"it is for float32 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    elements = x.numel()
    if elements == 0:
        return "the map is empty"
    if max(x.shape[1], elements // (x.shape[0] * x.shape[1])) >= 1 << 31:
        return "places in the map are counted in 32 bits"
    return None


def takes_running(mean: Tensor, var: Tensor, tracked: Tensor, moments: Tensor) -> bool:
    """Whether `follow` serves these."""
    if why_not() is not None or tracked.dtype is not torch.int64:
        return False
    for one in (mean, var, tracked):
        if type(one) is not Tensor or not one.is_cpu or one.is_inference():
            return False
    return _ready(mean) and _ready(var) and _ready(moments)


def follow(mean: Tensor, var: Tensor, tracked: Tensor, momentum: float | None, moments: Tensor, count: int) -> None:
    """Let running mean and variance follow those of so many values: see `backends.follow`."""
    pointers = map(_at, (moments, mean, var, tracked))
    call = loaded().functions["follow", torch.float32]
    call(mean.numel(), count, -1.0 if momentum is None else momentum, *pointers)
    # whoever has kept one for a gradient is told that it has changed
    torch.autograd.graph.increment_version((mean, var, tracked))


class Kernels:
    """See `gates.Steps`."""

    def __init__(self, x: Tensor) -> None:
        self.library = loaded()
        self.batch, self.channels = x.shape[:2]
        self.positions = x.shape[2:]
        elements = x.numel()
        self.dtype = x.dtype
        last = not x.is_contiguous()
        self.shape = (
            self.batch,
            self.channels,
            elements // (self.batch * self.channels),
            last,
            threads_for(elements),
        )
        # where a norm rides along, its four numbers for each channel
        self.norm: int | None = None

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
        self._call("statistics", x.data_ptr(), mean, squares, largest, least)
        running = [] if norm.training else [_small(norm.mean), _small(norm.var)]
        moments = torch.stack(running) if running else torch.empty((2, channels))
        affine = torch.empty((4, channels))
        weight, bias = _small(norm.weight), _small(norm.bias)
        call = self.library.functions["normalise", torch.float32]
        statistics = (mean, squares, largest, least)
        call(
            batch,
            channels,
            count,
            norm.training,
            norm.eps,
            *statistics,
            _at(weight),
            _at(bias),
            affine.data_ptr(),
            moments.data_ptr(),
            hat,
            pooled,
            top,
        )
        kept = Normed(affine, moments, small[4])
        self.restore(kept)
        return small[5:], kept

    def restore(self, kept: Normed) -> None:
        """Let a norm ride along in all that follows."""
        self.norm = kept.affine.data_ptr()

    def pool(self, x: Tensor, mean: bool, maximum: bool) -> Tensor:
        """Means and maxima over positions (pools, B, C)."""
        found = torch.empty((2, self.batch, self.channels), dtype=torch.float32)
        at = found.data_ptr()
        self._call("pool", x.data_ptr(), at, at + 4 * self.batch * self.channels if maximum else None)
        return found if mean and maximum else found[:1] if mean else found[1:]

    def at_once(
        self, x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe, norm: Norm | None
    ) -> tuple[Tensor, Maybe, Kept, None] | None:
        """See `gates.Kernels`."""
        if norm is not None:
            return None
        window = gates.spatial
        moments = None if window is None else _moments(window)
        given = self._gates(gates, moments)
        if given is None:
            return None
        of_mlp, of_window, _ = given
        pools, width = of_mlp[:2]
        sizes = self._sizes(pools, width, window is not None)
        kept = torch.empty(sum(sizes))
        pointers = _within(kept, sizes)
        y, strength = torch.empty_like(x), _small(strength)
        self._call(
            "gated",
            x.data_ptr(),
            _at(shortcut),
            y.data_ptr(),
            _at(strength),
            gates.parallel,
            *of_mlp,
            *pointers[:5],
            *of_window,
            *pointers[5:],
        )
        return y, moments, Kept(together=kept), None

    def grad_at_once(
        self,
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
        mlp, window = gates.channel, gates.spatial
        aside = gates.parallel and mlp is not None and window is not None
        given = None if aside or norm is not None else self._gates(gates, None)
        if given is None:
            return None
        of_mlp, of_window, _ = given
        by_mlp: tuple[Maybe, ...] = (None,) * 4
        by_window: tuple[Maybe, ...] = (None,) * 3
        if mlp is not None:
            by_mlp = tuple([None if one is None else torch.empty_like(one) for one in mlp[3:]])
        if window is not None:
            of_norm = [None if one is None else torch.empty(1) for one in window[1:3]]
            by_window = torch.empty(window.weight.shape), *of_norm
        dx = torch.empty_like(x) if needs_map else None
        dstrength = None if strength is None else torch.empty(1)
        strength = _small(strength)
        if kept.together is None:
            pointers = [_at(one) for one in kept[:8]]
        else:
            pools, width = of_mlp[:2]
            pointers = _within(kept.together, self._sizes(pools, width, window is not None))
        self._call(
            "grad_gated",
            *map(_at, (x, dy, dx, strength, dstrength)),
            *of_mlp,
            *pointers[:5],
            *map(_at, by_mlp),
            *of_window,
            *pointers[5:],
            *map(_at, by_window),
        )
        return dx, dstrength, (*by_mlp, *by_window)

    def apart(self, kept: Kept, gates: Gates) -> Kept:
        """See `gates.Steps`."""
        mlp = gates.channel
        if kept.together is None:
            return kept
        pools, width = (0, 0) if mlp is None else (len(mlp.pools), len(mlp.first))
        shapes = shapes_kept((self.batch, self.channels, *self.positions), pools, width, gates.spatial is not None)
        sizes = [size for size in self._sizes(pools, width, gates.spatial is not None) if size]
        pieces = zip(shapes, kept.together.split(sizes), strict=True)
        return Kept(**{name: piece.view(shapes[name]) for name, piece in pieces})

    def _sizes(self, pools: int, width: int, window: bool) -> tuple[int, ...]:
        """How many numbers each piece of what is kept has, in the order of `Kept`."""
        batch, channels, count = self.shape[:3]
        small, hidden = (batch * channels, batch * width) if pools else (0, 0)
        plane = batch * count if window else 0
        return pools * small, pools * hidden, hidden, small, small, 2 * plane, plane, plane

    def _gates(self, gates: Gates, moments: Maybe) -> tuple[tuple[Maybe, ...], tuple[Maybe, ...], list[Maybe]] | None:
        """An MLP and a window as the kernels take both in one call, and what has to live as long; None where not."""
        mlp, window = gates.channel, gates.spatial
        of_mlp: tuple[Maybe, ...] = _NO_MLP
        of_window: tuple[Maybe, ...] = _NO_WINDOW
        small: list[Maybe] = []
        if mlp is not None:
            found = self._mlp(mlp)
            if found is None or "mean" not in mlp.pools:
                return None
            of_mlp = found
        if window is not None:
            if len(self.positions) > 2:
                return None
            small = _in_float32(window)
            of_window = self._window(window, small, moments)
        return of_mlp, of_window, small

    def grad_pool(self, x: Tensor, pooled: Tensor, dpooled: Tensor) -> Tensor:
        """The gradient of the map by its means and maxima over positions (2, B, C)."""
        places, _ = self.grad_summary(x, None, (None,) * 4, pooled[1], None)
        return self.grad_input(x, None, None, None, (None,) * 4, (pooled[1], dpooled[0], dpooled[1], places))

    def mlp(self, mlp: Mlp, pooled: Tensor) -> tuple[Tensor, Kept]:
        """The channel gate (B, C) of poolings, and what is kept."""
        given = self._mlp(mlp)
        if given is None:
            return between.mlp(mlp, pooled)
        pools, width = given[:2]
        first, hidden = torch.empty((pools, self.batch, width)), torch.empty((self.batch, width))
        logits, gate = torch.empty((self.batch, self.channels)), torch.empty((self.batch, self.channels))
        pointers = map(_at, (pooled, first, hidden, logits, gate))
        self.library.functions["mlp", torch.float32](self.batch, self.channels, *given, *pointers)
        return gate, Kept(pooled, first, hidden, logits)

    def grad_mlp(self, mlp: Mlp, kept: Kept, dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Gradients of the poolings, and of the weights and biases."""
        given = self._mlp(mlp)
        if given is None:
            return between.grad_mlp(mlp, kept, dgate)
        dpooled = torch.empty_like(kept.pooled)
        grads = tuple(None if one is None else torch.empty_like(one) for one in mlp[3:])
        pointers = map(_at, (kept.pooled, kept.first, kept.hidden, kept.logits, dgate, dpooled, *grads))
        self.library.functions["grad_mlp", torch.float32](self.batch, self.channels, *given, *pointers)
        return dpooled, grads

    def _mlp(self, mlp: Mlp) -> tuple[Maybe, ...] | None:
        """Pools, hidden width, threads, weights and biases of an MLP that is computed here; None where it is not."""
        pools, width = len(mlp.pools), mlp.first.shape[0]
        products = width * pools * self.batch * self.channels
        if products > FEW_PRODUCTS or mlp.activation != "relu" or mlp.gate != "sigmoid":
            return None
        _, _, _, first, first_bias, second, second_bias = mlp
        for one in (first, first_bias, second, second_bias):
            if one is not None and not _ready(one):
                return None
        return (
            pools,
            width,
            threads_for(products),
            first.data_ptr(),
            _at(first_bias),
            second.data_ptr(),
            _at(second_bias),
        )

    def summarise(self, x: Tensor, channel: Maybe) -> Tensor:
        """Means and maxima over channels (2, B, *spatial)."""
        found = torch.empty((2, self.batch, *self.positions), dtype=torch.float32)
        at = found.data_ptr()
        self._call("summarise", x.data_ptr(), self.norm, _at(channel), at, at + 4 * self.batch * self.shape[2])
        return found

    def apply(self, x: Tensor, channel: Maybe, spatial: Maybe, shortcut: Maybe) -> Tensor:
        """The map times its gates; with a shortcut relu(that + shortcut)."""
        y = torch.empty_like(x)
        self._call("apply", x.data_ptr(), self.norm, _at(channel), _at(spatial), _at(shortcut), y.data_ptr())
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
        self._call(
            "grad_gates",
            x.data_ptr(),
            dy.data_ptr(),
            self.norm,
            _at(channel),
            _at(spatial),
            _at(maximum),
            gated,
            _at(dchannel),
            _at(dspatial),
            _at(places),
        )
        return dchannel, dspatial, places

    def grad_summary(
        self, x: Tensor, channel: Maybe, summary: tuple[Maybe, ...], maximum: Maybe, dchannel: Maybe
    ) -> tuple[Maybe, Maybe]:
        """Add to the gradient of the channel gate what comes by the summary; where the maxima over positions are."""
        places = None if maximum is None else torch.empty((2, *maximum.shape), dtype=torch.int32)
        hats = None if maximum is None or self.norm is None else torch.empty(maximum.shape)
        pointers = map(_at, (channel, *summary, maximum, dchannel, places, hats))
        self._call("grad_summary", x.data_ptr(), self.norm, *pointers)
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
        dy, *others = map(_at, (dy, through, channel, spatial, *summary, *pools, dx))
        self._call("grad_input", x.data_ptr(), dy, self.norm, *others)
        return dx

    def window(self, planes: Tensor, window: Window, strength: Maybe) -> tuple[Tensor, Tensor, Maybe]:
        """The spatial gate, the logits behind the convolution, and their moments in training."""
        if len(self.positions) > 2:
            return between.window(planes, window, strength)
        small, moments, strength = _in_float32(window), _moments(window), _small(strength)
        given = self._window(window, small, moments)
        logits, gate = torch.empty(planes.shape[1:]), torch.empty(planes.shape[1:])
        pointers = map(_at, (strength, planes, logits, gate))
        self.library.functions["window", torch.float32](self.batch, *given, *pointers)
        return gate, logits, moments

    def grad_window(
        self, planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the planes, of the weight, and of norm weight, norm bias and strength together (3)."""
        if len(self.positions) > 2:
            return between.grad_window(planes, window, strength, kept, dgate)
        small = _in_float32(window)
        given = self._window(window, small, None)
        dplanes, dweight, sums = torch.empty_like(planes), torch.empty(window.weight.shape), torch.empty(3)
        strength = _small(strength)
        pointers = map(_at, (strength, planes, kept.window, dgate, sums, dplanes, dweight))
        self.library.functions["grad_window", torch.float32](self.batch, *given, *pointers)
        return dplanes, dweight, sums

    def _window(self, window: Window, small: list[Maybe], moments: Maybe) -> tuple[Maybe, ...]:
        """Sizes and threads of a window, and its weights and norm, which live as long as `small` and `moments` do."""
        shape = window.weight.shape[2:]
        pointers = [None if one is None else one.data_ptr() for one in small]
        if moments is not None:
            pointers[3:] = moments.data_ptr(), moments.data_ptr() + 4
        threads = threads_for(self.batch * self.shape[2] * window.weight.numel() // 16)
        # a sequence is a plane of one row
        plane = (*self.positions, *shape) if len(shape) == 2 else (1, *self.positions, 1, *shape)
        return (*plane, threads, window.training, window.eps, *pointers)

    def _call(self, name: str, *arguments: Any) -> None:
        self.library.functions[name, self.dtype](*self.shape, *arguments)


def _in_float32(window: Window) -> list[Maybe]:
    """Weights, and weight, bias, mean and variance of the norm, as the kernels read them."""
    return [_small(one) for one in window[:5]]


def _moments(window: Window) -> Maybe:
    """Where mean and variance of the logits are written to; None where they are not computed."""
    return torch.empty(2) if window.training and window.mean is not None else None


def _within(piece: Tensor, sizes: tuple[int, ...]) -> list[int | None]:
    """Where parts of so many numbers begin; None for those that have none."""
    at, found = piece.data_ptr(), []
    for size in sizes:
        found.append(at if size else None)
        at += 4 * size
    return found


def _at(one: Maybe) -> int | None:
    return None if one is None else one.data_ptr()


def _small(one: Maybe) -> Any:
    """A small tensor as the kernels read it: float32, in one piece."""
    return one if one is None or _ready(one) else one.to(torch.float32).contiguous()


def _ready(one: Tensor) -> bool:
    return one.dtype is torch.float32 and one.is_contiguous()
