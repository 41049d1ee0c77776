/* Text to token ids, by the words that were seen before, and by merges those that were not: for data/words.py.

   A word here is what byte-level BPE with GPT-2's pattern encodes by itself, or several of those in a row. The pattern is

       's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

   and only its ASCII is cut as finely. A run of letters, digits or signs that something else than ASCII follows is kept
   in one with all up to the next white space: between a character and the white space behind it the pattern always
   cuts, so no knowledge of Unicode is needed but what white space is. */

#include <stdint.h>
#include <string.h>

enum kind { OTHER, LETTER, DIGIT, SIGN, SPACE };

/* Most words have 8 bytes at most and one id: those are in the slot itself, and a look-up touches nothing else. */
struct slot {
    uint64_t key;  /* the bytes of a short word, the hash of a long one */
    uint32_t size; /* of the word, in bytes; 0: the slot is free */
    uint32_t word; /* the place of a long word in its store */
    uint32_t ids;  /* the id of a word that has one; otherwise the place of its ids in their store */
    uint32_t num_ids;
};

struct table {
    struct slot *slots;
    uint64_t num_slots; /* a power of two */
    uint8_t *words;
    uint32_t *ids;
    uint64_t words_bytes, num_ids;   /* the sizes of the stores */
    uint64_t used_slots, used_bytes, used_ids;
};

/* Byte-level BPE: the tokens of bytes, and which pairs of tokens become one, the lowest rank first. */
struct merge {
    uint64_t pair; /* both ids, and 1; 0: the slot is free */
    uint32_t rank, id;
};

struct merges {
    struct merge *slots;
    uint64_t num_slots; /* a power of two */
    const uint32_t *bytes; /* [256] */
};

#define LONGEST_WORD 256 /* longer ones are hardly seen again, and take the square of their length */
#define NEVER UINT32_MAX

static enum kind kind_of(uint8_t c) {
    if (c >= 0x80) return OTHER;
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return LETTER;
    if (c >= '0' && c <= '9') return DIGIT;
    if (c == ' ' || (c >= '\t' && c <= '\r')) return SPACE;
    return SIGN;
}

/* How many bytes the white space at p has; 0 if it is none. The property White_Space of Unicode, in UTF-8. */
static int64_t space_at(const uint8_t *p, const uint8_t *end) {
    if (p >= end) return 0;
    if (*p < 0x80) return kind_of(*p) == SPACE;
    if (end - p >= 2 && p[0] == 0xC2) return p[1] == 0x85 || p[1] == 0xA0 ? 2 : 0;
    if (end - p < 3) return 0;
    if (p[0] == 0xE1) return p[1] == 0x9A && p[2] == 0x80 ? 3 : 0;
    if (p[0] == 0xE2 && p[1] == 0x80)
        return (p[2] >= 0x80 && p[2] <= 0x8A) || p[2] == 0xA8 || p[2] == 0xA9 || p[2] == 0xAF ? 3 : 0;
    if (p[0] == 0xE2) return p[1] == 0x81 && p[2] == 0x9F ? 3 : 0;
    return p[0] == 0xE3 && p[1] == 0x80 && p[2] == 0x80 ? 3 : 0;
}

static const uint8_t *next_word(const uint8_t *p, const uint8_t *end) {
    if (*p == '\'' && end - p >= 2) {
        if (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd') return p + 2;
        if (end - p >= 3 && (!memcmp(p + 1, "re", 2) || !memcmp(p + 1, "ve", 2) || !memcmp(p + 1, "ll", 2))) return p + 3;
    }
    const uint8_t *q = *p == ' ' && p + 1 < end ? p + 1 : p;
    if (!space_at(q, end)) {
        enum kind kind = kind_of(*q);
        if (kind != OTHER)
            do q++;
            while (q < end && kind_of(*q) == kind);
        if (kind == OTHER || (q < end && *q >= 0x80))
            while (q < end && !space_at(q, end)) q++;
        return q;
    }
    const uint8_t *last = p; /* the last white space of the run belongs to what follows */
    for (q = p + space_at(p, end); q < end;) {
        int64_t bytes = space_at(q, end);
        if (!bytes) return last > p ? last : q;
        last = q;
        q += bytes;
    }
    return end;
}

static uint64_t mixed(uint64_t x) {
    x *= 0xD6E8FEB86659FD93u;
    return x ^ (x >> 32);
}

static uint64_t key_of(const uint8_t *p, int64_t size, const uint8_t *end) {
    uint64_t key = 0, part;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (size <= 8 && end - p >= 8) {
        memcpy(&key, p, 8);
        return key & (~0ull >> (64 - 8 * size));
    }
#endif
    if (size <= 8) {
        memcpy(&key, p, (size_t)size);
        return key;
    }
    for (; size > 0; p += 8, size -= 8) {
        part = 0;
        memcpy(&part, p, size < 8 ? (size_t)size : 8);
        key = mixed(key ^ part);
    }
    return key;
}

/* The slot of a word, or the free one where it belongs. */
static struct slot *find(const struct table *table, const uint8_t *word, int64_t size, uint64_t key) {
    for (uint64_t i = mixed(key ^ mixed((uint64_t)size)) >> 8;; i++) {
        struct slot *slot = &table->slots[i & (table->num_slots - 1)];
        if (!slot->size || (slot->key == key && slot->size == size &&
                            (size <= 8 || !memcmp(table->words + slot->word, word, (size_t)size))))
            return slot;
    }
}

/* Remembers the ids of a word that is not known. A table that has become full forgets everything first. */
void mpipar_remember(struct table *table, const uint8_t *word, int64_t size, const uint32_t *ids, int64_t num_ids) {
    if (2 * table->used_slots >= table->num_slots || table->used_bytes + (uint64_t)size > table->words_bytes ||
        table->used_ids + (uint64_t)num_ids > table->num_ids) {
        memset(table->slots, 0, table->num_slots * sizeof *table->slots);
        table->used_slots = table->used_bytes = table->used_ids = 0;
    }
    uint64_t key = key_of(word, size, word + size);
    struct slot *slot = find(table, word, size, key);
    *slot = (struct slot){key, (uint32_t)size, (uint32_t)table->used_bytes, (uint32_t)table->used_ids, (uint32_t)num_ids};
    table->used_slots++;
    if (size > 8) {
        memcpy(table->words + table->used_bytes, word, (size_t)size);
        table->used_bytes += (uint64_t)size;
    }
    if (num_ids == 1) {
        slot->ids = ids[0];
    } else {
        memcpy(table->ids + table->used_ids, ids, (size_t)num_ids * sizeof *ids);
        table->used_ids += (uint64_t)num_ids;
    }
}

static struct merge *merge_of(const struct merges *merges, uint32_t left, uint32_t right) {
    uint64_t pair = ((uint64_t)left << 32 | right) + 1;
    for (uint64_t i = mixed(pair);; i++) {
        struct merge *merge = &merges->slots[i & (merges->num_slots - 1)];
        if (!merge->pair || merge->pair == pair) return merge;
    }
}

/* Fills the table, whose slots are free, with pairs [n][2] and what they become, [n], by rank. */
void mpipar_learn(const struct merges *merges, const uint32_t *pairs, const uint32_t *become, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t left = pairs[2 * i], right = pairs[2 * i + 1];
        *merge_of(merges, left, right) = (struct merge){((uint64_t)left << 32 | right) + 1, (uint32_t)i, become[i]};
    }
}

/* Whether the word can be merged here: whether it is one word of the pattern. */
static int is_short_ascii(const uint8_t *word, int64_t size) {
    if (size > LONGEST_WORD) return 0;
    for (int64_t i = 0; i < size; i++)
        if (word[i] >= 0x80) return 0;
    return 1;
}

/* The ids of a word. Returns how many. */
static int64_t merge_word(const struct merges *merges, const uint8_t *word, int64_t size, uint32_t *ids) {
    uint32_t ranks[LONGEST_WORD + 1], become[LONGEST_WORD + 1]; /* of a token and the one behind it */
    int64_t n = size;
    for (int64_t i = 0; i < n; i++) ids[i] = merges->bytes[word[i]];
    for (int64_t changed = 0, last = n - 2;;) {
        for (int64_t i = changed < 0 ? 0 : changed; i <= last && i + 1 < n; i++) {
            const struct merge *merge = merge_of(merges, ids[i], ids[i + 1]);
            ranks[i] = merge->pair ? merge->rank : NEVER;
            become[i] = merge->id;
        }
        uint32_t lowest = NEVER;
        int64_t at = 0;
        for (int64_t i = 0; i + 1 < n; i++)
            if (ranks[i] < lowest) lowest = ranks[at = i];
        if (lowest == NEVER) return n;
        ids[at] = become[at];
        size_t behind = (size_t)(--n - at - 1) * sizeof *ids;
        memmove(ids + at + 1, ids + at + 2, behind);
        memmove(ranks + at + 1, ranks + at + 2, behind);
        memmove(become + at + 1, become + at + 2, behind);
        changed = at - 1;
        last = at;
    }
}

/* Encodes the text from *at on. Returns the size of the first word that is not known and cannot be merged, *at being
   where it begins, or 0 at the end. *num_ids ids are in `ids`, which has room for more than the words that are
   remembered can give. Without merges, no new word can be merged. */
int64_t mpipar_encode(
    struct table *table, const struct merges *merges, const uint8_t *text, int64_t size, int64_t *at, uint32_t *ids,
    int64_t room, int64_t *num_ids
) {
    const uint8_t *p = text + *at, *end = text + size;
    int64_t n = *num_ids;
    while (p < end) {
        const uint8_t *q = next_word(p, end);
        const struct slot *slot = find(table, p, q - p, key_of(p, q - p, end));
        if (!slot->size && merges && n + (q - p) <= room && is_short_ascii(p, q - p)) {
            int64_t count = merge_word(merges, p, q - p, ids + n);
            mpipar_remember(table, p, q - p, ids + n, count);
            n += count;
            p = q;
            continue;
        }
        if (!slot->size || n + slot->num_ids > room) {
            *at = p - text;
            *num_ids = n;
            return q - p;
        }
        if (slot->num_ids == 1)
            ids[n++] = slot->ids;
        else
            for (uint32_t i = 0; i < slot->num_ids; i++) ids[n++] = table->ids[slot->ids + i];
        p = q;
    }
    *at = size;
    *num_ids = n;
    return 0;
}
