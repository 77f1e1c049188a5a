"""Which sums of a network are residual: the sum of a shortcut and of what was computed beside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from convattn.networks.watching import Value, Watched

ADDITIONS = ("add", "add_")
WEIGHTED = ("convolution", "addmm", "mm", "bmm", "baddbmm", "linear")
NONLINEAR = (
    "relu",
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "hard",
    "softmax",
    "elu",
    "mish",
    "softplus",
    "clamp",
    "leaky_relu",
    "_prelu",
    "rrelu",
)
# activations that are functions of one tensor
ACTIVATIONS = (
    "relu",
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "elu",
    "leaky_relu",
    "mish",
    "softplus",
    "clamp",
    "clamp_min",
)
PARALLEL = "parallel convolutions"
LINEAR_BRANCH = f"{PARALLEL}: there is no non-linear layer in the branch"
RESCALING = ("upsample", "grid_sampler", "pixel_shuffle")
# linear in all that they are given; they may end in an underscore
LINEAR = (
    *("add", "sub", "rsub", "neg", "mean", "sum", "cat", "stack", "changed", "alias", "detach", "clone", "copy"),
    *("_to_copy", "view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze"),
    *("expand", "repeat", "select", "slice", "index", "index_select", "split", "split_with_sizes", "chunk", "unbind"),
    *("narrow", "as_strided", "flip", "roll", "constant_pad_nd", "pixel_unshuffle", "channel_shuffle"),
    *("native_channel_shuffle", "im2col", "col2im", "dropout", "native_dropout", "lift_fresh"),
)
LINEAR_FAMILIES = (
    *("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "upsample", "pixel_shuffle", "reflection_pad"),
    *("replication_pad", "_fft"),
)
# linear where only one factor depends on the input
PRODUCTS = (*WEIGHTED, "mul", "div", "matmul", "grid_sampler")


@dataclass(frozen=True)
class Sum:
    """A sum: its value, its operands, which of them is the shortcut, and, where it is not residual, why not."""

    value: Value
    operands: tuple[Value, ...]
    shortcut: Value | None
    reason: str = ""

    @property
    def residual(self) -> bool:
        """Whether a shortcut is added to what is no linear function of what they share."""
        return self.shortcut is not None and not self.reason

    @property
    def branches(self) -> tuple[Value, ...]:
        """The operands beside the shortcut."""
        return tuple(one for one in self.operands if one is not self.shortcut)


def sums(seen: Watched) -> list[Sum]:
    """All sums of maps of one shape, in order, each residual one with its shortcut and every other with the reason.

    One operand of a residual sum is the shortcut, on which another one depends; or, with a projection, none depends on
    another, and the shortcut is the one with fewer layers (at most one) since what they have in common. Sums inside a
    branch, of several scales, and of what is linear in the input, such as parallel convolutions, are not residual.
    """
    # the sum that a layer gives is one operand of the next sum
    given = {call.y for call in seen.calls if call.y is not None and call.x != call.y}
    found = [_judged(seen, value, _operands(seen, value, given)) for value in seen.values if _adds_maps(seen, value)]
    chained = {one.index for each in found for one in _inner_additions(seen, each.value, given)}
    found = [each for each in found if each.value.index not in chained]
    return [_outside(each, found) for each in found]


def _adds_maps(seen: Watched, value: Value) -> bool:
    if value.operator not in ADDITIONS or len(value.inputs) < 2 or len(value.shape) < 3:
        return False
    given = [seen.values[one] for one in value.inputs]
    return all(one.shape == value.shape and seen.is_data(one) for one in given)


def _operands(seen: Watched, value: Value, given: set[int]) -> tuple[Value, ...]:
    """What is summed, through additions whose result only the next addition uses."""
    operands: list[Value] = []
    for one in (seen.values[index] for index in value.inputs):
        operands += _operands(seen, one, given) if _is_inner(seen, one, given) else (one,)
    return tuple(operands)


def _is_inner(seen: Watched, value: Value, given: set[int]) -> bool:
    return _adds_maps(seen, value) and len(seen.users.get(value.index, [])) == 1 and value.index not in given


def _inner_additions(seen: Watched, value: Value, given: set[int]) -> list[Value]:
    inner = [seen.values[index] for index in value.inputs if _is_inner(seen, seen.values[index], given)]
    return inner + [deeper for one in inner for deeper in _inner_additions(seen, one, given)]


def _judged(seen: Watched, value: Value, operands: tuple[Value, ...]) -> Sum:
    common = reduce(lambda a, b: a & b, (one.ancestors for one in operands))
    paths = {one.index: _operators(seen, one.ancestors & ~common) for one in operands}
    enlarged = [bool(_count(path, RESCALING)) for path in paths.values()]
    # where all are enlarged, as in the blocks of a generator, they are of one scale
    if any(enlarged) and not all(enlarged):
        return Sum(value, operands, None, "a fusion of several scales")
    sources = [one for one in operands if any(other.depends_on(one) for other in operands)]
    if sources:
        # the first of several is what the others were computed from
        shortcut = min(sources, key=lambda one: one.index)
        branches = [one.ancestors & ~common for one in operands if one is not shortcut]
        # one chain of layers is a branch all the same
        parallel = len(branches) > 1 or any(_adds_paths(seen, one) for one in branches)
        linear = parallel and all(_is_linear(seen, one) for one in branches)
        return Sum(value, operands, shortcut, LINEAR_BRANCH if linear else "")
    weights = {one.index: _count(paths[one.index], WEIGHTED) for one in operands}
    bends = {one.index: _count(paths[one.index], NONLINEAR) for one in operands}
    if not any(bends.values()):
        return Sum(value, operands, None, PARALLEL)
    shortcut = min(operands, key=lambda one: weights[one.index])
    rest = [one for one in operands if one is not shortcut]
    deeper = all(weights[one.index] > weights[shortcut.index] for one in rest)
    if bends[shortcut.index] or not deeper:
        return Sum(value, operands, None, "branches of which none is a shortcut")
    if all(_is_linear(seen, one.ancestors & ~common) for one in rest):
        return Sum(value, operands, None, PARALLEL)
    return Sum(value, operands, shortcut)


def _outside(one: Sum, every: list[Sum]) -> Sum:
    """A sum with a projection that lies inside the branch of another one is a part of that branch."""
    if one.shortcut is None or any(branch.depends_on(one.shortcut) for branch in one.branches):
        return one
    for other in every:
        if other is not one and other.shortcut is not None and other.value.within == one.value.within:
            inside = any(branch.depends_on(one.value) or branch is one.value for branch in other.branches)
            if inside and not (other.shortcut.depends_on(one.value) or other.shortcut is one.value):
                return Sum(one.value, one.operands, None, "inside the branch of another sum")
    return one


def _is_linear(seen: Watched, ancestors: int) -> bool:
    """Whether none of some values is a non-linear function of the network's input."""
    return all(_is_linear_step(seen, value) for value in _data(seen, ancestors))


def _adds_paths(seen: Watched, ancestors: int) -> bool:
    """Whether some values are the sum or the difference of two that depend on the network's input."""
    sums = (one for one in _data(seen, ancestors) if one.operator.rstrip("_") in ("add", "sub"))
    return any(sum(seen.is_data(seen.values[index]) for index in one.inputs) > 1 for one in sums)


def _is_linear_step(seen: Watched, value: Value) -> bool:
    name = value.operator.rstrip("_")
    data = [index for index in value.inputs if seen.is_data(seen.values[index])]
    if name.startswith(PRODUCTS):
        # what is divided by is in the second place
        return len(data) == 1 and (name != "div" or data[0] == value.inputs[0])
    if "batch_norm" in name:
        # with the statistics of the map itself, as in an instance norm, it is told to train
        return len(data) == 1 and not any(one is True for one in value.arguments)
    return name in LINEAR or name.startswith(LINEAR_FAMILIES)


def _operators(seen: Watched, ancestors: int) -> list[str]:
    return [value.operator for value in _data(seen, ancestors)]


def _data(seen: Watched, ancestors: int) -> Iterator[Value]:
    """The values of a set; how a weight was computed is not a layer between."""
    while ancestors:
        lowest = ancestors & -ancestors
        value = seen.values[lowest.bit_length() - 1]
        if seen.is_data(value):
            yield value
        ancestors ^= lowest


def _count(operators: list[str], kinds: tuple[str, ...]) -> int:
    return sum(any(operator.startswith(kind) for kind in kinds) for operator in operators)
