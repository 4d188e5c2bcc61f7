"""Small networks of every kind, their inputs, what they make of them, and how far from float64 it may be."""

from __future__ import annotations

import torch

from cmfast.fast import doubling
from cmfast.native import winograd

CONFIGS = {
    "published": {"num_classes": 5},
    "added": {"use_scale_shift_norm": False},
    "resampling": {"resblock_updown": False},
    "pooling": {"resblock_updown": False, "conv_resample": False, "use_scale_shift_norm": False},
    "checkpointed": {"use_checkpoint": True},
    "wide": {"model_channels": 64, "num_classes": 5, "channel_mult": [1, 1.5]},
    "heads": {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
}


def count_small_networks(monkeypatch) -> None:
    """Have them computed as those are for which it pays."""
    monkeypatch.setattr(winograd, "LEAST_TILES", 0)
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 0)
    monkeypatch.setattr(doubling, "LEAST_PIXELS", 1)


def inputs(model, batch: int = 3, size: int = 8, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    y = () if model.num_classes is None else (torch.arange(batch) % model.num_classes,)
    return x, torch.linspace(-1500, 1090, batch), *y


def run(model, args, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of every parameter and of x."""
    x = args[0].detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, *args[1:])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def last(args) -> tuple[torch.Tensor, ...]:
    """The same inputs, x in channels_last: the ordinary network computes in its layout, and rounds otherwise."""
    return args[0].to(memory_format=torch.channels_last), *args[1:]


def check(value, eager, exact, floor, scale, what="") -> None:
    """`eager`: what eager PyTorch makes in the same dtype, in one layout or in several."""
    every = eager if isinstance(eager, tuple) else (eager,)
    error = (value.double() - exact).abs().max().item()
    allowed = max((v.double() - exact).abs().max().item() for v in every)
    assert error <= 2 * allowed + floor * scale, f"{what}: {error:.3g}, eager {allowed:.3g}, of {scale:.3g}"
