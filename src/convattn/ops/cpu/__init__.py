"""Gating on the CPU in few passes over the map, forward and backward: `kernels.cpp` behind three autograd functions.

`Root` pools the map, `Summary` summarises it over its channels, `Apply` multiplies it with both gates; what lies
between them is small and PyTorch's own. Each would write a gradient of the whole map, and PyTorch would add them. So
`Apply` returns the gradient that it got, unchanged, `Summary` none, and both leave what they know to `Root`, which is
called last and writes the gradient of the map in a single pass. That goes by way of the `carrier`, which is the map as
`Root` returns it and which nothing else sees. For gradients of gradients each computes its own from the map itself, in
plain PyTorch.

Saved for the backward pass are the map itself and small maps: for each maximum its first place and the number of
places, since equal maxima share their gradient, as those of `torch.amax` do.
"""

from collections.abc import Callable
from typing import Any

import torch

from convattn.ops import reference
from convattn.ops.cpu.library import SUFFIXES, loaded, threads_for, why_not

Tensors = tuple[torch.Tensor | None, ...]


def why_not_for(x: torch.Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    missing = why_not()
    if missing is not None:
        return missing
    if x.device.type != "cpu":
        return f"it is for maps on the CPU, not on {x.device.type}"
    if x.dtype not in SUFFIXES:
        return f"it is for float32 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0:
        return "the map is empty"
    if max(x.shape[1], x.numel() // (x.shape[0] * x.shape[1])) >= 1 << 31:
        return "places in the map are counted in 32 bits"
    return None


def gated(
    x: torch.Tensor,
    pools: tuple[str, ...],
    channel: Callable[[list[torch.Tensor]], torch.Tensor] | None,
    spatial: Callable[[torch.Tensor], torch.Tensor] | None,
    strength: torch.Tensor | None,
    parallel: bool,
    dimensions: int,
) -> torch.Tensor:
    """What `reference.gated` computes, for maps that are served."""
    x = _dense(x)
    shared = Shared()
    gate_c = gate_s = None
    pooled: list[torch.Tensor] = []
    carrier = x
    if torch.is_grad_enabled():
        carrier, *pooled = Root.apply(x, shared, pools if channel else ())
    elif channel is not None:
        pooled = _chosen(_pool(x, pools, places=False), pools, x)
    if channel is not None:
        gate_c = reference.blend(channel(pooled), strength).to(x.dtype)
    if spatial is not None:
        seen = None if parallel else gate_c
        if torch.is_grad_enabled():
            aside = parallel and channel is not None
            summary = Summary.apply(carrier, x, seen, shared, aside)
        else:
            summary = _summary(x, seen, with_places=False)[0]
        gate_s = reference.blend(spatial(summary), strength).to(x.dtype)
    if torch.is_grad_enabled():
        return Apply.apply(carrier, x, gate_c, gate_s, shared)  # type: ignore[no-any-return]
    return _apply(x, gate_c, gate_s)


class Shared:
    """What the functions of one call leave to `Root` in a backward pass."""

    def __init__(self) -> None:
        self.gates: Tensors | None = None
        self.summary: Tensors | None = None
        # the gradient of the map by way of a summary that is not of the gated map
        self.aside: torch.Tensor | None = None


class Root(torch.autograd.Function):
    """The map itself, and its mean and maximum over positions as far as they are asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shared: Shared, pools: tuple[str, ...]) -> Tensors:
        ctx.shared, ctx.pools = shared, pools
        ctx.set_materialize_grads(False)
        found = _pool(x, pools)
        ctx.save_for_backward(x, *found[1:])
        return (x, *_chosen(found, pools, x))

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor | None, *dpooled: torch.Tensor | None) -> Tensors:
        x, maximum, first, count = ctx.saved_tensors
        shared: Shared = ctx.shared
        by_pool = dict(zip(ctx.pools, dpooled, strict=True))
        if _by_reference(dx, *dpooled) or shared.gates is None:
            (by_pools,) = _gradients(lambda x: [reference.squeeze(x, pool) for pool in ctx.pools], [x], list(dpooled))
            return dx if by_pools is None else by_pools if dx is None else dx + by_pools, None, None
        gates, summary, aside = shared.gates, shared.summary or (None,) * 5, shared.aside
        shared.gates = shared.summary = shared.aside = None
        dmean, dmax = (_small(by_pool.get(pool)) for pool in ("mean", "max"))
        if ctx.pools and dmean is None:
            dmean = x.new_zeros(x.shape[:2], dtype=torch.float32)
        if dmax is None:
            maximum = first = count = None
        found = torch.empty_like(x)
        _call("grad_input", x, x, _like(dx, x), *gates, *summary, maximum, dmean, dmax, first, count, found)
        return found if aside is None else found.add_(aside), None, None


class Summary(torch.autograd.Function):
    """Mean and maximum of each position over the channels, of the map or of the map with its channels gated."""

    @staticmethod
    def forward(
        ctx: Any, carrier: torch.Tensor, x: torch.Tensor, gate: torch.Tensor | None, shared: Shared, aside: bool
    ) -> torch.Tensor:
        summary, found, wide = _summary(x, gate)
        ctx.shared, ctx.aside = shared, aside
        ctx.save_for_backward(x, gate, wide, *found)
        return summary

    @staticmethod
    def backward(ctx: Any, dsummary: torch.Tensor) -> Tensors:
        x, gate, wide, maximum, first, count = ctx.saved_tensors
        if _by_reference(dsummary):
            dx, dgate = _gradients(_summarised, [x, gate], [dsummary])
            return None, dx, dgate, None, None
        # [2, B, N], so that each is in one piece
        dmean, dmax = dsummary.flatten(2).transpose(0, 1).to(torch.float32).contiguous()
        dgate = None
        if gate is not None and ctx.needs_input_grad[2]:
            dgate = torch.zeros_like(wide)
            _call("grad_summary", x, x, wide, maximum, dmean, dmax, first, count, dgate)
            dgate = dgate.to(gate.dtype)
        found = (maximum, dmean, dmax, first, count)
        if ctx.aside and ctx.needs_input_grad[0]:
            ctx.shared.aside = torch.empty_like(x)
            _call("grad_input", x, x, torch.zeros_like(x), None, None, *found, *(None,) * 5, ctx.shared.aside)
        elif not ctx.aside:
            ctx.shared.summary = found
        return None, None, dgate, None, None


class Apply(torch.autograd.Function):
    """The map times its gates."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: torch.Tensor,
        x: torch.Tensor,
        gate_c: torch.Tensor | None,
        gate_s: torch.Tensor | None,
        shared: Shared,
    ) -> torch.Tensor:
        ctx.shared = shared
        ctx.save_for_backward(x, gate_c, gate_s)
        return _apply(x, gate_c, gate_s)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Tensors:
        x, gate_c, gate_s = ctx.saved_tensors
        if _by_reference(dy):
            return None, *_gradients(_multiplied, [x, gate_c, gate_s], [dy]), None
        dy = _like(dy, x)  # type: ignore[assignment]
        wide_c, wide_s = _small(gate_c), _small(gate_s)
        dgates = [
            None if gate is None or not needed else torch.empty_like(gate)
            for gate, needed in ((wide_c, ctx.needs_input_grad[2]), (wide_s, ctx.needs_input_grad[3]))
        ]
        if dgates != [None, None]:
            _call("grad_gates", x, x, dy, wide_c, wide_s, *dgates)
        ctx.shared.gates, ctx.shared.summary, ctx.shared.aside = (wide_c, wide_s), None, None
        return (
            dy if ctx.needs_input_grad[0] else None,
            None,
            *(None if one is None else one.to(x.dtype) for one in dgates),
            None,
        )


def _pool(x: torch.Tensor, pools: tuple[str, ...], places: bool = True) -> Tensors:
    """Mean and maximum, (B, C) in float32, and if asked for, the first place of each maximum and how many it has."""
    if not pools:
        return (None,) * 4
    mean, maximum = torch.empty((2, *x.shape[:2]), dtype=torch.float32)
    if "max" not in pools:
        _call("pool", x, x, mean, None, None, None)
        return mean, None, None, None
    first, count = _places(x.shape[:2]) if places else (None, None)
    _call("pool", x, x, mean, maximum, first, count)
    return mean, maximum, first, count


def _places(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    first, count = torch.empty((2, *shape), dtype=torch.int32)
    return first, count


def _chosen(found: Tensors, pools: tuple[str, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """The poolings that were asked for, in their order and in the dtype of the map."""
    by_name = {"mean": found[0], "max": found[1]}
    return [by_name[pool].to(x.dtype) for pool in pools]  # type: ignore[union-attr]


def _summary(
    x: torch.Tensor, gate: torch.Tensor | None, with_places: bool = True
) -> tuple[torch.Tensor, Tensors, torch.Tensor | None]:
    """The summary (B, 2, *spatial), its maxima and if asked their places, and the gate in float32."""
    wide = _small(gate)
    places = (x.shape[0], x.numel() // (x.shape[0] * x.shape[1]))
    values = torch.empty((2, *places), dtype=torch.float32)
    first, count = _places(places) if with_places else (None, None)
    _call("summarise", x, x, wide, values[0], values[1], first, count)
    # a view: the convolution behind it reads it in this order
    summary = values.view(2, x.shape[0], *x.shape[2:]).transpose(0, 1)
    return summary.to(x.dtype), (values[1], first, count), wide


def _apply(x: torch.Tensor, gate_c: torch.Tensor | None, gate_s: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty_like(x)
    _call("apply", x, x, _small(gate_c), _small(gate_s), y)
    return y


class Convolution(torch.autograd.Function):
    """The convolution of a summary (B, 2, H, W) to (B, 1, H, W) with zeros around it, in float32."""

    @staticmethod
    def forward(ctx: Any, summary: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(summary, weight)
        return convolved(summary, weight)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Tensors:
        summary, weight = ctx.saved_tensors
        if _by_reference(dout):
            found = _gradients(
                lambda x, weight: [torch.nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)],
                [summary, weight],
                [dout],
            )
            return found[0], found[1]
        dsummary = torch.empty_like(_planes(summary)) if ctx.needs_input_grad[0] else None
        dweight = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        planes, dense, dout = _planes(summary), weight.contiguous(), dout.contiguous()
        _convolve("grad_conv", summary, weight, planes, dense, dout, dsummary, dweight)
        return None if dsummary is None else dsummary.transpose(0, 1), dweight


def convolves(summary: torch.Tensor, conv: torch.nn.Module) -> bool:
    """Whether `convolved` computes what a layer does, which nobody watches."""
    return (
        type(conv) is torch.nn.Conv2d
        and summary.dim() == 4
        and conv.weight.dtype is torch.float32
        and conv.bias is None
        and tuple(conv.weight.shape[:2]) == (1, 2)
        and conv.padding == (conv.weight.shape[-1] // 2,) * 2
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not torch.is_autocast_enabled("cpu")
        and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
    )


def convolved(summary: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The convolution without a graph."""
    out = torch.empty((summary.shape[0], 1, *summary.shape[2:]), dtype=torch.float32)
    _convolve("conv", summary, weight, _planes(summary), weight.contiguous(), out)
    return out


def _planes(summary: torch.Tensor) -> torch.Tensor:
    """The means of all samples, then their maxima: (2, B, H, W)."""
    return summary.transpose(0, 1).contiguous()


def _convolve(name: str, summary: torch.Tensor, weight: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    library = loaded()
    assert library is not None  # noqa: S101
    batch, _, height, width = summary.shape
    threads = threads_for(batch * height * width * weight.numel() // 16)
    pointers = [None if one is None else one.data_ptr() for one in tensors]
    library.functions[name, torch.float32](batch, height, width, weight.shape[-1], threads, *pointers)


def _call(name: str, x: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    """Call a kernel for the shape and the memory format of `x`."""
    library = loaded()
    assert library is not None  # noqa: S101
    batch, channels = x.shape[:2]
    elements = x.numel()
    pointers = [None if one is None else one.data_ptr() for one in tensors]
    library.functions[name, x.dtype](
        batch, channels, elements // (batch * channels), _is_last(x), threads_for(elements), *pointers
    )


def _is_last(x: torch.Tensor) -> bool:
    """Whether the channels of a dense map are its last dimension in memory."""
    return not x.is_contiguous()


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The map in one piece, in the memory format that it has."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    last = x.dim() in (4, 5) and x.is_contiguous(memory_format=_FORMATS[x.dim()])
    return x.contiguous(memory_format=_FORMATS[x.dim()]) if last else x.contiguous()


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _like(given: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A gradient in the memory format of the map."""
    if given is None or (given.movedim(1, -1) if _is_last(x) else given).is_contiguous():
        return given
    return torch.empty_like(x).copy_(given)


def _small(given: torch.Tensor | None) -> torch.Tensor | None:
    """A gate or its gradient as the kernels read it: float32, in one piece."""
    return None if given is None else given.to(torch.float32).contiguous()


def _by_reference(*given: torch.Tensor | None) -> bool:
    """Whether a backward pass is to be differentiated itself, or is one of many at once."""
    if torch.is_grad_enabled():
        return True
    functorch = torch._C._functorch
    return any(
        functorch.is_legacy_batchedtensor(one) or functorch.is_functorch_wrapped_tensor(one)
        for one in given
        if one is not None
    )


def _gradients(
    function: Callable[..., list[torch.Tensor]], inputs: list[torch.Tensor | None], given: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients, in plain PyTorch and differentiable again, of the inputs that need any.

    They are taken of views: an input may have been computed from another one, and what comes by that way is not asked
    for here.
    """
    with torch.enable_grad():
        views = [None if one is None else one.view_as(one) for one in inputs]
        outputs = function(*views)
    known = [(output, gradient) for output, gradient in zip(outputs, given, strict=True) if gradient is not None]
    wanted = [one for one in views if one is not None and one.requires_grad]
    if not known or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in known],
            wanted,
            [gradient for _, gradient in known],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if one is not None and one.requires_grad else None for one in views]


def _multiplied(x: torch.Tensor, gate_c: torch.Tensor | None, gate_s: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What `Apply` computes, in plain PyTorch."""
    y = x if gate_c is None else reference.apply_gate(x, reference.broadcast(gate_c, x.dim() - 2))
    return [y if gate_s is None else reference.apply_gate(y, gate_s)]


def _summarised(x: torch.Tensor, gate: torch.Tensor | None) -> list[torch.Tensor]:
    """What `Summary` computes, in plain PyTorch."""
    return [reference.spatial_summary(_multiplied(x, gate)[0])]
