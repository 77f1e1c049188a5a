"""The numbers that `show` writes, against the formulas computed from the checkpoint's tensors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from trusting import show

from convattn.showing.images import distinct
from tolerances import assert_close, is_close

State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def batch(paths: list[Path]) -> torch.Tensor:
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.tensor((pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3], dtype=torch.float32).permute(0, 3, 1, 2)


def norm(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    statistics = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics)


def linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gates(x: torch.Tensor, state: State, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """CBAM's gates by its paper's equations, each blended with the identity by `strength`."""
    strength = state[f"{name}.strength"]
    pools = (x.mean(dim=(2, 3)), x.amax(dim=(2, 3)))
    logits = [linear(linear(p, state, f"{name}.channel.fc1").relu(), state, f"{name}.channel.fc2") for p in pools]
    channel = 1 + strength * (sum(logits).sigmoid()[..., None, None] - 1)
    y = x * channel
    summary = torch.stack([y.mean(dim=1), y.amax(dim=1)], dim=1)
    convolved = F.conv2d(summary, state[f"{name}.spatial.conv.weight"], padding=3)
    spatial = 1 + strength * (norm(convolved, state, f"{name}.spatial.norm").sigmoid() - 1)
    return channel, spatial


def computed(state: State, x: torch.Tensor) -> Arrays:
    """A ResNet with one block in each stage, CBAM and dual pooling, layer by layer."""
    arrays = {}
    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1").relu()
    for stage in (1, 2, 3):
        name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(norm(y, state, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
        y = norm(y, state, f"{name}.bn2")
        channel, spatial = gates(y, state, f"{name}.bn2.attention")
        arrays |= {f"{name}.bn2/channel": channel, f"{name}.bn2/spatial": spatial}
        arrays[f"{name}.bn2/strength"] = state[f"{name}.bn2.attention.strength"]
        if stride == 2:
            quarter = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        x = (y * channel * spatial + x).relu()
        arrays[f"layer/layer{stage}"] = x
    pooled = x.mean(dim=(2, 3))
    head = linear(torch.cat([pooled, x.amax(dim=(2, 3))], dim=1), state, "avgpool.attention.head.reduce")
    strength = state["avgpool.attention.strength"]
    arrays |= {"avgpool/pooled": pooled, "avgpool/head": head, "avgpool/strength": strength}
    logits = linear(pooled + strength * (head - pooled), state, "linear")
    return {**arrays, "predictions": logits.softmax(dim=1)}


def test_every_number_is_that_of_the_formula(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    checkpoint = save("cbam+dual", backbone="resnet8")
    folder = show(checkpoint, images, tmp_path / "out", layer="layer2")
    state = safetensors.torch.load_file(checkpoint)
    expected = computed(state, batch(images))
    del expected["layer/layer1"], expected["layer/layer3"]
    with np.load(folder / "gates.npz") as arrays:
        assert set(arrays.files) == {*expected, "paths", "names", "classes"}
        for key, value in expected.items():
            # the tolerances are meant for elements of order 1
            size = value.abs().max().clamp(min=1)
            assert_close(torch.tensor(arrays[key]) / size, value / size)
        assert [*arrays["paths"]] == [str(path) for path in images]
        assert [*arrays["names"]] == ["one", "one-2", "two"]
        assert [*arrays["classes"]] == ["cat", "$5 and $10", "dog"]
    # a test of constants would prove nothing
    assert expected["layer1.0.bn2/channel"].std(dim=0).min() > 0
    assert expected["layer1.0.bn2/spatial"].std(dim=0).min() > 0
    state["layer2.0.bn2.attention.spatial.conv.weight"][0, 0, 3, 3] += 1
    changed = computed(state, batch(images))["layer2.0.bn2/spatial"]
    assert not is_close(changed, expected["layer2.0.bn2/spatial"])


def test_gates_of_the_paper_have_no_strength(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    checkpoint = save("se", start="paper")
    folder = show(checkpoint, images[0], tmp_path / "out", layer="block.conv2")
    state = safetensors.torch.load_file(checkpoint)
    with np.load(folder / "gates.npz") as arrays:
        assert "block.bn2/strength" not in arrays.files
        squeezed = norm(torch.tensor(arrays["layer/block.conv2"]), state, "block.bn2").mean(dim=(2, 3))
        hidden = (squeezed @ state["block.bn2.attention.fc1.weight"].T).relu()
        gate = (hidden @ state["block.bn2.attention.fc2.weight"].T).sigmoid()
        assert_close(torch.tensor(arrays["block.bn2/channel"]), gate[..., None, None])


def test_a_layer_is_read_before_the_activation_behind_changes_it_in_place(
    save: Callable[..., Path], images: list[Path], tmp_path: Path
) -> None:
    checkpoint = save("baseline")
    folder = show(checkpoint, images, tmp_path / "out", layer="block.bn1")
    state = safetensors.torch.load_file(checkpoint)
    y = F.conv2d(batch(images), state["stem.weight"], state["stem.bias"], padding=1)
    y = norm(F.conv2d(y, state["block.conv1.weight"], state["block.conv1.bias"], padding=1), state, "block.bn1")
    assert (y < 0).any()
    with np.load(folder / "gates.npz") as arrays:
        assert_close(torch.tensor(arrays["layer/block.bn1"]), y)


def test_a_layer_inside_the_attention_counts_once(
    save: Callable[..., Path], images: list[Path], tmp_path: Path
) -> None:
    # the gates are computed a second time after the forward pass
    folder = show(save("cbam"), images, tmp_path / "out", layer="block.bn2.attention.spatial.conv")
    with np.load(folder / "gates.npz") as arrays:
        assert arrays["layer/block.bn2.attention.spatial.conv"].shape == (3, 1, 16, 16)


def test_images_are_upright_and_cut_from_the_middle(save: Callable[..., Path], tmp_path: Path) -> None:
    # 32 x 16 pixels, grey to the left and right, turned by a quarter when it was stored
    upright = np.full((16, 32, 3), 128, dtype=np.uint8)
    upright[:8, 8:24] = (255, 0, 0)
    upright[8:, 8:24] = (0, 0, 255)
    turned = Image.fromarray(np.rot90(upright))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=orientation)
    Image.fromarray(upright[:, 8:24]).save(tmp_path / "upright.png")
    checkpoint = save("se")
    arrays = []
    for name in ("turned", "upright"):
        folder = show(checkpoint, tmp_path / f"{name}.png", tmp_path / name)
        with np.load(folder / "gates.npz") as file:
            arrays.append({key: file[key] for key in ("block.bn2/channel", "predictions")})
    for key, value in arrays[0].items():
        np.testing.assert_array_equal(value, arrays[1][key])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.png", "b/x.png", "c/x.jpg"], ["x", "x-2", "x-3"]),
        (["x.png", "X.png"], ["x", "X-2"]),
        (["a/x.png", "b/x.png", "x-2.png"], ["x", "x-2", "x-2-2"]),
        (["x-2.png", "a/x.png", "b/x.png"], ["x-2", "x", "x-3"]),
    ],
)
def test_no_two_images_share_a_name(paths: list[str], names: list[str]) -> None:
    assert distinct([Path(path) for path in paths]) == names
