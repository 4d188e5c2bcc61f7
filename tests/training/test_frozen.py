"""Teacher and target as CUDA graphs, emulated on the CPU: the same weights, whatever is captured."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from cmfast import Denoiser, backend, dropout
from cmfast.objectives import ConsistencyDistillation
from cmfast.ops import Draw
from cmfast.training import TrainStep
from cmfast.training.frozen import Frozen, frozen
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.training.toys import DATA, OPTIONS, denoiser, teacher, unet, weights

CD = ConsistencyDistillation(loss_norm="l2", start_scales=6)


def run(steps=4, **options):
    step = TrainStep(denoiser(CD, unet(dropout=0.2)), CD, replace(OPTIONS, **options), teacher_model=teacher(CD))
    stream = DATA.batches(6, seed=0)
    for number in range(steps):
        step(next(stream), number)
    return step


@pytest.mark.parametrize("optimize", [True, False])
def test_a_run_with_graphs_is_one_without(emulated, optimize):
    """Over steps with other weights in the target, other noise, other dropout masks, and a last microbatch of 2."""
    with backend("reference"):
        plain = run(graphs=False, optimize=optimize, microbatch=4)
        graphed = run(graphs=True, optimize=optimize, microbatch=4)
    networks = [graphed._target.network, graphed._teacher.network]
    assert all(isinstance(network, Frozen) and network.refusal is None for network in networks)
    assert all(2 <= len(network._programs) <= 4 for network in networks)  # two sizes, in two layouts
    assert torch.equal(weights(graphed.model), weights(plain.model))
    assert torch.equal(weights(graphed.target_model), weights(plain.target_model))


def test_an_output_stays_as_it_is(emulated):
    """Two of a teacher make one step of Heun's method."""
    network = frozen(denoiser(CD, unet().eval())).network
    x, times, labels = torch.randn(3, 3, 8, 8), torch.ones(3), torch.arange(3)
    with backend("reference"):
        network(x, times, labels)
        first = network(x, times, labels)
        before = first.clone()
        assert not torch.equal(network(-x, times, labels), before) and torch.equal(first, before)
    assert len(network._programs) == 1


def test_masks_follow_the_draw(emulated):
    network = frozen(denoiser(CD, unet(dropout=0.5).train()))
    x, sigma, labels = torch.randn(3, 3, 8, 8), torch.ones(3), torch.arange(3)
    draws = [Draw(5, torch.arange(3) + start, 0) for start in (0, 3, 0)]
    outputs = []
    for draw in draws:
        with dropout.paired(draw), torch.no_grad(), backend("reference"):
            outputs.append(network(x, sigma, labels))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_a_foreign_networks_dropout_is_not_captured(emulated):
    network = frozen(Denoiser(nn.ModuleList([nn.Dropout(0.5)])))
    network.network.network.forward = lambda x, t: nn.functional.dropout(x, 0.5)
    x = torch.ones(2, 3, 8, 8)
    for draw in (nullcontext(), dropout.paired(Draw(5, torch.arange(2), 0))):
        with draw:
            assert not torch.equal(network(x, 1.0), network(x, 1.0)) and len(network.network._programs) == 0


def test_dropout_without_a_draw_is_not_captured(emulated):
    """torch's generator decides: a program would drop the same again."""
    network = frozen(denoiser(CD, unet(dropout=0.5).train()))
    x, sigma, labels = torch.randn(3, 3, 8, 8), torch.ones(3), torch.arange(3)
    with backend("reference"):
        assert not torch.equal(network(x, sigma, labels), network(x, sigma, labels))
    assert len(network.network._programs) == 0


def test_what_breaks_the_capture_is_called_as_it_is(emulated):
    class Looks(nn.Module):
        def forward(self, x, t):
            return x * (2 if x.sum().item() > 0 else 3)

    network = frozen(Denoiser(Looks()))
    x = torch.ones(2, 3, 8, 8)
    for _ in range(2):  # the second time without a try
        assert torch.equal(network(x, 1.0), Denoiser(Looks())(x, 1.0))
        assert "Looks" in network.network.refusal
