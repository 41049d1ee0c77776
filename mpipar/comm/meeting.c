/* The sum of a small array over the ranks of a host: what comm/host.py and comm/shared.py do through slots with one
   meeting, in one call, since each step of Python takes as long as the whole of it. The same protocol to the word, so
   that one rank may come this way and another the long way round; the same order of additions, and so the same bits.

       bring     copy x into a slot of this rank, write what it has come for, count the meeting
       take      once all have come for the same: x = slot of rank 0 + slot of rank 1 + ...

   Nobody waits here for long: who has not come after `patience` looks is waited for in Python, with a deadline. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX()
#endif

/* As in comm/host.py: a rank's line is | meetings | two words for even meetings | two for odd ones | turn |. */
enum { MEETINGS = 0, CALLS = 1, TURN = 5 };
typedef _Atomic uint64_t word;

/* As in comm/small.py. */
struct sum {
    char *x;
    int64_t size; /* elements */
    int64_t dtype;
    uint64_t call[2];
    int64_t rank, num_ranks;
    word **lines;
    char **slots; /* of turn 0; those of turn 1 lie `slot_bytes` behind */
    int64_t slot_bytes;
};
enum { FLOAT32, FLOAT64, INT32, INT64 };
static const int64_t ITEMSIZE[] = {4, 8, 4, 8};

enum { LOOKS_BEFORE_YIELDING = 50, PATIENCE = 400 };

static uint64_t load(word *place) { return atomic_load_explicit(place, memory_order_relaxed); }

static void store(word *place, uint64_t value) { atomic_store_explicit(place, value, memory_order_relaxed); }

static void bring(const struct sum *sum) {
    word *own = sum->lines[sum->rank];
    uint64_t meetings = load(own + MEETINGS) + 1;
    uint64_t turn = load(own + TURN) ^ 1;
    memcpy(sum->slots[sum->rank] + turn * sum->slot_bytes, sum->x, sum->size * ITEMSIZE[sum->dtype]);
    word *call = own + CALLS + 2 * (meetings & 1);
    store(call, sum->call[0]);
    store(call + 1, sum->call[1]);
    store(own + TURN, turn);
    atomic_store_explicit(own + MEETINGS, meetings, memory_order_release);
}

/* Whether all are there, and have come for the same. */
static int have_come(const struct sum *sum, int patience) {
    uint64_t meetings = load(sum->lines[sum->rank] + MEETINGS);
    for (int64_t rank = 0; rank < sum->num_ranks; rank++) {
        word *line = sum->lines[rank];
        for (int looks = 0; atomic_load_explicit(line + MEETINGS, memory_order_acquire) < meetings; looks++) {
            if (looks >= patience) return 0;
            if (looks < LOOKS_BEFORE_YIELDING) RELAX();
            else sched_yield();
        }
        word *call = line + CALLS + 2 * (meetings & 1);
        if (load(call) != sum->call[0] || load(call + 1) != sum->call[1]) return 0;
    }
    return 1;
}

#define ADD(name, type)                                                                        \
    static void name(type *restrict x, int64_t size, char *const *slots, int64_t at, int64_t num_ranks) { \
        const type *first = (const type *)(slots[0] + at), *second = (const type *)(slots[1] + at); \
        for (int64_t i = 0; i < size; i++) x[i] = first[i] + second[i];                        \
        for (int64_t rank = 2; rank < num_ranks; rank++) {                                     \
            const type *slot = (const type *)(slots[rank] + at);                               \
            for (int64_t i = 0; i < size; i++) x[i] += slot[i];                                \
        }                                                                                      \
    }
ADD(add_float32, float)
ADD(add_float64, double)
ADD(add_32, uint32_t) /* integers that overflow wrap, as numpy's */
ADD(add_64, uint64_t)

static void take(const struct sum *sum) {
    int64_t at = (int64_t)load(sum->lines[sum->rank] + TURN) * sum->slot_bytes;
    switch (sum->dtype) {
    case FLOAT32: add_float32((float *)sum->x, sum->size, sum->slots, at, sum->num_ranks); break;
    case FLOAT64: add_float64((double *)sum->x, sum->size, sum->slots, at, sum->num_ranks); break;
    case INT32: add_32((uint32_t *)sum->x, sum->size, sum->slots, at, sum->num_ranks); break;
    case INT64: add_64((uint64_t *)sum->x, sum->size, sum->slots, at, sum->num_ranks); break;
    }
}

/* Brings x, and takes the sum if all come soon; whether they have. */
_Bool mpipar_sum_at_once(const struct sum *sum) {
    bring(sum);
    if (!have_come(sum, PATIENCE)) return 0;
    take(sum);
    return 1;
}

/* Brings x, for a sum that is taken later. */
void mpipar_bring(const struct sum *sum) { bring(sum); }

/* Takes the sum, when all have come. */
void mpipar_take(const struct sum *sum) { take(sum); }
