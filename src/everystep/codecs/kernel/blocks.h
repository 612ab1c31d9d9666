/* Blocks of words of any width. */
#ifndef EVERYSTEP_BLOCKS_H
#define EVERYSTEP_BLOCKS_H

#include "words.h"

INLINE void load_words(void *to, const uint8_t *from, size_t count, size_t width) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (size_t i = 0; i < count; i++)
        for (size_t b = 0; b < width; b++) ((uint8_t *)to)[i * width + width - 1 - b] = from[i * width + b];
#else
    memcpy(to, from, count * width);
#endif
    memset((uint8_t *)to + count * width, 0, (BLOCK - count) * width);
}

INLINE void store_words(uint8_t *to, const void *from, size_t count, size_t width) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (size_t i = 0; i < count; i++)
        for (size_t b = 0; b < width; b++) to[i * width + width - 1 - b] = ((const uint8_t *)from)[i * width + b];
#else
    memcpy(to, from, count * width);
#endif
}

#define OF(name) name##_1
#define UNSIGNED uint8_t
#define SIGNED int8_t
#include "block.h"
#define OF(name) name##_2
#define UNSIGNED uint16_t
#define SIGNED int16_t
#include "block.h"
#define OF(name) name##_4
#define UNSIGNED uint32_t
#define SIGNED int32_t
#include "block.h"
#define OF(name) name##_8
#define UNSIGNED uint64_t
#define SIGNED int64_t
#include "block.h"

typedef union {
    uint8_t of_1[BLOCK];
    uint16_t of_2[BLOCK];
    uint32_t of_4[BLOCK];
    uint64_t of_8[BLOCK];
} Words;

INLINE uint64_t word_of(const Words *words, size_t i, int width) {
    return width == 8 ? words->of_8[i] : width == 4 ? words->of_4[i] : width == 2 ? words->of_2[i] : words->of_1[i];
}

INLINE void set_word(Words *words, size_t i, uint64_t word, int width) {
    if (width == 8) words->of_8[i] = word;
    else if (width == 4) words->of_4[i] = (uint32_t)word;
    else if (width == 2) words->of_2[i] = (uint16_t)word;
    else words->of_1[i] = (uint8_t)word;
}

INLINE void residuals(const uint8_t *data, const uint8_t *base, size_t count, Form form, int width, Words *r,
                      uint8_t *key) {
    if (width == 8) residuals_8(data, base, count, form, r, key);
    else if (width == 4) residuals_4(data, base, count, form, r, key);
    else if (width == 2) residuals_2(data, base, count, form, r, key);
    else residuals_1(data, base, count, form, r, key);
}

INLINE void keys(const uint8_t *base, size_t count, Form form, int width, uint8_t *key) {
    if (width == 8) keys_8(base, count, form, key);
    else if (width == 4) keys_4(base, count, form, key);
    else if (width == 2) keys_2(base, count, form, key);
    else keys_1(base, count, form, key);
}

INLINE void apply(const Words *r, const uint8_t *base, size_t count, Form form, int width, uint8_t *out) {
    if (width == 8) apply_8(r, base, count, form, out);
    else if (width == 4) apply_4(r, base, count, form, out);
    else if (width == 2) apply_2(r, base, count, form, out);
    else apply_1(r, base, count, form, out);
}

#endif
