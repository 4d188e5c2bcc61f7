/* A step of Adam or RAdam with its averages, or averages alone: one pass over lists of tensors, called by optimizer.py.
 *
 * Tensor t has counts[t] numbers, at lists[kind * tensors + t]; kinds are PARAMETER to SQUARE, and then the averages.
 */
#include <math.h>

#include "common.h"

/* Numbers that are in the first cache between two loops. */
#define BLOCK 1024

int omp_get_thread_num(void), omp_get_num_threads(void);

enum { PARAMETER, GRADIENT, MEAN, SQUARE, AVERAGES };

/* What holds for all numbers: a gradient's divisor and sign, decay of two kinds, rates of the moments; and the step's
 * size, and its divisor slope sqrt(v) + eps where it adapts. */
typedef struct {
    double divisor, sign, l2, decay, beta1, beta2, size, slope, eps;
    int adaptive;
} step;

static void change(float *p, const float *grad, float *m, float *v, const step *by, long count)
{
    const float divisor = by->divisor, sign = by->sign, l2 = by->l2, kept = 1 - by->decay, beta1 = by->beta1;
    const float rest1 = 1 - by->beta1, beta2 = by->beta2, rest2 = 1 - by->beta2, size = by->size;
    const float slope = by->slope, eps = by->eps;
    float g[BLOCK];

    if (by->divisor == 1)
#pragma omp simd
        for (long i = 0; i < count; i++)
            g[i] = sign * grad[i];
    else
#pragma omp simd
        for (long i = 0; i < count; i++)
            g[i] = sign * grad[i] / divisor;
    if (by->l2 != 0)
#pragma omp simd
        for (long i = 0; i < count; i++)
            g[i] += l2 * p[i];
#pragma omp simd
    for (long i = 0; i < count; i++) {
        m[i] = beta1 * m[i] + rest1 * g[i];
        v[i] = beta2 * v[i] + rest2 * (g[i] * g[i]);
    }
    if (by->adaptive)
#pragma omp simd
        for (long i = 0; i < count; i++)
            p[i] = kept * p[i] - size * m[i] / (slope * sqrtf(v[i]) + eps);
    else
#pragma omp simd
        for (long i = 0; i < count; i++)
            p[i] = kept * p[i] - size * m[i];
}

/* From the nearer end, so that a weight of 1 copies. */
static void follow(float *average, const float *p, float weight, long count)
{
    if (weight < 0.5f)
#pragma omp simd
        for (long i = 0; i < count; i++)
            average[i] += weight * (p[i] - average[i]);
    else
#pragma omp simd
        for (long i = 0; i < count; i++)
            average[i] = p[i] - (1 - weight) * (p[i] - average[i]);
}

/* by: no step where there is none; weights: what an average moves by towards its parameter. */
void optimizer_pass(long tensors, const long *counts, float *const *lists, const step *by, long averages,
                    const double *weights, int threads)
{
    long total = 0;
    for (long t = 0; t < tensors; t++)
        total += counts[t];

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long team = omp_get_num_threads(), each = (total / team / BLOCK + 1) * BLOCK;
        long first = omp_get_thread_num() * each, last = first + each, at = 0;
        for (long t = 0; t < tensors; at += counts[t++]) {
            long begin = first > at ? first - at : 0, end = last - at < counts[t] ? last - at : counts[t];
            for (long i = begin; i < end; i += BLOCK) {
                long n = end - i < BLOCK ? end - i : BLOCK;
                float *p = lists[PARAMETER * tensors + t] + i;
                if (by)
                    change(p, lists[GRADIENT * tensors + t] + i, lists[MEAN * tensors + t] + i,
                           lists[SQUARE * tensors + t] + i, by, n);
                for (long k = 0; k < averages; k++)
                    follow(lists[(AVERAGES + k) * tensors + t] + i, p, weights[k], n);
            }
        }
    }
}
