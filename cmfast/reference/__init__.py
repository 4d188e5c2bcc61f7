"""The operations in plain PyTorch: what is right.

Every function here takes any floating dtype, float64 included, and any device, imports torch alone,
and is the yardstick of every fast path. Coefficients and sums are computed in float32 (float64 when an
input is float64), whatever the dtype of the tensors; results are rounded once, at the end.
"""

from cmfast.reference.averages import ema_update_
from cmfast.reference.draw import (
    LEVEL_DRAW,
    Below,
    Grid,
    Levels,
    LogNormal,
    draw_index,
    draw_levels,
    draw_pair,
    level_below,
    level_gap,
)
from cmfast.reference.dropout import dropout
from cmfast.reference.group_norm import dropout_mask, group_norm_silu
from cmfast.reference.images import to_uint8
from cmfast.reference.losses import WEIGHTINGS, consistency_loss, loss_weight, snr_weight, weighted_loss
from cmfast.reference.lpips import lpips_input, lpips_layer
from cmfast.reference.noise import Draw, add_noise, add_noise_pair, init_noise, normal, renoise, uniform_int
from cmfast.reference.optimizer import adam_ema_, grad_norm, radam_ema_
from cmfast.reference.philox import philox4x32
from cmfast.reference.precondition import c_noise, denoise, denoise_to_uint8, scale_input, scalings
from cmfast.reference.solvers import euler_step, heun_corrector, heun_predictor, midpoint_corrector

__all__ = [
    "LEVEL_DRAW",
    "WEIGHTINGS",
    "adam_ema_",
    "Below",
    "Draw",
    "Grid",
    "Levels",
    "LogNormal",
    "add_noise",
    "add_noise_pair",
    "c_noise",
    "consistency_loss",
    "denoise",
    "denoise_to_uint8",
    "draw_index",
    "draw_levels",
    "draw_pair",
    "dropout",
    "dropout_mask",
    "ema_update_",
    "euler_step",
    "grad_norm",
    "group_norm_silu",
    "heun_corrector",
    "heun_predictor",
    "init_noise",
    "level_below",
    "level_gap",
    "loss_weight",
    "lpips_input",
    "lpips_layer",
    "midpoint_corrector",
    "normal",
    "philox4x32",
    "radam_ema_",
    "renoise",
    "scale_input",
    "scalings",
    "snr_weight",
    "to_uint8",
    "uniform_int",
    "weighted_loss",
]
