"""What importing costs, what it needs, and what is public."""

import subprocess
import sys

import pytest

import convattn


def run(code: str) -> str:
    """What a fresh interpreter prints; any warning in it is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names() -> None:
    assert convattn.__all__ == [
        "ConvattnError",
        "Plan",
        "Site",
        "__version__",
        "attach",
        "detach",
        "features",
        "fold",
        "freeze_base",
        "load",
        "module_from",
        "names",
        "parameter_groups",
        "plan",
        "register",
        "save",
        "unfreeze_base",
    ]


@pytest.mark.parametrize("name", convattn.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(convattn, name) is not None
    assert name in dir(convattn)


def test_a_wrong_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'convattn' has no attribute 'atach'"):
        convattn.atach  # noqa: B018


def test_modules_public_names() -> None:
    from convattn import nn

    assert nn.__all__ == sorted(nn.__all__)
    assert {
        "AvgMaxPool",
        "AvgPool",
        "CBAM",
        "ChannelAttention",
        "ConcatPool",
        "DualPool",
        "Gate",
        "Head",
        "MaxPool",
        "SpatialAttention",
        "SqueezeExcite",
    } <= set(nn.__all__)
    assert all(hasattr(nn, name) for name in nn.__all__)


@pytest.mark.parametrize("name", ["convattn", "convattn.errors", "convattn.checks", "convattn.registry"])
def test_light_import(name: str) -> None:
    code = f"""
import sys
before = set(sys.modules)
import {name}
loaded = {{module.partition(".")[0] for module in set(sys.modules) - before}}
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    assert run(code) == "['convattn']"


ONLY_TORCH = """
import sys

# torch itself cannot be imported without typing_extensions, and its older releases without sympy
ALLOWED = {"convattn", "torch", "torchgen", "safetensors", "numpy", "typing_extensions", "sympy", "mpmath"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_the_block_blocks() -> None:
    code = """
import numpy, safetensors
try:
    import pytest
except ImportError as error:
    print(error)
"""
    assert run(ONLY_TORCH + code) == "pytest is blocked"


def test_modules_need_only_torch() -> None:
    code = """
import torch
import convattn.nn
from convattn.registry import entry

for name in convattn.names():
    for dimensions in (1, 2, 3):
        x = torch.randn(2, 8, *[4] * dimensions, requires_grad=True)
        entry(name).build(8, dimensions=dimensions)(x).sum().backward()
        assert x.grad is not None
    print(name)
print(sorted({"scipy", "sklearn", "timm", "torchvision", "triton", "typer", "matplotlib"} & set(sys.modules)))
"""
    assert run(ONLY_TORCH + code).split("\n") == [*convattn.names(), "[]"]


def test_attach_needs_only_torch() -> None:
    code = """
import torch
import convattn
from convattn import networks

x = torch.randn(2, 3, 32, 32)
model = networks.create("resnet20").eval()
before = model(x)
for attention in ("se", "cbam+dual"):
    print(len(list(convattn.plan(model, attention))))
    print(torch.equal(convattn.attach(model, attention)(x), before))
    convattn.detach(model)
"""
    assert run(ONLY_TORCH + code).split() == ["9", "True", "10", "True"]
