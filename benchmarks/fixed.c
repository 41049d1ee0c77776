/* Fixed point, as rounding.c does it for doubles: one pass over memory, so that the comparison in exact.py is fair.

   x lies in blocks of `block` elements, each with a scale of its own, a power of two. total[i] += x[i] * scale, rounded
   to the nearest integer; largest[b] becomes the largest |x[i]| of block b. A sum that overflows wraps.

   Compiled where it runs, for that processor. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

#define DEFINE(name, integer, natural, real, nearest)                                                               \
    void name(natural *restrict total, const float *restrict x, size_t size, const double *restrict scales,         \
              float *restrict largest, size_t block) {                                                              \
        for (size_t b = 0; b * block < size; b++) {                                                                 \
            const size_t begin = b * block, end = size - begin < block ? size : begin + block;                      \
            const real scale = (real)scales[b];                                                                     \
            uint32_t most = 0;                                                                                      \
            for (size_t i = begin; i < end; i++) {                                                                  \
                uint32_t m = magnitude(x[i]);                                                                       \
                most = m > most ? m : most;                                                                         \
                total[i] += (natural)(integer)nearest((real)x[i] * scale);                                          \
            }                                                                                                       \
            memcpy(&largest[b], &most, sizeof most);                                                                \
        }                                                                                                           \
    }

DEFINE(add_int32, int32_t, uint32_t, float, rintf)
DEFINE(add_int64, int64_t, uint64_t, double, rint)
