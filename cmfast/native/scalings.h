/* What steps.c and losses.c share: batches [batch, count] of float32, as they lie in memory, and what a sample's level
 * makes of a network's output. Formulas are those of cmfast/reference, in float32 as there.
 */
#include <math.h>

#include "common.h"

/* Numbers that a thread does at a time; and of these, that are in the first cache between two loops. */
#define PART 16384
#define BLOCK 1024

/* A sample's level is at [b * step]. */
typedef struct {
    const float *at;
    long step;
} levels;

INLINE float level(levels of, long b) { return of.at[b * of.step]; }

/* What D is made of: c_skip, c_out, the limits that it is clamped to, and bits that let no x through to a network that
 * is D itself, as 0 times infinity would. Not a branch, which loops would have to be written twice for. */
typedef struct {
    float skip, out, in, least, most;
    unsigned bits;
} scalings;

INLINE scalings scalings_of(float sigma, double sigma_data, float boundary, int clip)
{
    scalings it = {0, 1, 1, clip ? -1 : -INFINITY, clip ? 1 : INFINITY, 0};
    if (!isnan(sigma_data)) {
        it.bits = ~0u;
        float offset = sigma - boundary, square = sigma_data * sigma_data, root = sqrtf(sigma * sigma + square);
        it.skip = square / (offset * offset + square);
        it.out = (float)sigma_data * offset / root;
        it.in = 1 / root;
    }
    return it;
}

INLINE float denoised(float x, float f, scalings by)
{
    union {
        float number;
        unsigned bits;
    } seen = {x};
    seen.bits &= by.bits;
    float d = by.skip * seen.number + by.out * f;
    return d < by.least ? by.least : d > by.most ? by.most : d; /* NaN stays */
}
