"""State dicts of other implementations in, our modules with the same weights out.

A layout is a set of keys. Several implementations share keys and differ in what they compute, and no state dict tells
its activations or pools: where that leaves a choice, the caller decides, or the message names the candidates.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convattn import checks
from convattn.attachment import attach
from convattn.errors import InvalidOption, LayoutError, UnknownName
from convattn.networks import BasicBlock
from convattn.nn import CBAM, ChannelAttention, DualPool, SpatialAttention, SqueezeExcite

State = dict[str, torch.Tensor]
Options = dict[str, Any]

LAYOUTS = ("post", "luuuyi", "moskomule-se", "official-cbam", "timm-se", "timm-cbam", "torchvision-se")

# said by the weights, not by the caller
FIXED = {"bias", "classes", "features", "kernel_size", "norm", "reduction"}


@dataclass(frozen=True)
class Form:
    """One set of keys, the layouts that have it, and what is built from it.

    `keys` maps patterns of their keys to ours; each has to match, `maybe` may. `flat` tells linear layers (True) from
    1x1 convolutions (False) under the same keys. A form that is `only_if_named` is an unusual reading of keys that
    have a usual one. Where the layouts of a form differ in what no weight tells, an option of `decided_by` settles it.
    """

    layouts: tuple[str, ...]
    keys: dict[str, str]
    build: Callable[[State, Options], nn.Module]
    maybe: dict[str, str] = field(default_factory=dict)
    flat: bool | None = None
    only_if_named: bool = False
    decided_by: tuple[str, ...] = ()


def module_from(state_dict: Mapping[str, Any], *, layout: str | None = None, **overrides: Any) -> nn.Module:
    """Build the module that computes what another implementation computes with these weights.

    Layouts: the post's `SELayer`, `ChannelAttention`, `SpatialAttention`, residual block and dual-pooling head
    (`"post"`), both versions of luuuyi/CBAM.PyTorch (`"luuuyi"`), moskomule's SE (`"moskomule-se"`), the official CBAM
    (`"official-cbam"`), timm's SE and CBAM (`"timm-se"`, `"timm-cbam"`) and torchvision's SE (`"torchvision-se"`). A
    prefix that all keys share is taken off. Where the original returns the gate alone, `gate(x)` is what equals it.

    Two 1x1 convolutions without biases are channel attention (mean and max); only `layout="timm-se"` makes them an SE
    (timm's, switched to `bias=False`). The official CBAM is taken with its default pools unless `pools` says otherwise.

    Args:
        state_dict: the state dict of one such module.
        layout: one of the names above; needed where the keys fit several that compute differently.
        **overrides: options of the module that is built, for instance `pools=("mean", "max", "l2", "logsumexp")`,
            `activation="silu"`, `gate_activation="hardsigmoid"`, `start="identity"`. `hidden` may be larger than in the
            weights: the rest is filled with zeros, which computes the same.

    Raises:
        UnknownName: no such layout.
        LayoutError: keys that fit no layout, or not the one that was asked for, or several.
        InvalidOption: an override that the module does not take.

    Example:
        >>> theirs = {"fc.0.weight": torch.randn(4, 64), "fc.2.weight": torch.randn(64, 4)}
        >>> type(module_from(theirs)).__name__
        'SqueezeExcite'
    """
    if layout is not None and layout not in LAYOUTS:
        raise UnknownName(f"module_from: no layout is called {layout!r}. {checks.suggestion(layout, LAYOUTS)}")
    forms, state = _fitting(_tensors(state_dict))
    form = _named(forms, layout) if layout else _decided(forms, overrides)
    for key in {"activation", "gate_activation"} & set(overrides):
        # torch.nn.SiLU and torch.nn.functional.silu are as good as "silu"
        overrides[key] = getattr(overrides[key], "__name__", str(overrides[key])).lower()
    return form.build({_our_key(form, key): value for key, value in state.items()}, overrides)


def _tensors(state_dict: Mapping[str, Any]) -> State:
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    if (
        not isinstance(state_dict, Mapping)
        or not state_dict
        or not all(isinstance(value, torch.Tensor) for value in state_dict.values())
    ):
        raise LayoutError("module_from: expected tensors by name, as from module.state_dict().")
    return {key: value.detach().clone() for key, value in state_dict.items()}


def _fitting(state: State) -> tuple[list[Form], State]:
    """The forms that have these keys, after taking off as much of a common prefix as is needed."""
    rest = state
    while not (forms := [form for form in FORMS if _fits(form, rest)]):
        if len({key.partition(".")[0] for key in rest}) > 1 or not all("." in key for key in rest):
            shown = ", ".join(sorted(state)[:6]) + (", ..." if len(state) > 6 else "")
            raise LayoutError(
                f"module_from: these keys belong to no known layout ({', '.join(LAYOUTS)}): {shown}. Give the state "
                f"dict of one attention module, of a basic residual block without downsample, or of the post's head."
            )
        rest = {key.partition(".")[2]: value for key, value in rest.items()}
    return forms, rest


def _fits(form: Form, state: State) -> bool:
    patterns = {**form.keys, **form.maybe}
    known = all(any(re.fullmatch(pattern, key) for pattern in patterns) for key in state)
    whole = all(any(re.fullmatch(pattern, key) for key in state) for pattern in form.keys)
    if not known or not whole or form.flat is None:
        return known and whole
    return all((value.dim() == 2) == form.flat for key, value in state.items() if key.endswith("weight"))


def _named(forms: list[Form], layout: str) -> Form:
    for form in forms:
        if layout in form.layouts:
            return form
    raise LayoutError(f"module_from: the keys and shapes are not of the layout {layout!r}; they fit {_listed(forms)}.")


def _decided(forms: list[Form], overrides: Options) -> Form:
    if "pools" in overrides:
        # only channel attention has pools to choose
        forms = [form for form in forms if form.build is not _squeeze_excite] or forms
    usual = [form for form in forms if not form.only_if_named] or forms
    form = usual[0]
    if form.decided_by and not any(option in overrides for option in form.decided_by):
        raise LayoutError(
            f"module_from: the keys and shapes fit {_listed(forms)}, which may compute differently. Say which with "
            f"layout=..., or give {' or '.join(f'{option}=...' for option in form.decided_by)}."
        )
    return form


def _listed(forms: list[Form]) -> str:
    return " and ".join(dict.fromkeys(repr(name) for form in forms for name in form.layouts))


def _our_key(form: Form, key: str) -> str:
    patterns = {**form.keys, **form.maybe}
    return next(match.expand(name) for pattern, name in patterns.items() if (match := re.fullmatch(pattern, key)))


def _squeeze_excite(state: State, overrides: Options) -> nn.Module:
    channels, state, options = _bottleneck(state, "", overrides)
    return _loaded(SqueezeExcite, (channels,), options, overrides, state)


def _channel_attention(state: State, overrides: Options) -> nn.Module:
    channels, state, options = _bottleneck(state, "", overrides)
    return _loaded(ChannelAttention, (channels,), options, overrides, state)


def _spatial_attention(state: State, overrides: Options) -> nn.Module:
    # 0.1 is what a batch norm has that nothing was said about
    return _loaded(SpatialAttention, (), {"norm_momentum": 0.1, **_spatial(state, "")}, overrides, state)


def _cbam(state: State, overrides: Options) -> nn.Module:
    channels, state, options = _bottleneck(state, "channel.", overrides)
    options = {"norm_momentum": 0.1, **options, **_spatial(state, "spatial.")}
    return _loaded(CBAM, (channels,), options, overrides, state)


def _official(build: Callable[[State, Options], nn.Module], prefix: str) -> Callable[[State, Options], nn.Module]:
    def official(state: State, overrides: Options) -> nn.Module:
        # their spatial convolution reads the maximum first
        flipped = {**state, f"{prefix}conv.weight": state[f"{prefix}conv.weight"].flip(1)}
        return build(flipped, {"norm_momentum": 0.01, **overrides})

    return official


def _block(state: State, overrides: Options) -> nn.Module:
    gates = {key: value for key, value in state.items() if key.startswith(("channel.", "spatial."))}
    rest = {key: value for key, value in state.items() if key not in gates}
    gate = _cbam(gates, overrides)
    channels = rest["conv1.weight"].shape[0]
    for name in ("conv1.weight", "conv2.weight"):
        if rest[name].shape != (channels, channels, 3, 3):
            raise LayoutError(
                f"module_from: a residual block is taken with two 3x3 convolutions of equal width; {name} has the "
                f"shape {tuple(rest[name].shape)}, expected {(channels, channels, 3, 3)}."
            )
    block = BasicBlock(channels, channels).to(rest["conv1.weight"].dtype)
    _load(block, rest)
    attach(block, "cbam", start="paper")
    block.get_submodule("bn2").attention = gate
    return block


def _dual_pool(state: State, overrides: Options) -> nn.Module:
    state["reduce.weight"] = _flat(state, "reduce.weight")
    features, channels = state["reduce.weight"].shape[0], state["reduce.weight"].shape[1] // 2
    # the post drops out half
    options = {"features": features, "classes": state["classifier.weight"].shape[0], "dropout": 0.5}
    return _loaded(DualPool, (channels,), options, overrides, state)


def _bottleneck(state: State, prefix: str, overrides: Options) -> tuple[int, State, Options]:
    """Channels, weights as of linear layers, and options of the two layers of an SE or a channel MLP."""
    first, second = f"{prefix}fc1", f"{prefix}fc2"
    dimensions = state[f"{first}.weight"].dim() - 2 or 2
    state[f"{first}.weight"], state[f"{second}.weight"] = (
        _flat(state, f"{first}.weight"),
        _flat(state, f"{second}.weight"),
    )
    given, channels = state[f"{first}.weight"].shape
    hidden = overrides.get("hidden", given)
    if "hidden" in overrides:
        checks.positive("module_from", "hidden", hidden)
    if given == 0 and "hidden" not in overrides:
        raise LayoutError(
            f"module_from: the hidden width is 0 (more reduction than the {channels} channels allow), so that the "
            f"original multiplies everything by one half; hidden=1 gives a module that computes the same."
        )
    if hidden < given:
        raise LayoutError(f"module_from: the weights have a hidden width of {given}, hidden={hidden} is less.")
    more = hidden - given
    state[f"{first}.weight"] = nn.functional.pad(state[f"{first}.weight"], (0, 0, 0, more))
    state[f"{second}.weight"] = nn.functional.pad(state[f"{second}.weight"], (0, more))
    bias = f"{first}.bias" in state
    if bias:
        state[f"{first}.bias"] = nn.functional.pad(state[f"{first}.bias"], (0, more))
    return channels, state, {"hidden": hidden, "bias": bias, "dimensions": dimensions}


def _flat(state: State, key: str) -> torch.Tensor:
    if state[key].dim() > 2 and max(state[key].shape[2:]) > 1:
        raise LayoutError(f"module_from: {key} has the shape {tuple(state[key].shape)}, expected a 1x1 convolution.")
    return state[key].flatten(1) if state[key].dim() > 2 else state[key]


def _spatial(state: State, prefix: str) -> Options:
    weight = state[f"{prefix}conv.weight"]
    if weight.shape[:2] != (1, 2):
        raise LayoutError(
            f"module_from: the spatial convolution has the shape {tuple(weight.shape)}, expected (1, 2, k, ...): one "
            f"over the average of mean and maximum (timm's light CBAM) is another module."
        )
    norm = "batch" if f"{prefix}norm.weight" in state else None
    return {"kernel_size": weight.shape[-1], "dimensions": weight.dim() - 2, "norm": norm}


def _loaded(
    cls: type[nn.Module], args: tuple[int, ...], options: Options, overrides: Options, state: State
) -> nn.Module:
    open_options = set(inspect.signature(cls).parameters) - FIXED - {"channels"}
    refused = sorted(set(overrides) - open_options)
    if refused:
        raise InvalidOption(
            f"module_from: {refused[0]} cannot be set for this {cls.__name__}; what can be: "
            f"{', '.join(sorted(open_options))}."
        )
    module = cls(*args, **{**options, **overrides})
    module.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    _load(module, state)
    return module


def _load(module: nn.Module, state: State) -> None:
    own = {
        key: value for key, value in module.state_dict().items() if key.endswith(("num_batches_tracked", "strength"))
    }
    try:
        module.load_state_dict({**own, **state})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise LayoutError(
            f"module_from: the tensors do not fit together as a {type(module).__name__}: {reason}"
        ) from error


_NORM = "(weight|bias|running_mean|running_var|num_batches_tracked)"
_LINEAR = "(weight|bias)"
_RESIDUAL = {
    r"(conv[12])\.weight": r"\1.weight",
    rf"(bn[12])\.{_NORM}": r"\1.\2",
    r"sa\.conv1\.weight": "spatial.conv.weight",
}
_MLP = {r"fc1\.weight": "fc1.weight", r"fc2\.weight": "fc2.weight"}
_MLP_BIASED = {r"fc1\.weight": "fc1.weight", r"fc2\.weight": "fc2.weight", r"(fc[12])\.bias": r"\1.bias"}
_MLP_NUMBERED = {r"fc\.0\.weight": "fc1.weight", r"fc\.2\.weight": "fc2.weight"}
_OFFICIAL_MLP = {rf"mlp\.1\.{_LINEAR}": r"fc1.\1", rf"mlp\.3\.{_LINEAR}": r"fc2.\1"}
_SPATIAL_POST = {r"sa\.conv1\.weight": "spatial.conv.weight"}


def _below(theirs: str, ours: str, keys: dict[str, str]) -> dict[str, str]:
    return {rf"{theirs}\.{pattern}": f"{ours}.{name}" for pattern, name in keys.items()}


_CHANNEL_POST = _below("ca", "channel", _MLP)
_CHANNEL_LUUUYI = _below("ca", "channel", _MLP_NUMBERED)
_OFFICIAL_SPATIAL = {r"spatial\.conv\.weight": "conv.weight"}
_OFFICIAL_NORM = {rf"spatial\.bn\.{_NORM}": r"norm.\1"}
_TIMM_SPATIAL = {r"conv\.conv\.weight": "conv.weight", rf"conv\.bn\.{_NORM}": r"norm.\1"}

FORMS = (
    Form(("post", "moskomule-se"), _MLP_NUMBERED, _squeeze_excite, flat=True),
    Form(("luuuyi",), _MLP_NUMBERED, _channel_attention, flat=False),
    Form(("post", "luuuyi", "timm-cbam"), _MLP, _channel_attention, flat=False),
    Form(("timm-se",), _MLP, _squeeze_excite, flat=False, only_if_named=True),
    Form(
        ("timm-se", "torchvision-se"),
        _MLP_BIASED,
        _squeeze_excite,
        flat=False,
        decided_by=("activation", "gate_activation"),
    ),
    Form(("timm-cbam",), _MLP_BIASED, _channel_attention, flat=False, only_if_named=True),
    Form(("post", "luuuyi"), {r"conv1\.weight": "conv.weight"}, _spatial_attention),
    Form(("post", "luuuyi"), {**_CHANNEL_POST, **_SPATIAL_POST}, _cbam),
    Form(("luuuyi",), {**_CHANNEL_LUUUYI, **_SPATIAL_POST}, _cbam),
    Form(("post", "luuuyi"), {**_CHANNEL_POST, **_RESIDUAL}, _block),
    Form(("luuuyi",), {**_CHANNEL_LUUUYI, **_RESIDUAL}, _block),
    Form(
        ("post",),
        {rf"reduce_layer\.{_LINEAR}": r"reduce.\1", rf"fc\.1\.{_LINEAR}": r"classifier.\1"},
        _dual_pool,
    ),
    Form(("official-cbam",), _OFFICIAL_MLP, _channel_attention, flat=True),
    Form(("official-cbam",), _OFFICIAL_SPATIAL, _official(_spatial_attention, ""), maybe=_OFFICIAL_NORM),
    Form(
        ("official-cbam",),
        {**_below("ChannelGate", "channel", _OFFICIAL_MLP), **_below("SpatialGate", "spatial", _OFFICIAL_SPATIAL)},
        _official(_cbam, "spatial."),
        maybe=_below("SpatialGate", "spatial", _OFFICIAL_NORM),
    ),
    Form(("timm-cbam",), _TIMM_SPATIAL, _spatial_attention),
    Form(
        ("timm-cbam",),
        {**_below("channel", "channel", _MLP), **_below("spatial", "spatial", _TIMM_SPATIAL)},
        _cbam,
        maybe={r"channel\.(fc[12])\.bias": r"channel.\1.bias"},
    ),
)
