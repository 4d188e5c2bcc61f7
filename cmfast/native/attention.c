/* Self-attention of float32, softmax(q k' scale) v, without gradients: called by attention.py.
 *
 * For ROWS queries at once all weights are made, which stay in the cache, from keys and values that are packed first as
 * `multiply` reads them.
 */
#include <math.h>
#include <string.h>

#include "common.h"

int omp_get_thread_num(void);

/* Values that are summed before the sum is added to others: rounding errors grow with their number. */
#define DEPTH 256

/* Keys, or values, that fill all panels. */
INLINE long padded(long tokens) { return (tokens + PANEL - 1) / PANEL * PANEL; }

/* Floats of workspace for each thread. */
static long room(long tokens, long dim) { return ROWS * (dim + padded(tokens)); }

long attention_space(long batch, long heads, long tokens, long dim, int threads)
{
    return batch * heads * 2 * padded(tokens) * dim + threads * room(tokens, dim);
}

/* The keys of a head, `apart` from each other, to [padded / PANEL, dim, PANEL]; zeros beyond the last. */
static void pack_keys(const float *from, float *to, long tokens, long apart, long dim)
{
    for (long t = 0; t < padded(tokens); t++)
        for (long d = 0; d < dim; d++)
            to[(t / PANEL * dim + d) * PANEL + t % PANEL] = t < tokens ? from[t * apart + d] : 0;
}

/* The values of a head to [dim / PANEL, padded, PANEL]. */
static void pack_values(const float *from, float *to, long tokens, long apart, long dim)
{
    for (long d = 0; d < dim; d += PANEL)
        for (long t = 0; t < padded(tokens); t++) {
            float *row = to + (d / PANEL * padded(tokens) + t) * PANEL;
            if (t < tokens)
                memcpy(row, from + t * apart + d, PANEL * sizeof(float));
            else
                memset(row, 0, PANEL * sizeof(float));
        }
}

/* e^(x - the largest) of a row; returns the sum. Beyond the last are numbers that meet values of zero. */
INLINE float exponentials(float *row, long tokens)
{
    vec most = (vec){0} - INFINITY, sums = {0};
    float largest = -INFINITY, sum = 0;
    long whole = tokens / LANES * LANES;
    for (long t = 0; t < whole; t += LANES)
        most = choose(load(row + t) > most, load(row + t), most);
    for (int i = 0; i < LANES; i++)
        largest = most[i] > largest ? most[i] : largest;
    for (long t = whole; t < tokens; t++)
        largest = row[t] > largest ? row[t] : largest;
    for (long t = 0; t < padded(tokens); t += LANES)
        store(row + t, exponential(load(row + t) - largest));
    for (long t = 0; t < whole; t += LANES)
        sums += load(row + t);
    for (int i = 0; i < LANES; i++)
        sum += sums[i];
    for (long t = whole; t < tokens; t++)
        sum += row[t];
    return sum;
}

/* out [batch, tokens, heads, dim] of qkv [batch, tokens, 3, heads, dim]. dim is a multiple of PANEL. space: of
 * `attention_space`.
 */
void attention_forward(const float *qkv, float *out, float *space, long batch, long heads, long tokens, long dim,
                       float scale, int threads)
{
    long width = heads * dim, blocks = (tokens + ROWS - 1) / ROWS, size = padded(tokens) * dim;
    float *rooms = space + batch * heads * 2 * size;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long head = 0; head < batch * heads; head++) {
            const float *keys = qkv + (head / heads * tokens * 3 + 1) * width + head % heads * dim;
            pack_keys(keys, space + head * 2 * size, tokens, 3 * width, dim);
            pack_values(keys + width, space + (head * 2 + 1) * size, tokens, 3 * width, dim);
        }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (long head = 0; head < batch * heads; head++)
            for (long block = 0; block < blocks; block++) {
                const float *keys = space + head * 2 * size, *values = keys + size;
                float *queries = rooms + omp_get_thread_num() * room(tokens, dim);
                float *weights = queries + ROWS * dim, tile[ROWS * PANEL], total[ROWS * PANEL], over[ROWS];
                long first = head / heads * tokens + block * ROWS, column = head % heads * dim;
                long count = tokens - block * ROWS < ROWS ? tokens - block * ROWS : ROWS;

                memset(queries, 0, ROWS * dim * sizeof(float));
                for (long r = 0; r < count; r++)
                    for (long d = 0; d < dim; d++)
                        queries[r * dim + d] = qkv[(first + r) * 3 * width + column + d] * scale;
                for (long t = 0; t < padded(tokens); t += PANEL)
                    multiply(queries, dim, keys + t * dim, weights + t, padded(tokens), dim);
                for (long r = 0; r < ROWS; r++)
                    over[r] = 1.0f / exponentials(weights + r * padded(tokens), tokens);
                for (long d = 0; d < dim; d += PANEL) {
                    memset(total, 0, ROWS * PANEL * sizeof(float));
                    for (long t = 0; t < padded(tokens); t += DEPTH) {
                        long depth = padded(tokens) - t < DEPTH ? padded(tokens) - t : DEPTH;
                        multiply(weights + t, padded(tokens), values + d * padded(tokens) + t * PANEL, tile, PANEL, depth);
                        for (long i = 0; i < ROWS * PANEL; i += LANES)
                            store(total + i, load(total + i) + load(tile + i));
                    }
                    for (long r = 0; r < count; r++)
                        for (long i = 0; i < PANEL; i += LANES)
                            store(out + (first + r) * width + column + d + i, load(total + r * PANEL + i) * over[r]);
                }
            }
    }
}
