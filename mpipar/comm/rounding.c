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

/* What is called in a function for one generation has to become a part of it. */
#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

/* Without its sign, the bits of a float grow with its value; those of infinity and NaN are the largest. */
ALWAYS_INLINE
uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

ALWAYS_INLINE
float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* One loop for both functions: each is a copy of it with `adds` known, so that the loop has no branch. */
ALWAYS_INLINE
float round_into(double *restrict total, const float *restrict x, size_t size, double anchor, int adds) {
    uint32_t largest = 0;
    for (size_t i = 0; i < size; i++) {
        uint32_t m = magnitude(x[i]);
        largest = m > largest ? m : largest;
        double rounded = ((double)x[i] + anchor) - anchor;
        total[i] = adds ? total[i] + rounded : rounded;
    }
    return as_float(largest);
}

/* total[i] = x[i] on the grid of the anchor. Returns the largest |x[i]|. */
EVERY_PROCESSOR
float mpipar_round(double *restrict total, const float *restrict x, size_t size, double anchor) {
    return round_into(total, x, size, anchor, 0);
}

/* total[i] += x[i] on the grid of the anchor. Returns the largest |x[i]|. */
EVERY_PROCESSOR
float mpipar_round_and_add(double *restrict total, const float *restrict x, size_t size, double anchor) {
    return round_into(total, x, size, anchor, 1);
}
