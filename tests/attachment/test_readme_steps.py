"""The README's steps from attaching to detaching, in their order, as they stand there, and those of docstrings."""

import copy
import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import convattn
from convattn.attachment import saving, tuning

README = Path(__file__).parents[2] / "README.md"


def steps() -> list[str]:
    """The lines of the section on training, without those that are empty."""
    section = README.read_text(encoding="utf-8").partition("### Train, keep, remove")[2].partition("\n### ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    # what stands for the user's own is given by the test
    return [line for line in block.splitlines() if line and not line.startswith(("def train", "data ="))]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
    model.eval()


def test_steps_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # with branches that give something, as after training
    pretrained = timm.create_model("resnet10t", num_classes=10, zero_init_last=False).eval()

    def create_model(name: str, **options: Any) -> nn.Module:
        assert name == "resnet18" and options == {"pretrained": True, "num_classes": 10}
        # the same weights, and another classifier each time
        network = copy.deepcopy(pretrained)
        network.fc.reset_parameters()
        return network

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", create_model)
    x = torch.randn(6, 3, 32, 32)
    scope = {
        "copy": copy,
        "convattn": convattn,
        "timm": timm,
        "torch": torch,
        "train": train,
        "data": (x, torch.arange(6)),
    }
    done: list[str] = []
    for line in steps():
        # what is called, and what came of it
        names = re.findall(r"convattn\.(\w+)\(", line)
        before = copy.deepcopy(scope.get("model"))
        exec(line, scope)
        model = scope.get("model")
        if names == ["save"]:
            (folder,) = re.findall(r'"(\w+)/"', line)
            loaded = convattn.load(create_model("resnet18", pretrained=True, num_classes=10), folder)
            assert torch.equal(loaded(x), model(x)) and not torch.equal(loaded(x), convattn.detach(before)(x))
            size = (tmp_path / folder / "attention.safetensors").stat().st_size
            whole = sum(one.numel() * one.element_size() for one in model.state_dict().values())
            # attention and classifier are little beside the network, until all of it was trained
            assert size < 0.1 * whole if folder == "attention" else size > whole
        if names == ["freeze_base"]:
            frozen = {key: one for key, one in model.state_dict().items() if not key.startswith("fc.")}
            frozen = {key: one.clone() for key, one in frozen.items() if ".attention." not in key}
        if done[-1:] == ["parameter_groups"] and "unfreeze_base" not in done:
            assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
        done += names
    assert done == [
        *("attach", "freeze_base", "parameter_groups", "save", "load"),
        *("unfreeze_base", "parameter_groups", "save", "fold", "detach"),
    ]
    assert "accuracy: " in capsys.readouterr().out
    assert list(scope["model"].state_dict()) == list(pretrained.state_dict())
    assert not torch.equal(scope["model"].conv1[0].weight, pretrained.conv1[0].weight)
    assert all(one.requires_grad for one in scope["model"].parameters())


@pytest.mark.parametrize("module", [tuning, saving])
def test_examples_of_the_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 5 and not result.failed
