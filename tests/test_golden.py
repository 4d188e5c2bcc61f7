"""The core against numbers of the original research code (golden/README.md): values, gradients, whole loops."""

import pytest
import torch

from cmfast import Sampler, editing, losses, noise, ops, samplers, schedules
from cmfast.tolerances import GOLDEN_LOOP, GOLDEN_VALUE
from tests.golden_utils import load, relative_error
from tests.toy import toy_denoiser

TENSORS, META = load("karras_2303")
META = META["meta"]
KINDS = {"edm": 0.0, "bc": 0.002}
SAMPLES = sorted(k[len("sample.") : -len(".out")] for k in TENSORS if k.startswith("sample.") and k.endswith(".out"))
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
TS = {40: (0, 22, 39), 151: (0, 67, 150)}


def close(value, expected, tolerance=GOLDEN_VALUE):
    assert value.shape == expected.shape
    assert relative_error(value, expected) <= tolerance


class Replay:
    """Noise as the original drew it, one draw after the other."""

    def __init__(self, prefix):
        self.draws = [TENSORS[f"{prefix}.draw.{i}"] for i in range(99) if f"{prefix}.draw.{i}" in TENSORS]
        self.used = 0

    def __call__(self, x):
        self.used += 1
        return self.draws[self.used - 1]


def names(prefix):
    return sorted(
        {k.split(".grad.")[0].removesuffix(".loss") for k in TENSORS if k.startswith(prefix) and ".loss" in k}
    )


@pytest.mark.parametrize("n", [2, 18, 40, 151])
def test_karras_sigmas(n):
    sigmas = schedules.karras_sigmas(n)
    # Level by level: the smallest matter as much as the largest.
    torch.testing.assert_close(sigmas, TENSORS[f"sigmas_karras.{n}"], rtol=GOLDEN_VALUE, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scalings_and_denoise(kind):
    for name, value in zip(
        ("c_skip", "c_out", "c_in"), ops.scalings(TENSORS["sigma"], boundary=KINDS[kind]), strict=True
    ):
        torch.testing.assert_close(value, TENSORS[f"scalings.{kind}.{name}"], rtol=GOLDEN_VALUE, atol=0)
    model = toy_denoiser(TENSORS, "student", kind)
    model_input, c_noise = ops.scale_input(TENSORS["x_t"], TENSORS["sigma"])
    close(model.network(model_input, c_noise, TENSORS["y"]), TENSORS[f"denoise.{kind}.model_output"])
    close(model(TENSORS["x_t"], TENSORS["sigma"], TENSORS["y"]), TENSORS[f"denoise.{kind}.denoised"])


def test_add_noise():
    close(ops.add_noise(TENSORS["x_start"], TENSORS["noise"], TENSORS["sigma"])[0], TENSORS["x_t"])


@pytest.mark.parametrize("weighting", schedules.WEIGHTINGS)
def test_loss_weights(weighting):
    torch.testing.assert_close(
        ops.loss_weight(TENSORS["sigma"], weighting), TENSORS[f"weights.{weighting}"], rtol=GOLDEN_VALUE, atol=0
    )


@pytest.mark.parametrize("i", range(4))
def test_ema_and_scales(i):
    settings = dict(META[f"ema_scales.{i}"])
    at_step = schedules.ema_and_scales(**{k: v for k, v in settings.items() if k != "steps"})
    value = torch.tensor([at_step(step) for step in settings["steps"]], dtype=torch.float64)
    torch.testing.assert_close(value, TENSORS[f"ema_scales.{i}"], rtol=1e-12, atol=0)


def check_loss(name, model, terms):
    close(terms["loss"], TENSORS[f"{name}.loss"])
    terms["loss"].mean().backward()
    for parameter, value in model.network.named_parameters():
        close(value.grad, TENSORS[f"{name}.grad.{parameter}"], GOLDEN_LOOP)


@pytest.mark.parametrize("name", names("edm."))
def test_denoising_loss(name):
    model = toy_denoiser(TENSORS, "student", "edm")
    terms = losses.denoising_loss(
        model,
        TENSORS["x_start"],
        TENSORS["sigma"],
        noise=TENSORS["noise"],
        labels=TENSORS["y"],
        weighting=name.split(".")[1],
    )
    close(terms["xs_mse"], TENSORS[f"{name}.xs_mse"])
    close(terms["mse"], TENSORS[f"{name}.mse"])
    check_loss(name, model, terms)


@pytest.mark.parametrize("name", names("ct.") + names("cd.") + names("pd."))
@pytest.mark.parametrize("drawn", [False, True], ids=["indices given", "indices drawn"])
def test_consistency_and_progressive_losses(name, drawn):
    mode, norm, weighting = name.split(".")
    # The original distils progressively without the boundary condition.
    kind = "edm" if mode == "pd" else "bc"
    model, target = (toy_denoiser(TENSORS, role, kind) for role in ("student", "target"))
    teacher = toy_denoiser(TENSORS, "teacher", "edm")
    options = {
        "noise": TENSORS["noise"],
        "labels": TENSORS["y"],
        "loss_norm": norm,
        "weighting": weighting,
        "indices": None if drawn else TENSORS[f"{name}.indices"],
    }
    x_start, scales = TENSORS["x_start"], META["num_scales"][mode]
    torch.manual_seed(META["loss_torch_manual_seed"])
    if mode == "pd":
        terms = losses.progressive_distillation_loss(model, teacher, x_start, scales, **options)
    else:
        terms = losses.consistency_loss(
            model, target, x_start, scales, teacher_model=teacher if mode == "cd" else None, **options
        )
    check_loss(name, model, terms)
    assert all(p.grad is None for frozen in (target, teacher) for p in frozen.parameters())


@pytest.mark.parametrize("through", ["network", "function", "Sampler"])
@pytest.mark.parametrize("name", SAMPLES)
def test_sampling_loops(name, through):
    sampler, steps, churn, kind, clip = name.split(".")
    steps = int(steps)
    model, labels = toy_denoiser(TENSORS, "student", kind), TENSORS["y"][:2]
    if through == "function":
        model = type("Wrapped", (), {"__call__": lambda self, x, sigma, y, inner=model: inner(x, sigma, y)})()
    replay = Replay(f"sample.{name}")
    options = {"labels": labels, "clip_denoised": clip == "clip"}
    if sampler in ("heun", "dpm", "ancestral"):
        options |= {"noise_fn": replay, "draw_unused": True}
    if churn == "churn":
        options |= CHURN
    if sampler == "multistep":
        *sigmas, end = schedules.multistep_sigmas(TS[steps], steps)
        options |= {"noise_fn": replay, "end_sigma": end}
    else:
        sigmas = schedules.karras_sigmas(steps + (sampler == "progdist"))
    if through == "Sampler":
        noise_fn, labels = options.pop("noise_fn", None), options.pop("labels")
        engine = Sampler(model, 2, sampler=sampler, sigmas=sigmas, image_shape=(3, 12, 20), **options)
        out = engine.generate(replay(None), labels, noise_fn=noise_fn)
    else:
        out = samplers.sample(model, replay(None), sampler=sampler, sigmas=sigmas, **options)
    close(out, TENSORS[f"sample.{name}.out"], GOLDEN_LOOP)
    assert replay.used == len(replay.draws)


@pytest.mark.parametrize("task", ["colorization", "superres"])
def test_editing(task):
    model, labels = toy_denoiser(TENSORS, "student", "bc"), TENSORS["y"][:2]
    *sigmas, end = schedules.multistep_sigmas((0, 11, 39), 40)
    replay = Replay(f"edit.{task}")
    run = editing.colorize if task == "colorization" else editing.super_resolve
    out, reference = run(
        model, TENSORS["edit.images"], TENSORS["edit.x"], sigmas, labels=labels, noise_fn=replay, end_sigma=end
    )
    close(reference, TENSORS[f"edit.{task}.reference"])
    close(out, TENSORS[f"edit.{task}.out"], GOLDEN_LOOP)


@pytest.mark.parametrize("name, key", [("determ", "determ"), ("determ-indiv", "determ_indiv")])
def test_generators(name, key):
    generator = noise.get_generator(name, num_samples=8, seed=2303)
    assert torch.equal(generator.randn(4, 3, 4, 4), TENSORS[f"{key}.randn"])
