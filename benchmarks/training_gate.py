"""Right before fast: what a few training steps of a provider come to, beside plain PyTorch in higher precision."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmfast.benchmarks.training_providers import Plain
from cmfast.benchmarks.training_start import Provider, Start, State
from cmfast.tolerances import TRAINED, TRAINED_FLOOR

STEPS = 3
#: Images at a time of the yardstick, by device.
MICROBATCH = {"cuda": 16, "cpu": 4}
#: Errors are parts of a tensor's largest change, or of this share of the largest change of all tensors: of gradients
#: that are small beside others, half precision leaves nothing.
SHARE = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
#: What rounding a float32 weight at every step may make, as a part of it: no error.
ROUNDING = STEPS * torch.finfo(torch.float32).eps
#: By what is compared: the first loss, and how student, target and averages have changed.
Errors = dict[str, float]


class Gate:
    """The yardstick of a trial: STEPS steps from its start with its draws, in float64 on a CPU, in float32 on a GPU.

    Looked at are the first loss, and the changes of student, target and averages, each tensor for itself. Plain PyTorch
    is within `TRAINED` of the yardstick, others within twice plain PyTorch's error in the same dtype and a floor.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        cpu = start.device.type == "cpu"
        exact = Plain(start, dtype=torch.float64 if cpu else torch.float32, microbatch=MICROBATCH[start.device.type])
        # Matrices in TF32 would be no yardstick for bfloat16 ones.
        precise = nullcontext() if cpu else torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        # Attention as matrix products, which the counter knows on every device.
        with precise, sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                exact.step(0, start.drawn(0))
            self._loss = exact.loss()
            self._exact = _finish(exact, start)
        #: Of one step of plain PyTorch, convolutions and matrix products alone.
        self.flops = counter.get_total_flops()
        self._plain: dict[torch.dtype, Errors] = {}

    def wrong(self, provider: Provider, first_loss: float) -> str | None:
        """What is off with a provider that has taken its first step with `Start.drawn`; it takes the others."""
        dtype = provider.dtype
        errors = self._errors(dtype, first_loss, _finish(provider, self.start))
        plain = self._plain_errors(dtype)
        for what, error in plain.items():
            if not error <= TRAINED[dtype]:
                return f"plain PyTorch in {dtype}: {what} is off by {error:.3g}, allowed {TRAINED[dtype]:.3g}"
        for what, error in errors.items():
            allowed = 2 * plain[what] + TRAINED_FLOOR[dtype]
            if not error <= allowed:
                return f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
        return None

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:
        """Take plain PyTorch's steps in these dtypes before there are providers: beside all of a trial, a small GPU has
        no memory for another."""
        for dtype in dtypes:
            with suppress(torch.OutOfMemoryError):  # Said of the providers in that dtype, by `wrong`.
                self._plain_errors(dtype)

    def _plain_errors(self, dtype: torch.dtype) -> Errors:
        if dtype not in self._plain:
            provider = Plain(self.start, dtype=dtype)
            provider.step(0, self.start.drawn(0))
            loss = provider.loss()
            self._plain[dtype] = self._errors(dtype, loss, _finish(provider, self.start))
        return self._plain[dtype]

    def _errors(self, dtype: torch.dtype, loss: float, state: State) -> Errors:
        found = {"loss": _not_nan(torch.tensor(loss - self._loss)).item() / abs(self._loss)}
        if state.keys() != self._exact.keys():
            raise ValueError(f"a state of {', '.join(state)}, not of {', '.join(self._exact)}")
        for name, tensors in state.items():
            begin = self.start.weights["target" if name == "target" else "student"].parameters()
            changes, errors = [], []
            for tensor, exact, first in zip(tensors, self._exact[name], begin, strict=True):
                changes.append((exact - first).abs().max())
                errors.append((_not_nan(tensor - exact) - ROUNDING * exact.abs()).clamp(min=0).max())
            least = SHARE[dtype] * max(changes)
            found[name] = max((error / change.clamp(min=least)).item() for error, change in zip(errors, changes))
        return found


def _finish(provider: Provider, start: Start) -> State:
    """The steps after the first."""
    for number in range(1, STEPS):
        provider.step(number, start.drawn(number))
    return provider.state()


def _not_nan(difference: Tensor) -> Tensor:
    return difference.abs().nan_to_num(nan=float("inf"))
