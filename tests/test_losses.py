"""The losses beyond the golden numbers (test_golden.py): what they promise, and bad arguments."""

import itertools

import pytest
import torch
from torch import nn

from cmfast import Denoiser, Preconditioner, losses, ops
from tests.toy import ToyNetwork

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
Y = torch.tensor([0, 1, 2, 3])


def toy(seed, preconditioner=None):
    torch.manual_seed(seed)
    return Denoiser(ToyNetwork(), preconditioner)


class DropoutOnly(nn.Module):
    """F that is nothing but a dropout mask."""

    def forward(self, x, t):
        return nn.functional.dropout(torch.ones_like(x), 0.5)


@pytest.mark.parametrize("teacher", [None, "teacher"])
def test_student_and_target_see_the_same_dropout(teacher):
    """With the same mask in both, a small step between levels leaves a small difference; with another, a large one."""
    model = Denoiser(DropoutOnly())
    teacher_model = Denoiser(DropoutOnly(), Preconditioner.edm()) if teacher else None
    for seed in range(3):
        torch.manual_seed(seed)
        terms = losses.consistency_loss(model, model, X, 100_000, teacher_model=teacher_model)
        assert terms["loss"].max() < 1e-3
    # And the mask of the next call is another one: the generator was not left where it was.
    torch.manual_seed(0)
    losses.consistency_loss(model, model, X, 18)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) != after


def test_another_default_device():
    """What a loss computes with is where the batch is."""

    def half(x, sigma):
        return 0.5 * x

    with torch.device("meta"):
        for teacher in (None, half):
            assert losses.consistency_loss(half, half, X, 18, teacher_model=teacher)["loss"].isfinite().all()
        assert losses.progressive_distillation_loss(half, half, X, 4)["loss"].isfinite().all()


def test_a_perfect_model_has_no_loss():
    """D of data that is one point: x_start. Consistency training, distillation and progressive distillation agree."""

    def perfect(x, sigma):
        return X

    for terms in (
        losses.consistency_loss(perfect, perfect, X, 18),
        losses.consistency_loss(perfect, perfect, X, 18, teacher_model=perfect),
        losses.consistency_loss(perfect, perfect, X, 18, teacher_model=perfect, solver="euler"),
        losses.progressive_distillation_loss(perfect, perfect, X, 4),
        losses.denoising_loss(perfect, X, torch.rand(4) + 0.1),
    ):
        assert terms["loss"].shape == (4,) and terms["loss"].abs().max() < 1e-6


def test_euler_and_heun_differ():
    model, teacher = toy(0), toy(1, Preconditioner.edm())
    values = []
    for solver in losses.SOLVERS:
        torch.manual_seed(0)
        values.append(
            losses.consistency_loss(model, model, X, 6, teacher_model=teacher, labels=Y, solver=solver)["loss"]
        )
    assert not torch.allclose(*values)


def test_a_function_is_as_good_a_model_as_a_denoiser():
    """Models of other scalings are given inputs of their own, at their own levels, and compared by D."""

    def as_function(model):
        return lambda x, sigma, labels: model(x, sigma, labels)

    def loss(student, target, teacher):
        options = {"labels": Y, "indices": torch.arange(4), "noise": torch.ones_like(X)}
        distilled = losses.consistency_loss(student, target, X, 6, teacher_model=teacher, **options)
        halved = losses.progressive_distillation_loss(student, teacher, X, 6, **options)
        return torch.stack([distilled["loss"], halved["loss"]])

    models = toy(0), toy(1), toy(2, Preconditioner.edm())
    expected = loss(*models)
    for functions in itertools.product([False, True], repeat=3):
        mixed = [as_function(model) if wrap else model for model, wrap in zip(models, functions)]
        torch.testing.assert_close(loss(*mixed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", ["denoising", "consistency", "improved_consistency", "progressive_distillation"])
def test_a_model_brings_its_own_levels_and_data(name, drawn):
    """As in samplers; what is given has the last word, and of a function levels and data are the original's."""
    loss = getattr(losses, f"{name}_loss")
    own = {"sigma_min": 0.05, "sigma_max": 9.0, "rho": 3.0}
    x, function = torch.randn(4, 3, 8, 8), lambda x, sigma: 0.3 * x
    model = Denoiser(lambda x, t: 0.3 * x, Preconditioner(2.0, 0.05), **own)

    def terms(model, **options):
        torch.manual_seed(1)
        others = {"denoising": (x, torch.ones(4)), "improved_consistency": (x, 11)}.get(name, (model, x, 11))
        weighting = {} if name == "improved_consistency" else {"weighting": "karras"}
        draw = {"draw": ops.Draw(0, torch.arange(4))} if drawn else {}
        return loss(model, *others, **weighting, **draw, **options)["loss"]

    data = {} if name == "improved_consistency" else {"sigma_data": 2.0}
    levels = {} if name == "denoising" else own
    first = {} if name == "denoising" else {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert torch.equal(terms(model), terms(model, **levels, **data))
    second = dict.fromkeys(data, 0.5)
    for of_others in filter(None, (first, second)):
        assert not torch.equal(terms(model), terms(model, **of_others))
    assert torch.equal(terms(function), terms(function, **first, **second))


def test_huber_c_grows_with_the_image():
    """c = 0.00054 sqrt(D): Song & Dhariwal 2023."""
    value = losses.distance(X, X + 0.001, torch.ones(4), loss_norm="huber")
    c = 0.00054 * 192**0.5
    expected = (192 * 0.001**2 + c**2) ** 0.5 - c
    assert value.tolist() == pytest.approx([expected] * 4, rel=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2-32", "huber"])
def test_gradient_reaches_the_student_alone(norm):
    model, target, teacher = toy(0), toy(1), toy(2, Preconditioner.edm())
    terms = losses.consistency_loss(model, target, X, 18, teacher_model=teacher, labels=Y, loss_norm=norm)
    terms["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for other in (target, teacher) for p in other.parameters())


def test_lpips_is_the_module_given():
    def lpips(x, y):
        return (x - y).abs().amax((1, 2, 3))

    model, target = toy(0), toy(1)
    options = {"labels": Y, "indices": torch.zeros(4, dtype=torch.int64), "noise": torch.randn_like(X)}
    loss = losses.consistency_loss(model, target, X, 18, loss_norm="lpips", lpips=lpips, **options)["loss"]
    by_hand = lpips(
        model(X + 80 * options["noise"], 80.0, Y),
        target(X + (s := losses.schedules.karras_sigma(1, 18)) * options["noise"], s, Y),
    )
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "karras"])
def test_distances_as_of_other_packages(weighting):
    """[B, 1, 1, 1], as the lpips package has it, is [B]; their mean is refused."""

    def lpips(x, y):
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    model, options = toy(0), {"labels": Y, "indices": torch.arange(4), "noise": torch.ones_like(X)}

    def loss(lpips):
        return losses.consistency_loss(
            model, model, X, 18, loss_norm="lpips", lpips=lpips, weighting=weighting, **options
        )["loss"]

    assert loss(lpips).shape == (4,)
    assert torch.equal(loss(lpips), loss(lambda x, y: lpips(x, y).flatten()))
    with pytest.raises(ValueError, match=r"lpips must return B = 4 distances, got \[\]"):
        loss(lambda x, y: lpips(x, y).mean())


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1, 1), (3,)], ids=str)
def test_weights_that_are_none_of_a_sample(shape):
    def weighting(sigma):
        return torch.ones(shape)

    model, message = toy(0), r"weight must be a scalar or \[B\] with B = 4"
    with pytest.raises(ValueError, match=message):
        losses.denoising_loss(model, X, torch.ones(4), labels=Y, weighting=weighting)
    for norm in ("l2", "l2-32", "lpips"):
        options = {"loss_norm": norm, "lpips": lambda x, y: (x - y).abs().mean((1, 2, 3))}
        with pytest.raises(ValueError, match=message):
            losses.consistency_loss(model, model, X, 18, labels=Y, weighting=weighting, **options)
    with pytest.raises(ValueError, match=message):
        losses.distance(X, X, torch.ones(shape), **options)
    assert losses.denoising_loss(model, X, torch.ones(4), labels=Y, weighting=torch.mean)["loss"].shape == (4,)


def test_what_a_draw_draws_is_not_given_too():
    """And a level of each sample is given or drawn."""
    model, draw = toy(0), ops.Draw(0, torch.arange(4))
    given = {"noise": torch.zeros_like(X)}, {"indices": torch.zeros(4, dtype=torch.int64)}
    for options in given:
        with pytest.raises(ValueError, match="would be drawn too"):
            losses.consistency_loss(model, model, X, 18, labels=Y, draw=draw, **options)
        with pytest.raises(ValueError, match="would be drawn too"):
            losses.progressive_distillation_loss(model, model, X, 18, labels=Y, draw=draw, **options)
    with pytest.raises(ValueError, match="leave out one"):
        losses.denoising_loss(model, X, torch.ones(4), labels=Y, draw=draw, **given[0])
    sigma = torch.rand(4) + 0.5
    noise = ops.normal(0, torch.arange(4), (3, 8, 8))
    drawn = losses.denoising_loss(model, X, sigma, labels=Y, draw=draw)["loss"]
    torch.testing.assert_close(drawn, losses.denoising_loss(model, X, sigma, labels=Y, noise=noise)["loss"])


def test_without_a_draw_torchs_generator_decides():
    model = toy(0)
    for loss in (
        lambda: losses.improved_consistency_loss(model, X, 11, labels=Y)["loss"],
        lambda: losses.easy_consistency_loss(model, X, 0, labels=Y)["loss"],
        lambda: losses.denoising_loss(model, X, ops.LogNormal(), labels=Y)["loss"],
    ):
        values = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            values.append(loss())
        assert torch.equal(values[0], values[1]) and not torch.allclose(values[1], values[2])


def test_float64():
    model = toy(0).double()
    terms = losses.consistency_loss(model, model, X.double(), 18, labels=Y)
    assert terms["loss"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_progressive_distillation_of_16_bit_images(dtype, drawn):
    """Its target is made of a difference of neighbouring states, of which their rounding leaves nothing."""
    student, teacher, draw = toy(0), toy(1, Preconditioner.edm()), ops.Draw(0, torch.arange(4))
    noise = ops.normal(0, torch.arange(4), (3, 8, 8)).to(dtype)
    given = {"draw": draw} if drawn else {"noise": noise, "indices": torch.tensor([0, 30, 80, 149])}
    values = []
    for x in (X.to(dtype), X.to(dtype).float()):
        options = {name: value.to(x) if name == "noise" else value for name, value in given.items()}
        values.append(losses.progressive_distillation_loss(student, teacher, x, 150, labels=Y, **options)["loss"])
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(*values, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("draw", [None, ops.Draw(0, torch.arange(4))], ids=["given", "drawn"])
def test_pixels_are_no_images_yet(draw):
    model, x = toy(0), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for loss in (
        lambda **options: losses.denoising_loss(model, x, torch.ones(4), **options),
        lambda **options: losses.consistency_loss(model, model, x, 18, **options),
        lambda **options: losses.improved_consistency_loss(model, x, 11, **options),
        lambda **options: losses.easy_consistency_loss(model, x, 0, **options),
        lambda **options: losses.progressive_distillation_loss(model, model, x, 4, **options),
    ):
        with pytest.raises(TypeError, match="x_start must have a floating dtype, got torch.uint8"):
            loss(draw=draw, labels=Y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_norm": "nope"}, "l1, l2, l2-32, huber, lpips"),
        ({"loss_norm": "lpips"}, "LPIPS()"),
        ({"weighting": "nope"}, "truncated-snr"),
        ({"solver": "nope"}, "heun, euler"),
        ({"num_scales": 1}, "2 or more, got 1"),
        ({"target_model": None}, "target_model is missing"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, "B = 4"),
        ({"indices": torch.tensor([0, 3, 17, 1])}, "indices must be from 0 to 16, got 0 to 17"),
        ({"indices": torch.tensor([-1, 3, 16, 1])}, "indices must be from 0 to 16, got -1 to 16"),
        ({"noise": torch.zeros(4, 3, 8, 7)}, "shape of x_start"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(options, message):
    model = toy(0)
    arguments = {"target_model": model, "num_scales": 18, "labels": Y, **options}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        losses.consistency_loss(model, x_start=X, **arguments)


def test_indices_of_the_grid():
    """A grid of 18 levels has 17 pairs, and as many intervals has progressive distillation of 17."""
    model, given = toy(0), {"labels": Y, "noise": torch.ones_like(X)}
    for make in (
        lambda indices: losses.consistency_loss(model, model, X, 18, indices=indices, **given),
        lambda indices: losses.progressive_distillation_loss(model, model, X, 17, indices=indices, **given),
    ):
        assert make(torch.tensor([0, 3, 16, 1]))["loss"].isfinite().all()
        with pytest.raises(ValueError, match="indices must be from 0 to 16, got 0 to 17"):
            make(torch.tensor([0, 3, 17, 1]))
        with pytest.raises(TypeError, match=r"indices must be a torch.Tensor \[B\], got list"):
            make([0, 3, 16, 1])


def test_a_teacher_with_one_memory_for_all_outputs():
    """As that of a CUDA graph, into which the second call of a Heun step writes."""
    memory = torch.empty(2, 1, 4, 4)

    def plain(x, sigma):
        return 0.3 * torch.tanh(x.roll(1, -1))

    def model(x, sigma):
        return memory.copy_(plain(x, sigma))

    x_start, noise = (torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    options = {"noise": noise, "indices": torch.tensor([3, 9])}
    one, other = (
        losses.consistency_loss(plain, plain, x_start, 18, teacher_model=each, **options)["loss"]
        for each in (plain, model)
    )
    assert torch.equal(one, other)
