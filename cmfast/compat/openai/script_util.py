"""`cm.script_util`: command-line defaults, and models and diffusions made from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from cmfast.compat.openai.karras_diffusion import KarrasDenoiser
from cmfast.schedules import ema_and_scales as create_ema_and_scales_fn
from cmfast.unet import UNetModel

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "cm_train_defaults",
    "create_ema_and_scales_fn",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "str2bool",
]

NUM_CLASSES = 1000

# Widths of the levels, by image size.
_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


def cm_train_defaults() -> dict[str, Any]:
    """Arguments of consistency training that scripts offer on the command line."""
    return {
        "teacher_model_path": "",
        "teacher_dropout": 0.1,
        "training_mode": "consistency_distillation",
        "target_ema_mode": "fixed",
        "scale_mode": "fixed",
        "total_training_steps": 600000,
        "start_ema": 0.0,
        "start_scales": 40,
        "end_scales": 40,
        "distill_steps_per_iter": 50000,
        "loss_norm": "lpips",
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Arguments of `create_model_and_diffusion` that scripts offer on the command line."""
    return {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "32,16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        "learn_sigma": False,
        "weight_schedule": "karras",
    }


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    weight_schedule: str,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
    **settings: Any,
) -> tuple[UNetModel, KarrasDenoiser]:
    """The network, and a `KarrasDenoiser` with its other settings at their defaults, or those given (`loss_norm`)."""
    if isinstance(weight_schedule, _WithLossNorm):
        settings = {"loss_norm": weight_schedule.loss_norm, **settings}
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        channel_mult=channel_mult,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
        use_new_attention_order=use_new_attention_order,
    )
    diffusion = KarrasDenoiser(
        sigma_max=sigma_max,
        sigma_min=sigma_min,
        distillation=distillation,
        weight_schedule=str(weight_schedule),
        **settings,
    )
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """The network of RGB images.

    Args: channel_mult: widths of the levels, "1,2,3,4"; "": those known for the image size; attention_resolutions:
        sizes at which there is attention, "32,16,8"; learn_sigma: twice the output channels.

    Raises: ValueError: no channel_mult, and an image size for which none is known.
    """
    if not channel_mult and image_size not in _CHANNEL_MULT:
        known = ", ".join(map(str, sorted(_CHANNEL_MULT)))
        raise ValueError(
            f"unsupported image_size {image_size} without channel_mult; known: {known}; or give one, such as '1,2,2'"
        )
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(image_size // int(size) for size in attention_resolutions.split(",")),
        dropout=dropout,
        channel_mult=tuple(map(int, channel_mult.split(","))) if channel_mult else _CHANNEL_MULT[image_size],
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option for each entry, which parses as the default's type; None as a string."""
    for name, default in default_dict.items():
        kind: Any = type(default)
        if default is None:
            kind = str
        elif isinstance(default, bool):
            kind = str2bool
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The parsed arguments called `keys`.

    A `loss_norm` that is not the default goes with weight_schedule to `create_model_and_diffusion`: the original's
    cm_train.py parses it and hands it to nobody.
    """
    chosen = {key: getattr(args, key) for key in keys}
    loss_norm = getattr(args, "loss_norm", None)
    if "weight_schedule" in chosen and "loss_norm" not in chosen:
        if loss_norm not in (None, cm_train_defaults()["loss_norm"]):
            chosen["weight_schedule"] = _WithLossNorm(chosen["weight_schedule"], loss_norm)
    return chosen


class _WithLossNorm(str):
    """A weight_schedule, for any function that takes one, which remembers the loss_norm of the same command line."""

    loss_norm: str

    def __new__(cls, weight_schedule: str, loss_norm: str) -> _WithLossNorm:
        made = super().__new__(cls, weight_schedule)
        made.loss_norm = loss_norm
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _WithLossNorm, (str(self), self.loss_norm)


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 or no, false, f, n, 0, in any case; argparse.ArgumentTypeError for anything else."""
    if isinstance(v, bool):
        return v
    for value, words in (True, ("yes", "true", "t", "y", "1")), (False, ("no", "false", "f", "n", "0")):
        if v.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"boolean value expected (yes/no, true/false, 1/0), got {v!r}")
