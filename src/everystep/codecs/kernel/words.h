/* Words, bits and code tables: what packing, unpacking and the sparse form share. */
#ifndef EVERYSTEP_WORDS_H
#define EVERYSTEP_WORDS_H

#include <stdint.h>
#include <string.h>

#include "packed.h"

#if defined(_MSC_VER)
#include <intrin.h>
#define INLINE static __forceinline
#define UNLIKELY(condition) (condition)
#define PREFETCH(at) ((void)(at))
#define UNUSED_OK
#else
#define UNUSED_OK __attribute__((unused))
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define PREFETCH(at) __builtin_prefetch(at)
#define INLINE static inline __attribute__((always_inline))
#endif

/* What takes most of the time is there twice: for any machine, and for those that shift and vectors are wider on. Which
   one runs is asked when it does; PLAIN, defined for tests, leaves the first alone. */
#if defined(__x86_64__) && !defined(_MSC_VER) && !defined(PLAIN)
#define WIDE __attribute__((target("avx2,bmi,bmi2")))
INLINE int is_wide(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }
#else
#define WIDE
INLINE int is_wide(void) { return 0; }
#endif

/* A context: how long the code of each symbol is, 0 for those that are escaped. */
typedef struct {
    uint8_t length[SYMBOLS];
    uint8_t escape;
    uint8_t first, count; /* the symbols that have a length lie in first … first + count - 1 */
} Code;

/* What a header says. Context 0 takes the keys that have none of their own. Of the sparse form each has two codes: of
   the number of its words that stand still before a change, and of residuals; else of residuals alone. */
typedef struct {
    Form form;
    int contexts;
    uint16_t of_key[KEYS];
    uint8_t key[KEYS + 1];
    Code code[2 * (KEYS + 1)];
} Header;

enum { SPARSE_FLAG = 2, GAP_WIDTH = 4 };

const char *read_header(const uint8_t *stored, size_t size, int sparse, Header *header, size_t *end);
size_t write_header(const Header *header, int sparse, uint8_t *out);
uint64_t build_code(const uint32_t *counts, Code *code); /* bits that the counted symbols take, low bits included */
void fill_encoder(const Header *header, int codes, uint16_t *tables);
const char *fill_decoder(const Header *header, int codes, uint32_t *tables);

/* words ------------------------------------------------------------------------------------------------------------ */

INLINE uint64_t load_word(const uint8_t *at, int width) {
    uint64_t word = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int i = 0; i < width; i++) word |= (uint64_t)at[i] << (8 * i);
#else
    memcpy(&word, at, (size_t)width);
#endif
    return word;
}

INLINE void store_word(uint8_t *at, uint64_t word, int width) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int i = 0; i < width; i++) at[i] = (uint8_t)(word >> (8 * i));
#else
    memcpy(at, &word, (size_t)width);
#endif
}

INLINE int64_t extended(uint64_t word, int width) {
    return width == 8 ? (int64_t)word : width == 4 ? (int32_t)word : width == 2 ? (int16_t)word : (int8_t)word;
}

INLINE uint64_t cut(uint64_t word, int width) {
    return width == 8 ? word : word & ((1ull << (8 * width)) - 1);
}

/* Sign and magnitude to two's complement and back: the numbers' order becomes the integers'. Its own inverse. */
INLINE int64_t in_order(int64_t word, int width, int ordered) {
    return ordered ? word ^ ((word >> 63) & (int64_t)(((uint64_t)1 << (8 * width - 1)) - 1)) : word;
}

INLINE uint64_t residual(uint64_t word, uint64_t base, int width, int ordered) {
    uint64_t a = (uint64_t)in_order(extended(word, width), width, ordered);
    uint64_t b = (uint64_t)in_order(extended(base, width), width, ordered);
    int64_t d = extended(a - b, width);
    return cut(((uint64_t)d << 1) ^ (uint64_t)(d >> 63), width);
}

INLINE uint64_t applied(uint64_t residual, uint64_t base, int width, int ordered) {
    uint64_t d = (residual >> 1) ^ (0 - (residual & 1));
    uint64_t b = (uint64_t)in_order(extended(base, width), width, ordered);
    return (uint64_t)in_order(extended(b + d, width), width, ordered);
}

/* The base's exponent without its sign, or as much of it as a byte holds. */
INLINE unsigned key_of(uint64_t base, int width, int shift) {
    return shift == UNGROUPED ? 0 : (unsigned)((base & (((uint64_t)1 << (8 * width - 1)) - 1)) >> shift) & 255;
}

/* symbols: r = top << low | low bits; top is 0 or 1 for these numbers, else 2 or 3; symbol = 2 low + top ------------- */

INLINE int bit_length(uint64_t value) { /* of a value that is not 0 */
#if defined(_MSC_VER)
    unsigned long top;
    _BitScanReverse64(&top, value);
    return (int)top + 1;
#else
    return 64 - __builtin_clzll(value);
#endif
}

INLINE int low_bits_of(uint64_t r) { return bit_length(r | 2) - 2; }

INLINE unsigned symbol_of(uint64_t r) {
    int low = low_bits_of(r);
    return (unsigned)(2 * low) + (unsigned)(r >> low);
}

INLINE int low_of_symbol(unsigned symbol) { return symbol < 4 ? 0 : (int)(symbol >> 1) - 1; }

INLINE unsigned symbols_of(int width) { return 16 * (unsigned)width; }

/* bits, least significant first ------------------------------------------------------------------------------------ */

typedef struct {
    uint8_t *at;
    uint64_t bits;
    unsigned fill; /* under 8 between two puts */
} Sink;

INLINE void put(Sink *sink, uint64_t bits, unsigned count) { /* at most 56 bits */
    sink->bits |= bits << sink->fill;
    sink->fill += count;
    store_word(sink->at, sink->bits, 8);
    sink->at += sink->fill >> 3;
    sink->bits >>= sink->fill & 56;
    sink->fill &= 7;
}

/* An encoder's table has an entry for each symbol: code << 4 | length; length 0 means escape, whose own entry is last. */
enum { ENCODER_ROW = SYMBOLS + 8, ESCAPE_ENTRY = SYMBOLS };

INLINE void put_value(Sink *sink, const uint16_t *row, uint64_t r, int width) {
    int low = low_bits_of(r);
    unsigned symbol = (unsigned)(2 * low) + (unsigned)(r >> low);
    unsigned entry = row[symbol], length = entry & 15;
    uint64_t code = entry >> 4, rest = r & (((uint64_t)1 << low) - 1);
    if (!length) {
        length = (row[ESCAPE_ENTRY] & 15) + 7;
        code = (row[ESCAPE_ENTRY] >> 4) | ((uint64_t)symbol << (length - 7));
    }
    if (width == 8 && low > 40) {
        put(sink, code | (rest & 0xffffffff) << length, length + 32);
        put(sink, rest >> 32, (unsigned)low - 32);
    } else {
        put(sink, code | rest << length, length + (unsigned)low);
    }
}

/* A decoder's table has an entry for each CODE_BITS bits: low bits << 16 | all bits << 8 | top << 4 | code's length.
   All bits are 0 where it is the escape. */
enum { DECODER_ROW = 1 << CODE_BITS };

INLINE uint64_t get_value(const uint8_t *from, uint64_t *position, const uint32_t *row, int width, unsigned *wrong) {
    uint64_t bits = load_word(from + (*position >> 3), 8) >> (*position & 7);
    uint32_t entry = row[bits & (DECODER_ROW - 1)];
    unsigned length = entry & 15, low = entry >> 16, all = (entry >> 8) & 255, top = (entry >> 4) & 3;
    if (UNLIKELY(!all)) {
        unsigned symbol = (unsigned)(bits >> length) & (SYMBOLS - 1);
        *wrong |= symbol >= symbols_of(width);
        low = (unsigned)low_of_symbol(symbol);
        top = symbol - 2 * low;
        length += 7;
        all = length + low;
    }
    bits >>= length;
    *position += all;
    if (width == 8 && low > 40) { /* what is left of the eight bytes does not hold them */
        uint64_t start = *position - low;
        bits = (load_word(from + (start >> 3), 8) >> (start & 7)) & 0xffffffff;
        start += 32;
        bits |= (load_word(from + (start >> 3), 8) >> (start & 7)) << 32;
    }
    return ((uint64_t)top << low) | (bits & (((uint64_t)1 << low) - 1));
}

#endif
