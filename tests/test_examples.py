"""The images with which a network is run where the caller gives none."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from convattn import attach, networks, plan
from convattn.errors import AttachError
from convattn.networks.cut import example_for, features, watch_example


def convolutional(dimensions: int, channels: int) -> nn.Sequential:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return nn.Sequential(convolution(channels, 4, 3, padding=1), nn.ReLU(), convolution(4, 4, 3, padding=1))


class Fixed(nn.Module):
    """A network that takes images of one size."""

    def __init__(self, *size: int, channels: int = 3, **named: Any) -> None:
        super().__init__()
        self.body, self.size = convolutional(len(size), channels), size
        for name, value in named.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != self.size:
            raise ValueError(f"it takes {self.size}, got {tuple(x.shape[2:])}")
        return self.body(x)  # type: ignore[no-any-return]


def size_of(model: nn.Module) -> tuple[int, ...]:
    """The size of the images with which a network ran."""
    return watch_example(model).values[0].shape[1:]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_dimensions_of_the_first_convolution(dimensions: int, channels: int) -> None:
    model = convolutional(dimensions, channels)
    assert example_for(model).shape == (2, channels, *[64] * dimensions)
    assert size_of(model) == (channels, *[64] * dimensions)
    (site,) = plan(model, "se", at="final", reduction=2)
    assert site.size == (64,) * dimensions


@dataclass
class Config:
    input_size: tuple[int, int, int] = (3, 80, 72)
    first_conv: str | None = None


NAMED: dict[str, Callable[[], nn.Module]] = {
    "input_size": lambda: Fixed(72, 72, input_size=72),
    "input_size of height and width": lambda: Fixed(80, 72, input_size=(80, 72)),
    "input_size with channels": lambda: Fixed(80, 72, input_size=[3, 80, 72]),
    "image_size": lambda: Fixed(72, 72, image_size=72),
    "size of the patches' images": lambda: Fixed(80, 72, patch_embed=SimpleNamespace(img_size=(80, 72))),
    "dictionary": lambda: Fixed(80, 72, pretrained_cfg={"input_size": (3, 80, 72)}),
    "older name": lambda: Fixed(80, 72, default_cfg={"input_size": (3, 80, 72)}),
    "dataclass": lambda: Fixed(80, 72, pretrained_cfg=Config()),
    "built for another size than the weights": lambda: Fixed(72, 72, img_size=72, pretrained_cfg=Config()),
    "built for other channels than the weights": lambda: Fixed(
        80, 72, channels=1, pretrained_cfg=Config(first_conv="body.0")
    ),
    "a part": lambda: nn.Sequential(nn.Identity(), Fixed(80, 72, pretrained_cfg=Config())),
    "signal": lambda: Fixed(500, input_size=500),
    "volume": lambda: Fixed(8, 12, 10, channels=1, input_size=(1, 8, 12, 10)),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_network_s_own_word(name: str) -> None:
    model = NAMED[name]()
    inner = model[1] if isinstance(model, nn.Sequential) else model
    assert size_of(model)[1:] == inner.size
    if inner is model:
        assert tuple(example_for(model).shape[2:]) == inner.size
    attach(model, "se", at="final", reduction=2)


@pytest.mark.parametrize("side", [28, 32, 64, 224, 256, 299, 384])
def test_sizes_of_networks_that_say_nothing(side: int) -> None:
    assert size_of(Fixed(side, side)) == (3, side, side)


@pytest.mark.parametrize("word", ["96", (3,), (1, 2, 3, 4, 5), 0, -1, None, (0, 0), nn.Identity(), 2.5])
def test_a_word_that_names_no_size(word: Any) -> None:
    assert size_of(Fixed(64, 64, input_size=word)) == (3, 64, 64)


def test_the_first_convolution_that_is_listed_is_not_the_first_that_is_called() -> None:
    class Frequencies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Conv2d(64, 4, 1), nn.Conv2d(3, 64, 3)
            self.default_cfg = {"input_size": (3, 64, 64)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))  # type: ignore[no-any-return]

    assert size_of(Frequencies()) == (3, 64, 64)


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (Fixed(17, 17), r"got \(224, 224\)"),
        (Fixed(17, 17, input_size=48), r"got \(48, 48\)"),
        (Fixed(17, 17, default_cfg={"input_size": (3, 48, 40)}), r"got \(48, 40\)"),
        (Fixed(17), r"got \(224,\)"),
    ],
)
def test_the_error_is_that_of_the_likeliest_size(model: nn.Module, shown: str) -> None:
    for call in (lambda: plan(model, "se"), lambda: attach(model, "se"), lambda: features(model, "body.0")):
        with pytest.raises(AttachError, match=shown) as caught:
            call()
        assert str(caught.value).endswith("The model was not changed.")


# networks of timm that take images of one size
TIMM = {"test_maxvit": 160, "eca_botnext26ts_256": 256, "csatv2": 512}


@pytest.mark.slow_unless(name=["test_maxvit", "eca_botnext26ts_256"])
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_of_one_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert size_of(model) == (3, TIMM[name], TIMM[name])


def test_networks_of_timm_that_were_built_otherwise() -> None:
    assert size_of(timm.create_model("resnet10t", in_chans=1)) == (1, 176, 176)
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256", img_size=128, in_chans=4)
    assert size_of(model) == (4, 128, 128)


def test_named_networks() -> None:
    model = networks.create("timm:test_maxvit", classes=2)
    (site,) = plan(model, "se", at="final")
    assert site.size == (5, 5)
