/* Steps of samplers, noise added, and pixels: each in one pass over a batch, called by steps.py. */
#include <string.h>

#include "noise.h"
#include "scalings.h"

enum kind { INPUT, INIT, NOISE, DENOISE, RENOISE, EULER, HEUN, MIDPOINT };

/* A block's state after a step of a kind, from that before; e: noise. */
INLINE void step(enum kind kind, float *to, const float *x, const float *f, const float *f2, const float *e,
                 float sigma, float middle, float end, float added, scalings by, scalings by2, long count)
{
    const float dt = end - sigma, to_middle = middle - sigma;
    switch (kind) {
    case INPUT:
        break;
    case INIT:
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = added * x[i];
        break;
    case NOISE:
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = x[i] + added * e[i];
        break;
    case DENOISE:
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = denoised(x[i], f[i], by);
        break;
    case RENOISE:
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = denoised(x[i], f[i], by) + added * e[i];
        break;
    case EULER:
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = x[i] + (x[i] - denoised(x[i], f[i], by)) / sigma * dt;
        break;
    case HEUN:
#pragma omp simd
        for (long i = 0; i < count; i++) {
            float d = (x[i] - denoised(x[i], f[i], by)) / sigma, euler = x[i] + d * dt;
            float d2 = (euler - denoised(euler, f2[i], by2)) / middle;
            to[i] = x[i] + 0.5f * (d + d2) * dt;
        }
        break;
    case MIDPOINT:
#pragma omp simd
        for (long i = 0; i < count; i++) {
            float at = x[i] + (x[i] - denoised(x[i], f[i], by)) / sigma * to_middle;
            to[i] = x[i] + (at - denoised(at, f2[i], by2)) / middle * dt;
        }
        break;
    }
}

/* c_noise of so many levels. */
static void tell(float *told, levels of, double sigma_data, long count, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > PART)
    for (long b = 0; b < count; b++) {
        float t = level(of, b);
        told[b] = isnan(sigma_data) ? t : 250.0f * (float)log(t + (double)1e-44f);
    }
}

INLINE void scale(float *to, const float *x, float in, long count)
{
#pragma omp simd
    for (long i = 0; i < count; i++)
        to[i] = in * x[i];
}

/* x' in `next` and c_in x' in `input`, where they are wanted, and in `told` c_noise of as many levels: those at which the
 * input is taken, which are `end`. The second slope is that at `middle`, in Heun's method the end. Where there is a
 * second of each, they are x at `middle` by the same noise. Noise is e, or where there are indices drawn on the way. */
void steps_step(int kind, float *next, float *input, float *told, float *next2, float *input2, float *told2,
                const float *x, const float *f, const float *f2, const float *e, const long *index, unsigned long seed,
                unsigned draw, const float *sigma, long of_sigma, const float *middle, long of_middle,
                const float *end, long of_end, double sigma_data, double boundary, double sigma_min, int clip,
                long batch, long count, long of_told, long of_told2, int threads)
{
    const levels start = {sigma, of_sigma}, between = {middle, of_middle}, last = {end, of_end};
    const long parts = (count + PART - 1) / PART;

    tell(told, last, sigma_data, of_told, threads);
    tell(told2, between, sigma_data, of_told2, threads);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            float s = level(start, b), m = level(between, b), t = level(last, b), least = sigma_min;
            float square = (t - least) * (t + least), added = kind <= NOISE ? s : square < 0 ? 0 : sqrtf(square);
            /* At an end of 0 there is no second slope: a step of Euler's. */
            enum kind now = kind == HEUN && t == 0 ? EULER : kind;
            scalings by = scalings_of(kind < DENOISE ? t : s, sigma_data, boundary, clip);
            scalings by2 = kind < HEUN && !next2 ? by : scalings_of(m, sigma_data, boundary, clip);
            float in = !input || kind < DENOISE ? by.in : scalings_of(t, sigma_data, boundary, clip).in;
            float room[BLOCK], noise[BLOCK];
            long begin = b * count + part * PART, stop = b * count + (part + 1 < parts ? (part + 1) * PART : count);
            for (long at = begin; at < stop; at += BLOCK) {
                long n = stop - at < BLOCK ? stop - at : BLOCK;
                float *to = next ? next + at : room;
                if (index)
                    drawn(noise, index[b], seed, draw, at - b * count, n);
                const float *of_step = index ? noise : e + at;
                step(now, to, x + at, f + at, f2 + at, of_step, s, m, t, added, by, by2, n);
                if (input)
                    scale(input + at, kind == INPUT ? x + at : to, in, n);
                if (next2) {
                    step(NOISE, next2 + at, x + at, x, x, of_step, s, m, t, m, by, by2, n);
                    scale(input2 + at, next2 + at, by2.in, n);
                }
            }
        }
}

/* Pixels of x, or of D where there is an output f: [batch, channels, pixels] to bytes [batch, pixels, channels]. */
void steps_pixels(unsigned char *to, const float *x, const float *f, const float *sigma, long of_sigma,
                  double sigma_data, double boundary, int nearest, long batch, long channels, long pixels, int threads)
{
    const long parts = (pixels + BLOCK - 1) / BLOCK;

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            scalings by = scalings_of(f ? level((levels){sigma, of_sigma}, b) : 0, sigma_data, boundary, 1);
            long begin = part * BLOCK, n = pixels - begin < BLOCK ? pixels - begin : BLOCK;
            float room[BLOCK];
            int whole[BLOCK];
            for (long c = 0; c < channels; c++) {
                long at = (b * channels + c) * pixels + begin;
                if (f)
                    step(DENOISE, room, x + at, f + at, x, x, 0, 0, 0, 0, by, by, n);
                else
                    memcpy(room, x + at, n * sizeof(float));
#pragma omp simd
                for (long i = 0; i < n; i++)
                    room[i] = (room[i] + 1.0f) * 127.5f;
                if (nearest)
#pragma omp simd
                    for (long i = 0; i < n; i++)
                        room[i] = rintf(room[i]);
#pragma omp simd
                for (long i = 0; i < n; i++)
                    whole[i] = room[i] > 0.0f ? room[i] < 255.0f ? room[i] : 255.0f : 0.0f; /* NaN is 0 */
                for (long i = 0; i < n; i++)
                    to[(b * pixels + begin + i) * channels + c] = whole[i];
            }
        }
}
