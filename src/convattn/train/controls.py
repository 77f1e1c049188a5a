"""Controls: networks that have everything of a variant but its idea.

placebo:cbam  the same module at the same sites, what it does computed from a map of ones
adapter:cbam  at the same sites an ungated bottleneck with as many parameters
wider:cbam    no module, and a network with as many parameters by its width
noise         the baseline itself, to be trained with other seeds
"""

from typing import Any

import torch
from torch import nn

from convattn import networks, ops
from convattn.attachment import Attached, Blended, BlendedHead, attached, effects, plan
from convattn.errors import InvalidOption
from convattn.nn.cbam import CONVOLUTIONS

PLACEBO, ADAPTER, WIDER, NOISE = "placebo", "adapter", "wider", "noise"
KINDS = (PLACEBO, ADAPTER, WIDER, NOISE)


def parts(name: str) -> tuple[str | None, str]:
    """The kind of a control and the variant that it is of: `("adapter", "cbam")`; of any other name no kind and itself.

    The noise is of no variant.
    """
    if name == NOISE:
        return NOISE, ""
    kind, _, of = name.partition(":")
    return (kind, of) if of and kind in KINDS else (None, name)


def exchange(network: nn.Module, kind: str, variant: str) -> None:
    """Put the control in the place of each module of a variant that was attached to a network, in place.

    Where a module has no parameters, there is nothing to control for, and it stays.

    Raises:
        InvalidOption: no module has parameters.
    """
    sites = [wrapper for _, wrapper in attached(network) if size(wrapper.attention)]
    if not sites:
        raise InvalidOption(
            f"compare: {kind} is a control for modules that learn, and {variant!r} has no parameters; take it out of "
            f"the variants or {kind} out of the controls."
        )
    for wrapper in sites:
        wrapper.attention = Placebo(wrapper.attention) if kind == PLACEBO else _adapter(wrapper)


def wider(about: dict[str, Any], variant: str, *, weights: str | None = None) -> nn.Module:
    """The network that `about` describes without attention, as wide as its parameters with the variant come to.

    Raises:
        InvalidOption: it has no option for its width, or weights that have another.
    """
    if weights is not None:
        raise InvalidOption(
            "compare: wider is a control for random weights, since loaded ones fit one width only; the control "
            "adapter has the variant's number of parameters and works with loaded weights."
        )
    side, classes = about["image_size"], len(about["classes"])
    with torch.random.fork_rng(devices=[]):
        plain = networks.create(about["backbone"], classes=classes)
        sites = plan(plain, variant, example=torch.zeros(1, 3, side, side), start=about["start"])
    parameters = sum(one.numel() for one in plain.parameters()) + sum(site.parameters for site in sites)
    try:
        return networks.wider(about["backbone"], classes=classes, parameters=parameters)
    except InvalidOption as error:
        raise InvalidOption(
            f"compare: there is no wider network of the size of {variant!r}. {error} The control adapter has the "
            f"variant's number of parameters and works for every network."
        ) from error


class Placebo(nn.Module):
    """A module that is shown ones in place of the map, and whose effect on them is applied to the map.

    It has as many parameters to learn, and what it does is the same for every image. Where no hidden unit of a
    bottleneck answers to ones, as half of all single units without bias do not, nothing is learned there, and what it
    does stays as it began.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def strength(self) -> nn.Parameter | None:
        """The module's own."""
        return self.module.strength  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, *pooled: torch.Tensor) -> torch.Tensor:
        """Of a gate the gated map, else what the module adds to ones, added to the map or to the pooled vector."""
        ones = [torch.ones_like(one) for one in (x, *pooled)]
        if effects.has_gates(self.module):
            for gate in effects.gates(self.module, ones[0]).values():
                x = ops.apply_gate(x, effects.per_channel(gate, x))
            return x
        before: torch.Tensor = (x, *pooled)[-1]
        after: torch.Tensor = self.module(*ones)
        return before + (after - ones[-1])


class Adapter(nn.Module):
    """An ungated bottleneck beside the identity: y = x + W2 relu(W1 x), with about that many parameters.

    Biases are there or not, as the number of parameters demands.

    Args:
        channels: of the map.
        parameters: the hidden width, at least 1, is the one that comes nearest.
        dimensions: spatial dimensions of the map.
        zero: whether W2 begins with zeros, so that y is x at first; otherwise something else has to see to that.
    """

    def __init__(self, channels: int, parameters: int, *, dimensions: int, zero: bool) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        hidden, inner_bias, outer_bias = bottleneck(channels, parameters)
        self.down = convolution(channels, hidden, 1, bias=inner_bias)
        self.up = convolution(hidden, channels, 1, bias=outer_bias)
        if zero:
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map to one of the same shape."""
        return x + self.up(torch.relu(self.down(x)))  # type: ignore[no-any-return]


class AdapterHead(Adapter):
    """An adapter on the map that is pooled, and the mean of its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map (B, C, *spatial) to a vector (B, C)."""
        return ops.squeeze(super().forward(x), "mean")


def size(module: nn.Module) -> int:
    """The number of parameters, without the `strength` that every module at an identity start has."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name != "strength")


def bottleneck(channels: int, parameters: int) -> tuple[int, bool, bool]:
    """The hidden width of two 1x1 convolutions, and whether the inner and the outer one have biases.

    Of all, those whose number of parameters is nearest.

    Example:
        >>> bottleneck(64, 2 * 64 * 4), bottleneck(64, 2 * 64 * 4 + 64 + 3)
        ((4, False, False), (4, True, True))
    """
    found = []
    for inner_bias in (False, True):
        for outer_bias in (False, True):
            each, once = 2 * channels + inner_bias, channels * outer_bias
            hidden = max(1, round((parameters - once) / each))
            found.append((abs(hidden * each + once - parameters), hidden, inner_bias, outer_bias))
    return min(found)[1:]


def _adapter(wrapper: Attached) -> nn.Module:
    """An adapter in place of a site's module, with the same start, device and dtype."""
    old, place = wrapper.attention, wrapper.convattn_site.found
    start = "paper" if old.strength is None else "identity"
    # a strength of 0 in front of zeros would never learn
    kind = AdapterHead if isinstance(old, BlendedHead) else Adapter
    adapter = kind(place.channels, size(old), dimensions=len(place.size), zero=start == "paper")
    new: nn.Module
    if isinstance(old, BlendedHead):
        new = BlendedHead(adapter, width=place.width, features=place.channels, start=start)
    else:
        new = Blended(adapter, start=start)
    like = next(old.parameters())
    return new.to(like.device, like.dtype).train(old.training)
