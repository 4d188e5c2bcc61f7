"""Trains as scripts written for openai's `cm` do: EDM, or a consistency model in one of three ways."""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
from cm import dist_util, logger
from cm.image_datasets import load_data
from cm.resample import create_named_schedule_sampler
from cm.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    cm_train_defaults,
    create_ema_and_scales_fn,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from cm.train_util import CMTrainLoop, TrainLoop

OPTIONS = {
    "lr": 1e-3,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "microbatch": -1,
    "ema_rate": "0.9",
    "log_interval": 1,
    "save_interval": 10,
    "resume_checkpoint": "",
    "fp16_scale_growth": 1e-3,
}


def main():
    own = {"data_dir": "", "schedule_sampler": "uniform", "global_batch_size": 8}
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, own | OPTIONS | model_and_diffusion_defaults() | cm_train_defaults())
    args = parser.parse_args()
    dist_util.setup_dist()
    logger.configure()
    edm = args.training_mode == "edm"

    settings = args_to_dict(args, model_and_diffusion_defaults().keys())
    settings["distillation"] = "consistency" in args.training_mode
    networks = []
    for dropout in (args.dropout, args.dropout, args.teacher_dropout):
        network, diffusion = create_model_and_diffusion(**settings | {"dropout": dropout})
        networks.append(network.to(dist_util.dev()).train())
    model, target, teacher = networks
    if args.teacher_model_path:
        teacher.load_state_dict(dist_util.load_state_dict(args.teacher_model_path, map_location="cpu"))
        model.load_state_dict(teacher.state_dict())
    dist_util.sync_params(model.parameters())
    target.load_state_dict(model.state_dict())
    if args.use_fp16 and not edm:
        for network in networks:
            network.convert_to_fp16()

    batch_size = args.global_batch_size // dist.get_world_size()
    options = args_to_dict(args, OPTIONS) | {
        "model": model,
        "diffusion": diffusion,
        "data": load_data(
            data_dir=args.data_dir, batch_size=batch_size, image_size=args.image_size, class_cond=args.class_cond
        ),
        "batch_size": batch_size,
        "use_fp16": args.use_fp16,
        "schedule_sampler": create_named_schedule_sampler(args.schedule_sampler, diffusion),
    }
    if edm:
        loop = TrainLoop(**options)
    else:
        loop = CMTrainLoop(
            target_model=target,
            teacher_model=teacher if args.teacher_model_path else None,
            teacher_diffusion=create_model_and_diffusion(**settings | {"distillation": False})[1],
            training_mode=args.training_mode,
            ema_scale_fn=create_ema_and_scales_fn(
                target_ema_mode=args.target_ema_mode,
                start_ema=args.start_ema,
                scale_mode=args.scale_mode,
                start_scales=args.start_scales,
                end_scales=args.end_scales,
                total_steps=args.total_training_steps,
                distill_steps_per_iter=args.distill_steps_per_iter,
            ),
            total_training_steps=args.total_training_steps,
            **options,
        )
    start = loop.step
    loop.run_loop()
    report(loop, start)


def report(loop, start):
    """What the test asks about the inside of every process."""
    mine = {
        "start": start,
        "step": loop.step,
        "weights": torch.cat([p.detach().flatten() for p in loop.mp_trainer.master_params]).double().sum().item(),
        "losses_seen": loop.schedule_sampler._loss_counts.tolist(),
        "draw": torch.rand(()).item(),
        "loss_norm": loop.diffusion.loss_norm,
        "modules": sorted({name.split(".")[0] for name in sys.modules}),
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        with open(os.path.join(logger.get_dir(), "facts.json"), "w") as file:
            json.dump(everyone, file)


if __name__ == "__main__":
    main()
