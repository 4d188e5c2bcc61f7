"""What the kernels share on the device: tiles of a batch, scalings from sigma, and the denoised value.

A batch is rows x planes x pixels. Where all tensors of a call lie alike in memory, a row is one plane; where some
are channels_last and some not, planes are channels, and each tensor has its own order of pixels and planes.
"""

import triton
import triton.language as tl


@triton.jit
def as_float32(value):
    """A float argument as float32. Inductor passes Python's floats as float64, which spreads to all they meet."""
    return tl.cast(value, tl.float32)


@triton.jit
def place(planes, blocks):
    """This program's row, plane and block of pixels, all int64. Programs walk planes first, then blocks, then rows."""
    program = tl.program_id(0)
    plane = (program % planes).to(tl.int64)
    block = (program // planes % blocks).to(tl.int64)
    row = (program // planes // blocks).to(tl.int64)
    return row, plane, block


@triton.jit
def tile(planes, blocks, pixels, BLOCK: tl.constexpr):
    """This program's row, plane and pixels [BLOCK], all int64, and which of the pixels exist."""
    row, plane, block = place(planes, blocks)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    return row, plane, pixel, pixel < pixels


@triton.jit
def offsets(row, plane, pixel, planes, pixels, LAST: tl.constexpr):
    """Where the pixels of a tile lie; LAST: channels_last, else plane by plane."""
    base = row * planes * pixels
    if LAST:
        return base + pixel * planes + plane
    else:
        return base + plane * pixels + pixel


@triton.jit
def tile_offsets(planes, blocks, pixels, STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, where its pixels lie in states and in network inputs and outputs, and which exist."""
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    return row, at, model_at, mask


@triton.jit
def load_state(x_ptr, at, mask):
    """Elements as float32: bfloat16 has no arithmetic of its own."""
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(x_ptr, at, value, mask):
    """Elements in the dtype of where they go."""
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_level(sigma_ptr, row, PER_ROW: tl.constexpr):
    """A noise level or weight as float32: one for each row, or one for all."""
    if PER_ROW:
        return tl.load(sigma_ptr + row).to(tl.float32)
    else:
        return tl.load(sigma_ptr).to(tl.float32)


@triton.jit
def input_scale(sigma, sigma_data, PLAIN: tl.constexpr):
    """c_in; 1 where the network is itself the denoiser (PLAIN)."""
    if PLAIN:
        return tl.zeros_like(sigma) + 1.0
    else:
        sigma_data = as_float32(sigma_data)
        return tl.div_rn(1.0, tl.sqrt_rn(sigma * sigma + sigma_data * sigma_data))


@triton.jit
def skip_and_out(sigma, sigma_data, boundary, PLAIN: tl.constexpr):
    """c_skip and c_out; exactly 1 and 0 at the boundary."""
    if PLAIN:
        return tl.zeros_like(sigma), tl.zeros_like(sigma) + 1.0
    else:
        sigma_data, boundary = as_float32(sigma_data), as_float32(boundary)
        variance = sigma_data * sigma_data
        offset = sigma - boundary
        c_skip = tl.div_rn(variance, offset * offset + variance)
        c_out = tl.div_rn(sigma_data * offset, tl.sqrt_rn(sigma * sigma + variance))
        return c_skip, c_out


@triton.jit
def per_level(value, change, level):
    """value * change / level with one division for all elements. 0 stays 0 beside a level so near to 0 that the ratio
    is infinite: such levels are multiplied first, and the value by as much, which is exact."""
    up = tl.where(level < 2.0**-64, 2.0**64, 1.0)
    return value * up * tl.div_rn(change, level * up)


@triton.jit
def clamp(value):
    """To [-1, 1]; NaN stays NaN, as in torch.clamp."""
    return tl.where(value < -1.0, -1.0, tl.where(value > 1.0, 1.0, value))


@triton.jit
def unclipped(model_output, x, c_skip, c_out, PLAIN: tl.constexpr):
    """D before it is clamped. PLAIN: c_skip = 0 must not let an infinite x through as NaN."""
    if PLAIN:
        return model_output
    else:
        return c_skip * x + c_out * model_output


@triton.jit
def load_both(model_output_ptr, x_ptr, at, model_at, mask, PLAIN: tl.constexpr):
    """F and x; x is not read where the network is the denoiser (PLAIN). Before coefficients are made of a noise level,
    so that all three are on their way at once: the compiler leaves loads where they stand."""
    model_output = load_state(model_output_ptr, model_at, mask)
    return model_output, model_output if PLAIN else load_state(x_ptr, at, mask)


@triton.jit
def load_unclipped(model_output_ptr, x_ptr, at, model_at, mask, c_skip, c_out, PLAIN: tl.constexpr):
    """D before it is clamped, from memory."""
    model_output, x = load_both(model_output_ptr, x_ptr, at, model_at, mask, PLAIN)
    return unclipped(model_output, x, c_skip, c_out, PLAIN)


@triton.jit
def denoised(model_output, x, c_skip, c_out, PLAIN: tl.constexpr, CLIP: tl.constexpr):
    """D = c_skip x + c_out F, clamped if CLIP."""
    value = unclipped(model_output, x, c_skip, c_out, PLAIN)
    return clamp(value) if CLIP else value


@triton.jit
def through_clip(grad, value):
    """The gradient of D before clamping, from that after. At +-1 itself it is 0, as in torch.clamp since 2.14."""
    return tl.where((value > -1.0) & (value < 1.0), grad, 0.0)


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), from weight 0.5 on from the other end, as torch.lerp: a weight of 1 gives `end`."""
    step = end - start
    return tl.where(weight < 0.5, start + weight * step, end - (1.0 - weight) * step)


@triton.jit
def natural_log(x):
    """ln x of positive normal float32 to 2 units in the last place (a minimax polynomial of log1p on [-1/3, 1/3]).

    No special cases to branch on, unlike `tl.log`, and relative precision near 1, where noise takes logarithms.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = -0.10356559604406357
    p = p * f + 0.1410798877477646
    p = p * f - 0.12654899060726166
    p = p * f + 0.1396307796239853
    p = p * f - 0.16657903790473938
    p = p * f + 0.20013834536075592
    p = p * f - 0.2499994933605194
    p = p * f + 0.33333155512809753
    return exponent.to(tl.float32) * 0.6931471805599453 + (f + f * f * (f * p - 0.5))


@triton.jit
def noise_level(sigma, PLAIN: tl.constexpr):
    """c_noise = 250 ln(sigma + 1e-44), or sigma itself where the network is the denoiser."""
    if PLAIN:
        return sigma
    else:
        level = sigma + 1e-44
        # Lift denormal numbers into the range of natural_log.
        tiny = level < 1e-30
        log = natural_log(tl.where(tiny, level * 18446744073709551616.0, level)) - tl.where(tiny, 44.3614195558365, 0.0)
        return 250.0 * tl.where(level < float("inf"), log, level)


@triton.jit
def store_noise_level(c_noise_ptr, row, planes, blocks, sigma, PLAIN: tl.constexpr, PER_ROW: tl.constexpr):
    """c_noise, written by the first program of each row, or of the batch where there is one level for all."""
    program = tl.program_id(0)
    if PER_ROW:
        # By the divisions that `tile` has made; a third would be dear.
        if (program % planes == 0) & (program // planes % blocks == 0):
            tl.store(c_noise_ptr + row, noise_level(sigma, PLAIN))
    else:
        if program == 0:
            tl.store(c_noise_ptr, noise_level(sigma, PLAIN))


@triton.jit
def load_grad(
    grad_state_ptr, grad_input_ptr, at, model_at, mask, c_in, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr
):
    """The gradient of a next state, from that of itself and of the network input made of it: one of them, or both."""
    if HAS_STATE and HAS_INPUT:
        return load_state(grad_state_ptr, at, mask) + c_in * load_state(grad_input_ptr, model_at, mask)
    elif HAS_STATE:
        return load_state(grad_state_ptr, at, mask)
    else:
        return c_in * load_state(grad_input_ptr, model_at, mask)


@triton.jit
def pixel_value(value, NEAREST: tl.constexpr):
    """[-1, 1] to a pixel, as int32: cut off, or rounded to nearest even. NaN becomes 0."""
    level = (value + 1.0) * 127.5
    level = tl.where(level > 0.0, tl.where(level < 255.0, level, 255.0), 0.0)
    if NEAREST:
        # Adding 1.5 2^23 leaves no bits for a fraction.
        level = (level + 12582912.0) - 12582912.0
    return level.to(tl.int32)
