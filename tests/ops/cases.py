"""Every operation with inputs to call it on: one table for all the tests that hold for any operation.

A case makes its tensors for a shape, in float64, and calls the operation with them converted to the dtype under test.
Noise levels stay float32 (float64 for a float64 state), as in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmfast import ops

#: Layouts are those of the states; [B, C, H, W]. 63 elements, one, none, and a real training shape.
SHAPES = [(2, 3, 7, 3), (1, 1, 1, 1), (0, 3, 8, 8), (3, 4, 16, 16)]
SCALING = {"sigma_data": 0.5, "boundary": 0.002}


@dataclass(frozen=True)
class Case:
    """`call(states, sigmas)` -> the tensors the operation returns; `states` and `sigmas` by name."""

    call: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor | tuple[Tensor, ...]]
    states: tuple[str, ...]
    sigmas: tuple[str, ...] = ("sigma",)
    no_grad_to: tuple[str, ...] = field(default=())


def inputs(case: Case, shape: tuple[int, ...], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """float64 states ~ N(0, 1) and noise levels that fall from one name to the next, per sample."""
    generator = torch.Generator().manual_seed(seed)
    states = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in case.states}
    start = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 3 + 0.5
    sigmas = {name: start * 0.6**i for i, name in enumerate(case.sigmas)}
    return states, sigmas


def flat(result: object) -> list[Tensor]:
    """The tensors of a result, however nested."""
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


CASES = {
    "scale_input": Case(lambda s, v: ops.scale_input(s["x"], v["sigma"]), ("x",)),
    "denoise": Case(lambda s, v: ops.denoise(s["f"], s["x"], v["sigma"]), ("f", "x")),
    "denoise clipped": Case(lambda s, v: ops.denoise(s["f"], s["x"], v["sigma"], clip=True), ("f", "x")),
    "denoise edm": Case(lambda s, v: ops.denoise(s["f"], s["x"], v["sigma"], boundary=0.0), ("f", "x")),
    "denoise plain": Case(
        lambda s, v: ops.denoise(s["f"], s["x"], v["sigma"], sigma_data=None), ("f", "x"), no_grad_to=("x", "sigma")
    ),
    "init_noise": Case(lambda s, v: ops.init_noise(s["noise"], v["sigma"]), ("noise",)),
    "add_noise": Case(lambda s, v: ops.add_noise(s["x"], s["noise"], v["sigma"]), ("x", "noise")),
    "add_noise churn": Case(
        lambda s, v: ops.add_noise(s["x"], s["noise"], v["sigma"], input_sigma=v["level"]),
        ("x", "noise"),
        ("sigma", "level"),
    ),
    "add_noise_pair": Case(
        lambda s, v: ops.add_noise_pair(s["x"], s["noise"], v["sigma"], v["next"]), ("x", "noise"), ("sigma", "next")
    ),
    "renoise": Case(
        lambda s, v: ops.renoise(s["f"], s["x"], v["sigma"], v["next"], s["noise"]),
        ("f", "x", "noise"),
        ("sigma", "next"),
    ),
    "euler_step": Case(
        lambda s, v: ops.euler_step(s["f"], s["x"], v["sigma"], v["next"]), ("f", "x"), ("sigma", "next")
    ),
    "heun_predictor": Case(
        lambda s, v: ops.heun_predictor(s["f"], s["x"], v["sigma"], v["next"]), ("f", "x"), ("sigma", "next")
    ),
    "heun_corrector": Case(
        lambda s, v: ops.heun_corrector(s["f"], s["f2"], s["x"], v["sigma"], v["next"]),
        ("f", "f2", "x"),
        ("sigma", "next"),
    ),
    "midpoint_corrector": Case(
        lambda s, v: ops.midpoint_corrector(s["f"], s["f2"], s["x"], v["sigma"], v["mid"], v["next"]),
        ("f", "f2", "x"),
        ("sigma", "mid", "next"),
    ),
    **{
        f"weighted_loss {norm}": Case(
            lambda s, v, norm=norm: ops.weighted_loss(s["x"], s["y"], v["weight"], norm=norm, huber_c=0.03),
            ("x", "y"),
            ("weight",),
        )
        for norm in ("l1", "l2", "huber")
    },
    "consistency_loss": Case(
        lambda s, v: ops.consistency_loss(s["f"], s["x"], v["sigma"], s["y"], v["weight"], norm="huber", huber_c=0.03),
        ("f", "x", "y"),
        ("sigma", "weight"),
    ),
}
