"""Averages of parameters: the formula, the form for the CPU, layouts, dtypes, refusals."""

import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.ops import _dispatch, _multi
from tests.ops.lists import LAYOUTS, check, make


def test_is_the_formula():
    """One by one, as the original's update_ema does it."""
    lists = make(torch.float64, averages=torch.float64)
    expected = [[a.clone() for a in group] for group in lists.averages]
    for rate, group in zip(lists.rates.tolist(), expected):
        for average, parameter in zip(group, lists.parameters):
            average.mul_(rate).add_(parameter, alpha=1 - rate)
    lists.update("auto")
    for group, others in zip(lists.averages, expected):
        torch.testing.assert_close(group, others)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(lists.copies, lists.parameters))


def test_numbers_for_rates_are_exact():
    """float32 would make 1 - 0.9999 wrong in its fourth digit."""
    given, numbers = make(), make()
    numbers.rates = numbers.rates.tolist()
    assert given.update("auto").averages[2][0].equal(numbers.update("auto").averages[2][0])
    average, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    ops.ema_update_([one], [[average]], [0.9999])
    torch.testing.assert_close(average, 1e-4 * one, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_rate_of_zero_copies(backend):
    """Bit for bit, also what is lost beside the average."""
    weight, average = torch.tensor([1e-3, 1.0, -0.1]), torch.tensor([1e7, 3.0, 1e3])
    with cmfast.backend(backend):
        ops.ema_update_([weight], [[average]], [0.0])
    assert average.equal(weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_here(layout):
    check(make().map(LAYOUTS[layout]), "auto")


def test_the_form_for_the_cpu_serves_float32():
    x = torch.ones(4)
    assert _dispatch.plain_list(reference.ema_update_, [x, x]) is _multi.ema_update_
    for other in (x.double(), x.bfloat16(), x.to("meta")):
        assert _dispatch.plain_list(reference.ema_update_, [other, other]) is reference.ema_update_
    assert _dispatch.plain_list(reference.ema_update_, [x, x.bfloat16()]) is reference.ema_update_
    with cmfast.backend("reference"):
        assert _dispatch.plain_list(reference.ema_update_, [x]) is reference.ema_update_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copies", [None, torch.float16], ids=["no copy", "copy"])
def test_dtypes_here(dtype, copies):
    check(make(dtype, copies=copies), "auto")


def test_nothing_to_do():
    ops.ema_update_([], [[], []], [0.5, 0.5])
    ops.ema_update_([torch.ones(2)], [], [])


def test_lists_may_be_generators():
    """As those of modules' parameters are."""
    model, target, copy = (torch.nn.Linear(3, 2) for _ in range(3))
    expected = [(p + q).detach() / 2 for p, q in zip(model.parameters(), target.parameters())]
    ops.ema_update_(model.parameters(), iter([target.parameters()]), [0.5], copies=copy.parameters())
    torch.testing.assert_close([p.detach() for p in target.parameters()], expected)
    assert all(map(torch.equal, model.parameters(), copy.parameters()))


def test_no_averages_under_another_default():
    before = torch.get_default_dtype()
    weight, copy = torch.ones(2), torch.zeros(2)
    try:
        torch.set_default_dtype(torch.bfloat16)
        ops.ema_update_([weight], [], [], copies=[copy])
    finally:
        torch.set_default_dtype(before)
    assert copy.equal(weight)


def test_a_parameter_that_needs_gradients():
    """No graph, and a write that autograd and whoever watches versions see."""
    weight, average = (torch.ones(3, requires_grad=True) for _ in range(2))
    version = average._version
    ops.ema_update_([weight], [[average]], [0.5])
    assert average.is_leaf and average._version > version


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"averages": [[torch.ones(3)]]}, ValueError, r"averages\[0\] has 1 tensors for 2 parameters"),
        ({"averages": [[torch.ones(3), torch.ones(1)]]}, ValueError, r"averages\[0\]\[1\] .* \[2\], got \[1\]"),
        ({"averages": [[torch.ones(3), torch.ones(2).int()]]}, TypeError, r"averages\[0\] .* floating"),
        ({"averages": [torch.ones(2)]}, TypeError, "averages.0. must be a list"),
        ({"averages": [[torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2).half()]]}, TypeError, "one dtype"),
        ({"averages": [[torch.ones(3, device="meta"), torch.ones(2)]]}, ValueError, "on one device"),
        ({"copies": [torch.ones(3)]}, ValueError, "copies has 1 tensors"),
        ({"rates": [0.5, 0.5]}, ValueError, r"rates must be \[1\] for 1 averages"),
        ({"rates": None}, TypeError, "rates must be a tensor or numbers, got NoneType"),
        *(({"rates": [rate]}, ValueError, "rates must be from 0 to 1") for rate in (-1.0, 2.0, float("nan"))),
        ({"rates": torch.ones(1).int()}, ValueError, "float32 or float64"),
        ({"rates": torch.ones(1, device="meta")}, ValueError, "rates is on meta"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    arguments = {"averages": [[torch.ones(3), torch.ones(2)]], "rates": [0.5], **change}
    if len(arguments["averages"]) == 2:
        arguments["rates"] = [0.5, 0.5]
    with pytest.raises(error, match=message):
        ops.ema_update_([torch.ones(3), torch.ones(2)], **arguments)
