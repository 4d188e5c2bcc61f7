"""Operations against the formulas of the papers, written out."""

import math

import numpy as np
import pytest
import torch

import cmfast
from cmfast import ops, reference

X = torch.tensor([[[[0.3, -1.2], [2.0, 0.1]]]], dtype=torch.float64)
F = torch.tensor([[[[0.5, 0.7], [-0.2, 1.1]]]], dtype=torch.float64)
SIGMA = torch.tensor([1.5], dtype=torch.float64)
NEXT = torch.tensor([0.4], dtype=torch.float64)


@pytest.fixture(params=["reference", "auto"])
def both_forms(request):
    """The reference, and the forms for the CPU."""
    with cmfast.backend(request.param):
        yield


def denoised(f, x, sigma, boundary=0.002):
    c_skip = 0.25 / ((sigma - boundary) ** 2 + 0.25)
    c_out = 0.5 * (sigma - boundary) / math.sqrt(sigma**2 + 0.25)
    return c_skip * x + c_out * f


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.7])
@pytest.mark.parametrize("boundary", [0.0, 0.002, 0.3])
def test_identity_at_the_boundary_bit_for_bit(sigma_data, boundary):
    x = torch.randn(2, 3, 5, 5)
    sigma = torch.tensor(boundary).expand(2)
    assert torch.equal(ops.denoise(torch.randn_like(x), x, sigma, sigma_data=sigma_data, boundary=boundary), x)


def test_c_noise_of_zero_is_finite():
    assert ops.c_noise(torch.tensor([0.0], dtype=torch.float64)).item() == pytest.approx(250 * math.log(1e-44))


def test_steps():
    d = (X - denoised(F, X, 1.5)) / 1.5
    euler = X + d * (0.4 - 1.5)
    x, model_input, c_noise = ops.euler_step(F, X, SIGMA, NEXT)
    torch.testing.assert_close(x, euler)
    torch.testing.assert_close(model_input, euler / math.sqrt(0.4**2 + 0.25))
    assert c_noise.item() == pytest.approx(250 * math.log(0.4))
    torch.testing.assert_close(ops.heun_predictor(F, X, SIGMA, NEXT)[0], model_input)
    f2 = F.flip(-1)
    d2 = (euler - denoised(f2, euler, 0.4)) / 0.4
    torch.testing.assert_close(ops.heun_corrector(F, f2, X, SIGMA, NEXT)[0], X + 0.5 * (d + d2) * (0.4 - 1.5))
    mid = X + d * (0.9 - 1.5)
    d_mid = (mid - denoised(f2, mid, 0.9)) / 0.9
    value = ops.midpoint_corrector(F, f2, X, SIGMA, torch.tensor([0.9], dtype=torch.float64), NEXT)[0]
    torch.testing.assert_close(value, X + d_mid * (0.4 - 1.5))


def test_heun_is_euler_where_the_next_level_is_zero():
    x, f, f2 = (torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sigma, next_sigma = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 0.5]).double()
    value, *_ = ops.heun_corrector(f, f2, x, sigma, next_sigma)
    euler, *_ = ops.euler_step(f, x, sigma, next_sigma)
    torch.testing.assert_close(value[0], euler[0])
    assert not torch.allclose(value[1], euler[1])
    value.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, f, f2)) and (f2.grad[0] == 0).all()


def test_renoise():
    noise = X.flip(0, 1, 2, 3)
    x, *_ = ops.renoise(F, X, SIGMA, NEXT, noise, clip=True)
    expected = denoised(F, X, 1.5).clamp(-1, 1) + math.sqrt(0.4**2 - 0.002**2) * noise
    torch.testing.assert_close(x, expected)
    # At sigma_min and below nothing is added, exactly.
    x, *_ = ops.renoise(F.float(), X.float(), SIGMA.float(), torch.tensor([0.002]), 1e9 * noise.float())
    assert torch.equal(x, ops.denoise(F.float(), X.float(), SIGMA.float()))
    for dtype in (torch.float64, torch.float32):
        f, x, sigma, e = (t.to(dtype) for t in (F, X, SIGMA, noise))
        x, *_ = ops.renoise(f, x, sigma, torch.tensor([0.001], dtype=dtype), e)
        torch.testing.assert_close(x, denoised(F, X, 1.5).to(dtype))


def test_a_function_is_its_own_denoiser(both_forms):
    """sigma_data=None: c_skip = 0, c_out = 1, whatever the state holds."""
    x = torch.full((1, 1, 1, 2), math.inf)
    assert torch.equal(ops.denoise(torch.ones_like(x), x, torch.tensor(1.0), sigma_data=None), torch.ones_like(x))


@pytest.mark.parametrize("norm, expected", [("l1", 0.75), ("l2", 1.25), ("huber", math.sqrt(5 + 0.09) - 0.3)])
def test_distances(norm, expected):
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    value = ops.weighted_loss(x, torch.zeros_like(x), torch.tensor([2.0]), norm=norm, huber_c=0.3)
    assert value.item() == pytest.approx(2 * expected)


def test_results_are_tensors_of_their_own(both_forms):
    """Where they are an argument, number by number, too: a write into one changes no other."""
    output, sigma = torch.ones(2, 3), torch.tensor([1.0, 2.0])
    expanded = output[:1].expand(2, 3)
    results = [
        ops.denoise(output, output, sigma, sigma_data=None), ops.denoise(expanded, output, sigma, sigma_data=None),
        *ops.scale_input(output, sigma, sigma_data=None), ops.c_noise(sigma, sigma_data=None),
        ops.snr_weight(sigma, "snr"),
    ]  # fmt: skip
    for result in results:
        result.fill_(7.0)
    assert output.eq(1).all() and sigma.tolist() == [1.0, 2.0]


def test_a_dtype_of_noise_is_asked_for():
    with pytest.raises(TypeError, match="dtype must be floating, got None"):
        ops.normal(0, torch.arange(2), (3,), dtype=None)


@pytest.mark.parametrize("norm", ops.losses.NORMS)
def test_losses_of_large_images(norm):
    """Of differences that are all alike, the worst case for a sum in float32: with gradients and without."""
    x = torch.full((1, 3 * 256 * 256), 1.1, requires_grad=True)
    exact = {"l1": 1.1, "l2": 1.1**2, "huber": 1.1 * math.sqrt(x.numel())}[norm]
    zeros = torch.zeros_like(x)
    losses = [
        ops.weighted_loss(x, zeros, torch.ones(()), norm=norm),
        ops.consistency_loss(x, zeros, torch.ones(()), zeros, norm=norm, sigma_data=None),
    ]
    for loss in (*losses, ops.weighted_loss(x.detach(), zeros, torch.ones(()), norm=norm)):
        assert abs(loss.item() / exact - 1) < 1e-6


@pytest.mark.parametrize("huber_c", [0.0, 5.0])
def test_huber_of_nan_is_nan(huber_c, both_forms):
    """A loss that is no number says so, and so does its gradient."""
    x = torch.tensor([[math.nan], [3.0]], requires_grad=True)
    loss = ops.weighted_loss(x, torch.zeros(2, 1), torch.ones(2), norm="huber", huber_c=huber_c)
    assert loss[0].isnan() and loss[1] > 0
    loss.sum().backward()
    assert x.grad[0].isnan() and x.grad[1] > 0


def test_huber_without_c_has_gradient_zero_at_zero(both_forms):
    x = torch.zeros(1, 3, requires_grad=True)
    ops.weighted_loss(x, torch.zeros(1, 3), torch.ones(1), norm="huber").sum().backward()
    assert (x.grad == 0).all()
    # From network outputs, of a batch in which one sample has a distance.
    f, sigma = torch.ones(2, 3, requires_grad=True), torch.ones(2)
    target = f.detach() * torch.tensor([[1.0], [2.0]])
    points = f, f.detach(), sigma, target, sigma, f.detach(), sigma
    ops.consistency_loss(*points, norm="huber").sum().backward()
    assert (f.grad[0] == 0).all() and (f.grad[1] < 0).all()


@pytest.mark.parametrize(
    "values, trunc, nearest",
    [([-1.0, 1.0, 0.0], [0, 255, 127], [0, 255, 128]), ([-7.0, 7.0, math.nan], [0, 255, 0], [0, 255, 0])],
)
def test_to_uint8(values, trunc, nearest):
    x = torch.tensor(values).view(1, 3, 1, 1)
    assert ops.to_uint8(x).flatten().tolist() == trunc
    assert ops.to_uint8(x, rounding="nearest").flatten().tolist() == nearest
    assert ops.to_uint8(x).shape == (1, 1, 1, 3)


def test_denoise_to_uint8_is_both_in_one():
    expected = ops.to_uint8(ops.denoise(F, X, SIGMA))
    assert torch.equal(ops.denoise_to_uint8(F, X, SIGMA), expected)


class TestCounterNoise:
    @pytest.fixture(autouse=True, params=["auto", "reference"])
    def path(self, request):
        """Where there is a compiler, C is the first."""
        with cmfast.backend(request.param):
            yield

    @pytest.mark.parametrize(
        "counter, key, words",
        [
            ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                0x299F31D0_A4093822,
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_known_answers(self, counter, key, words):
        """The known-answer vectors of Random123 for philox4x32-10."""
        out = reference.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
        assert tuple(int(word) for word in out) == words

    def test_sample_depends_on_its_index_alone(self):
        index = torch.tensor([5, 2**33 + 1, 0, 7])
        together = ops.normal(11, index, (3, 7, 5))
        for i in range(4):
            assert torch.equal(ops.normal(11, index[i : i + 1], (3, 7, 5))[0], together[i])
        assert torch.equal(ops.normal(11, index, (3 * 7 * 5,)), together.flatten(1))

    def test_draws_seeds_and_indices_differ(self):
        index = torch.arange(64)
        a = ops.normal(0, index, (512,))
        others = [ops.normal(0, index, (512,), draw=1), ops.normal(1, index, (512,)), ops.normal(0, index + 64, (512,))]
        for b in [*others, a.roll(1, 0), a.roll(1, 1)]:
            # 32,768 pairs: five standard errors of a correlation.
            assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / 32768**0.5

    def test_is_normal(self):
        stats = pytest.importorskip("scipy.stats", reason="scipy measures the distribution")
        z = ops.normal(3, torch.arange(64), (4096,)).flatten().double().numpy()
        assert stats.kstest(z, "norm").pvalue > 1e-3
        n = len(z)
        assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs(stats.kurtosis(z)) < 5 * (24 / n) ** 0.5 and abs(z).max() > 4

    def test_uniform_int_covers_its_range(self):
        values = ops.uniform_int(0, torch.arange(20_000), 10)
        counts = values.bincount(minlength=10)
        assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5

    @pytest.mark.parametrize("high", [0, 2**31 + 1, 2.5])
    def test_uniform_int_refuses(self, high):
        with pytest.raises(ValueError, match="high"):
            ops.uniform_int(0, torch.arange(2), high)

    @pytest.mark.parametrize(
        "seed, number", [(0.5, 0), (0, 0.5), (torch.ones(()), 0), (0, "1"), (0, torch.tensor(True))]
    )
    def test_what_is_no_counter_is_refused(self, seed, number):
        index = torch.arange(2)
        for call in (
            lambda: ops.normal(seed, index, (3,), draw=number),
            lambda: ops.uniform_int(seed, index, 3, draw=number),
            lambda: ops.draw_levels(ops.Draw(seed, index, number), ops.LogNormal()),
        ):
            with pytest.raises(TypeError, match="(seed|draw) must be an integer"):
                call()

    def test_any_integer_is_a_seed_and_a_draw_number(self):
        """Of a draw number the low 32 bits count, of a seed 64."""
        index = torch.arange(2)
        assert torch.equal(ops.normal(2**64 + 3, index, (5,), draw=2**70 + 1), ops.normal(3, index, (5,), draw=1))

    def test_index_must_be_integers(self):
        with pytest.raises(TypeError, match="index"):
            ops.normal(0, torch.ones(2), (3,))


@pytest.mark.parametrize("level, message", [(0.0, "must be positive"), (math.inf, "must be finite")])
def test_what_divides_by_the_level_refuses_zero_and_infinity(level, message):
    zero = torch.tensor([level], dtype=torch.float64)
    for call in (
        lambda: ops.euler_step(F, X, zero, NEXT),
        lambda: ops.heun_predictor(F, X, zero, NEXT),
        lambda: ops.heun_corrector(F, F, X, zero, NEXT),
        lambda: ops.midpoint_corrector(F, F, X, zero, NEXT, NEXT),
        lambda: ops.midpoint_corrector(F, F, X, SIGMA, zero, NEXT),
    ):
        with pytest.raises(ValueError, match=f"sigma holds noise levels and {message}"):
            call()


@pytest.mark.parametrize("sigma_data", [0, -1.0, math.inf, math.nan, None, "0.5"])
def test_weights_refuse_what_is_no_size_of_data(sigma_data):
    for call in (
        lambda: ops.loss_weight(torch.ones(1), "karras", sigma_data=sigma_data),
        lambda: ops.snr_weight(torch.ones(1), "karras", sigma_data=sigma_data),
        lambda: ops.consistency_loss(F, X, SIGMA, X, "karras", weight_sigma_data=sigma_data),
    ):
        with pytest.raises(ValueError, match="sigma_data must be positive, got"):
            call()


@pytest.mark.parametrize("level", [1e-38, 1e-44])
def test_steps_beside_the_smallest_levels(level, both_forms):
    """Where D = x nothing moves, though the ratio of the levels is infinite in float32."""
    x, tiny, one = torch.ones(3, 5), torch.tensor(level), torch.ones(())
    for x_next, *_ in (
        ops.euler_step(x, x, tiny, one, sigma_data=None),
        ops.heun_corrector(x, x, x, one, tiny, sigma_data=None),
        ops.midpoint_corrector(x, x, x, tiny, one, one, sigma_data=None),
    ):
        assert torch.equal(x_next, x)


@pytest.mark.parametrize("boundary", [-0.1, math.inf, math.nan, None, "0"])
def test_what_is_no_boundary_is_refused(boundary):
    draw = ops.Draw(0, torch.arange(1))
    for call in (
        lambda: ops.scalings(SIGMA, boundary=boundary),
        lambda: ops.denoise(F, X, SIGMA, boundary=boundary),
        lambda: ops.renoise(F, X, SIGMA, NEXT, draw, boundary=boundary),
        lambda: ops.euler_step(F, X, SIGMA, NEXT, boundary=boundary),
        lambda: ops.consistency_loss(F, X, SIGMA, X, boundary=boundary),
    ):
        with pytest.raises(ValueError, match="boundary must be a number of 0 or more, got"):
            call()
    with pytest.raises(ValueError, match="sigma_min must be a number of 0 or more, got"):
        ops.renoise(F, X, SIGMA, NEXT, draw, sigma_min=boundary)


@pytest.mark.parametrize("shape", [3, (3, "4"), (3, -1), (3, 2.0), (None,)])
def test_what_is_no_shape_is_refused(shape):
    draw = ops.Draw(0, torch.arange(2))
    for call in (
        lambda: ops.normal(0, draw.index, shape),
        lambda: ops.init_noise(draw, torch.tensor(80.0), shape=shape),
    ):
        with pytest.raises(TypeError, match="shape must be a shape of integers of 0 or more, got"):
            call()


def test_a_tensor_is_no_number():
    """Whatever it holds: the message says so, and not that its value is out of range."""
    half = torch.tensor(0.5)
    for name, call in {
        "sigma_data": lambda: ops.denoise(F, X, SIGMA, sigma_data=half),
        "boundary": lambda: ops.denoise(F, X, SIGMA, boundary=half),
        "weight_sigma_data": lambda: ops.consistency_loss(F, X, SIGMA, X, "karras", weight_sigma_data=half),
        "huber_c": lambda: ops.weighted_loss(X, F, SIGMA, norm="huber", huber_c=half),
        "p": lambda: ops.dropout(X, half, ops.Draw(0, torch.arange(len(X)))),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be a Python number, got a tensor"):
            call()


def test_integers_of_numpy():
    """In shapes, and as the end of a range."""
    draw, three = ops.Draw(0, torch.arange(2)), np.int32(3)
    assert torch.equal(ops.normal(0, draw.index, (three, np.int64(4))), ops.normal(0, draw.index, (3, 4)))
    assert ops.init_noise(draw, torch.tensor(80.0), shape=np.array([3, 4]))[0].shape == (2, 3, 4)
    assert torch.equal(ops.uniform_int(0, draw.index, three), ops.uniform_int(0, draw.index, 3))


@pytest.mark.parametrize("pair", [-1, "yes", None])
def test_a_pair_is_asked_for_by_true_or_false(pair):
    with pytest.raises(TypeError, match="pair must be True or False, got"):
        ops.draw_pair(X, ops.Draw(0, torch.arange(1)), ops.LogNormal(), pair=pair)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="truncated-snr"):
        ops.loss_weight(torch.ones(1), "nope")
    with pytest.raises(ValueError, match="l1, l2, huber"):
        ops.weighted_loss(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), norm="nope")
    with pytest.raises(ValueError, match="trunc, nearest"):
        ops.to_uint8(torch.ones(1, 1, 1, 1), rounding="nope")
    with pytest.raises(ValueError, match="sigma_data"):
        ops.scalings(torch.ones(1), sigma_data=0.0)


@pytest.mark.parametrize("pair", [True, False])
def test_the_plain_draw_of_a_pair(pair):
    """`reference.draw_pair`, which benchmarks take for the baseline, is the operation."""
    x, draw, levels = torch.randn(3, 2, 4, 4), ops.Draw(1, torch.arange(3)), ops.Grid(torch.tensor([80.0, 2.0, 0.002]))
    with cmfast.backend("reference"):
        drawn = ops.draw_pair(x, draw, levels, pair=pair)
    flat = [*drawn.first, *(drawn.second or ()), drawn.sigma, drawn.next_sigma]
    assert all(map(torch.equal, reference.draw_pair(x, draw, levels, pair=pair), flat))
