"""Faults that a test must catch: `make mutants`.

Each is one line of the package, changed as a person might get it wrong, and the test that turns red by it. The tests
are run in a copy of the checkout, once as it is and once for each fault.

    python tests/mutants.py [--only TEXT] [--list]
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_A_TIME = 2
#: Seconds that one run of pytest may take.
LIMIT = 300
#: Exceptions of a program that is no program: a fault that raises them was written wrong.
BROKEN = re.compile(r"^E +(?:\w+\.)*(SyntaxError|IndentationError|NameError|ImportError|ModuleNotFoundError)\b", re.M)


class Mutant(NamedTuple):
    """A fault: `old` becomes `new` in `file`, and `test`, a pytest node, must fail.

    `old` occurs `count` times, of which the `nth` is changed.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    count: int = 1
    nth: int = 1

    @property
    def interpreted(self) -> bool:
        """Whether its test runs kernels in Triton's interpreter."""
        return self.test.startswith("tests/kernels/")

    def apply(self, text: str) -> str:
        """The text of its file with the fault in it."""
        parts = text.split(self.old)
        return self.old.join(parts[: self.nth]) + self.new + self.old.join(parts[self.nth :])


def _kernel(case: str, test: str = "agrees_with_float64", at: str = "(2, 3, 7, 3)-float32-bfloat16") -> str:
    """A test of every kernel, for one operation."""
    return f"tests/kernels/test_every_op.py::test_{test}[{at}-{case}]"


def _one_level(case: str) -> str:
    return f"tests/kernels/test_every_op.py::test_one_level_for_all[{case}]"


def _layout(case: str, layout: str, shape: str = "(2, 3, 8, 8)") -> str:
    return _kernel(case, "layouts", f"{shape}-{layout}")


def _here(case: str, shape: str = "(2, 3, 7, 3)") -> str:
    """A form for the CPU against float64, for one operation."""
    return f"tests/ops/test_every_op.py::test_what_auto_takes_here[{shape}-{case}]"


def _norm(kind: str, way: str = "one launch", layout: str = "contiguous") -> str:
    """Group normalisation with what stands around it, through a slab or three launches."""
    return f"tests/kernels/test_group_norm.py::test_kinds[{way}-{kind}-{layout}]"


def _loop(name: str, through: str = "network") -> str:
    return f"tests/test_golden.py::test_sampling_loops[{name}-{through}]"


def _loss(name: str, indices: str = "given") -> str:
    return f"tests/test_golden.py::test_consistency_and_progressive_losses[indices {indices}-{name}]"


_EXACT, _NOISE = "tests/kernels/test_exact.py::", "tests/kernels/test_noise.py::"
_BOUNDARY = _EXACT + "test_identity_at_the_boundary_bit_for_bit[0.002-0.5-float32-bfloat16]"
_PIXELS = _EXACT + "test_pixels[(2, 3, 16, 16)-{}]"
_GRADIENT_LAYOUT = "tests/kernels/test_every_op.py::test_layout_of_incoming_gradients[{}]"
_SAME_NOISE = _NOISE + "test_every_operation_draws_the_same_noise[{}]"
_WORDS = _NOISE + "test_integers_are_those_of_the_reference[{}]"
_FORMULAS, _DISPATCH = "tests/ops/test_formulas.py::", "tests/ops/test_dispatch.py::"
_NORM = "tests/kernels/test_group_norm.py::"
_DROPS = _NORM + "test_dropout_keeps_what_the_reference_keeps[one launch-{}-numbers-contiguous]"
_SOUND = "tests/aot/test_programs.py::test_a_program_is_sound[{}-sm_90]"

COMMON = [
    ("offset from the boundary forgotten", "offset = sigma - boundary", "offset = sigma", _BOUNDARY),
    (
        "c_out: root of the wrong sum",
        "tl.sqrt_rn(sigma * sigma + variance)",
        "tl.sqrt_rn(offset * offset + variance)",
        _kernel("denoise"),
    ),
    (
        "c_skip: a square missing",
        "tl.div_rn(variance, offset * offset + variance)",
        "tl.div_rn(variance, offset + variance)",
        _kernel("denoise"),
    ),
    (
        "c_in: a square missing",
        "tl.sqrt_rn(sigma * sigma + sigma_data * sigma_data)",
        "tl.sqrt_rn(sigma + sigma_data * sigma_data)",
        _kernel("scale_input"),
    ),
    (
        "a denoiser's c_skip is 1",
        "return tl.zeros_like(sigma), tl.zeros_like(sigma) + 1.0",
        "return tl.zeros_like(sigma) + 1.0, tl.zeros_like(sigma) + 1.0",
        _kernel("euler_step plain"),
    ),
    ("mask reaches one pixel too far", "pixel < pixels", "pixel <= pixels", _kernel("denoise")),
    ("masked elements count as 1", "other=0.0", "other=1.0", _kernel("consistency_loss l2")),
    (
        "planes and pixels swapped in offsets",
        "return base + pixel * planes + plane",
        "return base + plane * planes + pixel",
        _layout("denoise", "channels_last output"),
    ),
    ("rows counted in 32 bits", "(program // planes // blocks).to(tl.int64)", "(program // planes // blocks)",
     _SOUND.format("denoise")),
    ("blocks counted in 32 bits", "(program // planes % blocks).to(tl.int64)", "(program // planes % blocks)",
     _SOUND.format("denoise")),
    ("planes counted in 32 bits", "(program % planes).to(tl.int64)", "(program % planes)",
     _SOUND.format("denoise clipped, channels_last")),
    ("first sample's level for all", "tl.load(sigma_ptr + row)", "tl.load(sigma_ptr)", _kernel("denoise")),
    ("c_noise written for the first row alone", "if program % (planes * blocks) == 0:", "if program == 0:",
     _kernel("scale_input")),
    ("gradient let through the clip from below", "(value > -1.0) & (value < 1.0), grad", "value < 1.0, grad",
     _kernel("denoise clipped")),
    ("no clamp from above", "tl.where(value > 1.0, 1.0, value)", "value", _kernel("denoise clipped")),
    ("logarithm over the wrong range", "(bits - 0x3F2AAAAB) >> 23", "(bits - 0x3F800000) >> 23",
     _EXACT + "test_network_time_at_any_level[0.0]"),
    ("logarithm of denormal numbers", "tiny = level < 1e-30", "tiny = level < 0.0",
     _EXACT + "test_network_time_at_any_level[0.0]"),
    (
        "network input's gradient not scaled",
        "load_state(grad_state_ptr, at, mask) + c_in * load_state(",
        "load_state(grad_state_ptr, at, mask) + load_state(",
        _kernel("euler_step"),
    ),
    ("trunc and nearest swapped", "if NEAREST:", "if not NEAREST:", _PIXELS.format("contiguous-nearest")),
    (
        "NaN becomes 255",
        "tl.where(level > 0.0, tl.where(level < 255.0, level, 255.0), 0.0)",
        "tl.where(level < 255.0, tl.where(level > 0.0, level, 0.0), 255.0)",
        _PIXELS.format("contiguous-trunc"),
    ),
    ("pixels not clamped", "tl.where(level < 255.0, level, 255.0)", "level", _PIXELS.format("contiguous-trunc")),
]  # fmt: skip

LAUNCH = [
    (
        "a transposed tensor taken as dense",
        "return x if layout(x) is not None else x.contiguous()",
        "return x",
        _layout("denoise", "transposed", "(3, 4, 6, 5)"),
    ),
    (
        "a tensor left in its own layout",
        "return x if x.is_contiguous(memory_format=memory_format) else",
        "return x if layout(x) is not None else",
        _GRADIENT_LAYOUT.format("channels_last-denoise"),
    ),
    ("one scalar level makes all scalar", "not all(level.numel() == 1", "not any(level.numel() == 1",
     _one_level("euler_step")),
    ("samples of one level summed together", "if per_row or rows else", "if per_row else",
     _one_level("weighted_loss l2")),
    ("channels not walked for pixels", "if planes or state_layout != model_layout:",
     "if state_layout != model_layout:", _PIXELS.format("contiguous-trunc")),
    ("layouts of states and outputs swapped", "last = state_layout != CONTIGUOUS, model_layout != CONTIGUOUS",
     "last = model_layout != CONTIGUOUS, state_layout != CONTIGUOUS", _layout("denoise", "channels_last output")),
    ("last block of a sample left out", "-(-self.pixels // (self.block * self.steps))",
     "self.pixels // (self.block * self.steps)", _kernel("denoise", "more_shapes", "(2, 1041)")),
    ("samples without pixels get no c_noise", "return max(1, -(-self.pixels // (self.block * self.steps)))",
     "return -(-self.pixels // (self.block * self.steps))", _kernel("scale_input", "more_shapes", "(2, 3, 0, 4)")),
    ("dtype of results ignored", "dtype=dtype or like.dtype", "dtype=like.dtype", _kernel("scale_input")),
    ("memory format of network inputs ignored", "memory_format=memory_format or layout(like) or CONTIGUOUS",
     "memory_format=layout(like) or CONTIGUOUS", _SAME_NOISE.format("channels_last-(3, 8, 8)")),
]  # fmt: skip

LOSSES = [
    ("snr = 1 / sigma", "tl.div_rn(1.0, level * level)", "tl.div_rn(1.0, level)", _kernel("consistency_loss snr")),
    ("karras weight: a square missing", "tl.div_rn(1.0, weight_sigma_data * weight_sigma_data)",
     "tl.div_rn(1.0, weight_sigma_data)", _kernel("consistency_loss karras")),
    ("truncated snr: minimum for maximum", "tl.where(snr < 1.0, 1.0, snr)", "tl.where(snr > 1.0, 1.0, snr)",
     _kernel("consistency_loss truncated-snr")),
    ("huber without minus c", "tl.sqrt_rn(total + huber_c * huber_c) + huber_c",
     "tl.sqrt_rn(total + huber_c * huber_c)", _kernel("weighted_loss huber")),
    ("huber: c not squared", "tl.sqrt_rn(total + huber_c * huber_c)", "tl.sqrt_rn(total + huber_c)",
     _kernel("weighted_loss huber")),
    ("mean over N + 1", "value = tl.div_rn(total, elements)", "value = tl.div_rn(total, elements + 1.0)",
     _kernel("weighted_loss l1")),
    ("mean over the batch too", "float(self.x.numel() // max(self.x.shape[0], 1))", "float(self.x.numel())",
     _kernel("weighted_loss l2")),
    ("last partial sum dropped", "mask=part < parts, other=0.0", "mask=part < parts - 1, other=0.0",
     _layout("consistency_loss l2", "channels_last output")),
    ("first pixel of the next sample summed too", "model_at, pixel < pixels,", "model_at, pixel <= pixels,",
     _kernel("consistency_loss l2")),
    ("l1 without the absolute value", "total += tl.abs(delta)", "total += delta", _kernel("weighted_loss l1")),
    ("first block of a program summed alone", "for step in range(STEPS):", "for step in range(1):",
     _kernel("consistency_loss l2", "more_shapes", "(2, 3, 64, 64)")),
    ("blocks of a program overlap the next one's", "block * (BLOCK * STEPS) + step", "block * BLOCK + step",
     _EXACT + "test_sums_of_long_samples"),
    ("partial sums of all programs in one place", "tl.store(partial_ptr + tl.program_id(0)",
     "tl.store(partial_ptr + row", _EXACT + "test_sums_of_long_samples"),
    ("huber: 0 / 0", "safe = (root > 0.0) & (root < float(\"inf\"))", "safe = root < float(\"inf\")",
     _EXACT + "test_huber_without_c_at_no_distance"),
    ("gradient of huber: 0 / 0", "tl.where(root == 0.0, 0.0, tl.div_rn(scale, tl.where(root == 0.0, 1.0, root)))",
     "tl.div_rn(scale, root)", _EXACT + "test_huber_without_c_at_no_distance"),
    ("gradient of l2 without the factor 2", "tl.div_rn(2.0 * scale, elements)", "tl.div_rn(scale, elements)",
     _kernel("weighted_loss l2")),
    ("gradient of huber over the distance", "root = tl.load(distance_ptr + row) + huber_c",
     "root = tl.load(distance_ptr + row)", _kernel("weighted_loss huber")),
    ("gradient of the target has the wrong sign", "if TARGET_FROM_OUTPUT else -g", "if TARGET_FROM_OUTPUT else g",
     _kernel("weighted_loss l2")),
    ("gradient of the target's output has the wrong sign", "-c_out_2 * g", "c_out_2 * g",
     _kernel("consistency_loss uniform")),
    ("gradient of the state without c_skip", "c_skip * g if FROM_OUTPUT else g", "g", _kernel("consistency_loss l2")),
    ("first sample's gradient for all", "tl.load(grad_ptr + row)", "tl.load(grad_ptr)", _kernel("weighted_loss l1")),
    ("expanded gradients read as if dense", "grad.contiguous(), *pair", "grad, *pair",
     _GRADIENT_LAYOUT.format("expanded-weighted_loss l2")),
    ("target's D at the student's level", "load_level(next_sigma_ptr, row, PER_ROW)",
     "load_level(sigma_ptr, row, PER_ROW)", _kernel("consistency_loss uniform"), 2, 1),
    ("gradient of the target at the student's level", "load_level(next_sigma_ptr, row, PER_ROW)",
     "load_level(sigma_ptr, row, PER_ROW)", _kernel("consistency_loss uniform"), 2, 2),
    ("gradient of weights without the distance", "(grad * distance).sum_to_size", "grad.sum_to_size",
     _kernel("weighted_loss l2")),
    ("weights taken for levels", "sigma if isinstance(weight, str) else weight", "sigma",
     _kernel("consistency_loss l2")),
]  # fmt: skip

NOISE = [
    ("noise of the input's level", "value = load_level(sigma_ptr, row, PER_ROW) * eps", "value = level * eps",
     _kernel("add_noise churn")),
    ("c_in of the noise's level", "level = load_level(input_sigma_ptr, row, PER_ROW)",
     "level = load_level(sigma_ptr, row, PER_ROW)", _kernel("add_noise churn")),
    ("c_in of the other point", "input_scale(next_level, sigma_data, PLAIN) * value_2",
     "input_scale(level, sigma_data, PLAIN) * value_2", _kernel("add_noise_pair")),
    ("c_noise of the other point", "store_noise_level(c_noise_2_ptr, row, planes, blocks, next_level",
     "store_noise_level(c_noise_2_ptr, row, planes, blocks, level", _kernel("add_noise_pair")),
    ("gradient of noise by one level", "level * g + next_level * g_2", "level * (g + g_2)", _kernel("add_noise_pair")),
    ("gradient of noise without sigma", "load_level(sigma_ptr, row, PER_ROW) * g", "g", _kernel("add_noise")),
]  # fmt: skip

NORMAL = [
    ("high word of the key is 0", "_signed_word(seed >> 32)", "0", _WORDS.format("numbers-0-1099511627779")),
    ("draw ignored", "draw if isinstance(draw, Tensor) else _signed_word(draw)", "0", _WORDS.format("numbers-1-0")),
    ("groups reach over channels", "math.prod(state.shape[2:]) % 4", "math.prod(state.shape[2:]) % 2",
     _layout("renoise drawn", "channels_last output", "(3, 4, 6, 5)")),
]  # fmt: skip

PHILOX = [
    ("high word of a seed on the device is 0", "high = low >> 32 if SEED_TENSOR else load_word(seed_high, False)",
     "high = load_word(seed_high, False)", _WORDS.format("tensors-0-1099511627779")),
    ("high word of the index ignored", "(sample >> 32).to(tl.uint32)", "(sample * 0).to(tl.uint32)",
     _WORDS.format("numbers-0-0")),
    ("sine and cosine swapped in a quadrant", "swap = (quadrant & 1) == 1", "swap = (quadrant & 1) == 0",
     _NOISE + "test_box_muller_at_the_ends"),
    ("sign of the cosine in a quadrant", "tl.where(((quadrant + 1) & 2) == 2, -c, c)",
     "tl.where((quadrant & 2) == 2, -c, c)", _NOISE + "test_box_muller_at_the_ends"),
    ("a digit of the sine's polynomial", "0.00833277590572834", "0.00832277590572834",
     _NOISE + "test_box_muller_at_the_ends"),
    ("u may be 0", "* 2.3283064365386963e-10 + 1.1641532182693481e-10", "* 2.3283064365386963e-10",
     _NOISE + "test_box_muller_at_the_ends"),
    ("cosine and sine in the wrong order", "return radius * cosine, radius * sine",
     "return radius * sine, radius * cosine", _NOISE + "test_normals_are_those_of_the_reference[torch.float32-(5,)]"),
    ("elements joined in the wrong order", "tl.join(tl.join(z_0, z_2), tl.join(z_1, z_3))",
     "tl.join(tl.join(z_0, z_1), tl.join(z_2, z_3))",
     _NOISE + "test_normals_are_those_of_the_reference[torch.float32-(5,)]"),
    ("groups counted in elements", "group = first // 4 + tl.arange", "group = first + tl.arange",
     _NOISE + "test_normals_are_those_of_the_reference[torch.float32-(3, 64, 64)]"),
    ("the same noise in every channel", "first = plane * pixels + block * BLOCK", "first = block * BLOCK",
     _SAME_NOISE.format("channels_last-(3, 8, 8)")),
]  # fmt: skip

IMAGES = [
    ("channels not moved where one tensor has them last", "all(layout(b) != CONTIGUOUS", "any(layout(b) != CONTIGUOUS",
     _PIXELS.format("channels_last output-trunc")),
]  # fmt: skip

PRECONDITION = [
    ("state and output swapped", "_denoise_fwd_kernel, denoised, model_output, x_t,",
     "_denoise_fwd_kernel, denoised, x_t, model_output,", _kernel("denoise")),
    ("gradient of the output without c_out", "c_out * g", "g", _kernel("denoise")),
    ("gradient in its own layout", "grad = dense(grads[0], x_t)", "grad = dense(grads[0])",
     _GRADIENT_LAYOUT.format("channels_last-denoise")),
    ("layouts of a gradient swapped", "plan(grad, grad_x, sigma)", "plan(grad_x, grad, sigma)",
     _GRADIENT_LAYOUT.format("channels_last-scale_input")),
]  # fmt: skip

RENOISE = [
    ("sigma_min forgotten in the noise's scale", "(next_level - sigma_min) * (next_level + sigma_min)",
     "next_level * next_level", _BOUNDARY),
    ("NaN below sigma_min", "tl.maximum((next_level - sigma_min) * (next_level + sigma_min), 0.0)",
     "(next_level - sigma_min) * (next_level + sigma_min)", _EXACT + "test_nothing_is_added_below_sigma_min"),
    ("c_in of the level before", "input_scale(next_level, sigma_data, PLAIN) * value",
     "input_scale(load_level(sigma_ptr, row, PER_ROW), sigma_data, PLAIN) * value", _kernel("renoise")),
    ("noise clamped with D", "(clamp(value) if CLIP else value) + _noise_scale(next_level, sigma_min) * eps",
     "clamp(value + _noise_scale(next_level, sigma_min) * eps)", _kernel("renoise")),
    ("gradient of noise without sigma_min", "_noise_scale(next_level, sigma_min) * g", "next_level * g",
     _kernel("renoise clipped")),
]  # fmt: skip

SOLVERS = [
    ("step in the wrong direction", "PLAIN, CLIP)) * tl.div_rn(next_level - level, level)",
     "PLAIN, CLIP)) * tl.div_rn(level - next_level, level)", _kernel("euler_step")),
    ("euler: c_in of the level before", "input_scale(next_level, sigma_data, PLAIN) * value",
     "input_scale(level, sigma_data, PLAIN) * value", _kernel("euler_step"), 2, 1),
    ("heun: c_in of the level before", "input_scale(next_level, sigma_data, PLAIN) * value",
     "input_scale(level, sigma_data, PLAIN) * value", _kernel("heun_corrector"), 2, 2),
    ("euler: gradient of x without its slope's", "g + ratio * g + c_skip * g_denoised", "g + c_skip * g_denoised",
     _kernel("euler_step")),
    ("heun: no Euler step at the end", "tl.where(ends, change, change_2)", "change_2",
     _kernel("heun_corrector end")),
    ("heun: gradient of half a step at the end", "tl.where(ends, 1.0, 0.5) * ratio * g", "0.5 * ratio * g",
     _kernel("heun_corrector end")),
    ("heun: a second slope's gradient at the end", "tl.where(ends, 0.0, 0.5 * ratio_2) * g", "0.5 * ratio_2 * g",
     _kernel("heun_corrector end")),
    ("midpoint by the first slope", "value = state + change_2",
     "value = state + e * tl.div_rn(next_level - level, level)", _kernel("midpoint_corrector")),
    ("second D of the first state", "denoised(f_2, state_2, c_skip_2", "denoised(f_2, state, c_skip_2",
     _kernel("heun_corrector")),
    ("second slope over the first level", "change_2 = e_2 * tl.div_rn(next_level - level, safe)",
     "change_2 = e_2 * tl.div_rn(next_level - level, level)", _kernel("heun_corrector")),
    ("gradient through the second state without its step", "g_e += ratio_mid * g_x_2", "g_e += g_x_2",
     _kernel("heun_corrector")),
    ("clip of the second D by the first state", "unclipped(f_2, state_2,", "unclipped(f_2, state,",
     _kernel("midpoint_corrector clipped")),
    ("heun: second slope at the first level",
     "tensors = model_output, model_output_next, x_t, sigma, next_sigma, next_sigma",
     "tensors = model_output, model_output_next, x_t, sigma, sigma, next_sigma", _kernel("heun_corrector"), 2, 1),
]  # fmt: skip

NORM_TILES = [
    ("rows of scale taken for dense", "row * scale_stride + channel", "row * shift_stride * 0 + channel",
     _norm("film")),
    ("shift of the first sample for all", "row * shift_stride + channel", "channel", _norm("film")),
    ("shift scaled too", "bias * factor + load_state(shift_ptr, row * shift_stride + channel, live)",
     "(bias + load_state(shift_ptr, row * shift_stride + channel, live)) * factor", _norm("film")),
    ("groups of another size", "(k // GROUP)[None, :]", "(k // GROUPS)[None, :]", _norm("plain")),
    ("two Newton steps", "    r = r * (2.0 - d * r)\n    r = r * (2.0 - d * r)\n", "    r = r * (2.0 - d * r)\n",
     _norm("plain")),
    ("groups of dropout's counters by channels alone", "tl.int64)[:, None] * ((channels + 3) // 4)",
     "tl.int64)[:, None] * (channels // 4)", _DROPS.format("(3, 30, 5, 7)-5")),
    ("words in the wrong order", "tl.join(tl.join(a, c), tl.join(b, d))", "tl.join(tl.join(a, b), tl.join(c, d))",
     _DROPS.format("(3, 30, 5, 7)-5")),
    ("what is kept not scaled", "keep_scale, 0.0)", "1.0, 0.0)", _norm("dropout")),
    ("slabs that share a counter of dropout", "if last else (4,)", "if last else (1,)",
     _DROPS.format("(3, 30, 5, 7)-5")),
    ("a projection's rows copied", "t if t.stride(-1) == 1 else t.contiguous()", "t.contiguous()",
     _NORM + "test_rows_of_a_projection_are_not_copied"),
    ("columns taken for dense", "t if t.stride(-1) == 1 else t.contiguous()", "t",
     _NORM + "test_layouts[one launch-sliced]"),
    ("last part of a map left out", "-(-self.pixels // (self.rows * self.steps))",
     "max(1, self.pixels // (self.rows * self.steps))", _norm("plain", "three launches")),
    ("part of a map counted in 32 bits", "(program // tiles % parts).to(tl.int64)", "(program // tiles % parts)",
     _SOUND.format("group_norm_silu, 192 of 64x64")),
    ("slabs of more than registers hold", "(16384, 8192)", "(65536, 32768)",
     _SOUND.format("group_norm_silu, 384 of 16x16, sum")),
    ("slabs of less than a sector for many samples", "(slab >= units[0] or ", "(True or ",
     _NORM + "test_slabs_are_whole_groups_that_share_no_counter[192]"),
]  # fmt: skip

NORM = [
    ("statistics of the sum before it is rounded", "value = rounded.to(tl.float32)", "value = value.to(tl.float32)",
     _NORM + "test_dtypes[one launch-bfloat16-contiguous]"),
    ("the bias where there is no element", "tl.where(mask, value + x_bias[None, :], 0.0)", "value + x_bias[None, :]",
     _NORM + "test_a_large_bias[three launches-sum]"),
    ("SiLU without its factor", "z = z * sigmoid(z)", "z = sigmoid(z)", _norm("plain")),
    ("variance of a sample", "over_group(squares, GROUP, GROUPS, CHANNELS), count)",
     "over_group(squares, GROUP, GROUPS, CHANNELS), count - 1.0)", _norm("plain")),
    ("rest of the mean forgotten", "    value -= rest[None, :]\n", "",
     _NORM + "test_large_means[one launch--1000.0-x_bias-contiguous]"),
    ("variances of E[x^2] - E[x]^2", "    center = tl.div_rn(tl.sum(value, 0), tl.minimum(pixels - start, ROWS).to(",
     "    center = 0.0 * tl.div_rn(tl.sum(value, 0), tl.minimum(pixels - start, ROWS).to(",
     _NORM + "test_large_means[three launches-50.0-film-contiguous]"),
    ("first tile of a part alone", "for step in range(1, STEPS):", "for step in range(1, 1):",
     _norm("plain", "three launches", "channels_last")),
    ("parts of equal weight", "tl.where(part < parts, tl.minimum(pixels - part * PART, PART), 0)",
     "tl.where(part < parts, PART, 0)", _norm("plain", "three launches", "channels_last")),
    ("channels' means not told apart", "+ mean * mean * count)", ")", _norm("plain", "three launches")),
    ("eps of the deviation", "tl.sqrt_rn(variance + eps))", "(tl.sqrt_rn(variance) + eps))", _norm("all")),
    ("a bias that is in the sum already, again", "(residual is None) == alone", "True",
     _norm("sum", "three launches")),
]  # fmt: skip

NORM_BWD = [
    ("slope of SiLU without its second part", "dz *= s * (1.0 + z * (1.0 - s))", "dz *= s", _norm("plain")),
    ("dropout forgotten in the backward pass", "    if DROPOUT:\n        dz *= kept(",
     "    if False:\n        dz *= kept(", _norm("dropout")),
    ("gradient of the scale without the bias", "weight * s_2 + bias * s_1", "weight * s_2", _norm("film")),
    ("gradient of the weight without the scale", "factor * s_2, mask=live", "s_2, mask=live", _norm("film")),
    ("gradient through the variance forgotten", " - xhat * mean_2[None, :])", ")", _norm("plain")),
    ("gradient through the mean without the weight", "over_group(gain * s_1,", "over_group(s_1,", _norm("plain")),
    ("gradient of the sum's own use forgotten", "    if TOTAL:\n        grad +=", "    if False:\n        grad +=",
     _norm("residual")),
    ("mean of the sum without its bias", "        mean -= load_state(x_bias_ptr, channel, live)\n", "        pass\n",
     _norm("x_bias")),
    ("first tile of a part alone", "for step in range(STEPS):", "for step in range(1):",
     _norm("plain", "three launches", "channels_last"), 2, 1),
    ("gradient of the first tile of a part alone", "for step in range(STEPS):", "for step in range(1):",
     _norm("plain", "three launches", "channels_last"), 2, 2),
    ("a map's gradient in its own layout", "grad = dense(grad, x)", "grad = dense(grad)",
     _NORM + "test_layout_of_incoming_gradients[one launch-channels_last]"),
]  # fmt: skip

NORM_OP = [
    ("x kept where the sum would do", "(total[0], None) if total else (x, x_bias)", "(x, x_bias)",
     _NORM + "test_only_what_was_normalised_is_kept"),
    ("gradient of the sum not added to that of x", "grad_sum if grads[0] is None else grads[0] + grad_sum", "grad_sum",
     _NORM + "test_gradients_of_gradients[all]"),
    ("parameters taken for noise levels", "*tensors, draw, levels=False)", "*tensors, draw)",
     "tests/ops/test_compile.py::test_group_norm[triton-training-all-a slab]"),
]  # fmt: skip

REFERENCE_NORM = [
    ("variance of a sample", "correction=0", "correction=1",
     "tests/ops/test_group_norm.py::test_is_what_pytorchs_modules_make"),
    ("statistics of the sum before it is rounded", "(total + residual.to(wide)).to(x.dtype)",
     "(total + residual.to(wide))", "tests/ops/test_group_norm.py::test_rounds_once[sum-torch.bfloat16]"),
    ("scale without one", "z * (1 + scale.to(wide)", "z * (scale.to(wide)",
     "tests/ops/test_group_norm.py::test_is_what_pytorchs_modules_make"),
    ("groups of dropout's counters reach over pixels", "groups = -(-count // 4)", "groups = -(-count // 2)",
     "tests/ops/test_group_norm.py::TestDropout::test_words_are_philoxs"),
    ("words below the threshold kept", "word >= min(", "word < min(",
     "tests/ops/test_group_norm.py::TestDropout::test_keeps_as_many_as_it_should"),
]  # fmt: skip

AUTOGRAD = [
    ("results kept for the backward pass returned too", "results[: len(results) - keep]",
     "results[: len(results) - keep + 1]", _kernel("weighted_loss l2")),
    ("kept results off by one", "saved = output[len(output) - ctx.keep :]",
     "saved = output[len(output) - ctx.keep - 1 :]", _kernel("weighted_loss huber")),
    ("kept distances dropped", '{"saved": ctx.saved_tensors[count:]} if ctx.keep else {}', "{}",
     _kernel("weighted_loss huber")),
    ("c_noise carries a gradient", "*(() if levels_vary else [output[i] for i in c_noise])", "",
     _kernel("euler_step", "the_same_results_carry_gradients", "levels given")),
    ("c_noise never carries a gradient", "() if levels_vary else [output[i] for i in c_noise]",
     "[output[i] for i in c_noise]", _kernel("euler_step")),
    ("no gradients of levels", "if needed[i] and results[i] is None", "if False", _kernel("denoise")),
    ("one tensor for two inputs gets the gradient of both", "x.view_as(x) if isinstance(x, Tensor)",
     "x if isinstance(x, Tensor)", "tests/kernels/test_every_op.py::test_one_tensor_as_two_inputs"),
]  # fmt: skip

DISPATCH = [
    ("backend not put back", "_chosen.reset(token)", "pass", _DISPATCH + "test_backend_nests_and_ends"),
    ("kernels take float64", "KERNEL_DTYPES = (torch.float32,", "KERNEL_DTYPES = (torch.float64, torch.float32,",
     _DISPATCH + "test_reasons"),
    ("dtypes of inputs not looked at", "[*(tensor.dtype for tensor in tensors if tensor.is_floating_point()), *dtypes]",
     "dtypes", _DISPATCH + "test_reasons"),
    ("dtypes of results not looked at", "is_floating_point()), *dtypes]", "is_floating_point())]",
     _DISPATCH + "test_dtypes_of_results_count"),
    ("in-place forms in half precision", ' or x.dtype != torch.float32 for x in tensors', " for x in tensors",
     "tests/ops/test_every_op.py::test_large_batches_take_the_forms_that_write_in_place"),
    ("in-place forms where a graph is recorded", "any(x.requires_grad for x in tensors)", "False",
     _here("euler_step")),
]  # fmt: skip

INPLACE = [
    ("variances of PyTorch in channels_last trusted", "> LARGE_MEAN)", "> float(\"inf\"))",
     "tests/ops/test_group_norm.py::test_large_means_in_channels_last"),
    ("the batch overwritten by a sum", "if records or total is x else total.add_(residual)", "if records else "
     "total.add_(residual)", "tests/ops/test_group_norm.py::test_nothing_that_was_given_changes[residual-contiguous]"),
    ("a denoiser's output overwritten", "model_output.to(torch.float32, copy=True)", "model_output.to(torch.float32)",
     "tests/ops/test_every_op.py::test_nothing_that_was_given_changes[denoise plain]"),
    ("the state overwritten", "(x_t * c_skip).addcmul_", "x_t.mul_(c_skip).addcmul_",
     "tests/ops/test_every_op.py::test_nothing_that_was_given_changes[denoise]"),
    ("lerp by the inverse", "_beside(next_sigma, x_t) / _beside(sigma, x_t)",
     "_beside(sigma, x_t) / _beside(next_sigma, x_t)", _here("euler_step")),
    ("heun: the whole first slope", "torch.lerp(x_t, x_2, 0.5)", "torch.lerp(x_t, x_2, 1.0)", _here("heun_corrector")),
    ("heun: Euler only where all samples end", "if bool(ends.any()):", "if bool(ends.all()):",
     _here("heun_corrector end", "(3, 4, 16, 16)")),
    ("huber without minus c", ".sqrt_().sub_(huber_c)", ".sqrt_()", _here("weighted_loss huber")),
    ("gradient of huber: 0 / 0", "torch.where(length > 0, scale / length, 0.0)", "scale / length",
     _FORMULAS + "test_huber_without_c_has_gradient_zero_at_zero"),
    ("gradient of l2 without the factor 2", '(2 if norm == "l2" else 1) / max', "1 / max", _here("weighted_loss l2")),
    ("gradient of the target has the wrong sign", "grad_target = grad_x.neg()", "grad_target = grad_x.clone()",
     _here("weighted_loss l2")),
    ("student's gradient by c_skip", 'options["sigma_data"], options["boundary"])[1])',
     'options["sigma_data"], options["boundary"])[0])', _here("consistency_loss l2")),
    ("target's D at the student's level", "_denoised(target, x_t2, next_sigma, *sizes)",
     "_denoised(target, x_t2, sigma, *sizes)", _here("consistency_loss uniform")),
]  # fmt: skip

REFERENCE_PRECONDITION = [
    ("c_skip without the boundary", "c_skip = sigma_data**2 / (offset**2 + sigma_data**2)",
     "c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)", "tests/test_golden.py::test_scalings_and_denoise[bc]"),
    ("c_out without the boundary", "c_out = sigma_data * offset /", "c_out = sigma_data * sigma /",
     "tests/test_golden.py::test_scalings_and_denoise[bc]"),
    ("c_in: root missing", "c_in = 1 / (sigma**2 + sigma_data**2) ** 0.5", "c_in = 1 / (sigma**2 + sigma_data**2)",
     "tests/test_golden.py::test_scalings_and_denoise[edm]"),
    ("EDM's c_noise", "250.0 * torch.log(sigma + 1e-44)", "0.25 * torch.log(sigma + 1e-44)", _FORMULAS + "test_steps"),
    ("an infinite state reaches a denoiser", "return clip_unit(model_output.to(wide), clip)",
     "return clip_unit(0 * x_t.to(wide) + model_output.to(wide), clip)",
     _FORMULAS + "test_a_function_is_its_own_denoiser"),
]  # fmt: skip

REFERENCE_LOSSES = [
    ("snr = 1 / sigma", "snr_weight(sigma**-2,", "snr_weight(sigma**-1,",
     "tests/test_golden.py::test_loss_weights[snr]"),
    ("karras weight: a square missing", "snr + 1.0 / sigma_data**2", "snr + 1.0 / sigma_data",
     "tests/test_golden.py::test_loss_weights[karras]"),
    ("truncated snr: minimum for maximum", "snr.clamp(min=1)", "snr.clamp(max=1)",
     "tests/test_golden.py::test_loss_weights[truncated-snr]"),
    ("huber without minus c", ".sqrt(), 0) - huber_c", ".sqrt(), 0)", _FORMULAS + "test_distances"),
    ("huber has slope NaN at 0", "torch.where(positive, radicand, 1).sqrt()", "radicand.sqrt()",
     _FORMULAS + "test_huber_without_c_has_gradient_zero_at_zero"),
    ("l2 not squared", "distance = delta.square().mean(1)", "distance = delta.abs().mean(1)",
     _FORMULAS + "test_distances"),
]  # fmt: skip

REFERENCE_NOISE = [
    ("nine rounds of Philox", "for _ in range(10):", "for _ in range(9):",
     _FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("a digit of a multiplier", "0xCD9E8D57", "0xCD9E8D37",
     _FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("high word of the key is 0", "seed & _MASK, (seed >> 32) & _MASK", "seed & _MASK, 0",
     _FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("high word of the index ignored", "((index >> 32) & _MASK).expand(shape)", "(index * 0).expand(shape)",
     _NOISE + "test_normals_are_those_of_the_reference[torch.float32-(5,)]"),
    ("draw ignored", "draw_word.expand(shape)", "(0 * draw_word).expand(shape)",
     _FORMULAS + "TestCounterNoise::test_draws_seeds_and_indices_differ"),
    ("radius without the factor 2", "torch.sqrt(-2 * torch.log(", "torch.sqrt(-torch.log(",
     _FORMULAS + "TestCounterNoise::test_is_normal"),
    ("sigma_min forgotten in the noise's scale", "((level - sigma_min) * (level + sigma_min))", "(level * level)",
     _FORMULAS + "test_renoise"),
    ("c_in of the noise's level", "level = sigma if input_sigma is None else input_sigma", "level = sigma",
     _here("add_noise churn")),
]  # fmt: skip

REFERENCE_SOLVERS = [
    ("heun: sum of the slopes, not their mean", "0.5 * (d + d_next) * dt", "(d + d_next) * dt",
     _FORMULAS + "test_steps"),
    ("heun: NaN at the end", "torch.where(at_zero, torch.ones_like(next_sigma), next_sigma)", "next_sigma",
     _FORMULAS + "test_heun_is_euler_where_the_next_level_is_zero"),
    ("midpoint by the first slope", "x_t.to(wide) + d_mid * dt", "x_t.to(wide) + d * dt", _FORMULAS + "test_steps"),
    ("slope over the next level", "(x.to(wide) - denoised) / per_sample(sigma, x, wide)",
     "(denoised - x.to(wide)) / per_sample(sigma, x, wide)", _FORMULAS + "test_steps"),
]  # fmt: skip

REFERENCE_IMAGES = [
    ("NaN becomes 255", "nan_to_num(nan=0.0)", "nan_to_num(nan=255.0)", _FORMULAS + "test_to_uint8"),
    ("pixels not clamped", ".clamp(0, 255)", "", _FORMULAS + "test_to_uint8"),
    ("trunc and nearest swapped", 'if rounding == "nearest":', 'if rounding == "trunc":', _FORMULAS + "test_to_uint8"),
]  # fmt: skip

REFERENCE_LPIPS = [
    ("mean over the channels", ".sum(1).mean((1, 2))", ".mean((1, 2, 3))",
     "tests/test_perceptual.py::test_layer_is_the_formula"),
]  # fmt: skip

PRECONDITIONER = [
    ("EDM with the boundary of a consistency model", "return cls(sigma_data, 0.0)", "return cls(sigma_data)",
     "tests/test_denoiser.py::test_identity_at_the_boundary"),
    ("a model's sigma_min forgotten", "return cls.consistency(sigma_data, sigma_min)",
     "return cls.consistency(sigma_data)", "tests/test_denoiser.py::test_preconditioner_by_name"),
]  # fmt: skip

DENOISER = [
    ("clip forgotten in steps", '"clip": self.clip, "dtype": self.dtype', '"clip": False, "dtype": self.dtype',
     _loop("euler.5.plain.bc.clip")),
    ("clip forgotten in D", "sigma, clip=self.clip, **self.scaling", "sigma, clip=False, **self.scaling",
     _loop("onestep.40.plain.bc.clip")),
    ("a hooked Denoiser evaluated by its network", " and not _intercepted(model)", "",
     "tests/test_engine_changes.py::test_a_changed_model[eager-hook_the_denoiser]"),
    ("an overridden Denoiser evaluated by its network", " and type(model).forward is Denoiser.forward", "",
     "tests/test_denoiser.py::test_an_overridden_denoiser_is_called_as_a_whole"),
    ("boundary of the default model for all", '"boundary": preconditioner.boundary}', '"boundary": 0.002}',
     _loop("euler.5.plain.edm.noclip")),
]  # fmt: skip

SCHEDULES = [
    ("levels evenly spaced", "(high + fraction * (low - high)) ** rho", "(high + fraction * (low - high)) ** 1",
     "tests/test_golden.py::test_karras_sigmas"),
    ("N intervals for N - 1", "index / max(num_scales - 1, 1)", "index / num_scales",
     "tests/test_golden.py::test_karras_sigmas"),
    ("last step not at the grid's end", "round(i * 39 / steps)", "round(i * 40 / steps)",
     "tests/test_schedules.py::test_step_sigmas"),
    ("sigma_down from the level before", "return next_sigma * ratio,", "return sigma * ratio,",
     "tests/test_schedules.py::test_ancestral_levels"),
    ("sigma_up: a square missing", "(1 - ratio**2) ** 0.5", "(1 - ratio) ** 0.5",
     "tests/test_schedules.py::test_ancestral_levels"),
    ("number of scales: end not counted", "((end_scales + 1) ** 2", "(end_scales**2",
     "tests/test_golden.py::test_ema_and_scales"),
    ("progdist: last stages as short as the others", "distill_steps_per_iter * 2", "distill_steps_per_iter",
     "tests/test_schedules.py::test_progdist_halves_then_lingers"),
]  # fmt: skip

TRAINING_LOSSES = [
    ("target at the student's level", "_grid_sigma(indices + 1, num_scales, x_start, levels)",
     "_grid_sigma(indices, num_scales, x_start, levels)", _loss("ct.l2.uniform")),
    ("an index beyond the grid drawn", "_draw_indices(indices, num_scales - 1, x_start)",
     "_draw_indices(indices, num_scales, x_start)", _loss("ct.l2.uniform", "drawn")),
    ("another dropout mask for the target", "            restore()\n", "            pass\n",
     "tests/test_losses.py::test_student_and_target_see_the_same_dropout"),
    ("solvers swapped", 'if solver == "euler":', 'if solver != "euler":', _loss("cd.l2.uniform")),
    ("student's input given to a model of other scalings", "if evaluate.input_options == maker.input_options:",
     "if True:", "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("target's input at the student's level", "second, next_sigma))", "second, sigma))",
     "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("target's D by the student's scalings", "target[0].scaling != student.scaling", "False",
     "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("progressive: N levels, not N intervals", "_grid_sigma(indices + part, num_scales + 1,",
     "_grid_sigma(indices + part, num_scales,", _loss("pd.l2.uniform")),
    ("progressive: lerp from the wrong end", "torch.lerp(x_t, x_next, ratio)", "torch.lerp(x_next, x_t, ratio)",
     _loss("pd.l2.uniform")),
    ("huber: c without the root of the dimension", "(x[0].numel() if len(x) else 1) ** 0.5",
     "(x[0].numel() if len(x) else 1)", "tests/test_losses.py::test_huber_c_grows_with_the_image"),
]  # fmt: skip

SAMPLERS = [
    ("multistep: noise of the level before", "            sigma[i + 1],\n            take(noise_fn, x),",
     "            sigma[i],\n            take(noise_fn, x),", _loop("multistep.40.plain.bc.clip")),
    ("multistep: default sigma_min", "            sigma_min=sigma_min,\n", "",
     "tests/test_samplers.py::test_a_model_brings_its_own_noise_range"),
    ("churn by too much", "min(s_churn / steps, 2**0.5 - 1)", "s_churn / steps", _loop("heun.6.churn.bc.noclip")),
    ("churn: a square missing", "max(hat**2 - level**2, 0.0) ** 0.5", "max(hat - level, 0.0) ** 0.5",
     _loop("heun.6.churn.bc.noclip")),
    ("churn: s_noise forgotten", "[s_noise * max(hat", "[max(hat", _loop("heun.6.churn.bc.noclip")),
    ("churn at every level", "gamma > 0 and bool(low <= np.float32(sigma) <= high)", "gamma > 0",
     "tests/test_samplers.py::test_churn_adds_noise_only_between_its_bounds"),
    ("midpoint of the levels themselves", "((hat ** (1 / 3) + to ** (1 / 3)) / 2) ** 3", "(hat + to) / 2",
     _loop("dpm.5.plain.bc.noclip")),
    ("ancestral: a step to the next level", "ops.euler_step(model_output, x, sigma[i], down[i],",
     "ops.euler_step(model_output, x, sigma[i], sigma[i + 1],", _loop("ancestral.5.plain.bc.noclip")),
    ("progdist steps to 0", "levels[:-1] if levels[-1] == 0 else levels", "levels",
     _loop("progdist.4.plain.edm.clip")),
    ("midpoint ancestral: time not moved", "(times[i] + h / 2) * batch", "times[i] * batch",
     "tests/test_samplers.py::test_midpoint_ancestral_takes_the_time_of_the_midpoint"),
]  # fmt: skip

GRAPHED = "tests/test_engine_graphs.py::test_"
CHANGED = "tests/test_engine_changes.py::test_"
COMPILED = "tests/test_engine_compile.py::test_"

GRAPHS = [
    ("numbers are filled in once", "elif value != self._filled.get(name):", "elif name not in self._filled:",
     GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("tensors are not filled in", "                buffer.copy_(value)\n", "                pass\n",
     GRAPHED + "generate_from_given_noise[3-None]"),
    ("seeds of more than 63 bits", "_signed(value) if isinstance(value, int) else value", "value",
     GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("levels are made anew", "            with keep_levels(self._levels):\n                return loop(dict(",
     "            if True:\n                return loop(dict(", GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("warm-up moves a generator on", "                generator.set_state(state)\n", "                pass\n",
     GRAPHED + "noise_from_a_generator[3]"),
    ("generators are not registered", "_captured(function, space, model, generators)",
     "_captured(function, space, model, ())", GRAPHED + "noise_from_a_generator[3]"),
    ("strides are no part of a kind", "return value.shape, value.stride(), value.dtype, value.device",
     "return value.dtype, value.device", GRAPHED + "denoise_takes_every_shape"),
    ("the program used last goes", "self._programs.popitem(last=False)", "self._programs.popitem(last=True)",
     GRAPHED + "the_cache_has_a_bound"),
    ("use does not keep a program", "            self._programs.move_to_end(key)\n", "            pass\n",
     GRAPHED + "the_cache_has_a_bound"),
    ("what broke a capture is not looked for", "                broken = error.__context__  # type",
     "                broken = error  # type", GRAPHED + "a_broken_capture_names_the_module"),
    ("a module that is left counts as running", "        running.pop()\n", "        pass\n",
     GRAPHED + "a_capture_that_breaks_outside_of_modules"),
]  # fmt: skip

RUNNER = [
    ("moved weights are no reason to capture anew", "if change in (Change.STORAGE, Change.STRUCTURE):",
     "if change is Change.STRUCTURE:", CHANGED + "a_changed_model[graph-swap_storage]"),
    ("derived weights stay as they were", "        if change is not Change.NOTHING:\n",
     "        if change is Change.STORAGE:\n", CHANGED + "derived_weights[True-False]"),
    ("graphs read derived weights that were replaced", "        if replaced:\n", "        if False:\n",
     CHANGED + "derived_weights[True-True]"),
    ("what a refresh writes counts as a change", "        self._watch.settle()\n        if replaced:",
     "        if replaced:", CHANGED + "derived_weights[True-False]"),
    ("a network's own attributes count as changes", "                self._watch.settle()\n",
     "                pass\n",
     CHANGED + "attributes_that_a_network_writes_itself_are_its_own"),
    ("hooks are passed over", "self.model if self._hooked() else self._prepared.model", "self._prepared.model",
     COMPILED + "hooks_are_called_all_the_same[True]"),
    ("graphs of models with hooks", "return self._hooked() or self._unseen() or self._broken",
     "return self._unseen() or self._broken", CHANGED + "a_changed_model[graph-hook]"),
    ("a broken capture is tried again", "                self._broken = str(error)\n", "",
     GRAPHED + "a_broken_capture_names_the_module"),
    ("a graph of any backend", "        ops.current_backend(),\n", "", GRAPHED + "a_backend_is_captured_for_itself"),
    ("graphs under autocast", "if torch.is_autocast_enabled(device.type):", "if False:",
     GRAPHED + "no_graph_under_autocast"),
    ("buffers of an inference mode", "with torch.inference_mode(False), self._graph_space().turn():",
     "with self._graph_space().turn():", GRAPHED + "inference_mode"),
    ("a graph that was asked for is not had", "                elif self._cuda_graph is True:\n",
     "                elif False:\n", GRAPHED + "generate_from_functions_and_draws_runs_eagerly"),
    ("a model in training mode", "with self._evaluating(), torch.no_grad():", "with torch.no_grad():",
     CHANGED + "a_changed_model[eager-train]"),
]  # fmt: skip

WATCH = [
    ("pointers are not compared", "if list(map(Tensor.data_ptr, self._tensors)) != self._pointers:", "if False:",
     CHANGED + "what_changed"),
    ("members are not compared",
     "if not all(map(is_, chain.from_iterable(map(dict.values, self._parts)), self._members)):", "if False:",
     CHANGED + "what_changed"),
    ("containers that were empty", "if any(self._empty) or list(", "if list(",
     CHANGED + "what_counts_as_another_structure[child]"),
    ("classes are not compared", "getattr(cls, name) is body for", "True for",
     CHANGED + "what_counts_as_another_structure[class]"),
    ("a cast is a move", "return Change.STRUCTURE if cast else Change.STORAGE", "return Change.STORAGE",
     CHANGED + "what_counts_as_another_structure[half]"),
    ("methods of torch's own modules", " or self._torchs_sizes() != self._torchs", "", CHANGED + "what_changed"),
    ("the first to leave restores", "                if not _held[module]:\n", "                if True:\n",
     CHANGED + "evaluating_is_exact_and_counts"),
    ("all in training mode after", "if module in _held or module.training]", "if True]",
     CHANGED + "a_changed_model[eager-train_a_part]"),
]  # fmt: skip

NETWORKS = [
    ("torch.compile gives up at eight", "    with torch._dynamo.config.patch(limits):\n", "    if True:\n",
     COMPILED + "the_blocks_of_a_network"),
    ("a copy's children are the original's", "copy.__dict__[\"_modules\"] = dict(module._modules)", "pass",
     COMPILED + "a_copy_shares_the_weights"),
    ("dtype without an optimised network", "    if own != dtype:\n", "    if False:\n",
     COMPILED + "dtype_goes_to_what_optimises"),
]  # fmt: skip

TRANSFER = [
    ("the host's memory is handed out", "return self.staged.clone()", "return self.staged",
     "tests/test_engine.py::test_batches_are_handed_out_one_later_where_copies_travel"),
]  # fmt: skip

MEMORY = [
    ("one image more than fits", "    return fits\n", "    return too_large\n",
     "tests/test_engine.py::test_a_batch_that_does_not_fit[5]"),
    ("messages of allocators", "any(part in str(error) for part in _MESSAGES)", "False",
     "tests/test_engine.py::test_a_batch_that_does_not_fit[0]"),
]  # fmt: skip

ENGINE = [
    ("the tail's labels", "labels[-1:].expand(-n % size)", "labels[:1].expand(0)",
     "tests/test_engine.py::test_tail_is_bit_equal_at_one_batch_size"),
    ("a batch is handed out at once", "if len(copies) > copies.ahead:", "if len(copies):",
     "tests/test_engine.py::test_batches_are_handed_out_one_later_where_copies_travel"),
    ("noise that is left over", "            given.check_used()\n", "",
     GRAPHED + "noise_of_the_wrong_number[3-2 are drawn]"),
]  # fmt: skip

SHARDING = [
    ("batches in a row", "starts[group.rank :: group.size], n, labels", "starts[group.rank :], n, labels",
     "tests/test_sharding.py::test_any_number_of_ranks[7-2]"),
    ("the other ranks wait", "failed = torch.tensor([int(failure is not None)])", "failed = torch.tensor([0])",
     "tests/test_sharding.py::test_a_rank_that_fails_later[1]"),
]  # fmt: skip

CONVERTED = "tests/compat/test_diffusers_convert.py::test_"
SCHEDULED = "tests/compat/test_diffusers_scheduler.py::test_"
ACCELERATED = "tests/compat/test_diffusers_pipeline.py::test_"
DIFFUSERS = "cmfast/compat/diffusers/"

DIFFUSERS_CONFIG = [
    ("the middle attention without normalisation", "in ((32,) if scale_shift else (None, 32)):", "in (None, 32):",
     CONVERTED + "what_cannot_be_converted_from[attn_norm_num_groups-1]"),
    ("unknown options are passed over", 'not key.startswith("_") and value:', 'not key.startswith("_") and False:',
     CONVERTED + "what_cannot_be_converted_from[learned_skip-]"),
    ("a head of one width at every level", "for width in attended}\n    if len(dims) == 1:",
     "for width in attended}\n    if dims:", CONVERTED + "what_cannot_be_converted_to[num_head_channels-1]"),
    ("a width that rounds down", "if int(multiple * base) == width else", "if True else",
     CONVERTED + "every_width_is_met"),
]  # fmt: skip

DIFFUSERS_CONVERT = [
    ("keys before queries", '("to_q", "to_k", "to_v")', '("to_k", "to_q", "to_v")',
     CONVERTED + "same_outputs_and_back[imagenet-like]"),
    ("upsampling beside attention", 'f"output_blocks.{index}.{1 + attends}"', 'f"output_blocks.{index}.1"',
     CONVERTED + "same_outputs_and_back[imagenet-like]"),
    ("weights are shared", "{name: tensor.clone() for name, tensor in state.items()}, assign", "state, assign",
     CONVERTED + "converted_weights_are_copies"),
    ("left-over weights", '("not expected", state.keys() - wanted)', '("not expected", set())',
     CONVERTED + "weights_that_do_not_fit"),
]  # fmt: skip

DIFFUSERS_SCHEDULER = [
    ("timesteps are looked up by value", "if timestep.untyped_storage()._cdata == schedule.untyped_storage()._cdata:",
     "if False:", SCHEDULED + "nothing_is_read_on_the_host[2]"),
    ("a sample that was changed", "ready[0] is sample and ready[1] == sample._version", "ready[0] is sample",
     SCHEDULED + "the_fused_input_is_used_once_and_only_for_an_unchanged_sample"),
    ("another sample", "ready[0] is sample and ready[1] == sample._version", "True",
     SCHEDULED + "the_fused_input_is_used_once_and_only_for_an_unchanged_sample"),
    ("the input of a level that s_noise made", "if config.s_noise == 1 and not", "if not",
     SCHEDULED + "same_numbers_of_other_configurations[s_noise]"),
    ("s_noise once", "math.sqrt(scale**2 * (sigma", "math.sqrt(scale * (sigma",
     SCHEDULED + "same_numbers_of_other_configurations[s_noise]"),
    ("no noise drawn at the last step", "if len(self.timesteps) > 1:", "if following < count - 1:",
     ACCELERATED + "callbacks_leave_generators_in_step"),
    ("a step of the wider dtype", "torch.promote_types(sample.dtype, model_output.dtype)", "sample.dtype",
     SCHEDULED + "mixed_dtypes"),
    ("saved under this module's name", "CMStochasticIterativeScheduler.__module__ = _Base.__module__\n", "",
     SCHEDULED + "saved_as_diffusers_own"),
    ("begin_index in the middle", "self.begin_index if self.step_index is None else self.step_index]",
     "self.begin_index]", SCHEDULED + "add_noise[fp32]"),
]  # fmt: skip

DIFFUSERS_PIPELINE = [
    ("one draw too few", "for _ in levels]", "for _ in levels[1:]]",
     ACCELERATED + "same_images[as given-conditional-two]"),
    ("labels before latents", "        channels = self.unet.config.in_channels\n",
     "        torch.randint(0, 2, (1,))\n        channels = self.unet.config.in_channels\n",
     ACCELERATED + "same_images[as given-conditional-one]"),
    ("x_T of the first level, not of sigma_max", "sample.to(wide) / levels[0]",
     "sample.to(wide) / self.scheduler.init_noise_sigma",
     ACCELERATED + "same_images[as given-conditional-[30, 12, 5]]"),
    ("s_noise forgotten", "z if s_noise == 1 else s_noise * z", "z", ACCELERATED + "settings_of_the_scheduler[noise]"),
    ("pixels cut off", '"nearest" if', '"trunc" if', ACCELERATED + "output_types[3-pil]"),
    ("offloading is passed over", 'if any("_hf_hook" in vars(m) or', "if any(",
     ACCELERATED + "what_is_in_the_way_is_said"),
    ("another network", "engine.unet is not self.unet or", "", ACCELERATED + "changes_are_seen[as given]"),
    ("another scheduler", " or engine.config != self.scheduler.config", "",
     ACCELERATED + "changes_are_seen[as given]"),
    ("labels of two kinds", "labels = labels.to(torch.int64)\n", "pass\n",
     ACCELERATED + "it_runs_as_one_graph[as given]"),
    ("every callback", "if i % callback_steps == 0:", "if True:", ACCELERATED + "callbacks[as given]"),
]  # fmt: skip

_FAST = "tests/fast/test_optimize.py::test_"
_WINOGRAD_STRIP = "tests/fast/test_winograd.py::test_every_strip[(3, 64, 6, 10)-strip5000]"
_FAST_OUTPUT = _FAST + "outputs[{}-8-torch.float32]"


FAST_PLAN = [
    (
        "1x1 taken for any",
        "!= expected or conv.bias is None",
        "!= expected and conv.bias is None",
        _FAST + "errors",
    ),
    (
        "a subclass passes",
        "if type(module) not in kinds:",
        "if not isinstance(module, kinds):",
        _FAST + "a_parametrised_weight_is_used",
    ),
    ("parts with a pass of their own", 'if "forward" in vars(module):', 'if "pass" in vars(module):', _FAST + "errors"),
    ("down for up", 'return Resample("up", conv)', 'return Resample("down", conv)', _FAST_OUTPUT.format("resampling")),
    ("a skip is forgotten", "if type(skip) is nn.Identity else", "if True else", _FAST_OUTPUT.format("published")),
    (
        "scale and shift always",
        "scale_shift=module.use_scale_shift_norm",
        "scale_shift=True",
        _FAST_OUTPUT.format("added"),
    ),
]

FAST_FORWARD = [
    ("no skip", "skips.append(h)", "skips.append(skips[0])", _FAST_OUTPUT.format("published")),
    ("skips in order", "skips.pop())), emb", "skips.pop(0))), emb", _FAST_OUTPUT.format("published")),
    ("halves the wrong way", "scale, shift = emb.chunk", "shift, scale = emb.chunk", _FAST_OUTPUT.format("published")),
    ("embedding without SiLU", "F.linear(F.silu(emb)", "F.linear((emb)", _FAST_OUTPUT.format("published")),
    (
        "attention without x",
        "residual = x.settle()\n        # Views",
        "residual = h\n        # Views",
        _FAST_OUTPUT.format("published"),
    ),
    ("SiLU before attention", "block.norm, silu=False)", "block.norm, silu=True)", _FAST_OUTPUT.format("published")),
    ("heads mixed", "permute(2, 0, 3, 1, 4)", "permute(2, 0, 3, 1, 4).flip(0)", _FAST_OUTPUT.format("heads")),
    (
        "another epsilon",
        '"eps": norm.eps',
        '"eps": 10 * norm.eps',
        "tests/fast/test_diffusers.py::test_outputs[other groups-torch.float32]",
    ),
    ("dropout in evaluation", "return dropout.training and dropout.p > 0", "return dropout.p > 0", _FAST + "dropout"),
    (
        "one mask for all",
        "self._draw._replace(draw=self._draw.draw + 1)",
        "self._draw._replace(draw=0)",
        "tests/fast/test_masks.py::test_masks_differ_from_layer_to_layer",
    ),
    ("another mask when recomputing", "            self._draw = draw\n", "            pass\n", _FAST + "dropout"),
    (
        "bias twice",
        "return Sum(self.convolve(h, conv, bias=False), residual",
        "return Sum(self.convolve(h, conv), residual",
        "tests/kernels/test_optimize.py::test_outputs_and_gradients[published]",
    ),
    (
        "one bias of two",
        "(block.skip.bias, block.out_conv.bias)",
        "(block.skip.bias,)",
        "tests/kernels/test_optimize.py::test_outputs_and_gradients[published]",
    ),
    (
        "the sum is forgotten",
        "        x.settle(total)\n",
        "",
        "tests/kernels/test_optimize.py::test_launches_of_the_published_network",
    ),
    (
        "the result in another dtype",
        "plan.out_conv).to(x.dtype)",
        "plan.out_conv)",
        _FAST + "outputs[published-8-torch.bfloat16]",
    ),
]

FAST_WEIGHTS = [
    (
        "old weights",
        "elif kept.signature != _signature(parameters):",
        "elif False:",
        _FAST + "changes_are_seen[model-None-changed_in_place]",
    ),
    (
        "versions are not looked at",
        "0 if p.is_inference() else p._version",
        "0",
        _FAST + "changes_are_seen[model-torch.bfloat16-changed_in_place]",
    ),
    ("weights for another shape", "kept is None or kept.shape != shape", "kept is None", _FAST + "another_batch_size"),
    ("new memory", "if not fits or made.is_mkldnn:", "if True:", _FAST + "refresh"),
    ("force is nothing", "if force or kept.signature", "if kept.signature", _FAST + "refresh"),
    (
        "tensors of inference mode",
        "torch.inference_mode(False), torch.no_grad()",
        "torch.no_grad()",
        _FAST + "inference_mode",
    ),
    (
        "a copy for nothing",
        "and parameter.is_contiguous(memory_format=torch.channels_last):",
        "and False:",
        _FAST + "weights_of_the_right_kind_are_not_copied",
    ),
]

FAST_WINOGRAD = [
    ("wrong sign", "(2, 1, -1), (1, 3, -1))", "(2, 1, 1), (1, 3, -1))", _WINOGRAD_STRIP),
    ("wrong filter", "(0.5, -0.5, 0.5)", "(0.5, 0.5, 0.5)", _WINOGRAD_STRIP),
    ("bias at another place", "(0, 0, 5, 10)", "(0, 0, 6, 9)", _WINOGRAD_STRIP),
    ("no zeros around", "        edge.zero_()", "        edge.fill_(1.0)", _WINOGRAD_STRIP),
    ("residual of another strip", "added[place])", "added[:samples, : 2 * rows])", _WINOGRAD_STRIP),
    (
        "odd sizes",
        "and not any(size % 2 for size in h.shape[2:])",
        "",
        "tests/fast/test_winograd.py::test_what_it_does_not_do[odd]",
    ),
    (
        "strides",
        "        and conv.stride == (1, 1)\n",
        "",
        "tests/fast/test_winograd.py::test_what_it_does_not_do[stride]",
    ),
    (
        "strips that differ",
        "for d in range(min(limit, number), 1, -1) if number % d == 0), 1)",
        "for d in range(min(limit, number), 1, -1)), 1)",
        "tests/fast/test_winograd.py::test_strips_are_alike",
    ),
    (
        "other transforms when compiled",
        "parts[1] - parts[2] - parts[3]",
        "parts[1] - parts[2] + parts[3]",
        "tests/fast/test_winograd.py::test_transforms_for_a_compiler[(3, 64, 6, 10)]",
    ),
]

FAST_NETWORK = [
    (
        "compiling asks nothing",
        "return _passes[number].refusal is None",
        "return True",
        _FAST + "compiling_sees_what_changed_before",
    ),
    ("changes of structure", "is not Change.STRUCTURE:", "is not None:", _FAST + "a_lora_is_called"),
    ("hooks are skipped", "self._reason or self._watch.hooked(root=False)", "self._reason", _FAST + "a_hook_is_called"),
    ("its own hooks count", "hooked(root=False)  # type", "hooked()  # type", _FAST + "a_hook_is_called"),
    (
        "packed where gradients flow",
        "packed = not (waits or differentiable)",
        "packed = not (waits or live)",
        _FAST + "gradient_of_the_input_alone[published]",
    ),
    (
        "autocast is ignored",
        "if self.dtype is None and torch.is_autocast_enabled",
        "if False and torch.is_autocast_enabled",
        _FAST + "autocast_is_the_dtype[published]",
    ),
    ("float64 packed", "return dtype == torch.float32 and", "return", _FAST + "float64"),
]


MUTANTS = [
    Mutant(name, file, *rest)
    for file, faults in {
        "kernels/common.py": COMMON,
        "kernels/launch.py": LAUNCH,
        "kernels/losses.py": LOSSES,
        "kernels/group_norm.py": NORM,
        "kernels/group_norm_bwd.py": NORM_BWD,
        "kernels/group_norm_tiles.py": NORM_TILES,
        "kernels/noise.py": NOISE,
        "kernels/normal.py": NORMAL,
        "kernels/philox.py": PHILOX,
        "kernels/images.py": IMAGES,
        "kernels/precondition.py": PRECONDITION,
        "kernels/renoise.py": RENOISE,
        "kernels/solvers.py": SOLVERS,
        "cmfast/ops/_autograd.py": AUTOGRAD,
        "cmfast/ops/group_norm.py": NORM_OP,
        "cmfast/ops/_dispatch.py": DISPATCH,
        "cmfast/ops/_inplace.py": INPLACE,
        "cmfast/reference/precondition.py": REFERENCE_PRECONDITION,
        "cmfast/reference/losses.py": REFERENCE_LOSSES,
        "cmfast/reference/noise.py": REFERENCE_NOISE,
        "cmfast/reference/solvers.py": REFERENCE_SOLVERS,
        "cmfast/reference/images.py": REFERENCE_IMAGES,
        "cmfast/reference/group_norm.py": REFERENCE_NORM,
        "cmfast/reference/lpips.py": REFERENCE_LPIPS,
        "cmfast/precondition.py": PRECONDITIONER,
        "cmfast/denoiser.py": DENOISER,
        "cmfast/schedules.py": SCHEDULES,
        "cmfast/losses.py": TRAINING_LOSSES,
        "cmfast/samplers.py": SAMPLERS,
        "cmfast/graphs.py": GRAPHS,
        "cmfast/runner.py": RUNNER,
        "cmfast/watch.py": WATCH,
        "cmfast/fast/plan.py": FAST_PLAN,
        "cmfast/fast/forward.py": FAST_FORWARD,
        "cmfast/fast/weights.py": FAST_WEIGHTS,
        "cmfast/fast/winograd.py": FAST_WINOGRAD,
        "cmfast/fast/network.py": FAST_NETWORK,
        "cmfast/networks.py": NETWORKS,
        "cmfast/transfer.py": TRANSFER,
        "cmfast/memory.py": MEMORY,
        "cmfast/engine.py": ENGINE,
        "cmfast/sharding.py": SHARDING,
        DIFFUSERS + "config.py": DIFFUSERS_CONFIG,
        DIFFUSERS + "convert.py": DIFFUSERS_CONVERT,
        DIFFUSERS + "scheduler.py": DIFFUSERS_SCHEDULER,
        DIFFUSERS + "pipeline.py": DIFFUSERS_PIPELINE,
    }.items()
    for name, *rest in faults
]


def copy_of_the_checkout(folder: Path) -> Path:
    """What git tracks or would add, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def pytest(tree: Path, interpreted: bool, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in a copy, whose package is the one imported; nothing compiled is kept from one run to the next."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CMFAST_BACKEND", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # A second of each run, and no test here uses them.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, f"no end after {LIMIT} seconds", "")


def red_without_a_fault(trees: list[Path], mutants: list[Mutant]) -> str:
    """What pytest says of the tests where one fails or is skipped with no fault in; else nothing."""
    tests = [sorted({m.test for m in mutants if m.interpreted == interpreted}) for interpreted in (False, True)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [pool.submit(pytest, trees[i % len(trees)], bool(i), *ids) for i, ids in enumerate(tests) if ids]
        done = [run.result() for run in runs]
    bad = [run for run in done if run.returncode or "skipped" in run.stdout.splitlines()[-1]]
    return "\n".join(run.stdout + run.stderr for run in bad)


def verdict(run: subprocess.CompletedProcess) -> tuple[str, str]:
    """(killed, SURVIVED or error, why)."""
    summary = next((line for line in reversed(run.stdout.splitlines()) if line.strip()), "")
    if run.returncode == 0:
        return "SURVIVED", summary
    broken = BROKEN.search(run.stdout)
    # A canary is looked at after its test, which is an error to pytest.
    red = re.search(r"\b\d+ failed\b", summary) or re.search(r"^E +AssertionError", run.stdout, re.M)
    if run.returncode != 1 or broken or not red:
        return "error", broken.group(1) if broken else summary or run.stderr[-300:]
    return "killed", ""


def try_out(mutant: Mutant, trees: queue.Queue[Path]) -> tuple[str, str]:
    tree, start = trees.get(), time.monotonic()
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        if text.count(mutant.old) != mutant.count:
            result, why = "error", f"its line occurs {text.count(mutant.old)} times, not {mutant.count}"
        else:
            path.write_text(mutant.apply(text), encoding="utf-8")
            result, why = verdict(pytest(tree, mutant.interpreted, mutant.test))
    finally:
        path.write_text(text, encoding="utf-8")
        trees.put(tree)
    where = "" if result == "killed" else f"\n          {mutant.test}\n          {why}"
    print(f"{result:9} {mutant.file}: {mutant.name} ({time.monotonic() - start:.0f} s){where}", flush=True)
    return result, why


def main() -> int:
    parser = argparse.ArgumentParser(description="Make faults one by one, each of which must turn a test red.")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in their name, file or test")
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, and make none")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if arguments.only in f"{m.file}: {m.name} {m.test}"]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.file}: {mutant.name}\n    {mutant.test}")
        return 0
    if not mutants:
        parser.error(f"no fault has {arguments.only!r} in its name, file or test")
    with tempfile.TemporaryDirectory(prefix="cmfast-mutants-") as folder:
        copies = [copy_of_the_checkout(Path(folder, str(i))) for i in range(AT_A_TIME)]
        print(f"{len(mutants)} faults; first their tests without one", flush=True)
        red = red_without_a_fault(copies, mutants)
        if red:
            print(red, "The tests must pass, and not be skipped, before a fault is made.", sep="\n")
            return 2
        trees: queue.Queue[Path] = queue.Queue()
        for copy in copies:
            trees.put(copy)
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            results = [result for result, _ in pool.map(lambda mutant: try_out(mutant, trees), mutants)]
    killed = results.count("killed")
    print(f"{killed} passed, {len(results) - killed} failed")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
