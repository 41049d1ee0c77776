/* Copies that another core reads next, written past the caches into memory.

   What a core has just written lies in its caches, and another that reads it has it sent from there, line by line. Where
   the two cores share a cache that can be faster than from memory, or half as fast; where they do not, it takes five
   times as long. A copy of a few KiB is there sooner through the caches. Figures: docs/arena.md. */

#ifndef MPIPAR_COPYING_H
#define MPIPAR_COPYING_H

#include <stdint.h>
#include <string.h>

enum { THROUGH_CACHES_BYTES = 8 << 10 };

#if defined(__x86_64__)
#include <emmintrin.h>

static void copy_for_others(char *target, const char *source, int64_t num_bytes) {
    if (num_bytes <= THROUGH_CACHES_BYTES) {
        memcpy(target, source, num_bytes);
        return;
    }
    int64_t at = -(intptr_t)target & 63; /* whole lines of the cache go out in one piece */
    memcpy(target, source, at);
    for (; at + 64 <= num_bytes; at += 64) {
        for (int part = 0; part < 64; part += 16) {
            __m128i values = _mm_loadu_si128((const __m128i *)(source + at + part));
            _mm_stream_si128((__m128i *)(target + at + part), values);
        }
    }
    memcpy(target + at, source + at, num_bytes - at);
    _mm_sfence(); /* before anything is written that says it is there */
}

#else

static void copy_for_others(char *target, const char *source, int64_t num_bytes) { memcpy(target, source, num_bytes); }

#endif

#endif
