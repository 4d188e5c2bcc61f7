"""The toy network of the golden numbers: F(x, t, y) = conv2(tanh(conv1(x) + 0.1 cos(t / 100) + emb[y]))."""

import torch
from torch import Tensor, nn

from cmfast.denoiser import Denoiser
from cmfast.precondition import Preconditioner


class ToyNetwork(nn.Module):
    def __init__(self, num_classes: int = 7, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.emb = nn.Embedding(num_classes, width)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        time = 0.1 * torch.cos(t.to(x.dtype) / 100)[:, None, None, None]
        return self.conv2(torch.tanh(self.conv1(x) + time + self.emb(y)[:, :, None, None]))


def toy_denoiser(tensors: dict[str, Tensor], role: str, kind: str) -> Denoiser:
    """The golden toy `student`, `target` or `teacher` with `edm` scalings or the boundary condition (`bc`)."""
    prefix = f"toy.{role}."
    network = ToyNetwork()
    network.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    return Denoiser(network, Preconditioner.edm() if kind == "edm" else Preconditioner.consistency())
