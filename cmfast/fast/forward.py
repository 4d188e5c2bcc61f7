"""The fast forward pass of a planned U-Net: channels_last throughout, in one dtype, in as few passes as possible.

Two ways of adding. Where GroupNorm has a kernel, a convolution's bias and the residual connection wait, as a `Sum`,
for the normalisation that comes next, which adds them on the way. Elsewhere (on a CPU, inside torch.compile) the
convolution adds them itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmfast import ops
from cmfast.dropout import DROPOUT_DRAW, current, note
from cmfast.fast import doubling
from cmfast.fast.plan import Attention, Layers, Plan, Resample, ResBlock
from cmfast.fast.weights import Weights, geometry
from cmfast.native import attention, winograd
from cmfast.ops._dispatch import keeping_backend


class Sum:
    """x + residual + bias, added when somebody needs it."""

    def __init__(self, x: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> None:
        self._x, self._residual, self._bias = x, residual, bias

    @property
    def waiting(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, and what is still to be added to it."""
        return self._x, self._residual, self._bias

    def settle(self, total: Tensor | None = None) -> Tensor:
        """The sum, or the given one from now on."""
        if total is None:
            total = self._x if self._residual is None else self._x + self._residual
            total = total if self._bias is None else total + self._bias[:, None, None]
        self._x, self._residual, self._bias = total, None, None
        return total


class Forward:
    """One pass.

    dtype: of all activations; live: gradients flow to the weights; differentiable: to them or to the input; packed: a
    CPU's convolutions, which have none; onednn: it does the convolutions, or better `winograd` and `doubling`, where
    they fit; waits: GroupNorm adds what waits; workspace: of `winograd`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        dtype: torch.dtype,
        *,
        live: bool,
        differentiable: bool = False,
        packed: bool = False,
        onednn: bool = False,
        waits: bool = False,
        workspace: winograd.Workspace | None = None,
    ) -> None:
        self.plan, self.weights, self.dtype = plan, weights, dtype
        self.live, self.differentiable = live, differentiable
        self.packed, self.onednn, self.waits = packed, onednn, waits
        self.workspace = workspace
        self._draw: ops.Draw | None = None

    def __call__(self, x: Tensor, emb: Tensor) -> Tensor:
        """F from the input [B, C, H, W] and the embedding [B, E], in the dtype of x."""
        plan = self.plan
        self._draw = self._first_draw(x)
        h = Sum(self.convolve(x.to(self.dtype, memory_format=torch.channels_last), plan.first))
        embeddings = self.embeddings(emb)
        skips = [h]
        for layers in plan.encoder:
            h = self.run(layers, h, embeddings)
            skips.append(h)
        h = self.run(plan.middle, h, embeddings)
        for layers in plan.decoder:
            h = self.run(layers, Sum(self.join(h, skips.pop())), embeddings)
        if self.weights.dtype is None and plan.out_conv.weight.dtype != self.dtype:
            # Of a network whose torso alone was cast, as `UNetModel.convert_to_fp16` does.
            h = Sum(h.settle().to(plan.out_conv.weight.dtype))
        return self.convolve(self.normalise(h, plan.out_norm), plan.out_conv).to(x.dtype)

    def join(self, h: Sum, skip: Sum) -> Tensor:
        """The channels of both, one after the other; what waits in h is added on the way."""
        x, residual, bias = h.waiting
        kept = skip.settle()
        if self.live or residual is None or bias is not None or torch.is_grad_enabled():
            return torch.cat([h.settle(), kept], dim=1)
        channels = x.shape[1]
        shape = x.shape[0], channels + kept.shape[1], *x.shape[2:]
        joined = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        torch.add(x, residual, out=joined[:, :channels])
        joined[:, channels:].copy_(kept)
        return joined

    def embeddings(self, emb: Tensor) -> Iterator[Tensor]:
        """Every residual block's projection of the embedding, [B, its outputs], in turn: one multiplication for all."""
        projections = [layer.embed for layer in self.plan.layers() if isinstance(layer, ResBlock)]
        weight = self.weights.joined(tuple(p.weight for p in projections), self.live)
        bias = self.weights.joined(tuple(p.bias for p in projections), self.live)
        every = F.linear(F.silu(emb).to(weight.dtype), weight, bias)
        return iter(every.split([p.out_features for p in projections], dim=1))

    def run(self, layers: Layers, h: Sum, embeddings: Iterator[Tensor]) -> Sum:
        """The layers of a block, one after the other."""
        for layer in layers:
            if isinstance(layer, Resample):
                h = self.resample(layer, h)
                continue
            emb = (next(embeddings),) if isinstance(layer, ResBlock) else ()
            function: Any = self.res_block if isinstance(layer, ResBlock) else self.attend
            if self.differentiable and layer.checkpoint():
                h = self._checkpointed(function, layer, h, *emb)
            else:
                h = function(layer, h, *emb)
        return h

    def res_block(self, block: ResBlock, x: Sum, emb: Tensor) -> Sum:
        """x + conv(norm(conv(norm(x)))), the embedding halfway."""
        h = self.normalise(x, block.in_norm)
        residual = x.settle()
        up = block.resample == "up"
        if block.resample:
            h, residual = h if up else _resampled(h, "down"), _resampled(residual, block.resample)
        if block.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            middle = self.convolved(h, block.in_conv, up=up)
            h = self.normalise(middle, block.out_norm, scale=scale, shift=shift, dropout=block.dropout)
        else:
            h = self.convolve(h, block.in_conv, up=up) + emb.to(h.dtype)[:, :, None, None]
            h = self.normalise(Sum(h), block.out_norm, dropout=block.dropout)
        if block.skip is None:
            return self.convolved(h, block.out_conv, residual)
        if self.waits:
            # Both biases in the multiplication that has room for one.
            both = self.weights.summed((block.skip.bias, block.out_conv.bias), self.live)
            return Sum(self.convolve(h, block.out_conv, bias=False), self.project(residual, (block.skip,), bias=both))
        return self.convolved(h, block.out_conv, self.convolve(residual, block.skip), spare=True)

    def attend(self, block: Attention, x: Sum) -> Sum:
        """x + the projection of self-attention over all positions."""
        h = x.settle() if block.norm is None else self.normalise(x, block.norm, silu=False)
        residual = x.settle()
        # Views all, of channels_last memory.
        qkv = self.project(h, block.qkv).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (3, block.heads, -1))
        if self.onednn and attention.fits(qkv):
            h = attention.attend(qkv).flatten(2)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h.unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
        if self.waits:
            return Sum(self.project(h, (block.proj,)), residual)
        return Sum(self.project(h, (block.proj,), residual))

    def resample(self, layer: Resample, x: Sum) -> Sum:
        """Twice or half the resolution."""
        if layer.conv is None:
            return Sum(_resampled(x.settle(), layer.kind))
        if layer.kind == "up":
            return self.convolved(x.settle(), layer.conv, up=True)
        return Sum(self.convolve(x.settle(), layer.conv))

    def normalise(
        self,
        x: Sum,
        norm: nn.GroupNorm,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = True,
        dropout: nn.Dropout | None = None,
    ) -> Tensor:
        """GroupNorm of the sum, which is settled on the way, scaled and shifted; SiLU; dropout."""
        value, residual, bias = x.waiting
        options: dict[str, Any] = {"eps": norm.eps, "scale": scale, "shift": shift, "silu": silu}
        if bias is not None:
            options["x_bias"] = bias
        if dropout is not None and self._draw is not None:
            if _drops(dropout):
                options |= {"dropout": dropout.p, "draw": self._numbered(self._draw, dropout)}
            # Of every block, dropping or not: the numbers are those of the ordinary network's layers.
            self._draw = self._draw._replace(draw=self._draw.draw + 1)
        h = ops.group_norm_silu(value, norm.num_groups, norm.weight, norm.bias, residual=residual, **options)
        if not isinstance(h, Tensor):
            h, total = h
            x.settle(total)
        if dropout is not None and dropout.training and dropout.p == 1:
            return F.dropout(h, 1.0)  # which needs no draw
        return h

    def _numbered(self, draw: ops.Draw, dropout: nn.Dropout) -> ops.Draw:
        """Of a layer with a number in `paired`, as in the ordinary pass: a block that occurs twice has one."""
        number = getattr(dropout, "layer", None) if draw.draw >= DROPOUT_DRAW else None
        return draw if number is None else draw._replace(draw=DROPOUT_DRAW + number)

    def convolved(
        self, h: Tensor, conv: nn.Conv2d, residual: Tensor | None = None, spare: bool = False, up: bool = False
    ) -> Sum:
        """conv(h) + residual; `spare`: nobody else needs the residual; up: of h at twice its size."""
        if self.waits:
            return Sum(self.convolve(h, conv, bias=False, up=up), residual, self._plain(conv.bias))
        return Sum(self.convolve(h, conv, residual, spare, up=up))

    def convolve(
        self, h: Tensor, conv: nn.Conv2d, residual: Tensor | None = None, spare: bool = False, bias: bool = True,
        up: bool = False,
    ) -> Tensor:  # fmt: skip
        """conv(h) + residual, added now; up: of h at twice its size, where the residual is none."""
        if self.onednn and winograd.fits(conv, h, self.packed, up):
            return self._winograd(h, conv, residual, up)
        if up and self.onednn and doubling.fits(conv, h, self.packed):
            return self._doubled(h, conv)
        if up:
            h = _resampled(h, "up")
        if conv.kernel_size == (1, 1):
            return self.project(h, (conv,), residual, spare)
        if self.packed:
            return self._packed(h, (conv,), residual, spare)
        vector = self._plain(conv.bias) if bias else None
        out = F.conv2d(h, self.weights.filters(conv.weight, self.live), vector, conv.stride, conv.padding)
        return out if residual is None else out + residual

    def _winograd(self, h: Tensor, conv: nn.Conv2d, residual: Tensor | None, up: bool) -> Tensor:
        """conv(h) + residual, of h at twice its size if `up`; its bias as well, since nothing waits on a CPU."""
        bias = self._plain(conv.bias)
        options: dict[str, Any] = {"doubled": up, "workspace": self.workspace}
        if self.packed:
            return winograd.convolve(h, self.weights.winograd(conv), conv.out_channels, bias, residual, **options)
        return winograd.convolution(h, self._plain(conv.weight), bias, residual, **options)

    def _doubled(self, h: Tensor, conv: nn.Conv2d) -> Tensor:
        """conv of h at twice its size, without the large h."""
        bias = self._plain(conv.bias)
        if self.packed:
            return doubling.convolve(h, self.weights.packed_doubled(conv, h.shape), bias)
        return doubling.transposed(h, self.weights.doubled(conv.weight, self.live), bias)

    def project(
        self,
        h: Tensor,
        modules: tuple[nn.Module, ...],
        residual: Tensor | None = None,
        spare: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:
        """1x1 convolutions or linear layers of the channels, their outputs one after the other; plus residual.

        bias: another than theirs.
        """
        if self.packed:
            return self._packed(h, modules, residual, spare)
        weight = self.weights.joined(tuple(m.weight for m in modules), self.live)  # type: ignore[misc]  # linear or 1x1
        if bias is None:
            bias = self.weights.joined(tuple(m.bias for m in modules), self.live)  # type: ignore[misc]  # linear or 1x1
        out = F.linear(h.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        return out if residual is None else out + residual

    def _packed(
        self, h: Tensor, modules: tuple[nn.Module, ...], residual: Tensor | None, spare: bool = False
    ) -> Tensor:
        """oneDNN's convolution with weights in its own layout; the residual is added in the same pass."""
        weight = self.weights.packed(modules, h.shape)
        bias = self.weights.joined(tuple(m.bias for m in modules), False)  # type: ignore[misc]  # linear or 1x1
        options = *geometry(modules[0]), 1
        add: tuple[Any, ...] = "add", 1.0, None, [], None
        made: Tensor
        if residual is None:
            made = torch.ops.mkldnn._convolution_pointwise(h, weight, bias, *options, "none", [], "")
        elif spare:
            made = torch.ops.mkldnn._convolution_pointwise_.binary(residual, h, weight, bias, *options, *add)
        else:
            made = torch.ops.mkldnn._convolution_pointwise.binary(h, residual, weight, bias, *options, *add)
        return made

    def _plain(self, parameter: Any) -> Tensor:
        return self.weights.plain(parameter, self.live)

    def _first_draw(self, x: Tensor) -> ops.Draw | None:
        """The draw of the first dropout mask; None if nothing drops. As in `nn.Dropout`, torch's generator decides,
        outside `cmfast.dropout.paired`."""
        blocks = [layer for layer in self.plan.layers() if isinstance(layer, ResBlock)]
        # Of a list: Dynamo cannot leave the generator of a generator halfway.
        if not any(_drops(block.dropout) for block in blocks):
            return None
        draw = current()
        note(blocks[0].dropout, draw is not None)
        if draw is not None:
            return draw
        seed = torch.randint(2**63 - 1, (), device=x.device)
        return ops.Draw(seed, torch.arange(x.shape[0], device=x.device), 0)

    def _checkpointed(self, function: Any, layer: Any, h: Sum, *emb: Tensor) -> Sum:
        """A layer whose activations are made again in the backward pass; its dropout draws the same again."""
        draw = self._draw

        def again(x: Tensor, *emb: Tensor) -> Tensor:
            self._draw = draw
            total: Sum = function(layer, Sum(x), *emb)
            return total.settle()

        again = keeping_backend(again)
        return Sum(checkpoint(again, h.settle(), *emb, use_reentrant=False, preserve_rng_state=False))


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and 0 < dropout.p < 1


def _resampled(x: Tensor, kind: str) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if kind == "up" else F.avg_pool2d(x, 2)
