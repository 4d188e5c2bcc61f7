"""The public operations: arguments are checked here, then a path is chosen.

Plain functions for people with a sampling or training loop of their own. Each has a fused Triton kernel
(`cmfast.kernels`), taken where one can run, and a reference in plain PyTorch (`cmfast.reference`), which says what is
right and serves everywhere else. `backend("reference" | "triton" | "auto")` chooses; `python -m cmfast info` says what
is taken here and why.
"""

from cmfast.ops._dispatch import BACKENDS, FUSED, SMALL, backend, current_backend, explain
from cmfast.ops.averages import ema_update_
from cmfast.ops.draw import Drawn, draw_levels, draw_pair
from cmfast.ops.dropout import dropout
from cmfast.ops.group_norm import group_norm_silu
from cmfast.ops.images import to_uint8
from cmfast.ops.losses import consistency_loss, loss_weight, snr_weight, weighted_loss
from cmfast.ops.lpips import lpips_input, lpips_layer
from cmfast.ops.noise import add_noise, add_noise_pair, init_noise, normal, renoise, uniform_int
from cmfast.ops.optimizer import adam_ema_, grad_norm, radam_ema_
from cmfast.ops.precondition import c_noise, denoise, denoise_to_uint8, scale_input, scalings
from cmfast.ops.solvers import euler_step, heun_corrector, heun_predictor, midpoint_corrector
from cmfast.reference import WEIGHTINGS, Below, Draw, Grid, Levels, LogNormal

__all__ = [
    "BACKENDS",
    "FUSED",
    "SMALL",
    "WEIGHTINGS",
    "Below",
    "Draw",
    "Drawn",
    "Grid",
    "Levels",
    "LogNormal",
    "adam_ema_",
    "add_noise",
    "add_noise_pair",
    "backend",
    "c_noise",
    "consistency_loss",
    "current_backend",
    "denoise",
    "denoise_to_uint8",
    "draw_levels",
    "draw_pair",
    "dropout",
    "ema_update_",
    "euler_step",
    "explain",
    "grad_norm",
    "group_norm_silu",
    "heun_corrector",
    "heun_predictor",
    "init_noise",
    "loss_weight",
    "lpips_input",
    "lpips_layer",
    "midpoint_corrector",
    "normal",
    "radam_ema_",
    "renoise",
    "scale_input",
    "scalings",
    "snr_weight",
    "to_uint8",
    "uniform_int",
    "weighted_loss",
]
