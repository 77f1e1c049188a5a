"""Networks written to be difficult: sites where the definition has them, an exact start, training, and the way back."""

import contextlib
import copy
import dataclasses
import functools
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from convattn import attach, detach, plan
from convattn.attachment import attached
from convattn.errors import AttachError

C = 8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def unit(width: int = C, out: int = C, kernel: int = 3, stride: int = 1, dimensions: int = 2) -> list[nn.Module]:
    """A convolution and its norm."""
    convolution, norm = CONVOLUTIONS[dimensions - 1], NORMS[dimensions - 1]
    return [convolution(width, out, kernel, stride, kernel // 2, bias=False), norm(out)]


def branch(width: int = C, out: int = C, stride: int = 1, dimensions: int = 2) -> nn.Sequential:
    """The branch of a basic block; its last layer is number 4."""
    first, last = unit(width, out, 3, stride, dimensions), unit(out, out, 3, 1, dimensions)
    return nn.Sequential(*first, nn.ReLU(inplace=True), *last)


class Written(nn.Module):
    """A network of the given layers whose forward pass is a function of it and of the input."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Block(nn.Module):
    """A basic block, with a projection where the shape changes."""

    def __init__(self, width: int = C, out: int = C, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = unit(width, out, 3, stride)
        self.conv2, self.bn2 = unit(out, out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(*unit(width, out, 1, stride)) if stride > 1 or out != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Encoder(nn.Module):
    """A ResNet of three stages of two blocks."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(width), nn.ReLU())
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(C, 16, 2), Block(16, 16))
        self.layer3 = nn.Sequential(Block(16, 32, 2), Block(32, 32))

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        one = self.layer1(self.stem(x))
        two = self.layer2(one)
        return [one, two, self.layer3(two)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maps(x)[-1].mean((2, 3))


def encoder_sites(prefix: str = "", layer: str = ".bn2") -> list[str]:
    return [f"{prefix}layer{stage}.{block}{layer}" for stage in (1, 2, 3) for block in (0, 1)]


class Classifier(nn.Module):
    """A network of four equal blocks that pools with a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3), nn.ReLU())
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.head = nn.Linear(C, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


CLASSIFIER_SITES = [f"blocks.{number}.bn2" for number in range(4)]


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


MAP = maps(2, C, 12, 12)
IMAGES = maps(2, 3, 16, 16)


# what the tests share


def run(model: nn.Module, example: Any) -> Any:
    """The output for a copy of an example, from one random state."""
    example = tree_map_only(torch.Tensor, torch.clone, example)
    torch.manual_seed(3)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def numbers(output: Any) -> list[torch.Tensor]:
    """All floating-point tensors in an output of any form."""
    if dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    found = [one for one in tree_leaves(output) if isinstance(one, torch.Tensor) and one.is_floating_point()]
    assert found
    return found


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


def loss(output: Any) -> torch.Tensor:
    """A loss on which every element has a slope of its own, not even flat behind a norm."""
    return sum(
        (one * torch.linspace(-1, 1, one.numel()).reshape(one.shape)).sum() + one.square().mean()
        for one in numbers(output)
    )  # type: ignore[return-value]


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A check that nothing of a model has changed since: modules, modes, hooks, tensors, random state."""

    def taken() -> Any:
        modules = [
            (name, id(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks))
            for name, one in model.named_modules(remove_duplicate=False)
        ]
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        held = [(name, id(one), one.requires_grad, one.grad is None) for name, one in tensors]
        return modules, held, list(model.state_dict())

    before, state = taken(), torch.random.get_rng_state()
    values = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}

    def check() -> None:
        assert taken() == before
        assert torch.equal(torch.random.get_rng_state(), state)
        after = model.state_dict()
        changed = [key for key, value in values.items() if not torch.equal(value, after[key])]
        assert not changed, f"changed: {changed}"

    return check


def set_strengths(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for _, wrapper in attached(model):
            wrapper.attention.strength.fill_(value)


def check_life(
    model: nn.Module, example: Any, sites: list[str] | None, attention: str = "cbam", at: str = "residual"
) -> None:
    """Plan, attach, start, train two steps, move, detach: all that holds at every site of every network."""
    plain = copy.deepcopy(model)
    given = [one.clone() for one in tree_leaves(example) if isinstance(one, torch.Tensor)]
    unchanged = snapshot(model)
    # a hidden layer of a single unit may be dead from the start
    options = {} if at == "pool" else {"reduction": 1}
    found = plan(model, attention, at=at, example=example, **options)
    unchanged()
    still = [one for one in tree_leaves(example) if isinstance(one, torch.Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(given, still, strict=True))
    assert sites is None or [site.name for site in found] == sites

    parameters, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    modules = [(name, id(one)) for name, one in model.named_modules(remove_duplicate=False)]
    attach(model, found)
    wrappers = attached(model)
    assert len(wrappers) == len(found) > 0
    added = {id(one) for _, wrapper in wrappers for one in wrapper.attention.parameters()}
    assert [name for name, one in model.named_parameters() if id(one) not in added] == parameters
    assert [key for key in model.state_dict() if key in keys] == keys

    for training in (False, True):
        model.train(training), plain.train(training)
        assert same(run(model, example), run(plain, example)), f"another start with training={training}"
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items()), "other statistics"

    gates = [
        [one for name, one in wrapper.attention.named_parameters() if name != "strength"] for _, wrapper in wrappers
    ]
    before = [[one.detach().clone() for one in group] for group in gates]
    strengths = [wrapper.attention.strength for _, wrapper in wrappers]
    # steps of one length, however small the gradient of a gate behind a strength near 0
    optimizer = torch.optim.Adam([*strengths, *(one for group in gates for one in group)], lr=0.01)
    loss(run(model, example)).backward()
    for (name, _), strength, group in zip(wrappers, strengths, gates, strict=True):
        assert strength.grad is not None and strength.grad.abs().sum() > 0, f"no gradient at {name}"
        assert all(one.grad is None or not one.grad.any() for one in group)
    optimizer.step()
    assert all(strength.any() for strength in strengths)
    optimizer.zero_grad()
    loss(run(model, example)).backward()
    optimizer.step()
    for (name, _), group, old in zip(wrappers, gates, before, strict=True):
        assert not group or any(not torch.equal(a, b) for a, b in zip(group, old, strict=True)), f"no step at {name}"

    set_strengths(model, 0.0)
    model.eval()
    start = run(model, example)
    for name, wrapper in wrappers:
        nn.init.constant_(wrapper.attention.strength, 0.7)
        assert not same(run(model, example), start), f"the gate at {name} does nothing"
        nn.init.zeros_(wrapper.attention.strength)

    detach(model)
    assert [(name, id(one)) for name, one in model.named_modules(remove_duplicate=False)] == modules
    assert list(model.state_dict()) == keys
    assert same(run(model, example), start)


@dataclasses.dataclass
class Case:
    """A network, an input, and the sites that it has by the definition of a residual sum."""

    make: Callable[[], nn.Module]
    sites: list[str]
    example: Any = dataclasses.field(default_factory=lambda: MAP)


CASES: dict[str, Case] = {}


def case(sites: list[str], example: Any = MAP) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def keep(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[make.__name__.replace("_", " ").strip()] = Case(make, sites, example)
        return make

    return keep


# how one can add


@case(["f.4"])
def sum_() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=branch())


@case(["f.4"])
def in_place_everywhere() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(m.stem(x))
        out = m.f(x)
        out += x
        return F.relu_(out)

    return Written(forward, stem=nn.Conv2d(C, C, 3, padding=1), f=branch())


@case(["f.4"])
def shortcut_changed_in_place() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return x.add_(m.f(x.clone())).relu_()

    return Written(forward, stem=nn.Conv2d(C, C, 3, padding=1), f=branch())


@case(["f.4"])
def torch_add_with_a_factor() -> nn.Module:
    return Written(lambda m, x: torch.add(x, m.f(x), alpha=0.5), f=branch())


def added_into(out: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    # torch.add(out=...) has no gradient, so that networks use it where none is asked for
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.f(x)
        return x + y if torch.is_grad_enabled() else torch.add(x, y, out=out(x, y))

    return Written(forward, f=branch())


@case(["f.4"])
def torch_add_into_the_branch() -> nn.Module:
    return added_into(lambda x, y: y)


@case(["f.4"])
def torch_add_into_a_new_tensor() -> nn.Module:
    return added_into(lambda x, y: torch.empty(y.shape))


@case(["f.4"])
def builtin_sum() -> nn.Module:
    return Written(lambda m, x: sum([x, m.f(x)]), f=branch())


@case(["f.4", "g.4"])
def builtin_sum_of_three() -> nn.Module:
    return Written(lambda m, x: sum(one(x) for one in (nn.Identity(), m.f, m.g)), f=branch(), g=branch())


@case(["f.4", "g.4", "h.4"])
def sum_of_four() -> nn.Module:
    return Written(lambda m, x: x + (m.f(x) + m.g(x)) + m.h(x), f=branch(), g=branch(), h=branch())


@case(["f.4"])
def shortcut_added_twice() -> nn.Module:
    return Written(lambda m, x: x + m.f(x) + x, f=branch())


@case(["f.4", "g.4"])
def one_branch_after_the_other() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.f(x)
        return x + y + m.g(y)

    return Written(forward, f=branch(), g=branch())


@case(["f.4"])
def sum_of_a_quantizable_network() -> nn.Module:
    functional = torch.ao.nn.quantized.FloatFunctional()
    return Written(lambda m, x: m.functional.add(x, m.f(x)), f=branch(), functional=functional)


# checkpoints, shared and repeated layers


@case(["f.4", "g.4"])
def checkpoints() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda y: F.relu(y + m.f(y)), m.stem(x), use_reentrant=False)
        return checkpoint(lambda y, z: y + m.g(z), x, x, use_reentrant=False)

    return Written(forward, stem=nn.Conv2d(C, C, 3, padding=1), f=branch(), g=branch())


@case(["f.4", "g.4"])
def checkpoints_run_again() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda y: F.relu(y + m.f(y)), m.stem(x), use_reentrant=True)
        return x + checkpoint(m.g, x, use_reentrant=True)

    return Written(forward, stem=nn.Conv2d(C, C, 3, padding=1), f=branch(), g=branch())


@case(["f.4"])
def block_called_three_times() -> nn.Module:
    return Written(lambda m, x: functools.reduce(lambda y, _: F.relu(y + m.f(y)), range(3), x), f=branch())


@case(["f.4"])
def block_called_at_three_sizes() -> nn.Module:
    return Written(
        lambda m, x: functools.reduce(lambda y, _: F.avg_pool2d(y + m.f(y), 2), range(3), x.repeat(1, 1, 2, 2)),
        f=branch(),
    )


@case(["0.bn2", "2.bn2"])
def block_under_two_names() -> nn.Module:
    block = Block()
    return nn.Sequential(block, block, Block())


@case(["act"])
def one_layer_at_the_end_of_two_branches() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + m.act(m.f(x))
        return x + m.act(m.g(x))

    return Written(forward, f=branch(), g=branch(), act=nn.Tanh())


@case(encoder_sites("encoder."), (IMAGES, maps(2, 3, 16, 16) * 2))
def siamese() -> nn.Module:
    return Written(lambda m, a, b: m.head(m.encoder(a) - m.encoder(b)), encoder=Encoder(), head=nn.Linear(32, 2))


# containers and forms of what comes in and goes out


@case(["blocks.one.4", "blocks.two.4"])
def module_dict() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for name in m.order:
            x = F.relu(x + m.blocks[name](x))
        return x

    return Written(forward, blocks=nn.ModuleDict({"two": branch(), "one": branch()}), order=("one", "two"))


@case(["blocks.0.0.4", "blocks.1.0.4"])
def lists_of_modules_and_parameters() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for (layers,), scale in zip(m.blocks, m.scales, strict=True):
            x = x * scale + layers(x * scale)
        return x

    scales = nn.ParameterList([nn.Parameter(torch.rand(C, 1, 1)) for _ in range(2)])
    return Written(forward, blocks=nn.ModuleList([nn.ModuleList([branch()]) for _ in range(2)]), scales=scales)


Output = namedtuple("Output", "logits maps")


@dataclasses.dataclass
class Prediction:
    logits: torch.Tensor
    maps: list[torch.Tensor]


def giving(form: Callable[[torch.Tensor, torch.Tensor], Any]) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.act(x + m.f(x))
        return form(m.head(m.pool(y).flatten(1)), y)

    layers = {"act": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "head": nn.Linear(C, 5)}
    return Written(forward, f=branch(), **layers)


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "tuple": lambda logits, y: (logits, [y]),
    "dictionary": lambda logits, y: {"logits": logits, "maps": {"last": y}},
    "named tuple": lambda logits, y: Output(logits, y),
    "dataclass": lambda logits, y: Prediction(logits, [y]),
}
for name, form in FORMS.items():
    CASES[f"output in a {name}"] = Case(functools.partial(giving, form), ["f.4"])


@case(["f.4"], {"batch": {"images": [MAP, {"scale": torch.ones(1)}]}})
def input_in_dictionaries_and_lists() -> nn.Module:
    def forward(m: Any, batch: dict[str, Any]) -> torch.Tensor:
        x = batch["images"][0] * batch["images"][1]["scale"]
        return x + m.f(x)

    return Written(forward, f=branch())


@case(["f.4"], {"images": [MAP[0], maps(C, 9, 11)]})
def images_copied_into_a_batch() -> nn.Module:
    """As detection networks take images of several sizes."""

    def forward(m: Any, images: list[torch.Tensor]) -> torch.Tensor:
        x = images[0].new_full((len(images), C, 12, 12), 0.0)
        for slot, image in zip(x, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]].copy_(image)
        return x + m.f(x)

    return Written(forward, f=branch())


@case(["f"], (MAP, maps(2, C, 12, 12) * 2))
def layer_of_several_tensors() -> nn.Module:
    def both(m: Any, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> torch.Tensor:
        return torch.tanh(m.a(a) * scale) * m.b(b)

    return Written(
        lambda m, a, b: a + m.f(a, b, scale=0.5), f=Written(both, a=nn.Conv2d(C, C, 1), b=nn.Conv2d(C, C, 1))
    )


@case(["f"])
def layer_called_with_one_tensor_and_with_two() -> nn.Module:
    def either(m: Any, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tanh(m.conv(a if b is None else a + b))

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + m.f(x)
        return y + m.f(y, b=x)

    return Written(forward, f=Written(either, conv=nn.Conv2d(C, C, 3, padding=1)))


@case(["g.f.4"])
def branch_returned_in_a_tuple() -> nn.Module:
    return Written(lambda m, x: x + m.g(x)[0], g=Written(lambda m, x: (m.f(x), x.mean()), f=branch()))


# control flow, and what stands between a layer and the sum


@case(["f.4"])
def control_flow() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.shape[0])):
            x = x + m.f(x) if x.mean() < 1e6 else m.g(x)
        return x

    return Written(forward, f=branch(), g=branch())


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@case(["scale"])
def layer_scale_and_drop_path_in_modules() -> nn.Module:
    drop = torchvision.ops.StochasticDepth(0.3, "row")
    return Written(lambda m, x: x + m.drop(m.scale(m.f(x))), f=branch(), scale=LayerScale(), drop=drop)


@case(["f.4"])
def drop_path_and_dropout_as_functions() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torchvision.ops.stochastic_depth(m.f(x), 0.3, "row", m.training)
        return x + F.dropout(y, 0.2, m.training)

    return Written(forward, f=branch())


# what may stand between the last layer of a branch and the sum: the gate before it is the gate behind it
SCALES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a number": lambda m, y: y * 0.2,
    "a number first": lambda m, y: 0.2 * y,
    "a quotient": lambda m, y: y / 3,
    "in place": lambda m, y: y.mul_(0.2),
    "a learned number": lambda m, y: m.one * y,
    "a function of a learned number": lambda m, y: torch.sigmoid(m.one) * y,
    "a number for each channel": lambda m, y: y * m.each,
    "a number for each channel of a vector": lambda m, y: y * m.each.view(1, -1, 1, 1),
    "channels last": lambda m, y: (m.each.flatten() * y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(),
    "two scales": lambda m, y: m.one * (y * m.each) / 2,
    "scale and drop path": lambda m, y: torchvision.ops.stochastic_depth(y * m.each, 0.3, "row", m.training),
    "dropout and scale": lambda m, y: F.dropout(y, 0.2, m.training) * 0.2,
    "one dimension and back": lambda m, y: (y.flatten(2) * m.one).unflatten(2, y.shape[2:]),
}


def scaled(scale: Callable[[Any, torch.Tensor], torch.Tensor]) -> nn.Module:
    numbers = Written(lambda m, x: x)
    numbers.one, numbers.each = nn.Parameter(torch.rand(1) + 0.5), nn.Parameter(torch.rand(C, 1, 1) + 0.5)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        numbers.train(m.training)
        return m.act(scale(numbers, m.f(x)) + x)

    model = Written(forward, f=branch(), act=nn.ReLU(), numbers=numbers)
    return model


for name, scale in SCALES.items():
    CASES[f"scaled: {name}"] = Case(functools.partial(scaled, scale), ["f.4"])


class SqueezeExcite(nn.Module):
    """The network's own squeeze-and-excitation, by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu_(self.down(x.mean((2, 3), keepdim=True)))))


@case(["f.5"])
def squeeze_excite_inside() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(*branch(), SqueezeExcite()))


@case(["f.5"])
def channel_shuffle_at_the_end() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(*branch(), nn.ChannelShuffle(2)))


@case(["f.5"])
def activation_before_the_norm() -> nn.Module:
    layers = [nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1)]
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(*layers, *copy.deepcopy(layers)))


@case(["f.2"])
def weight_and_spectral_norm() -> nn.Module:
    first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 3, padding=1))
    last = nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3, padding=1))
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(first, nn.ReLU(), last))


@case(["f.4"])
def frozen() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=branch()).requires_grad_(False)


# projections


def projected(shortcut: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> nn.Module:
    return Written(lambda m, x: F.relu(shortcut(m, x) + m.f(x)), f=branch(C, 16, 2), **layers)


@case(["f.4"])
def projection() -> nn.Module:
    return projected(lambda m, x: m.down(x), down=nn.Sequential(nn.AvgPool2d(2), *unit(C, 16, 1)))


@case(["f.4"])
def padded_shortcut() -> nn.Module:
    return projected(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


@case(["f.4"])
def shortcut_of_maximum_pooling() -> nn.Module:
    # the shortcut of the pre-activation ResNets of the TensorFlow models
    return Written(lambda m, x: F.max_pool2d(x, 1, 2) + m.f(x), f=branch(C, C, 2))


@case(["f.4"])
def projection_after_maximum_pooling() -> nn.Module:
    return projected(lambda m, x: m.down(x), down=nn.Sequential(nn.MaxPool2d(2), *unit(C, 16, 1)))


@case(["f.7"])
def projection_of_two_layers() -> nn.Module:
    # depthwise, then pointwise
    down = nn.Sequential(nn.Conv2d(C, C, 3, 2, 1, groups=C, bias=False), nn.BatchNorm2d(C), *unit(C, 16, 1))
    layers = [*unit(C, 16, 1), nn.ReLU(), *unit(16, 16, 3, 2), nn.ReLU(), *unit(16, 16, 1)]
    return Written(lambda m, x: F.relu(m.down(x) + m.f(x)), f=nn.Sequential(*layers), down=down)


@case(["f.4"])
def block_of_a_generator() -> nn.Module:
    # both operands are enlarged, so that no two scales meet
    first, last = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
    layers = nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2), first, nn.ReLU(), last)
    skip = nn.Conv2d(C, C, 1)
    return Written(lambda m, x: m.f(x) + m.skip(F.interpolate(x, scale_factor=2)), f=layers, skip=skip)


# sums within sums


@case(["groups.0.0.bn2", "groups.0.1.bn2", "groups.0.2", "groups.1.0.bn2", "groups.1.1.bn2", "groups.1.2", "last"])
def residual_in_residual() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x
        for group in m.groups:
            y = y + group(y)
        return x + m.last(y)

    groups = nn.ModuleList([nn.Sequential(Block(), Block(), nn.Conv2d(C, C, 3, padding=1)) for _ in range(2)])
    return Written(forward, groups=groups, last=nn.Conv2d(C, C, 3, padding=1))


@case(["body.0.bn2", "body.1.bn2", "body.2"])
def long_skip_over_projections() -> nn.Module:
    body = nn.Sequential(Block(C, 16), Block(16, 16), nn.Conv2d(16, C, 3, padding=1))
    return Written(lambda m, x: x + m.body(x), body=body)


class Parallel(nn.Module):
    """Convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Sequential(*unit()), nn.Sequential(*unit(C, C, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) + self.narrow(x)


@case(["f"])
def parallel_convolutions_as_a_branch() -> nn.Module:
    return Written(lambda m, x: x + m.f(F.relu(x)), f=Parallel())


@case(["f.2"])
def parallel_convolutions_in_a_branch() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(Parallel(), nn.ReLU(), nn.Conv2d(C, C, 1)))


# several scales


def decoded(up: Callable[[int, int], nn.Module]) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two, three = m.encoder.maps(x)
        return m.last(one + m.up1(two + m.up2(three)))

    return Written(forward, encoder=Encoder(), up1=up(16, C), up2=up(32, 16), last=nn.Conv2d(C, 3, 1))


@case(encoder_sites("encoder."), IMAGES)
def skips_added_after_interpolation() -> nn.Module:
    return decoded(
        lambda width, out: nn.Sequential(nn.Conv2d(width, out, 1), nn.ReLU(), nn.UpsamplingNearest2d(scale_factor=2))
    )


@case([*encoder_sites("encoder."), "up2.2", "up1.2"], IMAGES)
def skips_added_after_transposed_convolutions() -> nn.Module:
    # as in LinkNet: each operand but the skip depends on the skip, as in blocks with a strided branch
    return decoded(
        lambda width, out: nn.Sequential(nn.ConvTranspose2d(width, out, 2, 2), nn.BatchNorm2d(out), nn.ReLU())
    )


@case(encoder_sites("encoder."), IMAGES)
def skips_concatenated() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two, three = m.encoder.maps(x)
        two = m.up2(torch.cat([two, F.interpolate(three, scale_factor=2)], 1))
        return m.up1(torch.cat([one, F.interpolate(two, scale_factor=2)], 1))

    return Written(forward, encoder=Encoder(), up2=nn.Sequential(*unit(48, 16), nn.ReLU()), up1=nn.Conv2d(24, 3, 1))


@case(["high.bn2", "low.bn2", "high2.bn2", "low2.bn2"], IMAGES)
def fused_scales() -> nn.Module:
    # as in HRNet
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        high, low = m.high(x), m.low(m.begin(x))
        higher = F.relu(high + F.interpolate(m.up(low), scale_factor=2))
        lower = F.relu(low + m.down(high))
        return torch.cat([m.high2(higher), F.interpolate(m.low2(lower), scale_factor=2)], 1)

    begin, down = nn.Sequential(*unit(C, 16, 3, 2), nn.ReLU()), nn.Sequential(*unit(C, 16, 3, 2))
    blocks = {"high": Block(), "low": Block(16, 16), "high2": Block(), "low2": Block(16, 16)}
    return Written(
        forward, stem=nn.Sequential(*unit(3)), begin=begin, down=down, up=nn.Sequential(*unit(16, C, 1)), **blocks
    )


@case(encoder_sites("color.") + encoder_sites("depth."), (IMAGES, maps(2, 1, 16, 16)))
def two_encoders() -> nn.Module:
    def forward(m: Any, color: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        return m.head((m.color.maps(color)[-1] + m.depth.maps(depth)[-1]).mean((2, 3)))

    return Written(forward, color=Encoder(), depth=Encoder(1), head=nn.Linear(32, 5))


# other dimensions and layouts


@case(["f.4"], maps(2, C, 20))
def sequence() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=branch(dimensions=1))


@case(["f.4"], maps(2, C, 6, 7, 8))
def volume() -> nn.Module:
    return Written(lambda m, x: x + m.f(x), f=branch(dimensions=3))


@case(["f.4"], torch.arange(40).reshape(2, 20))
def words() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.embedding(x).transpose(1, 2)
        return m.head((x + m.f(x)).amax(-1))

    return Written(forward, embedding=nn.Embedding(40, C), f=branch(dimensions=1), head=nn.Linear(C, 5))


@case(["f.4", "g.4"])
def images_then_sequences() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = (x + m.f(x)).mean(2)
        return x + m.g(x)

    return Written(forward, f=branch(), g=branch(dimensions=1))


@case(["f.2"], maps(2, 10, 12, C))
def channels_last_throughout() -> nn.Module:
    layers = [nn.LayerNorm(C), nn.Linear(C, 16), nn.Linear(16, C)]
    return Written(lambda m, x: x + m.f(x), f=nn.Sequential(*layers))


class Inverted(nn.Module):
    """A block as in ConvNeXt: a depthwise convolution, then linear layers with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(C, C, 5, padding=2, groups=C), nn.LayerNorm(C)
        self.up, self.down, self.scale = nn.Linear(C, 16), nn.Linear(16, C), nn.Parameter(torch.rand(C))
        self.drop = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.drop((self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2))


@case(["blocks.0.drop", "blocks.1.drop"], IMAGES)
def inverted() -> nn.Module:
    return Written(
        lambda m, x: m.head(m.norm(m.blocks(m.stem(x)).mean((2, 3)))),
        stem=nn.Conv2d(3, C, 2, 2),
        blocks=nn.Sequential(Inverted(), Inverted()),
        norm=nn.LayerNorm(C),
        head=nn.Linear(C, 5),
    )


class Windows(nn.Module):
    """A block as in Swin: attention in windows, then linear layers, one drop-path for both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 16), nn.GELU(), nn.Linear(16, C))
        self.drop = nn.Identity()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = x.shape
        y = self.norm1(x).reshape(batch, height // 4, 4, width // 4, 4, C).transpose(2, 3).reshape(-1, 16, C)
        y = self.out(F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1)))
        return y.reshape(batch, height // 4, width // 4, 4, 4, C).transpose(2, 3).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attend(x))
        return x + self.drop(self.mlp(self.norm2(x)))


@case(["blocks.0.drop", "blocks.0.mlp.2", "blocks.1.drop", "blocks.1.mlp.2"], IMAGES)
def windows() -> nn.Module:
    return Written(
        lambda m, x: m.head(m.norm(m.blocks(m.stem(x).permute(0, 2, 3, 1))).mean((1, 2))),
        stem=nn.Conv2d(3, C, 2, 2),
        blocks=nn.Sequential(Windows(), Windows()),
        norm=nn.LayerNorm(C),
        head=nn.Linear(C, 5),
    )


# the largest of them, which are slow tests
LARGE = ("two encoders", "siamese", "fused scales", "residual in residual", "skips added after interpolation")
LARGE += ("skips added after transposed convolutions", "long skip over projections", "block called at three sizes")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in CASES]
)
def test_life(name: str) -> None:
    one = CASES[name]
    check_life(one.make(), one.example, one.sites)


@pytest.mark.parametrize("name", ["sum of four", "block under two names", "volume", "windows", "skips concatenated"])
def test_life_with_squeeze_excite(name: str) -> None:
    one = CASES[name]
    check_life(one.make(), one.example, one.sites, "se")


def test_nested_blocks_without_a_last_layer() -> None:
    """A group of blocks with a skip around it: the gate of the group stands behind all of it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + m.group(x)

    def inner(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + m.f(x)

    model = Written(forward, group=nn.Sequential(Written(inner, f=branch()), Written(inner, f=branch()))).eval()
    *within, around = plan(model, "se", example=MAP)
    assert [site.name for site in within] == ["group.0.f.4", "group.1.f.4"]
    group = model.group(MAP)
    attach(model, "se", example=MAP, where=lambda name, layer: name == around.name)
    ((_, wrapper),) = attached(model)
    nn.init.ones_(wrapper.attention.strength)
    torch.testing.assert_close(model(MAP), MAP + wrapper.attention(group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["in place everywhere", "checkpoints", "projection", "sequence", "volume", "windows"])
def test_start_is_exact_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    one = CASES[name]
    model, example = one.make().to(dtype), one.example.to(dtype)
    plain = copy.deepcopy(model)
    attach(model, "cbam", example=example)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for training in (False, True):
        model.train(training), plain.train(training)
        assert same(run(model, example), run(plain, example))


class InFloat(nn.BatchNorm2d):
    """A norm that computes in float32 whatever it is given, and gives that back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class InHalf(nn.Conv2d):
    """A convolution that computes in bfloat16, and gives float32 back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.bfloat16()).float()


@pytest.mark.parametrize("attention", ["se", "cbam"])
@pytest.mark.parametrize("kind", ["norm in float32", "convolution in bfloat16"])
def test_layer_of_another_dtype_than_its_map(kind: str, attention: str) -> None:
    if kind == "norm in float32":
        model, x = nn.Sequential(*[Written(lambda m, x: x + m.f(x), f=branch()) for _ in range(2)]), MAP.bfloat16()
        model.bfloat16()
        for block in model:
            block.f[4] = InFloat(C)
    else:
        model, x = nn.Sequential(*[Written(lambda m, x: x + m.f(x), f=branch()) for _ in range(2)]), MAP
        for block in model:
            block.f[4] = InHalf(C, C, 1).bfloat16()
    expected = run(model.eval(), x)
    attach(model, attention, example=x)
    assert torch.equal(run(model, x), expected)
    loss(run(model.train(), x)).backward()
    assert all(wrapper.attention.strength.grad.any() for _, wrapper in attached(model))


# where the channels are


class Linear1x1(nn.Module):
    """A convolution by a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(C, C, 3, padding=1), nn.Parameter(torch.randn(C, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ F.relu(self.conv(x)).flatten(2)).reshape(x.shape)


class NonLocal(nn.Module):
    """Attention among positions, the values on the left of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(C, C, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        return (value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)).reshape(x.shape)


LAST_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm of the whole map": lambda: nn.LayerNorm([C, 12, 10]),
    "linear over the width": lambda: nn.Linear(10, 10),
    "matrix product from the left": Linear1x1,
    "attention among positions": NonLocal,
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "group norm": lambda: nn.GroupNorm(2, C),
    "instance norm": lambda: nn.InstanceNorm2d(C),
}


@pytest.mark.parametrize("last", LAST_LAYERS)
def test_channels_first_behind_any_layer(last: str) -> None:
    x = maps(2, C, 12, 10)
    model = Written(lambda m, x: x + m.f(x), f=nn.Sequential(*branch(), LAST_LAYERS[last]()))
    (site,) = plan(model, "se", example=x)
    assert (site.name, site.channels, site.size, site.channels_last) == ("f.5", C, (12, 10), False)


class Shuffle(nn.Module):
    """A channel shuffle where the channels are last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("last", [Shuffle, lambda: nn.LayerNorm(C), nn.Softplus])
def test_channels_last_behind_any_layer(last: Callable[[], nn.Module]) -> None:
    x = maps(2, 12, 10, C)
    layers = nn.Sequential(nn.Linear(C, 16), nn.ReLU(), nn.Linear(16, C), last())
    (site,) = plan(Written(lambda m, x: x + m.f(x), f=layers), "se", example=x)
    assert (site.name, site.channels, site.size, site.channels_last) == ("f.3", C, (12, 10), True)


# sums that are not residual


def sums_of(**layers: nn.Module) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(sum(layer(x) for layer in m.children()))

    return Written(forward, **layers)


def pyramid(enlarged: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        low = m.low(x)
        return m.out(m.lateral(x) + enlarged(m.top(low)))

    low = nn.Sequential(*unit(C, C, 3, 2), nn.ReLU())
    return Written(
        forward, low=low, lateral=nn.Conv2d(C, C, 1), top=nn.Conv2d(C, C, 1), out=nn.Conv2d(C, C, 3, padding=1)
    )


NOT_RESIDUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RepVGG": (
        lambda: sums_of(a=nn.Sequential(*unit()), b=nn.Sequential(*unit(C, C, 1)), c=nn.BatchNorm2d(C)),
        "parallel convolutions",
    ),
    "RepVGG with stride": (
        lambda: sums_of(a=nn.Sequential(*unit(C, 16, 3, 2)), b=nn.Sequential(*unit(C, 16, 1, 2))),
        "parallel convolutions",
    ),
    "asymmetric convolutions": (
        lambda: sums_of(a=nn.Conv2d(C, C, (1, 3), padding=(0, 1)), b=nn.Conv2d(C, C, (3, 1), padding=(1, 0))),
        "parallel convolutions",
    ),
    "two equal branches": (lambda: sums_of(a=branch(), b=branch()), "none is a shortcut"),
    "pyramid": (lambda: pyramid(lambda y: F.interpolate(y, scale_factor=2)), "several scales"),
    "function": (
        lambda: Written(lambda m, x: x + torch.sigmoid(m.f(x)), f=branch()),
        r"ends in a function \(sigmoid\)",
    ),
    "map cast by a function": (
        lambda: Written(lambda m, x: x + m.f(x).double(), f=branch()),
        r"ends in a function \(_to_copy\)",
    ),
}


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_sums_without_a_site_are_listed_with_the_reason(name: str) -> None:
    make, reason = NOT_RESIDUAL[name]
    model = make()
    unchanged = snapshot(model)
    with pytest.raises(AttachError, match=reason):
        attach(model, "se", example=MAP)
    unchanged()
    # beside a block, they are listed in its plan
    found = plan(nn.Sequential(Block(), make()), "se", example=MAP)
    assert [site.name for site in found] == ["0.bn2"]
    assert any(one.name.startswith("1") for one in found.skipped)


# what is no constant factor, or not of the branch alone
NOT_SCALED: dict[str, tuple[Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "of the input": (lambda m, x, y: x + y * x.mean(), "mul"),
    "for each position": (lambda m, x, y: x + y * m.places, "mul"),
    "divided by": (lambda m, x, y: x + m.ones / y, "div"),
    "a rounded quotient": (lambda m, x, y: x + torch.div(y, 0.1, rounding_mode="floor"), "div"),
    "unscaled map used as well": (lambda m, x, y: x + y * 0.2 + y.mean(), "mul"),
    "scaled map used as well": (lambda m, x, y: (lambda z: x + z + z.mean())(y * 0.2), "mul"),
    "shifted": (lambda m, x, y: x + (y * 0.2 + 1), "add"),
    "windows": (lambda m, x, y: x + y.unflatten(2, (2, -1)).transpose(1, 2).reshape(y.shape), "_unsafe_view"),
}


@pytest.mark.parametrize("name", NOT_SCALED)
def test_factors_that_do_not_commute_with_a_gate(name: str) -> None:
    form, operator = NOT_SCALED[name]
    places, ones = nn.Parameter(torch.rand(MAP.shape[2:])), nn.Parameter(torch.ones(1))
    model = Written(lambda m, x: form(m, x, m.f(x)), f=branch(), places=places, ones=ones)
    with pytest.raises(AttachError, match=rf"the branch ends in a function \({operator}\)"):
        plan(model, "se", example=MAP)


@pytest.mark.parametrize("name", SCALES)
def test_a_gate_before_a_factor_is_the_gate_behind_it(name: str) -> None:
    model = scaled(SCALES[name]).double().eval()
    x = MAP.double()
    attach(model, "cbam", example=x)
    ((_, wrapper),) = attached(model)
    nn.init.constant_(wrapper.attention.strength, 0.7)
    branch = model.f(x)
    plain = detach(model).f(x)
    gate = branch / plain
    # the gate of the unscaled map, times what the network would have added without a gate
    added = SCALES[name](model.numbers, plain.clone())
    gated = attach(model, "cbam", example=x)
    ((_, again),) = attached(gated)
    again.attention.load_state_dict(wrapper.attention.state_dict())
    torch.testing.assert_close(gated(x), F.relu(added * gate + x))


# sums of linear functions of one map: parallel convolutions, which libraries merge into one
LINEAR: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "two convolutions": lambda m, x: m.conv(x) + m.point(x) + x,
    "norm of two convolutions": lambda m, x: x + m.norm(m.conv(x) + m.point(x)),
    "mixer less norm": lambda m, x: x + m.scale * (m.conv(x) - m.norm(x)),
    "average": lambda m, x: x + (F.avg_pool2d(x, 3, 1, 1) - x),
    "padded and shifted": lambda m, x: (
        x + m.norm(m.point(x) - m.conv(F.pad(x.roll(1, 2), (1, 1, 1, 1)))[:, :, 1:-1, 1:-1])
    ),
}
# one chain of layers is a branch, activation or not
CHAINS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "conv": lambda m, x: x + m.conv(x),
    "norm": lambda m, x: x + m.norm(m.conv(x)),
    "point": lambda m, x: m.point(m.norm(m.conv(x))) / 2 + x,
}
NONLINEAR: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "activation": lambda m, x: m.conv(F.relu(x)),
    "layer norm": lambda m, x: m.conv(F.layer_norm(x, x.shape[1:])),
    "group norm": lambda m, x: m.conv(F.group_norm(x, 2)),
    "instance norm": lambda m, x: m.conv(F.instance_norm(x, weight=m.scale.flatten(), bias=m.scale.flatten())),
    "batch norm of the batch's statistics": lambda m, x: m.conv(F.batch_norm(x, None, None, training=True)),
    "softmax": lambda m, x: m.conv(x.softmax(1)),
    "product": lambda m, x: m.conv(m.point(x) * x),
    "quotient": lambda m, x: m.conv(m.scale / (x + 9)),
    "maximum": lambda m, x: m.conv(F.max_pool2d(x, 3, 1, 1)),
    "another activation": lambda m, x: m.conv(torch.sin(x)),
    "dynamic convolution": lambda m, x: m.conv(F.conv2d(x, x.mean((0, 2, 3)).expand(C, C)[..., None, None])),
}


def linear_layers() -> dict[str, Any]:
    convolutions = {"conv": nn.Conv2d(C, C, 3, padding=1), "point": nn.Conv2d(C, C, 1)}
    return {**convolutions, "norm": nn.BatchNorm2d(C), "scale": nn.Parameter(torch.rand(C, 1, 1) + 0.5)}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_sums_are_parallel_convolutions(name: str) -> None:
    found = plan(nn.Sequential(Block(), Written(LINEAR[name], **linear_layers())), "se", example=MAP)
    assert [site.name for site in found] == ["0.bn2"]
    assert {(one.name, one.reason.split(":")[0]) for one in found.skipped} == {("1", "parallel convolutions")}


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_is_not_linear_makes_a_sum_residual(name: str) -> None:
    model = Written(lambda m, x: x + m.norm(m.point(x) + NONLINEAR[name](m, x)), **linear_layers())
    assert [site.name for site in plan(model, "se", example=MAP)] == ["norm"]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_linear_layers_is_a_branch(name: str) -> None:
    model = Written(CHAINS[name], **linear_layers())
    assert [site.name for site in plan(model, "se", example=MAP)] == [name]


def test_noise_is_no_branch() -> None:
    """A tensor of a map's shape does not depend on the map."""
    noise = Written(lambda m, x: torch.ones_like(x) * m.scale, scale=nn.Parameter(torch.ones(1)))
    model = Written(lambda m, x: (lambda y: y + m.noise(y))(x + m.f(x)), f=branch(), noise=noise)
    assert [site.name for site in plan(model, "se", example=MAP)] == ["f.4"]


# all places


PLACES: dict[tuple[str, str], list[str]] = {
    ("two encoders", "residual-pre"): encoder_sites("color.", ".conv1") + encoder_sites("depth.", ".conv1"),
    ("two encoders", "residual-post"): encoder_sites("color.", "") + encoder_sites("depth.", ""),
    ("siamese", "residual-pre"): encoder_sites("encoder.", ".conv1"),
    ("siamese", "block"): encoder_sites("encoder.", ""),
    ("siamese", "stage"): [f"encoder.layer{stage}.1" for stage in (1, 2, 3)],
    ("skips concatenated", "residual-post"): encoder_sites("encoder.", ""),
    ("skips concatenated", "block"): encoder_sites("encoder.", ""),
    ("block called three times", "residual-pre"): ["f.0"],
    ("block called at three sizes", "residual-pre"): ["f.0"],
    ("activation before the norm", "residual-pre"): ["f.0"],
    ("sequence", "residual-pre"): ["f.0"],
    ("volume", "residual-pre"): ["f.0"],
    ("words", "residual-pre"): ["f.0"],
    ("module dict", "residual-pre"): ["blocks.one.0", "blocks.two.0"],
    ("layer scale and drop path in modules", "residual-pre"): ["f.0"],
    ("projection", "shortcut"): ["down.2"],
    ("inverted", "residual-pre"): ["blocks.0.depthwise", "blocks.1.depthwise"],
    ("inverted", "residual-post"): ["blocks.0", "blocks.1"],
    ("inverted", "block"): ["blocks.0", "blocks.1"],
    ("inverted", "stage"): ["blocks.1"],
    ("inverted", "final"): ["blocks.1"],
    ("windows", "residual-pre"): ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"],
    ("windows", "block"): ["blocks.0", "blocks.1"],
    ("windows", "stage"): ["blocks.1"],
}


@pytest.mark.slow_unless(
    name=[
        "skips concatenated",
        "block called three times",
        "activation before the norm",
        "words",
        "module dict",
        "projection",
        "inverted",
        "windows",
    ]
)
@pytest.mark.slow_unless(id="siamese-stage")
@pytest.mark.parametrize(("name", "at"), PLACES)
def test_life_at_other_places(name: str, at: str) -> None:
    one = CASES[name]
    check_life(one.make(), one.example, PLACES[name, at], at=at)


@pytest.mark.slow_unless(name=["checkpoints", "inverted", "windows"])
@pytest.mark.slow_unless(at=["shortcut", "final"])
@pytest.mark.parametrize("at", ["residual-pre", "residual-post", "shortcut", "block", "stage", "final"])
@pytest.mark.parametrize("name", ["checkpoints", "fused scales", "residual in residual", "inverted", "windows"])
def test_whatever_is_planned_works(name: str, at: str) -> None:
    one = CASES[name]
    model = one.make()
    try:
        plan(model, "se", at=at, example=one.example)
    except AttachError as error:
        assert f"no place at {at!r} (" in str(error)
    else:
        check_life(model, one.example, None, "se", at)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("at", "site"), [("final", "act"), ("residual-post", "act"), ("pool", "pool")])
def test_places_at_the_end_whatever_the_output(form: str, at: str, site: str) -> None:
    attention = "dual" if at == "pool" else "se"
    check_life(giving(FORMS[form]), MAP, [site], attention, at)


@pytest.mark.parametrize("at", ["residual", "residual-pre", "residual-post", "shortcut"])
def test_branch_that_changes_its_input_in_place(at: str) -> None:
    """What attention keeps for the gradient is not changed behind its back."""
    layers = [nn.ReLU(), nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1)]
    model = Written(
        lambda m, x: (lambda y: y.add_(m.f(y)))(m.stem(x)), stem=nn.Conv2d(C, C, 1), f=nn.Sequential(*layers)
    )
    loss(run(model, MAP)).backward()
    try:
        attach(model, "se", at=at, example=MAP)
    except AttachError:
        return
    loss(run(model, MAP)).backward()


# heads


def pooled_by_functions(classify: Callable[[Any, torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return classify(m, F.relu(m.conv(m.stem(x))))

    layers = {"stem": nn.Conv2d(3, C, 3, padding=1), "conv": nn.Conv2d(C, C, 3, padding=1), "head": nn.Linear(C, 5)}
    return Written(forward, **layers)


def checkpointed_head(reentrant: bool) -> nn.Module:
    return pooled_by_functions(lambda m, y: checkpoint(lambda z: m.head(z.mean((2, 3))), y, use_reentrant=reentrant))


def test_head_in_a_reentrant_checkpoint() -> None:
    """It gives gradients to nothing but what it is handed, and the map comes past it: refused with what to do."""
    model = attach(checkpointed_head(True), "dual", example=IMAGES)
    with pytest.raises(AttachError, match="use_reentrant=False"):
        loss(run(model, IMAGES)).backward()


def test_head_in_a_checkpoint() -> None:
    """A classifier that runs again for the gradient pools the same map again."""
    model = checkpointed_head(False)
    other = pooled_by_functions(lambda m, y: m.head(y.mean((2, 3))))
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        torch.manual_seed(5)
        attach(each, "dual", example=IMAGES)
        set_strengths(each, 0.5)
        loss(run(each, IMAGES)).backward()
    for one, same_one in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same_one.grad)


def test_head_in_two_threads() -> None:
    """Two passes at the same time, as in DataParallel, do not see the maps of each other."""
    both = threading.Barrier(2)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.conv(x))
        if m.waits:
            both.wait(timeout=10)
        return m.head(y.mean((2, 3)))

    model = Written(forward, conv=nn.Conv2d(3, C, 3), head=nn.Linear(C, 5), waits=False).eval()
    attach(model, "dual", example=IMAGES)
    set_strengths(model, 0.7)
    inputs = [IMAGES, 2 * IMAGES]
    expected = [run(model, x) for x in inputs]
    model.waits, outputs = True, [None, None]

    def work(number: int) -> None:
        with torch.no_grad(), contextlib.suppress(AttachError):
            outputs[number] = model(inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, one in zip(outputs, expected, strict=True):
        assert output is not None
        torch.testing.assert_close(output, one)


def test_head_leaves_a_map_that_is_given_out_alone() -> None:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.conv(x)
        return m.head(y.mean((2, 3))), m.decode(y)

    model = Written(forward, conv=nn.Conv2d(3, C, 3), head=nn.Linear(C, 5), decode=nn.Conv2d(C, 3, 1)).eval()
    logits, decoded_map = run(model, IMAGES)
    try:
        attach(model, "dual", example=IMAGES)
    except AttachError:
        return
    set_strengths(model, 0.7)
    moved, after = run(model, IMAGES)
    assert not torch.equal(moved, logits) and torch.equal(after, decoded_map)


# what others have done to a network before


def test_names_of_layers_called_like_parts_of_the_wrapper() -> None:
    """Layers of the network called `inner` and `site` are found under their names, and read by the network."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.site = branch(), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.inner(x)) * self.site

    model = Written(lambda m, x: m.blocks(x) * m.blocks[1].site + m.blocks[0].inner[0].weight.mean(), blocks=None)
    model.blocks = nn.Sequential(Named(), Named())
    seen: list[nn.Module] = []
    found = plan(model, "se", at="block", example=MAP, where=lambda name, layer: seen.append(layer) is None)
    assert [site.name for site in found] == ["blocks.0", "blocks.1"]
    assert seen == [*model.blocks]
    expected = run(model.eval(), MAP)
    attach(model, found)
    assert torch.equal(run(model, MAP), expected)
    assert all(model.get_submodule(name) is one for name, one in model.named_modules())
    assert all(model.get_parameter(name) is one for name, one in model.named_parameters())


def test_attributes_called_attention() -> None:
    model = Classifier()
    model.attention = nn.Conv2d(3, 3, 1)
    model.blocks[0].attention = nn.Identity()
    model.blocks[1].bn2.attention = "mine"
    found = plan(model, "se", example=IMAGES)
    assert [site.name for site in found] == [CLASSIFIER_SITES[0], *CLASSIFIER_SITES[2:]]
    assert [(one.name, "attention" in one.reason) for one in found.skipped] == [(CLASSIFIER_SITES[1], True)]
    detach(attach(model, found))
    assert model.blocks[1].bn2.attention == "mine"


class Stage(nn.ModuleList):
    """A list of layers that is called, and that the network counts, indexes and goes through as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x * 1.0


@pytest.mark.parametrize("at", ["residual", "residual-pre", "residual-post", "stage"])
def test_layers_that_are_containers(at: str) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        assert len(m.one) == 3 and m.one[1] is [*m.one][1] and m.one[0] in m.one and bool(m.one)
        assert isinstance(m.one[0].weight, nn.Parameter)
        x = F.avg_pool2d(m.act(x + m.one(x)), 2)
        return m.act(x + m.two(x))

    one, two = (Stage([nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, C, 1)]) for _ in range(2))
    check_life(Written(forward, one=one, two=two, act=nn.Tanh()), MAP, None, at=at)


@pytest.mark.parametrize("held", ["list", "tuple", "dictionary"])
def test_layers_that_the_network_holds_beside_its_children(held: str) -> None:
    """Such layers cannot be exchanged by name: they are, or the network is refused, and no gate stands idle."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = branch()
            self.first, last = self.f[:4], self.f[4]
            self.last = {"list": [last], "tuple": (last,), "dictionary": {0: last}}[held]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.last[0](self.first(x))

    model = Held().eval()
    unchanged, expected = snapshot(model), run(model, MAP)
    try:
        attach(model, "se", example=MAP)
    except AttachError:
        unchanged()
    else:
        set_strengths(model, 0.7)
        assert not torch.equal(run(model, MAP), expected)


def test_hooks_of_the_network() -> None:
    seen: list[str] = []
    model = Classifier()
    model.blocks[0].bn2.register_forward_hook(lambda layer, given, out: seen.append("read"))
    model.blocks[1].bn2.register_forward_hook(lambda layer, given, out: out * 2)
    model.blocks[2].conv2.register_full_backward_hook(lambda layer, given, out: seen.append("backward"))
    model.blocks[3].register_forward_pre_hook(lambda layer, given: (given[0] + 1,))
    model.register_forward_hook(lambda layer, given, out: out + 1)
    check_life(model, IMAGES, CLASSIFIER_SITES)
    assert {"read", "backward"} <= {*seen}


def test_global_hooks() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda layer, given, out: None)
    try:
        check_life(Classifier(), IMAGES, CLASSIFIER_SITES)
    finally:
        handle.remove()


class Around(nn.Module):
    """A wrapper that reads everything else from the network, as many trainers have them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.slow_unless(wrap=[nn.DataParallel, nn.Sequential])
@pytest.mark.parametrize("wrap", [nn.DataParallel, Around, nn.Sequential, lambda model: nn.ModuleList([model])[0]])
def test_wrapped_networks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Classifier())
    prefix = next(name for name, one in model.named_modules() if isinstance(one, Classifier))
    check_life(model, IMAGES, [f"{prefix}.{site}" if prefix else site for site in CLASSIFIER_SITES])
    heads = plan(model, "dual", example=IMAGES)
    assert len(heads) == 1


def test_a_network_of_one_sequence() -> None:
    model = nn.Sequential(*unit(3), Block(), Block(C, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    check_life(model, IMAGES, ["2.bn2", "3.bn2"])
    assert [site.name for site in plan(model, "cbam+dual", example=IMAGES)] == ["2.bn2", "3.bn2", "4"]


@pytest.mark.slow
def test_compiled_networks() -> None:
    """Compiled code sees what is attached, and what is detached."""
    for in_place in (False, True):
        model = Classifier().eval()
        model.compile(backend="eager")
        run_by = model if in_place else torch.compile(Classifier().eval(), backend="eager")
        expected = run(run_by, IMAGES)
        found = plan(run_by, "cbam", example=IMAGES)
        assert [site.name.removeprefix("_orig_mod.") for site in found] == CLASSIFIER_SITES
        attach(run_by, found)
        assert torch.equal(run(run_by, IMAGES), expected)
        set_strengths(run_by, 0.7)
        assert not torch.equal(run(run_by, IMAGES), expected)
        assert torch.equal(run(detach(run_by), IMAGES), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_parts_and_scripted_networks() -> None:
    model = Classifier().eval()
    model.blocks[1] = torch.jit.script(model.blocks[1])
    expected = run(model, IMAGES)
    attach(model, "se", example=IMAGES)
    # what is scripted runs without modules, and has no layers to stand at
    assert [name for name, _ in attached(model)] == [CLASSIFIER_SITES[0], *CLASSIFIER_SITES[2:]]
    assert torch.equal(run(model, IMAGES), expected)
    scripted = torch.jit.script(Classifier().eval())
    keys = list(scripted.state_dict())
    with pytest.raises(AttachError, match=r"[Ss]cript"):
        attach(scripted, "se", example=IMAGES)
    assert list(scripted.state_dict()) == keys


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Classifier()
    found = plan(model, "cbam+dual")
    assert [site.name for site in found] == [*CLASSIFIER_SITES, found.sites[-1].name]
    attach(model, found)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_under_other_modes(mode: Callable[[], Any]) -> None:
    """What is attached there can be trained elsewhere."""
    model = Classifier()
    with mode():
        attach(model, "cbam", example=IMAGES.clone())
    assert [name for name, _ in attached(model)] == CLASSIFIER_SITES
    loss(run(model, IMAGES)).backward()
    assert all(wrapper.attention.strength.grad.any() for _, wrapper in attached(model))


def test_example_made_for_inference() -> None:
    with torch.inference_mode():
        example = IMAGES.clone()
    assert [site.name for site in plan(Classifier(), "cbam", example=example)] == CLASSIFIER_SITES


def test_example_of_a_class_of_its_own() -> None:
    """A batch may be a dataclass, as a prediction may be one."""

    def forward(m: Any, batch: Prediction) -> torch.Tensor:
        return batch.logits + m.f(batch.logits)

    model = Written(forward, f=branch())
    assert [site.name for site in plan(model, "se", example=(Prediction(MAP, []),))] == ["f.4"]


def test_default_device_is_another() -> None:
    """The network is on the CPU, and new tensors are not."""
    model = Classifier()
    torch.set_default_device("meta")
    try:
        found = plan(model, "cbam+dual", example=IMAGES)
    finally:
        torch.set_default_device(None)
    attach(model, found)
    assert {one.device.type for one in model.parameters()} == {"cpu"}
    assert run(model, IMAGES).isfinite().all()


# what plan must leave alone


def always_training() -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = branch()

        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.f(x)

    return Network()


def normalised_by_a_function() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        norm = m.norm
        return x + m.f(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True))

    return Written(forward, f=branch(), norm=nn.BatchNorm2d(C))


def counting() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.passes += 1
        return x + m.f(x)

    model = Written(forward, f=branch())
    model.register_buffer("passes", torch.zeros(()))
    return model


def changing_its_input() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5).div_(2)
        return x + m.f(x)

    return Written(forward, f=branch())


def changing_its_inputs_in_a_list() -> nn.Module:
    def forward(m: Any, xs: list[torch.Tensor]) -> torch.Tensor:
        x = xs.pop()
        x += 1
        return x + m.f(x)

    return Written(forward, f=branch())


def with_chance() -> nn.Module:
    return Written(lambda m, x: x + F.dropout(m.f(x), 0.5, training=True) + m.f(x + torch.rand_like(x)), f=branch())


def partly_frozen() -> nn.Module:
    model = Written(lambda m, x: x + m.f(x), f=branch())
    model.f[1].eval()
    model.f[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        always_training,
        normalised_by_a_function,
        counting,
        changing_its_input,
        changing_its_inputs_in_a_list,
        with_chance,
        partly_frozen,
    ],
)
@pytest.mark.parametrize("attention", ["cbam", "factory"])
def test_plan_changes_nothing(make: Callable[[], nn.Module], attention: str) -> None:
    model, x = make(), MAP.clone()
    example: Any = ([x],) if make is changing_its_inputs_in_a_list else x
    unchanged = snapshot(model)
    with contextlib.suppress(AttachError):
        plan(model, attention if attention == "cbam" else lambda width: nn.Conv2d(width, width, 1), example=example)
    unchanged()
    assert torch.equal(x, MAP)
    assert isinstance(example, torch.Tensor) or len(example[0]) == 1


def test_plan_is_silent_where_the_network_is() -> None:
    """A warning that only a pass without gradients gives is nothing to the user."""
    model = CASES["checkpoints run again"].make()
    assert [site.name for site in plan(model, "se", example=MAP)] == ["f.4", "g.4"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(256, 2, 16, batch_first=True)),
        nn.Identity(),
    ],
)
@pytest.mark.parametrize("at", ["residual", "shortcut", "block", "stage", "final", "pool"])
def test_networks_without_any_place(model: nn.Module, at: str) -> None:
    unchanged = snapshot(model)
    with pytest.raises(AttachError, match="The model was not changed"):
        attach(model, "dual" if at == "pool" else "se", at=at, example=IMAGES)
    unchanged()


# failures in the middle


class Refusing(dict):
    """The children of a layer, of which one cannot be set: always, or the first time only."""

    def __init__(self, children: dict[str, nn.Module], name: str, error: type[BaseException], times: int) -> None:
        super().__init__(children)
        self.name, self.error, self.times = name, error, times

    def __setitem__(self, name: str, child: nn.Module) -> None:
        if name == self.name and self.times:
            self.times -= 1
            raise self.error("it cannot be set")
        super().__setitem__(name, child)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("times", [1, 100])
def test_third_site_cannot_be_set(error: type[BaseException], times: int) -> None:
    model = Classifier()
    third = model.blocks[2]
    third._modules = Refusing(third._modules, "bn2", error, times)
    found = plan(model, "cbam", example=IMAGES)
    unchanged, state = snapshot(model), torch.random.get_rng_state()
    with pytest.raises(error):
        attach(model, found)
    # modules were made, from random numbers
    torch.random.set_rng_state(state)
    unchanged()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_third_module_cannot_be_made(error: type[BaseException]) -> None:
    # the first is made by the plan
    for failing in range(1, 6):
        calls = iter(range(1, 6))

        def factory(width: int, failing: int = failing, calls: Iterator[int] = calls) -> nn.Module:
            if next(calls) == failing:
                raise error("no memory")
            return nn.Identity()

        model = Classifier()
        unchanged = snapshot(model)
        with pytest.raises((error, AttachError)):
            attach(model, factory, example=IMAGES)
        unchanged()
        assert not attached(model)


class Guarded(Block):
    """A block that lets nobody change it."""

    guarded = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.guarded:
            raise RuntimeError("it is guarded")
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if self.guarded:
            raise RuntimeError("it is guarded")
        super().add_module(name, module)

    register_module = add_module


class WithoutHooks(Block):
    """A block that takes no hooks."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("it takes no hooks")


class Broken(Block):
    """A block that does not run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("it does not run")


@pytest.mark.parametrize("kind", [Guarded, WithoutHooks, Broken])
@pytest.mark.parametrize("at", ["residual", "block"])
def test_third_block_refuses(kind: type[Block], at: str) -> None:
    model = Classifier()
    model.blocks[2] = kind()
    # in the class, since it refuses as well
    kind.guarded = True
    try:
        unchanged = snapshot(model)
        state = torch.random.get_rng_state()
        try:
            attach(model, "cbam", at=at, example=IMAGES)
        except (AttachError, RuntimeError):
            unchanged()
        else:
            detach(model)
            torch.random.set_rng_state(state)
            unchanged()
    finally:
        kind.guarded = False


@pytest.mark.parametrize("bad", [None, nn.Flatten(), nn.Conv2d(C, 3, 1), "a name"])
def test_factories_that_make_something_else(bad: Any) -> None:
    model = Classifier()
    unchanged = snapshot(model)
    with pytest.raises(AttachError, match="The model was not changed"):
        attach(model, lambda width: bad, example=IMAGES)
    unchanged()


class Up(nn.Module):
    """A block of a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*unit(width), nn.ReLU(), *unit(), nn.ReLU())

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))


@pytest.mark.parametrize("where", [None, "encoder*"])
def test_stages_of_an_encoder_without_blocks(where: str | None) -> None:
    """A stage ends where the resolution changes, whether or not the decoder alone is made of blocks."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        skips = [m.encoder[0](x)]
        for layers in m.encoder[1:]:
            skips.append(layers(F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for block in m.decoder:
            y = block(y, skips.pop())
        return m.segment(y)

    encoder = nn.ModuleList(nn.Sequential(*unit(width), nn.ReLU(), *unit(), nn.ReLU()) for width in (3, C, C))
    decoder = nn.ModuleList([Up(2 * C), Up(2 * C)])
    model = Written(forward, encoder=encoder, decoder=decoder, segment=nn.Conv2d(C, 2, 1))
    found = [site.name for site in plan(model, "se", at="stage", example=IMAGES, where=where)]
    assert [name.split(".")[:2] for name in found if name.startswith("encoder")] == [
        ["encoder", str(i)] for i in range(3)
    ]


# networks of other libraries


class Unet(nn.Module):
    """An encoder of timm that gives all its maps, and a decoder that concatenates them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True, pretrained=False)
        widths = self.encoder.feature_info.channels()
        pairs = zip(widths[:-1], [*[16] * (len(widths) - 2), widths[-1]], strict=True)
        self.decoder = nn.ModuleList(
            nn.Sequential(*unit(skip + below, 16), nn.ReLU(), *unit(16, 16), nn.ReLU()) for skip, below in pairs
        )
        self.segment = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *skips, y = self.encoder(x)
        for skip, layers in zip(skips[::-1], [*self.decoder][::-1], strict=True):
            y = layers(torch.cat([skip, F.interpolate(y, skip.shape[2:])], 1))
        return self.segment(y)


def with_random_norms(model: nn.Module) -> nn.Module:
    """The last norms of residual branches may start at 0, where no gate shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def check_encoder(model: nn.Module, example: Any, encoder: str, at: str, count: int) -> None:
    """As many sites in the encoder by a glob as in the encoder itself; trained and taken away again."""
    expected, keys = run(model.eval(), example), list(model.state_dict())
    image = torch.rand(2, 3, 64, 64)
    alone = [f"{encoder}.{site.name}" for site in plan(model.get_submodule(encoder), "se", at=at, example=image)]
    attach(model, "se", at=at, example=example, where=f"{encoder}*")
    found = [name for name, _ in attached(model)]
    assert len(found) == count and {*found} <= {*alone}
    assert same(run(model, example), expected)
    model.train()
    if isinstance(example, tuple):
        target = {"boxes": torch.tensor([[8.0, 8.0, 50.0, 60.0]]), "labels": torch.ones(1, dtype=torch.int64)}
        total = sum(model(*example, [target, target]).values())
    else:
        total = loss(model(example))
    total.backward()
    assert all(wrapper.attention.strength.grad.any() for _, wrapper in attached(model))
    assert list(detach(model).state_dict()) == keys


@pytest.mark.slow_unless(at="stage")
@pytest.mark.parametrize(("at", "count"), [("residual", 8), ("residual-post", 8), ("block", 8), ("stage", 4)])
def test_encoder_of_a_unet(at: str, count: int) -> None:
    check_encoder(with_random_norms(Unet("resnet18")), maps(2, 3, 64, 64), "encoder", at, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at", "count"),
    [
        ("mobilenetv2_050", "residual", 10),
        ("mobilenetv2_050", "stage", 5),
        ("efficientnet_b0", "residual", 9),
        ("efficientnet_b0", "block", 15),
        ("convnext_atto", "residual", 12),
        ("vgg11_bn", "block", 8),
        ("vgg11_bn", "stage", 4),
    ],
)
def test_other_encoders_of_a_unet(name: str, at: str, count: int) -> None:
    check_encoder(with_random_norms(Unet(name)), maps(2, 3, 64, 64), "encoder", at, count)


DETECTED = ([maps(3, 64, 64).abs(), maps(3, 64, 64).abs()],)
SEGMENTATION, DETECTION = torchvision.models.segmentation, torchvision.models.detection
# the network, an input, and its residual sums, counted from the published block counts
TORCHVISION: dict[str, tuple[Callable[..., nn.Module], Any, int]] = {
    "lraspp_mobilenet_v3_large": (SEGMENTATION.lraspp_mobilenet_v3_large, maps(2, 3, 64, 64), 10),
    "deeplabv3_mobilenet_v3_large": (SEGMENTATION.deeplabv3_mobilenet_v3_large, maps(2, 3, 64, 64), 10),
    "fcn_resnet50": (SEGMENTATION.fcn_resnet50, maps(2, 3, 64, 64), 16),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (DETECTION.fasterrcnn_mobilenet_v3_large_320_fpn, DETECTED, 10),
    "ssdlite320_mobilenet_v3_large": (DETECTION.ssdlite320_mobilenet_v3_large, DETECTED, 10),
    "retinanet_resnet50_fpn": (functools.partial(DETECTION.retinanet_resnet50_fpn, min_size=64), DETECTED, 16),
}


@pytest.mark.parametrize(
    "name",
    ["lraspp_mobilenet_v3_large", *(pytest.param(name, marks=pytest.mark.slow) for name in [*TORCHVISION][1:])],
)
def test_segmentation_and_detection_of_torchvision(name: str) -> None:
    make, example, count = TORCHVISION[name]
    model = with_random_norms(make(weights=None, weights_backbone=None))
    check_encoder(model, example, "backbone", "residual", count)
