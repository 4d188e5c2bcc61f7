/* Normal numbers from counters, as cmfast/reference/noise.py makes them: called by noise.py.
 *
 * Philox4x32-10 (Salmon et al. 2011), and Box-Muller in float64, where series are as good as the functions of the
 * reference: errors of some 1e-16, so that after rounding to float32 hardly a number is another.
 */
#include <math.h>

#include "noise.h"

/* Counters at once, of four numbers each; and numbers in a part that a thread does. */
#define COUNTERS (LANES / 2)
#define PART 4096

typedef double reals __attribute__((vector_size(4 * LANES), may_alias));
typedef unsigned long long words __attribute__((vector_size(4 * LANES), may_alias));

/* A word of 32 bits as a number: in the last bits of 2^52. */
INLINE reals number(words x) { return (reals)(x | 0x4330000000000000ull) - 4503599627370496.0; }
INLINE reals rounded(reals x) { return __builtin_convertvector(__builtin_convertvector(x, few), reals); }

/* ln u for 0 < u <= 1: u = 2^e m with m in [2^-0.5, 2^0.5), and ln m = 2 artanh((m - 1) / (m + 1)). */
INLINE reals logarithm(reals u)
{
    /* Such that the exponent counts from 2^-0.5 on. */
    words bits = (words)u - 0x3fe6a09e667f3bcdull;
    words e = bits >> 52 & 0xfff; /* in two's complement of twelve bits */
    reals exponent = number((e + 2048) & 0xfff) - 2048.0;
    reals m = (reals)((bits & 0xfffffffffffffull) + 0x3fe6a09e667f3bcdull);
    reals s = (m - 1.0) / (m + 1.0), q = s * s, sum = (reals){0} + 1.0 / 19;
    sum = sum * q + 1.0 / 17;
    sum = sum * q + 1.0 / 15;
    sum = sum * q + 1.0 / 13;
    sum = sum * q + 1.0 / 11;
    sum = sum * q + 1.0 / 9;
    sum = sum * q + 1.0 / 7;
    sum = sum * q + 1.0 / 5;
    sum = sum * q + 1.0 / 3;
    return exponent * 0.693147180559945309417 + 2.0 * (s + s * q * sum);
}

/* sine and cosine of an angle in [0, 2 pi): of what is left beside the nearest quarter of a turn. */
INLINE void turn(reals angle, reals *sine, reals *cosine)
{
    reals shifted = angle * 0.636619772367581343076 + 6755399441055744.0; /* 1.5 2^52 */
    words quarter = (words)shifted;
    reals turns = shifted - 6755399441055744.0;
    reals r = (angle - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17;
    reals q = r * r, s = (reals){0} - 1.0 / 121645100408832000, c = (reals){0} - 1.0 / 6402373705728000;
    s = s * q + 1.0 / 355687428096000;
    s = s * q - 1.0 / 1307674368000;
    s = s * q + 1.0 / 6227020800;
    s = s * q - 1.0 / 39916800;
    s = s * q + 1.0 / 362880;
    s = s * q - 1.0 / 5040;
    s = s * q + 1.0 / 120;
    s = s * q - 1.0 / 6;
    s = r + r * q * s;
    c = c * q + 1.0 / 20922789888000;
    c = c * q - 1.0 / 87178291200;
    c = c * q + 1.0 / 479001600;
    c = c * q - 1.0 / 3628800;
    c = c * q + 1.0 / 40320;
    c = c * q - 1.0 / 720;
    c = c * q + 1.0 / 24;
    c = c * q - 0.5;
    c = 1.0 + q * c;
    words odd = -(quarter & 1), of_sine = (quarter & 2) << 62, of_cosine = ((quarter + 1) & 2) << 62;
    *sine = (reals)((((words)s & ~odd) | ((words)c & odd)) ^ of_sine);
    *cosine = (reals)((((words)c & ~odd) | ((words)s & odd)) ^ of_cosine);
}

/* Two normals of two words each. */
INLINE void box_muller(words a, words b, reals *first, reals *second)
{
    reals u = rounded(rounded(number(a)) * 0x1p-32 + 0x1p-33), negative = -2.0 * logarithm(u), sine, cosine;
    turn(number(b) * (6.28318530717958647693 * 0x1p-32), &sine, &cosine);
    reals radius = {0};
    for (int i = 0; i < COUNTERS; i++)
        radius[i] = __builtin_sqrt(negative[i]);
    *first = radius * cosine;
    *second = radius * sine;
}

/* The four words of each of some counters of a sample, from the first on. */
INLINE void words_of(words c[4], long sample, unsigned long seed, unsigned draw, long first)
{
    const words mask = (words){0} + 0xffffffff;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    words number = {0};
    for (int i = 0; i < COUNTERS; i++)
        number[i] = (unsigned)(first + i);
    c[0] = number;
    c[1] = (words){0} + draw;
    c[2] = (words){0} + (unsigned)sample;
    c[3] = (words){0} + (unsigned)(sample >> 32);
    for (int round = 0; round < 10; round++) {
        words one = c[0] * 0xd2511f53, two = c[2] * 0xcd9e8d57;
        c[0] = (two >> 32) ^ c[1] ^ k0;
        c[1] = two & mask;
        c[2] = (one >> 32) ^ c[3] ^ k1;
        c[3] = one & mask;
        k0 += 0x9e3779b9;
        k1 += 0xbb67ae85;
    }
}

/* Normals from number `first` of a sample on, which is the first of a counter; draw: a word. */
void drawn(float *to, long sample, unsigned long seed, unsigned draw, long first, long count)
{
    for (long at = 0; at < count; at += 4 * COUNTERS) {
        words c[4];
        reals made[4];
        words_of(c, sample, seed, draw, (first + at) / 4);
        box_muller(c[0], c[1], made, made + 1);
        box_muller(c[2], c[3], made + 2, made + 3);
        for (int j = 0; j < 4; j++) {
            few rounded_once = __builtin_convertvector(made[j], few);
            for (int i = 0; i < COUNTERS; i++)
                if (at + i * 4 + j < count)
                    to[at + i * 4 + j] = rounded_once[i];
        }
    }
}

/* The normals of samples index [batch], out [batch, count]. */
void noise_normal(float *out, const long *index, unsigned long seed, unsigned draw, long batch, long count, int threads)
{
    long parts = (count + PART - 1) / PART;

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (batch * parts > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            long first = part * PART, left = count - first;
            drawn(out + b * count + first, index[b], seed, draw, first, left < PART ? left : PART);
        }
}

/* How many of so many thresholds, which do not fall, are at or below a word. */
static long passed(const long *thresholds, long count, long word)
{
    long low = 0;
    while (low < count) {
        long middle = (low + count) / 2;
        if (thresholds[middle] <= word)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

/* Noise levels of samples index [batch], as cmfast/reference/draw.py draws them: from a table, of which the interval is
 * that of a word, by thresholds where there are some; or where there is no table exp(mean + std z), and what is below. */
void noise_levels(float *sigma, float *next, float *middle, const long *index, unsigned long seed, unsigned draw,
                  const float *table, const long *thresholds, long intervals, long stride, double mean, double std,
                  double factor, double k, double b, long batch, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < batch; i++) {
        if (table) {
            words c[4];
            words_of(c, index[i], seed, draw, 0);
            long word = c[0][0], at = thresholds ? passed(thresholds, intervals - 1, word) : word * intervals >> 32;
            sigma[i] = table[at * stride];
            next[i] = table[(at + 1) * stride];
            if (middle)
                middle[i] = table[at * stride + 1];
            continue;
        }
        float z;
        drawn(&z, index[i], seed, draw, 0, 1);
        sigma[i] = exp(mean + std * z);
        if (next) {
            double rest = sigma[i] * (1 - factor * (1 + k / (1 + exp(b * sigma[i]))));
            next[i] = rest < 0 ? 0 : rest;
        }
    }
}
