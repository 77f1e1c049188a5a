"""Modules of a user's own: attached, planned, saved, folded and trained as those that have a name are."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convattn
from convattn import attach, detach, errors, fold, load, networks, parameter_groups, plan, registry, save
from convattn.attachment import Blended, attached, effects
from convattn.nn import SpatialAttention, SqueezeExcite
from convattn.train import controls
from own_modules import Elementwise, GlobalContext, Means
from tolerances import assert_close, is_close

PLACES = ("residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final")


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered for one test."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    convattn.register("context", "update")(GlobalContext)
    convattn.register("both", "gate")(Elementwise)
    yield


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    network = networks.resnet20(classes=5).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def moved(model: nn.Module, strength: float = 0.5) -> nn.Module:
    for _, wrapper in attached(model):
        for name, parameter in wrapper.attention.named_parameters():
            nn.init.constant_(parameter, strength) if name == "strength" else nn.init.normal_(parameter, 0.1, 0.5)
    return model


@pytest.mark.slow_unless(at="residual")
@pytest.mark.slow_unless(attention="both", at=["shortcut", "stage", "final"])
@pytest.mark.parametrize("attention", ["context", "both", "context+dual", GlobalContext, Elementwise])
@pytest.mark.parametrize("at", PLACES)
def test_at_every_place(plain: nn.Module, attention: Any, at: str) -> None:
    x = images()
    y = plain(x)
    chosen = plan(plain, attention, at=at)
    model = attach(copy.deepcopy(plain), attention, at=at)
    assert len(chosen) == len(attached(model)) > 0
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert sum(site.parameters for site in chosen) == sum(model.get_parameter(name).numel() for name in added)
    assert torch.equal(model(x), y)
    # learns from the first step on
    model(x).square().sum().backward()
    strengths = [wrapper.attention.strength for _, wrapper in attached(model)]
    assert all(one.grad.abs().item() > 0 for one in strengths)
    assert not is_close(moved(model)(x), y)
    assert torch.equal(detach(model)(x), y)


def test_an_update_on_the_branch_is_added_there(plain: nn.Module) -> None:
    x = images()
    model = moved(attach(copy.deepcopy(plain), "context", where="layer1.0*"))
    attention = model.layer1[0].bn2.attention
    seen: list[torch.Tensor] = []
    attention.register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    model(x)
    assert_close(seen[1], seen[0] + 0.5 * attention.update(seen[0]))
    assert not is_close(seen[1], seen[0])


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("attention", ["context", "both", "context+dual"])
def test_registered_modules_are_saved_and_loaded_by_name(
    plain: nn.Module, attention: str, start: str, tmp_path: Path
) -> None:
    x = images()
    model = moved(attach(copy.deepcopy(plain), attention, start=start))
    save(model, tmp_path)
    fresh = load(copy.deepcopy(plain), tmp_path)
    assert torch.equal(fresh(x), model(x)) and not is_close(model(x), plain(x))


@pytest.mark.parametrize("cls", [Means, functools.partial(Means, over=(2,))])
def test_classes_without_a_name_are_saved_and_loaded_as_factories(plain: nn.Module, cls: Any, tmp_path: Path) -> None:
    x = images()
    model = moved(attach(copy.deepcopy(plain), cls))
    save(model, tmp_path)
    ((name, *_),) = {(site.attention,) for site in plan(plain, cls)}
    with pytest.raises(errors.WeightsError, match=rf"factories=\{{'{name}'"):
        load(copy.deepcopy(plain), tmp_path)
    fresh = load(copy.deepcopy(plain), tmp_path, factories={name: cls})
    assert torch.equal(fresh(x), model(x)) and not is_close(model(x), plain(x))


def test_a_class_of_the_contract_is_no_factory(plain: nn.Module) -> None:
    model = attach(copy.deepcopy(plain), Means, over=(2,))
    # by its own strength, and told of its place
    assert {type(wrapper.attention) for _, wrapper in attached(model)} == {Means}
    assert {wrapper.attention.over for _, wrapper in attached(model)} == {(2,)}
    paper = attach(copy.deepcopy(plain), Means, start="paper")
    assert {wrapper.attention.strength for _, wrapper in attached(paper)} == {None}


def test_a_class_that_has_a_name_is_attached_under_it(plain: nn.Module) -> None:
    assert {site.attention for site in plan(plain, GlobalContext)} == {"context"}
    assert {site.attention for site in plan(plain, SqueezeExcite, reduction=4)} == {"se"}
    # whose class takes no number of channels
    model = attach(copy.deepcopy(plain), SpatialAttention)
    assert {type(wrapper.attention) for _, wrapper in attached(model)} == {SpatialAttention}


class Fixed(convattn.nn.Gate):
    """A gate that knows its place by itself, and starts as it likes."""

    def __init__(self, channels: int, start: Any = None) -> None:
        super().__init__(channels=channels, dimensions=2, start="paper")

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x.mean(dim=1, keepdim=True))


class Doubled(nn.Module):
    """A module that knows nothing of convattn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("cls", [Fixed, Doubled])
def test_registered_modules_that_do_not_start_at_identity_are_blended(plain: nn.Module, cls: Any) -> None:
    convattn.register("other", "gate")(cls)
    x = images()
    model = attach(copy.deepcopy(plain), "other")
    assert {type(wrapper.attention) for _, wrapper in attached(model)} == {Blended}
    assert torch.equal(model(x), plain(x))
    assert not is_close(moved(model)(x), plain(x))


def test_a_strength_in_front_of_a_strength_would_never_learn(plain: nn.Module) -> None:
    model = attach(copy.deepcopy(plain), lambda channels: SqueezeExcite(channels, start="identity"))
    model(images()).square().sum().backward()
    assert all(wrapper.attention.strength.grad.abs().item() > 0 for _, wrapper in attached(model))


@pytest.mark.parametrize(
    ("attention", "options", "error", "said"),
    [
        ("context+se", {}, errors.AttachError, "one gate or update and one head can be joined"),
        ("context+both", {}, errors.AttachError, "one gate or update and one head can be joined"),
        ("context", {"at": "pool"}, errors.InvalidOption, "'context' has an update, which stands at='final'"),
        ("context", {"colour": 1}, errors.InvalidOption, r"context takes no option 'colour'\. Known: reduction\."),
        ("context", {"reduction": 0}, errors.InvalidOption, "reduction must be a whole number of at least 1, got 0"),
        (SqueezeExcite(8), {}, errors.InvalidOption, "expected a name, or a class or factory .* got a SqueezeExcite"),
        (Means, {"over": (7,)}, errors.AttachError, "'Means' makes no module for the 16 channels of 'layer1.0.bn2'"),
        ("mine.py:Gate", {}, errors.UnknownName, "No file mine.py, named by 'mine.py:Gate'"),
    ],
)
def test_mistakes(plain: nn.Module, attention: Any, options: Any, error: type[Exception], said: str) -> None:
    model = copy.deepcopy(plain)
    with pytest.raises(error, match=said) as caught:
        attach(model, attention, **options)
    assert "\n" not in str(caught.value) and not attached(model)


def test_a_module_of_a_file(plain: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(convattn.nn.__file__).with_name("squeeze_excite.py").read_text())
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom convattn.nn import Gate\nclass Mine(Gate):\n"
        "    def __init__(self, channels, *, dimensions=2, start='paper', power=1.0):\n"
        "        super().__init__(channels=channels, dimensions=dimensions, start=start)\n"
        "        self.power = torch.nn.Parameter(torch.tensor([power]))\n"
        "    def gate(self, x):\n        return torch.sigmoid(self.power * x.mean(1, keepdim=True))\n"
    )
    name, x = f"{tmp_path / 'mine.py'}:Mine", images()
    model = attach(copy.deepcopy(plain), f"{name}+dual", power=3.0)
    assert torch.equal(model(x), plain(x))
    assert {wrapper.attention.power.item() for _, wrapper in attached(model)[:-1]} == {3.0}
    # and its folder runs no code: it says what to give
    save(moved(model), tmp_path / "saved")
    (tmp_path / "mine.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(errors.WeightsError, match=r"made by a factory called .*mine\.py:Mine"):
        load(copy.deepcopy(plain), tmp_path / "saved")


# fold


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("attention", ["context", "both", Means])
def test_silent_ones_are_removed(plain: nn.Module, attention: Any, data: bool) -> None:
    x = images(4)
    model = attach(copy.deepcopy(plain), attention)
    found = fold(model, x if data else None)
    assert len(found.folded) == len(found) == 9 and not attached(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("data", [False, True])
def test_an_update_that_does_something_is_kept_with_a_reason(plain: nn.Module, data: bool) -> None:
    x = images(4)
    model = moved(attach(copy.deepcopy(plain), "context"))
    y = model(x)
    found = fold(model, x if data else None)
    assert {one.reason for one in found} == {"what it adds can be merged into no weight"} and not found.folded
    assert torch.equal(model(x), y)


@pytest.mark.slow_unless(id=["True-over0", "True-over3"])
@pytest.mark.parametrize("over", [(2, 3), (3,), (1,), ()])
@pytest.mark.parametrize("data", [False, True])
def test_a_constant_gate_of_any_shape_is_merged(plain: nn.Module, over: tuple[int, ...], data: bool) -> None:
    x = images(4)
    model = moved(attach(copy.deepcopy(plain), Means, over=over))
    for _, wrapper in attached(model):
        nn.init.constant_(wrapper.attention.weight, 2.0)
    kept = fold(copy.deepcopy(model), x if data else None, 1e-6)
    assert {one.reason for one in kept} == {"it depends on the input"}
    for _, wrapper in attached(model):
        # the gate is one half everywhere
        nn.init.zeros_(wrapper.attention.weight)
    y = model(x)
    assert len(fold(model, x if data else None).folded) == 9
    assert_close(model(x), y)
    assert not is_close(y, plain(x))


def test_a_constant_gate_that_is_blended_from_outside_is_merged(plain: nn.Module) -> None:
    x = images(4)
    model = attach(copy.deepcopy(plain), lambda channels: Means(channels, over=(3,)))
    moved(model)
    for _, wrapper in attached(model):
        nn.init.zeros_(wrapper.attention.module.weight)
    y = model(x)
    assert len(fold(model).folded) == 9
    assert_close(model(x), y)
    assert not is_close(y, plain(x))


class Positions(convattn.nn.Gate):
    """A number for each position of maps of 16, 8 and 4 pixels, of which probes of another size have none."""

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        self.logits = nn.Parameter(torch.zeros(1, 1, 256 // channels, 256 // channels))

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.logits)


def test_gates_that_know_the_size_of_the_map(plain: nn.Module) -> None:
    x = images(4)
    model = moved(attach(copy.deepcopy(plain), Positions, example=x))
    nn.init.zeros_(model.layer1[0].bn2.attention.logits)
    y = model(x)
    # the same for every input, and only one of them is the same for every position
    assert fold(model).folded == ["layer1.0.bn2"]
    assert_close(model(x), y)


class Two(convattn.nn.Gate):
    """A product of a gate for each row and one for each element, which vary over common axes."""

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x.mean(3, keepdim=True), "b": x}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x * x.mean(3, keepdim=True)


def test_the_mean_of_a_product_is_no_product_of_means(plain: nn.Module) -> None:
    x = images(4)
    model = attach(copy.deepcopy(plain), Two, where="layer1.0*", start="paper")
    seen: list[torch.Tensor] = []
    model.layer1[0].bn2.attention.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    (found,) = fold(model, x, allow=())
    gate = (seen[0] * seen[0].mean(3, keepdim=True)).double()
    mean = gate.mean((0, 2, 3), keepdim=True)
    assert found.deviation == pytest.approx((gate - mean).abs().max().item(), rel=1e-6)


# what they do, for whoever looks


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("factory", [Means, GlobalContext, Doubled, functools.partial(Means, over=(1,))])
def test_what_a_blended_module_does(factory: Callable[..., nn.Module], start: str) -> None:
    torch.manual_seed(1)
    attention = Blended(factory(8), start=start)
    for name, parameter in attention.named_parameters():
        nn.init.constant_(parameter, 0.4) if name == "strength" else nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 6)
    y = attention(x)
    if effects.has_gates(attention):
        (gate,) = effects.gates(attention, x).values()
        assert gate.numel() < x.numel()
        assert_close(x * gate, y)
    else:
        assert_close(x + effects.added(attention, x), y)
    assert not is_close(y, x)


def test_groups_of_parameters(plain: nn.Module) -> None:
    model = attach(copy.deepcopy(plain), "context")
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.1, weight_decay=0.01)}
    strengths = {wrapper.attention.strength for _, wrapper in attached(model)}
    assert strengths <= set(groups["attention without decay"]["params"])
    assert groups["attention without decay"]["weight_decay"] == 0


@pytest.mark.parametrize("kind", ["placebo", "adapter"])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_controls_of_an_update(plain: nn.Module, kind: str, start: str) -> None:
    x = images()
    model = moved(attach(copy.deepcopy(plain), "context", start=start))
    sizes = [controls.size(wrapper.attention) for _, wrapper in attached(model)]
    first = model.layer1[0].bn2.attention
    controls.exchange(model, kind, "context")
    assert model(x).isfinite().all()
    if kind == "adapter":
        of_adapters = [controls.size(wrapper.attention) for _, wrapper in attached(model)]
        assert all(abs(one - other) <= 32 for one, other in zip(of_adapters, sizes, strict=True))
        return
    # what the module adds to a map of ones is added to every map
    y = torch.randn(2, 16, 4, 4)
    control = model.layer1[0].bn2.attention
    assert_close(control(y), y + first.added(torch.ones_like(y)))
    assert not is_close(control(y), y)
