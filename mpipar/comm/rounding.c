/* One pass over memory for what comm/exact.py does in several: its functions, to the same bits.

   Nothing here may be reordered or fused: (x + anchor) - anchor is what rounds. Compile without -ffast-math, and with
   -ffp-contract=off. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The same function for several generations of processors; the loader takes the one for this machine. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif

/* Without its sign, the bits of a float grow with its value; those of infinity and NaN are the largest. */
static inline uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* total[i] = x[i] on the grid of the anchor. Returns the largest |x[i]|. */
EVERY_PROCESSOR
float mpipar_round(double *restrict total, const float *restrict x, size_t size, double anchor) {
    uint32_t largest = 0;
    for (size_t i = 0; i < size; i++) {
        uint32_t m = magnitude(x[i]);
        largest = m > largest ? m : largest;
        total[i] = ((double)x[i] + anchor) - anchor;
    }
    return as_float(largest);
}

/* total[i] += x[i] on the grid of the anchor. Returns the largest |x[i]|. */
EVERY_PROCESSOR
float mpipar_round_and_add(double *restrict total, const float *restrict x, size_t size, double anchor) {
    uint32_t largest = 0;
    for (size_t i = 0; i < size; i++) {
        uint32_t m = magnitude(x[i]);
        largest = m > largest ? m : largest;
        total[i] += ((double)x[i] + anchor) - anchor;
    }
    return as_float(largest);
}
