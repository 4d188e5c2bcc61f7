#pragma once
/* What the C of this folder shares: vectors for the CPU that it is compiled for, a matrix product, an exponential. */

/* Numbers in a vector, and rows of a product that are summed in registers, for two vectors of columns. */
#ifdef __AVX512F__
#define LANES 16
#define ROWS 12
#else
#define LANES 8
#define ROWS 6
#endif
#define PANEL (2 * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Half as many numbers, and as float64. */
typedef float few __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double wide __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
typedef int ints __attribute__((vector_size(4 * LANES), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec choose(ints where, vec x, vec other) { return (vec)(((ints)x & where) | ((ints)other & ~where)); }

/* c [ROWS, PANEL] = a [ROWS, depth] b [depth, PANEL], of which a row of a and of c lies so far from the next. */
INLINE void multiply(const float *a, long of_a, const float *b, float *c, long of_c, long depth)
{
    vec sums[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = (vec){0};
    for (long k = 0; k < depth; k++) {
        vec left = load(b + k * PANEL), right = load(b + k * PANEL + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            sums[i][0] += a[i * of_a + k] * left;
            sums[i][1] += a[i * of_a + k] * right;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        store(c + i * of_c, sums[i][0]);
        store(c + i * of_c + LANES, sums[i][1]);
    }
}

/* e^x by 2^n e^r with |r| <= ln(2) / 2, and for e^r its series to the seventh power, the rest of which is 5e-9. */
INLINE vec exponential(vec x)
{
    const vec least = (vec){0} - 87.0f, most = (vec){0} + 88.0f;
    x = choose(x < least, least, choose(x > most, most, x)); /* NaN stays */
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: n is in the last bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln(2) in two parts */
    vec series = (vec){0} + 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * (vec)(((ints)shifted << 23) + (127 << 23));
}
