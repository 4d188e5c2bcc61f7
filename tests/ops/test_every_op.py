"""What holds for every operation: precision, layouts, empty batches, gradients, one graph, clear errors."""

import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.native import steps
from cmfast.ops import _dispatch
from cmfast.tolerances import FLOOR
from tests.ops.cases import CASES, SHAPES, flat, inputs
from tests.ops.matrix import check_path, make

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def convert(states, sigmas, dtype):
    wide = dtype if dtype == torch.float64 else torch.float32
    return {k: v.to(dtype) for k, v in states.items()}, {k: v.to(wide) for k, v in sigmas.items()}


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(case, dtype, shape):
    """Rounding of inputs apart, an operation in a low dtype errs by the rounding of its result alone."""
    states, sigmas = convert(*inputs(case, shape), dtype)
    exact = flat(case.call(*convert(states, sigmas, torch.float64)))
    for value, expected in zip(flat(case.call(states, sigmas)), exact, strict=True):
        assert value.shape == expected.shape
        if value.numel():
            error = (value.double() - expected).abs().max()
            assert error <= FLOOR[dtype] * (1 + expected.abs().max())


@each
@pytest.mark.parametrize("shape", [*SHAPES, (5,), (2, 3, 0, 4), (2, 3, 2, 4, 4)], ids=str)
def test_what_auto_takes_here(case, shape):
    """Forms for the CPU, where they serve: values, and gradients where they have them."""
    check_path(make(case, shape, (torch.float32, torch.float32), "cpu"), "auto")


@pytest.mark.parametrize("name", _dispatch.FORMS)
def test_what_takes_a_form_for_the_cpu(name):
    """Batches of the dtypes that it computes, of which C makes those of float32 states; with gradients where it knows
    them."""
    x, reference = torch.ones(2, 3), getattr(cmfast.reference, name)
    in_c = name in _dispatch.IN_C
    there = not in_c or steps.refusal() is None
    form, dtypes = _dispatch.FORMS[name]

    def served(x, state=None):
        return _dispatch.plain(reference, x, state=x if state is None else state)

    assert served(x) is (form if there else reference)
    assert served(x[:0]) is reference and served(x.to("meta")) is reference and served(x.double()) is reference
    for dtype in (torch.bfloat16, torch.float16):
        assert served(x.to(dtype)) is (form if dtype in dtypes and not in_c else reference)
        assert served(x.to(dtype), x) is (form if dtype in dtypes and there else reference)
    assert served(torch._neg_view(x)) is reference
    assert served(x.t()) is (reference if in_c else form)
    with cmfast.backend("reference"):
        assert served(x) is reference
    x.requires_grad_()
    assert served(x) is (form if name not in steps.FORMS and there else reference)
    with torch.no_grad():
        assert served(x) is (form if there else reference)


@each
def test_nothing_that_was_given_changes(case):
    states, sigmas = convert(*inputs(case, (3, 4, 6, 5)), torch.float32)
    before = {k: v.clone() for k, v in {**states, **sigmas}.items()}
    results = flat(case.call(states, sigmas))
    for result in results:
        result.fill_(7.0)
    for k, v in {**states, **sigmas}.items():
        assert torch.equal(v, before[k]), k


@each
@pytest.mark.parametrize("layout", ["channels_last", "misaligned", "expanded"])
def test_layouts(case, layout):
    states, sigmas = convert(*inputs(case, (3, 4, 6, 5)), torch.float32)
    if layout == "expanded":
        states = {k: v[:1].expand_as(v) for k, v in states.items()}
    plain = {k: v.contiguous() for k, v in states.items()}
    if layout == "channels_last":
        states = {k: v.to(memory_format=torch.channels_last) for k, v in states.items()}
    elif layout == "misaligned":
        states = {k: torch.cat([v[:1], v])[1:] for k, v in states.items()}
    for value, expected in zip(flat(case.call(states, sigmas)), flat(case.call(plain, sigmas)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@each
def test_gradients(case):
    """Against finite differences, for every state and every noise level."""
    states, sigmas = inputs(case, (2, 2, 2, 2))
    names = [*states, *sigmas]

    def call(*values):
        by_name = dict(zip(names, values, strict=True))
        return tuple(flat(case.call({k: by_name[k] for k in states}, {k: by_name[k] for k in sigmas})))

    values = [v.requires_grad_(k not in case.no_grad_to) for k, v in {**states, **sigmas}.items()]
    assert torch.autograd.gradcheck(call, values)


@each
def test_one_graph(case):
    """torch.compile(fullgraph=True) passes through, forward and backward, and changes nothing."""
    states, sigmas = convert(*inputs(case, (2, 3, 4, 4)), torch.float32)
    states = {k: v.requires_grad_() for k, v in states.items()}
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    for value, expected in zip(flat(compiled(states, sigmas)), flat(case.call(states, sigmas)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        if value.requires_grad:
            value.sum().backward(retain_graph=True)


X, SIGMA, ONES = torch.linspace(-1, 1, 72).view(2, 4, 3, 3), torch.tensor([1.0, 0.5]), torch.ones(4)
DRAW = ops.Draw(3, torch.arange(2))
STEP = X, X, SIGMA, SIGMA / 2
#: An operation of a number.
NUMBERS = {
    "scalings": lambda n: ops.scalings(SIGMA, sigma_data=n, boundary=n),
    "scale_input": lambda n: ops.scale_input(X, SIGMA, sigma_data=n),
    "denoise": lambda n: ops.denoise(X, X, SIGMA, boundary=n),
    "denoise_to_uint8": lambda n: ops.denoise_to_uint8(X, X, SIGMA, sigma_data=n),
    "init_noise": lambda n: ops.init_noise(X, SIGMA, sigma_data=n),
    "add_noise": lambda n: ops.add_noise(X, DRAW, SIGMA, sigma_data=n),
    "add_noise_pair": lambda n: ops.add_noise_pair(X, X, SIGMA, SIGMA, sigma_data=n),
    "draw_pair": lambda n: ops.draw_pair(X, DRAW, ops.LogNormal(n, n, ops.Below(n)), sigma_data=n).first,
    "renoise": lambda n: ops.renoise(*STEP, DRAW, sigma_min=n, sigma_data=n, boundary=n),
    "euler_step": lambda n: ops.euler_step(*STEP, sigma_data=n),
    "heun_predictor": lambda n: ops.heun_predictor(*STEP, sigma_data=n),
    "heun_corrector": lambda n: ops.heun_corrector(X, *STEP, sigma_data=n, boundary=n),
    "midpoint_corrector": lambda n: ops.midpoint_corrector(X, *STEP, SIGMA / 3, sigma_data=n),
    "loss_weight": lambda n: ops.loss_weight(SIGMA, "karras", sigma_data=n),
    "weighted_loss": lambda n: ops.weighted_loss(X, -X, SIGMA, norm="huber", huber_c=n),
    "consistency_loss": lambda n: ops.consistency_loss(X, X, SIGMA, -X, "karras", weight_sigma_data=n, sigma_data=n),
    "group_norm_silu": lambda n: ops.group_norm_silu(X, 2, ONES, ONES, eps=n),
    "dropout": lambda n: ops.dropout(X, n, DRAW),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_one_graph_for_any_number(name):
    """torch.compile(dynamic=True), which traces Python's numbers as symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(NUMBERS[name], fullgraph=True, dynamic=True, backend="eager")
    for n in (0.25, 0.375):
        for value, expected in zip(flat(compiled(n)), flat(NUMBERS[name](n)), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_sizes_that_vary():
    """Symbols too, as torch.export has them."""
    class Normal(torch.nn.Module):
        def forward(self, x):
            return ops.normal(3, torch.arange(x.shape[0]), x.shape[1:])

    batch, height = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=2)
    exported = torch.export.export(Normal(), (X,), dynamic_shapes=({0: batch, 2: height},), strict=False)
    assert exported.module()(torch.ones(3, 4, 5, 3)).equal(ops.normal(3, torch.arange(3), (4, 5, 3)))


@each
def test_wrong_shapes_are_refused(case):
    states, sigmas = convert(*inputs(case, (2, 3, 4, 4)), torch.float32)
    for name in list(states)[1:]:
        with pytest.raises(ValueError, match=r"must have the shape of"):
            case.call({**states, name: states[name][:, :2]}, sigmas)
    for name in sigmas:
        with pytest.raises(ValueError, match=r"scalar or \[B\] with B = 2"):
            case.call(states, {**sigmas, name: torch.ones(2, 1)})
    for name in states:
        with pytest.raises(TypeError, match="floating"):
            case.call({**states, name: states[name].long()}, sigmas)


@each
@pytest.mark.parametrize("bad", [-1.0, float("nan")], ids=str)
def test_bad_noise_levels_are_refused(case, bad):
    states, sigmas = convert(*inputs(case, (2, 3, 4, 4)), torch.float32)
    for name in [name for name in sigmas if name != "weight"]:
        with pytest.raises(ValueError, match="not NaN"):
            case.call(states, {**sigmas, name: torch.tensor([1.0, bad])})
