"""Trainings by name: what a run is made of, from a few settings. `python -m cmfast train --recipe cd ...` is this."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmfast import checkpoint, data, untrusted
from cmfast.denoiser import Denoiser
from cmfast.objectives import OBJECTIVES, Objective
from cmfast.precondition import Preconditioner
from cmfast.ranks import Ranks
from cmfast.training import Trainer, TrainOptions, checkpoints, config
from cmfast.training.state import MODEL
from cmfast.training.step import LEVELS
from cmfast.unet import UNetModel
from cmfast.unet_config import PUBLISHED

_PUBLISHED_AVERAGES = ("0.999", "0.9999", "0.9999432189950708")
#: What the papers trained ImageNet-64 with, but for the batch size: theirs is 2048 to 4096. Of progressive distillation
#: from 64 intervals to one there are five stages of 50,000 steps and two of twice as many.
PRESETS: dict[str, dict[str, Any]] = {
    "edm": {"steps": 600_000, "learning_rate": 1e-4, "averages": _PUBLISHED_AVERAGES},
    "cd": {"steps": 600_000, "learning_rate": 8e-6, "averages": _PUBLISHED_AVERAGES},
    "ct": {"steps": 800_000, "learning_rate": 1e-4, "averages": _PUBLISHED_AVERAGES},
    "pd": {"steps": 450_000, "learning_rate": 1e-4, "averages": ("0.999",), "decay": "linear"},
    "ict": {"steps": 800_000, "learning_rate": 1e-4, "averages": ("0.99997",)},
    "ect": {"steps": 200_000, "learning_rate": 1e-4, "averages": ("0.9999",)},
}
BATCH_SIZE = 64

#: New networks by name; image_size, channels and classes are those of the data.
NETWORKS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "channel_mult": [1, 2, 2],
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
    },
    "small": {
        "model_channels": 64,
        "num_res_blocks": 2,
        "attention_resolutions": [4],
        "channel_mult": [1, 2, 2],
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
    },
    "imagenet64": {**PUBLISHED["ImageNet-64"][0], **PUBLISHED["ImageNet-64"][1]},
    "lsun256": {**PUBLISHED["LSUN-256"][0], **PUBLISHED["LSUN-256"][1]},
}

#: What settings hold, and what each says where it is not given.
SETTINGS: dict[str, Any] = {
    "recipe": None,
    "paths": {"data": None, "teacher": None, "init": None, "lpips_trunk": None, "lpips_head": None},
    "data": {
        "image_size": None, "channels": None, "flip": False, "labelled": None, "bounded": None,
        "skip_unreadable": False,
    },  # fmt: skip
    "network": "small",
    "dropout": None,
    "lpips": {"net": "vgg", "pretrained": True},
    "objective": {},
    "options": {},
}
#: What an objective has from the steps of its run, where it is not given.
_OF_STEPS = ("total_steps", "steps_per_stage")
#: What is in the group `data`, where it is not None.
_KINDS = {
    "image_size": int, "channels": int, "flip": bool, "labelled": bool, "bounded": bool, "skip_unreadable": bool,
}  # fmt: skip


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with everything that is not given, from the recipe.

    Raises: ValueError: an unknown name, recipe or network; the message lists the known ones.
    """
    settings = copy.deepcopy(SETTINGS)
    for name, value in given.items():
        if name in ("data_fingerprint", "teacher_fingerprint"):  # of a run that is gone on with
            continue
        if name not in settings:
            raise ValueError(f"settings know no {name}; known: {', '.join(settings)}")
        if isinstance(settings[name], dict):
            known = settings[name]
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is a group of settings, as in {name}.NAME, got {value!r:.80}")
            unknown = [key for key in value if known and key not in known]
            if unknown:
                raise ValueError(f"{name} knows no {', '.join(unknown)}; known: {', '.join(known)}")
            known.update(value)
        else:
            settings[name] = value
    for name, kind in {**dict.fromkeys(settings["paths"], str), **_KINDS}.items():
        value = settings["paths"].get(name, settings["data"].get(name))
        if value is not None and type(value) is not kind and not isinstance(value, os.PathLike):
            raise ValueError(f"{name} must be a {kind.__name__}, got {value!r:.80}")
    # As a shell does with a flag, but not behind --set, and nobody with a file of settings.
    settings["paths"] = {name: path and os.path.expanduser(path) for name, path in settings["paths"].items()}
    dropout = settings["dropout"]
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout <= 1):
        raise ValueError(f"dropout must be from 0 to 1, or None, got {dropout!r:.80}")
    recipe = settings["recipe"]
    if not isinstance(recipe, str) or recipe not in PRESETS:
        raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(PRESETS)}, and mnist")
    options = {"batch_size": BATCH_SIZE, **PRESETS[recipe], **settings["options"]}
    settings["options"] = config.plain(config.make(TrainOptions, options, "options"))
    settings["objective"] = config.plain(objective(settings))
    network = settings["network"]
    if not isinstance(network, dict) and (not isinstance(network, str) or network not in NETWORKS):
        raise ValueError(f"unknown network {network!r:.80}; known: {', '.join(NETWORKS)}")
    return settings


def objective(settings: Mapping[str, Any]) -> Objective:
    """The objective of settings; its curriculum is that of a run of as many steps, unless they say otherwise."""
    kind, steps = OBJECTIVES[settings["recipe"]], settings["options"]["steps"]
    fields = dict(settings["objective"])
    fields.pop("name", None)
    if hasattr(kind, "total_steps"):
        fields.setdefault("total_steps", steps)
    aim: Any = config.make(kind, fields, f"the objective of {settings['recipe']}")
    if hasattr(kind, "steps_per_stage") and "steps_per_stage" not in fields:
        aim = replace(aim, steps_per_stage=max(1, int(steps / aim.stages)))
    return aim


def of_any_length(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, such as a run's, without the curriculum that followed from its steps: from others follows another."""
    has, options = given.get("objective"), given.get("options")
    if not (isinstance(has, Mapping) and isinstance(options, Mapping) and "steps" in options and "recipe" in given):
        return dict(given)
    own = {name: value for name, value in has.items() if name not in _OF_STEPS}
    follows = complete({**given, "objective": own})["objective"]
    kept = {name: value for name, value in has.items() if name in own or value != follows.get(name)}
    return {**given, "objective": kept}


def check_new_weights(paths: object) -> None:
    """ValueError where a network is asked for and paths name its weights."""
    for name in ("init", "teacher"):  # without the first, a student begins as the second
        if isinstance(paths, Mapping) and paths.get(name) is not None:
            raise ValueError(f"network makes new weights, and paths.{name} names others: leave network out")


def trainer(
    given: Mapping[str, Any],
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    group: Ranks | None = None,
    resume: bool | str = False,
    tensorboard: bool = False,
) -> Trainer:
    """A run, ready to start or to go on, from the settings that are given and the recipe's.

    Raises: ValueError, OSError, ImportError: settings, data or checkpoints that do not go together, and why; those of a
        run may have a network beside the model to start from, which wins. RankError: one of these, on another process.
    """
    group = group or Ranks()
    # Apart from what processes do together in a Trainer: one that failed here would answer the others' next question.
    parts = group.together(lambda: _parts(given, device, Path(out) if resume else None))
    with group.connected():
        return Trainer(**parts, out=out, group=group, resume=resume, tensorboard=tensorboard)


def _parts(given: Mapping[str, Any], device: torch.device | str, run: Path | None) -> dict[str, Any]:
    """What a Trainer is made of, by the names of its arguments. run: the folder that is to be gone on with."""
    settings = complete(given)
    if run is not None and checkpoints.newest(run) is None:  # then it begins, with the data as they are
        run = None
    aim, paths = objective(settings), settings["paths"]
    if paths["data"] is None:
        raise ValueError("data is missing: a folder of images, a .npz file, or mnist")
    if aim.needs_teacher and paths["teacher"] is None:
        raise ValueError(f"recipe {settings['recipe']} needs a teacher: the checkpoint of a diffusion model")
    if paths["teacher"] is not None and not aim.needs_teacher:
        raise ValueError(f"recipe {settings['recipe']} takes no teacher; did you mean --init?")
    # A run's config.yaml has what went without saying, too.
    by_hand = run is None and "data_fingerprint" not in given
    if by_hand and settings["network"] != SETTINGS["network"]:
        check_new_weights(paths)
    torch.manual_seed(settings["options"]["seed"])
    teacher = _weights(checkpoint.load_teacher, paths["teacher"]) if aim.needs_teacher else None
    start = teacher if paths["init"] is None else _initial(paths["init"], run)
    if start is not None:
        settings["objective"] |= _levels(start, settings["objective"], given.get("objective", {}))
        aim = objective(settings)
    opening = dict(settings["data"])
    if start is not None and opening["labelled"] is None:
        opening["labelled"] = start.num_classes is not None
    if opening["bounded"] is None:
        opening["bounded"] = start is None or start.bounded
    images = data.open_data(paths["data"], **opening, run=run)
    if by_hand and start is None and isinstance(settings["network"], dict):
        for name, value in _of_data(images).items():
            if (said := settings["network"].get(name, value)) != value:
                raise ValueError(f"network: {name} is that of the data, {value}, got {said!r:.80}: leave it out")
    model = _model(settings, aim, images, start)
    return {
        "model": model.to(device),
        "objective": aim,
        "data": images,
        "options": config.make(TrainOptions, settings["options"], "options"),
        "teacher_model": None if teacher is None else teacher.to(device),
        "lpips": _lpips(settings, device) if settings["objective"].get("loss_norm") == "lpips" else None,
        "settings": settings,
    }


def _initial(path: str | os.PathLike[str], run: Path | None) -> Denoiser:
    """The model to start from. A run that goes on needs no more of it than its checkpoint has: the file may be gone."""
    if run is not None and not os.path.exists(path) and (newest := checkpoints.newest(run)) is not None:
        path = newest / MODEL
    return _weights(checkpoint.load, path)


def _weights(read: Callable[..., Denoiser], path: str | os.PathLike[str]) -> Denoiser:
    """What `load` or `load_teacher` reads; a folder of diffusers as a `UNetModel`, which the files of a run hold, where
    there is one for it."""
    # Weights are float32, whatever a file has: options.dtype says what networks compute in.
    if not os.path.isdir(path):
        return read(path, dtype=torch.float32)
    try:
        return read(path, dtype=torch.float32, convert=True)
    except checkpoint.CheckpointError as error:
        model = read(path, dtype=torch.float32)  # fails again where converting is not the matter
        warnings.warn(
            f"{path} stays a network of diffusers: {error}. What is trained of it is saved as tensors alone, which "
            "cmfast.load does not read, and a run goes on only while the folder is there",
            stacklevel=2,
        )
        return model


def _levels(start: Denoiser, has: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The range of noise levels of the model to start from, and the deviation of its data, as far as an objective has
    them and they were not given."""
    own = {**{name: getattr(start, name) for name in LEVELS}, "sigma_data": start.preconditioner.sigma_data}
    return {name: value for name, value in own.items() if name in has and name not in given}


def _of_data(images: Any) -> dict[str, Any]:
    """What data say of a network. Raises: ValueError: they are no images."""
    if len(images.image_shape) != 3:
        raise ValueError(f"a new network is for [C, H, W], and the data are {list(images.image_shape)}: give --init")
    channels, height, _ = images.image_shape
    numbers = {"image_size": height, "in_channels": channels, "out_channels": channels}
    return {**numbers, "num_classes": images.num_classes}


def _model(settings: Mapping[str, Any], aim: Objective, images: Any, start: Denoiser | None) -> Denoiser:
    """A copy of the model to start from, or new weights; with the scalings and noise levels of the objective."""
    network = settings["network"]
    if start is not None:
        model = copy.deepcopy(start)
    else:
        numbers = _of_data(images)
        channels, height, width = images.image_shape
        fields = dict(NETWORKS[network] if isinstance(network, str) else network)
        try:
            untrusted.check_network(fields, untrusted.COUNTS)
            unet = UNetModel(**{**fields, **numbers})
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise ValueError(f"network: {error}") from error
        factor = 2 ** (unet.num_levels - 1)
        if height % factor or width % factor:
            raise ValueError(f"images are {height} x {width}, and this U-Net takes multiples of {factor}: image_size")
        model = Denoiser(unet, image_shape=(channels, height, width))
    model.bounded = images.bounded
    # Those it learns are those it is sampled from.
    model.sigma_min, model.sigma_max, model.rho = (getattr(aim, name, getattr(model, name)) for name in LEVELS)
    sigma_data = model.preconditioner.sigma_data
    if start is None:
        sigma_data = getattr(aim, "sigma_data", sigma_data)
    model.preconditioner = Preconditioner.by_name(
        aim.preconditioning, sigma_data=sigma_data, sigma_min=model.sigma_min
    )
    if settings["dropout"] is not None:
        for name, layer in model.named_modules():
            # diffusers' `dropout` is of residual blocks alone, too, and its attention has such a layer without use.
            if isinstance(layer, nn.Dropout) and ".to_out." not in name:
                layer.p = float(settings["dropout"])
    return model.requires_grad_(True)


def _lpips(settings: Mapping[str, Any], device: torch.device | str) -> nn.Module:
    from cmfast.perceptual import LPIPS

    paths = settings["paths"]
    return LPIPS(**settings["lpips"], trunk_weights=paths["lpips_trunk"], head_weights=paths["lpips_head"]).to(device)
