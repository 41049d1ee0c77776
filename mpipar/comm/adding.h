/* targets = sources[0] + sources[1] + ..., in this order: one pass over memory, a cache line of every array at a time.

   All arrays are read side by side. So memory has more to fetch at once than when one is copied, and each line is still
   in the first-level cache when the sum is written back. A target may be a source.

   The same to the bit as comm/sums.py's steps of numpy. Compile with -O3: else the loops do not become vectors. */

#ifndef MPIPAR_ADDING_H
#define MPIPAR_ADDING_H

#include <stdint.h>

/* As in comm/adding.py: what is added, and what becomes of it. */
enum { FLOAT32, FLOAT64, INT32, INT64, FLOAT64_TO_FLOAT32 };

/* The structure is as in comm/adding.py. */
struct addition {
    int64_t kind, size; /* elements */
    int64_t num_sources, num_targets;
    char **sources, **targets;
};

enum { LINE_BYTES = 64 };

/* `count` elements from `at` on. Wherever there are enough of them it is a constant, and the sum stays in registers. */
#define ADD_LINE(source_type, target_type)                                                \
    do {                                                                                  \
        source_type sum[LINE_BYTES / sizeof(source_type)];                                \
        const source_type *first = (const source_type *)addition->sources[0] + at;        \
        for (int64_t i = 0; i < count; i++) sum[i] = first[i];                            \
        for (int64_t s = 1; s < addition->num_sources; s++) {                             \
            const source_type *source = (const source_type *)addition->sources[s] + at;   \
            for (int64_t i = 0; i < count; i++) sum[i] += source[i];                      \
        }                                                                                 \
        for (int64_t t = 0; t < addition->num_targets; t++) {                             \
            target_type *target = (target_type *)addition->targets[t] + at;               \
            for (int64_t i = 0; i < count; i++) target[i] = (target_type)sum[i];          \
        }                                                                                 \
    } while (0)

#define ADD_UP(name, source_type, target_type)                                            \
    static void name(const struct addition *addition) {                                   \
        enum { LINE = LINE_BYTES / sizeof(source_type) };                                 \
        int64_t at = 0;                                                                   \
        for (; at + LINE <= addition->size; at += LINE) {                                 \
            enum { count = LINE };                                                        \
            ADD_LINE(source_type, target_type);                                           \
        }                                                                                 \
        int64_t count = addition->size - at;                                              \
        ADD_LINE(source_type, target_type);                                               \
    }

ADD_UP(add_float32, float, float)
ADD_UP(add_float64, double, double)
ADD_UP(add_int32, uint32_t, uint32_t) /* which wraps, as numpy's integers do */
ADD_UP(add_int64, uint64_t, uint64_t)
ADD_UP(add_float64_to_float32, double, float)

static void (*const ADDERS[])(const struct addition *) = {
    [FLOAT32] = add_float32,
    [FLOAT64] = add_float64,
    [INT32] = add_int32,
    [INT64] = add_int64,
    [FLOAT64_TO_FLOAT32] = add_float64_to_float32,
};

static void add_up(const struct addition *addition) { ADDERS[addition->kind](addition); }

#endif
