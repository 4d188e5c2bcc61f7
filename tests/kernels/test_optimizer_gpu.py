"""What only a GPU shows of the optimizers: steps captured in a graph, and that nothing waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cmfast
from cmfast import optim
from cmfast.ema import Averages
from cmfast.ops import _dispatch

pytestmark = [
    pytest.mark.skipif(_dispatch.INTERPRETING, reason="needs a GPU: the interpreter has no streams or graphs"),
    pytest.mark.unguarded,
]


def training(device, lr):
    """A model, its averages and optimizer, and a step of training on inputs that lie in one place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 19, 3), nn.SiLU(), nn.Conv2d(19, 5, 3))
    model = model.to(device, memory_format=torch.channels_last)
    averages = Averages(model, [0.9, "power:0.1"])
    optimizer = optim.RAdam(model.parameters(), lr=lr, max_norm=1.0, averages=averages)
    x = torch.randn(4, 3, 16, 16, device=device)

    def step():
        # New memory at every step, unless a graph has it.
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return model, averages, optimizer, x, step


def test_steps_in_a_graph(device):
    """A whole step is captured; replays read the step count, rates and learning rate of the moment."""
    lr, other_lr = (torch.tensor(0.01, device=device) for _ in range(2))
    model, averages, optimizer, x, step = training(device, lr)
    twin, twin_averages, twin_optimizer, twin_x, twin_step = training(device, other_lr)
    # What adds up gradients in any order would make the two differ.
    with cmfast.backend("triton"), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
        for i in range(8):
            for inputs, rate in ((x, lr), (twin_x, other_lr)):
                torch.manual_seed(i)
                inputs.copy_(torch.randn(x.shape))
                rate.mul_(0.9)
            if i == 0:
                # What the graph's model did while it warmed up.
                twin.load_state_dict(model.state_dict())
                twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                twin_optimizer.param_groups[0]["lr"] = other_lr
                twin_averages.load_state_dict(copy.deepcopy(averages.state_dict()))
            graph.replay()
            twin_step()
    assert averages.step.item() == twin_averages.step.item() == 11
    pairs = [(model.parameters(), twin.parameters())]
    pairs += [(averages.tensors(k), twin_averages.tensors(k)) for k in (0, 1)]
    for values, expected in pairs:
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


def test_nothing_waits_for_the_device(device):
    """Neither a step whose gradients lie elsewhere, nor GradScaler's."""
    model, _, optimizer, x, step = training(device, 0.01)
    scaler = torch.amp.GradScaler("cuda")
    with cmfast.backend("triton"):
        for _ in range(2):
            step()
        scaler.scale(torch.ones((), device=device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
