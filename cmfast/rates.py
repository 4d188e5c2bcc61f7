"""How fast an average of weights forgets: the rate of each update, computed on the device from its number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Rate:
    """The rate of update number t, the first of which is 1: average <- rate average + (1 - rate) parameter."""

    #: The rate, where it is the same for all updates.
    constant: float | None = None

    def __call__(self, step: Tensor) -> Tensor:
        """The rate of update `step`, an integer scalar on the device: float64, there."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Rate):
    """The same rate at every update. Raises: ValueError: not from 0 to 1.

    >>> str(Constant(0.9999))
    '0.9999'
    """

    rate: float

    def __post_init__(self) -> None:
        _part(self.rate)

    @property
    def constant(self) -> float:  # type: ignore[override]  # read alone
        """The rate."""
        return self.rate

    def __call__(self, step: Tensor) -> Tensor:
        return torch.full((), self.rate, dtype=torch.float64, device=step.device)

    def __str__(self) -> str:
        return f"{self.rate:.12g}"


@dataclass(frozen=True)
class HalfLife(Rate):
    """0.5^(batch / halflife): what is `halflife` images ago weighs half. Karras et al. 2022, appendix F.

    halflife   in images; in steps where `batch`, the images of a step, is 1
    rampup     the half-life is at most this part of the images seen before; 0.05 there

    Raises: ValueError: one that is not positive.

    >>> HalfLife(500)(torch.tensor(1)) ** 500
    tensor(0.5000, dtype=torch.float64)
    """

    halflife: float
    batch: int = 1
    rampup: float | None = None

    def __post_init__(self) -> None:
        if not (self.halflife > 0 and self.batch > 0 and (self.rampup is None or self.rampup > 0)):
            raise ValueError(f"halflife, batch and rampup must be positive, got {self}")

    @property
    def constant(self) -> float | None:  # type: ignore[override]  # read alone
        """The rate, where it does not ramp up."""
        return 0.5 ** (self.batch / self.halflife) if self.rampup is None else None

    def __call__(self, step: Tensor) -> Tensor:
        halflife = torch.full((), self.halflife, dtype=torch.float64, device=step.device)
        if self.rampup is not None:
            halflife = torch.minimum(halflife, (step - 1).double() * (self.batch * self.rampup))
        # No images seen: 0.5^inf, which forgets the start.
        return 0.5 ** (self.batch / halflife)

    def __str__(self) -> str:
        batch = f",batch={self.batch}" if self.batch != 1 else ""
        rampup = f",rampup={self.rampup:.12g}" if self.rampup is not None else ""
        return f"halflife:{self.halflife:.12g}{batch}{rampup}"


@dataclass(frozen=True)
class PowerFunction(Rate):
    """(1 - 1/t)^(gamma + 1), whose memory grows with training. Karras et al. 2023 (EDM2), eq. 121 and 127.

    std is the width of what is remembered, as a part of the training so far: give it (0.05, 0.1), or gamma (16.97,
    6.94).

    Raises: ValueError: both or neither of them, or one out of range.

    >>> round(PowerFunction(std=0.1).gamma, 2), round(PowerFunction(gamma=16.97).std, 4)
    (6.94, 0.05)
    """

    std: float = None  # type: ignore[assignment]  # set below
    gamma: float = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if (self.std is None) == (self.gamma is None):
            raise ValueError("give std or gamma, one of them")
        if self.gamma is None:
            object.__setattr__(self, "gamma", _gamma_of(self.std))
        elif not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        else:
            object.__setattr__(self, "std", _std_of(self.gamma))

    def __call__(self, step: Tensor) -> Tensor:
        return (1 - 1 / step.double()) ** (self.gamma + 1)

    def __str__(self) -> str:
        return f"power:{self.std:.12g}"


@dataclass(frozen=True)
class WarmUp(Rate):
    """Another rate, and at most (n + 1) / (n + 10) after n updates: a short memory while there is little to remember.

    >>> WarmUp(Constant(0.9999))(torch.tensor(1))
    tensor(0.1000, dtype=torch.float64)
    """

    rate: Rate

    def __call__(self, step: Tensor) -> Tensor:
        t = step.double()
        return torch.minimum(self.rate(step), t / (t + 9))

    def __str__(self) -> str:
        return f"warmup:{self.rate}"


@dataclass
class Given(Rate):
    """Set from outside, as mu(N(k)) of a curriculum: `rate.set_(value)`, a number or a scalar on the device. start: the
    first.

    Raises: ValueError: a number that is not from 0 to 1.

    >>> rate = Given(0.9)
    >>> rate.set_(0.95)
    >>> rate(torch.tensor(1))
    tensor(0.9500, dtype=torch.float64)
    """

    start: float
    value: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.value = torch.tensor(_part(self.start), dtype=torch.float64)

    def set_(self, rate: float | Tensor) -> None:
        """The rate of the updates that follow: a number from 0 to 1, or a scalar. Neither kind waits for the device."""
        if isinstance(rate, Tensor):
            self.value.copy_(rate)
        else:
            self.value.fill_(_part(rate))

    def __call__(self, step: Tensor) -> Tensor:
        return self.value

    def __str__(self) -> str:
        return f"given:{self.start:.12g}"


def parse_rate(rate: Rate | float | str) -> Rate:
    """A rate from a number, from its text, or itself.

    >>> parse_rate("halflife:500000,batch=64,rampup=0.05")
    HalfLife(halflife=500000.0, batch=64, rampup=0.05)
    >>> [str(parse_rate(text)) for text in ("0.9999", "power:0.05", "warmup:0.999", "given:0.95")]
    ['0.9999', 'power:0.05', 'warmup:0.999', 'given:0.95']

    Raises: ValueError: a text that is none; the message lists the kinds.
    """
    if isinstance(rate, Rate):
        return rate
    kind, _, rest = str(rate).partition(":")
    try:
        if not rest:
            return Constant(float(kind))
        if kind == "warmup":
            return WarmUp(parse_rate(rest))
        first, *options = rest.split(",")
        if kind == "halflife":
            named = dict(option.split("=") for option in options)
            batch, rampup = int(named.pop("batch", 1)), named.pop("rampup", None)
            if not named:
                return HalfLife(float(first), batch, None if rampup is None else float(rampup))
        elif kind in ("power", "given") and not options:
            return PowerFunction(std=float(first)) if kind == "power" else Given(float(first))
    except ValueError as error:
        raise ValueError(f"rate {str(rate)!r}: {error}; {_KINDS}") from None
    raise ValueError(f"unknown rate {str(rate)!r}; {_KINDS}")


_KINDS = "known: 0.9999, halflife:IMAGES[,batch=N][,rampup=PART], power:STD, warmup:RATE, given:START"


def _part(rate: float) -> float:
    """Raises: ValueError: it is not from 0 to 1, and an average would leave the range of what it is of."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate must be from 0 to 1, got {rate}")
    return rate


def _std_of(gamma: float) -> float:
    """sigma_rel of Karras et al. 2023, eq. 123."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _gamma_of(std: float) -> float:
    """Its inverse; std falls as gamma grows.

    Raises: ValueError: no gamma has this std.
    """
    if not 0 < std < _std_of(0):
        raise ValueError(f"std must be above 0 and below {_std_of(0):.4f}, got {std}")
    low, high = 0.0, 1 / std
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _std_of(middle) > std else (low, middle)
    return (low + high) / 2
