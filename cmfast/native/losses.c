/* Weighted distances of D and the target's D, and their gradient: each in one pass over a batch, called by losses.py.
 *
 * Sums of a few numbers are float32, and of these float64, of parts whose number does not depend on the threads.
 */
#include "scalings.h"

enum norm { L1, L2, HUBER };
enum weighting { GIVEN, SNR, SNR_1, KARRAS, TRUNCATED, UNIFORM };

static float weight_of(enum weighting kind, levels weight, float sigma, double sigma_data, long b)
{
    float snr = 1 / (sigma * sigma), one = 1 / (sigma_data * sigma_data);
    switch (kind) {
    case GIVEN:
        return level(weight, b);
    case SNR:
        return snr;
    case SNR_1:
        return snr + 1;
    case KARRAS:
        return snr + one;
    case TRUNCATED:
        return snr < 1 ? 1 : snr;
    default:
        return 1;
    }
}

/* D minus the target's D, which is y, or with x2 that of the output y. */
INLINE void difference(float *to, const float *x, const float *f, const float *y, const float *x2, scalings by,
                       scalings by2, long count)
{
    if (x2)
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = denoised(x[i], f[i], by) - denoised(x2[i], y[i], by2);
    else
#pragma omp simd
        for (long i = 0; i < count; i++)
            to[i] = denoised(x[i], f[i], by) - y[i];
}

/* The sum of a block's sizes, or squares: of each lane a few in float32, and then of all. */
INLINE double total(const float *x, long count, int squares)
{
    vec sums[4] = {{0}};
    double sum = 0;
    long i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vec each = load(x + i + j * LANES);
            if (squares)
                sums[j] += each * each;
            else
                sums[j] += (vec)((ints)each & 0x7fffffff);
        }
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; i < count; i++)
        sum += squares ? (double)x[i] * x[i] : fabs(x[i]);
    for (int j = 0; j < LANES; j++)
        sum += sums[0][j];
    return sum;
}

long losses_part(void) { return PART; }

static long parts_of(long count) { return (count + PART - 1) / PART; }

/* Losses [batch], the weighted distances of D and the target's D, which are kept in `distance`; sums [batch, parts]. */
void losses_forward(float *loss, float *distance, double *sums, const float *x, const float *f, const float *y, const float *x2,
                    const float *sigma, long of_sigma, const float *sigma2, long of_sigma2, const float *weight,
                    long of_weight, int norm, double huber_c, int weighting, double weight_sigma_data,
                    double sigma_data, double boundary, long batch, long count, int threads)
{
    const levels start = {sigma, of_sigma}, end = {sigma2, of_sigma2};
    const long parts = parts_of(count);

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            scalings by = scalings_of(level(start, b), sigma_data, boundary, 0);
            scalings by2 = x2 ? scalings_of(level(end, b), sigma_data, boundary, 0) : by;
            long stop = b * count + (part + 1 < parts ? (part + 1) * PART : count);
            float room[BLOCK];
            double sum = 0;
            for (long at = b * count + part * PART; at < stop; at += BLOCK) {
                long n = stop - at < BLOCK ? stop - at : BLOCK;
                difference(room, x + at, f + at, y + at, x2 ? x2 + at : 0, by, by2, n);
                sum += norm == L1 ? total(room, n, 0) : total(room, n, 1);
            }
            sums[b * parts + part] = sum;
        }
    for (long b = 0; b < batch; b++) {
        double sum = 0;
        for (long part = 0; part < parts; part++)
            sum += sums[b * parts + part];
        sum = (float)sum == INFINITY ? INFINITY : sum; /* as a sum of float32 would be */
        distance[b] = norm == HUBER ? sqrt(sum + huber_c * huber_c) - huber_c : sum / count;
        loss[b] = distance[b] * weight_of(weighting, (levels){weight, of_weight}, level(start, b), weight_sigma_data, b);
    }
}

/* The gradient of f from that of the losses, and its opposite where that is wanted. */
void losses_backward(float *to, float *opposite, const float *distance, const float *grad, long of_grad,
                     const float *x, const float *f, const float *y, const float *x2,
                     const float *sigma, long of_sigma, const float *sigma2, long of_sigma2, const float *weight,
                     long of_weight, int norm, double huber_c, int weighting, double weight_sigma_data,
                     double sigma_data, double boundary, long batch, long count, int threads)
{
    const levels start = {sigma, of_sigma}, end = {sigma2, of_sigma2};
    const long parts = parts_of(count);

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            float s = level(start, b), scale = level((levels){grad, of_grad}, b);
            scale *= weight_of(weighting, (levels){weight, of_weight}, s, weight_sigma_data, b);
            float length = distance[b] + huber_c;
            if (norm == HUBER)
                scale = length == 0 ? 0 : scale / length; /* at D = D' there is no slope */
            else
                scale *= (norm == L2 ? 2.0f : 1.0f) / count;
            scalings by = scalings_of(s, sigma_data, boundary, 0);
            scalings by2 = x2 ? scalings_of(level(end, b), sigma_data, boundary, 0) : by;
            long stop = b * count + (part + 1 < parts ? (part + 1) * PART : count);
            for (long at = b * count + part * PART; at < stop; at += BLOCK) {
                long n = stop - at < BLOCK ? stop - at : BLOCK;
                difference(to + at, x + at, f + at, y + at, x2 ? x2 + at : 0, by, by2, n);
                if (norm == L1)
#pragma omp simd
                    for (long i = at; i < at + n; i++)
                        to[i] = (to[i] > 0) - (to[i] < 0);
#pragma omp simd
                for (long i = at; i < at + n; i++)
                    to[i] *= scale * by.out;
                if (opposite)
#pragma omp simd
                    for (long i = at; i < at + n; i++)
                        opposite[i] = -to[i];
            }
        }
}
