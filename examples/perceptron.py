"""The network of the examples: a residual perceptron, with which a training takes seconds on one core."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """F(x, timesteps) or F(x, timesteps, labels), [B, C, H, W] to the same shape: blocks that see all of x at once."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        size = shape[0] * shape[1] * shape[2]
        #: Angles per unit of ln sigma.
        self.register_buffer("frequencies", torch.logspace(-1, 0.5, 16))
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.scales = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        angles = timesteps[:, None] / 250 * self.frequencies  # timesteps are 250 ln sigma
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        if self.classes is not None:
            embedding = embedding + self.classes(y)
        hidden = self.first(x.flatten(1))
        for block, scale in zip(self.blocks, self.scales):
            hidden = hidden + block(hidden + scale(embedding))
        return self.last(hidden).view_as(x)
