"""The convolutions of a forward pass and nothing else: what a network on a CPU cannot be much faster than."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.benchmarks.networks import NETWORKS, without_memory
from cmfast.benchmarks.original import Missing
from cmfast.tolerances import FLOOR


class Recorded(NamedTuple):
    """A convolution by the name of its module, and the shape of what it is given."""

    name: str
    shape: tuple[int, ...]


def convolutions_of(name: str, batch: int) -> list[Recorded]:
    """Every convolution of one forward pass of a network of `NETWORKS`, in order."""
    network = without_memory(name, torch.float32)
    found: list[Recorded] = []
    for where, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs, where=where: found.append(Recorded(where, tuple(inputs[0].shape)))
            )
    size = NETWORKS[name]["image_size"]
    x = torch.empty(batch, network.in_channels, size, size, device="meta")
    labels = None if network.num_classes is None else torch.empty(batch, dtype=torch.int64, device="meta")
    with torch.no_grad():
        network(x, torch.empty(batch, device="meta"), labels)
    return found


class Convolutions:
    """All convolutions of a network with its weights, on channels_last inputs; one input serves all of its shape.

    packed: with weights in the layout that oneDNN wants, made once; else it makes that layout at every call.
    Raises: Missing: packed, and this PyTorch has no oneDNN.
    """

    def __init__(self, name: str, network: nn.Module, batch: int, *, packed: bool) -> None:
        if packed and not torch.backends.mkldnn.is_available():
            raise Missing("this PyTorch has no oneDNN to pack weights for")
        modules = dict(network.named_modules())
        generator = torch.Generator().manual_seed(0)
        self._inputs: dict[tuple[int, ...], Tensor] = {}
        self._steps: list[tuple[nn.Conv2d, Tensor, Callable[[Tensor], Tensor]]] = []
        for where, shape in convolutions_of(name, batch):
            if shape not in self._inputs:
                x = torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
                self._inputs[shape] = x
            conv: nn.Conv2d = modules[where]
            call = _packed(conv, shape) if packed else _unpacked(conv)
            self._steps.append((conv, self._inputs[shape], call))

    def __call__(self) -> None:
        """All of them, one after the other."""
        for _, x, call in self._steps:
            call(x)

    def wrong(self) -> str | None:
        """What is off by more than twice PyTorch's error against float64 and the floor; None if nothing is."""
        for conv, x, call in self._steps:
            bias = None if conv.bias is None else conv.bias.double()
            exact = F.conv2d(
                x.double(), conv.weight.double(), bias, conv.stride, conv.padding, conv.dilation, conv.groups
            )
            off = [((y.double() - exact).abs().max() / exact.abs().max()).item() for y in (call(x), conv(x))]
            allowed = 2 * off[1] + FLOOR[x.dtype]
            if not off[0] <= allowed:
                return f"{conv} is off by {off[0]:.3g}, allowed {allowed:.3g}"
        return None


def _unpacked(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    stride, padding, dilation, groups = conv.stride, conv.padding, conv.dilation, conv.groups
    return lambda x: F.conv2d(x, weight, conv.bias, stride, padding, dilation, groups)


def _packed(conv: nn.Conv2d, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    geometry = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
    weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *geometry, list(shape))
    pointwise = torch.ops.mkldnn._convolution_pointwise
    return lambda x: pointwise(x, weight, conv.bias, *geometry, "none", [], "")
