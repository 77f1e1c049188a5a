"""One forward pass, watched: which values depend on which, what is added to what, and which layer gave which value.

No symbolic tracing: the network runs as it is, with its control flow, in-place operations and shared layers. Every
operator of PyTorch that runs gives a value; a tensor that was changed in place is another value than before.
"""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from convattn import checks
from convattn.errors import AttachError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# re-entrant: what is exclusive calls what is
_LOCK = threading.RLock()
INPUT, OUTSIDE, CHANGED = "input", "outside", "changed"
UNKNOWN = (lambda: None), 0, 0
# what holds no tensors
PLAIN = (int, float, str)


@dataclass(frozen=True)
class Value:
    """One tensor at one time: the operator that gave it, what that was given, and all values that it depends on.

    `ancestors` has a bit set for every value that this one depends on, itself included; `within` is the name of the
    innermost module that was running; `arguments` and `options` are those of the operator behind the first argument,
    with None for each tensor.
    """

    index: int
    operator: str
    inputs: tuple[int, ...]
    ancestors: int
    shape: tuple[int, ...]
    within: str
    dtype: torch.dtype
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def depends_on(self, other: "Value") -> bool:
        """Whether this value was computed from another one."""
        return self is not other and bool(self.ancestors >> other.index & 1)


@dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor input and its output, None where that is not a single tensor.

    `outputs` are all tensors in what it returned; `alone` says that the input was its only argument; the values that it
    computed are those from `first` up to, not including, `last`.
    """

    name: str
    module: nn.Module
    x: int | None
    y: int | None
    outputs: tuple[int, ...]
    alone: bool
    first: int
    last: int


@dataclass
class Watched:
    """What one forward pass showed: values and calls in the order of their completion, the network's input and output.

    `inputs` has a bit set for every value that the network was given; the last call is that of the network itself.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    users: dict[int, list[int]] = field(default_factory=dict)
    inputs: int = 0

    def is_data(self, value: Value) -> bool:
        """Whether a value depends on the network's input, and not on its weights alone."""
        return bool(value.ancestors & self.inputs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Watched()
        # by address, which another tensor may have once this one is gone: the tensor, its value, and the count of its
        # in-place changes then
        self.at: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        # by memory: the values that were written to it in place
        self.written: dict[int, list[int]] = {}
        self.running: list[str] = []
        # others may run the network meanwhile
        self.thread = threading.get_ident()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # there is no compiler to hide from, and hiding would import all of it: seconds, and packages of its own
        return False

    def add(self, tensor: torch.Tensor, operator: str, inputs: tuple[int, ...], *call: tuple[Any, ...]) -> int:
        index = len(self.seen.values)
        ancestors = 1 << index
        for one in inputs:
            ancestors |= self.seen.values[one].ancestors
            self.seen.users.setdefault(one, []).append(index)
        within = self.running[-1] if self.running else ""
        about = (tuple(tensor.shape), within, tensor.dtype)
        self.seen.values.append(Value(index, operator, inputs, ancestors, *about, *call))
        self.at[id(tensor)] = weakref.ref(tensor), index, _version(tensor)
        return index

    def value(self, tensor: torch.Tensor) -> int:
        known, index, version = self.at.get(id(tensor), UNKNOWN)
        if known() is not tensor:
            return self.add(tensor, OUTSIDE, ())
        if version == _version(tensor):
            return index
        # changed through a view of it, by what was written to the memory that they share
        written = [one for one in self.written.get(tensor.untyped_storage()._cdata, []) if one > index]
        return self.add(tensor, CHANGED, (index, *written))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        given = _tensors(args)
        if options:
            # where a result is to be written says nothing of what it is computed from
            given += _tensors({name: value for name, value in options.items() if name != "out"})
        name = func.overloadpacket.__name__
        # nor does the tensor that only lends its shape
        inputs = () if name.endswith("_like") or name.startswith("new_") else tuple(map(self.value, given))
        result = func(*args, **options)
        call = (_without_tensors(args[1:]), tuple(_without_tensors(one) for one in options.items()))
        # of several results those that are empty in eval mode, such as saved statistics, are none
        results = [result] if isinstance(result, torch.Tensor) else [one for one in _tensors(result) if one.numel()]
        # what a norm saves for its gradient is empty on some devices only; nothing uses it here
        for tensor in results[:1] if "norm" in name else results:
            index = self.add(tensor, name, inputs, *call)
            if any(tensor is one for one in (*given, options.get("out"))):
                # changed in place: counted once this returns
                self.at[id(tensor)] = weakref.ref(tensor), index, _version(tensor) + 1
                self.written.setdefault(tensor.untyped_storage()._cdata, []).append(index)
        return result


def _version(tensor: torch.Tensor) -> int:
    # tensors made for inference count no changes
    return 0 if tensor.is_inference() else tensor._version


def exclusive(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have one thread at a time run a function that looks at the layers of a network or changes them.

    Of two threads that attach to one network the second one then finds what the first has attached.
    """

    @functools.wraps(function)
    def alone(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with _LOCK:
            return function(*args, **options)

    return alone


@exclusive
def watch(model: nn.Module, example: Any) -> Watched:
    """Run a network once on an example (a tensor, a tuple or a dict of arguments), and tell what happened.

    In eval mode and without gradients: batch-norm statistics, modes and random state are as before afterwards.

    Raises:
        AttachError: the network does not run on the example. The model was not changed.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachError(
            f"{type(model).__name__} is a scripted network, which runs without modules: attach first, script then. "
            f"The model was not changed."
        )
    recorder = _Recorder()
    # where the network is, the example goes; a copy, since a network may change its input
    device = next((one.device for one in model.parameters()), None)
    example = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device or tensor.device, copy=True), example)
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    for tensor in _tensors((args, kwargs)):
        recorder.seen.inputs |= 1 << recorder.add(tensor, INPUT, ())
    try:
        with _as_before(model), warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng():
            # what the network warns of it will say again when it is used
            warnings.simplefilter("ignore")
            with _hooked(model, recorder), recorder:
                model.eval()(*args, **kwargs)
    except Exception as error:
        raise AttachError(
            f"{type(model).__name__} does not run on the example ({type(error).__name__}: "
            f"{checks.reason(error)}); give another with example=... The model was not changed."
        ) from error
    return recorder.seen


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put back modes and buffers: some networks count or learn statistics in eval mode as well."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for module, mode in modes.items():
            if module.training is not mode:
                module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                # one that shares its own memory cannot be written to, and was not
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _hooked(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Have every call of a module recorded; what is scripted runs without modules and is seen by its operators."""
    with ExitStack() as handles:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                for handle in _hooks(name, module, recorder):
                    handles.callback(handle.remove)
        yield


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in sequences, dictionaries and dataclasses; called for every operator, and so kept cheap."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, tuple | list):
        found = []
        for one in tree:
            if isinstance(one, torch.Tensor):
                found.append(one)
            elif one is not None and not isinstance(one, PLAIN):
                found += _tensors(one)
        return found
    if isinstance(tree, Mapping):
        return [tensor for one in tree.values() for tensor in _tensors(one)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [tensor for one in fields(tree) for tensor in _tensors(getattr(tree, one.name))]
    return []


def _without_tensors(tree: Any) -> Any:
    # a value that held tensors would keep all maps of the pass in memory
    if isinstance(tree, torch.Tensor):
        return None
    return tuple(map(_without_tensors, tree)) if isinstance(tree, tuple | list) else tree


def _hooks(name: str, module: nn.Module, recorder: _Recorder) -> Iterator[Any]:
    entered: list[tuple[int | None, bool, int]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != recorder.thread:
            return
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        x = recorder.value(tensors[0]) if tensors else None
        entered.append((x, alone, len(recorder.seen.values)))
        recorder.running.append(name)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != recorder.thread:
            return
        recorder.running.pop()
        outputs = tuple(recorder.value(tensor) for tensor in _tensors(output))
        x, alone, first = entered.pop()
        y = outputs[0] if isinstance(output, torch.Tensor) else None
        recorder.seen.calls.append(Call(name, module, x, y, outputs, alone, first, len(recorder.seen.values)))

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after)
