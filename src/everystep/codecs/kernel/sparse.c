/* Only the words that differ from the base, by the base's key: how many words of that key stand still before each, and
   its residual. */
#include "blocks.h"

#include <stdlib.h>

enum { CHANGES = BLOCK / 2, CONTEXT_MIN = 64, TAIL = BLOCK * WORD_BYTES_MAX + 16 };

typedef struct {
    uint32_t position, gap;
    uint64_t residual;
    uint16_t key, context;
} Change;

/* Where words differ: how many, or more than `most`. `found` has room for `most` and one step more. */
INLINE size_t find_changes(const uint8_t *data, const uint8_t *base, size_t count, Form form, int width, Change *found,
                           size_t most) {
    const size_t step = 64 / (size_t)width;
    size_t n = 0;
    for (size_t start = 0; start < count; start += step) {
        size_t stop = start + step < count ? start + step : count;
        if (stop - start == step && !memcmp(data + start * width, base + start * width, 64)) continue;
        if (n > most) return n;
        for (size_t i = start; i < stop; i++) {
            uint64_t word = load_word(data + i * width, width), old = load_word(base + i * width, width);
            Change *change = found + n;
            change->position = (uint32_t)i;
            change->key = (uint16_t)key_of(old, width, form.shift);
            change->residual = residual(word, old, width, form.ordered);
            n += word != old;
        }
    }
    return n;
}

/* How many words of its context lie between each change and the one before. */
INLINE void fill_gaps(const Header *header, const uint8_t *base, size_t count, int width, Change *changes,
                      size_t changed) {
    uint32_t seen[4][KEYS + 1], behind[KEYS + 1]; /* four counts: words of one key do not wait for each other */
    uint8_t key[BLOCK];
    size_t at = 0, block = 0, end = 0;
    memset(seen, 0, sizeof seen);
    memset(behind, 0, sizeof behind);
    for (size_t c = 0; c < changed; c++) {
        Change *change = changes + c;
        uint32_t rank = change->position;
        change->context = header->of_key[change->key];
        while (header->contexts > 1 && at < change->position) {
            if (at == end) {
                block = at;
                end = count - at < BLOCK ? count : at + BLOCK;
                keys(base + at * width, end - at, header->form, width, key);
            }
            size_t stop = change->position < end ? change->position : end;
            for (; at < stop; at++) seen[at & 3][header->of_key[key[at - block]]]++;
        }
        if (header->contexts > 1)
            rank = seen[0][change->context] + seen[1][change->context] + seen[2][change->context] + seen[3][change->context];
        change->gap = rank - behind[change->context];
        behind[change->context] = rank + 1;
    }
}

/* Contexts for keys with many changes; the changes in the order of their contexts. */
static void choose(Header *header, Form form, Change *changes, size_t changed) {
    uint32_t of_key[KEYS] = {0};
    for (size_t c = 0; c < changed; c++) of_key[changes[c].key]++;
    memset(header->of_key, 0, sizeof header->of_key);
    header->form = form;
    header->contexts = 1;
    for (int key = 0; key < KEYS; key++) {
        if (of_key[key] < CONTEXT_MIN || form.shift == UNGROUPED) continue;
        header->key[header->contexts] = (uint8_t)key;
        header->of_key[key] = (uint16_t)header->contexts++;
    }
}

static void sort(const Header *header, const Change *changes, size_t changed, Change *sorted, uint32_t *sizes) {
    size_t start[KEYS + 2] = {0};
    for (size_t c = 0; c < changed; c++) start[changes[c].context + 1]++;
    for (int i = 0; i < header->contexts; i++) sizes[i] = (uint32_t)start[i + 1], start[i + 1] += start[i];
    for (size_t c = 0; c < changed; c++) sorted[start[changes[c].context]++] = changes[c];
}

static void build_codes(Header *header, const Change *sorted, const uint32_t *sizes) {
    for (int i = 0; i < header->contexts; sorted += sizes[i++]) {
        uint32_t gaps[SYMBOLS] = {0}, residuals[SYMBOLS] = {0};
        for (uint32_t c = 0; c < sizes[i]; c++) gaps[symbol_of(sorted[c].gap)]++, residuals[symbol_of(sorted[c].residual)]++;
        build_code(gaps, &header->code[2 * i]);
        build_code(residuals, &header->code[2 * i + 1]);
    }
}

INLINE long long write_changes(const Header *header, const uint16_t *tables, int width, const Change *sorted,
                               const uint32_t *sizes, size_t changed, uint8_t *out, uint8_t *end) {
    size_t blocks = (changed + CHANGES - 1) / CHANGES, fixed = 4 * (size_t)header->contexts;
    if ((size_t)(end - out) < fixed + 2 * blocks) return NO_GAIN;
    for (int i = 0; i < header->contexts; i++) store_word(out + 4 * i, sizes[i], 4);
    uint8_t *at = out + fixed + 2 * blocks;
    for (size_t b = 0; b < blocks; b++) {
        size_t stop = (b + 1) * CHANGES < changed ? (b + 1) * CHANGES : changed;
        if (end - at < TAIL) return NO_GAIN;
        Sink sink = {at, 0, 0};
        for (size_t c = b * CHANGES; c < stop; c++) {
            const uint16_t *row = tables + 2 * sorted[c].context * ENCODER_ROW;
            put_value(&sink, row, sorted[c].gap, GAP_WIDTH);
            put_value(&sink, row + ENCODER_ROW, sorted[c].residual, width);
        }
        uint8_t *next = sink.at + (sink.fill > 0);
        store_word(out + fixed + 2 * b, (uint64_t)(next - at), 2);
        at = next;
    }
    return at - out;
}

INLINE long long sparse_words(const uint8_t *data, const uint8_t *base, size_t count, Form form, int width,
                              size_t most, uint8_t *out, size_t capacity) {
    Change *changes = malloc((most + 2 * 64) * sizeof *changes), *sorted = NULL;
    Header *header = calloc(1, sizeof *header);
    uint16_t *tables = malloc(2 * (KEYS + 1) * ENCODER_ROW * sizeof *tables);
    uint32_t sizes[KEYS + 1];
    long long size = !changes || !header || !tables ? FAILED_MEMORY : capacity < HEADER_MAX ? NO_GAIN : 0;
    size_t changed = size ? 0 : find_changes(data, base, count, form, width, changes, most);
    if (!size && changed > most) size = NO_GAIN;
    if (!size && !(sorted = malloc((changed + 1) * sizeof *sorted))) size = FAILED_MEMORY;
    if (!size) {
        choose(header, form, changes, changed);
        fill_gaps(header, base, count, width, changes, changed);
        sort(header, changes, changed, sorted, sizes);
        build_codes(header, sorted, sizes);
        fill_encoder(header, 2 * header->contexts, tables);
        size_t head = write_header(header, 1, out);
        size = write_changes(header, tables, width, sorted, sizes, changed, out + head, out + capacity);
        if (size >= 0) size += (long long)head;
    }
    free(changes), free(sorted), free(header), free(tables);
    return size;
}

long long pack_sparse(const uint8_t *data, const uint8_t *base, size_t count, Form form, size_t changed_max,
                      uint8_t *out, size_t capacity) {
    switch (form.width) {
        case 1: return sparse_words(data, base, count, form, 1, changed_max, out, capacity);
        case 2: return sparse_words(data, base, count, form, 2, changed_max, out, capacity);
        case 4: return sparse_words(data, base, count, form, 4, changed_max, out, capacity);
        default: return sparse_words(data, base, count, form, 8, changed_max, out, capacity);
    }
}

/* back ------------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t gap;
    uint64_t residual;
} Step;

/* The changes of one block, from bytes that go on for TAIL; whether it ended where it should. */
INLINE int read_block(const uint32_t *tables, const uint8_t *from, size_t size, const uint32_t *sizes, int *context,
                      uint32_t *left, Step *steps, size_t n, int width) {
    uint64_t position = 0;
    unsigned wrong = 0;
    for (size_t i = 0; i < n; i++) {
        while (!*left) *left = sizes[++*context];
        const uint32_t *row = tables + 2 * (size_t)*context * DECODER_ROW;
        steps[i].gap = (uint32_t)get_value(from, &position, row, GAP_WIDTH, &wrong);
        steps[i].residual = get_value(from, &position, row + DECODER_ROW, width, &wrong);
        --*left;
    }
    return !wrong && (position + 7) / 8 == size;
}

INLINE const char *read_steps(const uint32_t *tables, const uint8_t *stored, const uint8_t *end, const uint32_t *sizes,
                              size_t changed, int width, Step *steps) {
    uint8_t tail[2 * TAIL];
    size_t blocks = (changed + CHANGES - 1) / CHANGES;
    int context = 0;
    uint32_t left = sizes[0];
    if ((size_t)(end - stored) / 2 < blocks) return "it ends early";
    const uint8_t *at = stored + 2 * blocks;
    for (size_t b = 0; b < blocks; b++) {
        size_t size = load_word(stored + 2 * b, 2), done = b * CHANGES;
        size_t n = changed - done < CHANGES ? changed - done : CHANGES;
        const uint8_t *from = at;
        if ((size_t)(end - at) < size || size > TAIL) return "a block of another length";
        if (end - at < TAIL) { /* as much as there is, and zeros behind it */
            memset(tail, 0, sizeof tail);
            memcpy(tail, at, size);
            from = tail;
        }
        if (!read_block(tables, from, size, sizes, &context, &left, steps + done, n, width))
            return "a block of another length";
        at += size;
    }
    return at == end ? NULL : "bytes left over";
}

INLINE int change_word(const uint8_t *base, uint8_t *out, size_t at, uint64_t r, Form form, int width) {
    uint64_t old = load_word(base + at * width, width);
    store_word(out + at * width, applied(r, old, width, form.ordered), width);
    return 1;
}

/* Counts the words of each context, and changes those whose turn it is; whether all had one. */
INLINE int take_steps(const Header *header, const Step *steps, const uint32_t *sizes, const uint8_t *base, uint8_t *out,
                      size_t count, int width) {
    uint64_t wait[KEYS + 1], done = 0, all = 0;
    const Step *next[KEYS + 1], *last[KEYS + 1];
    uint8_t key[BLOCK];
    if (header->contexts == 1) {
        uint64_t at = 0;
        for (uint32_t i = 0; i < sizes[0]; i++, at++) {
            at += steps[i].gap;
            if (at >= count) return 0;
            change_word(base, out, at, steps[i].residual, header->form, width);
        }
        return 1;
    }
    for (int c = 0; c < header->contexts; steps += sizes[c++]) {
        next[c] = steps, last[c] = steps + sizes[c], all += sizes[c];
        wait[c] = sizes[c] ? steps[0].gap : UINT64_MAX;
    }
    for (size_t start = 0; start < count && done < all; start += BLOCK) {
        size_t n = count - start < BLOCK ? count - start : BLOCK;
        keys(base + start * width, n, header->form, width, key);
        for (size_t i = 0; i < n; i++) {
            unsigned c = header->of_key[key[i]];
            if (UNLIKELY(!wait[c]--)) {
                change_word(base, out, start + i, next[c]->residual, header->form, width);
                wait[c] = ++next[c] < last[c] ? next[c]->gap : UINT64_MAX;
                done++;
            }
        }
    }
    return done == all;
}

static const char *read_sparse(const Header *header, const uint8_t *stored, const uint8_t *end, const uint8_t *base,
                               uint8_t *out, size_t nbytes) {
    int width = header->form.width;
    size_t fixed = 4 * (size_t)header->contexts, changed, count = nbytes / (size_t)width;
    uint64_t all = 0; /* their sum may be more than a size_t of four bytes holds */
    uint32_t sizes[KEYS + 1];
    if ((size_t)(end - stored) < fixed) return "it ends early";
    for (int i = 0; i < header->contexts; i++) all += sizes[i] = (uint32_t)load_word(stored + 4 * i, 4);
    /* a gap and a residual take two bits at least */
    if (all > count || all / 4 > (size_t)(end - stored)) return "more changes than words";
    changed = (size_t)all;
    uint32_t *tables = malloc(2 * (size_t)header->contexts * DECODER_ROW * sizeof *tables);
    Step *steps = malloc((changed + 1) * sizeof *steps);
    const char *wrong = tables && steps ? fill_decoder(header, 2 * header->contexts, tables) : "memory";
    int whole = 0;
    stored += fixed;
    if (out != base) memcpy(out, base, nbytes);
    if (!wrong) switch (width) {
        case 1:
            if (!(wrong = read_steps(tables, stored, end, sizes, changed, 1, steps)))
                whole = take_steps(header, steps, sizes, base, out, count, 1);
            break;
        case 2:
            if (!(wrong = read_steps(tables, stored, end, sizes, changed, 2, steps)))
                whole = take_steps(header, steps, sizes, base, out, count, 2);
            break;
        case 4:
            if (!(wrong = read_steps(tables, stored, end, sizes, changed, 4, steps)))
                whole = take_steps(header, steps, sizes, base, out, count, 4);
            break;
        default:
            if (!(wrong = read_steps(tables, stored, end, sizes, changed, 8, steps)))
                whole = take_steps(header, steps, sizes, base, out, count, 8);
    }
    free(tables), free(steps);
    return wrong ? wrong : whole ? NULL : "a change behind the end";
}

const char *unpack_sparse(const uint8_t *stored, size_t size, const uint8_t *base, uint8_t *out, size_t nbytes) {
    Header *header = malloc(sizeof *header);
    size_t end = 0;
    const char *wrong = header ? read_header(stored, size, 1, header, &end) : "memory";
    if (!wrong && nbytes % (size_t)header->form.width) wrong = "words of another width";
    if (!wrong) wrong = read_sparse(header, stored + end, stored + size, base, out, nbytes);
    free(header);
    return wrong;
}
