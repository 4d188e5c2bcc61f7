"""What users give in error: each is refused by a sentence that names the argument, what came and what was expected."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cmfast
from cmfast import curricula, editing, ema, losses, objectives, ops, samplers, schedules

X, LABELS = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
DRAW, INDEX = ops.Draw(0, torch.arange(2)), torch.arange(2)


def network(x, t, labels=None):
    return 0.1 * x


def sampler(**options):
    return cmfast.Sampler(cmfast.Denoiser(network, num_classes=3), 2, image_shape=(3, 4, 4), **options)


def consistency(num_scales=18, **options):
    return losses.consistency_loss(D, D, X, num_scales, **options)


def ect(stage=1, **options):
    return losses.easy_consistency_loss(D, X, stage, draw=DRAW, **options)


D = cmfast.Denoiser(network)
COLOUR = editing.colorize
AVERAGES = ema.Averages(torch.nn.Linear(2, 1), [0.5])

#: What is wrong: a call, and what its message says.
VALUES = {
    "pairs that do not come closer": (lambda: ect(q=0.5), "q must be above 1, .* got 0.5"),
    "pairs as close at each stage": (lambda: ect(q=1.0), "q must be above 1, .* got 1.0"),
    "a q of 0": (lambda: ect(q=0.0), "q must be positive, got 0.0"),
    "levels that rise": (lambda: ect(k=-3.0), "k must be a number of 0 or more, got -3.0"),
    "a negative b": (lambda: ect(b=-1.0), "b must be a number of 0 or more, got -1.0"),
    "a negative stage": (lambda: ect(-1), "stage must be 0 or more, got -1"),
    "q of an objective": (lambda: objectives.EasyConsistencyTuning(q=0.5), "q must be above 1"),
    "mean of an objective": (lambda: objectives.EDM(mean="a"), "mean must be a finite number, got 'a'"),
    "a class in letters": (lambda: sampler().labels(2, classes="12"), "classes must be whole numbers, got '12'"),
    "no class": (lambda: sampler().labels(2, classes=[None, 1]), r"classes must be whole numbers, got \[None, 1\]"),
    "classes of a generator": (
        lambda: sampler().labels(2, classes=(i for i in (0, 1))), "classes must be whole numbers"
    ),
    "a class of 71 bits": (lambda: sampler().labels(2, classes=2**70), "classes must be whole numbers, got 118059"),
    "a curriculum that falls": (lambda: curricula.doubling_stage(0, 10, 10, 5), "end_scales must be 10 or more, got 5"),
    "a step before the first": (lambda: curricula.doubling_stage(-1, 10, 10, 50), "step must be 0 or more, got -1"),
    "no steps": (
        lambda: schedules.ema_and_scales("fixed", 0.9, "progressive", 2, 150, 0, 0), "total_steps must be pos"
    ),
    "no steps of a stage": (
        lambda: schedules.ema_and_scales("fixed", 0.9, "progdist", 2, 150, 1, 0), "distill_steps_per_iter must be pos"
    ),
    "an unknown weighting": (lambda: consistency(weighting="foo"), "unknown weighting 'foo'; known: "),
    "no sigma_data": (lambda: consistency(sigma_data=None), "^sigma_data must be positive, got None"),
}  # fmt: skip
TYPES = {
    "a stage between stages": (lambda: ect(1.5), "stage must be a whole number, got 1.5"),
    "indices between levels": (
        lambda: consistency(indices=torch.tensor([3.7, 3.7])), "indices must be whole numbers, got torch.float32"
    ),
    "indices that are answers": (
        lambda: consistency(indices=LABELS > 0), "indices must be whole numbers, got torch.bool"
    ),
    "scales between scales": (lambda: consistency(2.5), "num_scales must be a whole number, got 2.5"),
    "scales in letters": (lambda: consistency("18"), "num_scales must be a whole number, got '18'"),
    "intervals": (
        lambda: losses.progressive_distillation_loss(D, D, X, None), "num_scales must be a whole number, got None"
    ),
    "scales of an objective": (
        lambda: objectives.ImprovedConsistencyTraining(start_scales=2.5), "start_scales must be a whole number, got 2.5"
    ),
    "intervals of an objective": (
        lambda: objectives.ProgressiveDistillation(start_scales=2.5), "start_scales must be a whole number, got 2.5"
    ),
    "scaled twice": (lambda: cmfast.Denoiser(D), "network is a Denoiser already"),
    "no network": (lambda: cmfast.Denoiser("x.pt"), "network must be F.x, timesteps., a module or a function, got str"),
    "a preconditioner's name": (lambda: cmfast.Denoiser(network, "edm"), "cmfast.Preconditioner or None, got 'edm'"),
    "rho in letters": (lambda: cmfast.Denoiser(network, rho="7"), "rho must be a number, got '7'"),
    "no sigma_max": (lambda: cmfast.Denoiser(network, sigma_max=None), "sigma_max must be a number, got None"),
    "sigma_data in letters": (lambda: cmfast.Preconditioner(sigma_data="a"), "sigma_data must be a number, got 'a'"),
    "no boundary": (lambda: cmfast.Preconditioner(boundary=None), "boundary must be a number, got None"),
    "a sampler of a file": (lambda: cmfast.Sampler("x.pt", 4), "a path, 'x.pt': cmfast.load makes a model of the file"),
    "a sampler of a path": (lambda: cmfast.Sampler(Path("x.pt"), 4), "a path, 'x.pt': cmfast.load"),
    "a sampler of nothing": (lambda: cmfast.Sampler(None, 4), "must be a Denoiser, or D.x, sigma., got NoneType"),
    "steps between steps": (lambda: sampler(ts=(0, 22.5, 39)), "ts must be a whole number, got 22.5"),
    "steps in letters": (
        lambda: sampler(ts="0,22,39"), r"ts must be whole numbers, such as \(0, 22, 39\), got '0,22,39'"
    ),
    "levels in letters": (lambda: samplers.sampler_sigmas("euler", sigmas=["a"]), "must be noise levels, .* got .'a'."),
    "an option that is none": (
        lambda: cmfast.sample(D, X, sampler="heun", s_chrun=1), "unknown option s_chrun of the heun"
    ),
    "an option of others": (
        lambda: cmfast.sample(D, X, steps=2), "unknown option steps of the multistep sampler; known: "
    ),
    "noise of NumPy": (lambda: cmfast.sample(D, X.numpy()), "noise must be a torch.Tensor, got ndarray"),
    "no noise": (lambda: sampler().generate(None), "noise must be a torch.Tensor, got NoneType"),
    "images of NumPy": (lambda: sampler().denoise(X.numpy(), 1.0), "x must be a torch.Tensor, got ndarray"),
    "no level": (lambda: sampler().denoise(X, None), "sigma must be a number, got None"),
    "a level in letters": (lambda: D(X, "80"), "sigma must be a number, got '80'"),
    "no images": (lambda: COLOUR(D, None, X, [80.0]), "images must be a torch.Tensor, got NoneType"),
    "no noise to edit": (lambda: editing.inpaint(D, X, None, [80.0], X > 0), "x must be a torch.Tensor, got NoneType"),
    "no averages": (
        lambda: ops.ema_update_([X], None, [0.9]), "averages must be a list of lists of tensors, got NoneT"
    ),
    "a rate": (lambda: ema.Averages(torch.nn.Linear(1, 1), 0.99), "rates must be a list, .* got 0.99"),
    "no parameters": (lambda: ema.Averages(None, [0.9]), "parameters must be a module, or .* got None"),
    "a shape of no order": (
        lambda: ops.normal(0, INDEX, {3, 4}), "shape must be a shape of integers of 0 or more, got {"
    ),
    "a shape that is a number": (lambda: ops.normal(0, INDEX, torch.tensor(3)), "shape must be a shape of integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    call, message = VALUES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_the_number_of_an_average():
    with pytest.raises(IndexError, match="k must be the number of an average, from 0 to 0, got 3"):
        AVERAGES.module(3)
    assert torch.equal(AVERAGES.module(-1).weight, AVERAGES.module(0).weight)


def test_what_is_close_to_these_is_taken():
    """NumPy's numbers, tensors of one, the ends of a range."""
    assert np.array_equal(ops.normal(2**64 - 1, INDEX, np.array([3])), ops.normal(-1, INDEX, [3]))
    assert sampler(ts=(np.int64(0), torch.tensor(22), 39)).ts == (0, 22, 39)
    assert torch.isfinite(ect(0, q=1.01, k=0.0, b=0.0)["loss"]).all()
    assert cmfast.Preconditioner(np.float32(0.5), 0).boundary == 0.0
    assert torch.equal(D(X, np.float32(2)), D(X, torch.tensor(2.0)))
    consistency(np.int64(18), indices=LABELS.to(torch.uint8))
