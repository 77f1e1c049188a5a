"""Which runs, where they run, what they prove.

import convattn.compare

results = convattn.compare.run("images/", backbone="timm:resnet18", weights="pretrained", seeds=5)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convattn.compare.engine import run
    from convattn.compare.verdicts import verdict

_HOMES = {"run": "convattn.compare.engine", "verdict": "convattn.compare.verdicts"}
_ROOMS = ("elsewhere", "looks", "predictions", "stats", "verdicts")

__all__ = ["run", "verdict"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"convattn.compare.{name}")
    raise AttributeError(f"module 'convattn.compare' has no attribute {name!r}")
