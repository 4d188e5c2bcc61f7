"""Teacher and target: networks without gradient, on a GPU each forward pass one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cmfast import dropout, ops
from cmfast.denoiser import Denoiser
from cmfast.graphs import SPACES, GraphError, Program, ProgramCache, kind
from cmfast.networks import refresher
from cmfast.training.parallel import with_network

#: Graphs that a network keeps: for whole microbatches and the last, in each layout that inputs come in.
GRAPHS = 8


class Frozen(nn.Module):
    """A network whose forward pass is captured for each shape it is called with, and replayed.

    It reads its weights from where they are, so that an average that is written in place is seen. A pass that cannot
    be captured is called as it is, and `refusal` says why.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.refusal: str | None = None
        self._space = SPACES[device.type](device)
        self._programs = ProgramCache(GRAPHS)

    @property
    def input_dtype(self) -> Any:
        """As the network's."""
        return getattr(self.network, "input_dtype", None)

    @property
    def input_format(self) -> Any:
        """As the network's."""
        return getattr(self.network, "input_format", None)

    @torch.no_grad()
    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """As the network's, without gradient."""
        values: dict[str, Any] = {"x": x, "timesteps": timesteps}
        if y is not None:
            values["y"] = y
        if dropout.drops(self.network.modules()):
            draw = dropout.current()
            if draw is None or not dropout.counts(self.network):
                return self._call(values)  # by torch's generator
            values |= {"seed": draw.seed, "index": draw.index}
        if self.refusal is not None:
            return self._call(values)
        refresh = refresher(self.network)
        with self._space.turn():
            # In turn with replays, which read on another thread's stream what this writes.
            if refresh is not None and refresh():
                self._programs.clear(self._space)
            key = kind(values)
            program = self._programs.get(key)
            if program is None:
                try:
                    program = Program(self._call, values, self._space, self.network)
                except GraphError as error:
                    self.refusal = str(error)
                    return self._call(values)
                self._programs.put(key, program, self._space)
            # A copy, since the next replay overwrites it: two outputs of a teacher make one Heun step.
            return program.run(values).clone()

    def _call(self, values: dict[str, Any]) -> Tensor:
        labels = () if "y" not in values else (values["y"],)
        output: Tensor
        if "seed" not in values:
            output = self.network(values["x"], values["timesteps"], *labels)
            return output
        with dropout.at(ops.Draw(values["seed"], values["index"], dropout.DROPOUT_DRAW)):
            output = self.network(values["x"], values["timesteps"], *labels)
        return output


def frozen(model: Denoiser) -> Denoiser:
    """The model with its network captured, where its device has graphs."""
    if model.device.type not in SPACES or not isinstance(model.network, nn.Module):
        return model
    return with_network(model, Frozen(model.network, model.device))
