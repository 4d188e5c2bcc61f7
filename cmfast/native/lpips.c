/* Images as the trunk of LPIPS takes them, and distances of its maps, with their gradients: called by lpips.py. */
#include <math.h>

#include "common.h"

int omp_get_thread_num(void);

/* Pixels of maps whose distances one sum is of, which does not depend on the threads; rows of an image in a part. */
#define PIXELS 64
#define LINES 16
#define EPS 1e-10

long lpips_part(void) { return PIXELS; }

/* In float64, as PyTorch's norms are on a CPU, whatever a compiler makes of the order. */
INLINE double squares(const float *x, long count)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++)
        sum += (double)x[i] * x[i];
    return sum;
}

/* What maps f and g are multiplied with at a pixel: both with the least, and one with more. */
typedef struct {
    float least, more_f, more_g;
} factors;

/* Of what is the same, and by the same length, nothing; and the factor where all is zero, which is huge, is no part of
 * what is small. */
INLINE float unit_difference(float f, float g, factors by)
{
    return (f - g) * by.least + (f * by.more_f - g * by.more_g);
}

/* Distances [batch] of maps f and g [batch, pixels, channels]; sums [batch, parts]. Into `gradient`, where there is one,
 * that of f by a distance whose own is 1. */
void lpips_layer(float *distance, double *sums, float *gradient, const float *f, const float *g, const float *weight,
                 long batch, long pixels, long channels, int threads)
{
    const long parts = (pixels + PIXELS - 1) / PIXELS;
    const double slope = 2.0 / pixels;

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < batch; b++)
        for (long part = 0; part < parts; part++) {
            long stop = part + 1 < parts ? (part + 1) * PIXELS : pixels;
            double sum = 0;
            for (long pixel = part * PIXELS; pixel < stop; pixel++) {
                const float *at = f + (b * pixels + pixel) * channels, *of = g + (at - f);
                double length = sqrt(squares(at, channels)), other = sqrt(squares(of, channels));
                double by_f = 1 / (length + EPS), by_g = 1 / (other + EPS), least = by_f < by_g ? by_f : by_g;
                factors by = {least, by_f - least, by_g - least};
                float total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
                for (long c = 0; c < channels; c++) {
                    float delta = unit_difference(at[c], of[c], by);
                    total += weight[c] * delta * delta;
                    along += weight[c] * delta * at[c];
                }
                sum += total;
                if (!gradient)
                    continue;
                /* (a - f (a . f) / (|f| (|f| + eps))) / (|f| + eps) for a = slope w delta; where |f| = 0 the first. */
                float *to = gradient + (at - f), back = length == 0 ? 0 : along * by_f / length;
#pragma omp simd
                for (long c = 0; c < channels; c++)
                    to[c] = (weight[c] * unit_difference(at[c], of[c], by) - at[c] * back) * (float)(slope * by_f);
            }
            sums[b * parts + part] = sum;
        }
    for (long b = 0; b < batch; b++) {
        double sum = 0;
        for (long part = 0; part < parts; part++)
            sum += sums[b * parts + part];
        distance[b] = sum / pixels;
    }
}

/* The pixels that a resized one lies between, of so many: part of the way from one to the next. In float32, as
 * PyTorch's are. */
typedef struct {
    long low, high;
    float part;
} between;

INLINE between between_of(long at, float scale, long count)
{
    if (scale == 1)
        return (between){at, at, 0}; /* however many there are: float32 counts to 2^24 */
    float x = scale * (at + 0.5f) - 0.5f;
    x = x > 0 ? x : 0;
    long low = x;
    low = low < count ? low : count - 1;
    return (between){low, low + (low < count - 1), x - low};
}

/* Between two numbers; at the first, whatever the second is. */
INLINE float blend(float first, float second, float part)
{
    return part == 0 ? first : (1 - part) * first + part * second;
}

/* Where an image's numbers are, and how many there are of it and of what is made of it. */
typedef struct {
    long of_sample, of_channel, of_row, of_column, batch, own, height, width, channels, rows, columns;
} layout;

/* What a channel is multiplied with, and what is added: ((x - low) / (high - low) - mean) / std. */
INLINE void standard(float *factor, float *shift, const float *mean, const float *std, double low, double high,
                     long channels)
{
    for (long c = 0; c < channels; c++) {
        factor[c] = 1 / ((high - low) * std[c]);
        shift[c] = mean ? -(low / (high - low) + mean[c]) / std[c] : 0;
    }
}

/* Numbers that a thread works in: two rows, and the factors and shifts of channels. */
long lpips_room(long channels, long columns, int last)
{
    return 2 * columns * (last ? channels : 1) + 2 * channels;
}

/* A row of an image, of the columns of the resized one, for `group` channels from `first` on, each beside the others. */
static void across(float *to, const float *image, layout it, const float *factor, const float *shift, long first,
                   long group)
{
    const float scale = (float)it.width / it.columns;

    for (long x = 0; x < it.columns; x++) {
        between at = between_of(x, scale, it.width);
        for (long c = first; c < first + group; c++) {
            const float *from = image + (it.own == 1 ? 0 : c) * it.of_channel;
            float value = blend(from[at.low * it.of_column], from[at.high * it.of_column], at.part);
            *to++ = value * factor[c] + shift[c];
        }
    }
}

/* Resized and standardised: [batch, channels, rows, columns], or channels last. */
void lpips_input(float *out, float *rooms, const float *image, const float *mean, const float *std, double low,
                 double high, const long *sizes, int last, int threads)
{
    const layout it = *(const layout *)sizes;
    const float scale = (float)it.height / it.rows;
    const long group = last ? it.channels : 1, planes = it.channels / group, count = it.columns * group;
    const long parts = (it.rows + LINES - 1) / LINES;

#pragma omp parallel for collapse(3) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < it.batch; b++)
        for (long plane = 0; plane < planes; plane++)
            for (long part = 0; part < parts; part++) {
                float *room = rooms + omp_get_thread_num() * lpips_room(it.channels, it.columns, last);
                float *factor = room + 2 * count, *shift = factor + it.channels;
                long held[2] = {-1, -1}, stop = part + 1 < parts ? (part + 1) * LINES : it.rows;
                standard(factor, shift, mean, std, low, high, it.channels);
                for (long y = part * LINES; y < stop; y++) {
                    between at = between_of(y, scale, it.height);
                    for (long row = at.low; row <= at.high; row++)
                        if (held[row & 1] != row) { /* of two neighbours one is odd */
                            const float *from = image + b * it.of_sample + row * it.of_row;
                            across(room + (row & 1) * count, from, it, factor, shift, plane, group);
                            held[row & 1] = row;
                        }
                    const float *first = room + (at.low & 1) * count, *second = room + (at.high & 1) * count;
                    float *to = out + ((b * planes + plane) * it.rows + y) * count;
#pragma omp simd
                    for (long i = 0; i < count; i++)
                        to[i] = blend(first[i], second[i], at.part);
                }
            }
}

/* The gradient of the image from that of what was made of it: of every row of it, by what lies there. */
void lpips_input_backward(float *out, float *rooms, const float *grad, const float *std, double low, double high,
                          const long *sizes, int last, int threads)
{
    const layout it = *(const layout *)sizes;
    const float scale = (float)it.height / it.rows, scale_x = (float)it.width / it.columns;
    const long group = last ? it.channels : 1, planes = it.channels / group, count = it.columns * group;

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (long b = 0; b < it.batch; b++)
        for (long row = 0; row < it.height; row++) {
            float *room = rooms + omp_get_thread_num() * lpips_room(it.channels, it.columns, last);
            float *factor = room + 2 * count, *line = out + b * it.of_sample + row * it.of_row;
            /* Rows of the resized image that may lie beside it, and one more at either end. */
            long begin = row == 0 ? 0 : (row - 0.5) / scale - 1.5, end = (row + 1.5) / scale + 1.5;
            begin = begin > 0 ? begin : 0;
            end = row == it.height - 1 || end > it.rows ? it.rows : end;
            standard(factor, factor + it.channels, 0, std, low, high, it.channels);
            for (long c = 0; c < it.own; c++)
                for (long x = 0; x < it.width; x++)
                    line[c * it.of_channel + x * it.of_column] = 0;
            for (long plane = 0; plane < planes; plane++) {
                for (long i = 0; i < count; i++)
                    room[i] = 0;
                for (long y = begin; y < end; y++) {
                    between at = between_of(y, scale, it.height);
                    float share = (at.low == row ? 1 - at.part : 0) + (at.high == row ? at.part : 0);
                    const float *from = grad + ((b * planes + plane) * it.rows + y) * count;
                    if (share != 0)
#pragma omp simd
                        for (long i = 0; i < count; i++)
                            room[i] += share * from[i];
                }
                for (long x = 0; x < it.columns; x++) {
                    between at = between_of(x, scale_x, it.width);
                    for (long c = plane; c < plane + group; c++) {
                        float *to = line + (it.own == 1 ? 0 : c) * it.of_channel;
                        float value = room[x * group + c - plane] * factor[c];
                        to[at.low * it.of_column] += (1 - at.part) * value;
                        if (at.part != 0)
                            to[at.high * it.of_column] += at.part * value;
                    }
                }
            }
        }
}
