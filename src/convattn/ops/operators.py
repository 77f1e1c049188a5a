"""The gating as operators of PyTorch, `convattn::gated` and `convattn::gated_backward`, for torch.compile.

Eager code calls `fused` itself, which takes less time. A compiler sees two operators that it cannot look into, with
what they return for given shapes and with their gradient. What is absent is an empty tensor.
"""

from typing import Any

import torch

from convattn.ops import cpu, fused
from convattn.ops.gates import Gates, Kept, Mlp, Window, shapes_kept

Tensor = torch.Tensor
Maybe = Any


@torch.library.custom_op("convattn::gated", mutates_args=())
def gated(
    x: Tensor,
    strength: Tensor | None,
    shortcut: Tensor | None,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    pools: str,
    activation: str,
    gate: str,
    training: bool,
    eps: float,
    parallel: bool,
) -> list[Tensor]:
    """The gated map, mean and variance of the logits in training, and `gates.Kept`."""
    tensors = (first, first_bias, second, second_bias, weight, norm_weight, norm_bias)
    gates = _gates(tensors, (mean, var), pools, activation, gate, training, eps, parallel)
    x = fused.dense(x)
    shortcut = None if shortcut is None else fused.like(shortcut, x)
    strength = None if strength is None else fused.written(strength)
    with torch.no_grad():
        y, moments, kept, _ = fused.forward(cpu.Kernels, x, gates, strength, shortcut)
    # what lies in one piece of memory, operators may not return
    return [y, _present(moments), *(_present(one).clone() for one in cpu.Kernels(x).apart(kept, gates))]


@gated.register_fake
def _(x: Tensor, strength: Maybe, shortcut: Maybe, first: Maybe, *rest: Any) -> list[Tensor]:
    weight, mean, pools, training = rest[3], rest[6], rest[8], rest[11]
    nothing = (0,)
    count, width = (0, 0) if first is None else (len(pools.split(",")), first.shape[0])
    shapes = shapes_kept(x.shape, count, width, weight is not None)
    moments = (2,) if training and mean is not None else nothing
    small = [moments, *(shapes.get(name, nothing) for name in Kept._fields)]
    return [torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in small)]


@torch.library.custom_op("convattn::gated_backward", mutates_args=())
def gated_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    strength: Tensor | None,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: list[Tensor],
    pools: str,
    activation: str,
    gate: str,
    training: bool,
    eps: float,
    parallel: bool,
    needs_map: bool,
) -> list[Tensor]:
    """Gradients of the map, of the shortcut where there is y, of the strength, and of what the gates are made of."""
    tensors = (first, first_bias, second, second_bias, weight, norm_weight, norm_bias)
    gates = _gates(tensors, (mean, var), pools, activation, gate, training, eps, parallel)
    x = fused.dense(x)
    dy = fused.like(dy, x)
    strength = None if strength is None else fused.written(strength)
    if y is not None:
        dy = torch.ops.aten.threshold_backward(dy, fused.like(y, x), 0)
    found = Kept(*(one if one.numel() else None for one in kept))
    with torch.no_grad():
        dx, dstrength, grads = fused.backward(cpu.Kernels, x, dy, gates, strength, found, needs_map)
    every = [dx, dy if y is not None else None, dstrength if strength is not None else None, *grads]
    wanted = (x, x, strength, *tensors)
    return [
        _present(one).to(as_.dtype).clone() if as_ is not None else _present(None)
        for one, as_ in zip(every, wanted, strict=True)
    ]


@gated_backward.register_fake
def _(dy: Tensor, x: Tensor, y: Maybe, strength: Maybe, *rest: Any) -> list[Tensor]:
    nothing = x.new_empty(0, dtype=torch.float32)
    dx = torch.empty_like(x) if rest[-1] else x.new_empty(0)
    shortcut = x.new_empty(0) if y is None else torch.empty_like(x)
    return [dx, shortcut, *(nothing.clone() if one is None else torch.empty_like(one) for one in (strength, *rest[:7]))]


def _kept(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, strength, shortcut, *rest = inputs
    ctx.options = rest[9:]
    running = rest[7:9] if output[1].numel() == 0 else (output[1][0:1], output[1][1:2])
    ctx.save_for_backward(x, output[0] if shortcut is not None else None, strength, *rest[:7], *running, *output[2:])


def _gradient(ctx: Any, grads: list[Maybe]) -> tuple[Any, ...]:
    x, y, strength, *rest = ctx.saved_tensors
    found = gated_backward(grads[0], x, y, strength, *rest[:9], list(rest[9:]), *ctx.options, ctx.needs_input_grad[0])
    dx, dshortcut, dstrength, *dtensors = (one if one.numel() else None for one in found)
    return (dx, dstrength, dshortcut, *dtensors, None, None, *[None] * len(ctx.options))


gated.register_autograd(_gradient, setup_context=_kept)


def call(x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe) -> tuple[Tensor, Maybe]:
    """What `fused.gated` computes, as an operator."""
    mlp, window = gates.channel, gates.spatial
    options = (",".join(mlp.pools) if mlp else "", mlp.activation if mlp else "", mlp.gate if mlp else "")
    running = (window.mean, window.var) if window else (None, None)
    norm = (window.training, window.eps) if window else (False, 0.0)
    found = gated(x, strength, shortcut, *gates.tensors(), *running, *options, *norm, gates.parallel)
    trained = window is not None and window.training and window.mean is not None
    return found[0], found[1] if trained else None


def _gates(
    tensors: tuple[Maybe, ...],
    running: tuple[Maybe, ...],
    pools: str,
    activation: str,
    gate: str,
    training: bool,
    eps: float,
    parallel: bool,
) -> Gates:
    tensors = tuple(None if one is None else fused.written(one) for one in tensors)
    running = tuple(None if one is None else fused.written(one) for one in running)
    mlp = Mlp(tuple(pools.split(",")), activation, gate, *tensors[:4]) if tensors[0] is not None else None
    window = Window._make((*tensors[4:], *running, training, eps, None, None)) if tensors[4] is not None else None
    return Gates(mlp, window, parallel)


def _present(one: Maybe) -> Tensor:
    return torch.empty(0) if one is None else one
