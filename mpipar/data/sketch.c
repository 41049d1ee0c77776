/* The bins of a document's sketch, to the same bits as data/dedup.py makes them, in one pass over its bytes. */

#include <stdint.h>

#define SHINGLE_WORDS 5

struct constants {
    const uint64_t *letters;   /* of 256 bytes; 0: it is no letter */
    const uint64_t *positions; /* in a word; letters beyond the last all count alike */
    const uint64_t *shingle;   /* of its words */
    uint64_t num_positions, num_bins;
};

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
    return (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
}

static void put(uint64_t shingle, uint64_t num_bins, uint64_t *bins) {
    uint64_t mixed = mix(shingle), value = mix(mixed), *bin = &bins[(mixed >> 32) * num_bins >> 32];
    if (value < *bin) *bin = value;
}

/* Puts the document's shingles into the bins, which were full of ones. Returns how many words it has; with none, there
   is no shingle either. */
int64_t mpipar_bins(const struct constants *constants, const uint8_t *text, int64_t size, uint64_t *bins) {
    const uint8_t *p = text, *end = text + size;
    uint64_t words[SHINGLE_WORDS]; /* the last ones, in a ring */
    int64_t num_words = 0;
    for (;;) {
        while (p < end && !constants->letters[*p]) p++;
        if (p == end) break;
        uint64_t hash = 0, position = 0, letter;
        for (; p < end && (letter = constants->letters[*p]); p++) {
            hash += mix(letter * constants->positions[position]);
            position += position + 1 < constants->num_positions;
        }
        words[num_words++ % SHINGLE_WORDS] = mix(hash);
        if (num_words >= SHINGLE_WORDS) {
            uint64_t shingle = 0;
            for (int k = 0; k < SHINGLE_WORDS; k++)
                shingle += words[(num_words + k) % SHINGLE_WORDS] * constants->shingle[k];
            put(shingle, constants->num_bins, bins);
        }
    }
    if (num_words > 0 && num_words < SHINGLE_WORDS) { /* a short document has one shingle, of all its words */
        uint64_t shingle = 0;
        for (int64_t k = 0; k < num_words; k++) shingle += words[k] * constants->shingle[k];
        put(shingle, constants->num_bins, bins);
    }
    return num_words;
}
