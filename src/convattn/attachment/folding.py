"""Gates that do not depend on the input, merged into the weights beside them and removed."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import nn

from convattn import checks, tables
from convattn.attachment import effects
from convattn.attachment.attaching import attached, remove
from convattn.attachment.movement import Movement, over_images, over_probes
from convattn.attachment.wrapper import Attached, AttachedBefore, layer_of
from convattn.errors import DataError, InvalidOption
from convattn.nn.base import Update

# of a gate in float64
CONSTANT = 1e-9
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)

Allow = Callable[["Fold"], bool] | Collection[str] | None


@dataclass(frozen=True)
class Fold:
    """What was found at one site.

    Attributes:
        name: of the site.
        attention: what stands there.
        deviation: the largest distance of the gate from its mean over inputs (and positions), for any channel.
        change_points: of the accuracy, in percentage points, when this gate alone is replaced by its mean; None without
            labels.
        agreement: the share of predictions that stay the same then; None without data.
        folded: whether it was merged and removed.
        reason: why not.
    """

    name: str
    attention: str
    deviation: float
    change_points: float | None = None
    agreement: float | None = None
    folded: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Folds:
    """What `fold` found and did, site by site; print it to see it.

    `accuracy` is that before and after, from 0 to 1; None without labels.
    """

    sites: tuple[Fold, ...]
    accuracy: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[Fold]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def folded(self) -> list[str]:
        """The names of the sites that were merged."""
        return [one.name for one in self.sites if one.folded]

    def __str__(self) -> str:
        rows = [("site", "attention", "deviation", "accuracy", "same", "result")]
        for one in self.sites:
            change = "" if one.change_points is None else f"{one.change_points:+.2f}"
            same = "" if one.agreement is None else f"{100 * one.agreement:.1f} %"
            result = "folded" if one.folded else f"kept: {one.reason}"
            rows.append((one.name, one.attention, f"{one.deviation:.2g}", change, same, result))
        lines = tables.aligned(rows, "<<>>><")
        if self.accuracy is not None:
            before, after = (100 * value for value in self.accuracy)
            lines.append(f"accuracy: {before:.2f} % before, {after:.2f} % after")
        return "\n".join(lines)


def fold(model: nn.Module, data: Any = None, tolerance: float = 0.01, *, allow: Allow = None) -> Folds:
    """Merge gates that are constant into the convolution or norm beside them, in place, and remove them.

    A module that adds to the map is removed where its `strength` is 0, and kept otherwise.

    Without data, a gate counts as constant if it is the same for maps of all magnitudes, as one with `strength` 0 or
    with a zero weight is; the network computes the same then, but for rounding (1e-6 relative). With data, a gate that
    moves by no more than the tolerance counts as constant and is replaced by its mean; each is reported with the change
    in accuracy that it causes alone. In squeeze-and-excitation networks the gates of the last stage are known for it
    (Hu et al., CVPR 2018, arXiv:1709.01507, section 7.2 of the journal version).

    Args:
        model: a network with attention; it is run in eval mode.
        data: a batch of images, a tuple of a batch and its labels, or an iterable of either.
        tolerance: the largest distance of a gate from its mean, for any channel, position and image.
        allow: which of the nearly constant gates may be folded: their names, or a predicate over `Fold`; None for all,
            `()` for none, which only reports.

    Raises:
        InvalidOption: a tolerance out of its range, or a name in `allow` that is no site.
        DataError: no images, or a network that gives no scores of classes for them.

    Example:
        >>> from convattn import attach, networks
        >>> network = attach(networks.resnet20(), "se")
        >>> len(fold(network).folded)
        9
    """
    checks.between("fold", "tolerance", tolerance, 0, inf)
    sites = dict(attached(model))
    if allow is not None and not callable(allow):
        unknown = [name for name in allow if name not in sites]
        if isinstance(allow, str) or unknown:
            raise InvalidOption(f"fold: allow must name sites with attention, {', '.join(sites)}; got {allow!r}.")
    batches = None if data is None else _batches(data)
    before = None if batches is None else _predictions(model, batches)
    gates = over_probes(sites) if batches is None else over_images(sites, lambda: _predictions(model, batches))
    limit = CONSTANT if batches is None else tolerance
    report = []
    for name, wrapper in sites.items():
        found = _judged(model, name, wrapper, gates.get(name), limit)
        if not found.reason and batches is not None and before is not None:
            found = _with_change(found, model, wrapper, gates.get(name), batches, before)
        if not found.reason:
            allowed = allow is None or (allow(found) if callable(allow) else name in allow)
            found = _changed(found, folded=True) if allowed else _changed(found, reason="not allowed")
        report.append(found)
    for one in report:
        if one.folded:
            _merge(sites[one.name], gates[one.name].mean if one.name in gates else None)
            remove(model, one.name)
    if batches is None or before is None or before.labels is None:
        return Folds(tuple(report))
    return Folds(tuple(report), (before.accuracy, _predictions(model, batches).accuracy))


@dataclass(frozen=True)
class _Predictions:
    classes: torch.Tensor
    labels: torch.Tensor | None

    @property
    def accuracy(self) -> float:
        return float("nan") if self.labels is None else float((self.classes == self.labels).double().mean())


def _judged(model: nn.Module, name: str, wrapper: Attached, gate: Movement | None, limit: float) -> Fold:
    if gate is None:
        silent = _is_silent(wrapper.attention)
        reason = "" if silent else _no_gate(wrapper.attention)
        return Fold(name, wrapper.convattn_site.attention, 0.0 if silent else inf, reason=reason)
    # so that what is no number is not within the limit either
    reason = "" if gate.deviation <= limit else "it depends on the input"
    if not reason and not _is_one(gate.mean):
        reason = _obstacle(model, wrapper)
    return Fold(name, wrapper.convattn_site.attention, gate.deviation, reason=reason)


def _is_silent(attention: nn.Module) -> bool:
    strength = getattr(attention, "strength", None)
    return isinstance(strength, torch.Tensor) and not strength.any()


def _no_gate(attention: nn.Module) -> str:
    """Why there is nothing to merge where no gate was seen."""
    if isinstance(attention, Update):
        return "what it adds can be merged into no weight"
    return "it was never called" if effects.has_gates(attention) else "it is no gate"


def _is_one(mean: torch.Tensor) -> bool:
    return bool((mean == 1).all())


def _changed(found: Fold, **values: Any) -> Fold:
    return Fold(**{**found.__dict__, **values})


def _with_change(
    found: Fold, model: nn.Module, wrapper: Attached, gate: Movement | None, batches: list[Any], before: _Predictions
) -> Fold:
    """The accuracy with this gate alone replaced by its mean."""
    if gate is None or _is_one(gate.mean):
        return _changed(found, change_points=None if before.labels is None else 0.0, agreement=1.0)
    attention = wrapper.attention
    wrapper._modules["attention"] = _Constant(gate.mean, wrapper.convattn_site.dimensions)
    try:
        now = _predictions(model, batches)
    finally:
        wrapper._modules["attention"] = attention
    change = None if before.labels is None else 100 * (now.accuracy - before.accuracy)
    agreement = float((now.classes == before.classes).double().mean())
    return _changed(found, change_points=change, agreement=agreement)


class _Constant(nn.Module):
    """A gate that does not look at its input."""

    def __init__(self, mean: torch.Tensor, dimensions: int) -> None:
        super().__init__()
        self.mean = mean.reshape(-1, *[1] * dimensions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mean.to(x.device, x.dtype)


def _chain(wrapper: Attached) -> list[nn.Module]:
    """The wrapped layer, and of a sequence the one next to the gate, whose weights the gate is merged into."""
    layer = layer_of(wrapper)
    chain = [layer]
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[0 if isinstance(wrapper, AttachedBefore) else len(layer) - 1]
        chain.append(layer)
    return chain


def _obstacle(model: nn.Module, wrapper: Attached) -> str:
    """Why the weights beside a gate cannot take it; empty if they can."""
    chain = _chain(wrapper)
    layer = chain[-1]
    if type(wrapper) not in (Attached, AttachedBefore):
        return "it does not stand on the map of one layer"
    kinds = (*CONVOLUTIONS, nn.Linear) if isinstance(wrapper, AttachedBefore) else (*CONVOLUTIONS, nn.Linear, *NORMS)
    # by exact type: a subclass may do more than scale, such as normalise its weights or apply an activation
    if type(layer) not in kinds:
        return f"its layer is a {type(layer).__name__}, which cannot take it"
    if any(one._forward_hooks or one._forward_pre_hooks for one in chain):
        return f"hooks work on its {type(layer).__name__}"
    if not isinstance(layer._parameters.get("weight"), torch.Tensor):
        return f"its {type(layer).__name__} has no weight of its own"
    if isinstance(layer, nn.LayerNorm) and layer.weight.dim() != 1:
        return "its norm scales positions, not channels"
    own = {id(one) for one in layer._parameters.values()}
    others = [one for one in model.modules() if one is not layer and not isinstance(one, Attached)]
    tied = any(id(one) in own for other in others for one in other._parameters.values() if one is not None)
    # whoever holds the wrapped layer itself holds the wrapper
    held = sum(child is one for one in chain[1:] for other in others for child in other._modules.values())
    return "its weights are used elsewhere as well" if tied or held > len(chain) - 1 else ""


def _merge(wrapper: Attached, mean: torch.Tensor | None) -> None:
    if mean is None or _is_one(mean):
        return
    layer = _chain(wrapper)[-1]
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if weight is None:
        return
    # a gate over positions alone is one number for all channels
    scale = mean.to(weight.device)
    with torch.no_grad():
        if isinstance(wrapper, AttachedBefore):
            groups = getattr(layer, "groups", 1)
            shape = (groups, weight.shape[0] // groups, weight.shape[1], *[1] * (weight.dim() - 2))
            inputs = scale.expand(groups * weight.shape[1]).reshape(groups, 1, weight.shape[1])
            factor = inputs.expand(shape[:3]).reshape(weight.shape[0], weight.shape[1], *shape[3:])
            weight.copy_(weight.double() * factor)
            return
        factor = scale.expand(weight.shape[0])
        weight.copy_(weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.copy_(bias.double() * factor)


def _batches(data: Any) -> list[Any]:
    batches = [data] if isinstance(data, torch.Tensor) or _is_labelled(data) else _listed(data)
    # loaders of images alone give lists of one
    batches = [one[0] if isinstance(one, tuple | list) and len(one) == 1 else one for one in batches]
    good = all((isinstance(one, torch.Tensor) and one.dim() > 2) or _is_labelled(one) for one in batches)
    filled = [one for one in batches if len(one if isinstance(one, torch.Tensor) else one[0])] if good else []
    if not filled:
        raise DataError(
            "fold: data must be a batch of images, a tuple of images and their labels, or an iterable of either, and "
            "have an image."
        )
    return filled


def _listed(data: Any) -> list[Any]:
    return list(data) if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping) else []


def _is_labelled(data: Any) -> bool:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(one, torch.Tensor) for one in data)
        and data[0].dim() > 2
        and data[1].shape == data[0].shape[:1]
    )


def _predictions(model: nn.Module, batches: list[Any]) -> _Predictions:
    modes = {part: part.training for part in model.modules()}
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    classes, labels = [], []
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                x = batch if isinstance(batch, torch.Tensor) else batch[0]
                classes.append(_classes(model, x.to(device)))
                if not isinstance(batch, torch.Tensor):
                    labels.append(batch[1].cpu())
    finally:
        for part, mode in modes.items():
            part.training = mode
    return _Predictions(torch.cat(classes), torch.cat(labels) if len(labels) == len(batches) else None)


def _classes(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    scores = model(x)
    if not isinstance(scores, torch.Tensor) or scores.dim() < 2:
        raise DataError(
            f"fold: with data the network must give the scores of classes, a tensor (B, classes), and "
            f"{type(model).__name__} gives {type(scores).__name__}. The model was not changed."
        )
    return scores.argmax(1).cpu()
