/* Codecs of words of 1, 2, 4 or 8 bytes: pure C, no Python. What the bytes mean is in docs/format.md. */
#ifndef EVERYSTEP_PACKED_H
#define EVERYSTEP_PACKED_H

#include <stddef.h>
#include <stdint.h>

enum {
    BLOCK = 1024,        /* words of one stream */
    SYMBOLS = 128,       /* a residual's bit length and the bit below its highest */
    CODE_BITS = 8,       /* longest code: a table of 512 bytes a context, so that the tables of a chunk stay in L1 */
    KEYS = 256,
    HEADER_MAX = 8 + (KEYS + 1) * (1 + 2 * (2 + (SYMBOLS + 2) / 2)),
    WORD_BYTES_MAX = 10, /* escape, symbol and 62 more bits */
    UNGROUPED = 255
};

enum { FAILED_MEMORY = -2, NO_GAIN = -1 };

typedef struct {
    int width;   /* bytes of a word: 1, 2, 4, 8 */
    int ordered; /* 1: sign and magnitude, brought into the numbers' order */
    int shift;   /* lowest bit of the base's key, or UNGROUPED */
} Form;

typedef struct {
    double packed;  /* bytes as residuals to the base */
    double alone;   /* bytes as planes of their own */
    double changed; /* share of words that differ from the base's */
} Estimate;

int form_is_known(Form form);

/* Codes for the residuals, from a sample: the header's length, or FAILED_MEMORY. `header` has HEADER_MAX bytes. */
long plan(const uint8_t *data, const uint8_t *base, size_t count, Form form, uint8_t *header, Estimate *estimate);

/* The header and all blocks: stored bytes, NO_GAIN where they do not fit `capacity`, or FAILED_MEMORY. */
long long pack(const uint8_t *header, size_t header_size, const uint8_t *data, const uint8_t *base, size_t count,
               uint8_t *out, size_t capacity);

/* The inverse; `out` may be `base`. 0, or what is wrong with the stored bytes (a text), or "memory". */
const char *unpack(const uint8_t *stored, size_t size, const uint8_t *base, uint8_t *out, size_t nbytes);

/* Positions and residuals of the words that differ; as `pack`, NO_GAIN too where more than `changed_max` differ. */
long long pack_sparse(const uint8_t *data, const uint8_t *base, size_t count, Form form, size_t changed_max,
                      uint8_t *out, size_t capacity);
const char *unpack_sparse(const uint8_t *stored, size_t size, const uint8_t *base, uint8_t *out, size_t nbytes);

/* Words into rows of bytes of equal significance, least first, the sign turned to the low end if asked; and back. */
void split(const uint8_t *data, size_t count, int width, int turn, uint8_t *rows);
void join(const uint8_t *const *rows, size_t count, int width, int turn, uint8_t *out);

#endif
