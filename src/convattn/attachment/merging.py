"""What merges layers, such as a convolution and the norm behind it: told by the names of methods and functions.

Detection code, RepVGG and its many descendants have no common class or protocol, only these names.
"""

import re

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


def refuse_to_merge(site: str, tensor: str, reader: str) -> None:
    """Refuse a function that merges layers to read a layer's tensors past the attention behind it.

    Args:
        site: the name of the layer.
        tensor: the name of what is read.
        reader: the name of the function that reads it.

    Raises:
        AttachError: the function merges, by its name.
    """
    name = reader.lower()
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


def refuse_by_class(site: str, names: list[str]) -> None:
    """Refuse functions of PyTorch that look at the class of a layer, and would take or change that of the wrapper.

    Args:
        site: the name of the layer.
        names: the names of the functions that ask whether the wrapper is parametrized, the nearest first.

    Raises:
        AttachError: one of them is such a function.
    """
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
