"""Building blocks of the U-Net: normalisation, resampling, residual blocks, attention, timestep embedding.

Names of submodules (`in_layers`, `emb_layers`, `proj_out`, ...) are those of the published checkpoints.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmfast import dropout as dropouts

NUM_GROUPS = 32

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution of `dims` dimensions, 1, 2 or 3; args, kwargs: as of `nn.Conv2d`."""
    return _CONVS[dims](*args, **kwargs)


def zero_(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(
    timesteps: Tensor, dim: int, dtype: torch.dtype = torch.float32, max_period: float = 10000.0
) -> Tensor:
    """[cos(t f_0), cos(t f_1), ..., sin(t f_0), ...] with f_i = max_period^(-i / (dim // 2)).

    timesteps [B], any real dtype, may be fractional  →  [B, dim] in `dtype` (float32, float64); an odd `dim`
    ends in a zero. The frequencies are made on the device of `timesteps`: nothing is copied from the host.
    """
    half = dim // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=dtype) * -math.log(max_period) / half
    args = timesteps.to(dtype)[:, None] * torch.exp(exponents)
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class GroupNorm32(nn.GroupNorm):
    """`nn.GroupNorm` whose statistics never are 16-bit.

    [B, C, ...] → same shape, dtype and layout. float16 and bfloat16 are normalised in float32, float32 and
    float64 as they are; weights of another dtype are cast to that of the computation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] normalised, in its dtype."""
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """`GroupNorm32` with 32 groups. Raises: ValueError: channels is not a multiple of 32."""
    if channels % NUM_GROUPS:
        raise ValueError(
            f"channels={channels} cannot be split into {NUM_GROUPS} groups: choose model_channels and "
            f"channel_mult so that every product is a multiple of {NUM_GROUPS}"
        )
    return GroupNorm32(NUM_GROUPS, channels)


class TimestepBlock(nn.Module):
    """A module whose forward takes (x, emb)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the embedding to the children that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # with an embedding
        """x [B, C, ...] through the sequence, with emb [B, E]."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest neighbour × 2 (3-d: only the inner two dimensions), then a 3-convolution where `use_conv`.

    channels: of the input. dims: spatial dimensions, 1, 2 or 3. out_channels: of the convolution, where others.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.scale_factor = (1.0, 2.0, 2.0) if dims == 3 else 2.0
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] at twice the resolution."""
        x = F.interpolate(x, scale_factor=self.scale_factor, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the resolution (3-d: the inner two dimensions) by a strided 3-convolution (`use_conv`) or by averaging.

    channels: of the input. dims: spatial dimensions, 1, 2 or 3. out_channels: of the convolution, where others.

    Raises:
        ValueError: out_channels that averages cannot have.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            if self.out_channels != channels:
                raise ValueError(f"out_channels={out_channels} needs use_conv: averages have {channels} channels")
            self.op = _AVERAGE_POOLS[dims](stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] at half the resolution."""
        return self.op(x)


class ResBlock(TimestepBlock):
    """GroupNorm, SiLU, convolution, twice, added to a skip connection; the embedding enters halfway.

    x [B, C, ...], emb [B, E]  →  [B, out_channels, ...] in the dtype of the convolutions; the spatial size is
    doubled by `up`, halved by `down`. With `use_scale_shift_norm` the embedding scales and shifts the second
    normalisation, else it is added before it. `use_checkpoint` recomputes the block in the backward pass.

    channels: of x. emb_channels: E. dropout: probability of the second half's. use_conv: of size 3, not 1, where
    out_channels are others and the skip connection a convolution. dims: spatial dimensions, 1, 2 or 3.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out_channels
        self.dropout, self.use_conv = dropout, use_conv
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        if self.updown:
            resample = Upsample if up else Downsample
            self.h_upd, self.x_upd = resample(channels, False, dims), resample(channels, False, dims)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            dropouts.Dropout(dropout),
            zero_(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        size = 3 if use_conv else 1
        self.skip_connection = (
            nn.Identity()
            if out_channels == channels
            else conv_nd(dims, channels, out_channels, size, padding=size // 2)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """The block's output for x [B, C, ...] and emb [B, E]."""
        if self.use_checkpoint and torch.is_grad_enabled():
            # Keeping the generator's state stalls the device: only where it must draw a dropout mask again.
            drop: Any = self.out_layers[2]
            generated = self.training and float(drop.p) > 0 and not getattr(drop, "counts", False)
            forward = dropouts.kept(self._forward)
            return checkpoint(forward, x, emb, use_reentrant=False, preserve_rng_state=generated)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, in_act, in_conv = self.in_layers
        out_norm, out_act, drop, out_conv = self.out_layers

        h = in_act(in_norm(x))
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = in_conv(h)

        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.reshape(emb_out.shape + (1,) * (h.ndim - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
        else:
            h = out_norm(h + emb_out)
        return self.skip_connection(x) + out_conv(drop(out_act(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection. [B, C, ...] → the same.

    The projection's channels are ordered (q k v, heads, d) as in the published checkpoints. num_heads counts where
    num_head_channels, the width of a head, is -1; dims: spatial dimensions, 1, 2 or 3; use_checkpoint: recompute the
    block in the backward pass. attention_type, channels_last and use_new_attention_order are the original's, where they
    do not change what is computed.

    Raises:
        ValueError: the channels cannot be divided into heads; encoder_channels, which fail in the original too.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        attention_type: str = "flash",
        encoder_channels: None = None,
        dims: int = 2,
        channels_last: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if encoder_channels is not None:
            raise ValueError(f"encoder_channels={encoder_channels}: expected None, there is no cross-attention")
        if num_head_channels != -1:
            if num_head_channels < 1 or channels % num_head_channels:
                raise ValueError(
                    f"num_head_channels={num_head_channels} does not divide the {channels} channels of an "
                    "attention layer"
                )
            num_heads = channels // num_head_channels
        elif num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {channels} channels of an attention layer")
        self.channels, self.num_heads = channels, num_heads
        self.use_checkpoint, self.attention_type = use_checkpoint, attention_type
        self.norm = normalization(channels)
        self.qkv = conv_nd(dims, channels, 3 * channels, 1)
        self.proj_out = zero_(conv_nd(dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] with what its positions say to each other."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        # Positions before channels: the fused attention kernels need d contiguous. Of channels_last
        # activations this is a view; of contiguous ones it is a copy, the only one.
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # [B, S, 3 C]
        q, k, v = qkv.unflatten(2, (3, self.num_heads, channels // self.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, S, d]
        h = h.transpose(2, 3).reshape(batch, channels, *spatial)
        made: Tensor = self.proj_out(h)
        return x + made
