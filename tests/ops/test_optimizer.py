"""A step of RAdam and of Adam: against torch.optim in float64, the forms for the CPU, skipping, clipping, refusals."""

import math

import numpy as np
import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.ops import _dispatch, _multi
from tests.ops.cases import flat
from tests.ops.lists import LAYOUTS, check, make

OPTIMIZERS = {"radam_ema_": torch.optim.RAdam, "adam_ema_": torch.optim.Adam}
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "other betas": {"betas": (0.0, 0.99), "eps": 1e-3},
    # rho never reaches 5.
    "short memory": {"betas": (0.5, 0.5)},
}
each = pytest.mark.parametrize("name", OPTIMIZERS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
#: Steps taken: RAdam starts to adapt with its sixth.
steps = pytest.mark.parametrize("step", [0, 4, 5, 1000])


@each
@options
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_is_torch_optim(name, options, max_norm):
    """25 steps in float64: past the one from which RAdam adapts, with clipping and averages as written by hand."""
    lists = make(torch.float64, averages=torch.float64, copies=None, lr=0.01, max_norm=max_norm, **options)
    lists.exp_avgs, lists.exp_avg_sqs = ([torch.zeros_like(p) for p in lists.parameters] for _ in range(2))
    parameters = [torch.nn.Parameter(p.clone()) for p in lists.parameters]
    averages = [[a.clone() for a in group] for group in lists.averages]
    optimizer = OPTIMIZERS[name](parameters, lr=0.01, **options)
    for i in range(25):
        lists.gradients = [torch.randn(p.shape, dtype=torch.float64) * (1 + i) for p in parameters]
        for p, g in zip(parameters, lists.gradients):
            p.grad = g.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        lists.take(name, "auto")
        for rate, group in zip(lists.rates.tolist(), averages):
            torch._foreach_lerp_(group, [p.detach() for p in parameters], 1 - rate)
    states = [optimizer.state[p] for p in parameters]
    expected = [*parameters, *(s["exp_avg"] for s in states), *(s["exp_avg_sq"] for s in states), *sum(averages, [])]
    values = [*lists.parameters, *lists.exp_avgs, *lists.exp_avg_sqs, *sum(lists.averages, [])]
    torch.testing.assert_close(values, [x.detach() for x in expected], rtol=1e-10, atol=1e-12)
    assert lists.step.item() == 25


@each
@options
@steps
def test_what_auto_takes_here(name, options, step):
    assert _dispatch.plain_list(getattr(reference, name), [torch.ones(2)]) is _multi.FORMS[name]
    lists = make(step=step, lr=0.01, max_norm=2.0, grad_scale=torch.tensor(4.0), **options)
    # Of the other path, whose norm is its own.
    norm = ops.grad_norm(lists.gradients, grad_scale=torch.tensor(4.0))
    lists.options |= {"grad_norm": norm, "lr": torch.tensor(0.01)}
    check(lists, "auto", name)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(name, dtype):
    """The reference in a low dtype against float64."""
    lists = make(dtype, step=7, lr=0.01)
    exact = lists.map(torch.Tensor.double)
    lists.take(name, "reference"), exact.take(name, "reference")
    for value, high in zip(lists.parameters, exact.parameters):
        assert value.dtype == dtype
        torch.testing.assert_close(value, high.to(dtype), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", ["all", "gradients", "moments"])
def test_layouts_here(name, layout, kinds):
    lists = make(step=9, lr=0.01)
    changed = lists.map(LAYOUTS[layout])
    if kinds == "gradients":
        lists.gradients = changed.gradients
    elif kinds == "moments":
        lists.exp_avgs, lists.averages = changed.exp_avgs, changed.averages
    check(changed if kinds == "all" else lists, "auto", name)


@each
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cause", ["found_inf", "inf", "nan", "norm"])
def test_skipping(name, backend, cause):
    """Nothing changes, averages, copies and step count included, though a parameter is infinite; the next step is as
    if there had been none."""
    lists = make(step=3, lr=0.01)
    lists.parameters[2][1, 1] = math.inf
    for p in lists.copies:
        p.fill_(7)
    kept = lists.map(torch.clone)
    if cause == "found_inf":
        lists.options = {"lr": 0.01, "found_inf": torch.tensor(1.0)}
    elif cause == "norm":
        lists.options = {"lr": 0.01, "grad_norm": torch.tensor(math.nan), "max_norm": 1.0}
    else:
        lists.gradients[5][1, 7] = float(cause)
        lists.options = {"lr": 0.01, "max_norm": math.inf}
    assert lists.take(name, backend).equal(torch.ones(()))
    assert lists.step.item() == 3
    for what, values in lists.written().items():
        assert all(map(torch.equal, values, kept.written()[what])), what
    lists.gradients, lists.options = kept.gradients, {"lr": 0.01, "found_inf": torch.tensor(0.0)}
    assert lists.take(name, backend).equal(torch.zeros(()))
    kept.take(name, backend)
    assert all(map(torch.equal, lists.parameters[3:], kept.parameters[3:]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_grad_norm(backend):
    gradients = make().gradients
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    with cmfast.backend(backend):
        torch.testing.assert_close(ops.grad_norm(gradients).double(), exact, rtol=1e-6, atol=0)
        for scale in (8.0, -8.0):
            scaled = ops.grad_norm([g.half() * 8 for g in gradients], grad_scale=torch.tensor([scale]))
            torch.testing.assert_close(scaled.double(), exact, rtol=1e-3, atol=0)
        assert ops.grad_norm([torch.tensor([3.0, math.inf]), torch.ones(3)]).isinf()
        assert ops.grad_norm([torch.zeros(0)]) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "expanded"])
def test_grad_norm_of_many_elements(layout):
    """Of one size, which is the worst case: a sum in float32 rounds in the same direction at each."""
    x = torch.full((3, 50, 41, 43), 1.1)
    x = {**LAYOUTS, "contiguous": torch.clone, "expanded": lambda x: x[:1].expand_as(x)}[layout](x)
    lists = [x, torch.full((_multi.ROW,), 1.1), torch.full((_multi.ROW + 1,), 1.1), torch.full((2, 3), 1.1)]
    exact = 1.1 * math.sqrt(sum(map(torch.Tensor.numel, lists)))
    assert abs(ops.grad_norm(lists).item() / exact - 1) < 1e-6
    assert ops.grad_norm([x.new_full((2**14,), 2.0**62)]).isinf()


def taken(name, backend, step, scale, **options):
    lists = make(copies=None, step=step, lr=0.01, grad_scale=torch.tensor(scale), **options)
    skipped = lists.take(name, backend)
    return skipped, lists.step, [x for group in lists.written().values() for x in group]


@each
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.5}], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("scale", [0.0, math.inf, -2.0, math.nan], ids=str)
def test_any_scale(name, clip, scale):
    """As the reference takes it: infinite gradients, none, and those of the other sign."""
    for step in (0, 9):
        for value, expected in zip(*(flat(taken(name, path, step, scale, **clip)) for path in ("auto", "reference"))):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@each
@pytest.mark.parametrize("divided", [{}, {"grad_scale": torch.tensor(4.0)}, {"max_norm": 0.5}],
                         ids=["plain", "scaled", "clipped"])
@pytest.mark.parametrize("step", [0, 9])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_only_read(name, step, divided, maximize):
    """Those of a + b are one tensor, and those of torch.cat parts of one: each parameter steps by what was given."""
    lists = make(copies=None, step=step, lr=0.01, maximize=maximize, weight_decay=0.1, **divided)
    lists.gradients[5] = lists.gradients[5].flatten()[:2200].view(2, 1100)
    lists.gradients[0] = lists.gradients[5].flatten()[100:292]
    lists.gradients[7] = lists.gradients[0][:16]
    given = [g.clone() for g in lists.gradients]
    versions = [g._version for g in lists.gradients]
    check(lists, "auto", name)
    assert all(map(torch.equal, lists.gradients, given)) and versions == [g._version for g in lists.gradients]


@each
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_element_in_any_number_of_dimensions(name, backend):
    """Also where a parameter has none."""
    given = [
        make(copies=None, step=9, lr=torch.full(shape, 0.01), weight_decay=0.1, decoupled_weight_decay=True)
        for shape in ((), (1,), (1, 1))
    ]
    for lists in given:
        lists.take(name, backend)
    for lists in given[1:]:
        assert all(map(torch.equal, sum(lists.written().values(), []), sum(given[0].written().values(), [])))


@each
def test_lists_may_be_generators(name):
    lists, given = make(step=9, lr=0.01, max_norm=0.5), make(step=9, lr=0.01, max_norm=0.5)
    lists.take(name, "auto")
    tensors = (given.parameters, given.gradients, given.exp_avgs, given.exp_avg_sqs)
    getattr(ops, name)(
        *map(iter, tensors), given.step, map(iter, given.averages), given.rates, copies=iter(given.copies),
        **given.options,
    )  # fmt: skip
    assert all(map(torch.equal, sum(lists.written().values(), []), sum(given.written().values(), [])))
    assert ops.grad_norm(iter(given.gradients)).equal(ops.grad_norm(given.gradients))


@each
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("step", [4, 5])
def test_numbers_of_numpy(name, backend, step):
    """As Python's of the same value: a float32 takes part in no arithmetic."""
    numbers = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "max_norm": 0.5}
    numpy = {key: np.float32(value) for key, value in numbers.items()}
    numpy["betas"] = np.float32(0.9), np.float32(0.999)
    python = {key: float(value) for key, value in numpy.items() if key != "betas"}
    python["betas"] = tuple(map(float, numpy["betas"]))
    of_numpy, of_python = (make(copies=None, step=step, **options) for options in (numpy, python))
    of_numpy.take(name, backend), of_python.take(name, backend)
    assert all(map(torch.equal, sum(of_numpy.written().values(), []), sum(of_python.written().values(), [])))


@each
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_others(name, default):
    """Scalars of a step are on its device and in their dtypes, whatever is the default."""
    expected = flat(taken(name, "auto", 9, 4.0, max_norm=0.5))
    before = torch.get_default_dtype()
    lists = make(copies=None, step=9, lr=0.01, grad_scale=torch.tensor(4.0), max_norm=0.5)
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with torch.device(default if default == "meta" else "cpu"):
            values = [lists.take(name, "auto"), lists.step, *(x for group in lists.written().values() for x in group)]
            lists.options["found_inf"] = torch.ones((), device="cpu", dtype=torch.float32)
            skipped = lists.take(name, "auto")
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, values, expected)) and skipped.dtype == torch.float32 and skipped.item() == 1


@each
def test_one_graph(name):
    """Traced whole by torch.compile, in forms that it knows."""
    compiled, plain = (make(copies=None, step=9, lr=0.01, max_norm=0.5, shapes=[(3,), (2, 5)]) for _ in range(2))
    torch._dynamo.reset()

    def call(*lists):
        return getattr(ops, name)(*lists, rates=[0.5, 0.9, 0.0], lr=0.01, max_norm=0.5)

    for lists, function in ((plain, call), (compiled, torch.compile(call, fullgraph=True, backend="eager"))):
        function(lists.parameters, lists.gradients, lists.exp_avgs, lists.exp_avg_sqs, lists.step, lists.averages)
    for values, others in zip(compiled.written().values(), plain.written().values()):
        torch.testing.assert_close(values, others)


def test_the_form_for_the_cpu_serves_float32():
    x = torch.ones(4)
    for name in OPTIMIZERS:
        assert _dispatch.plain_list(getattr(reference, name), [x, x.double()]) is getattr(reference, name)
    lists = make(torch.float64, averages=torch.float64, copies=None, step=7, lr=0.01)
    lists.take("radam_ema_", "auto")
    assert lists.parameters[0].dtype == torch.float64


def call(**change):
    x = [torch.ones(3)]
    arguments = {
        "parameters": x, "gradients": x, "exp_avgs": x, "exp_avg_sqs": x, "step": torch.zeros(()), "lr": 0.1, **change
    }  # fmt: skip
    ops.radam_ema_(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"parameters": []}, ValueError, "parameters is empty"),
        ({"gradients": [torch.ones(2)]}, ValueError, r"gradients\[0\] .* parameter's shape \[3\], got \[2\]"),
        ({"exp_avgs": []}, ValueError, "exp_avgs has 0 tensors for 1 parameters"),
        ({"exp_avg_sqs": [torch.ones(3).half()]}, TypeError, "the moments of a parameter must have one dtype"),
        ({"step": 0}, TypeError, "step must be a tensor"),
        ({"step": torch.zeros(2)}, ValueError, "step must be one floating number"),
        ({"lr": torch.zeros((), device="meta")}, ValueError, "lr is on meta"),
        ({"lr": None}, TypeError, "lr must be a number or a tensor, got NoneType"),
        ({"found_inf": 1.0}, TypeError, "found_inf must be a tensor"),
        ({"lr": -1.0}, ValueError, "lr must be a number of 0 or more, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be a number of 0 or more, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, r"each of betas must be a number in \[0, 1\), got 1.0"),
        *(
            ({name: torch.tensor(0.5)}, TypeError, f"{name} must be a Python number, got a tensor")
            for name in ("eps", "weight_decay", "max_norm")
        ),
        ({"betas": (0.9, torch.tensor(0.5))}, TypeError, "each of betas must be a Python number, got a tensor"),
        ({"parameters": None}, TypeError, "parameters must be a list of tensors"),
        ({"gradients": iter([None])}, TypeError, "gradients must be a list of tensors"),
        ({"betas": None}, TypeError, "betas must be two numbers, got None"),
        ({"betas": "ab"}, TypeError, "betas must be two numbers, got 'ab'"),
        ({"eps": -1.0}, ValueError, "eps must be a number of 0 or more"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a number of 0 or more, got inf"),
        ({"max_norm": "a"}, ValueError, "max_norm must be positive, got 'a'"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive"),
        ({"averages": [[torch.ones(3)]]}, ValueError, r"rates must be \[1\]"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        call(**change)
    with pytest.raises(ValueError, match="gradients is empty"):
        ops.grad_norm([])
