/* A block of words of one width at once: loops of fixed length over arrays of their own, which compilers vectorize.
   Included once for each width, with UNSIGNED, SIGNED and OF(name) defined. */

/* Residuals and keys of `count` words, at most BLOCK; what is behind them is undefined. */
INLINE void OF(residuals)(const uint8_t *data, const uint8_t *base, size_t count, Form form, void *r, uint8_t *key) {
    enum { TOP = 8 * sizeof(UNSIGNED) - 1 };
    const UNSIGNED magnitude = (UNSIGNED)(((UNSIGNED)1 << TOP) - 1), flip = form.ordered ? magnitude : 0;
    UNSIGNED a[BLOCK], b[BLOCK], out[BLOCK];
    load_words(a, data, count, sizeof(UNSIGNED));
    load_words(b, base, count, sizeof(UNSIGNED));
    for (int i = 0; i < BLOCK; i++) {
        UNSIGNED x = a[i] ^ ((UNSIGNED)((SIGNED)a[i] >> TOP) & flip), y = b[i] ^ ((UNSIGNED)((SIGNED)b[i] >> TOP) & flip);
        UNSIGNED d = (UNSIGNED)(x - y);
        out[i] = (UNSIGNED)(d << 1) ^ (UNSIGNED)((SIGNED)d >> TOP);
    }
    memcpy(r, out, sizeof out);
    if (form.shift == UNGROUPED) memset(key, 0, BLOCK);
    else for (int i = 0; i < BLOCK; i++) key[i] = (uint8_t)((UNSIGNED)(b[i] & magnitude) >> form.shift);
}

INLINE void OF(keys)(const uint8_t *base, size_t count, Form form, uint8_t *key) {
    enum { TOP = 8 * sizeof(UNSIGNED) - 1 };
    const UNSIGNED magnitude = (UNSIGNED)(((UNSIGNED)1 << TOP) - 1);
    UNSIGNED b[BLOCK];
    if (form.shift == UNGROUPED) {
        memset(key, 0, BLOCK);
        return;
    }
    load_words(b, base, count, sizeof(UNSIGNED));
    for (int i = 0; i < BLOCK; i++) key[i] = (uint8_t)((UNSIGNED)(b[i] & magnitude) >> form.shift);
}

/* What the residuals to the base stand for; `out` may be `base`. */
INLINE void OF(apply)(const void *r, const uint8_t *base, size_t count, Form form, uint8_t *out) {
    enum { TOP = 8 * sizeof(UNSIGNED) - 1 };
    const UNSIGNED magnitude = (UNSIGNED)(((UNSIGNED)1 << TOP) - 1), flip = form.ordered ? magnitude : 0;
    UNSIGNED a[BLOCK], b[BLOCK];
    memcpy(a, r, sizeof a);
    load_words(b, base, count, sizeof(UNSIGNED));
    for (int i = 0; i < BLOCK; i++) {
        UNSIGNED y = b[i] ^ ((UNSIGNED)((SIGNED)b[i] >> TOP) & flip);
        UNSIGNED x = (UNSIGNED)(y + ((UNSIGNED)(a[i] >> 1) ^ (UNSIGNED)(0 - (UNSIGNED)(a[i] & 1))));
        a[i] = x ^ ((UNSIGNED)((SIGNED)x >> TOP) & flip);
    }
    store_words(out, a, count, sizeof(UNSIGNED));
}

/* Rows of bytes of equal significance, `row_size` apart, the least first; the sign turned to the low end if asked. */
INLINE void OF(split)(const uint8_t *data, size_t count, int turn, uint8_t *rows, size_t row_size) {
    enum { TOP = 8 * sizeof(UNSIGNED) - 1 };
    UNSIGNED a[BLOCK];
    uint8_t out[BLOCK];
    load_words(a, data, count, sizeof(UNSIGNED));
    if (turn) for (int i = 0; i < BLOCK; i++) a[i] = (UNSIGNED)((UNSIGNED)(a[i] << 1) | a[i] >> TOP);
    for (size_t b = 0; b < sizeof(UNSIGNED); b++) {
        for (int i = 0; i < BLOCK; i++) out[i] = (uint8_t)(a[i] >> (8 * b));
        memcpy(rows + b * row_size, out, count);
    }
}

INLINE void OF(join)(const uint8_t *const *rows, size_t start, size_t count, int turn, uint8_t *out) {
    enum { TOP = 8 * sizeof(UNSIGNED) - 1 };
    UNSIGNED a[BLOCK] = {0};
    uint8_t in[BLOCK];
    for (size_t b = 0; b < sizeof(UNSIGNED); b++) {
        memcpy(in, rows[b] + start, count);
        memset(in + count, 0, BLOCK - count);
        for (int i = 0; i < BLOCK; i++) a[i] = (UNSIGNED)(a[i] | (UNSIGNED)((UNSIGNED)in[i] << (8 * b)));
    }
    if (turn) for (int i = 0; i < BLOCK; i++) a[i] = (UNSIGNED)(a[i] >> 1 | (UNSIGNED)(a[i] << TOP));
    store_words(out + start * sizeof(UNSIGNED), a, count, sizeof(UNSIGNED));
}

#undef UNSIGNED
#undef SIGNED
#undef OF
