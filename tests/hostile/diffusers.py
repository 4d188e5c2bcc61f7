"""Folders of diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cmfast
from tests.hostile.files import Payload, kind, opens


def pipeline(folder: Path) -> Path:
    from tests.compat.diffusers_utils import small_unet as unet

    unet().save_pretrained(folder / "pipe" / "unet")
    (folder / "pipe" / "scheduler").mkdir()
    return folder / "pipe"


def edited(name: str, change: Callable[[dict], Any]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        path = pipeline(folder) / name
        made = change(json.loads(path.read_text()) if path.exists() else {})
        path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
        return folder / "pipe"

    return make


UNET, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
for what, name, change, said in [
    ("no JSON", UNET, lambda c: b"{", "not valid JSON"),
    ("no text", UNET, lambda c: b"\xff\xfe{}", "not valid JSON"),
    ("deep JSON", UNET, lambda c: b"[" * 100_000, "not valid JSON"),
    ("a list", UNET, lambda c: [c], "holds a list"),
    ("another class", UNET, lambda c: c | {"_class_name": "os.system"}, "holds a os.system"),
    ("no widths", UNET, lambda c: c | {"block_out_channels": []}, "damaged"),
    ("widths that are text", UNET, lambda c: c | {"block_out_channels": ["a", "b"]}, "damaged"),
    ("unknown blocks", UNET, lambda c: c | {"down_block_types": ["Evil", "Evil"]}, "could not be loaded"),
    ("other widths than its weights", UNET, lambda c: c | {"block_out_channels": [64, 96]}, "could not be loaded"),
    ("a scheduler without a name", "scheduler/scheduler_config.json", lambda c: {"sigma_min": 1}, "does not say which"),
    ("another scheduler", "scheduler/scheduler_config.json", lambda c: {"_class_name": "DDPMScheduler"}, "DDPMSched"),
    ("a noise level that is text", "scheduler/scheduler_config.json",
     lambda c: {"_class_name": "CMStochasticIterativeScheduler", "sigma_min": "x"}, "sigma_min of the scheduler"),
]:  # fmt: skip
    kind(f"diffusers: {what}", said)(edited(name, change))
for what, change in [
    ("huge widths", {"block_out_channels": [2**14, 2**14]}),
    ("layers without number", {"layers_per_block": 10**9}),
    ("classes without number", {"num_class_embeds": 10**8}),
    ("a huge embedding", {"time_embedding_dim": 2**20}),
]:
    kind(f"diffusers: {what}", "parameters or more", bomb=True)(edited(UNET, lambda c, change=change: c | change))


@kind("diffusers: weights cut short", "could not be loaded")
def _(folder, canary):
    path = pipeline(folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])
    return folder / "pipe"


@kind("diffusers: no weights", "could not be loaded")
def _(folder, canary):
    (pipeline(folder) / WEIGHTS).unlink()
    return folder / "pipe"


@kind("diffusers: hostile pickle for weights", "could not be loaded")
def _(folder, canary):
    path = pipeline(folder) / WEIGHTS
    path.unlink()
    torch.save({"conv_in.weight": Payload(canary)}, path.with_suffix(".bin"))
    return folder / "pipe"


@kind("diffusers: an empty folder", "is no diffusers folder")
def _(folder, canary):
    (folder / "pipe").mkdir()
    return folder / "pipe"


opens("diffusers")(cmfast.load)
