"""The U-Net of the published checkpoints (Dhariwal & Nichol 2021, as used by Song et al. 2023).

Arguments, parameter names, shapes and their order are those of the original code: its checkpoints load as
they are.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmfast import dropout as dropouts
from cmfast.ops import _check

from .unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    conv_nd,
    normalization,
    timestep_embedding,
    zero_,
)


def _weight_dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class UNetModel(nn.Module):
    """F(x, timesteps, y): a U-Net with residual blocks, attention at chosen levels and timestep embedding.

    image_size             height and width it was made for; kept in `config`, other sizes work too
    in_channels            channels of x
    model_channels         base width, a multiple of 32
    out_channels           channels of the output
    num_res_blocks         residual blocks per level
    attention_resolutions  downsampling factors (1, 2, 4, ...) of the levels that have attention
    dropout                probability in each residual block, in training mode
    channel_mult           width of each level, in units of model_channels
    conv_resample          resample with a convolution (where not `resblock_updown`), else without one
    dims                   1, 2 or 3 spatial dimensions; 3-d data is resampled in the inner two only
    num_classes            class-conditional where not None
    use_checkpoint         recompute activations in the backward pass
    use_fp16               kept in `config` only: forward takes the dtype of the weights, see `convert_torso`
    num_heads              attention heads where num_head_channels is -1
    num_head_channels      width of a head
    num_heads_upsample     heads of the decoder where different, -1 for `num_heads`
    use_scale_shift_norm   the embedding scales and shifts a normalisation, else it is added
    resblock_updown        resample inside residual blocks
    use_new_attention_order  kept in `config` only: it changes nothing in the original either

    `config` holds these arguments as a dict that JSON can represent: `UNetModel(**model.config)` is the same
    network, with new weights.

    Raises:
        ValueError: widths that are not multiples of 32, heads that do not divide them, `dims` not 1, 2 or 3.

    >>> network = UNetModel(8, 3, 32, 3, 1, attention_resolutions=[2], channel_mult=(1, 2), num_classes=10)
    >>> network(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.tensor([3, 7])).shape
    torch.Size([2, 3, 8, 8])
    """

    #: F(x, c_noise), which samplers and losses take inside a `Denoiser` alone.
    is_network = True
    #: All of its dropout is `dropout.Dropout`.
    drops_by_counter = True

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if dims not in (1, 2, 3):
            raise ValueError(f"dims={dims}: expected 1, 2 or 3")
        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": [_check.without_numpy(factor) for factor in attention_resolutions],
            "dropout": dropout,
            "channel_mult": [_check.without_numpy(mult) for mult in channel_mult],
            "conv_resample": conv_resample,
            "dims": dims,
            "num_classes": num_classes,
            "use_checkpoint": use_checkpoint,
            "use_fp16": use_fp16,
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "num_heads_upsample": num_heads_upsample,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "use_new_attention_order": use_new_attention_order,
        }
        self.config = {name: _check.without_numpy(value) for name, value in self.config.items()}
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads_upsample
        self.num_levels = len(channel_mult)

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def res_block(channels: int, out_channels: int, **updown: bool) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                dropout,
                out_channels,
                use_scale_shift_norm=use_scale_shift_norm,
                dims=dims,
                use_checkpoint=use_checkpoint,
                **updown,
            )

        def attention(channels: int, heads: int) -> AttentionBlock:
            return AttentionBlock(channels, heads, num_head_channels, use_checkpoint, dims=dims)

        widths = [int(mult * model_channels) for mult in channel_mult]
        last_level = len(widths) - 1

        channels = widths[0]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, channels, 3, padding=1))])
        skip_channels = [channels]  # of every tensor the decoder will concatenate
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(channels, width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(channels)
            if level != last_level:
                down = (
                    res_block(channels, channels, down=True)
                    if resblock_updown
                    else Downsample(channels, conv_resample, dims)
                )
                self.input_blocks.append(TimestepEmbedSequential(down))
                skip_channels.append(channels)

        self.middle_block = TimestepEmbedSequential(
            res_block(channels, channels), attention(channels, num_heads), res_block(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skip_channels.pop(), width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, num_heads_upsample))
                if level > 0 and i == num_res_blocks:
                    layers.append(
                        res_block(channels, channels, up=True)
                        if resblock_updown
                        else Upsample(channels, conv_resample, dims)
                    )
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_(conv_nd(dims, channels, out_channels, 3, padding=1))
        )
        dropouts.number(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the torso (encoder, middle, decoder): that of its weights now. Setting it is `convert_torso`."""
        return _weight_dtype(self.input_blocks[0])

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.convert_torso(dtype)

    def convert_torso(self, dtype: torch.dtype) -> "UNetModel":
        """Cast the convolutions of encoder, middle and decoder to `dtype`, in place; returns the model.

        Normalisations, embeddings and the last convolution keep theirs, as in the original's float16 mode.
        """
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    module.to(dtype)
        return self

    def convert_to_fp16(self) -> "UNetModel":
        """`convert_torso(torch.float16)`."""
        return self.convert_torso(torch.float16)

    def convert_to_fp32(self) -> "UNetModel":
        """`convert_torso(torch.float32)`."""
        return self.convert_torso(torch.float32)

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor: ...

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        x          [B, in_channels, ...], floating point, any layout; size divisible by 2^(levels − 1)
        timesteps  [B], any real dtype, may be fractional (the c_noise of a preconditioner)
        y          [B] int64 or int32 labels below num_classes, if and only if it is class-conditional

        Returns [B, out_channels, ...] in the dtype of x. Inside, the torso computes in the dtype of its
        weights (or of `torch.autocast`) and the embedding in that of `time_embed`.

        Raises:
            ValueError: an argument of the wrong rank, shape or dtype; labels missing, superfluous, or out
                of range (values are looked at on the CPU only, and not while compiling).
        """
        self._check_inputs(x, timesteps, y)
        emb = self.embed(timesteps, y)

        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        output: Tensor = self.out(h.to(_weight_dtype(self.out)))
        return output.to(x.dtype)

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """What residual blocks are given of timesteps [B] and labels y int64 [B]: [B, 4 model_channels]."""
        weights_dtype = _weight_dtype(self.time_embed)
        embedding_dtype = torch.float64 if weights_dtype == torch.float64 else torch.float32
        waves = timestep_embedding(timesteps, self.model_channels, embedding_dtype).to(weights_dtype)
        emb: Tensor = self.time_embed(waves)
        return emb if y is None else emb + self.label_emb(y)

    def _check_inputs(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        """Everything that can be known from shapes and dtypes: no value on a device is read."""
        # Of the layers as they are: users put in another first convolution, or an embedding of more classes.
        block = self.input_blocks[0]
        first = block[0] if isinstance(block, nn.Sequential) and len(block) else block
        in_channels = getattr(first, "in_channels", self.in_channels)
        if x.ndim != self.dims + 2 or x.shape[1] != in_channels:
            raise ValueError(
                f"x has shape {list(x.shape)}: expected [B, {in_channels}"
                f"{', size' * self.dims}], in_channels={in_channels} and dims={self.dims}"
            )
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}: expected a floating-point dtype")
        factor = 2 ** (self.num_levels - 1)
        resampled = x.shape[-min(self.dims, 2) :]
        if any(size % factor for size in resampled):
            raise ValueError(
                f"x has spatial size {list(resampled)}: expected multiples of {factor}, since "
                f"{self.num_levels} levels halve it {self.num_levels - 1} times"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps has shape {list(timesteps.shape)}: expected [{x.shape[0]}], one per sample")
        if (y is None) != (self.num_classes is None):
            if y is None:
                raise ValueError(f"y is None: expected labels, the network has num_classes={self.num_classes}")
            raise ValueError("y was given: expected None, the network is unconditional (num_classes=None)")
        if y is None or self.num_classes is None:
            return
        if y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {list(y.shape)}: expected [{x.shape[0]}], one label per sample")
        if y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y has dtype {y.dtype}: expected torch.int64 or torch.int32")
        # Reading labels on a device would stall it, and break a graph.
        if y.device.type == "cpu" and y.numel() and _check.has_values(y):
            low, high = int(y.min()), int(y.max())
            classes = getattr(self.label_emb, "num_embeddings", self.num_classes)
            if low < 0 or high >= classes:
                raise ValueError(f"y has labels from {low} to {high}: expected 0 to {classes - 1}")
