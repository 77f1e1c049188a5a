"""State dicts of other implementations in, our modules with the same weights out.

A layout is a set of keys. Several implementations share keys and differ in what they compute, and no state dict tells
its activations or pools: where that leaves a choice, the caller decides, or the message names the candidates.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import takewhile
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

LAYOUTS = (
    "post",
    "luuuyi",
    "moskomule-se",
    "insightface-se",
    "official-cbam",
    "timm-se",
    "timm-cbam",
    "torchvision-se",
)

# said by the weights, not by the caller
FIXED = {"bias", "channels", "classes", "features", "kernel_size", "norm", "reduction"}
# in which our modules compute
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# a state dict with more is that of a network; a residual block, the largest of the layouts, has 15
MOST_KEYS = 64
BATCHES = "num_batches_tracked"


@dataclass(frozen=True)
class Form:
    """One set of keys, the layouts that have it, and what is built from it.

    `keys` maps their keys to ours; those of `maybe` are there all or not at all; counts of batches may be there. `flat`
    tells linear layers (True) from 1x1 convolutions (False) under the same keys. Where forms have the same keys and
    shapes, the caller names a layout, or gives an option that only one of them takes or that is in its `decided_by`.
    """

    layouts: tuple[str, ...]
    keys: dict[str, str]
    build: Callable[[State, Options], nn.Module]
    maybe: dict[str, str] = field(default_factory=dict)
    flat: bool | None = None
    decided_by: tuple[str, ...] = ()


class _WrongShape(Exception):
    """A tensor, by our key, that has another shape than the module that is built."""

    def __init__(self, key: str, expected: object) -> None:
        super().__init__(key, expected)
        self.key, self.expected = key, expected


def module_from(state_dict: Mapping[str, Any], *, layout: str | None = None, **overrides: Any) -> nn.Module:
    """Build the module that computes what another implementation computes with these weights.

    Layouts: the post's `SELayer`, `ChannelAttention`, `SpatialAttention`, residual block and dual-pooling head
    (`"post"`), both versions of luuuyi/CBAM.PyTorch (`"luuuyi"`), moskomule's SE (`"moskomule-se"`), the SE of face
    recognition and FastReID (`"insightface-se"`), the official CBAM (`"official-cbam"`), timm's SE and CBAM
    (`"timm-se"`, `"timm-cbam"`) and torchvision's SE (`"torchvision-se"`). A prefix that all keys share is taken off.
    Where the original returns the gate alone, `gate(x)` is what equals it.

    Two 1x1 convolutions called `fc1` and `fc2` may be an SE or channel attention: give `layout`, or an option that only
    one of them takes, `gate_activation` (SE) or `pools` (channel attention); with biases, `activation` means an SE too.
    Keys with one well-known owner are read as its own: linear layers `fc.0` and `fc.2` are the SE of the post and of
    moskomule, 1x1 convolutions under these names luuuyi's channel attention, and `conv1` is spatial attention over
    (mean, max). The official CBAM is taken with its default pools unless `pools` says otherwise.

    Args:
        state_dict: the state dict of one such module.
        layout: one of the names above; needed where the keys fit several that compute differently.
        **overrides: options of the module that is built, for instance `pools=("mean", "max", "l2", "logsumexp")`,
            `activation="silu"`, `gate_activation="hardsigmoid"`, `start="identity"`. `hidden` may be larger than in the
            weights: the rest is filled with zeros, which computes the same.

    Raises:
        UnknownName: no such layout.
        LayoutError: keys or shapes that fit no layout, or not the one that was asked for, or several; or tensors that
            are not plain ones of one floating-point dtype. It names the nearest layout and the first fault.
        InvalidOption: an override that the module does not take.

    Example:
        >>> theirs = {"fc.0.weight": torch.randn(4, 64), "fc.2.weight": torch.randn(64, 4)}
        >>> type(module_from(theirs)).__name__
        'SqueezeExcite'
    """
    if layout is not None and layout not in LAYOUTS:
        raise UnknownName(f"module_from: no layout is called {layout!r}. {checks.suggestion(layout, LAYOUTS)}")
    forms, theirs = _matched(_tensors(state_dict), layout)
    for key in {"activation", "gate_activation"} & set(overrides):
        # torch.nn.SiLU and torch.nn.functional.silu are as good as "silu"
        overrides[key] = getattr(overrides[key], "__name__", str(overrides[key])).lower()
    # forms of the same keys have the same names for them
    names = {_our_key({**forms[0].keys, **forms[0].maybe}, key): key for key in theirs}
    state = {ours: theirs[key] for ours, key in names.items()}
    try:
        return _decided(forms, state, overrides).build(state, overrides)
    except _WrongShape as wrong:
        key = names[wrong.key]
        raise LayoutError(
            f"module_from: the nearest layout is {_listed(forms)}, but {key} has the shape "
            f"{tuple(theirs[key].shape)}, expected {wrong.expected}."
        ) from None


def _tensors(state_dict: Mapping[str, Any]) -> State:
    """Copies of the tensors in a state dict, after each was seen to be one that our modules compute with."""
    expected = "expected tensors by name, as from module.state_dict()"
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise LayoutError(f"module_from: {expected}.")
    if len(state_dict) > MOST_KEYS:
        raise LayoutError(
            f"module_from: {len(state_dict)} tensors are more than any layout has ({', '.join(LAYOUTS)}). Give the "
            f"state dict of one attention module, not of a network."
        )
    dtypes: dict[torch.dtype, str] = {}
    for key, value in state_dict.items():
        if fault := _fault(key, value):
            raise LayoutError(f"module_from: {fault}; {expected}.")
        if not key.endswith(BATCHES):
            dtypes.setdefault(value.dtype, key)
    if len(dtypes) > 1:
        said = " and ".join(f"{checks.quoted(key)} is {dtype}" for dtype, key in dtypes.items())
        raise LayoutError(f"module_from: {said}; convert them to one dtype.")
    return {key: value.detach().clone() for key, value in state_dict.items()}


def _fault(key: Any, value: Any) -> str | None:
    """What makes an entry of a state dict unusable, whatever its name and shape; None where nothing does."""
    if not isinstance(key, str):
        return f"a key is of type {type(key).__name__}"
    if type(value) not in (torch.Tensor, nn.Parameter):
        return f"{checks.quoted(key)} is of type {type(value).__name__}"
    if value.is_quantized or value.is_nested or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else value.layout
        return f"{checks.quoted(key)} is not a plain dense tensor ({kind})"
    if value.is_meta or (value.numel() and not value.untyped_storage().nbytes()):
        return f"{checks.quoted(key)} has no values (device {value.device})"
    counts = key.endswith(BATCHES) and value.dtype == torch.int64
    if value.dtype not in DTYPES and not counts:
        return f"{checks.quoted(key)} is {value.dtype}, not one of {', '.join(map(str, DTYPES))}"
    return None


def _matched(state: State, layout: str | None) -> tuple[list[Form], State]:
    """The forms that have these keys, after taking off as much of a common prefix as is needed."""
    readings = list(_readings(state))
    wanted = [form for form in FORMS if layout is None or layout in form.layouts]
    for rest in readings:
        forms = [form for form in FORMS if not _faults(form, rest)]
        if of_layout := [form for form in forms if form in wanted]:
            return of_layout, rest
        if forms:
            raise LayoutError(
                f"module_from: the keys and shapes are not of the layout {layout!r}; they fit {_listed(forms)}."
                f"{_nearest(wanted, readings)}"
            )
    shown = ", ".join(checks.quoted(key) for key in sorted(state)[:6]) + (", ..." if len(state) > 6 else "")
    raise LayoutError(
        f"module_from: these keys belong to no known layout ({', '.join(LAYOUTS)}): {shown}."
        f"{_nearest(wanted, readings)} Give the state dict of one attention module, of a basic residual block without "
        f"downsample, or of the post's head."
    )


def _readings(state: State) -> Iterator[State]:
    """The state dict without the first names of all keys, as many of them as they share, from none on."""
    names = [key.split(".") for key in state]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False)))
    most = min(shared, min(map(len, names)) - 1)
    # no key of a layout has more than four names
    for taken in range(max(0, most - 8), most + 1):
        yield {".".join(parts[taken:]): value for parts, value in zip(names, state.values(), strict=True)}


def _faults(form: Form, state: State) -> list[str]:
    """Why these are not the keys of the form: what is missing, what is not of it, linear layers for convolutions."""
    maybe = form.maybe if any(_our_key(form.maybe, key) for key in state) else {}
    names = {**form.keys, **maybe}
    faults = [f"{key!r} is missing" for key in names if key not in state]
    for key, value in state.items():
        if not _our_key(names, key):
            faults.append(f"{checks.quoted(key)} is not of it")
        elif form.flat is not None and key.endswith("weight") and not _is_layer(value, form.flat):
            layer = "linear layer" if form.flat else "1x1 convolution"
            faults.append(f"{key} has the shape {tuple(value.shape)}, expected that of a {layer}")
    return faults


def _is_layer(weight: torch.Tensor, flat: bool) -> bool:
    """Whether it has the shape of the weights of a linear layer, or of a 1x1 convolution."""
    return weight.dim() == 2 if flat else weight.dim() in (3, 4, 5) and set(weight.shape[2:]) == {1}


def _our_key(names: Mapping[str, str], key: str) -> str:
    """Our name of one of their tensors, or nothing. A count of batches goes with the mean beside it."""
    if key.endswith(f".{BATCHES}"):
        mean = names.get(key.removesuffix(BATCHES) + "running_mean", "")
        return mean.removesuffix("running_mean") + BATCHES if mean else ""
    return names.get(key, "")


def _nearest(forms: list[Form], readings: list[State]) -> str:
    """A sentence that names the nearest of the forms, and its first fault.

    That is the one with the fewest faults of those that share a key with the state dict; where none does, the one whose
    tensors are most alike.
    """

    def distance(form: Form, state: State) -> tuple[Any, ...]:
        shares = any(_our_key({**form.keys, **form.maybe}, key) for key in state)
        return (0, len(_faults(form, state))) if shares else (1, *_difference(form, state))

    pairs = [(form, state) for state in readings for form in forms if _faults(form, state)]
    form, state = min(pairs, key=lambda pair: distance(*pair))
    return f" The nearest is {_listed([form])}: {_faults(form, state)[0]}."


def _difference(form: Form, state: State) -> tuple[int, bool, float]:
    """How many tensors are others, by the last word of their names and the kind of layer, and how unlike names are."""
    more = Counter(key.rpartition(".")[2] for key in state if not key.endswith(BATCHES))
    more.subtract(key.rpartition(".")[2] for key in form.keys)
    weights = [value for value in state.values() if value.dim() > 1]
    other = [value for value in weights if form.flat is not None and not _is_layer(value, form.flat)]
    mixed = form.flat is None and all(_is_layer(value, True) or _is_layer(value, False) for value in weights)
    alike = SequenceMatcher(None, " ".join(sorted(state)), " ".join(sorted(form.keys))).ratio()
    return sum(map(abs, more.values())) + len(other), mixed, -alike


def _decided(forms: list[Form], state: State, overrides: Options) -> Form:
    """The one form that the caller's options leave, of those that have the same keys and shapes."""
    if len(forms) == 1:
        return forms[0]
    left = [form for form in forms if set(overrides) <= _options(BUILT[form.build])] or forms
    left = [form for form in left if set(overrides) & set(form.decided_by)] or left
    if len(left) == 1:
        return left[0]
    # tensors that fit none of them are not worth a question
    _check_bottleneck(state, "")
    said = " or ".join(f"{_listed([form])} ({COMPUTED[BUILT[form.build]]})" for form in forms)
    options = " or ".join(f"{option}=..." for form in forms for option in form.decided_by)
    raise LayoutError(
        f"module_from: the keys and shapes fit {said}, which compute differently. Say which with layout=..., or give "
        f"{options}."
    )


def _options(cls: type[nn.Module]) -> set[str]:
    """The options that the caller may set."""
    return set(inspect.signature(cls).parameters) - FIXED


def _listed(forms: list[Form]) -> str:
    return " and ".join(dict.fromkeys(repr(name) for form in forms for name in form.layouts))


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
    convolutions = state["channel.fc1.weight"].dim() != 2
    channels, state, options = _bottleneck(state, "channel.", overrides)
    spatial = _spatial(state, "spatial.")
    if convolutions and options["dimensions"] != spatial["dimensions"]:
        raise _WrongShape("spatial.conv.weight", f"a convolution of {options['dimensions']} dimensions, as the others")
    return _loaded(CBAM, (channels,), {"norm_momentum": 0.1, **options, **spatial}, overrides, state)


def _official(build: Callable[[State, Options], nn.Module], prefix: str) -> Callable[[State, Options], nn.Module]:
    def official(state: State, overrides: Options) -> nn.Module:
        _spatial(state, prefix)
        # their spatial convolution reads the maximum first
        flipped = {**state, f"{prefix}conv.weight": state[f"{prefix}conv.weight"].flip(1)}
        return build(flipped, {"norm_momentum": 0.01, **overrides})

    return official


def _block(state: State, overrides: Options) -> nn.Module:
    gates = {key: value for key, value in state.items() if key.startswith(("channel.", "spatial."))}
    rest = {key: value for key, value in state.items() if key not in gates}
    channels = next(iter(rest["conv1.weight"].shape), 0)
    for name in ("conv1.weight", "conv2.weight"):
        if rest[name].shape != (channels, channels, 3, 3) or not channels:
            raise _WrongShape(name, f"{(channels, channels, 3, 3)}, 3x3 convolutions of equal width")
    for name in ("channel.fc1.weight", "spatial.conv.weight"):
        if gates[name].dim() != 4 or (name.startswith("channel") and gates[name].shape[1] != channels):
            raise _WrongShape(name, f"a two-dimensional convolution in a block of {channels} channels")
    gate = _cbam(gates, overrides)
    block = BasicBlock(channels, channels).to(rest["conv1.weight"].dtype)
    _load(block, rest)
    attach(block, "cbam", start="paper")
    block.get_submodule("bn2").attention = gate
    return block


def _dual_pool(state: State, overrides: Options) -> nn.Module:
    reduce, classifier = state["reduce.weight"], state["classifier.weight"]
    if not _is_layer(reduce, False) or reduce.numel() == 0 or reduce.shape[1] % 2:
        raise _WrongShape("reduce.weight", "(features, 2 * channels, 1, 1)")
    features, channels = reduce.shape[0], reduce.shape[1] // 2
    if not _is_layer(classifier, True) or classifier.numel() == 0:
        raise _WrongShape("classifier.weight", f"(classes, {features})")
    state["reduce.weight"] = reduce.flatten(1)
    # the post drops out half
    options = {"features": features, "classes": classifier.shape[0], "dropout": 0.5}
    return _loaded(DualPool, (channels,), options, overrides, state)


def _bottleneck(state: State, prefix: str, overrides: Options) -> tuple[int, State, Options]:
    """Channels, weights as of linear layers, and options of the two layers of an SE or a channel MLP."""
    _check_bottleneck(state, prefix)
    first, second = f"{prefix}fc1", f"{prefix}fc2"
    given, channels, *ones = state[f"{first}.weight"].shape
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
    for key, padding in ((f"{first}.weight", (0, 0, 0, more)), (f"{second}.weight", (0, more))):
        flat = state[key].reshape(state[key].shape[:2])
        state[key] = nn.functional.pad(flat, padding)
    bias = f"{first}.bias" in state
    if bias:
        state[f"{first}.bias"] = nn.functional.pad(state[f"{first}.bias"], (0, more))
    return channels, state, {"hidden": hidden, "bias": bias, "dimensions": len(ones) or 2}


def _check_bottleneck(state: State, prefix: str) -> None:
    """Refuse two layers that are no linear layers or 1x1 convolutions, or do not go together. Hidden may be 0."""
    weight = state[f"{prefix}fc1.weight"]
    if not (_is_layer(weight, True) or _is_layer(weight, False)) or weight.shape[1] == 0:
        raise _WrongShape(f"{prefix}fc1.weight", "(hidden, channels), of a linear layer or a 1x1 convolution")
    hidden, channels, *ones = weight.shape
    for key, expected in (
        ("fc2.weight", (channels, hidden, *ones)),
        ("fc1.bias", (hidden,)),
        ("fc2.bias", (channels,)),
    ):
        if prefix + key in state and state[prefix + key].shape != expected:
            raise _WrongShape(prefix + key, expected)


def _spatial(state: State, prefix: str) -> Options:
    shape = state[f"{prefix}conv.weight"].shape
    if shape[:2] != (1, 2) or len(shape) not in (3, 4, 5):
        raise _WrongShape(
            f"{prefix}conv.weight",
            "(1, 2, k, ...): one over the average of mean and maximum (timm's light CBAM) is another module",
        )
    if shape[-1] % 2 == 0 or len(set(shape[2:])) > 1:
        raise _WrongShape(f"{prefix}conv.weight", "(1, 2, k, ...) with the same odd k on all sides")
    norm = "batch" if f"{prefix}norm.weight" in state else None
    return {"kernel_size": shape[-1], "dimensions": len(shape) - 2, "norm": norm}


def _loaded(
    cls: type[nn.Module], args: tuple[int, ...], options: Options, overrides: Options, state: State
) -> nn.Module:
    open_options = _options(cls)
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
    own = module.state_dict()
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise _WrongShape(key, tuple(own[key].shape))
    kept = {key: value for key, value in own.items() if key.endswith((BATCHES, "strength"))}
    module.load_state_dict({**kept, **state})


BUILT: dict[Callable[[State, Options], nn.Module], type[nn.Module]] = {
    _squeeze_excite: SqueezeExcite,
    _channel_attention: ChannelAttention,
}
COMPUTED: dict[type[nn.Module], str] = {
    SqueezeExcite: "squeeze-and-excitation, of the mean alone",
    ChannelAttention: "channel attention, of mean and maximum",
}


def _below(theirs: str, ours: str, keys: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{name}" for key, name in keys.items()}


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _norm(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")}


_MLP = {"fc1.weight": "fc1.weight", "fc2.weight": "fc2.weight"}
_MLP_BIASES = {"fc1.bias": "fc1.bias", "fc2.bias": "fc2.bias"}
_MLP_NUMBERED = {"fc.0.weight": "fc1.weight", "fc.2.weight": "fc2.weight"}
_CHANNEL_POST = _below("ca", "channel", _MLP)
_CHANNEL_LUUUYI = _below("ca", "channel", _MLP_NUMBERED)
_SPATIAL_POST = {"sa.conv1.weight": "spatial.conv.weight"}
_RESIDUAL = {
    "conv1.weight": "conv1.weight",
    **_norm("bn1", "bn1"),
    "conv2.weight": "conv2.weight",
    **_norm("bn2", "bn2"),
    **_SPATIAL_POST,
}
_OFFICIAL_MLP = {**_linear("mlp.1", "fc1"), **_linear("mlp.3", "fc2")}
_OFFICIAL_SPATIAL = {"spatial.conv.weight": "conv.weight"}
_OFFICIAL_NORM = _norm("spatial.bn", "norm")
_TIMM_SPATIAL = {"conv.conv.weight": "conv.weight", **_norm("conv.bn", "norm")}

FORMS = (
    Form(("post", "moskomule-se"), _MLP_NUMBERED, _squeeze_excite, flat=True),
    Form(("luuuyi",), _MLP_NUMBERED, _channel_attention, flat=False),
    Form(("post", "luuuyi", "timm-cbam"), _MLP, _channel_attention, flat=False, decided_by=("pools",)),
    Form(("insightface-se", "timm-se"), _MLP, _squeeze_excite, flat=False, decided_by=("gate_activation",)),
    Form(
        ("timm-se", "torchvision-se"),
        {**_MLP, **_MLP_BIASES},
        _squeeze_excite,
        flat=False,
        decided_by=("activation", "gate_activation"),
    ),
    Form(("timm-cbam",), {**_MLP, **_MLP_BIASES}, _channel_attention, flat=False, decided_by=("pools",)),
    Form(("post", "luuuyi"), {"conv1.weight": "conv.weight"}, _spatial_attention),
    Form(("post", "luuuyi"), {**_CHANNEL_POST, **_SPATIAL_POST}, _cbam),
    Form(("luuuyi",), {**_CHANNEL_LUUUYI, **_SPATIAL_POST}, _cbam),
    Form(("post", "luuuyi"), {**_CHANNEL_POST, **_RESIDUAL}, _block),
    Form(("luuuyi",), {**_CHANNEL_LUUUYI, **_RESIDUAL}, _block),
    Form(("post",), {**_linear("reduce_layer", "reduce"), **_linear("fc.1", "classifier")}, _dual_pool),
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
        maybe=_below("channel", "channel", _MLP_BIASES),
    ),
)
