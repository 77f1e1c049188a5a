"""convattn: is attention worth it, on your images, with your network, and at what cost?

import convattn

model = convattn.attach(model, "cbam")     # output unchanged to the bit, checkpoints still valid
convattn.detach(model)                     # the very same modules as before
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convattn.attachment import (
        Plan,
        Site,
        attach,
        detach,
        fold,
        freeze_base,
        load,
        parameter_groups,
        plan,
        save,
        unfreeze_base,
    )
    from convattn.errors import ConvattnError
    from convattn.layouts import module_from
    from convattn.networks.cut import features
    from convattn.registry import names, register

__version__ = "0.1.0"

# public name -> where it lives; loaded at first use, so that the import stays light
_HOMES = {
    "ConvattnError": "convattn.errors",
    "Plan": "convattn.attachment",
    "Site": "convattn.attachment",
    "attach": "convattn.attachment",
    "detach": "convattn.attachment",
    "features": "convattn.networks.cut",
    "fold": "convattn.attachment",
    "freeze_base": "convattn.attachment",
    "load": "convattn.attachment",
    "module_from": "convattn.layouts",
    "names": "convattn.registry",
    "parameter_groups": "convattn.attachment",
    "plan": "convattn.attachment",
    "register": "convattn.registry",
    "save": "convattn.attachment",
    "unfreeze_base": "convattn.attachment",
}
_ROOMS = ("attachment", "compare", "cost", "data", "errors", "layouts", "networks", "nn", "ops", "reporting", "showing")

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"convattn.{name}")
    raise AttributeError(f"module 'convattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
