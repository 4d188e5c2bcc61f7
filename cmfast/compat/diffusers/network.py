"""Reading models of diffusers: a UNet2DModel as the network of a `Denoiser`."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cmfast.checkpoint import SCHEDULE_KEYWORDS, CheckpointError

SCHEDULER = "CMStochasticIterativeScheduler"


#: Attributes of a network that `cmfast.optimize` made; see `cmfast.fast.FastUNet`. Others do not have them.
_OPTIMISED = ("derives_weights", "refresh", "faster_uncompiled", "input_format", "refusal")


#: As safetensors calls them.
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class UNet2DNetwork(nn.Module):
    """F(x, timesteps, y) of a `diffusers.UNet2DModel`, which it holds as `unet`.

    x [B, C, H, W], timesteps [B] (c_noise), y [B] int64 if class-conditional → [B, C, H, W].
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.num_classes: int | None = unet.config.num_class_embeds
        size = unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.image_shape = (unet.config.in_channels, height, width) if size else None

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """F(x, timesteps, y), [B, C, H, W]."""
        output: Tensor = self.unet(x, timesteps, class_labels=y, return_dict=False)[0]  # as diffusers' loop calls it
        return output

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What an optimised network computes in, or one whose weights are stored in another dtype by
        `enable_layerwise_casting`; None: that of the weights."""
        own: torch.dtype | None = getattr(self.unet, "input_dtype", None)
        # Its dtype says so, and takes a look at every part.
        return self.unet.dtype if own is None and hasattr(self.unet.conv_in, "_diffusers_hook") else own

    def __getattr__(self, name: str) -> Any:
        """What an optimised network says of itself, such as `refresh`, is said of this one too."""
        if name in _OPTIMISED:
            return getattr(self.unet, name)
        return super().__getattr__(name)


def read_network(source: Any, *, convert: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder, pipeline or UNet2DModel, and the settings (noise levels, shape) that come with it.

    The network is a `UNet2DNetwork` around the UNet2DModel, or with `convert` a `UNetModel` with a copy of its weights.
    A pipeline's scheduler gives sigma_min, sigma_max, rho and sigma_data.

    Raises:
        ImportError: diffusers is not installed. TypeError: `source` is none of these.
        CheckpointError: a folder that holds no UNet2DModel, or the pipeline of another kind of model, or a network
            that cannot be converted.
    """
    if isinstance(source, str | os.PathLike):
        unet, scheduler = _read_folder(Path(source))
    else:
        unet, scheduler = getattr(source, "unet", source), {}
        if hasattr(source, "scheduler"):
            scheduler = {**source.scheduler.config, "_class_name": type(source.scheduler).__name__}
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps
        if not isinstance(unet, unet_class()):
            expected = "a path, a UNet2DModel of diffusers or a pipeline with one"
            raise TypeError(f"cannot load a {type(source).__name__}: expected {expected}")

    if scheduler and "_class_name" not in scheduler:
        raise CheckpointError(f"the scheduler of {source} does not say which it is: there is no _class_name")
    # Networks of other schedulers take other timesteps and predict something else.
    if scheduler and scheduler["_class_name"] != SCHEDULER:
        raise CheckpointError(
            f"the pipeline has a {scheduler['_class_name']}, expected the {SCHEDULER} of a consistency model"
        )
    settings: dict[str, Any] = {name: scheduler[name] for name in SCHEDULE_KEYWORDS if name in scheduler}
    for name, value in settings.items():
        if not isinstance(value, int | float):
            where = source if isinstance(source, str | os.PathLike) else type(source).__name__
            raise CheckpointError(f"{name} of the scheduler of {where} is {value!r:.80}, expected a number")
    if convert:
        from cmfast.compat.diffusers.convert import unet_from_diffusers  # which imports this module

        return unet_from_diffusers(unet), settings
    network = UNet2DNetwork(unet)
    return network, settings | {"image_shape": network.image_shape, "num_classes": network.num_classes}


def _read_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _read_json(unet_folder / "config.json")
    if config is None:
        ours = folder / "model.safetensors"  # of a training run, or of a checkpoint in it
        instead = f"; give {ours}, the weights in it" if ours.is_file() else ""
        raise CheckpointError(
            f"{folder} is no diffusers folder: it has neither unet/config.json nor config.json{instead}"
        )
    if config.get("_class_name") != "UNet2DModel":
        raise CheckpointError(f"{unet_folder} holds a {config.get('_class_name')}, expected a UNet2DModel")
    _check_size(unet_folder, config)
    UNet2DModel = unet_class()
    from diffusers.utils import is_accelerate_available  # type: ignore[attr-defined]  # exported at run time alone

    dtype = _dtype_of(unet_folder)
    try:
        unet = UNet2DModel.from_pretrained(
            unet_folder, local_files_only=True, low_cpu_mem_usage=is_accelerate_available(), torch_dtype=dtype
        )
        unet = unet if dtype is None else unet.to(dtype)  # of several dtypes diffusers leaves some as they are
    except Exception as error:  # a damaged file leads its readers to whatever
        raise CheckpointError(f"{unet_folder} could not be loaded by diffusers: {str(error)[:1000]}") from error
    return unet, _read_json(folder / "scheduler" / "scheduler_config.json") or {}


def _dtype_of(folder: Path) -> torch.dtype | None:
    """Of the weights that diffusers reads: it makes float32 of them where nothing is said.

    None: there are none, or none that can be read, of which diffusers speaks.
    """
    dtypes: set[torch.dtype] = set()
    for suffix in (".safetensors", ".bin"):
        try:
            for path in folder.glob(f"diffusion_pytorch_model*{suffix}"):
                # Not those of a variant, such as .fp16.safetensors.
                if re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?", path.stem):
                    dtypes |= _dtypes_in(path)
        except Exception:  # a damaged file leads its readers to whatever
            return None
        if dtypes:
            break
    # Of several that which holds all of them.
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _dtypes_in(path: Path) -> set[torch.dtype]:
    """Of a file's floating-point tensors, of which none is read."""
    if path.suffix == ".bin":
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True).values()
        return {x.dtype for x in tensors if x.is_floating_point()} & set(_DTYPES.values())
    with safe_open(path, framework="pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}
    return {dtype for name, dtype in _DTYPES.items() if name in found}


def _check_size(folder: Path, config: dict[str, Any]) -> None:
    """Raises: CheckpointError: the configuration is of a network with many more parameters than there are bytes of
    weights, for which memory would be taken before they are read."""
    size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") and p.is_file())
    try:
        widths = [int(width) for width in config.get("block_out_channels", (224,))]
        time = int(config.get("time_embedding_dim") or 4 * widths[0])
        # Those of 3x3 convolutions between equal widths, and of what else a single number makes large.
        least = 18 * (int(config.get("layers_per_block") or 1) * sum(width**2 for width in widths))
        least += time**2 + widths[0] * 9 * (int(config.get("in_channels", 3)) + int(config.get("out_channels", 3)))
        least += time * int(config.get("num_class_embeds") or 0)
        if config.get("time_embedding_type") == "learned":
            least += widths[0] * int(config.get("num_train_timesteps") or 0)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from error
    if least > max(size, 2**24):
        raise CheckpointError(
            f"{folder / 'config.json'} is of a network with {least:,} parameters or more, and there are {size:,} bytes "
            "of weights beside it: fetch both again"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected names and values")
    return values


def unet_class() -> Any:
    """diffusers' UNet2DModel; ImportError, with what to install, where there is none."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError('a diffusers model needs diffusers: pip install "cmfast[diffusers]"') from error
    return UNet2DModel
