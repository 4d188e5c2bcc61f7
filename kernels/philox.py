"""Normal numbers from counters, on the device: Philox4x32-10 and Box-Muller, as `cmfast.reference.noise` defines them.

Philox is Triton's own. With the Box-Muller here a normal takes 59 instructions on sm_90, against 173 with `tl.randn`
(Triton 3.8; tests/aot counts them). The angle is reduced on integers, exactly, and sine, cosine and logarithm are
polynomials (minimax, fitted for this file) good to a few units in the last place.
"""

import triton
import triton.language as tl

from cmfast.kernels.common import load_state, natural_log, place


@triton.jit
def load_word(value, IS_TENSOR: tl.constexpr):
    """An integer argument as int64, whether it came as a number or as a tensor on the device."""
    if IS_TENSOR:
        return tl.load(value).to(tl.int64)
    else:
        # No method of it: a number that is 1 comes as a constant.
        return tl.cast(value, tl.int64)


@triton.jit
def words(index_ptr, row, group, seed, seed_high, draw, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr):
    """The four words of `group` for a row's sample: key = seed, counter = (group, draw, index low, index high).

    A seed that is a number comes in two signed halves; one on the device as a pointer to the whole.
    """
    low = load_word(seed, SEED_TENSOR)
    high = low >> 32 if SEED_TENSOR else load_word(seed_high, False)
    sample = tl.load(index_ptr + row).to(tl.int64)
    return tl.philox_impl(
        group.to(tl.uint32),
        load_word(draw, DRAW_TENSOR).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        low.to(tl.uint32),
        high.to(tl.uint32),
    )


@triton.jit
def sine_cosine(word):
    """sin and cos of 2 pi word / 2^32."""
    quadrant = (word + 0x20000000) >> 30
    x = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    y = x * x
    sine = x + x * y * (-0.1666666716337204 + y * (0.00833277590572834 + y * -0.00019580544903874397))
    cosine = 1.0 - 0.5 * y + y * y * (0.0416666679084301 + y * (-0.0013888234971091151 + y * 2.4523107540641648e-05))
    swap = (quadrant & 1) == 1
    s, c = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where((quadrant & 2) == 2, -s, s), tl.where(((quadrant + 1) & 2) == 2, -c, c)


@triton.jit
def box_muller(a, b):
    """Two independent normals from two words."""
    uniform = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(tl.maximum(-2.0 * natural_log(uniform), 0.0))
    sine, cosine = sine_cosine(b)
    return radius * cosine, radius * sine


@triton.jit
def normals(
    index_ptr, row, first, seed, seed_high, draw,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):
    """BLOCK normals of a row's sample, from element `first` on, which is a multiple of 4."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = words(index_ptr, row, group, seed, seed_high, draw, SEED_TENSOR, DRAW_TENSOR)
    z_0, z_1 = box_muller(a, b)
    z_2, z_3 = box_muller(c, d)
    return tl.reshape(tl.join(tl.join(z_0, z_2), tl.join(z_1, z_3)), (BLOCK,))


@triton.jit
def noise_tile(
    noise_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):
    """The noise of this program's tile: read, or drawn here."""
    if DRAWN:
        row, plane, block = place(planes, blocks)
        first = plane * pixels + block * BLOCK
        return normals(index_ptr, row, first, seed, seed_high, draw, SEED_TENSOR, DRAW_TENSOR, BLOCK)
    else:
        return load_state(noise_ptr, at, mask)
