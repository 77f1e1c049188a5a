"""What lies between the passes over a map, in PyTorch's own operators: for kernels that have nothing quicker."""

from typing import Any

import torch
from torch.nn import functional

from convattn.ops import reference
from convattn.ops.gates import ACTIVATIONS, GATE_ACTIVATIONS, Kept, Maybe, Mlp, Tensor, Window, convolve

_aten = torch.ops.aten


def gate_of(mlp: Mlp, kept: Kept) -> Tensor:
    """The gate of an MLP (B, C) again, before it is blended with strength."""
    return GATE_ACTIVATIONS[mlp.gate](kept.logits)


def mlp(mlp: Mlp, pooled: Tensor) -> tuple[Tensor, Kept]:
    """The gate of poolings (pools, B, C), and what is kept."""
    first = functional.linear(pooled, wide(mlp.first), wide(mlp.first_bias))
    # the sum of what a linear layer makes of both poolings is what it makes of their sum, but for the bias
    hidden = ACTIVATIONS[mlp.activation][0](first).sum(0)
    bias = wide(mlp.second_bias)
    if bias is not None and len(pooled) == 2:
        bias = bias + bias
    logits = functional.linear(hidden, wide(mlp.second), bias)
    return GATE_ACTIVATIONS[mlp.gate](logits), Kept(pooled, first, hidden, logits)


def grad_mlp(mlp: Mlp, kept: Any, dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
    """Gradients of the poolings and of the weights and biases."""
    pooled, first, logits = kept.pooled, kept.first, kept.logits
    if mlp.gate == "sigmoid":
        dlogits = _aten.sigmoid_backward(dgate, torch.sigmoid(logits))
    else:
        dlogits = _aten.hardsigmoid_backward(dgate, logits)
    count, batch, channels = pooled.shape
    dhidden = (dlogits @ wide(mlp.second)).expand(first.shape)
    dfirst = ACTIVATIONS[mlp.activation][1](dhidden, first).reshape(count * batch, -1)
    return (dfirst @ wide(mlp.first)).view(pooled.shape), (
        dfirst.t() @ pooled.view(count * batch, channels),
        None if mlp.first_bias is None else dfirst.sum(0),
        dlogits.t() @ kept.hidden,
        None if mlp.second_bias is None else count * dlogits.sum(0),
    )


def window(planes: Tensor, window: Window, strength: Maybe) -> tuple[Tensor, Tensor, Maybe]:
    """`Kernels.window` by PyTorch's own operators."""
    logits = convolve(planes.transpose(0, 1), wide(window.weight)).squeeze(1)
    moments = None
    if window.training and window.mean is not None:
        # in double: what is left of it is small beside its terms
        var, mean = torch.var_mean(logits.double(), correction=0)
        moments = torch.stack([mean, var]).float()
        window = window._replace(mean=moments[0:1], var=moments[1:2])
    gate = torch.sigmoid(_normed(window, logits)[0])
    return reference.blend(gate, wide(strength)), logits, moments


def grad_window(
    planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernels.grad_window` by PyTorch's own operators."""
    normed, standard, deviation = _normed(window, kept.window)
    gate = torch.sigmoid(normed)
    sums = torch.zeros(3, dtype=torch.float64, device=dgate.device)
    if strength is not None:
        sums[2] = (dgate * torch.nan_to_num(gate - 1)).sum(dtype=torch.float64)
        dgate = torch.where(gate.isfinite(), dgate * strength, 0)
    dlogits = _aten.sigmoid_backward(dgate, gate)
    if window.mean is not None:
        sums[0] = (dlogits * standard).sum(dtype=torch.float64)
        sums[1] = dlogits.sum(dtype=torch.float64)
        if window.training:
            count = dlogits.numel()
            dlogits = dlogits - (sums[1] / count).float() - standard * (sums[0] / count).float()
        dlogits = dlogits * deviation
        if window.norm_weight is not None:
            dlogits = dlogits * window.norm_weight
    dplanes, dweight = grad_convolve(planes, wide(window.weight), dlogits)
    return dplanes, dweight, sums.float()


def grad_convolve(planes: Tensor, weight: Tensor, dlogits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the planes (2, B, *spatial) and of the weight of `convolve`."""
    dimensions = planes.dim() - 2
    ones, around = [1] * dimensions, [weight.shape[-1] // 2] * dimensions
    dsummary, dweight, _ = _aten.convolution_backward(
        dlogits.unsqueeze(1),
        planes.transpose(0, 1),
        weight,
        None,
        ones,
        around,
        ones,
        False,
        [0],
        1,
        [True, True, False],
    )
    return dsummary.transpose(0, 1).contiguous(), dweight


def _normed(window: Window, logits: Tensor) -> tuple[Tensor, Maybe, Maybe]:
    """Logits behind the norm, before its weight and bias, and what they were multiplied with for that."""
    if window.mean is None:
        return logits, None, None
    deviation = torch.rsqrt(wide(window.var) + window.eps)
    standard = (logits - wide(window.mean)) * deviation
    normed = standard if window.norm_weight is None else standard * wide(window.norm_weight)
    return normed if window.norm_bias is None else normed + wide(window.norm_bias), standard, deviation


def wide(one: Maybe) -> Maybe:
    """A tensor, or none, in float32."""
    return one if one is None or one.dtype is torch.float32 else one.float()
