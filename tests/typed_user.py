"""A user's program, for type checkers alone: `make lint` checks it with the rest, nothing runs it.

What is right must pass. Each wrong call is silenced by its error's code, and a checker that is strict says so where a
silence is not needed: a type that becomes too wide is found here. tests/test_wheel.py checks it against an installed
package, with the silences taken out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cmfast
from cmfast import ema, losses, objectives, ops, optim, perceptual, samplers
from cmfast.data import open_data
from cmfast.training import Trainer, TrainOptions, TrainStep


def images(path: str, count: int) -> Tensor:
    model: cmfast.Denoiser = cmfast.load(path, device="cpu", dtype=torch.bfloat16)
    sampler = cmfast.Sampler(cmfast.optimize(model), batch_size=64, steps=2, compile=True)
    levels: list[float] = sampler.sigmas
    assert levels
    for batch, labels in sampler.stream(count, seed=1):
        print(batch.shape, None if labels is None else labels.shape)
    return sampler.sample(count, seed=0, classes=[1] * count)


def one_step(network: nn.Module, x_start: Tensor) -> tuple[Tensor, Tensor]:
    sigma = torch.tensor(1.0)
    noise = ops.Draw(0, torch.arange(len(x_start)))
    x_t, model_input, c_noise = ops.add_noise(x_start, noise, sigma)
    denoised: Tensor = ops.denoise(network(model_input, c_noise), x_t, sigma, clip=True)
    with cmfast.backend("reference"):
        return denoised, ops.to_uint8(denoised, rounding="nearest")


def own_loop(model: cmfast.Denoiser, target: cmfast.Denoiser, x_start: Tensor) -> dict[str, Tensor]:
    averages = ema.Averages(model, [0.999, "power:0.05"], targets={0: target})
    optimizer = optim.RAdam(model.parameters(), lr=1e-4, max_norm=1.0, averages=averages)
    lpips = perceptual.LPIPS(pretrained=False)
    terms = losses.consistency_loss(model, target, x_start, 40, loss_norm="lpips", lpips=lpips)
    optimizer.step()
    cmfast.save(model, "model.safetensors", dtype=torch.float16)
    return terms


def trained(model: cmfast.Denoiser, teacher: cmfast.Denoiser) -> cmfast.Denoiser:
    options = TrainOptions(steps=10, batch_size=4, learning_rate=1e-4)
    objective = objectives.ConsistencyDistillation(loss_norm="l2")
    TrainStep(model, objective, options, teacher_model=teacher)
    return Trainer(model, objective, open_data("mnist"), options, "runs/x", teacher_model=teacher).run()


def by_hand(model: cmfast.Denoiser, network: cmfast.UNetModel) -> Tensor:
    preconditioner = cmfast.Preconditioner.edm()
    wrapped = cmfast.Denoiser(network, preconditioner, sigma_max=70.0)
    function = samplers.sample(lambda x, sigma: 0.1 * x, torch.randn(1, 3, 8, 8), sampler="heun")
    return samplers.sample(wrapped, function, pixels="trunc") + model(function, 1.0)


def wrong(model: cmfast.Denoiser, x: Tensor) -> None:
    cmfast.Sampler("model.pt")  # type: ignore[arg-type]  # wrong on purpose, as are those below
    cmfast.Sampler(model, steps="two")  # type: ignore[arg-type]  # wrong
    cmfast.Sampler(model, batch_size=None)  # type: ignore[arg-type]  # wrong
    cmfast.load("model.pt", device=0)  # type: ignore[arg-type]  # wrong
    cmfast.save(nn.Linear(1, 1), "x")  # type: ignore[arg-type]  # wrong
    cmfast.sampel  # type: ignore[attr-defined]  # noqa: B018  # wrong
    cmfast.compat.difusers  # type: ignore[attr-defined]  # noqa: B018  # wrong
    ops.denoise(x, x, 1.0)  # type: ignore[arg-type]  # wrong
    ops.denoise(x, x)  # type: ignore[call-arg]  # wrong
    ops.to_uint8(x, roundin="trunc")  # type: ignore[call-arg]  # wrong
    number: int = ops.normal(0, torch.arange(1), (1,))  # type: ignore[assignment]  # wrong
    samplers.sample(model, None)  # type: ignore[arg-type]  # wrong
    losses.consistency_loss(model, model, x, "40")  # type: ignore[arg-type]  # wrong
    TrainOptions(steps=1)  # type: ignore[call-arg]  # wrong
    print(number)
