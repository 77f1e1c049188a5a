"""The blocks, the stages and the last map of networks with a decoder, in the forms in which these are written."""

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from convattn import attach, detach, plan
from convattn.attachment import attached
from convattn.errors import AttachError

WIDTHS = (4, 8, 12, 16, 20)


def layer(kind: str, dimensions: int, *args: int, **options: int | bool) -> nn.Module:
    """The layer of a kind for maps of so many dimensions."""
    return getattr(nn, f"{kind}{dimensions}d")(*args, **options)  # type: ignore[no-any-return]


def pair(channels_in: int, channels: int, dimensions: int = 2) -> list[nn.Module]:
    """Two convolutions, each with its norm and its activation."""
    found: list[nn.Module] = []
    for width in (channels_in, channels):
        found += [
            layer("Conv", dimensions, width, channels, 3, padding=1, bias=False),
            layer("BatchNorm", dimensions, channels),
            nn.ReLU(inplace=True),
        ]
    return found


class Pair(nn.Module):
    def __init__(self, channels_in: int, channels: int, dimensions: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(*pair(channels_in, channels, dimensions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Residual(Pair):
    """A pair with a shortcut."""

    def __init__(self, channels_in: int, channels: int, dimensions: int = 2) -> None:
        super().__init__(channels_in, channels, dimensions)
        self.shortcut = layer("Conv", dimensions, channels_in, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.shortcut(x) + self.layers(x))


class Enlarge(nn.Module):
    """Twice the size, by a transposed convolution or by interpolation."""

    def __init__(self, channels: int, channels_out: int, dimensions: int, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.up = layer("ConvTranspose", dimensions, channels, channels_out, 2, stride=2)
        else:
            mode = ("linear", "bilinear", "trilinear")[dimensions - 1]
            self.up = nn.Upsample(scale_factor=2, mode=mode, align_corners=True)
        self.width = channels_out if transposed else channels

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        margins = [side for a, b in zip(x.shape[:1:-1], skip.shape[:1:-1], strict=True) for side in (0, b - a)]
        return torch.cat([skip, F.pad(x, margins)], 1)


class Down(nn.Module):
    def __init__(self, block: Callable[..., nn.Module], a: int, b: int, dimensions: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(layer("MaxPool", dimensions, 2), block(a, b, dimensions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxpool_conv(x)  # type: ignore[no-any-return]


class DownOfAttributes(nn.Module):
    def __init__(self, block: Callable[..., nn.Module], a: int, b: int, dimensions: int) -> None:
        super().__init__()
        self.pool, self.conv = layer("MaxPool", dimensions, 2), block(a, b, dimensions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pool(x))  # type: ignore[no-any-return]


class Up(nn.Module):
    def __init__(
        self, block: Callable[..., nn.Module], below: int, skip: int, dimensions: int, transposed: bool
    ) -> None:
        super().__init__()
        self.enlarge = Enlarge(below, skip, dimensions, transposed)
        self.conv = block(self.enlarge.width + skip, skip, dimensions)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv(self.enlarge(x, skip))  # type: ignore[no-any-return]


class Last(nn.Module):
    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        self.conv = layer("Conv", dimensions, channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


NAMES = ("inc", "down", "up", "outc")
OTHER_NAMES = ("outc", "up", "down", "inc")


class Unet(nn.Module):
    """Of parts that hold the blocks."""

    def __init__(
        self,
        block: Callable[..., nn.Module] = Pair,
        *,
        dimensions: int = 2,
        transposed: bool = False,
        called: tuple[str, str, str, str] = NAMES,
        down: type[nn.Module] = Down,
    ) -> None:
        super().__init__()
        self.called = called
        first, encoder, decoder, last = called
        self.add_module(first, block(3, WIDTHS[0], dimensions))
        for number in range(1, 5):
            self.add_module(f"{encoder}{number}", down(block, *WIDTHS[number - 1 : number + 1], dimensions))
        for number in range(1, 5):
            widths = WIDTHS[5 - number], WIDTHS[4 - number]
            self.add_module(f"{decoder}{number}", Up(block, *widths, dimensions, transposed))
        self.add_module(last, Last(WIDTHS[0], dimensions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, encoder, decoder, last = self.called
        skips = [self.get_submodule(first)(x)]
        for number in range(1, 5):
            skips.append(self.get_submodule(f"{encoder}{number}")(skips[-1]))
        x = skips.pop()
        for number in range(1, 5):
            x = self.get_submodule(f"{decoder}{number}")(x, skips.pop())
        return self.get_submodule(last)(x)


class Flat(nn.Module):
    """All blocks in the network itself, without classes for the two ways; skips concatenated or added."""

    def __init__(self, block: Callable[..., nn.Module], *, transposed: bool = False, added: bool = False) -> None:
        super().__init__()
        self.added = added
        self.pool = nn.MaxPool2d(2)
        widths = [3, *WIDTHS]
        for number in range(1, 6):
            self.add_module(f"encoder{number}", block(*widths[number - 1 : number + 1]))
        for number in range(4, 0, -1):
            below, width = WIDTHS[number], WIDTHS[number - 1]
            up = nn.ConvTranspose2d(below, width, 2, 2) if transposed else self.interpolated(below, width)
            self.add_module(f"upconv{number}", up)
            self.add_module(f"decoder{number}", block(width if added else 2 * width, width))
        self.conv = nn.Conv2d(WIDTHS[0], 2, 1)

    @staticmethod
    def interpolated(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for number in range(1, 6):
            x = self.get_submodule(f"encoder{number}")(x if number == 1 else self.pool(x))
            skips.append(x)
        skips.pop()
        for number in range(4, 0, -1):
            x, skip = self.get_submodule(f"upconv{number}")(x), skips.pop()
            x = self.get_submodule(f"decoder{number}")(x + skip if self.added else torch.cat([x, skip], 1))
        return torch.sigmoid(self.conv(x))


class Lists(nn.Module):
    """The blocks of the way down in one list, those of the way up in another."""

    def __init__(self, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.down_path = nn.ModuleList(block(a, b) for a, b in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True))
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up_path = nn.ModuleList(block(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(WIDTHS[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for block in self.down_path:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.ups, self.up_path, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return F.interpolate(self.last(x), scale_factor=2)


def sequence(channels_in: int, channels: int, dimensions: int = 2) -> nn.Module:
    return nn.Sequential(*pair(channels_in, channels, dimensions))


def without_norms(channels_in: int, channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
    )


IN_PARTS = ["inc", *(f"down{n}.maxpool_conv.1" for n in range(1, 5)), *(f"up{n}.conv" for n in range(1, 5))]
PARTS = ["inc", *(f"down{n}" for n in range(1, 5)), *(f"up{n}" for n in range(1, 5))]
# where a part takes two maps, the layer in it that ends it and takes one
STAGES = [*PARTS[:5], *IN_PARTS[5:]]
SEQUENCES = [*PARTS[:5], *(f"up{n}.conv.5" for n in range(1, 5))]
FLAT = [*(f"encoder{n}" for n in range(1, 6)), *(f"decoder{n}" for n in (4, 3, 2, 1))]
LISTS = [*(f"down_path.{n}" for n in range(5)), *(f"up_path.{n}" for n in range(4))]

# the network, its blocks, and the names of its stages where these are not those of the blocks
FORMS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "bilinear": (Unet, IN_PARTS, STAGES),
    "transposed": (lambda: Unet(transposed=True), IN_PARTS, STAGES),
    "names exchanged": (
        lambda: Unet(called=OTHER_NAMES),
        ["outc", *(f"up{n}.maxpool_conv.1" for n in range(1, 5)), *(f"down{n}.conv" for n in range(1, 5))],
        ["outc", *(f"up{n}" for n in range(1, 5)), *(f"down{n}.conv" for n in range(1, 5))],
    ),
    "blocks as attributes": (
        lambda: Unet(down=DownOfAttributes),
        ["inc", *(f"down{n}.conv" for n in range(1, 5)), *(f"up{n}.conv" for n in range(1, 5))],
        STAGES,
    ),
    "sequences in parts": (lambda: Unet(sequence), *[SEQUENCES] * 2),
    "sequences in attributes of parts": (lambda: Unet(sequence, down=DownOfAttributes), *[SEQUENCES] * 2),
    "residual blocks": (lambda: Unet(Residual), IN_PARTS, STAGES),
    "residual blocks as attributes": (
        lambda: Unet(Residual, down=DownOfAttributes),
        ["inc", *(f"down{n}.conv" for n in range(1, 5)), *(f"up{n}.conv" for n in range(1, 5))],
        STAGES,
    ),
    "signals": (lambda: Unet(dimensions=1), IN_PARTS, STAGES),
    "volumes": (lambda: Unet(dimensions=3, transposed=True), IN_PARTS, STAGES),
    "flat": (lambda: Flat(Pair), FLAT, FLAT),
    "flat and transposed": (lambda: Flat(Pair, transposed=True), FLAT, FLAT),
    "flat sequences": (lambda: Flat(sequence, transposed=True), FLAT, FLAT),
    "flat sequences without norms": (lambda: Flat(without_norms), FLAT, FLAT),
    "skips added": (lambda: Flat(Pair, added=True), FLAT, FLAT),
    "skips added to transposed": (lambda: Flat(Pair, added=True, transposed=True), FLAT, FLAT),
    "residual blocks and skips added": (lambda: Flat(Residual, added=True, transposed=True), FLAT, FLAT),
    "sequences and skips added": (lambda: Flat(sequence, added=True, transposed=True), FLAT, FLAT),
    "lists": (lambda: Lists(Pair), LISTS, LISTS),
    "lists of sequences": (lambda: Lists(sequence), LISTS, LISTS),
    "in a module": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), Unet()),
        [f"1.{name}" for name in IN_PARTS],
        [f"1.{name}" for name in STAGES],
    ),
}


def image(model: nn.Module) -> torch.Tensor:
    dimensions = (
        next(one.weight.dim() for one in model.modules() if hasattr(one, "kernel_size") and hasattr(one, "weight")) - 2
    )
    return torch.randn(1, 3, *[32] * dimensions)


@pytest.mark.slow_unless(
    form=[
        "bilinear",
        "transposed",
        "names exchanged",
        "blocks as attributes",
        "residual blocks",
        "signals",
        "flat",
        "skips added",
        "lists of sequences",
        "sequences in parts",
        "in a module",
    ]
)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_stages_of_both_ways(form: str) -> None:
    make, blocks, stages = FORMS[form]
    model = make().eval()
    x = image(model)
    for at, expected in (("block", blocks), ("stage", stages), ("final", stages[-1:])):
        found = plan(model, "se", at=at, example=x, reduction=2)
        assert [site.name for site in found] == expected, at
        assert not found.skipped
    sides = [site.size[0] for site in plan(model, "se", at="stage", example=x, reduction=2)]
    assert sides == [32, 16, 8, 4, 2, 4, 8, 16, 32]


@pytest.mark.slow_unless(form=["bilinear", "sequences in parts", "skips added"])
@pytest.mark.parametrize("form", ["bilinear", "sequences in parts", "skips added", "volumes"])
def test_gates_in_both_ways(form: str) -> None:
    model = FORMS[form][0]()
    x = image(model)
    model(x)
    expected = model.eval()(x)
    attach(model, "se", at="block", example=x, reduction=2)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert all(wrapper.attention.strength.grad.any() for _, wrapper in attached(model))
    for _, wrapper in attached(model):
        nn.init.ones_(wrapper.attention.strength)
    assert not torch.equal(model(x), expected)
    assert torch.equal(detach(model)(x), expected)


# the blocks of the encoder and of the decoder, and the last map before the convolution that makes the output
LIBRARY: dict[str, tuple[str, int, int, str]] = {
    "Unet": ("resnet18", 8, 5, "decoder.blocks.4.conv2.2"),
    # two convolutions between the two ways
    "Unet of plain convolutions": ("vgg11_bn", 8, 7, "decoder.blocks.4.conv2.2"),
    "UnetPlusPlus": ("resnet18", 8, 11, "decoder.blocks.x_0_4"),
    "Linknet": ("resnet18", 8, 5, "decoder.blocks.4.block.2.2"),
    "FPN": ("resnet18", 8, 0, "decoder.dropout"),
    "DeepLabV3Plus": ("resnet18", 8, 0, "decoder.block2.2"),
}


@pytest.mark.slow_unless(name=["Unet", "Linknet", "DeepLabV3Plus"])
@pytest.mark.parametrize("name", LIBRARY)
def test_networks_of_a_library(name: str) -> None:
    encoder, encoding, decoding, final = LIBRARY[name]
    model = getattr(smp, name.split()[0])(encoder, encoder_weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    found = [site.name for site in plan(model, "se", at="block", example=x)]
    assert [len([one for one in found if one.startswith(part)]) for part in ("encoder", "decoder")] == [
        encoding,
        decoding,
    ]
    (last,) = plan(model, "se", at="final", example=x)
    assert last.name == final
    # the way up ends in stages too
    *_, stage = plan(model, "se", at="stage", example=x)
    assert stage.name.startswith("decoder") and stage.size == last.size


class Scaled(nn.Module):
    """A block as in EDSR."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).mul(0.1)
        y += x
        return y


class Enlarged(nn.Module):
    """A network that enlarges images; its ends are like parts of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.body = nn.Sequential(Scaled(), Scaled(), nn.Conv2d(8, 8, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        return self.tail(self.body(x) + x)


def test_blocks_of_a_network_that_enlarges() -> None:
    places = {
        "residual": ["body.0.body.2", "body.1.body.2", "body.2"],
        "block": ["body.0", "body.1"],
        "final": ["tail.1"],
    }
    for at, expected in places.items():
        found = plan(Enlarged(), "se", at=at)
        assert [site.name for site in found] == expected and not found.skipped


def upsampling(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Autoencoder(nn.Module):
    """Convolutions down to a vector, and transposed ones up again, one after the other in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        down = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        self.encoder, self.narrow, self.wide = nn.Sequential(*down), nn.Linear(16 * 16, 4), nn.Linear(4, 16 * 16)
        self.decoder = nn.Sequential(*upsampling(16, 8), *upsampling(8, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = self.narrow(self.encoder(x).flatten(1))
        return self.decoder(self.wide(code).view(-1, 16, 4, 4))


def test_transposed_convolutions_are_blocks() -> None:
    x = torch.randn(2, 3, 16, 16)
    found = {
        at: [site.name for site in plan(Autoencoder(), "se", at=at, example=x)] for at in ("block", "stage", "final")
    }
    expected = ["encoder.2", "encoder.4", "decoder.2", "decoder.5"]
    assert found == {"block": expected, "stage": expected, "final": ["decoder.5"]}


class Pyramid(nn.Module):
    """Maps of two scales, given out side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.top, self.side, self.up = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        one = self.one(x)
        top = self.top(self.two(one))
        return [self.side(one) + self.up(top), top * 2]


def test_where_several_maps_make_the_output_none_is_the_last() -> None:
    with pytest.raises(AttachError, match=r"no place at 'final' \(no map is the last"):
        plan(Pyramid(), "se", at="final", example=torch.randn(2, 3, 16, 16))
