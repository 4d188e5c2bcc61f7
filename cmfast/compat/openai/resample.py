"""`cm.resample`: which timesteps or noise levels a training step looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cmfast.compat.openai import dist_util
from cmfast.schedules import lognormal_sigmas


def create_named_schedule_sampler(name: str, diffusion: Any) -> Any:
    """`uniform` or `loss-second-moment` over diffusion.num_timesteps, or `lognormal` noise levels, which EDM needs.

    Raises: NotImplementedError: another name; the message lists the known ones.
    """
    samplers: dict[str, Callable[[], Any]] = {
        "uniform": lambda: UniformSampler(diffusion),
        "loss-second-moment": lambda: LossSecondMomentResampler(diffusion),
        "lognormal": LogNormalSampler,
    }
    if name not in samplers:
        raise NotImplementedError(f"unknown schedule sampler {name!r}; known: {', '.join(samplers)}")
    return samplers[name]()


class ScheduleSampler(ABC):
    """A distribution over timesteps; losses are weighted so that their mean stays what it is without one."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """A positive number for each timestep, to which its probability is proportional."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(timesteps int64 [B], weights of their losses float32 [B]). Draws from numpy's global generator."""
        weights = self.weights()
        p = weights / np.sum(weights)
        timesteps = np.random.choice(len(p), size=(batch_size,), p=p)
        loss_weights = torch.from_numpy(1 / (len(p) * p[timesteps])).float()
        return torch.from_numpy(timesteps).long().to(device), loss_weights.to(device)


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        """Ones."""
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Tell this rank's losses [B] of timesteps [B]: every rank must call it, and learns those of all.

        Batches may differ in size.
        """
        everyone = [(local_ts.tolist(), local_losses.tolist())]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone *= dist.get_world_size()
            dist.all_gather_object(everyone, everyone[dist.get_rank()])
        self.update_with_all_losses(
            [t for timesteps, _ in everyone for t in timesteps], [loss for _, losses in everyone for loss in losses]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses of timesteps. Called on every rank with the same arguments: to be deterministic."""


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps in proportion to the root mean square of their last `history_per_term` losses.

    Uniform until there are so many of each; afterwards with probability `uniform_prob`.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        """Root mean squares of the losses seen, once there are enough."""
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        weights: np.ndarray = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        weights *= 1 - self.uniform_prob
        weights += self.uniform_prob / len(weights)
        return weights

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses of timesteps."""
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] < self.history_per_term:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1
            else:
                self._loss_history[t] = [*self._loss_history[t, 1:], loss]

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())


class LogNormalSampler:
    """Noise levels whose logarithm is N(p_mean, p_std^2): Karras et al. 2022.

    even: one draw from each of as many equally likely intervals as all ranks together take samples, each rank a run
    of neighbours.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, even: bool = False) -> None:
        self.p_mean = p_mean
        self.p_std = p_std
        self.even = even
        if even:
            self.rank, self.size = dist_util.get_rank(), dist_util.get_world_size()

    def inv_cdf(self, x: Tensor) -> Tensor:
        """The level of log sigma below which a draw lies with probability x."""
        normal: Tensor = torch.special.ndtri(x.double())
        return self.p_mean + self.p_std * normal

    def sample(self, bs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(noise levels float32 [bs], weights of their losses, which are 1)."""
        if self.even:
            locs = (torch.arange(self.rank * bs, (self.rank + 1) * bs) + torch.rand(bs)) / (self.size * bs)
            # 0 and 1, which rounding makes of their neighbours, would be levels of 0 and infinity.
            locs = locs.clamp(2**-25, 1 - 2**-24)
            sigmas = torch.exp(self.inv_cdf(locs).to(device, torch.float32))
        else:
            sigmas = lognormal_sigmas(torch.randn(bs, device=device), mean=self.p_mean, std=self.p_std)
        return sigmas, torch.ones_like(sigmas)
