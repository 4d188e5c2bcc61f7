/* What noise.c makes for others: normals from number `first` of a sample on, a multiple of 4. */
#include "common.h"

__attribute__((visibility("hidden"))) void drawn(float *to, long sample, unsigned long seed, unsigned draw, long first,
                                                 long count);
