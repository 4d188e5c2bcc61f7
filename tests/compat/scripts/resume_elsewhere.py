"""Goes on on two ranks, each of which looks for checkpoints in a folder of its own, as on two machines."""

import json
import os
import sys

import torch
import torch.distributed as dist
from cm import dist_util, logger, train_util
from cm.karras_diffusion import KarrasDenoiser
from cm.resample import LogNormalSampler


class Small(torch.nn.Conv2d):
    def forward(self, x, timesteps):
        return super().forward(x)


def batches():
    while True:
        yield torch.rand(2, 3, 4, 4), {}


def main():
    dist_util.setup_dist()
    torch.manual_seed(dist.get_rank())
    folder = os.path.join(sys.argv[1], f"node{dist.get_rank()}")
    logger.configure(folder, [])
    os.chdir(folder)
    last = "model000002.pt"
    train_util.find_resume_checkpoint = lambda: last if os.path.exists(last) else None
    loop = train_util.TrainLoop(
        model=Small(3, 3, 1),
        diffusion=KarrasDenoiser(),
        data=batches(),
        batch_size=2,
        microbatch=-1,
        lr=0.1,
        ema_rate="0.9",
        log_interval=10,
        save_interval=-1,
        resume_checkpoint="",
        schedule_sampler=LogNormalSampler(),
        lr_anneal_steps=int(sys.argv[2]),
    )
    start = loop.step
    loop.run_loop()
    weights = torch.cat([p.detach().flatten() for p in [*loop.model.parameters(), *loop.ema_params[0]]])
    with open(os.path.join(sys.argv[1], f"facts-{dist.get_rank()}.json"), "w") as file:
        json.dump({"start": start, "step": loop.step, "weights": weights.tolist()}, file)


if __name__ == "__main__":
    main()
