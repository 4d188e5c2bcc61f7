"""A network of one's own, from training to images: any F(x, timesteps) that returns the shape of x.

    python examples/own_network.py [--steps 400] [--out runs/own_network]

The data are two plain colours, of which the network learns to make either, as a diffusion model; with other objectives
it is the same. Prints how far 16 images lie from the nearest of the two colours; 10 seconds on one core.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cmfast
from cmfast.data import ImageData
from cmfast.objectives import EDM
from cmfast.precondition import Preconditioner
from cmfast.training import Trainer, TrainOptions

COLOURS = torch.tensor([[0.8, -0.4, -0.4], [-0.4, -0.4, 0.8]])
SHAPE = (3, 8, 8)


class Network(nn.Module):
    """F(x, timesteps): x [B, 3, H, W], scaled; timesteps [B], c_noise of the noise level. With classes: a third, y."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.middle = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        angle = timesteps.to(x.dtype)[:, None] / 1000
        scale, shift = self.embed(torch.cat([angle.sin(), angle.cos()], dim=1))[..., None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        everywhere = h.mean((2, 3), keepdim=True).expand_as(h)  # all pixels are to be of one colour
        h = h + self.middle(nn.functional.silu(torch.cat([h, everywhere], dim=1)))
        out: Tensor = self.last(nn.functional.silu(h))
        return out


def denoiser() -> cmfast.Denoiser:
    return cmfast.Denoiser(Network(), Preconditioner.edm(), image_shape=SHAPE)


def distance(model: cmfast.Denoiser) -> float:
    """Root mean square distance of 16 images to the nearest colour."""
    sampler = cmfast.Sampler(model, batch_size=16, sampler="heun", steps=10)
    images = sampler.sample(16, seed=1) / 127.5 - 1  # [16, H, W, 3]
    return (images[:, None] - COLOURS[:, None, None]).square().mean((2, 3, 4)).amin(1).mean().sqrt().item()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of the training (default 400)")
    parser.add_argument("--out", default="runs/own_network", help="folder of the run (default runs/own_network)")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = denoiser()
    distances = [distance(model)]
    data = ImageData(COLOURS[torch.arange(64) % 2][..., None, None].expand(-1, *SHAPE).contiguous())
    options = TrainOptions(steps=given.steps, batch_size=32, learning_rate=3e-3, averages=("warmup:0.95",))
    Trainer(model, EDM(), data, options, given.out).run(progress=False)
    # The result holds the network's tensors by their names; what they belong to is for this file to say.
    trained = denoiser()
    trained.network.load_state_dict(load_file(Path(given.out) / "model.safetensors"))
    distances.append(distance(trained))
    print("distance to the nearest colour: {:.3f} before, {:.3f} after".format(*distances), f"{given.steps} steps")
    return distances


if __name__ == "__main__":
    main()
