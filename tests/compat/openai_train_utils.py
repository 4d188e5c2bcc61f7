"""Small loops of cm.train_util that are quick, and the fixtures of their tests."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cmfast.compat.openai import logger, resample, script_util, train_util
from cmfast.compat.openai.karras_diffusion import KarrasDenoiser


@pytest.fixture(autouse=True, scope="module")
def process_group():
    """The loops make one; other tests start without."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True, name="log_dir")
def folder_of_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    logger.configure(str(tmp_path), ["log"])
    yield tmp_path
    logger.get_current().close()


class Small(nn.Module):
    """Has what float16 training asks of a network: a torso that `convert_to_fp16` casts."""

    def __init__(self, width=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.torso = nn.Conv2d(3, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def convert_to_fp16(self):
        self.torso.half()

    def forward(self, x, timesteps):
        h = self.torso(x.to(self.torso.weight.dtype)).float() + self.time(timesteps[:, None] / 1000)[..., None, None]
        return self.out(self.drop(torch.tanh(h)))


def batches(size=4):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(size, 3, 4, 4, generator=generator) * 2 - 1, {}


def schedule(kind="fixed", scales=4, stage=2):
    return script_util.create_ema_and_scales_fn("fixed", 0.5, kind, scales, scales, 100, stage)


OPTIONS = {
    "batch_size": 4,
    "microbatch": -1,
    "lr": 1e-2,
    "ema_rate": "0.5,0.9",
    "log_interval": 10,
    "save_interval": -1,
    "resume_checkpoint": "",
}


def edm_loop(**changes):
    return train_util.TrainLoop(
        **OPTIONS
        | {
            "model": Small(),
            "diffusion": KarrasDenoiser(),
            "data": batches(),
            "schedule_sampler": resample.LogNormalSampler(),
            "lr_anneal_steps": 3,
        }
        | changes
    )


def cm_loop(mode="consistency_training", kind=train_util.CMTrainLoop, **changes):
    progdist, use_fp16 = mode == "progdist", changes.get("use_fp16", False)
    model, target, teacher = (Small(seed=seed) for seed in range(3))
    if use_fp16:  # as cm_train.py does
        for network in (model, target, teacher):
            network.convert_to_fp16()
    options = {
        "model": model,
        "target_model": target,
        "teacher_model": None if mode == "consistency_training" else teacher,
        "teacher_diffusion": KarrasDenoiser(sigma_data=0.4),
        "training_mode": mode,
        "ema_scale_fn": schedule("progdist" if progdist else "fixed"),
        "total_training_steps": 4,
        "diffusion": KarrasDenoiser(distillation=not progdist, loss_norm="l2", weight_schedule="uniform"),
        "data": batches(),
    }
    return kind(**OPTIONS | options | changes)


def names(folder):
    return sorted(path.name for path in Path(folder).glob("*.pt"))
