"""One preconditioner for consistency models and EDM: the same family with another boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cmfast import ops
from cmfast.ops import _check

#: Names accepted where a preconditioning is chosen by a string.
PRECONDITIONINGS = ("consistency", "edm")


@dataclass(frozen=True)
class Preconditioner:
    """c_skip, c_out, c_in and c_noise around a network (Karras et al. 2022, table 1; Song et al. 2023, appendix C).

    A subclass may have other `scalings` and `c_noise`, plain numbers included. They are called for, and D is plain
    PyTorch.

    Args:
        sigma_data: standard deviation of the data, in data units.
        boundary: the noise level at which D is the identity: sigma_min for a consistency model, 0 for EDM.

    Raises:
        ValueError: sigma_data not positive, or boundary negative. TypeError: one that is no number.

    >>> Preconditioner().name, Preconditioner.edm().name
    ('consistency', 'edm')
    """

    sigma_data: float = 0.5
    boundary: float = 0.002

    def __post_init__(self) -> None:
        for name in ("sigma_data", "boundary"):
            _check.real(name, getattr(self, name))
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")
        if not (math.isfinite(self.boundary) and self.boundary >= 0):
            raise ValueError(f"boundary must be a noise level of 0 or more, got {self.boundary}")
        for name in ("sigma_data", "boundary"):
            object.__setattr__(self, name, float(getattr(self, name)))  # of NumPy's numbers, what a file can hold

    @classmethod
    def consistency(cls, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Preconditioner:
        """The identity at sigma_min: a consistency model. sigma_data: standard deviation of the data."""
        return cls(sigma_data, sigma_min)

    @classmethod
    def edm(cls, sigma_data: float = 0.5) -> Preconditioner:
        """The identity at 0: a diffusion model, such as a teacher. sigma_data: standard deviation of the data."""
        return cls(sigma_data, 0.0)

    @classmethod
    def by_name(cls, name: str, *, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Preconditioner:
        """`consistency` or `edm` by its name; sigma_min is for the first.

        Raises: ValueError: another name; the message lists the known ones.
        """
        if name == "consistency":
            return cls.consistency(sigma_data, sigma_min)
        if name == "edm":
            return cls.edm(sigma_data)
        raise ValueError(f"unknown preconditioning {name!r}; known: {', '.join(PRECONDITIONINGS)}")

    @property
    def name(self) -> str:
        """`"edm"` with boundary 0, else `"consistency"`."""
        return "consistency" if self.boundary else "edm"

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in; shape of `sigma`."""
        return ops.scalings(sigma, sigma_data=self.sigma_data, boundary=self.boundary)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """250 ln(sigma + 1e-44); shape of `sigma`."""
        return ops.c_noise(sigma)


# As they are here: a subclass, or a patch of the class, may have others.
_OWN_METHODS = {name: vars(Preconditioner)[name] for name in ("scalings", "c_noise")}


def overridden(preconditioner: Preconditioner) -> list[str]:
    """The names of the methods that a preconditioner's class has in the place of `Preconditioner`'s."""
    return [name for name, own in _OWN_METHODS.items() if getattr(type(preconditioner), name, None) is not own]
