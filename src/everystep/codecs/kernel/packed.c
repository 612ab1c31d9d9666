/* Every word's residual to a base, in codes of its own for each exponent of the base. */
#include "blocks.h"

#include <math.h>
#include <stdlib.h>

enum {
    SAMPLE_MIN = 1 << 13,  /* so many words are all looked at; of more the first of each block, */
    SAMPLE_SHARE = 64,     /* so that one in so many is seen, and never less than that */
    AHEAD = 16,             /* blocks */
    CONTEXT_MIN = 64,      /* keys seen less often share a context */
    LANES = 4,             /* blocks that are decoded side by side: each waits for its own bits only */
    TAIL = BLOCK * WORD_BYTES_MAX + 16
};

int form_is_known(Form form) {
    int width = form.width;
    return (width == 1 || width == 2 || width == 4 || width == 8) && form.ordered >= 0 && form.ordered <= 1 &&
           form.shift >= 0 && (form.shift < 8 * width || form.shift == UNGROUPED);
}

/* plan ------------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t residuals[KEYS][SYMBOLS];
    uint32_t bytes[8][256];
    uint64_t seen, halves, changed;
} Survey;

static size_t sample_step(size_t count) {
    size_t blocks = (count + BLOCK - 1) / BLOCK, seen = count / SAMPLE_SHARE;
    if (seen < SAMPLE_MIN) seen = SAMPLE_MIN;
    return count <= seen ? BLOCK : (seen + blocks - 1) / blocks;
}

INLINE void survey_words(Survey *found, const uint8_t *data, const uint8_t *base, size_t count, Form form, int width) {
    size_t step = sample_step(count);
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t stop = start + step < count ? start + step : count, ahead = start + AHEAD * BLOCK;
        for (size_t i = ahead; i < ahead + step && i < count; i += 64 / (size_t)width) {
            PREFETCH(data + i * width); /* a sample of memory that nobody has touched is all waiting */
            PREFETCH(base + i * width);
        }
        for (size_t i = start; i < stop; i++) {
            uint64_t word = load_word(data + i * width, width), old = load_word(base + i * width, width);
            uint64_t r = residual(word, old, width, form.ordered);
            int low = low_bits_of(r);
            found->residuals[key_of(old, width, form.shift)][2 * low + (int)(r >> low)]++;
            found->changed += r != 0;
            if (i & 1) continue; /* for what stands alone every other word says enough */
            if (form.ordered) word = cut(word << 1, width) | word >> (8 * width - 1);
            for (int b = 0; b < width; b++) found->bytes[b][(word >> (8 * b)) & 255]++;
        }
        found->seen += stop - start;
        found->halves += (stop - start + 1) / 2;
    }
}

static double entropy_bits(const uint32_t *counts, double total) {
    double bits = 0;
    for (int i = 0; i < 256; i++)
        if (counts[i]) bits += counts[i] * log2(total / counts[i]);
    return bits < 8 * total ? bits : 8 * total;
}

static uint64_t choose_contexts(const Survey *found, Header *header) {
    uint32_t rest[SYMBOLS] = {0};
    uint64_t bits = 0;
    header->contexts = 1;
    memset(header->of_key, 0, sizeof header->of_key);
    for (int key = 0; key < KEYS; key++) {
        uint64_t seen = 0;
        for (int s = 0; s < SYMBOLS; s++) seen += found->residuals[key][s];
        if (!seen) continue;
        if (seen < CONTEXT_MIN || header->form.shift == UNGROUPED) {
            for (int s = 0; s < SYMBOLS; s++) rest[s] += found->residuals[key][s];
            continue;
        }
        header->key[header->contexts] = (uint8_t)key;
        header->of_key[key] = (uint16_t)header->contexts;
        bits += build_code(found->residuals[key], &header->code[header->contexts++]);
    }
    return bits + build_code(rest, &header->code[0]);
}

long plan(const uint8_t *data, const uint8_t *base, size_t count, Form form, uint8_t *out, Estimate *estimate) {
    Survey *found = calloc(1, sizeof *found);
    Header *header = malloc(sizeof *header);
    long size = FAILED_MEMORY;
    if (found && header) {
        switch (form.width) {
            case 1: survey_words(found, data, base, count, form, 1); break;
            case 2: survey_words(found, data, base, count, form, 2); break;
            case 4: survey_words(found, data, base, count, form, 4); break;
            default: survey_words(found, data, base, count, form, 8);
        }
        header->form = form;
        double scale = found->seen ? (double)count / (double)found->seen / 8 : 0, alone = 0;
        double halves = found->halves ? (double)count / (double)found->halves / 8 : 0;
        estimate->packed = (double)choose_contexts(found, header) * scale;
        for (int b = 0; b < form.width; b++) alone += entropy_bits(found->bytes[b], (double)found->halves);
        estimate->alone = alone * halves;
        estimate->changed = found->seen ? (double)found->changed / (double)found->seen : 0;
        size = (long)write_header(header, 0, out);
        estimate->packed += (double)size + 2 * (double)((count + BLOCK - 1) / BLOCK);
    }
    free(found);
    free(header);
    return size;
}

/* pack ------------------------------------------------------------------------------------------------------------- */

INLINE uint8_t *pack_block(const uint16_t *const *row, const uint8_t *data, const uint8_t *base, size_t count,
                           Form form, int width, uint8_t *out) {
    Words r;
    uint8_t key[BLOCK];
    Sink sink = {out, 0, 0};
    residuals(data, base, count, form, width, &r, key);
    for (size_t i = 0; i < count; i++) put_value(&sink, row[key[i]], word_of(&r, i, width), width);
    return sink.at + (sink.fill > 0);
}

INLINE long long pack_blocks(const uint16_t *const *row, const uint8_t *data, const uint8_t *base, size_t count,
                             Form form, int width, uint8_t *out, uint8_t *end) {
    size_t blocks = (count + BLOCK - 1) / BLOCK;
    uint8_t *at = out + 2 * blocks;
    if ((size_t)(end - out) < 2 * blocks) return NO_GAIN;
    for (size_t b = 0; b < blocks; b++) {
        size_t first = b * BLOCK, n = count - first < BLOCK ? count - first : BLOCK;
        if (end - at < TAIL) return NO_GAIN;
        uint8_t *next = pack_block(row, data + first * width, base + first * width, n, form, width, at);
        store_word(out + 2 * b, (uint64_t)(next - at), 2);
        at = next;
    }
    return at - out;
}

INLINE long long pack_words(const uint16_t *const *row, const uint8_t *data, const uint8_t *base, size_t count,
                            Form form, uint8_t *out, uint8_t *end) {
    switch (form.width) {
        case 1: return pack_blocks(row, data, base, count, form, 1, out, end);
        case 2: return pack_blocks(row, data, base, count, form, 2, out, end);
        case 4: return pack_blocks(row, data, base, count, form, 4, out, end);
        default: return pack_blocks(row, data, base, count, form, 8, out, end);
    }
}

static long long pack_plain(const uint16_t *const *row, const uint8_t *data, const uint8_t *base, size_t count,
                            Form form, uint8_t *out, uint8_t *end) {
    return pack_words(row, data, base, count, form, out, end);
}

WIDE static long long pack_wide(const uint16_t *const *row, const uint8_t *data, const uint8_t *base, size_t count,
                                Form form, uint8_t *out, uint8_t *end) {
    return pack_words(row, data, base, count, form, out, end);
}

long long pack(const uint8_t *plain_header, size_t header_size, const uint8_t *data, const uint8_t *base, size_t count,
               uint8_t *out, size_t capacity) {
    Header *header = malloc(sizeof *header);
    uint16_t *tables = NULL;
    size_t end = 0;
    long long size = FAILED_MEMORY;
    const char *wrong = header ? read_header(plain_header, header_size, 0, header, &end) : "memory";
    if (header && (wrong || end != header_size || capacity < header_size)) size = NO_GAIN;
    else if (header)
        tables = malloc((size_t)header->contexts * ENCODER_ROW * sizeof *tables);
    if (tables) {
        const uint16_t *row[KEYS];
        Form form = header->form;
        fill_encoder(header, header->contexts, tables);
        for (int key = 0; key < KEYS; key++) row[key] = tables + header->of_key[key] * ENCODER_ROW;
        memcpy(out, plain_header, header_size);
        size = (is_wide() ? pack_wide : pack_plain)(row, data, base, count, form, out + header_size, out + capacity);
        if (size >= 0) size += (long long)header_size;
    }
    free(tables);
    free(header);
    return size;
}

/* unpack ----------------------------------------------------------------------------------------------------------- */

/* One block, from bytes that go on for TAIL; whether it ended where it should. */
INLINE int unpack_block(const uint8_t *from, size_t size, const uint32_t *const *row, const uint8_t *base, uint8_t *out,
                        size_t count, Form form, int width) {
    Words r;
    uint8_t key[BLOCK];
    uint64_t position = 0;
    unsigned wrong = 0;
    keys(base, count, form, width, key);
    for (size_t i = 0; i < count; i++) set_word(&r, i, get_value(from, &position, row[key[i]], width, &wrong), width);
    apply(&r, base, count, form, width, out);
    return !wrong && (position + 7) / 8 == size;
}

/* LANES whole blocks side by side, under the same conditions. */
INLINE int unpack_lanes(const uint8_t *from, const size_t *sizes, const uint32_t *const *row, const uint8_t *base,
                        uint8_t *out, Form form, int width) {
    const size_t step = (size_t)BLOCK * width;
    const uint64_t s0 = 0, s1 = s0 + 8 * sizes[0], s2 = s1 + 8 * sizes[1], s3 = s2 + 8 * sizes[2];
    uint64_t p0 = s0, p1 = s1, p2 = s2, p3 = s3;
    unsigned wrong = 0;
    Words r[LANES];
    uint8_t key[LANES][BLOCK];
    for (int lane = 0; lane < LANES; lane++) keys(base + lane * step, BLOCK, form, width, key[lane]);
    for (size_t i = 0; i < BLOCK; i++) {
        set_word(&r[0], i, get_value(from, &p0, row[key[0][i]], width, &wrong), width);
        set_word(&r[1], i, get_value(from, &p1, row[key[1][i]], width, &wrong), width);
        set_word(&r[2], i, get_value(from, &p2, row[key[2][i]], width, &wrong), width);
        set_word(&r[3], i, get_value(from, &p3, row[key[3][i]], width, &wrong), width);
    }
    for (int lane = 0; lane < LANES; lane++) apply(&r[lane], base + lane * step, BLOCK, form, width, out + lane * step);
    return !wrong && (p0 - s0 + 7) / 8 == sizes[0] && (p1 - s1 + 7) / 8 == sizes[1] && (p2 - s2 + 7) / 8 == sizes[2] &&
           (p3 - s3 + 7) / 8 == sizes[3];
}

INLINE const char *unpack_blocks(const uint8_t *stored, const uint8_t *end, const uint32_t *const *row,
                                 const uint8_t *base, uint8_t *out, size_t count, Form form, int width) {
    static const char *early = "it ends early", *other = "a block of another length";
    size_t blocks = (count + BLOCK - 1) / BLOCK, b = 0;
    uint8_t tail[2 * TAIL];
    if ((size_t)(end - stored) / 2 < blocks) return early;
    const uint8_t *at = stored + 2 * blocks;
    while (b < blocks) {
        size_t sizes[LANES] = {0}, n = 0, all = 0, done = b * BLOCK;
        for (; n < LANES && b + n < blocks; n++) all += sizes[n] = load_word(stored + 2 * (b + n), 2);
        if ((size_t)(end - at) < all) return early;
        uint8_t *to = out + done * width;
        const uint8_t *old = base + done * width;
        if ((b + LANES) * BLOCK <= count && (size_t)(end - at) - (all - sizes[3]) >= TAIL) {
            if (!unpack_lanes(at, sizes, row, old, to, form, width)) return other;
            at += all;
            b += LANES;
            continue;
        }
        const uint8_t *from = at;
        if (sizes[0] > TAIL) return other;
        if (end - at < TAIL) { /* as much as there is, and zeros behind it */
            memset(tail, 0, sizeof tail);
            memcpy(tail, at, sizes[0]);
            from = tail;
        }
        if (!unpack_block(from, sizes[0], row, old, to, count - done < BLOCK ? count - done : BLOCK, form, width))
            return other;
        at += sizes[0];
        b++;
    }
    return at == end ? NULL : "bytes left over";
}

INLINE const char *unpack_words(const uint8_t *stored, const uint8_t *end, const uint32_t *const *row,
                                const uint8_t *base, uint8_t *out, size_t count, Form form) {
    switch (form.width) {
        case 1: return unpack_blocks(stored, end, row, base, out, count, form, 1);
        case 2: return unpack_blocks(stored, end, row, base, out, count, form, 2);
        case 4: return unpack_blocks(stored, end, row, base, out, count, form, 4);
        default: return unpack_blocks(stored, end, row, base, out, count, form, 8);
    }
}

static const char *unpack_plain(const uint8_t *stored, const uint8_t *end, const uint32_t *const *row,
                                const uint8_t *base, uint8_t *out, size_t count, Form form) {
    return unpack_words(stored, end, row, base, out, count, form);
}

WIDE static const char *unpack_wide(const uint8_t *stored, const uint8_t *end, const uint32_t *const *row,
                                    const uint8_t *base, uint8_t *out, size_t count, Form form) {
    return unpack_words(stored, end, row, base, out, count, form);
}

const char *unpack(const uint8_t *stored, size_t size, const uint8_t *base, uint8_t *out, size_t nbytes) {
    Header *header = malloc(sizeof *header);
    uint32_t *tables = NULL;
    size_t end = 0;
    const char *wrong = header ? read_header(stored, size, 0, header, &end) : "memory";
    if (!wrong && nbytes % (size_t)header->form.width) wrong = "words of another width";
    if (!wrong) {
        tables = malloc((size_t)header->contexts * DECODER_ROW * sizeof *tables);
        wrong = tables ? fill_decoder(header, header->contexts, tables) : "memory";
    }
    if (!wrong) {
        const uint32_t *row[KEYS];
        size_t count = nbytes / (size_t)header->form.width;
        for (int key = 0; key < KEYS; key++) row[key] = tables + header->of_key[key] * DECODER_ROW;
        wrong = (is_wide() ? unpack_wide : unpack_plain)(stored + end, stored + size, row, base, out, count,
                                                         header->form);
    }
    free(tables);
    free(header);
    return wrong;
}
