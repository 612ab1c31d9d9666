/* Words into rows of bytes of equal significance, and back. */
#include "blocks.h"

#if defined(__has_builtin) && defined(__BYTE_ORDER__) && !defined(PLAIN)
#if __has_builtin(__builtin_shufflevector) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define VECTORS
#endif
#endif

#ifdef VECTORS

/* STEP words at a time, in vectors that every machine has: twice as fast as what compilers make of shifts. */
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Pairs __attribute__((vector_size(16)));
typedef uint32_t Fours __attribute__((vector_size(16)));
typedef uint64_t Eights __attribute__((vector_size(16)));
enum { STEP = sizeof(Bytes) };

INLINE Bytes load(const uint8_t *from) {
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

INLINE void store(uint8_t *to, Bytes bytes) { memcpy(to, &bytes, sizeof bytes); }

/* Bytes of two vectors in turns, of their lower or upper halves; and the inverse, every other byte of two vectors. */
INLINE Bytes low(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

INLINE Bytes high(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

INLINE Bytes even(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

INLINE Bytes odd(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* The sign to the low end, and back. */
INLINE Bytes rotated(Bytes words, int width, int left) {
    int right = 8 * width - left;
    if (width == 8) return (Bytes)((Eights)words << left | (Eights)words >> right);
    if (width == 4) return (Bytes)((Fours)words << left | (Fours)words >> right);
    if (width == 2) return (Bytes)((Pairs)words << left | (Pairs)words >> right);
    return words << left | words >> right;
}

/* Rows to words: as a deck of cards is shuffled, the two halves of all bytes in turns, once for each doubling. */
INLINE void shuffle(Bytes *v, int width) {
    Bytes w[8];
    for (int level = 1; level < width; level *= 2) {
        for (int i = 0; i < width / 2; i++) {
            w[2 * i] = low(v[i], v[i + width / 2]);
            w[2 * i + 1] = high(v[i], v[i + width / 2]);
        }
        for (int i = 0; i < width; i++) v[i] = w[i];
    }
}

INLINE void shuffle_back(Bytes *v, int width) {
    Bytes w[8];
    for (int level = 1; level < width; level *= 2) {
        for (int i = 0; i < width / 2; i++) {
            w[i] = even(v[2 * i], v[2 * i + 1]);
            w[i + width / 2] = odd(v[2 * i], v[2 * i + 1]);
        }
        for (int i = 0; i < width; i++) v[i] = w[i];
    }
}

/* So many of the first words as vectors take; how many. */
INLINE size_t split_most(const uint8_t *data, size_t count, int width, int turn, uint8_t *rows) {
    size_t at = 0;
    for (; at + STEP <= count; at += STEP) {
        Bytes v[8];
        for (int i = 0; i < width; i++) {
            v[i] = load(data + at * width + i * sizeof *v);
            if (turn) v[i] = rotated(v[i], width, 1);
        }
        shuffle_back(v, width);
        for (int i = 0; i < width; i++) store(rows + i * count + at, v[i]);
    }
    return at;
}

INLINE size_t join_most(const uint8_t *const *rows, size_t count, int width, int turn, uint8_t *out) {
    size_t at = 0;
    for (; at + STEP <= count; at += STEP) {
        Bytes v[8];
        for (int i = 0; i < width; i++) v[i] = load(rows[i] + at);
        shuffle(v, width);
        for (int i = 0; i < width; i++)
            store(out + at * width + i * sizeof *v, turn ? rotated(v[i], width, 8 * width - 1) : v[i]);
    }
    return at;
}

#else

INLINE size_t split_most(const uint8_t *data, size_t count, int width, int turn, uint8_t *rows) {
    (void)data, (void)count, (void)width, (void)turn, (void)rows;
    return 0;
}

INLINE size_t join_most(const uint8_t *const *rows, size_t count, int width, int turn, uint8_t *out) {
    (void)rows, (void)count, (void)width, (void)turn, (void)out;
    return 0;
}

#endif

void split(const uint8_t *data, size_t count, int width, int turn, uint8_t *rows) {
    size_t at = width == 8   ? split_most(data, count, 8, turn, rows)
                : width == 4 ? split_most(data, count, 4, turn, rows)
                : width == 2 ? split_most(data, count, 2, turn, rows)
                             : split_most(data, count, 1, turn, rows);
    for (; at < count; at += BLOCK) {
        size_t n = count - at < BLOCK ? count - at : BLOCK;
        if (width == 8) split_8(data + 8 * at, n, turn, rows + at, count);
        else if (width == 4) split_4(data + 4 * at, n, turn, rows + at, count);
        else if (width == 2) split_2(data + 2 * at, n, turn, rows + at, count);
        else split_1(data + at, n, turn, rows + at, count);
    }
}

void join(const uint8_t *const *rows, size_t count, int width, int turn, uint8_t *out) {
    size_t at = width == 8   ? join_most(rows, count, 8, turn, out)
                : width == 4 ? join_most(rows, count, 4, turn, out)
                : width == 2 ? join_most(rows, count, 2, turn, out)
                             : join_most(rows, count, 1, turn, out);
    for (; at < count; at += BLOCK) {
        size_t n = count - at < BLOCK ? count - at : BLOCK;
        if (width == 8) join_8(rows, at, n, turn, out);
        else if (width == 4) join_4(rows, at, n, turn, out);
        else if (width == 2) join_2(rows, at, n, turn, out);
        else join_1(rows, at, n, turn, out);
    }
}
