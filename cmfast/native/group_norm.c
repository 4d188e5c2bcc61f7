/* GroupNorm with scale, shift and SiLU in channels_last, of float32 or bfloat16, and its gradients: called by
 * group_norm.py.
 *
 * With h = (x - mean) rstd: z = (h weight + bias) (1 + scale) + shift and y = z sigmoid(z), in float32. A sample is summed
 * in parts of a few pixels, whose number does not depend on the threads. Means may be large beside deviations: what is
 * summed, in float64, are the differences to a group's first number and their squares; and of a mean there is also what
 * float32 leaves of it.
 */
#include <math.h>

#include "common.h"

/* Channels done at once: a line of the cache, of which `channels` is a multiple. */
#define LINE 16
#define VECTORS (LINE / LANES)
/* Numbers in a part, and pixels at least, as each part has sums of its own. */
#define PART 16384
#define FEWEST 16

typedef unsigned words __attribute__((vector_size(4 * LANES), may_alias));
typedef unsigned short halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Number `at` and the next of an image, half: in bfloat16. */
INLINE vec read(const void *from, long at, int half)
{
    if (!half)
        return load((const float *)from + at);
    return (vec)(__builtin_convertvector(*(const halves *)((const unsigned short *)from + at), words) << 16);
}

INLINE void write(void *to, long at, vec x, int half)
{
    if (!half) {
        store((float *)to + at, x);
        return;
    }
    words bits = (words)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    words nan = (words)(x != x);
    *(halves *)((unsigned short *)to + at) = __builtin_convertvector((bits & ~nan) | (0x7fc0 & nan), halves);
}

/* Nothing where its exponential would be beyond float32's, so that z times it is nothing, too. */
INLINE vec sigmoid(vec z) { return choose(z < -88.0f, (vec){0}, 1.0f / (1.0f + exponential(-z))); }

static long pixels_of_part(long channels) { return channels < PART / FEWEST ? PART / channels : FEWEST; }

static long group_norm_parts(long pixels, long channels)
{
    long each = pixels_of_part(channels);
    return (pixels + each - 1) / each;
}

/* What a sample's channels have: */
enum { MEAN, RSTD, REST, FACTOR, OFFSET, OF_CHANNELS };

/* h = (x - mean) rstd + rest and z = h factor + offset. */
static void of_channels(float *to, const float *mean, const float *rstd, const float *rest, const float *weight,
                        const float *bias, const float *scale, const float *shift, long channels, long groups)
{
    long each = channels / groups;
    for (long g = 0; g < groups; g++)
        for (long c = g * each; c < (g + 1) * each; c++) {
            float more = scale ? 1.0f + scale[c] : 1.0f;
            to[MEAN * channels + c] = mean[g];
            to[RSTD * channels + c] = rstd[g];
            to[REST * channels + c] = rest[g];
            to[FACTOR * channels + c] = weight[c] * more;
            to[OFFSET * channels + c] = bias[c] * more + (shift ? shift[c] : 0.0f);
        }
}

/* A number of an image. */
static float number(const void *x, long at, int half)
{
    union { unsigned bits; float number; } one = {half ? (unsigned)((const unsigned short *)x)[at] << 16 : 0};
    return half ? one.number : ((const float *)x)[at];
}

/* The first number of each group of the sample that begins at pixel `first`, for each channel. */
static void firsts(const void *x, long first, float *to, long channels, long groups, int half)
{
    long each = channels / groups;
    for (long g = 0; g < groups; g++)
        for (long c = g * each; c < (g + 1) * each; c++)
            to[c] = number(x, first * channels + g * each, half);
}

/* Sums over the pixels of a part of d and d^2, of the differences d of x to `from`: to [2, channels]. */
INLINE void sum(const void *x, const float *from, long first, long pixels, long channels, double *to, int half)
{
    for (long c = 0; c < channels; c += LINE) {
        wide one[2 * VECTORS], two[2 * VECTORS], away[2 * VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < 2 * VECTORS; v++) {
            one[v] = two[v] = (wide){0};
            away[v] = __builtin_convertvector(*(const few *)(from + c + v * LANES / 2), wide);
        }
        for (long p = 0; p < pixels; p++) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                union { vec all; few part[2]; } d = {read(x, (first + p) * channels + c + v * LANES, half)};
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    wide each = __builtin_convertvector(d.part[i], wide) - away[2 * v + i];
                    one[2 * v + i] += each;
                    two[2 * v + i] += each * each;
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < 2 * VECTORS; v++) {
            *(wide *)(to + c + v * LANES / 2) = one[v];
            *(wide *)(to + channels + c + v * LANES / 2) = two[v];
        }
    }
}

/* Mean, rstd and rest of each group, from the sums of all parts. */
static void fold(const double *sums, const float *from, float *mean, float *rstd, float *rest, long parts, long pixels,
                 long channels, long groups, float eps)
{
    long each = channels / groups;
    for (long g = 0; g < groups; g++) {
        double one = 0, two = 0;
        for (long part = 0; part < parts; part++)
            for (long c = g * each; c < (g + 1) * each; c++) {
                one += sums[part * 2 * channels + c];
                two += sums[(part * 2 + 1) * channels + c];
            }
        one /= (double)each * pixels;
        two = two / ((double)each * pixels) - one * one;
        one += from[g * each];
        mean[g] = (float)one;
        rstd[g] = (float)(1 / sqrt((two < 0 ? 0 : two) + eps)); /* NaN stays */
        rest[g] = (float)((mean[g] - one) * rstd[g]);
    }
}

INLINE void apply(const void *x, void *y, long first, long pixels, long channels, const float *of, int silu, int half)
{
    for (long p = first; p < first + pixels; p++)
        for (long c = 0; c < channels; c += LANES) {
            vec h = (read(x, p * channels + c, half) - load(of + MEAN * channels + c)) * load(of + RSTD * channels + c)
                    + load(of + REST * channels + c);
            vec z = h * load(of + FACTOR * channels + c) + load(of + OFFSET * channels + c);
            if (silu)
                z *= sigmoid(z);
            write(y, p * channels + c, z, half);
        }
}

/* Sums over the pixels of a part of the gradient of z, and of that times h: to [2, channels]. In float32 it stays in
 * `out`, for what comes next.
 */
INLINE void sum_gradients(const void *x, const void *grad, void *out, long first, long pixels, long channels,
                          const float *of, double *to, int silu, int half)
{
    for (long c = 0; c < channels; c += LANES) {
        vec mean = load(of + MEAN * channels + c), rstd = load(of + RSTD * channels + c);
        vec rest = load(of + REST * channels + c);
        vec factor = load(of + FACTOR * channels + c), offset = load(of + OFFSET * channels + c);
        vec one = {0}, two = {0};
        for (long p = first; p < first + pixels; p++) {
            vec h = (read(x, p * channels + c, half) - mean) * rstd + rest, g = read(grad, p * channels + c, half);
            if (silu) {
                vec z = h * factor + offset, s = sigmoid(z);
                g *= s * (1.0f + z * (1.0f - s));
            }
            if (!half)
                write(out, p * channels + c, g, half);
            one += g;
            two += g * h;
        }
        for (int i = 0; i < LANES; i++) {
            to[c + i] = one[i];
            to[channels + c + i] = two[i];
        }
    }
}

/* Of a sample, its parts together: to [2, channels]. And for each channel what its group has of the gradient's mean, and
 * of that of the gradient times h.
 */
static void fold_gradients(const double *sums, float *to, float *of_groups, const float *of, long parts, long pixels,
                           long channels, long groups)
{
    long each = channels / groups;
    for (long g = 0; g < groups; g++) {
        double means[2] = {0, 0};
        for (int i = 0; i < 2; i++)
            for (long c = g * each; c < (g + 1) * each; c++) {
                double total = 0;
                for (long part = 0; part < parts; part++)
                    total += sums[(part * 2 + i) * channels + c];
                to[i * channels + c] = (float)total;
                means[i] += total * of[FACTOR * channels + c];
            }
        for (int i = 0; i < 2; i++)
            for (long c = g * each; c < (g + 1) * each; c++)
                of_groups[i * channels + c] = (float)(means[i] / ((double)each * pixels));
    }
}

INLINE void apply_gradients(const void *x, const void *grad, void *out, long first, long pixels, long channels,
                            const float *of, const float *of_groups, int silu, int half)
{
    for (long p = first; p < first + pixels; p++)
        for (long c = 0; c < channels; c += LANES) {
            vec rstd = load(of + RSTD * channels + c), factor = load(of + FACTOR * channels + c);
            vec h = (read(x, p * channels + c, half) - load(of + MEAN * channels + c)) * rstd
                    + load(of + REST * channels + c);
            vec g = read(half ? grad : out, p * channels + c, half);
            if (half && silu) {
                vec z = h * factor + load(of + OFFSET * channels + c), s = sigmoid(z);
                g *= s * (1.0f + z * (1.0f - s));
            }
            g = g * factor - load(of_groups + c) - h * load(of_groups + channels + c);
            write(out, p * channels + c, g * rstd, half);
        }
}

/* Doubles of workspace. */
long group_norm_space(long batch, long pixels, long channels)
{
    return batch * channels * (2 * group_norm_parts(pixels, channels) + (OF_CHANNELS + 2 + 1) / 2);
}

/* All there is to know of a call: what users gave, what is found, and where its numbers lie. */
struct call {
    const void *x, *grad;
    const float *weight, *bias, *scale, *shift;
    void *out;
    float *moments, *totals; /* moments [3, batch, groups]: mean, rstd, rest */
    double *sums;
    float *of, *of_groups;
    long batch, pixels, channels, groups, parts;
    float eps;
    int silu, half;
};

static double *sums_of(const struct call *it, long b, long part)
{
    return it->sums + (b * it->parts + part) * 2 * it->channels;
}

/* The first pixel of a part of all samples, and how many it has. */
static long first_of(const struct call *it, long b, long part, long *count)
{
    long each = pixels_of_part(it->channels), first = part * each;
    *count = it->pixels - first < each ? it->pixels - first : each;
    return b * it->pixels + first;
}

static float *moment(const struct call *it, int which, long b) { return it->moments + (which * it->batch + b) * it->groups; }

/* In the place of `of_groups`, which the backward pass alone has. */
static float *firsts_of(const struct call *it, long b) { return it->of_groups + b * 2 * it->channels; }

static void forward_before(const struct call *it, long b)
{
    firsts(it->x, b * it->pixels, firsts_of(it, b), it->channels, it->groups, it->half);
}

static void forward_first(const struct call *it, long b, long part)
{
    long count, first = first_of(it, b, part, &count);
    if (it->half)
        sum(it->x, firsts_of(it, b), first, count, it->channels, sums_of(it, b, part), 1);
    else
        sum(it->x, firsts_of(it, b), first, count, it->channels, sums_of(it, b, part), 0);
}

static void channels_of(const struct call *it, long b)
{
    const float *scale = it->scale ? it->scale + b * it->channels : 0, *shift = it->shift ? it->shift + b * it->channels : 0;
    of_channels(it->of + b * OF_CHANNELS * it->channels, moment(it, 0, b), moment(it, 1, b), moment(it, 2, b), it->weight,
                it->bias, scale, shift, it->channels, it->groups);
}

static void forward_middle(const struct call *it, long b)
{
    fold(sums_of(it, b, 0), firsts_of(it, b), moment(it, 0, b), moment(it, 1, b), moment(it, 2, b), it->parts, it->pixels,
         it->channels, it->groups, it->eps);
    channels_of(it, b);
}

static void forward_last(const struct call *it, long b, long part)
{
    long count, first = first_of(it, b, part, &count);
    const float *of = it->of + b * OF_CHANNELS * it->channels;
    if (it->half && it->silu)
        apply(it->x, it->out, first, count, it->channels, of, 1, 1);
    else if (it->half)
        apply(it->x, it->out, first, count, it->channels, of, 0, 1);
    else if (it->silu)
        apply(it->x, it->out, first, count, it->channels, of, 1, 0);
    else
        apply(it->x, it->out, first, count, it->channels, of, 0, 0);
}

static void backward_first(const struct call *it, long b, long part)
{
    long count, first = first_of(it, b, part, &count);
    const float *of = it->of + b * OF_CHANNELS * it->channels;
    double *to = sums_of(it, b, part);
    if (it->half && it->silu)
        sum_gradients(it->x, it->grad, it->out, first, count, it->channels, of, to, 1, 1);
    else if (it->half)
        sum_gradients(it->x, it->grad, it->out, first, count, it->channels, of, to, 0, 1);
    else if (it->silu)
        sum_gradients(it->x, it->grad, it->out, first, count, it->channels, of, to, 1, 0);
    else
        sum_gradients(it->x, it->grad, it->out, first, count, it->channels, of, to, 0, 0);
}

static void backward_middle(const struct call *it, long b)
{
    fold_gradients(sums_of(it, b, 0), it->totals + b * 2 * it->channels, it->of_groups + b * 2 * it->channels,
                   it->of + b * OF_CHANNELS * it->channels, it->parts, it->pixels, it->channels, it->groups);
}

static void backward_last(const struct call *it, long b, long part)
{
    long count, first = first_of(it, b, part, &count);
    const float *of = it->of + b * OF_CHANNELS * it->channels, *of_groups = it->of_groups + b * 2 * it->channels;
    if (it->half && it->silu)
        apply_gradients(it->x, it->grad, it->out, first, count, it->channels, of, of_groups, 1, 1);
    else if (it->half)
        apply_gradients(it->x, it->grad, it->out, first, count, it->channels, of, of_groups, 0, 1);
    else
        apply_gradients(it->x, it->grad, it->out, first, count, it->channels, of, of_groups, 0, 0);
}

typedef void of_part(const struct call *, long b, long part);
typedef void of_sample(const struct call *, long b);

/* One step after the other: of each sample by one thread, whose cache it may fit in, where threads have as many. */
static void in_steps(const struct call *it, of_sample *before, of_part *first, of_sample *middle, of_part *last, int threads)
{
    long batch = it->batch, parts = it->parts;
#pragma omp parallel num_threads(threads)
    if (batch % threads == 0 || batch >= 4 * threads) {
#pragma omp for schedule(dynamic, 1)
        for (long b = 0; b < batch; b++) {
            before(it, b);
            for (long part = 0; part < parts; part++)
                first(it, b, part);
            middle(it, b);
            for (long part = 0; part < parts; part++)
                last(it, b, part);
        }
    } else {
#pragma omp for schedule(static)
        for (long b = 0; b < batch; b++)
            before(it, b);
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < batch; b++)
            for (long part = 0; part < parts; part++)
                first(it, b, part);
#pragma omp for schedule(static)
        for (long b = 0; b < batch; b++)
            middle(it, b);
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < batch; b++)
            for (long part = 0; part < parts; part++)
                last(it, b, part);
    }
}

/* Where the numbers of a call lie in its workspace. */
static void place(struct call *it, double *space)
{
    it->parts = group_norm_parts(it->pixels, it->channels);
    it->sums = space;
    it->of = (float *)(space + it->batch * it->parts * 2 * it->channels);
    it->of_groups = it->of + it->batch * OF_CHANNELS * it->channels;
}

/* y of x [batch, pixels, channels], weight and bias [channels], scale and shift [batch, channels] or NULL; and
 * moments for the gradients. space: `group_norm_space`.
 */
void group_norm_forward(const void *x, const float *weight, const float *bias, const float *scale, const float *shift,
                        void *y, float *moments, double *space, long batch, long pixels, long channels, long groups,
                        float eps, int silu, int half, int threads)
{
    struct call it = {.x = x, .weight = weight, .bias = bias, .scale = scale, .shift = shift, .out = y,
                      .moments = moments, .batch = batch, .pixels = pixels, .channels = channels, .groups = groups,
                      .eps = eps, .silu = silu, .half = half};
    place(&it, space);
    in_steps(&it, forward_before, forward_first, forward_middle, forward_last, threads);
}

/* The gradient of x for that of y, and totals [batch, 2, channels]: of each sample's gradients of z, and of these times
 * h, of which the other gradients are made.
 */
void group_norm_backward(const void *grad, const void *x, const float *weight, const float *bias, const float *scale,
                         const float *shift, float *moments, void *out, float *totals, double *space, long batch,
                         long pixels, long channels, long groups, int silu, int half, int threads)
{
    struct call it = {.x = x, .grad = grad, .weight = weight, .bias = bias, .scale = scale, .shift = shift, .out = out,
                      .moments = moments, .totals = totals, .batch = batch, .pixels = pixels, .channels = channels,
                      .groups = groups, .silu = silu, .half = half};
    place(&it, space);
    in_steps(&it, channels_of, backward_first, backward_middle, backward_last, threads);
}
