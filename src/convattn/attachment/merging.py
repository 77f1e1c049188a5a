"""What merges layers, such as a convolution and the norm behind it: told by the names of methods and functions.

Detection code, RepVGG and its many descendants have no common class or protocol, only these names.
"""

import dis
import re
import sys

from convattn.errors import AttachError

# of a unit whose layers somebody else merges, who then sets this as its forward
FORWARD = re.compile(r"(forward_?fuse|fuse_?forward|forward_?deploy|forward_?reparam)\w*")
# as methods of layers, called without arguments
METHODS = re.compile(
    r"(?!\w*forward)(fuse|merge|reparam|re_param|rep_param|structural_reparam|switch_to_deploy|convert_to_deploy|"
    r"to_deploy|deploy|absorb|get_equivalent_kernel|get_kernel_bias)\w*"
)
# as functions that read the weights of layers
FUNCTIONS = re.compile(
    r"(\w*_)?(fuse|fusion|merge|reparam|absorb|deploy|equivalent_kernel|kernel_bias|fold_(bn|norm|batch|conv))\w*"
)


def refuse_to_merge(site: str, tensor: str) -> None:
    """Refuse a function that merges layers to read a layer's tensors past the attention behind it.

    Raises:
        AttachError: the caller's caller is such a function.
    """
    name = sys._getframe(2).f_code.co_name.lower()
    if FUNCTIONS.fullmatch(name):
        raise AttachError(
            f"{name} would merge {site!r}, which has attention, with another layer and lose the attention "
            f"(it reads {tensor!r}): convattn.detach or convattn.fold the network first, or attach at='block', whose "
            f"layers can be merged. Nothing was merged there."
        )


def refuse_weights(site: str, method: str) -> None:
    """Refuse to give weights of a layer with attention to somebody who merges them.

    Raises:
        AttachError: always.
    """
    raise AttachError(
        f"{method}() of {site!r}, which has attention, gives its weights to be merged with others, and the attention "
        f"would be lost: convattn.detach or convattn.fold the network first. {site!r} was not merged."
    )


def refuse_by_class(site: str) -> None:
    """Refuse functions of PyTorch that look at the class of a layer, and would take or change that of the wrapper.

    Raises:
        AttachError: one of them asks whether the wrapper is parametrized.
    """
    names = _callers(6)
    if "register_parametrization" in names[:3]:
        raise AttachError(
            f"{site!r} has attention: register the parametrization at the layer itself, "
            f"model.get_submodule({site!r}).inner. The model was not changed."
        )
    if "fuse_known_modules" in names:
        raise AttachError(
            f"fuse_modules cannot merge {site!r}, which has attention, with another layer: convattn.detach or "
            f"convattn.fold the network first, or attach at='block', whose layers can be merged. Nothing was merged "
            f"there."
        )


def _callers(number: int) -> list[str]:
    """The names of the functions that called the one which asks, the nearest first."""
    names: list[str] = []
    frame = sys._getframe(1).f_back
    while frame is not None and len(names) < number:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def is_asked_by_name() -> bool:
    """Whether the caller's caller uses `hasattr` or `getattr`, and does not read what it knows to be there."""
    frame = sys._getframe(2)
    return not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("LOAD_ATTR", "LOAD_METHOD"))
