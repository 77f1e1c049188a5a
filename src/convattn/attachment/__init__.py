"""An existing network in, the same network with attention out.

Select first, change second: `plan` looks and computes, `attach` changes, `detach` restores. `save` and `load` keep what
was attached, `fold` removes constant gates, `parameter_groups`, `freeze_base` and `unfreeze_base` serve fine-tuning.
"""

from convattn.attachment import effects
from convattn.attachment.attaching import attach, attached, detach
from convattn.attachment.folding import Fold, Folds, fold
from convattn.attachment.plans import Plan, Site, plan
from convattn.attachment.saving import load, save
from convattn.attachment.tuning import freeze_base, parameter_groups, unfreeze_base
from convattn.attachment.wrapper import Attached, AttachedHead, Blended, BlendedHead

__all__ = [
    "Attached",
    "AttachedHead",
    "Blended",
    "BlendedHead",
    "Fold",
    "Folds",
    "Plan",
    "Site",
    "attach",
    "attached",
    "detach",
    "effects",
    "fold",
    "freeze_base",
    "load",
    "parameter_groups",
    "plan",
    "save",
    "unfreeze_base",
]
