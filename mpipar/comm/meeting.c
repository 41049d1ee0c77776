/* Sums over the ranks of a host in one call: what comm/host.py and comm/shared.py do step by step, since each step of
   Python takes as long as the whole of a small sum. The same protocol to the word, so that one rank may come this way
   and another the long way round; the same order of additions, and so the same bits.

   Through slots, with one meeting:

       bring     copy x into a slot of this rank, write what it has come for, count the meeting
       take      once all have come for the same: x = slot of rank 0 + slot of rank 1 + ...

   In place, with two:

       come      write what this rank has come for, count the meeting
       add       once all have come for the same: this rank's chunk of all arrays = the sum over them, own one first
       leave     count a meeting; once all have, the other chunks are sums too

   Nobody waits here for long: who has not come after `PATIENCE` looks is waited for in Python, with a deadline.

   This is a module, comm/small.py's: a call through ctypes takes as long as a small sum. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "adding.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX()
#endif

/* As in comm/host.py: a rank's line is | meetings | two words for even meetings | two for odd ones | turn |. */
enum { MEETINGS = 0, CALLS = 1, TURN = 5 };
typedef _Atomic uint64_t word;

/* The structures are as in comm/small.py, which gives their addresses. */
struct host {
    int64_t rank, num_ranks;
    word **lines;
};
struct sum {
    struct host host;
    uint64_t call[2];
    int64_t num_bytes;
    struct addition of_turn[2]; /* x = the sum over the slots of that turn */
};
struct sum_in_place {
    struct host host;
    uint64_t call[2];
    struct addition of_chunk; /* what this rank adds up of each rank's array; its own first */
};

enum { BRIEFLY = 50, PATIENCE = 400 }; /* looks */

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

/* Whether all come within so many looks, and for the same. */
static int come_within(int patience, const struct host *host, const uint64_t *call) {
    uint64_t meetings = load(host->lines[host->rank] + MEETINGS);
    for (int64_t rank = 0; rank < host->num_ranks; rank++) {
        word *line = host->lines[rank];
        for (int looks = 0; atomic_load_explicit(line + MEETINGS, memory_order_acquire) < meetings; looks++) {
            if (looks >= patience) return 0;
            if (looks < BRIEFLY) RELAX();
            else sched_yield();
        }
        word *theirs = line + CALLS + 2 * (meetings & 1);
        if (call && (load(theirs) != call[0] || load(theirs + 1) != call[1])) return 0;
    }
    return 1;
}

/* The same; other threads of this process run while others have the core. */
static int have_come(const struct host *host, const uint64_t *call) {
    if (come_within(BRIEFLY, host, call)) return 1;
    int have;
    Py_BEGIN_ALLOW_THREADS
    have = come_within(PATIENCE, host, call);
    Py_END_ALLOW_THREADS
    return have;
}

static const struct addition *this_turn(const struct sum *sum) {
    return &sum->of_turn[load(sum->host.lines[sum->host.rank] + TURN)];
}

static void bring(const struct sum *sum) {
    word *turn = sum->host.lines[sum->host.rank] + TURN;
    store(turn, load(turn) ^ 1);
    const struct addition *addition = this_turn(sum);
    memcpy(addition->sources[sum->host.rank], addition->targets[0], sum->num_bytes);
    come(&sum->host, sum->call);
}

/* Brings x, and takes the sum if all come soon; whether they have. */
static PyObject *sum_at_once(PyObject *module, PyObject *address) {
    const struct sum *sum = PyLong_AsVoidPtr(address);
    bring(sum);
    if (!have_come(&sum->host, sum->call)) Py_RETURN_FALSE;
    add_up(this_turn(sum));
    Py_RETURN_TRUE;
}

/* Brings x, for a sum that is taken later. */
static PyObject *bring_it(PyObject *module, PyObject *address) {
    bring(PyLong_AsVoidPtr(address));
    Py_RETURN_NONE;
}

/* Takes the sum, when all have come. */
static PyObject *take_it(PyObject *module, PyObject *address) {
    add_up(this_turn(PyLong_AsVoidPtr(address)));
    Py_RETURN_NONE;
}

/* Sums in place, as far as it comes without waiting long: 0, all are to come; 1, all are to leave; 2, it is done. */
static PyObject *sum_in_place_at_once(PyObject *module, PyObject *address) {
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
    {"sum_at_once", sum_at_once, METH_O, NULL},
    {"bring", bring_it, METH_O, NULL},
    {"take", take_it, METH_O, NULL},
    {"sum_in_place_at_once", sum_in_place_at_once, METH_O, NULL},
    {"add_chunk", add_chunk, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef meeting = {PyModuleDef_HEAD_INIT, .m_name = "_meeting", .m_size = -1, .m_methods = functions};
PyMODINIT_FUNC PyInit__meeting(void) { return PyModule_Create(&meeting); }
