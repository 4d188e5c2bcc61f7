"""The operations in plain PyTorch: what is right.

Every function here takes any floating dtype, float64 included, and any device, imports torch alone,
and is the yardstick of every fast path. Coefficients and sums are computed in float32 (float64 when an
input is float64), whatever the dtype of the tensors; results are rounded once, at the end.
"""

from cmfast.reference.group_norm import dropout_mask, group_norm_silu
from cmfast.reference.images import to_uint8
from cmfast.reference.losses import WEIGHTINGS, consistency_loss, loss_weight, snr_weight, weighted_loss
from cmfast.reference.lpips import lpips_layer
from cmfast.reference.noise import (
    Draw,
    add_noise,
    add_noise_pair,
    init_noise,
    normal,
    philox4x32,
    renoise,
    uniform_int,
)
from cmfast.reference.precondition import c_noise, denoise, denoise_to_uint8, scale_input, scalings
from cmfast.reference.solvers import euler_step, heun_corrector, heun_predictor, midpoint_corrector

__all__ = [
    "Draw",
    "WEIGHTINGS",
    "add_noise",
    "add_noise_pair",
    "c_noise",
    "consistency_loss",
    "denoise",
    "denoise_to_uint8",
    "dropout_mask",
    "euler_step",
    "group_norm_silu",
    "heun_corrector",
    "heun_predictor",
    "init_noise",
    "loss_weight",
    "lpips_layer",
    "midpoint_corrector",
    "normal",
    "philox4x32",
    "renoise",
    "scale_input",
    "scalings",
    "snr_weight",
    "to_uint8",
    "uniform_int",
    "weighted_loss",
]
