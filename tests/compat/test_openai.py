"""openai's `cm` as cmfast.compat.openai has it: golden numbers, editing, errors."""


import numpy as np
import pytest
import torch
from torch import nn

from cmfast.compat.openai import karras_diffusion as kd
from cmfast.compat.openai import nn as cm_nn
from cmfast.compat.openai import random_util, script_util
from cmfast.denoiser import Denoiser
from cmfast.tolerances import GOLDEN_LOOP, GOLDEN_VALUE
from tests.compat.openai_utils import CHURN, META, TENSORS, Y, diffusion_of, toy
from tests.golden_utils import relative_error

SAMPLES = sorted(k[len("sample.") : -len(".out")] for k in TENSORS if k.startswith("sample.") and k.endswith(".out"))
LOSSES = sorted(k.removesuffix(".loss") for k in TENSORS if k.endswith(".loss"))
TS = {40: (0, 22, 39), 151: (0, 67, 150)}


def close(value, expected, tolerance=GOLDEN_VALUE):
    assert value.shape == expected.shape
    assert relative_error(value, expected) <= tolerance


class Overridden(kd.KarrasDenoiser):
    """The same numbers by another way, which has to be taken."""

    calls = 0

    def get_scalings(self, sigma):
        self.calls += 1
        return super().get_scalings(sigma)

    def get_scalings_for_boundary_condition(self, sigma):
        self.calls += 1
        return super().get_scalings_for_boundary_condition(sigma)


class Replay:
    """A generator that draws what the original drew."""

    def __init__(self, prefix):
        self.draws = [TENSORS[f"{prefix}.draw.{i}"] for i in range(99) if f"{prefix}.draw.{i}" in TENSORS]
        self.used = 0

    def randn(self, *size, device=None):
        self.used += 1
        assert self.draws[self.used - 1].shape == size
        return self.draws[self.used - 1]

    def randn_like(self, x):
        return self.randn(*x.shape)


# Golden numbers


@pytest.mark.parametrize("n", [2, 18, 40, 151])
def test_get_sigmas_karras(n):
    sigmas = kd.get_sigmas_karras(n, 0.002, 80.0)
    torch.testing.assert_close(sigmas, TENSORS[f"sigmas_karras.{n}"], rtol=GOLDEN_VALUE, atol=0)


@pytest.mark.parametrize("kind", ["edm", "bc"])
def test_scalings_and_denoise(kind):
    diffusion = diffusion_of(kind)
    scalings = diffusion.get_scalings if kind == "edm" else diffusion.get_scalings_for_boundary_condition
    for name, value in zip(("c_skip", "c_out", "c_in"), scalings(TENSORS["sigma"]), strict=True):
        torch.testing.assert_close(value, TENSORS[f"scalings.{kind}.{name}"], rtol=GOLDEN_VALUE, atol=0)
    output, denoised = diffusion.denoise(toy(), TENSORS["x_t"], TENSORS["sigma"], y=Y)
    close(output, TENSORS[f"denoise.{kind}.model_output"])
    close(denoised, TENSORS[f"denoise.{kind}.denoised"])


@pytest.mark.parametrize("schedule", ["snr", "snr+1", "karras", "truncated-snr", "uniform"])
def test_get_weightings(schedule):
    diffusion = kd.KarrasDenoiser()
    weights = kd.get_weightings(schedule, diffusion.get_snr(TENSORS["sigma"]), diffusion.sigma_data)
    torch.testing.assert_close(weights, TENSORS[f"weights.{schedule}"], rtol=GOLDEN_VALUE, atol=0)


@pytest.mark.parametrize("levels", [2.0, 3, np.array([0.5, 2.0]), np.float32([0.5, 2]), torch.tensor([1, 2])], ids=str)
def test_levels_of_any_kind(levels):
    """Numbers give numbers, arrays arrays of their dtype, integer tensors float32."""
    diffusion = kd.KarrasDenoiser()
    tensor = torch.as_tensor(levels)
    floats = tensor if tensor.is_floating_point() else tensor.float()
    kind, dtype = (type(levels), levels.dtype) if hasattr(levels, "dtype") else (float, None)
    for function in (
        diffusion.get_scalings,
        diffusion.get_scalings_for_boundary_condition,
        lambda sigma: (diffusion.get_snr(sigma),),
        *(lambda snr, name=name: (kd.get_weightings(name, snr, 0.5),) for name in ("snr", "snr+1", "karras")),
    ):
        for value, expected in zip(function(levels), function(floats), strict=True):
            assert type(value) is kind
            assert dtype is None or value.dtype == (torch.float32 if kind is torch.Tensor else dtype)
            torch.testing.assert_close(torch.as_tensor(value, dtype=expected.dtype), expected)


def test_numbers_and_arrays_beside_another_default_device():
    diffusion = kd.KarrasDenoiser()
    with torch.device("meta"):
        assert diffusion.get_snr(2.0) == 0.25
        assert diffusion.get_snr(np.array([0.5, 2.0])).tolist() == [4.0, 0.25]


def test_denoise_at_whole_levels():
    outputs = [diffusion_of().denoise(toy(), TENSORS["x_t"], torch.full((len(Y),), v), y=Y)[1] for v in (80, 80.0)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("through", [kd.KarrasDenoiser, Overridden])
@pytest.mark.parametrize("name", SAMPLES)
def test_karras_sample(name, through):
    sampler, steps, churn, kind, clip = name.split(".")
    diffusion, generator = through(distillation=kind == "bc"), Replay(f"sample.{name}")
    out = kd.karras_sample(
        diffusion,
        toy(),
        (2, 3, 12, 20),
        int(steps),
        clip_denoised=clip == "clip",
        model_kwargs={"y": Y[:2]},
        sampler=sampler,
        generator=generator,
        ts=TS.get(int(steps)) if sampler == "multistep" else None,
        **(CHURN if churn == "churn" else {}),
    )
    close(out, TENSORS[f"sample.{name}.out"], GOLDEN_LOOP)
    assert generator.used == len(generator.draws)
    assert through is kd.KarrasDenoiser or diffusion.calls > 0


@pytest.mark.parametrize("through", [kd.KarrasDenoiser, Overridden])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, through):
    mode, *norm, schedule = name.split(".")
    # The original distils progressively, and trains EDM, without the boundary condition.
    diffusion = through(
        weight_schedule=schedule, distillation=mode in ("ct", "cd"), loss_norm=norm[0] if norm else "lpips"
    )
    model, target, teacher = toy(), toy("target"), toy("teacher")
    options = {"model_kwargs": {"y": Y}, "noise": TENSORS["noise"]}
    torch.manual_seed(META["loss_torch_manual_seed"])
    if mode == "edm":
        terms = diffusion.training_losses(model, TENSORS["x_start"], TENSORS["sigma"], **options)
        close(terms["xs_mse"], TENSORS[f"{name}.xs_mse"])
        close(terms["mse"], TENSORS[f"{name}.mse"])
    else:
        if mode in ("cd", "pd"):
            options |= {"teacher_model": teacher, "teacher_diffusion": kd.KarrasDenoiser()}
        if mode in ("ct", "cd"):
            options["target_model"] = target
        loss = diffusion.progdist_losses if mode == "pd" else diffusion.consistency_losses
        terms = loss(model, TENSORS["x_start"], META["num_scales"][mode], **options)
    close(terms["loss"], TENSORS[f"{name}.loss"])
    terms["loss"].mean().backward()
    for key, parameter in model.named_parameters():
        close(parameter.grad, TENSORS[f"{name}.grad.{key}"], GOLDEN_LOOP)
    assert all(p.grad is None for frozen in (target, teacher) for p in frozen.parameters())
    assert through is kd.KarrasDenoiser or diffusion.calls > 0


@pytest.mark.parametrize(
    "task, run", [("colorization", kd.iterative_colorization), ("superres", kd.iterative_superres)]
)
def test_editing(task, run):
    diffusion, model = diffusion_of(), toy()
    out, reference = run(
        lambda x, sigma: diffusion.denoise(model, x, sigma, y=Y[:2])[1],
        TENSORS["edit.images"],
        TENSORS["edit.x"],
        (0, 11, 39),
        generator=Replay(f"edit.{task}"),
    )
    close(out, TENSORS[f"edit.{task}.out"], GOLDEN_LOOP)
    close(reference, TENSORS[f"edit.{task}.reference"])


@pytest.mark.parametrize(
    "run, references", [(kd.iterative_colorization, 1), (kd.iterative_superres, 1), (kd.iterative_inpainting, 7)]
)
def test_one_image_is_edited_many_times(run, references):
    image, x = torch.rand(1, 3, 16, 16) * 2 - 1, 80 * torch.randn(7, 3, 16, 16)
    results = []
    for images in (image, image.repeat(7, 1, 1, 1)):
        torch.manual_seed(0)
        results.append(run(lambda x, sigma: 0.1 * x, images, x, (0, 22, 39)))
    (out, reference), (expected, expected_reference) = results
    torch.testing.assert_close(out, expected)
    assert reference.shape == (references, 3, 16, 16) and expected_reference.shape == x.shape
    torch.testing.assert_close(reference, expected_reference[:references])
    with pytest.raises(ValueError, match="shape of x|does not broadcast"):
        run(lambda x, sigma: 0.1 * x, image.repeat(2, 1, 1, 1), x[:3], (0, 39))


@pytest.mark.parametrize("run", [kd.iterative_colorization, kd.iterative_superres])
def test_editing_draws_noise_in_the_originals_order(run):
    """torch's generator fills an image as it lies, which the original's colorization, alone, leaves transposed."""
    strides = []

    class Recording(random_util.DummyGenerator):
        def randn_like(self, x, **options):
            strides.append(x.stride())
            return super().randn_like(x, **options)

    x, images = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    torch.manual_seed(0)
    out, _ = run(lambda x, sigma: 0 * x, images, x, (0, 20, 39, 20), generator=Recording())
    as_it_was, transposed = (768, 256, 16, 1), (768, 1, 48, 3)
    assert strides == [as_it_was, *[transposed if run is kd.iterative_colorization else as_it_was] * 2]
    torch.manual_seed(0)
    draws = [torch.randn_like(torch.empty_strided(x.shape, stride)) for stride in strides]
    # Of grey zeros only the last noise is left.
    torch.testing.assert_close(out / out.std(), draws[-1] / draws[-1].std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, key", [("determ", "determ"), ("determ-indiv", "determ_indiv")])
def test_deterministic_generators(name, key):
    generator = random_util.get_generator(name, num_samples=8, seed=2303)
    assert torch.equal(generator.randn(4, 3, 4, 4), TENSORS[f"{key}.randn"])


@pytest.mark.parametrize("i", range(4))
def test_ema_and_scales(i):
    settings = dict(META[f"ema_scales.{i}"])
    steps = settings.pop("steps")
    at_step = script_util.create_ema_and_scales_fn(**settings)
    value = torch.tensor([at_step(step) for step in steps], dtype=torch.float64)
    torch.testing.assert_close(value, TENSORS[f"ema_scales.{i}"], rtol=1e-12, atol=0)


# Errors


X = torch.zeros(1, 1, 4, 4)


def plain(x, t):
    return 0.1 * x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: kd.karras_sample(d, toy(), X.shape, 4, sampler="ddim"), "'ddim'.*known: heun"),
        (lambda d: kd.karras_sample(d, toy(), X.shape, 4, sampler="multistep"), "ts is missing"),
        (lambda d: kd.karras_sample(d, toy(), X.shape, 4, sampler="multistep", ts=(0, 4)), "from 0 to 3; got 4"),
        (lambda d: kd.karras_sample(d, plain, X.shape, 4, s_churn=-3.0), "s_churn must be 0, .* or more, got -3.0"),
        (lambda d: kd.karras_sample(d, plain, X.shape, 4, sampler="dpm", s_churn=-1), "s_churn must be 0.*got -1"),
        (lambda d: kd.get_weightings("sqrt", torch.ones(1), 0.5), "'sqrt'; known: snr"),
        (lambda d: random_util.get_generator("philox"), "'philox'; known: dummy"),
        (lambda d: d.consistency_losses(toy(), X, 4), "target_model is missing"),
        (lambda d: d.consistency_losses(toy(), X, 4, None, toy(), toy()), "teacher_diffusion is missing"),
        (lambda d: d.progdist_losses(toy(), X, 4), "teacher_model is missing"),
        (lambda d: kd.KarrasDenoiser(loss_norm="l3").consistency_losses(toy(), X, 4, None, toy()), "'l3'; known: l1"),
        (lambda d: script_util.create_model(48, 32, 1), "image_size 48.*known: 64, 128, 256, 512"),
        (lambda d: cm_nn.update_ema([X, X], iter([X])), "there are 2 target_params and 1 source_params"),
        (lambda d: cm_nn.conv_nd(4, 1, 1, 1), "1, 2 or 3, got 4"),
        (lambda d: cm_nn.append_dims(X, 2), "must be 4 or more.*got 2"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(kd.KarrasDenoiser())


@pytest.mark.parametrize("how", ["sample", "sample through denoise", "wrapped", "losses", "target", "teacher"])
def test_a_denoiser_is_no_network(how):
    """It would be scaled twice, without a word."""
    model = Denoiser(plain)
    diffusion = Overridden() if how == "sample through denoise" else kd.KarrasDenoiser(loss_norm="l2")
    with pytest.raises(TypeError, match="the model is a (Denoiser|DataParallel), .* already, .*: give its network"):
        if how == "losses":
            diffusion.training_losses(model, X, torch.ones(1))
        elif how == "target":
            diffusion.consistency_losses(plain, X, 18, target_model=model)
        elif how == "teacher":
            diffusion.progdist_losses(plain, X, 18, teacher_model=model, teacher_diffusion=diffusion)
        else:
            kd.karras_sample(diffusion, nn.DataParallel(model) if how == "wrapped" else model, X.shape, 4)


# Inpainting


def test_inpainting_with_the_letter():
    """Seven images outside the letter, seven inside: complements of each other; the rest is filled in."""
    images = torch.rand(14, 3, 32, 32) + 0.1  # none is -1
    out, reference = kd.iterative_inpainting(
        lambda x, sigma: torch.full_like(x, -0.5), images, torch.zeros_like(images), (0, 39)
    )
    known = reference != -1
    assert torch.equal(known[:7], ~known[7:])
    assert 0.05 < known[7:].float().mean() < 0.5
    assert torch.equal(reference[known], images[known])
    torch.testing.assert_close(out[known], images[known], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[~known], torch.full_like(out[~known], -0.5), rtol=0, atol=1e-5)


def test_inpainting_with_a_mask_of_ones_own():
    images, mask = torch.rand(2, 3, 16, 16), torch.zeros(16, 16)
    mask[:, :8] = 1
    out, reference = kd.iterative_inpainting(
        lambda x, sigma: torch.zeros_like(x), images, torch.zeros_like(images), (0, 20, 39), mask=mask
    )
    assert torch.equal(reference, torch.where(mask == 1, images, -1))
    torch.testing.assert_close(out, images * mask, rtol=0, atol=1e-5)
