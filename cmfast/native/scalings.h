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

/* What D is made of: c_skip, c_out, and the limits that it is clamped to; or the output alone, of a network that is D. */
typedef struct {
    float skip, out, in, least, most;
    int plain;
} scalings;

static scalings scalings_of(float sigma, double sigma_data, float boundary, int clip)
{
    scalings it = {0, 1, 1, clip ? -1 : -INFINITY, clip ? 1 : INFINITY, isnan(sigma_data)};
    if (!it.plain) {
        float offset = sigma - boundary, square = sigma_data * sigma_data, root = sqrtf(sigma * sigma + square);
        it.skip = square / (offset * offset + square);
        it.out = (float)sigma_data * offset / root;
        it.in = 1 / root;
    }
    return it;
}

INLINE float denoised(float x, float f, scalings by)
{
    float d = by.plain ? f : by.skip * x + by.out * f;
    return d < by.least ? by.least : d > by.most ? by.most : d; /* NaN stays */
}
