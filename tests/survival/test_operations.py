"""What others do to an attached network: attention comes through, or the operation is refused and nothing changed.

An operation that changes what the plain network computes is done to the plain network too, to which the same attention
is attached then: both have to compute the same.
"""

import copy
import functools
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import networks
import pytest
import torch
from networks import BUILDERS, distance, images, sites, with_attention
from timm.models import reparameterize_model
from torch import nn
from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from convattn.attachment import attached
from convattn.errors import AttachError

PLACES = ("residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final", "layer", "pool")
MODULES = ("se", "cbam", "dual")


@dataclass(frozen=True)
class Operation:
    """Something that is done to a network, in place or to a copy that is returned.

    The output stays within the tolerance, relative to the largest, unless the operation `changes` the plain one too.
    `keeps` says that the result still is a network with wrappers, whose attention has the same numbers but for the
    `rounding`; `refusals` are the errors with which it may be refused.
    """

    do: Callable[[nn.Module], nn.Module]
    changes: bool = False
    keeps: bool = True
    tolerance: float = 1e-5
    rounding: float = 0.0
    refusals: tuple[type[Exception], ...] = (AttachError,)


def in_place(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    @functools.wraps(change)
    def do(model: nn.Module) -> nn.Module:
        change(model)
        return model

    return do


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def convolutions(model: nn.Module) -> Iterator[nn.Module]:
    """What stands where the plain network has its convolutions."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and ".attention." not in name:
            yield model.get_submodule(name.removesuffix(".convattn_inner"))


@in_place
def pruned(model: nn.Module) -> None:
    for convolution in convolutions(model):
        prune.l1_unstructured(convolution, "weight", amount=0.2)


@in_place
def with_weight_norm(model: nn.Module) -> None:
    for convolution in convolutions(model):
        weight_norm(convolution)


@in_place
def with_spectral_norm(model: nn.Module) -> None:
    for convolution in convolutions(model):
        torch.manual_seed(0)
        spectral_norm(convolution)


@in_place
def parametrized(model: nn.Module) -> None:
    for convolution in convolutions(model):
        parametrizations.weight_norm(convolution)


@in_place
def with_frozen_norms(model: nn.Module) -> None:
    """Norms replaced by name, as detection libraries do: by a module of another class with the same tensors."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d and ".attention." not in name:
            parent, _, key = name.removesuffix(".convattn_inner").rpartition(".")
            frozen = Frozen(module)
            setattr(model.get_submodule(parent), key, frozen)


class Frozen(nn.Module):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(norm, key).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class LowRank(nn.Module):
    """A convolution with a trained part of low rank beside it."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Conv2d(base_layer.in_channels, 2, 1, stride=base_layer.stride, bias=False)
        self.up = nn.Conv2d(2, base_layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@in_place
def with_low_rank(model: nn.Module) -> None:
    """Adapters put around every pointwise convolution that is found by its class, in place of what has its name."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and ".attention." not in name:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, LowRank(module))


@in_place
def fused_by_hand(model: nn.Module) -> None:
    """A convolution and the norm behind it merged, where a module has them under the usual names."""
    for module in list(model.modules()):
        for convolution, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv", "bn")):
            if hasattr(module, convolution) and isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                merged = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, merged)
                setattr(module, norm, nn.Identity())


def fused_by_names(model: nn.Module) -> nn.Module:
    names = {name for name, _ in model.named_modules()}
    # a wrapped block comes twice, as the wrapper and as the block, and both by the name that its layers have
    pairs = {(f"{name}.conv1", f"{name}.bn1") for name in names if {f"{name}.conv1", f"{name}.bn1"} <= names}
    return fuse_modules(model, sorted(map(list, pairs))) if pairs else copy.deepcopy(model)


def merged_by_their_network(model: nn.Module) -> nn.Module:
    return model.fuse() if hasattr(model, "fuse") else model


@in_place
def deployed(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()


def quantised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return convert_fx(prepared)


@in_place
def moved(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


@in_place
def in_half(model: nn.Module) -> None:
    model.half().float()


@in_place
def with_another_classifier(model: nn.Module) -> None:
    linear = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    name, old = [(name, one) for name, one in linear if ".attention." not in name][-1]
    parent, _, key = name.removesuffix(".convattn_inner").rpartition(".")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        setattr(model.get_submodule(parent), key, nn.Linear(old.in_features, 7))


@in_place
def without_a_child(model: nn.Module) -> None:
    """The first part with attention in it deleted; the plain network keeps all."""
    for name in sites(model)[:1]:
        delattr(model, name.partition(".")[0])


@in_place
def with_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if ".attention" not in name and not name.endswith("convattn_inner"):
            module.register_forward_hook(lambda module, args, output: output)


@in_place
def with_checkpoints(model: nn.Module) -> None:
    """Every part computed again in the backward pass."""
    for name, child in model.named_children():
        setattr(model, name, Checkpointed(child))


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


class Functional(nn.Module):
    """The network called with its tensors given from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return torch.func.functional_call(self.model, {key: one.clone() for key, one in tensors.items()}, (x,))


MERGED, TRACED = 1e-4, {"keeps": False}
OPERATIONS = {
    "deepcopy": Operation(copy.deepcopy),
    "pickle": Operation(lambda model: pickle.loads(pickle.dumps(model))),
    "torch.save": Operation(torch_saved),
    "average of weights": Operation(lambda model: AveragedModel(model)),
    "requires_grad_": Operation(lambda model: model.requires_grad_(False)),
    "half": Operation(in_half, tolerance=0.05, rounding=1e-3),
    "meta and back": Operation(moved),
    "hooks": Operation(with_hooks),
    "deleting a child": Operation(without_a_child),
    "checkpointing": Operation(with_checkpoints),
    "functional_call": Operation(Functional),
    "SyncBatchNorm": Operation(nn.SyncBatchNorm.convert_sync_batchnorm),
    "frozen norms": Operation(with_frozen_norms),
    "low rank": Operation(with_low_rank),
    "another classifier": Operation(with_another_classifier, changes=True),
    "prune": Operation(pruned, changes=True),
    "weight_norm": Operation(with_weight_norm),
    "spectral_norm": Operation(with_spectral_norm, changes=True),
    "parametrizations": Operation(parametrized),
    "symbolic trace": Operation(torch.fx.symbolic_trace, **TRACED),
    "fuse of FX": Operation(fuse, tolerance=MERGED, **TRACED),
    "fuse_conv_bn_eval": Operation(fused_by_hand, tolerance=MERGED),
    "fuse_modules": Operation(fused_by_names, tolerance=MERGED, refusals=(AttachError, NotImplementedError)),
    "fuse of the network": Operation(merged_by_their_network, tolerance=MERGED),
    "switch_to_deploy": Operation(deployed, tolerance=MERGED),
    "reparameterize_model": Operation(reparameterize_model, tolerance=MERGED),
    "quantisation of FX": Operation(quantised, tolerance=0.25, **TRACED),
    "jit.trace": Operation(lambda model: torch.jit.trace(model, images(), check_trace=False), **TRACED),
    "export": Operation(lambda model: torch.export.export(model, (images(),)).module(), **TRACED),
    "aot_eager": Operation(lambda model: torch.compile(model, backend="aot_eager"), **TRACED),
}
# in which places a test of a few seconds looks, and with which modules; the rest is slow
QUICK = {("detector", "residual", "se"), ("reparameterised", "block", "se"), ("detector", "layer", "se")}
QUICK |= {("densenet", "pool", "dual")}
# these take a second each, in one place
COMPILED = ("quantisation of FX", "jit.trace", "export", "aot_eager")
# and these look in larger networks too; only in this one `fuse_modules` finds layers under the names that it looks for
RESNET, MOBILENET = ("resnet20", "residual", "cbam"), ("mobilenet_v2", "shortcut", "se")
IN_LARGER = {(operation, cell) for operation in ("deepcopy", "symbolic trace") for cell in (RESNET, MOBILENET)}
IN_LARGER |= {("fuse_modules", RESNET)}


def cells() -> Iterator[object]:
    for operation, network, at, attention in itertools.product(OPERATIONS, BUILDERS, PLACES, MODULES):
        if (attention == "dual") != (at == "pool"):
            # heads stand there, gates do not
            continue
        cell = (network, at, attention)
        if operation in COMPILED:
            quick = cell == ("detector", "residual", "se")
        else:
            quick = cell in QUICK or (operation, cell) in IN_LARGER
        marks = () if quick else pytest.mark.slow
        yield pytest.param(operation, *cell, marks=marks, id=f"{operation}-{network}-{at}-{attention}")


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # what is said of old ways to normalise, to quantise and to trace
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("operation, network, at, attention", list(cells()))
def test_operation(operation: str, network: str, at: str, attention: str) -> None:
    one, x = OPERATIONS[operation], images()
    plain = networks.plain(network)
    try:
        model = with_attention(copy.deepcopy(plain), attention, at)
    except AttachError as error:
        assert "The model was not changed." in str(error)
        return
    names, before = sites(model), attention_of(model)
    with torch.no_grad(), quiet():
        y = model(x)
        assert distance(y, plain(x)) > 1e-3
        try:
            result = one.do(model)
        except one.refusals as error:
            assert str(error)
            assert sites(model) == names and distance(model(x), y) <= one.tolerance
            return
        if one.changes:
            # attention and the operation in the other order
            changed = with_attention(one.do(plain), attention, at)
            set_attention(changed, before)
            y = changed(x)
        moved = distance(result(x), y)
        if moved > one.tolerance and operation.startswith("quantisation"):
            if distance(one.do(copy.deepcopy(plain))(x), plain(x)) > one.tolerance:
                pytest.skip("eight bits are too few for the plain network")
            # large weights, as attention has here, take more of them; without its gates it would move by the whole
            assert moved < distance(y, plain(x)) / 2
        elif moved > one.tolerance:
            # in a deep network rounding grows: by how much tells the same network in float64
            exact = copy.deepcopy(model).double()(x.double()).float()
            assert moved <= 10 * distance(exact, y) and moved < 1e-4
        if one.keeps:
            after = attention_of(result)
            assert list(after) == list(before)
            # float16 keeps fewer digits of numbers below 6e-5
            absolute = 1e-7 if one.rounding else 0
            near = {key: torch.allclose(after[key], before[key], rtol=one.rounding, atol=absolute) for key in before}
            assert all(near.values()), near


def attention_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the attention at each site, in the order of the network."""
    return {
        f"{index} {key}": value.clone()
        for index, (_, wrapper) in enumerate(attached(model))
        for key, value in wrapper.get_submodule("attention").state_dict().items()
    }


def set_attention(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for index, (_, wrapper) in enumerate(attached(model)):
        own = {key.partition(" ")[2]: value for key, value in tensors.items() if key.startswith(f"{index} ")}
        wrapper.get_submodule("attention").load_state_dict(own)
