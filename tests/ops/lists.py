"""Calls of the operations on lists of tensors, on three paths: float64, eager in the dtypes under test, and fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cmfast
from cmfast import ops
from cmfast.tolerances import KERNEL_FLOOR
from tests.ops.matrix import close

#: Of parameters: biases and weights, one element, nothing, several blocks, sizes that are no multiple of 16.
SHAPES = [(192,), (3,), (33, 5), (8, 4, 3, 3), (0, 4), (2, 1100), (), (16,)]
#: Exact in every floating dtype; the last one needs float64.
RATES = [0.0, 0.5, 0.9999]


@dataclass
class Lists:
    """Tensors of one call by the operation's argument names, and its options."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[list[Tensor]]
    copies: list[Tensor] | None
    rates: Any
    step: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Any) -> Lists:
        """All lists through a function of a tensor."""
        lists = ([function(x) for x in group] for group in
                 (self.parameters, self.gradients, self.exp_avgs, self.exp_avg_sqs))  # fmt: skip
        averages = [[function(x) for x in group] for group in self.averages]
        copies = self.copies and [function(x) for x in self.copies]
        return Lists(*lists, averages, copies, self.rates, self.step.clone(), self.options)

    def written(self) -> dict[str, list[Tensor]]:
        """What a step changes, by name."""
        groups = {
            "parameters": self.parameters, "exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs,
            **{f"average {k}": group for k, group in enumerate(self.averages)},
        }  # fmt: skip
        return groups | ({"copies": self.copies} if self.copies else {})

    def update(self, backend: str) -> Lists:
        """`ema_update_` on this path; self is changed."""
        with cmfast.backend(backend):
            ops.ema_update_(self.parameters, self.averages, self.rates, copies=self.copies)
        return self

    def take(self, name: str, backend: str) -> Tensor:
        """A step of an optimizer on this path; self is changed."""
        lists = self.parameters, self.gradients, self.exp_avgs, self.exp_avg_sqs
        with cmfast.backend(backend):
            return getattr(ops, name)(*lists, self.step, self.averages, self.rates, copies=self.copies, **self.options)


def make(
    dtype: torch.dtype = torch.float32,
    *,
    averages: torch.dtype = torch.float32,
    copies: torch.dtype | None = torch.bfloat16,
    shapes: list[tuple[int, ...]] = SHAPES,
    rates: Any = RATES,
    step: int = 0,
    device: Any = "cpu",
    seed: int = 0,
    **options: Any,
) -> Lists:
    generator = torch.Generator().manual_seed(seed)

    def normal(dtype: torch.dtype = dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    parameters, gradients, moments, squares = (normal() for _ in range(4))
    others = [normal(averages) for _ in rates]
    return Lists(
        parameters, gradients, [m / 8 for m in moments], [v.square() for v in squares], others,
        None if copies is None else [torch.empty_like(p, dtype=copies) for p in parameters],
        torch.tensor(rates, dtype=torch.float64, device=device), torch.tensor(float(step), device=device), options,
    )  # fmt: skip


def last(x: Tensor) -> Tensor:
    """channels_last, where there are channels."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def shifted(x: Tensor) -> Tensor:
    """The same, and one element off from aligned memory."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return room.as_strided(x.shape, x.stride(), room.storage_offset()).copy_(x)


def gapped(x: Tensor) -> Tensor:
    """The same, and every second element of its memory."""
    return torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)[..., 0].copy_(x)


def turned(x: Tensor) -> Tensor:
    """The same, with its first two dimensions in another order of memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x


LAYOUTS = {"channels_last": last, "misaligned": shifted, "gaps": gapped, "transposed": turned}


def check(lists: Lists, backend: str, name: str | None = None) -> None:
    """A path against float64, within what eager PyTorch in the same dtypes does. name: of an optimizer."""
    exact, eager, fast = lists.map(Tensor.double), lists.map(torch.clone), lists.map(lambda x: x)
    for path, chosen in ((exact, "reference"), (eager, "reference"), (fast, backend)):
        if name is None:
            path.update(chosen)
        else:
            assert path.take(name, chosen).item() == 0
            assert path.step.item() == lists.step.item() + 1
    for (what, values), lows, highs in zip(
        fast.written().items(), eager.written().values(), exact.written().values(), strict=True
    ):
        for i, (value, low, high) in enumerate(zip(values, lows, highs, strict=True)):
            size = None
            if name is not None and what.startswith(("average", "copies")) and high.numel():
                # They are of the parameter as rounded by the step.
                floor = KERNEL_FLOOR[lists.parameters[i].dtype] / KERNEL_FLOOR[value.dtype]
                size = max(floor, 1) * high.abs().max().item()
            close(value, low, high, f"{what}[{i}]", size)
