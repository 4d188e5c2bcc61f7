"""A distillation in a loop of one's own, from operations: no loss of the library, no Denoiser, no TrainStep.

    python examples/own_loop.py [--steps 60]

The data are two plain colours, so that the best denoiser is known, and serves as the teacher. Each operation is one
kernel on a GPU. Prints the root mean square error of the student's D against the exact map; 10 seconds on one core.
"""

import argparse
import copy

import torch

import cmfast
from cmfast import curricula, ema, exact, ops, optim


@torch.no_grad()
def error(network: torch.nn.Module, teacher: exact.MixtureDenoiser, sigma: float = 2.0) -> float:
    x = teacher.means + sigma * torch.randn(teacher.means.shape, generator=torch.Generator().manual_seed(1))
    model_output = network(*ops.scale_input(x, torch.tensor(sigma)))
    denoised = ops.denoise(model_output, x, torch.tensor(sigma))  # D(x, 0.002) = x, if boundary= does not say otherwise
    return (denoised - exact.solved_map(teacher, x, sigma, 0.002, steps=32)).square().mean().sqrt().item()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the training (default 60)")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    teacher = exact.MixtureDenoiser((torch.rand(2, 3, 1, 1) * 2 - 1).repeat(1, 1, 8, 8))  # D(x, sigma), in closed form
    student = cmfast.UNetModel(8, 3, 32, 3, 1, attention_resolutions=(), channel_mult=(1, 2), num_head_channels=32)
    target = copy.deepcopy(student).requires_grad_(False)
    averages = ema.Averages(student, [0.5, 0.8], targets={0: target})
    optimizer = optim.RAdam(student.parameters(), lr=6e-3, betas=(0.9, 0.95), max_norm=1.0, averages=averages)
    errors, grid = [error(student, teacher)], curricula.karras_grid(5)
    solver = {"sigma_data": None, "boundary": 0.0}  # of a teacher that is itself the denoiser
    for step in range(steps):
        index = torch.arange(32 * step, 32 * step + 32)  # of the run's samples: what their noise is drawn from
        # Levels, noise, the noisy batch and the network's input, in one launch; then a step of the teacher, by Heun.
        drawn = ops.draw_pair(teacher.means[index % 2], ops.Draw(0, index, 0), grid, pair=False)
        (x_t, *model_input), sigma, next_sigma = drawn.first, drawn.sigma, drawn.next_sigma
        denoised = teacher(x_t, sigma)
        middle = ops.heun_predictor(denoised, x_t, sigma, next_sigma, **solver)
        x_t2, *_ = ops.heun_corrector(denoised, teacher(*middle), x_t, sigma, next_sigma, **solver)
        target_output = target(*ops.scale_input(x_t2, next_sigma))
        # D is computed from F in the loss, and stored nowhere: neither the student's nor the target's.
        loss = ops.consistency_loss(student(*model_input), x_t, sigma, target_output, "uniform", x_t2, next_sigma)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    errors.append(error(averages.module(1), teacher))
    print(f"error at sigma = 2: {errors[0]:.3f} before, {errors[1]:.3f} after {steps} steps")
    return errors


if __name__ == "__main__":
    main()
