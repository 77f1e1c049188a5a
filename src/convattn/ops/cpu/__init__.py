"""The kernels of `kernels.cpp` as `fused` asks for them."""

from typing import Any

import torch

from convattn.ops import between
from convattn.ops.cpu.library import FEW_PRODUCTS, SUFFIXES, loaded, threads_for, why_not
from convattn.ops.gates import Kept, Mlp, Norm, Normed, Window, convolve

Tensor = torch.Tensor
Maybe = Any


def why_not_for(x: Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    missing = why_not()
    if missing is not None:
        return missing
    if x.device.type != "cpu":
        return f"it is for maps on the CPU, not on {x.device.type}"
    if x.dtype not in SUFFIXES:
        return f"it is for float32 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    elements = x.numel()
    if elements == 0:
        return "the map is empty"
    if max(x.shape[1], elements // (x.shape[0] * x.shape[1])) >= 1 << 31:
        return "places in the map are counted in 32 bits"
    return None


class Kernels:
    """See `gates.Kernels`."""

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

    def mlp(self, mlp: Mlp, pooled: Tensor) -> tuple[Tensor, Kept]:
        """The channel gate (B, C) of poolings, and what is kept."""
        sizes = self._sizes(mlp, pooled)
        if sizes is None:
            return between.mlp(mlp, pooled)
        pools, batch, channels, width, _ = sizes
        first, hidden = torch.empty((pools, batch, width)), torch.empty((batch, width))
        logits, gate = torch.empty((batch, channels)), torch.empty((batch, channels))
        pointers = map(_at, (pooled, *mlp[3:], first, hidden, logits, gate))
        self.library.functions["mlp", torch.float32](*sizes, *pointers)
        return gate, Kept(pooled, first, hidden, logits)

    def grad_mlp(self, mlp: Mlp, kept: Kept, dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Gradients of the poolings, and of the weights and biases."""
        sizes = self._sizes(mlp, kept.pooled)
        if sizes is None:
            return between.grad_mlp(mlp, kept, dgate)
        dpooled = torch.empty_like(kept.pooled)
        grads = tuple(None if one is None else torch.empty_like(one) for one in mlp[3:])
        given = (kept.pooled, mlp.first, mlp.second, kept.first, kept.hidden, kept.logits, dgate, dpooled, *grads)
        self.library.functions["grad_mlp", torch.float32](*sizes, *map(_at, given))
        return dpooled, grads

    def _sizes(self, mlp: Mlp, pooled: Tensor) -> tuple[int, int, int, int, int] | None:
        """Pools, batch, channels, hidden width and threads of an MLP that is computed here; None where it is not."""
        pools, batch, channels = pooled.shape
        width = len(mlp.first)
        products = width * pooled.numel()
        small = products <= FEW_PRODUCTS and mlp.activation == "relu" and mlp.gate == "sigmoid"
        if not small or any(one is not None and not _ready(one) for one in mlp[3:]):
            return None
        return pools, batch, channels, width, threads_for(products)

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
        weight = _small(window.weight)
        logits = torch.empty(planes.shape[1:], dtype=torch.float32)
        if self._in_plane(weight):
            self._convolve("conv", planes.data_ptr(), weight.data_ptr(), logits.data_ptr(), weight=weight)
        else:
            logits = convolve(planes.transpose(0, 1), weight).view(logits.shape)
        moments = torch.empty(2) if window.training and window.mean is not None else None
        gate = torch.empty_like(logits)
        self._gate("gate", logits, window, moments, strength, gate.data_ptr())
        return gate, logits, moments

    def grad_window(
        self, planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the planes, of the weight, and of norm weight, norm bias and strength together (3)."""
        sums, dlogits = torch.empty(3), torch.empty_like(dgate)
        pointers = (dgate.data_ptr(), dlogits.data_ptr(), sums.data_ptr())
        self._gate("grad_gate", kept.window, window, None, strength, *pointers)
        weight = _small(window.weight)
        if self._in_plane(weight):
            dplanes, dweight = torch.empty_like(planes), torch.empty(weight.shape)
            found = (planes.data_ptr(), weight.data_ptr(), dlogits.data_ptr(), dplanes.data_ptr(), dweight.data_ptr())
            self._convolve("grad_conv", *found, weight=weight)
            return dplanes, dweight, sums
        return *between.grad_convolve(planes, weight, dlogits), sums

    def _call(self, name: str, *arguments: Any) -> None:
        self.library.functions[name, self.dtype](*self.shape, *arguments)

    def _in_plane(self, weight: Tensor) -> bool:
        return weight.dim() <= 4

    def _convolve(self, name: str, *pointers: int, weight: Tensor) -> None:
        sizes, window = self.positions, weight.shape[2:]
        if len(sizes) == 1:
            sizes, window = torch.Size([1, *sizes]), torch.Size([1, *window])
        threads = threads_for(self.batch * self.shape[2] * weight.numel() // 16)
        self.library.functions[name, torch.float32](self.batch, *sizes, *window, threads, *pointers)

    def _gate(self, name: str, logits: Tensor, window: Window, moments: Maybe, strength: Maybe, *pointers: int) -> None:
        # what is made here lives until the call is over
        small = [_small(one) for one in (*window[1:5], strength)]
        weight, bias, mean, var, given = map(_at, small)
        if moments is not None:
            mean = moments.data_ptr()
            var = mean + 4
        count = logits.numel()
        call = self.library.functions[name, torch.float32]
        call(
            count,
            threads_for(4 * count),
            window.training,
            window.eps,
            logits.data_ptr(),
            weight,
            bias,
            mean,
            var,
            given,
            *pointers,
        )


def _at(one: Maybe) -> int | None:
    return None if one is None else one.data_ptr()


def _small(one: Maybe) -> Any:
    """A small tensor as the kernels read it: float32, in one piece."""
    return one if one is None or _ready(one) else one.to(torch.float32).contiguous()


def _ready(one: Tensor) -> bool:
    return one.dtype is torch.float32 and one.is_contiguous()
