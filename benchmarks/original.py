"""The original network, openai/consistency_models, from a checkout of it: only the module `cm.unet` is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast import UNetModel
from cmfast.checkpoint import meta_network


class Missing(Exception):
    """A provider that this machine does not have; the message says what is missing."""


class _Attention(nn.Module):
    """In the place of flash_attn's: qkv [B, S, 3, heads, d] to ([B, S, heads, d], None), by PyTorch's own attention."""

    def __init__(self, attention_dropout: float = 0.0, **options: Any) -> None:
        super().__init__()

    def forward(self, qkv: Tensor, **options: Any) -> tuple[Tensor, None]:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The two rearrangements that the original asks of einops."""
    if pattern == "b (three h d) s -> b s three h d":
        return x.unflatten(1, (sizes["three"], sizes["h"], -1)).permute(0, 4, 1, 2, 3)
    if pattern == "b s h d -> b (h d) s":
        return x.flatten(2).transpose(1, 2)
    raise NotImplementedError(f"no stand-in for einops.rearrange of {pattern!r}")


@contextmanager
def _stand_ins(device: torch.device) -> Iterator[list[str]]:
    """What the original imports while it builds its network, where it is not installed or has no use; their names."""
    modules: dict[str, Any] = {}
    if not find_spec("einops"):
        modules["einops"] = ModuleType("einops")
        modules["einops"].rearrange = _rearrange
    if device.type != "cuda" or not _has_flash_attention():
        modules["flash_attn"] = ModuleType("flash_attn")
        modules["flash_attn.flash_attention"] = ModuleType("flash_attn.flash_attention")
        modules["flash_attn.flash_attention"].FlashAttention = _Attention
    with patch.dict(sys.modules, modules):
        yield sorted({name.partition(".")[0] for name in modules})


def _has_flash_attention() -> bool:
    """Whether the class that the original wants is there: flash_attn 2 does not have it any more."""
    try:
        importlib.import_module("flash_attn.flash_attention")
    except ImportError:
        return False
    return True


@contextmanager
def importing(path: Path | None, device: torch.device) -> Iterator[list[str]]:
    """Inside the `with` block the original's modules can be imported; what stands in for others, by name.

    path: a checkout; None: `cm` as it is installed. Raises: Missing: there is no `cm`, or it cannot be imported.
    """
    if path is None and not find_spec("cm"):
        raise Missing("no package `cm` is installed, and no checkout is named by --openai PATH")
    search = [] if path is None else [str(path.resolve())]
    with patch.object(sys, "path", search + sys.path), _stand_ins(device) as stand_ins:
        try:
            yield stand_ins
        except ImportError as error:
            raise Missing(f"the original cannot be imported: {error}") from error


def original_unet(
    network: UNetModel, path: Path | None, *, fp16: bool, training: bool = False
) -> tuple[nn.Module, str | None]:
    """The original's network with the architecture and a copy of the weights of ours; and what stands in for what.

    fp16: with its torso in float16, as the original samples on a GPU. training: with float32 weights that take
    gradients, which the original turns into float16 itself. Raises: Missing: as `importing`.
    """
    device = next(network.parameters()).device
    with importing(path, device) as stand_ins:
        unet = importlib.import_module("cm.unet")
        # Without memory at first: initialising it takes seconds, of which nothing stays.
        model = meta_network({**network.config, "use_fp16": fp16}, unet.UNetModel)
    model = model.to_empty(device=device)
    model.load_state_dict({name: tensor.float() for name, tensor in network.state_dict().items()})
    note = f"stand-ins for {' and '.join(stand_ins)}; attention by PyTorch's fused one" if stand_ins else None
    if training:
        return model.train().requires_grad_(True), note
    model = model.eval().requires_grad_(False)
    if fp16:
        model.convert_to_fp16()
    return model, note
