/* Sums over the ranks of a host in one call: what comm/host.py and comm/shared.py do step by step, since each step of
   Python takes as long as the whole of a small sum, and as the copying of a quarter of a large block. The same protocol
   to the word, so that one rank may come this way and another the long way round; the same order of additions, and so
   the same bits.

   Through slots, a block at a time, with one meeting:

       bring     copy the block into a slot of this rank, count the meeting
       add       once all have come: block = slot of rank 0 + slot of rank 1 + ..., its own read where it came from

   or with two:

       bring     copy what others add up of the block, each rank a chunk of it; count the meeting
       add       once all have come: this rank's chunk += the slots of the others; copy it into the slot, count a
                 meeting
       take      once all have: copy the other chunks out of their slots

   To the first meeting of the first block a rank brings what it has come for, and it compares that with the others'.

   In place, with two:

       come      write what this rank has come for, count the meeting
       add       once all have come for the same: this rank's chunk of all arrays = the sum over them, own one first
       leave     count a meeting; once all have, the other chunks are sums too

   Nobody waits here for long: who has not come after `PATIENCE` yields is waited for in Python, with a deadline. Nobody
   stays long: after `BLOCKS_AT_ONCE` it returns for once to Python, which looks for signals.

   This is a module, comm/one_call.py's: a call through ctypes takes as long as a small sum. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "adding.h"
#include "copying.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX()
#endif

/* As in comm/host.py: a rank's line is | meetings | two words for even meetings | two for odd ones | turn |. */
enum { MEETINGS = 0, CALLS = 1, TURN = 5 };
typedef _Atomic uint64_t word;

/* The structures are as in comm/one_call.py, which fills them. */
struct host {
    int64_t rank, num_ranks;
    word **lines;
    int64_t spins; /* looks for a rank before the core is given to others */
};
struct sum_through_slots {
    struct host host;
    uint64_t call[2];
    int64_t kind, itemsize, size, slot_size; /* elements */
    int64_t meetings;                        /* of a block */
    char *x;
    char **slots[2], **sources; /* by turn, by rank; room for as many */
    int64_t at, met;            /* how far it is: first element of the block, meetings of it that are over */
};
struct sum_in_place {
    struct host host;
    uint64_t call[2];
    struct addition of_chunk; /* what this rank adds up of each rank's array; its own first */
};

/* Of the structures and functions, as in comm/one_call.py: a module that was built for others is not used. */
enum { VERSION = 3 };

enum { NO_PATIENCE = 0, PATIENCE = 400 }; /* looks, between which others have the core */
enum { BLOCKS_AT_ONCE = 32 };             /* some milliseconds */

/* A sum through slots that has no more bytes is over before another thread of this process would notice: it is made
   with the interpreter held. */
enum { SHORT_BYTES = 64 << 10 };

static uint64_t load(word *place) { return atomic_load_explicit(place, memory_order_relaxed); }

static void store(word *place, uint64_t value) { atomic_store_explicit(place, value, memory_order_relaxed); }

/* Counts a meeting, after all that was written before; `call` is what this rank has come for, or 0. */
static void come(const struct host *host, const uint64_t *call) {
    word *own = host->lines[host->rank];
    uint64_t meetings = load(own + MEETINGS) + 1;
    if (call) {
        store(own + CALLS + 2 * (meetings & 1), call[0]);
        store(own + CALLS + 2 * (meetings & 1) + 1, call[1]);
    }
    atomic_store_explicit(own + MEETINGS, meetings, memory_order_release);
}

/* Whether all come soon, and for the same. */
static int come_within(int patience, const struct host *host, const uint64_t *call) {
    uint64_t meetings = load(host->lines[host->rank] + MEETINGS);
    for (int64_t rank = 0; rank < host->num_ranks; rank++) {
        word *line = host->lines[rank];
        for (int64_t looks = 0; atomic_load_explicit(line + MEETINGS, memory_order_acquire) < meetings; looks++) {
            if (looks == host->spins + patience) return 0;
            if (looks < host->spins) RELAX();
            else sched_yield();
        }
        word *theirs = line + CALLS + 2 * (meetings & 1);
        if (call && (load(theirs) != call[0] || load(theirs + 1) != call[1])) return 0;
    }
    return 1;
}

/* The same; other threads of this process run while others have the core. */
static int have_come(const struct host *host, const uint64_t *call) {
    if (come_within(NO_PATIENCE, host, call)) return 1;
    int have;
    Py_BEGIN_ALLOW_THREADS
    have = come_within(PATIENCE, host, call);
    Py_END_ALLOW_THREADS
    return have;
}

/* Through slots. a, b: first and last element of a part of the block. */

static int64_t block_size(const struct sum_through_slots *sum) {
    int64_t rest = sum->size - sum->at;
    return rest < sum->slot_size ? rest : sum->slot_size;
}

/* Where the chunk of a rank begins. */
static int64_t chunk_begin(const struct sum_through_slots *sum, int64_t rank) {
    return block_size(sum) * rank / sum->host.num_ranks;
}

static char *in_x(const struct sum_through_slots *sum, int64_t a) { return sum->x + (sum->at + a) * sum->itemsize; }

static char *in_slot(const struct sum_through_slots *sum, int64_t rank, int64_t a) {
    uint64_t turn = load(sum->host.lines[sum->host.rank] + TURN);
    return sum->slots[turn][rank] + a * sum->itemsize;
}

static void give(const struct sum_through_slots *sum, int64_t a, int64_t b) {
    copy_for_others(in_slot(sum, sum->host.rank, a), in_x(sum, a), (b - a) * sum->itemsize);
}

static void add(const struct sum_through_slots *sum, int64_t a, int64_t b) {
    int64_t own = sum->host.rank, count = 0;
    int own_first = sum->meetings == 2; /* the order of comm/shared.py */
    if (own_first) sum->sources[count++] = in_x(sum, a);
    for (int64_t rank = 0; rank < sum->host.num_ranks; rank++) {
        if (rank != own) sum->sources[count++] = in_slot(sum, rank, a);
        else if (!own_first) sum->sources[count++] = in_x(sum, a); /* as in the slot, and nearer */
    }
    char *target = in_x(sum, a);
    struct addition addition = {sum->kind, b - a, count, 1, sum->sources, &target};
    add_up(&addition);
}

static void take(const struct sum_through_slots *sum) {
    for (int64_t rank = 0; rank < sum->host.num_ranks; rank++) {
        int64_t a = chunk_begin(sum, rank), b = chunk_begin(sum, rank + 1);
        if (rank != sum->host.rank) memcpy(in_x(sum, a), in_slot(sum, rank, a), (b - a) * sum->itemsize);
    }
}

/* What the others are to have come for: the first meeting of all compares it. */
static const uint64_t *compared(const struct sum_through_slots *sum) {
    return sum->at == 0 && sum->met == 0 ? sum->call : 0;
}

static void bring(const struct sum_through_slots *sum) {
    word *turn = sum->host.lines[sum->host.rank] + TURN;
    store(turn, load(turn) ^ 1);
    if (sum->meetings == 1) {
        give(sum, 0, block_size(sum));
    } else {
        give(sum, 0, chunk_begin(sum, sum->host.rank));
        give(sum, chunk_begin(sum, sum->host.rank + 1), block_size(sum));
    }
    come(&sum->host, compared(sum));
}

static void begin(struct sum_through_slots *sum) {
    sum->at = sum->met = 0;
    bring(sum);
}

/* As far as it comes if nobody is waited for longer, and some blocks at most; whether it is done. */
static int go_on(struct sum_through_slots *sum, int patience) {
    int blocks = 0;
    while (blocks < BLOCKS_AT_ONCE && come_within(patience, &sum->host, compared(sum))) {
        if (sum->met + 1 < sum->meetings) {
            int64_t a = chunk_begin(sum, sum->host.rank), b = chunk_begin(sum, sum->host.rank + 1);
            add(sum, a, b);
            give(sum, a, b);
            come(&sum->host, 0);
            sum->met++;
            continue;
        }
        if (sum->meetings == 1) add(sum, 0, block_size(sum));
        else take(sum);
        sum->at += block_size(sum);
        sum->met = 0;
        if (sum->at == sum->size) return 1;
        bring(sum);
        blocks++;
    }
    return 0;
}

/* The same from the beginning, or from where it is. */
static PyObject *going(struct sum_through_slots *sum, int anew, int patience) {
    int is_short = sum->size * sum->itemsize <= SHORT_BYTES, done = 0;
    if (is_short) {
        if (anew) begin(sum);
        done = go_on(sum, NO_PATIENCE);
    }
    if (!done && (!is_short || patience > NO_PATIENCE)) {
        Py_BEGIN_ALLOW_THREADS
        if (anew && !is_short) begin(sum);
        done = go_on(sum, patience);
        Py_END_ALLOW_THREADS
    }
    return PyBool_FromLong(done);
}

/* The whole of it, if the others come soon at each meeting, and it has not many blocks; whether it is done. */
static PyObject *sum_through_slots(PyObject *module, PyObject *address) {
    return going(PyLong_AsVoidPtr(address), 1, PATIENCE);
}

/* Goes on with it, when all have come to the meeting that it waits for; whether it is done. */
static PyObject *go_on_through_slots(PyObject *module, PyObject *address) {
    return going(PyLong_AsVoidPtr(address), 0, PATIENCE);
}

/* The same, for who has other things to do than wait: from the beginning, and from where it is. */
static PyObject *begin_through_slots(PyObject *module, PyObject *address) {
    return going(PyLong_AsVoidPtr(address), 1, NO_PATIENCE);
}

static PyObject *poll_through_slots(PyObject *module, PyObject *address) {
    return going(PyLong_AsVoidPtr(address), 0, NO_PATIENCE);
}

/* In place. */

/* As far as it comes without waiting long: 0, all are to come; 1, all are to leave; 2, it is done. */
static PyObject *sum_in_place(PyObject *module, PyObject *address) {
    const struct sum_in_place *sum = PyLong_AsVoidPtr(address);
    come(&sum->host, sum->call);
    if (!have_come(&sum->host, sum->call)) return PyLong_FromLong(0);
    add_up(&sum->of_chunk);
    come(&sum->host, 0);
    return PyLong_FromLong(have_come(&sum->host, 0) ? 2 : 1);
}

/* Adds this rank's chunk up, when all have come. */
static PyObject *add_chunk(PyObject *module, PyObject *address) {
    const struct sum_in_place *sum = PyLong_AsVoidPtr(address);
    add_up(&sum->of_chunk);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"sum_through_slots", sum_through_slots, METH_O, NULL},
    {"go_on_through_slots", go_on_through_slots, METH_O, NULL},
    {"begin_through_slots", begin_through_slots, METH_O, NULL},
    {"poll_through_slots", poll_through_slots, METH_O, NULL},
    {"sum_in_place", sum_in_place, METH_O, NULL},
    {"add_chunk", add_chunk, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef meeting = {PyModuleDef_HEAD_INIT, .m_name = "_meeting", .m_size = -1, .m_methods = functions};
PyMODINIT_FUNC PyInit__meeting(void) {
    PyObject *module = PyModule_Create(&meeting);
    if (module && PyModule_AddIntConstant(module, "VERSION", VERSION) < 0) Py_CLEAR(module);
    return module;
}
