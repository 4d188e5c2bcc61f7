/* 3x3 convolutions of float32 in channels_last by Winograd's F(2x2, 3x3), Lavin & Gray 2016: called by winograd.py.
 *
 * An output tile of 2x2 pixels comes from an input tile of 4x4, Y = A' ((G g G') * (B' d B)) A. The products of one place
 * in all tiles are a matrix multiplication over channels, so there are 16 of these, with 4/9 of the multiplications.
 * A thread does a block of tiles from the first step to the last while they are in its cache.
 *
 * Of an image that nearest neighbour doubles, a tile has rows and columns [a b b c], of which B' makes [a-b 2b 0 b-c]:
 * seven of the 16 products are none, and the small image is read in place of the large one.
 */
#include <string.h>

#include "common.h"

int omp_get_thread_num(void), omp_get_num_threads(void);

/* Columns of an accumulation's rows that are summed in registers. */
#define BAND (LANES / 2)
/* Between what lies 16 times in memory: without it, all 16 fall on the same lines of the cache. */
#define APART 16
/* Whether there is nothing at a place of a doubled image's tile. */
#define EMPTY(place) ((place) / 4 == 2 || (place) % 4 == 2)

/* Floats of workspace for each thread. */
long winograd_room(long channels, long block)
{
    return 16 * (block * channels + APART) + 16 * (block * PANEL + APART) + channels;
}

/* Floats of packed filters. */
long winograd_size(long channels, long outputs)
{
    return (outputs + PANEL - 1) / PANEL * 16 * (channels * PANEL + APART);
}

/* What the number of tiles in a block is a multiple of. */
long winograd_rows(void) { return ROWS; }

/* B' d B of a tile, whose 16 pixels are at `from`: place p goes to `to` + p `apart`. */
INLINE void spread(const float *const from[16], float *to, long apart, long channels)
{
    for (long c = 0; c < channels; c += LANES) {
        vec d[4][4], h[4][4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            d[i / 4][i % 4] = load(from[i] + c);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            h[0][j] = d[0][j] - d[2][j];
            h[1][j] = d[1][j] + d[2][j];
            h[2][j] = d[2][j] - d[1][j];
            h[3][j] = d[1][j] - d[3][j];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            store(to + c + (4 * i) * apart, h[i][0] - h[i][2]);
            store(to + c + (4 * i + 1) * apart, h[i][1] + h[i][2]);
            store(to + c + (4 * i + 2) * apart, h[i][2] - h[i][1]);
            store(to + c + (4 * i + 3) * apart, h[i][1] - h[i][3]);
        }
    }
}

/* A' m A of a vector of a tile, whose place p is at `from` + p `apart`. */
INLINE void gather(const float *from, long apart, vec out[2][2])
{
    vec h[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vec m1 = load(from + (4 + j) * apart), m2 = load(from + (8 + j) * apart);
        h[0][j] = load(from + j * apart) + m1 + m2;
        h[1][j] = m1 - m2 - load(from + (12 + j) * apart);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        out[i][0] = h[i][0] + h[i][1] + h[i][2];
        out[i][1] = h[i][1] - h[i][2] - h[i][3];
    }
}

/* The channels of a pixel of image b of x [batch, height, width, channels], zeros around it; of its size when doubled. */
INLINE const float *pixel(const float *x, const float *zeros, long b, long h, long w, long height, long width,
                          long channels, int doubled)
{
    if (h < 0 || h >= height || w < 0 || w >= width)
        return zeros;
    return x + ((b * (height >> doubled) + (h >> doubled)) * (width >> doubled) + (w >> doubled)) * channels;
}

/* y = the convolution of x with zeros around it, plus bias and residual, which may be NULL.
 *
 * x [batch, height, width, channels], or half as high and wide if it is to be doubled; residual and y [batch, height,
 * width, outputs], bias [outputs]; filters: of `winograd_filters`. channels and outputs are multiples of LANES. space:
 * `winograd_room` for each thread. block: tiles, a multiple of ROWS.
 */
void winograd_convolve(const float *x, const float *filters, const float *bias, const float *residual, float *y,
                       float *space, long batch, long height, long width, long channels, long outputs, int doubled,
                       long block, int threads)
{
    long rows = (height + 1) / 2, columns = (width + 1) / 2, tiles = batch * rows * columns;
    long from_apart = block * channels + APART, to_apart = block * PANEL + APART;

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long first = 0; first < tiles; first += block) {
        float *inputs = space + omp_get_thread_num() * winograd_room(channels, block);
        float *products = inputs + 16 * from_apart, *zeros = products + 16 * to_apart;
        long count = tiles - first < block ? tiles - first : block;

        memset(zeros, 0, channels * sizeof(float));
        for (long t = 0; t < count; t++) {
            long tile = first + t, b = tile / (rows * columns);
            long top = 2 * (tile / columns % rows) - 1, left = 2 * (tile % columns) - 1;
            const float *from[16];
            for (int i = 0; i < 16; i++)
                from[i] = pixel(x, zeros, b, top + i / 4, left + i % 4, height, width, channels, doubled);
            spread(from, inputs + t * channels, from_apart, channels);
        }
        for (int p = 0; doubled && p < 16; p++)
            if (EMPTY(p))
                memset(products + p * to_apart, 0, block * PANEL * sizeof(float));
        for (long panel = 0; panel < outputs; panel += PANEL) {
            const float *of_panel = filters + panel / PANEL * 16 * (channels * PANEL + APART);
            /* Rows beyond the last tile are multiplied as well: whatever is there, nobody reads what comes of it. */
            for (int p = 0; p < 16; p++)
                for (long t = 0; t < count && !(doubled && EMPTY(p)); t += ROWS)
                    multiply(inputs + p * from_apart + t * channels, channels, of_panel + p * (channels * PANEL + APART),
                             products + p * to_apart + t * PANEL, PANEL, channels);
            for (long t = 0; t < count; t++) {
                long tile = first + t, b = tile / (rows * columns);
                long top = 2 * (tile / columns % rows), left = 2 * (tile % columns);
                for (long k = 0; k < PANEL && panel + k < outputs; k += LANES) {
                    vec out[2][2];
                    gather(products + t * PANEL + k, to_apart, out);
                    for (int i = 0; i < 4; i++) {
                        if (top + i / 2 >= height || left + i % 2 >= width)
                            continue;
                        long at = ((b * height + top + i / 2) * width + left + i % 2) * outputs + panel + k;
                        vec sum = out[i / 2][i % 2];
                        if (bias)
                            sum += load(bias + panel + k);
                        if (residual)
                            sum += load(residual + at);
                        store(y + at, sum);
                    }
                }
            }
        }
    }
}

/* G g G' of filters, in panels of outputs: to [outputs / PANEL, 16, channels, PANEL], and APART after each place's.
 * Zeros where the last panel is not full.
 *
 * from: tap i of channel c and output k at c of_channel + k of_output + i of_tap. turned: each by half a turn, as the
 * gradient of the input needs them, whose channels are the outputs.
 */
void winograd_filters(const float *from, float *to, long channels, long outputs, long of_channel, long of_output,
                      long of_tap, int turned, int threads)
{
    long vectors = (outputs + PANEL - 1) / PANEL * 2, apart = channels * PANEL + APART;

    /* Channels by as many as lie in the lines of the cache that are read, as taps may lie apart. */
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (long vector = 0; vector < vectors; vector++)
        for (long some = 0; some < channels; some += LANES)
            for (long c = some; c < some + LANES; c++) {
                float *out = to + vector / 2 * 16 * apart + c * PANEL + vector % 2 * LANES;
                vec g[9], h[4][3];
                for (int i = 0; i < 9; i++)
                    for (int lane = 0; lane < LANES; lane++) {
                        long k = vector * LANES + lane;
                        g[i][lane] = k < outputs ? from[c * of_channel + k * of_output + (turned ? 8 - i : i) * of_tap] : 0;
                    }
#pragma GCC unroll 3
                for (int j = 0; j < 3; j++) {
                    h[0][j] = g[j];
                    h[1][j] = 0.5f * (g[j] + g[6 + j] + g[3 + j]);
                    h[2][j] = 0.5f * (g[j] + g[6 + j] - g[3 + j]);
                    h[3][j] = g[6 + j];
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    store(out + (4 * i) * apart, h[i][0]);
                    store(out + (4 * i + 1) * apart, 0.5f * (h[i][0] + h[i][2] + h[i][1]));
                    store(out + (4 * i + 2) * apart, 0.5f * (h[i][0] + h[i][2] - h[i][1]));
                    store(out + (4 * i + 3) * apart, h[i][2]);
                }
            }
}

/* A g A' of a vector of a tile of 2x2 pixels: place p goes to `to` + p `apart`. */
INLINE void unfold(vec g[2][2], float *to, long apart)
{
    vec h[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        h[0][j] = g[0][j];
        h[1][j] = g[0][j] + g[1][j];
        h[2][j] = g[0][j] - g[1][j];
        h[3][j] = -g[1][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        store(to + (4 * i) * apart, h[i][0]);
        store(to + (4 * i + 1) * apart, h[i][0] + h[i][1]);
        store(to + (4 * i + 2) * apart, h[i][0] - h[i][1]);
        store(to + (4 * i + 3) * apart, -h[i][1]);
    }
}

/* c [BAND, PANEL] += a' b, a [depth, BAND] at a distance of `wide`, b [depth, PANEL] */
INLINE void accumulate(const float *a, long wide, const float *b, float *c, long depth)
{
    vec sums[BAND][2];
#pragma GCC unroll 8
    for (int i = 0; i < BAND; i++)
        sums[i][0] = sums[i][1] = (vec){0};
    for (long t = 0; t < depth; t++) {
        vec left = load(b + t * PANEL), right = load(b + t * PANEL + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < BAND; i++) {
            sums[i][0] += a[t * wide + i] * left;
            sums[i][1] += a[t * wide + i] * right;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < BAND; i++) {
        store(c + i * PANEL, load(c + i * PANEL) + sums[i][0]);
        store(c + i * PANEL + LANES, load(c + i * PANEL + LANES) + sums[i][1]);
    }
}

/* Floats of workspace for each thread, for the gradient of filters. */
long winograd_gradient_room(long channels, long outputs, long block)
{
    long panels = (outputs + PANEL - 1) / PANEL;
    long most = channels > outputs ? channels : outputs;
    return 16 * (block * channels + APART) + 16 * (panels * block * PANEL + APART) + winograd_size(channels, outputs) + most;
}

/* The gradient of filters, G' (sum over tiles of (A g A') * (B' d B)) G, for x and the gradient g of the output.
 *
 * As in `winograd_convolve` and `winograd_filters`, which this is the transposition of. space: of
 * `winograd_gradient_room` for each thread. Which tiles a thread sums does not change from one call to the next.
 */
void winograd_gradient(const float *x, const float *gradient, float *to, float *space, long batch, long height, long width,
                       long channels, long outputs, int doubled, long of_channel, long of_output, long of_tap, long block,
                       int threads)
{
    long rows = (height + 1) / 2, columns = (width + 1) / 2, tiles = batch * rows * columns;
    long panels = (outputs + PANEL - 1) / PANEL, room = winograd_gradient_room(channels, outputs, block);
    long x_apart = block * channels + APART, g_apart = panels * block * PANEL + APART;
    long apart = channels * PANEL + APART, size = winograd_size(channels, outputs);

#pragma omp parallel num_threads(threads)
    {
        /* OpenMP may give fewer threads than were asked for. */
        int team = omp_get_num_threads();
        float *sums = space + omp_get_thread_num() * room, *inputs = sums + size;
        float *outgoing = inputs + 16 * x_apart, *zeros = outgoing + 16 * g_apart;

        memset(sums, 0, size * sizeof(float));
        memset(zeros, 0, (channels > outputs ? channels : outputs) * sizeof(float));
#pragma omp for schedule(static)
        for (long first = 0; first < tiles; first += block) {
            long count = tiles - first < block ? tiles - first : block;
            for (long t = 0; t < count; t++) {
                long tile = first + t, b = tile / (rows * columns);
                long top = 2 * (tile / columns % rows), left = 2 * (tile % columns);
                const float *from[16], *of_pixel[4];
                for (int i = 0; i < 16; i++)
                    from[i] = pixel(x, zeros, b, top - 1 + i / 4, left - 1 + i % 4, height, width, channels, doubled);
                spread(from, inputs + t * channels, x_apart, channels);
                for (int i = 0; i < 4; i++)
                    of_pixel[i] = pixel(gradient, zeros, b, top + i / 2, left + i % 2, height, width, outputs, 0);
                for (long k = 0; k < outputs; k += LANES) {
                    vec g[2][2];
                    for (int i = 0; i < 4; i++)
                        g[i / 2][i % 2] = load(of_pixel[i] + k);
                    unfold(g, outgoing + (k / PANEL * block + t) * PANEL + k % PANEL, g_apart);
                }
            }
            for (int p = 0; p < 16; p++)
                for (long panel = 0; panel < panels && !(doubled && EMPTY(p)); panel++)
                    for (long c = 0; c < channels; c += BAND)
                        accumulate(inputs + p * x_apart + c, channels, outgoing + p * g_apart + panel * block * PANEL,
                                   sums + (panel * 16 + p) * apart + c * PANEL, count);
        }
#pragma omp for schedule(static) collapse(2)
        for (long vector = 0; vector < outputs / LANES; vector++)
            for (long some = 0; some < channels; some += LANES)
                for (long c = some; c < some + LANES; c++) {
                    vec u[4][4], h[3][4], g[9];
                    for (int p = 0; p < 16; p++) {
                        const float *of_thread = space + (vector / 2 * 16 + p) * apart + c * PANEL + vector % 2 * LANES;
                        vec sum = load(of_thread);
                        for (int thread = 1; thread < team; thread++)
                            sum += load(of_thread + thread * room);
                        u[p / 4][p % 4] = sum;
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        h[0][j] = u[0][j] + 0.5f * (u[1][j] + u[2][j]);
                        h[1][j] = 0.5f * (u[1][j] - u[2][j]);
                        h[2][j] = 0.5f * (u[1][j] + u[2][j]) + u[3][j];
                    }
#pragma GCC unroll 3
                    for (int i = 0; i < 3; i++) {
                        g[3 * i] = h[i][0] + 0.5f * (h[i][1] + h[i][2]);
                        g[3 * i + 1] = 0.5f * (h[i][1] - h[i][2]);
                        g[3 * i + 2] = 0.5f * (h[i][1] + h[i][2]) + h[i][3];
                    }
                    for (int i = 0; i < 9; i++)
                        for (int lane = 0; lane < LANES; lane++)
                            to[c * of_channel + (vector * LANES + lane) * of_output + i * of_tap] = g[i][lane];
                }
    }
}
