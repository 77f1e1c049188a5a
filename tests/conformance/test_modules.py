"""What every registered gate, update and head has to do. Registering a name earns these tests.

There is no registered update yet, and no gate that varies over all axes: modules of the tests stand for them.
"""

import copy
import doctest
import inspect
import io
import pickle
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from convattn import errors, names, ops, registry
from convattn.errors import ShapeMismatch
from convattn.nn import Gate, Head, Update
from own_modules import OWN
from tolerances import assert_close, is_close

CHANNELS = 32
SIZES = {1: (6,), 2: (6, 5), 3: (4, 3, 5)}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SECTIONS = ("Shape", "Cost", "Paper", "Differs from the paper", "Args", "Raises", "Example")

# other values than the default for options that modules share; each is tried alone, and booleans are turned over
ALTERNATIVES: dict[str, list[Any]] = {
    "activation": ["gelu"],
    "classes": [3],
    "dropout": [0.5],
    "features": [5],
    "gate_activation": ["hardsigmoid"],
    "hidden": [3],
    "kernel_size": [3],
    "norm": [None],
    "order": ["spatial-channel", "parallel"],
    "pools": [("max",), ("l2",), ("mean", "max", "l2", "logsumexp")],
    "reduction": [2],
    "start": ["identity"],
}


@dataclass(frozen=True)
class Case:
    """A registered name and options that differ from its defaults."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options.items())]).replace(" ", "")

    def build(self, **more: Any) -> nn.Module:
        """The module with random weights and random batch-norm statistics."""
        return randomize(entry(self.name).build(more.pop("channels", CHANNELS), **self.options, **more))


def entry(name: str) -> registry.Entry:
    return OWN.get(name) or registry.entry(name)


def class_of(name: str) -> type[nn.Module]:
    return entry(name).module


def options_of(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(class_of(name)).parameters)


def cases_of(name: str) -> list[Case]:
    cases = [Case(name)]
    for key, parameter in options_of(name).items():
        values = [not parameter.default] if isinstance(parameter.default, bool) else ALTERNATIVES.get(key, [])
        cases += [Case(name, {key: value}) for value in values]
    return cases


def randomize(module: nn.Module) -> nn.Module:
    """Random weights and statistics: a fresh module hides faults behind gains of 0 or 1 and statistics that do nothing.

    Weights are scaled by their number of inputs, so that logits are of order 1.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "strength":
                parameter.uniform_(0.2, 0.8)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return module


def a_map(batch: int = 2, dimensions: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *SIZES[dimensions], dtype=dtype)


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # the same dropout in every call; `torch.manual_seed` seeds every device and takes longer than most modules
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return module(x)


def output_shape(module: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    return (len(x), module.features) if isinstance(module, Head) else tuple(x.shape)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of a projection of it: of x, then of all parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(module, x)
    # scaled so that gradients are of order 1, as the tolerances suppose
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) / y.numel() ** 0.5
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


NAMES = [*names(), *OWN]
CASES = [case for name in NAMES for case in cases_of(name)]
# options that change sizes or the layer in one place, and leave the flow of the computation as it is
PLAIN = {"activation", "bias", "features", "hidden", "kernel_size", "reduction"}
GRAPHS = [case for case in CASES if not PLAIN & set(case.options)]
GATES = [case for case in CASES if entry(case.name).kind == "gate"]
UPDATES = [case for case in CASES if entry(case.name).kind == "update"]
PAPER_GATES = [case for case in GATES if "start" not in case.options]
PAPER_UPDATES = [case for case in UPDATES if "start" not in case.options]
# whatever may start at identity
PAPER = [*PAPER_GATES, *PAPER_UPDATES]


def with_slow(cases: list[Case]) -> list[Any]:
    """The cases, of which those are slow tests that leave the flow of the computation as it is."""
    return [pytest.param(case, marks=pytest.mark.slow) if PLAIN & set(case.options) else case for case in cases]


each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", with_slow(CASES), ids=str)
each_graph = pytest.mark.parametrize("case", GRAPHS, ids=str)
each_gate = pytest.mark.parametrize("case", with_slow(GATES), ids=str)
each_update = pytest.mark.parametrize("case", UPDATES, ids=str)
each_paper_update = pytest.mark.parametrize("case", PAPER_UPDATES, ids=str)
each_paper = pytest.mark.parametrize("case", with_slow(PAPER), ids=str)
each_paper_gate = pytest.mark.parametrize("case", with_slow(PAPER_GATES), ids=str)
each_dimensions = pytest.mark.parametrize("dimensions", [1, 2, 3])
each_training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# shapes, dtypes, memory formats


@pytest.mark.slow_unless(training=True)
@each_case
@each_dimensions
@each_training
def test_shape_and_dtype(case: Case, dimensions: int, training: bool) -> None:
    module = case.build(dimensions=dimensions).train(training)
    x = a_map(dimensions=dimensions)
    before = x.clone()
    y = module(x)
    assert tuple(y.shape) == output_shape(module, x)
    assert y.dtype == x.dtype
    assert torch.equal(x, before), "the input was changed in place"


@pytest.mark.slow_unless(training=True)
@each_case
@each_dtype
@each_training
def test_dtypes_agree_with_float64(case: Case, dtype: torch.dtype, training: bool) -> None:
    # both start from weights and maps that are exact in the narrowest dtype
    module = case.build().to(torch.bfloat16).to(dtype).train(training)
    x = a_map().to(torch.bfloat16).to(dtype)
    expected = call(copy.deepcopy(module).double(), x.double())
    y = call(module, x)
    assert y.dtype == dtype
    assert_close(y, expected)


@pytest.mark.slow_unless(converted=True)
@each_case
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("converted", [False, True], ids=["module", "module-converted"])
def test_channels_last(case: Case, dimensions: int, converted: bool) -> None:
    module = case.build(dimensions=dimensions)
    x = a_map(dimensions=dimensions)
    expected = gradients(module, x)
    if converted:
        module = module.to(memory_format=CHANNELS_LAST[dimensions])
    actual = gradients(module, x.to(memory_format=CHANNELS_LAST[dimensions]))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    if isinstance(module, Gate | Update):
        assert expected[0].is_contiguous()
        assert actual[0].is_contiguous(memory_format=CHANNELS_LAST[dimensions])


@each_case
def test_strided_map(case: Case) -> None:
    module = case.build()
    x = torch.randn(2, 5, 12, 2 * CHANNELS).transpose(1, 3)[:, ::2, 1:9]
    assert_close(call(module, x), call(module, x.contiguous()))


@pytest.mark.slow_unless(training=True)
@each_case
@each_dimensions
@each_training
def test_one_position(case: Case, dimensions: int, training: bool) -> None:
    module = case.build(dimensions=dimensions).train(training)
    x = torch.randn(1, CHANNELS, *[1] * dimensions, requires_grad=True)
    if training and has_batch_norm(module):
        with pytest.raises(ShapeMismatch, match=r"more than one position.*" + re.escape(str(tuple(x.shape)))):
            module(x)
        return
    y = module(x)
    y.sum().backward()
    assert tuple(y.shape) == output_shape(module, x)
    assert y.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()


@each_case
@pytest.mark.parametrize("batch, size", [(1, (6, 5)), (2, (1, 1))], ids=["one-image", "two-images-of-1x1"])
def test_small_batches_train(case: Case, batch: int, size: tuple[int, int]) -> None:
    module = case.build().train()
    for value in gradients(module, torch.randn(batch, CHANNELS, *size)):
        assert value.isfinite().all()


@pytest.mark.slow_unless(size=[(7, 5), (1, 9)])
@each_case
@pytest.mark.parametrize("size", [(7, 5), (1, 9), (3, 2), (13, 1)], ids=str)
def test_odd_sizes(case: Case, size: tuple[int, int]) -> None:
    module = case.build().eval()
    x = torch.randn(3, CHANNELS, *size)
    y = module(x)
    assert tuple(y.shape) == output_shape(module, x)
    # an image's output does not depend on its neighbours in the batch
    for i in range(len(x)):
        assert_close(module(x[i : i + 1]), y[i : i + 1])


@each_case
@each_dimensions
def test_empty_batch(case: Case, dimensions: int) -> None:
    module = case.build(dimensions=dimensions).eval()
    x = a_map(batch=0, dimensions=dimensions)
    y = module(x)
    assert tuple(y.shape) == output_shape(module, x)
    assert y.dtype == x.dtype


# gradients


@pytest.mark.slow_unless(training=True)
@pytest.mark.slow_unless(id=["eval-cbam", "eval-spatial", "eval-se", "eval-dual"])
@each_case
@each_training
def test_gradcheck(case: Case, training: bool) -> None:
    # in one dimension the kernels are small, and every element of the Jacobian can be checked
    module = case.build(channels=4, dimensions=1).double().train(training)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    keys, values = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        torch.default_generator.manual_seed(1)
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


@each_case
def test_every_parameter_learns(case: Case) -> None:
    module = case.build().train()
    learned = dict.fromkeys(dict(module.named_parameters()), False)
    # a hidden unit may be dead under some weights, so that several are drawn
    for _ in range(8):
        of_parameters = gradients(randomize(module), a_map())[2:]
        for name, gradient in zip(learned, of_parameters, strict=True):
            learned[name] |= gradient.abs().max().item() > 0
    assert all(learned.values()), learned


@each_case
@each_training
def test_gradient_of_a_dead_map_is_finite(case: Case, training: bool) -> None:
    module = case.build().train(training)
    for gradient in gradients(module, torch.zeros(2, CHANNELS, 6, 5)):
        assert gradient.isfinite().all()


# what the framework does with modules


@each_case
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autocast(case: Case, memory_format: torch.memory_format) -> None:
    module = case.build().train()
    x = a_map().to(memory_format=memory_format).requires_grad_()
    expected = call(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(module, x)
    # a head ends in what autocast makes of a linear layer; a gate must not change the type of the map behind it
    assert y.dtype == x.dtype or (isinstance(module, Head) and y.dtype == torch.bfloat16)
    assert_close(y, expected, torch.bfloat16)
    y.sum().backward()
    for value in [x, *module.parameters()]:
        assert value.grad is not None and value.grad.dtype == torch.float32 and value.grad.isfinite().all()


@each_case
@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode(case: Case) -> None:
    module = case.build().train()
    x = a_map(batch=3)
    first, second = gradients(module, x), gradients(module, x)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@each_case
def test_state_dict(case: Case) -> None:
    module, other = case.build().eval(), case.build().eval()
    x = a_map()
    if list(module.parameters()):
        assert not is_close(module(x), other(x))
    # safetensors refuses two names for one tensor
    other.load_state_dict(load_safetensors(save_safetensors(module.state_dict())), strict=True)
    assert torch.equal(module(x), other(x))


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@each_case
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies(case: Case, copied: Any) -> None:
    module = case.build().eval()
    x = a_map()
    expected = module(x)
    other = copied(module)
    assert torch.equal(other(x), expected)
    randomize(other)
    assert torch.equal(module(x), expected), "the copy shares weights with the original"


@each_case
def test_save_and_load(case: Case) -> None:
    module = case.build().eval()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = a_map()
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))


def check_compiled(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    # dropout may draw other numbers when it is compiled
    module = case.build().train("dropout" not in case.options)
    # copied first: both start from the same statistics
    compiled = torch.compile(copy.deepcopy(module), backend=backend, fullgraph=True)
    x = a_map()
    for one, other in zip(gradients(compiled, x), gradients(module, x), strict=True):
        assert_close(one, other)
    for one, other in zip(compiled.state_dict().values(), module.state_dict().values(), strict=True):
        assert_close(one, other)


@pytest.mark.slow_unless(id=["cbam", "channel", "dual", "se,start=identity", "global-context"])
@each_graph
def test_compile(case: Case) -> None:
    check_compiled(case, "aot_eager")


@each_graph
@pytest.mark.slow
def test_compile_with_inductor(case: Case) -> None:
    check_compiled(case, "inductor")


@pytest.mark.slow_unless(id=["cbam", "channel", "dual", "se,start=identity", "global-context"])
@each_graph
def test_export(case: Case) -> None:
    module = case.build().eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    exported = torch.export.export(module, (a_map(),), dynamic_shapes=({**sizes},)).module()
    for x in (a_map(), torch.randn(3, CHANNELS, 9, 11)):
        with ops.use("reference"):
            assert torch.equal(exported(x), module(x))


# the gate


@pytest.mark.slow_unless(training=False)
@each_gate
@each_dimensions
@each_training
def test_gate_is_what_forward_multiplies_with(case: Case, dimensions: int, training: bool) -> None:
    module = case.build(dimensions=dimensions).train(training)
    x = a_map(dimensions=dimensions)
    gate, y = module.gate(x), module(x)
    assert gate.dim() == x.dim() and torch.broadcast_shapes(gate.shape, x.shape) == x.shape
    if "start" not in case.options:
        assert_close(x * gate, y)
    product = x
    for part in module.gates(x).values():
        product = product * part
    assert_close(product, y)


@each_gate
@each_dimensions
def test_gate_depends_on_the_input(case: Case, dimensions: int) -> None:
    module = case.build(dimensions=dimensions).eval()
    x = a_map(dimensions=dimensions)
    # all hidden units may be dead under some weights, so that several are drawn
    gates = [randomize(module).gate(x) for _ in range(8)]
    assert any(not is_close(gate[:1], gate[1:]) for gate in gates)


@pytest.mark.slow_unless(training=True)
@each_paper_gate
@each_dtype
@each_training
def test_identity_start_changes_nothing(case: Case, dtype: torch.dtype, training: bool) -> None:
    module = case.build(start="identity").to(dtype).train(training)
    nn.init.zeros_(module.strength)
    x = a_map(dtype=dtype)
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny])
    y = module(x)
    assert torch.equal(y, x) and torch.equal(y.signbit(), x.signbit())
    assert not is_close(module.gate(x), torch.ones_like(module.gate(x))), "a gate of 1 would change nothing either"


@each_paper
@each_dimensions
def test_identity_start_is_exact_in_any_dimensions(case: Case, dimensions: int) -> None:
    module = case.build(start="identity", dimensions=dimensions)
    nn.init.zeros_(module.strength)
    x = a_map(dimensions=dimensions)
    assert torch.equal(module(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), x)


@each_name
def test_identity_start_adds_one_zero(name: str) -> None:
    if entry(name).kind == "head":
        assert "start" not in options_of(name)
        return
    torch.manual_seed(1)
    paper = entry(name).build(CHANNELS).state_dict()
    torch.manual_seed(1)
    identity = entry(name).build(CHANNELS, start="identity").state_dict()
    assert torch.equal(identity.pop("strength"), torch.zeros(1))
    # the same weights, in the same order, from the same seed
    assert list(identity) == list(paper)
    assert all(torch.equal(identity[key], paper[key]) for key in paper)


@each_paper
@each_training
def test_first_step_moves_strength(case: Case, training: bool) -> None:
    module = case.build(start="identity").train(training)
    nn.init.zeros_(module.strength)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = a_map(batch=16)
    (module(x) - torch.randn_like(x)).square().mean().backward()
    assert module.strength.grad.abs().item() > 0
    optimizer.step()
    assert module.strength.item() != 0
    assert not torch.equal(module(x), x)


@pytest.mark.slow_unless(training=True)
@each_paper
@each_dtype
@each_training
def test_strength_one_is_the_paper(case: Case, dtype: torch.dtype, training: bool) -> None:
    module = case.build(start="identity").to(dtype).train(training)
    nn.init.ones_(module.strength)
    paper = case.build().to(dtype).train(training)
    state = module.state_dict()
    del state["strength"]
    paper.load_state_dict(state, strict=True)
    x = a_map(dtype=dtype)
    assert_close(module(x), paper(x))
    assert not is_close(module(x), x)


# the update


@each_update
@each_dimensions
@each_training
def test_update_is_what_forward_adds(case: Case, dimensions: int, training: bool) -> None:
    module = case.build(dimensions=dimensions).train(training)
    x = a_map(dimensions=dimensions)
    update, added, y = module.update(x), module.added(x), module(x)
    for small in (update, added):
        assert small.dim() == x.dim() and torch.broadcast_shapes(small.shape, x.shape) == x.shape
    strength = 1.0 if module.strength is None else module.strength
    assert_close(x + strength * update, y)
    assert_close(x + added, y)


@each_update
@each_dimensions
def test_update_depends_on_the_input(case: Case, dimensions: int) -> None:
    module = case.build(dimensions=dimensions).eval()
    x = a_map(dimensions=dimensions)
    # all hidden units may be dead under some weights, so that several are drawn
    updates = [randomize(module).update(x) for _ in range(8)]
    assert any(not is_close(update[:1], update[1:]) for update in updates)


@each_paper_update
@each_dtype
@each_training
def test_identity_start_adds_nothing(case: Case, dtype: torch.dtype, training: bool) -> None:
    module = case.build(start="identity").to(dtype).train(training)
    nn.init.zeros_(module.strength)
    x = a_map(dtype=dtype)
    x[0, 0, 0, :3] = torch.tensor([0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2])
    assert torch.equal(module(x), x)
    update = module.update(a_map(dtype=dtype))
    assert not is_close(update, torch.zeros_like(update)), "an update of 0 would add nothing either"


@each_paper_update
def test_what_is_no_number_adds_nothing_at_identity(case: Case) -> None:
    module = case.build(start="identity")
    for name, parameter in module.named_parameters():
        nn.init.constant_(parameter, float(name != "strength"))
    # finite, and their sums are not
    x = torch.full((2, CHANNELS, 6, 5), torch.finfo(torch.float32).max)
    assert not module.update(x).isfinite().all()
    assert torch.equal(module(x), x)


# messages and words


@each_case
@each_dimensions
def test_wrong_input(case: Case, dimensions: int) -> None:
    module = case.build(dimensions=dimensions)
    letters = {1: "L", 2: "H, W", 3: "D, H, W"}[dimensions]
    expected = f"expected a map of shape (B, {module.channels or 'C'}, {letters})"
    shapes = [(CHANNELS, *SIZES[dimensions]), (2, CHANNELS, *SIZES[dimensions], 5), (CHANNELS,)]
    if module.channels is not None:
        shapes.append((2, CHANNELS + 1, *SIZES[dimensions]))
    functions = [module, module.gate, module.gates] if isinstance(module, Gate) else [module]
    functions += [module.update, module.added] if isinstance(module, Update) else []
    for function in functions:
        for shape in shapes:
            with pytest.raises(ShapeMismatch) as caught:
                function(torch.randn(shape))
            message = str(caught.value)
            assert message.startswith(f"{type(module).__name__}: {expected}, got {shape}; ")
            assert f"dimensions={dimensions}" in message
            assert "\n" not in message
        empty = (2, CHANNELS, *SIZES[dimensions][:-1], 0)
        with pytest.raises(ShapeMismatch, match=rf"^{type(module).__name__}: .*no elements.*{re.escape(str(empty))}"):
            function(torch.randn(empty))


@each_name
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dimensions": 4}, "dimensions must be one of 1, 2, 3, got 4."),
        ({"dimensions": "2"}, "dimensions must be one of 1, 2, 3, got '2'."),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0."),
        ({"channels": 8.0}, "channels must be a whole number of at least 1, got 8.0."),
        ({"channels": True}, "channels must be a whole number of at least 1, got True."),
        ({"start": "zero"}, "start must be one of 'paper', 'identity', got 'zero'."),
    ],
    ids=str,
)
def test_wrong_common_option(name: str, options: dict[str, Any], message: str) -> None:
    cls = class_of(name)
    if not set(options) <= set(options_of(name)):
        # an option that the class does not have is refused by Python itself
        with pytest.raises(TypeError, match=next(iter(options))):
            cls(**options)
        return
    needed = {"channels": CHANNELS} if "channels" in options_of(name) else {}
    with pytest.raises(errors.InvalidOption) as caught:
        cls(**{**needed, **options})
    assert str(caught.value) == f"{cls.__name__}: {message}"


@each_name
def test_signature(name: str) -> None:
    cls = class_of(name)
    parameters = options_of(name)
    first, *rest = parameters.values()
    if first.name == "channels":
        assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    else:
        rest = [first, *rest]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in rest)
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    assert parameters["dimensions"].default == 2
    if issubclass(cls, Gate | Update):
        assert parameters["start"].default == "paper"


@each_name
def test_kind(name: str) -> None:
    assert issubclass(class_of(name), {"gate": Gate, "update": Update, "head": Head}[entry(name).kind])


def sections_of(doc: str) -> dict[str, str]:
    """The parts of a docstring; the first, before any heading, is called `""`."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


@each_name
def test_docstring(name: str) -> None:
    sections = sections_of(inspect.getdoc(class_of(name)) or "")
    assert tuple(sections) == ("", *SECTIONS)
    assert all(text.strip() for text in sections.values())
    first, *others = sections[""].splitlines()
    assert first.endswith(".") and (not others or others[0] == "")
    assert " = " in sections[""], "no formula"
    listed = re.findall(r"^    (\w+): ", sections["Args"], flags=re.MULTILINE)
    assert listed == list(options_of(name))
    raised = re.findall(r"^    (\w+): ", sections["Raises"], flags=re.MULTILINE)
    assert {"InvalidOption", "ShapeMismatch"} <= set(raised)
    assert all(issubclass(getattr(errors, error), errors.ConvattnError) for error in raised)


@each_name
def test_docstring_example(name: str) -> None:
    cls = class_of(name)
    # nothing but the class: the example imports what it needs
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(cls), {cls.__name__: cls}, cls.__name__, None, None)
    assert any(cls.__name__ in example.source and example.want for example in test.examples)
    report = io.StringIO()
    result = doctest.DocTestRunner().run(test, out=report.write)
    assert result.failed == 0, report.getvalue()
