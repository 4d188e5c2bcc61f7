"""Samples as scripts written for openai's `cm` do: its imports, its calls, and torch.distributed around them."""

import argparse
import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from cm import dist_util, logger
from cm.karras_diffusion import karras_sample
from cm.random_util import get_generator
from cm.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main():
    defaults = model_and_diffusion_defaults()
    own = {"model_path": "", "sampler": "onestep", "steps": 40, "ts": "", "batch_size": 2, "num_samples": 4, "seed": 0}
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, own | defaults)
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, defaults.keys()), distillation=True)
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev()).eval()

    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = get_generator("determ-indiv", args.num_samples, args.seed)
    batches, done = [], 0
    while done < args.num_samples:
        generator.set_done_samples(done)
        labels = (torch.arange(args.batch_size, device=dist_util.dev()) * ranks + rank + done) % NUM_CLASSES
        images = karras_sample(
            diffusion,
            model,
            (args.batch_size, 3, args.image_size, args.image_size),
            steps=args.steps,
            model_kwargs={"y": labels} if args.class_cond else {},
            device=dist_util.dev(),
            sampler=args.sampler,
            generator=generator,
            ts=tuple(int(t) for t in args.ts.split(",")) if args.ts else None,
        )
        gathered = [torch.zeros_like(images) for _ in range(ranks)]
        dist.all_gather(gathered, images)
        # Rank r has the samples r, r + ranks, ...
        batches.append(torch.stack(gathered, 1).flatten(0, 1).cpu())
        done += args.batch_size * ranks

    synced = torch.full((2,), float(rank + 3), device=dist_util.dev())
    dist_util.sync_params([synced])
    logger.set_comm(True)
    logger.logkv_mean("rank", rank)
    means = logger.dumpkvs()
    if rank == 0:
        np.savez(os.path.join(logger.get_dir(), "images.npz"), torch.cat(batches)[: args.num_samples].numpy())
        with open(os.path.join(logger.get_dir(), "facts.json"), "w") as file:
            json.dump(facts(diffusion) | {"means": means, "synced": synced.tolist(), "argv": sys.argv}, file)
    dist.barrier()


def facts(diffusion):
    """What the test asks about the inside of this process."""
    import cm.karras_diffusion

    errors = []
    for statement in ("import cm.losses", "from cm import losses", "from cm.losses import x"):
        try:
            exec(statement)
        except ImportError as error:
            errors.append(str(error))
    return {
        "settings": vars(diffusion),
        "modules": sorted({name.split(".")[0] for name in sys.modules}),
        "same": cm.karras_diffusion is sys.modules["cmfast.compat.openai.karras_diffusion"],
        "errors": errors,
        "path": sys.path[0],
    }


if __name__ == "__main__":
    main()
