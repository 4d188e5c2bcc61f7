"""Group normalisation: the reference against PyTorch's modules, the path for the CPU, dropout's counters, refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cmfast
from cmfast import ops, reference
from cmfast.native import group_norm
from cmfast.ops import _dispatch, _norm_cpu
from cmfast.tolerances import FLOOR
from tests.ops.matrix import upstream
from tests.ops.norms import KINDS, Norm, check_path, layout, make

SHAPES = [((2, 12, 5, 3), 2), ((1, 192, 8, 8), 32), ((2, 33, 4, 4), 33), ((2, 12, 7), 4), ((2, 8, 2, 3, 4), 1)]
EMPTY = [((0, 12, 4, 4), 2), ((2, 12, 0, 4), 2)]
layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_is_what_pytorchs_modules_make(shape, groups):
    norm = make(shape, groups, "sum").to(torch.float64)
    y, total = norm.run("reference")
    t, channels = norm.tensors, (-1, *(1,) * (len(shape) - 2))
    expected = t["x"] + t["x_bias"].view(channels) + t["residual"]
    torch.testing.assert_close(total, expected)
    z = F.group_norm(expected, groups, t["weight"], t["bias"])
    z = z * (1 + t["scale"].unflatten(1, channels)) + t["shift"].unflatten(1, channels)
    torch.testing.assert_close(y, F.silu(z))
    torch.testing.assert_close(make(shape, groups, "no silu").to(torch.float64).run("reference")[0], F.group_norm(
        t["x"], groups, t["weight"], t["bias"]
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_rounds_once(kind, dtype):
    """Rounding of inputs apart, a result in a low dtype errs by its own rounding; after a sum, of the rounded sum."""
    norm = make((2, 12, 6, 5), 2, kind, dtype=dtype)
    values = norm.run("reference")
    wide = norm.to(torch.float64)
    if len(values) > 1:
        added = {k: v for k, v in wide.tensors.items() if k not in ("x_bias", "residual")}
        wide = Norm({**added, "x": values[1].double()}, norm.num_groups, norm.options)
    (exact,) = wide.run("reference")
    assert all(value.dtype == dtype for value in values)
    assert (values[0].double() - exact).abs().max() <= FLOOR[dtype] * (1 + exact.abs().max())


def plain(norm):
    """What serves it under `auto`."""
    return _dispatch.plain(reference.group_norm_silu, *norm.tensors.values(), state=norm.tensors["x"])


@layouts
@kinds
@pytest.mark.parametrize("shape, groups", [*SHAPES, *EMPTY], ids=str)
def test_what_auto_takes_here(shape, groups, kind, last):
    """PyTorch's GroupNorm, in place where no graph is recorded."""
    norm = make(shape, groups, kind, last=last)
    served = plain(norm)
    assert served is (_norm_cpu.group_norm_silu if norm.tensors["x"].numel() else reference.group_norm_silu)
    check_path(norm, "auto")


@layouts
@kinds
def test_what_auto_takes_here_in_bfloat16(kind, last):
    """PyTorch's GroupNorm too, which a network in bfloat16 on a CPU spends half of its time in otherwise."""
    norm = make((2, 12, 6, 5), 2, kind, dtype=torch.bfloat16, last=last)
    assert plain(norm) is _norm_cpu.group_norm_silu
    check_path(norm, "auto")


def test_groups_of_one_element():
    """What is left is the bias. F.group_norm refuses one sample of one pixel."""
    weight, bias = torch.ones(3), torch.tensor([0.5, -1.0, 2.0])
    y = ops.group_norm_silu(torch.tensor([[3.0, -2.0, 1.0]]), 3, weight, bias, silu=False)
    torch.testing.assert_close(y, bias[None], atol=1e-3, rtol=0)


@layouts
@kinds
def test_nothing_that_was_given_changes(kind, last):
    norm = make((2, 12, 6, 5), 2, kind, last=last)
    before = {k: v.clone() for k, v in norm.tensors.items()}
    for result in norm.run("auto"):
        result.fill_(7.0)
    assert all(torch.equal(v, before[k]) for k, v in norm.tensors.items())


@pytest.mark.parametrize("mean", [0.0, 3.0, 50.0, -1000.0])
@pytest.mark.parametrize("shape, groups", [((2, 12, 16, 16), 2), ((1, 8, 4, 8, 8), 2)], ids=str)
def test_large_means_in_channels_last(shape, groups, mean):
    """PyTorch's own variances there lose twice the digits of the mean, and all of them at 1000."""
    norm = make(shape, groups, "plain", last=True, mean=mean)
    (exact,), (value,) = norm.to(torch.float64).run("reference"), norm.run("auto")
    assert value.stride() == norm.tensors["x"].stride()
    # A few roundings of the mean, which PyTorch multiplies before it subtracts.
    assert (value.double() - exact).abs().max() <= 3e-6 * exact.abs().max() + 5 * 2**-24 * abs(mean)


@pytest.mark.parametrize("lost", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_that_is_lost_leaves_the_others_alone(layout, lost):
    """The largest mean of the batch is NaN then, and says nothing of theirs."""
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0)) + 30
    x[1, 3, 2, 2] = lost
    x = x.contiguous(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout))
    y = ops.group_norm_silu(x, 2, torch.ones(8), torch.zeros(8))
    expected = reference.group_norm_silu(x, 2, torch.ones(8), torch.zeros(8))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert y[::2].isfinite().all() and y[1].isnan().any()


@pytest.mark.parametrize("mean", [0.5, 1000.0])
@pytest.mark.parametrize("by", ["C", "PyTorch"])
def test_the_rule_in_channels_last(monkeypatch, mean, by):
    """Values and gradients as good as those of the reference, with a compiler and without."""
    if by == "PyTorch":
        monkeypatch.setattr(group_norm, "refusal", lambda: "there is no C compiler")
    check_path(make((2, 96, 16, 16), 32, "film", last=True, mean=mean), "auto")


def test_other_layouts_on_the_cpu():
    norm = make((2, 12, 6, 5), 2)
    tensors = {k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in norm.tensors.items()}
    check_path(Norm(tensors, 2, norm.options), "auto")


def test_16_bit_parameters_of_a_float32_batch():
    norm = make((2, 12, 6, 5), 2, parameters=torch.bfloat16)
    assert plain(norm) is _norm_cpu.group_norm_silu
    check_path(norm, "auto")


@kinds
def test_gradients(kind):
    """Against finite differences, for every input."""
    norm = make((2, 4, 2, 2), 2, kind).to(torch.float64)
    names = list(norm.tensors)
    values = [v.requires_grad_() for v in norm.tensors.values()]
    assert torch.autograd.gradcheck(lambda *given: norm.call(dict(zip(names, given))), values)


@layouts
@kinds
def test_one_graph(kind, last):
    """torch.compile(fullgraph=True) passes through, forward and backward, and changes nothing."""
    norm = make((2, 12, 4, 4), 2, kind, last=last)
    torch._dynamo.reset()
    compiled = torch.compile(norm.call, fullgraph=True, backend="aot_eager")
    leaves, expected = norm.graph("auto")
    results = compiled(leaves)
    for value, other in zip(results, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    weights = [upstream(r) for r in results]
    for grads in zip(*(torch.autograd.grad(r, list(leaves.values()), weights) for r in (results, expected))):
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


class TestDropout:
    INDEX = torch.tensor([5, 2**33 + 1, 0, 7])

    def test_words_are_philoxs(self):
        """Word c % 4 of the counter (r ceil(C / 4) + c // 4, draw, index low, index high) under the seed."""
        mask = reference.dropout_mask(ops.Draw(2**40 + 3, self.INDEX, 9), (4, 6, 2, 3), 0.3)
        threshold = round(0.3 * 2**32)
        for b, c, r in ((0, 0, 0), (1, 5, 4), (2, 3, 5), (3, 4, 1), (1, 2, 3)):
            index = int(self.INDEX[b])
            counter = (r * 2 + c // 4, 9, index & 0xFFFFFFFF, index >> 32)
            words = reference.philox4x32(tuple(torch.tensor([word]) for word in counter), 2**40 + 3)
            assert bool(mask[b, c, r // 3, r % 3]) == (int(words[c % 4]) >= threshold)

    def test_depends_on_seed_index_draw_channel_and_pixel_alone(self):
        draw = ops.Draw(11, self.INDEX)
        together = reference.dropout_mask(draw, (4, 10, 8, 4), 0.5)
        for i in range(4):
            alone = reference.dropout_mask(draw._replace(index=self.INDEX[i : i + 1]), (1, 10, 8, 4), 0.5)
            assert torch.equal(alone[0], together[i])
        assert torch.equal(reference.dropout_mask(draw, (4, 10, 32), 0.5), together.flatten(2))
        assert torch.equal(reference.dropout_mask(draw, (4, 10, 4, 4), 0.5), together[:, :, :4])
        as_tensors = ops.Draw(torch.tensor(11), self.INDEX, torch.tensor(0))
        assert torch.equal(reference.dropout_mask(as_tensors, (4, 10, 8, 4), 0.5), together)
        for other in (draw._replace(seed=12), draw._replace(draw=1), draw._replace(index=self.INDEX + 1)):
            agree = (reference.dropout_mask(other, (4, 10, 8, 4), 0.5) == together).float().mean()
            assert 0.4 < agree < 0.6

    @pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
    def test_keeps_as_many_as_it_should(self, dropout):
        mask = reference.dropout_mask(ops.Draw(1, torch.arange(16)), (16, 30, 16, 16), dropout).double()
        error = (dropout * (1 - dropout)) ** 0.5
        assert abs(mask.mean() - (1 - dropout)) < 5 * error / mask.numel() ** 0.5
        for dim in (0, 1, 2, 3):
            rest = [i for i in range(4) if i != dim]
            assert ((mask.mean(rest) - (1 - dropout)).abs() < 5 * error / (mask.numel() / mask.shape[dim]) ** 0.5).all()
        flat = mask - mask.mean()
        for dim, step in ((1, 1), (1, 4), (2, 1), (3, 1)):
            # Neighbours do not know of one another.
            assert abs((flat * flat.roll(step, dim)).mean()) < 5 * error**2 / mask.numel() ** 0.5

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_scales_what_it_keeps(self, backend):
        norm = make((2, 12, 6, 5), 2, "plain", dropout=0.25)
        mask = reference.dropout_mask(norm.options["draw"], (2, 12, 6, 5), 0.25)
        (y,), (plain,) = norm.run(backend), Norm(norm.tensors, 2, {}).run(backend)
        torch.testing.assert_close(y, plain * mask / 0.75)

    def test_without_dropout_a_draw_is_not_looked_at(self):
        norm = make((2, 12, 6, 5), 2, "plain", draw=ops.Draw(0, torch.arange(7)))
        assert torch.equal(norm.run("auto")[0], Norm(norm.tensors, 2, {}).run("auto")[0])


BAD = {
    r"x must be a batch \[B, \.\.\.\] of 2 or more dimensions, got \[12\]": {"x": torch.ones(12)},
    r"x must have a floating dtype, got torch.int64": {"x": torch.ones(2, 12, 4, 4).long()},
    r"num_groups must divide the 12 channels of x, got 5": {"num_groups": 5},
    r"num_groups must divide the 12 channels of x, got 0": {"num_groups": 0},
    r"num_groups must be a whole number, got 2\.0": {"num_groups": 2.0},
    r"num_groups must divide the 12 channels of x, got 5$": {"num_groups": np.int64(5)},
    r"eps must be a Python number, got a tensor": {"eps": torch.tensor(1e-5)},
    r"weight must be a torch.Tensor \[C\], got NoneType": {"weight": None},
    r"weight must be \[C\] = \[12\], got \[11\]": {"weight": torch.ones(11)},
    r"bias must be \[C\] = \[12\], got \[1, 12\]": {"bias": torch.ones(1, 12)},
    r"bias must have a floating dtype, got torch.int32": {"bias": torch.ones(12).int()},
    r"bias is on meta, x on cpu": {"bias": torch.ones(12, device="meta")},
    r"x_bias must be \[C\] = \[12\], got \[2, 12\]": {"x_bias": torch.ones(2, 12)},
    r"scale and shift go together": {"scale": torch.ones(2, 12)},
    r"scale must be \[B, C\] = \[2, 12\], got \[12\]": {"scale": torch.ones(12), "shift": torch.ones(2, 12)},
    r"shift must be \[B, C\] = \[2, 12\], got \[2, 6\]": {"scale": torch.ones(2, 12), "shift": torch.ones(2, 6)},
    r"residual must have the shape of x \[2, 12, 4, 4\], got \[12, 4, 4\]": {"residual": torch.ones(12, 4, 4)},
    r"residual is on meta, x on cpu": {"residual": torch.ones(2, 12, 4, 4, device="meta")},
    r"eps must be a number of 0 or more, got -1": {"eps": -1},
    r"dropout must be a number in \[0, 1\), got 1\.0": {"dropout": 1.0},
    r"dropout must be a number in \[0, 1\), got nan": {"dropout": float("nan")},
    r"dropout must be a number in \[0, 1\), got 'a'": {"dropout": "a"},
    r"eps must be a number of 0 or more, got a": {"eps": "a"},
    r"draw is missing: dropout needs": {"dropout": 0.1},
    r"draw must be a Draw\(seed, index, draw\), got int": {"dropout": 0.1, "draw": 3},
    r"draw draws 3 samples, x has 2": {"dropout": 0.1, "draw": ops.Draw(0, torch.arange(3))},
    r"draw\.seed must be an integer": {"dropout": 0.1, "draw": ops.Draw(0.5, torch.arange(2))},
    r"draw\.index is on meta, x on cpu": {"dropout": 0.1, "draw": ops.Draw(0, torch.arange(2, device="meta"))},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    good = {"x": torch.ones(2, 12, 4, 4), "num_groups": 2, "weight": torch.ones(12), "bias": torch.ones(12)}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.group_norm_silu(**{**good, **BAD[message]})


def test_groups_of_numpy():
    x, weight = torch.randn(2, 12, 4, 4), torch.ones(12)
    given, expected = (ops.group_norm_silu(x, n, weight, weight) for n in (np.int64(3), 3))
    assert torch.equal(given, expected)


def test_meta_tensors_and_transforms_take_the_reference():
    x, weight = torch.randn(2, 12, 4, 4), torch.ones(12)
    assert ops.group_norm_silu(x.to("meta"), 2, weight.to("meta"), weight.to("meta")).shape == x.shape
    _, tangent = torch.func.jvp(lambda x: ops.group_norm_silu(x, 2, weight, weight), (x,), (torch.ones_like(x),))
    # The mean of a group moves with it.
    assert tangent.abs().max() < 1e-4


def test_info_names_it():
    with cmfast.backend("auto"):
        assert ops.explain("group_norm_silu")[0] == "in place"
        assert ops.explain("group_norm_silu", dtype=torch.bfloat16)[0] == "in place"
        assert ops.explain("group_norm_silu", dtype=torch.float16)[0] == "reference"


def test_layout_of_a_test():
    """channels_last where it is asked for."""
    assert layout(torch.ones(2, 3, 4, 4), True).stride() == (48, 1, 12, 3)
