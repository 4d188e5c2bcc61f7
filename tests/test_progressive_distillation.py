"""Progressive distillation: its stages, and that it distils."""

import copy

import pytest
import torch
from torch import nn

from cmfast import ops, schedules
from cmfast.objectives import ProgressiveDistillation


@pytest.mark.parametrize("start, steps", [(16, 100), (4096, 7), (40, 100), (2, 50), (3, 10)], ids=str)
def test_halving_stages(start, steps):
    """The original's schedule; a stage is as long as it says, and the last ones are twice as long."""
    objective = ProgressiveDistillation(start_scales=start, steps_per_stage=steps)
    schedule = schedules.ema_and_scales("fixed", 0.0, "progdist", start, start, 10**6, steps)
    before = None
    for step in range(20 * steps):
        stage = objective.stage(step)
        assert stage.num_scales == schedule(step)[1] and stage.target_rate is None
        if before is None or stage.num_scales != before.num_scales:
            assert stage.first_step == step and stage.number == (0 if before is None else before.number + 1)
            assert before is None or step == before.first_step + before.steps
        else:
            assert stage == before
        before = stage
    assert before.steps is None and before.num_scales == 1
    if start == 16:
        lengths = [objective.stage(step).steps for step in (0, 100, 200, 300, 500)]
        assert lengths == [100, 100, 100, 200, None]


class Euler(nn.Module):
    """D of the levels of a grid: a table of its own for each, so that a student can learn exactly what it is shown."""

    def __init__(self, intervals):
        super().__init__()
        self.ends = schedules.karras_sigmas(intervals + 1, append_zero=False, dtype=torch.float64)
        self.scale = nn.Parameter(torch.full((intervals + 1,), 0.3, dtype=torch.float64))

    def forward(self, x, sigma):
        level = (sigma.double()[:, None] - self.ends).abs().argmin(1)
        return self.scale[level].view(-1, 1, 1, 1) * x


def euler(model, x, sigmas):
    """Steps along levels."""
    for sigma, following in zip(sigmas, sigmas[1:]):
        denoised = model(x, torch.full((x.shape[0],), float(sigma)))
        x = x + (x - denoised) / float(sigma) * float(following - sigma)
    return x


def test_progressive_distillation_distils():
    """Over three stages, each student learns two steps of the student before: its teacher, as at each new stage the
    student becomes that. After all of them, one step goes where eight of the first teacher did."""
    torch.manual_seed(0)
    objective = ProgressiveDistillation(loss_norm="l2", start_scales=8, steps_per_stage=60)
    finest = schedules.karras_sigmas(17, append_zero=False, dtype=torch.float64)
    first = Euler(16)
    with torch.no_grad():
        first.scale.copy_(0.9 * torch.rand(17, dtype=torch.float64))
    teacher, student = copy.deepcopy(first), copy.deepcopy(first)
    x = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    learned, before = [], objective.stage(0)
    for step in range(180):
        stage = objective.stage(step)
        if stage.number != before.number:
            learned.append((student, before.num_scales))
            teacher = copy.deepcopy(student)
        before = stage
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        draw = ops.Draw(0, torch.arange(64) + 64 * step)
        # Newton's step, for the loss is quadratic in each level's scale and D is linear in it.
        terms = objective.loss(student, x, stage=stage, draw=draw, teacher_model=teacher)["loss"]
        (slope,) = torch.autograd.grad(terms.sum(), student.scale, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), student.scale)
        student.scale.grad = torch.where(curvature > 0, slope.detach() / curvature.clamp(min=1e-30), 0.0)
        optimizer.step()
        if step in (59, 119, 179):
            stride = 16 // stage.num_scales
            for i in range(stage.num_scales):
                ends = finest[i * stride], finest[i * stride + stride // 2], finest[(i + 1) * stride]
                torch.testing.assert_close(euler(student, x, ends[::2]), euler(teacher, x, ends), rtol=1e-6, atol=1e-6)
    assert [n for _, n in learned] == [8, 4] and before.num_scales == 2
    torch.testing.assert_close(euler(student, x, finest[::8]), euler(first, x, finest), rtol=1e-5, atol=1e-5)
