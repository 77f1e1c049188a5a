"""Gating in few passes over the map, forward and backward, for the kernels of any device.

y = x * c, c = channel gate of the poolings of x;  z = y * s, s = spatial gate of the summary of y

Three things are computed from the whole map, one after the other: its poolings, its summary and its product with both
gates. What lies between them is small: an MLP, and a convolution with its norm. The backward pass reads the map twice
and its gradient twice:

1. (x, dz) to the gradients of c and s by the product, and where the maxima of the summary are;
2. the window backward, on small maps, to the gradient of the summary;
3. (x) to the gradient of c by the summary, and where the maxima of the poolings are;
4. the MLP backward, to the gradient of the poolings;
5. (dz) to dx in one pass, with the gradients by the summary and by the poolings.

Kept for it are the map and small maps. Equal maxima share their gradient, as those of `torch.amax` do. For gradients of
gradients all is computed again in plain PyTorch.

Where a batch norm stands straight before the gates, x = w * h + b with h = norm of u, only u is kept: the norm's
statistics come with the poolings, x is computed from u wherever it is read, and what the gradient of u needs beside dx,
the sums of dx and of dx * h, follows from the sums of steps 1 and 3. So both together read and write the map hardly
more often than the norm alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch

from convattn.ops import reference
from convattn.ops.between import gate_of, wide
from convattn.ops.gates import Gates, Kept, Kernels, Maybe, Norm, Normed, Steps, Tensor, is_last

_aten = torch.ops.aten
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def forward(
    kernels: type[Kernels], x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe = None, norm: Norm | None = None
) -> tuple[Tensor, Maybe, Kept, Normed | None]:
    """The gated map, mean and biased variance that the norm has used in training, and what the backward pass needs.

    With a norm, which goes with a channel gate, the map is norm(x).

    One pass after the other over the whole map: taking a few samples through all of them, so that they stay in a cache,
    was slower by 0 to 30 % on two cores.
    """
    found = kernels.at_once(x, gates, strength, shortcut, norm)
    if found is not None:
        return found
    mlp, window, moments, kept, normed = gates.channel, gates.spatial, None, Kept(), None
    with _in_float32(x):
        steps = cast(Steps, kernels(x))
        if mlp is not None:
            mean, maximum = "mean" in mlp.pools, "max" in mlp.pools
            if norm is None:
                pooled = steps.pool(x, mean, maximum)
            else:
                pooled, normed = steps.normalise(x, norm)
                pooled = pooled[0 if mean else 1 : 2 if maximum else 1]
            channel, kept = steps.mlp(mlp, pooled)
            kept = kept._replace(channel=reference.blend(channel, wide(strength)))
        if window is not None:
            planes = steps.summarise(x, None if gates.parallel else kept.channel)
            spatial, logits, moments = steps.window(planes, window, strength)
            kept = kept._replace(planes=planes, window=logits, spatial=spatial)
        y = steps.apply(x, kept.channel, kept.spatial, shortcut)
    return y, moments, kept, normed


def backward(
    kernels: type[Kernels],
    x: Tensor,
    dy: Tensor,
    gates: Gates,
    strength: Maybe,
    kept: Kept,
    needs_map: bool,
    norm: Norm | None = None,
    normed: Normed | None = None,
) -> tuple[Maybe, Maybe, tuple[Maybe, ...]]:
    """Gradients of the map, of the strength, and of the tensors of the gates and of a norm before them.

    The mean and the variance of the gates are those that the norm has used. With a norm the gradient of the map needs
    sums of the gradient behind it, which come out of what is computed for the gates.
    """
    found = kernels.grad_at_once(x, dy, gates, strength, kept, needs_map, norm, normed)
    if found is not None:
        return found
    mlp, window = gates.channel, gates.spatial
    gated = window is not None and mlp is not None and not gates.parallel
    by_mlp: tuple[Maybe, ...] = (None,) * 4
    by_window: tuple[Maybe, ...] = (None,) * 3
    dstrength = None
    summary: tuple[Maybe, ...] = (None,) * 4
    pools: tuple[Maybe, ...] = (None,) * 4
    by_norm: tuple[Maybe, ...] = ()
    sums: Maybe = None
    hats = through = None
    with _in_float32(x):
        steps = cast(Steps, kernels(x))
        kept = steps.apart(kept, gates)
        pooled, seen = kept.pooled, None if kept.planes is None else kept.planes[1]
        if normed is not None:
            steps.restore(normed)
        dchannel, dspatial, places = steps.grad_gates(x, dy, kept.channel, kept.spatial, seen, gated)
        if window is not None:
            dplanes, dweight, scalars = steps.grad_window(kept.planes, window, strength, kept, dspatial)
            by_window = (dweight, scalars[0:1], scalars[1:2]) if window.mean is not None else (dweight, None, None)
            dstrength = scalars[2:3]
            summary = (seen, dplanes[0], dplanes[1], places)
        maximum = pooled[-1] if (needs_map or norm) and mlp is not None and "max" in mlp.pools else None
        if gated or maximum is not None:
            by_summary = summary if gated else (None,) * 4
            places, hats = steps.grad_summary(x, kept.channel, by_summary, maximum, dchannel)
        if normed is not None:
            sums = dchannel
            dchannel = sums[0] * normed.affine[2] + sums[1] * normed.affine[3]
        if mlp is not None:
            if strength is not None:
                less = torch.nan_to_num(gate_of(mlp, kept) - 1)
                by_channel = (dchannel.double() * less).sum().float().reshape(1)
                dstrength = by_channel if dstrength is None else dstrength + by_channel
                dchannel = dchannel * strength
            dpooled, by_mlp = steps.grad_mlp(mlp, kept, dchannel)
            pools = (
                maximum,
                dpooled[0] if "mean" in mlp.pools else None,
                None if maximum is None else dpooled[-1],
                places if maximum is not None else None,
            )
        if norm is not None and normed is not None:
            dnorm = _grad_norm(kept.channel, normed.hat, sums, pools[1], pools[2], hats)
            by_norm = tuple(dnorm)
            through = dnorm.flip(0) * (kept.channel.numel() / x.numel() / len(x)) if norm.training else None
        dx = None
        if needs_map:
            nothing = (None,) * 4
            aside = mlp is not None and window is not None and gates.parallel
            seen_by = nothing if aside else summary
            dx = steps.grad_input(x, dy, kept.channel, kept.spatial, seen_by, pools, through)
            if aside:
                dx += steps.grad_input(x, None, None, None, summary, nothing)
    return dx, dstrength, (*by_mlp, *by_window, *by_norm)


def _grad_norm(channel: Tensor, hat: Tensor, sums: Tensor, dmean: Maybe, dmax: Maybe, hats: Maybe) -> Tensor:
    """Gradients of a norm's weight and bias (2, C): the sums of the map's gradient times hat, and of itself."""
    found = channel * sums
    if dmean is not None:
        found += torch.stack([dmean * hat, dmean])
    if dmax is not None:
        found += torch.stack([dmax * hats, dmax])
    return found.sum(1, dtype=torch.float64).float()


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    with torch.autocast(device, enabled=False):
        yield


_nothing = nullcontext()


def _in_float32(x: Tensor) -> Any:
    """Small maps are computed in float32, mixed precision or not, where operators of PyTorch compute them."""
    device = x.device.type
    return _without_autocast(device) if torch.is_autocast_enabled(device) else _nothing


def gated(
    kernels: type[Kernels], x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe = None
) -> tuple[Tensor, Maybe]:
    """The gated map, and in training mean and variance of the logits where the norm's running ones are to follow."""
    x = dense(x)
    shortcut = None if shortcut is None else like(shortcut, x)
    if torch.is_grad_enabled():
        y, moments = Gating.apply(x, strength, shortcut, kernels, gates, *gates.tensors())
    else:
        y, moments, _, _ = forward(kernels, x, gates, strength, shortcut)
    return y, None if kernels.follows(gates.spatial) else moments


def normed(kernels: type[Kernels], u: Tensor, norm: Norm, gates: Gates, strength: Maybe) -> tuple[Tensor, Maybe, Maybe]:
    """The gated map of norm(u), keeping no map but u.

    And mean and variance for the running ones of gate and norm, where those are still to follow.
    """
    u = dense(u)
    if torch.is_grad_enabled():
        y, moments, of_norm = NormGating.apply(u, strength, kernels, gates, norm, *gates.tensors(), *norm.tensors())
    else:
        y, moments, _, kept = forward(kernels, u, gates, strength, None, norm)
        assert kept is not None  # noqa: S101
        of_norm = kept.moments
    if kernels.follows(gates.spatial):
        moments = None
    return y, moments, None if not norm.training or kernels.follows(norm) else of_norm


class Gating(torch.autograd.Function):
    """`forward` and `backward` as one function with a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        strength: Maybe,
        shortcut: Maybe,
        kernels: type[Kernels],
        gates: Gates,
        *tensors: Maybe,
    ) -> tuple[Tensor, Maybe]:
        y, moments, kept, _ = forward(kernels, x, gates, strength, shortcut)
        ctx.kernels, ctx.gates = kernels, gates
        # zeros for the moments would be made, and not be read
        ctx.set_materialize_grads(False)
        running = gates.running(moments)
        ctx.save_for_backward(x, strength, shortcut, y if shortcut is not None else None, *tensors, *running, *kept)
        if moments is not None:
            ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Maybe, _: Maybe) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, strength, shortcut, y, *rest = ctx.saved_tensors
        gates: Gates = ctx.gates
        tensors, running, kept = tuple(rest[:7]), tuple(rest[7:9]), Kept(*rest[9:])
        if differentiated(dy):
            found = gradients(
                lambda x, strength, shortcut, *tensors: [plainly(x, gates.of(tensors + running), strength, shortcut)],
                [x, strength, shortcut, *tensors],
                [dy],
            )
            return (*found[:3], None, None, *found[3:])
        dy = like(dy, x)
        if shortcut is not None:
            dy = _aten.threshold_backward(dy, y, 0)
        dx, dstrength, dtensors = backward(
            ctx.kernels, x, dy, gates.of(tensors + running), strength, kept, ctx.needs_input_grad[0]
        )
        return (
            dx,
            None if strength is None else dstrength,
            None if shortcut is None else dy,
            None,
            None,
            *dtensors,
        )


class NormGating(torch.autograd.Function):
    """The same behind a norm, whose input is all that is kept of the size of the map."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, strength: Maybe, kernels: type[Kernels], gates: Gates, norm: Norm, *tensors: Maybe
    ) -> tuple[Tensor, Maybe, Tensor]:
        y, moments, kept, normed = forward(kernels, u, gates, strength, None, norm)
        assert normed is not None  # noqa: S101
        ctx.kernels, ctx.gates, ctx.norm = kernels, gates, norm
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, strength, *tensors, *gates.running(moments), *normed, *kept)
        ctx.mark_non_differentiable(*(one for one in (moments, normed.moments) if one is not None))
        return y, moments, normed.moments

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Maybe) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        u, strength, *rest = ctx.saved_tensors
        tensors, by_norm, running, kept = tuple(rest[:7]), tuple(rest[7:9]), tuple(rest[9:11]), rest[11:]
        gates, norm = ctx.gates, ctx.norm._replace(weight=by_norm[0], bias=by_norm[1])
        if differentiated(dy):
            if not norm.training:
                norm = norm._replace(mean=kept[1][0], var=kept[1][1])

            def function(u: Tensor, strength: Maybe, *given: Maybe) -> list[Tensor]:
                x = norm._replace(weight=given[7], bias=given[8]).reference(u)
                return [plainly(x, gates.of(given[:7] + running), strength)]

            found = gradients(function, [u, strength, *tensors, *by_norm], [dy])
            return (*found[:2], None, None, None, *found[2:])
        needs_map = ctx.needs_input_grad[0]
        normed = Normed(*kept[:3])
        du, dstrength, dtensors = backward(
            ctx.kernels,
            u,
            like(dy, u),
            gates.of(tensors + running),
            strength,
            Kept(*kept[3:]),
            needs_map,
            norm,
            normed,
        )
        given = zip(by_norm, dtensors[7:], strict=True)
        dnorm = (None if one is None else found for one, found in given)
        return (du, None if strength is None else dstrength, None, None, None, *dtensors[:7], *dnorm)


def plainly(x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe = None) -> Tensor:
    """The same in plain PyTorch."""
    mlp, window = gates.channel, gates.spatial
    return reference.gated(
        x,
        mlp.pools if mlp else (),
        mlp.reference if mlp else None,
        window.reference if window else None,
        strength,
        gates.parallel,
        x.dim() - 2,
        shortcut,
    )


def mean_max(kernels: type[Kernels], x: Tensor) -> Tensor:
    """Means, then maxima, of a map over its positions (B, 2C)."""
    x = dense(x)
    return MeanMax.apply(x, kernels)  # type: ignore[no-any-return]


class MeanMax(torch.autograd.Function):
    """Mean and maximum over positions in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: type[Kernels]) -> Tensor:
        pooled = kernels(x).pool(x, True, True)
        ctx.kernels = kernels
        ctx.save_for_backward(x, pooled)
        return torch.cat([pooled[0], pooled[1]], dim=1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Maybe, None]:
        x, pooled = ctx.saved_tensors
        if differentiated(dpooled):
            (dx,) = gradients(lambda x: [reference.mean_max(x)], [x], [dpooled])
            return dx, None
        kernels = ctx.kernels(x)
        halves = torch.stack([half.float() for half in dpooled.chunk(2, dim=1)])
        return kernels.grad_pool(x, pooled, halves), None


def is_written(x: Tensor) -> bool:
    """Whether the numbers of a tensor are those in its memory: not their negatives, and not zeros that lie nowhere."""
    return not (x.is_neg() or x._is_zerotensor())


def written(x: Tensor) -> Tensor:
    """The same tensor with its numbers in its memory."""
    if x.is_neg():
        x = x.resolve_neg()
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) if x._is_zerotensor() else x


def dense(x: Tensor) -> Tensor:
    """The map in one piece, in the memory format that it has."""
    if not is_written(x):
        x = written(x)
    return x if x.is_contiguous() or is_last(x) else x.contiguous()


def like(given: Tensor, x: Tensor) -> Tensor:
    """Another map in the memory format and dtype of `x`."""
    alike = given.dtype is x.dtype and (given.is_contiguous() if x.is_contiguous() else is_last(given))
    if alike and is_written(given):
        return given
    return torch.empty_like(x).copy_(given)


def differentiated(given: Tensor) -> bool:
    """Whether a backward pass of this gradient is to be differentiated itself, or is one of many at once."""
    return torch.is_grad_enabled() or _is_batched(given) or _is_wrapped(given)


def gradients(function: Callable[..., list[Tensor]], inputs: list[Maybe], given: list[Maybe]) -> list[Maybe]:
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
