/* Bytes of any kind for the kernel: what decodes must stay within its memory, what was encoded must come back.

   libFuzzer drives it (run.sh). Compiled with ALONE it has a main of its own, which mutates seeds by a fixed rule:
   decoders COUNT SEED FILE… */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packed.h"

/* An input: kind, width and order, shift, how data differ from the base, nbytes (2), length of the pattern (2); then
   the pattern, which repeated is the base; then what is stored, or how the data differ. */
enum { DECODE, DECODE_SPARSE, ROUND_TRIP, KINDS, HEAD = 8 };
enum { PLACES = 1, LONG = 2 }; /* how: a few bytes differ, not all; nine times as long, so that a sample is taken */

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

static void demand(int truth, const char *what) {
    if (truth) return;
    fprintf(stderr, "not so: %s\n", what);
    abort();
}

/* Of exactly that size, so that a byte beyond it is seen. */
static uint8_t *room(size_t size) {
    uint8_t *at = malloc(size ? size : 1);
    demand(at != NULL, "there is memory");
    return at;
}

static uint8_t *copy(const uint8_t *from, size_t size) {
    uint8_t *at = room(size);
    if (size) memcpy(at, from, size);
    return at;
}

typedef const char *Back(const uint8_t *, size_t, const uint8_t *, uint8_t *, size_t);

/* Decodes into memory of its own and over the base: both alike. Whether it was what an encoder makes. */
static int decoded(Back *back, const uint8_t *stored, size_t size, const uint8_t *base, uint8_t *out, size_t nbytes) {
    uint8_t *over = copy(base, nbytes), *before = copy(base, nbytes);
    const char *wrong = back(stored, size, base, out, nbytes), *again = back(stored, size, over, over, nbytes);
    demand(!memcmp(base, before, nbytes), "the base stays as it is");
    demand((wrong == NULL) == (again == NULL), "decoding over the base ends alike");
    demand(wrong || !memcmp(out, over, nbytes), "decoding over the base gives the same");
    free(over), free(before);
    return wrong == NULL;
}

static void decode(Back *back, const uint8_t *rest, size_t size, const uint8_t *base, size_t nbytes) {
    uint8_t *stored = copy(rest, size), *out = room(nbytes);
    decoded(back, stored, size, base, out, nbytes);
    free(stored), free(out);
}

static void comes_back(Back *back, const uint8_t *stored, size_t size, const uint8_t *base, const uint8_t *data,
                       size_t nbytes) {
    uint8_t *exact = copy(stored, size), *out = room(nbytes);
    demand(decoded(back, exact, size, base, out, nbytes), "what was encoded can be decoded");
    demand(!memcmp(out, data, nbytes), "what was encoded comes back");
    if (size) {
        uint8_t *shorter = copy(stored, size - 1);
        demand(!decoded(back, shorter, size - 1, base, out, nbytes), "a byte less is damage");
        free(shorter);
    }
    free(exact), free(out);
}

static void pack_and_back(const uint8_t *data, const uint8_t *base, size_t nbytes, Form form) {
    uint8_t *header = room(HEADER_MAX);
    Estimate estimate = {0, 0, 0};
    size_t count = nbytes / (size_t)form.width;
    long head = plan(data, base, count, form, header, &estimate);
    demand(head > 0 && head <= HEADER_MAX, "a header");
    demand(estimate.packed >= 0 && estimate.alone >= 0 && estimate.changed >= 0 && estimate.changed <= 1, "estimates");
    uint8_t *exact = copy(header, (size_t)head);
    size_t most = (size_t)head + (count / BLOCK + 1) * (2 + BLOCK * WORD_BYTES_MAX) + BLOCK * WORD_BYTES_MAX + 16;
    uint8_t *out = room(most), *little = room(nbytes);
    long long size = pack(exact, (size_t)head, data, base, count, out, most);
    demand(size > 0, "there is room for anything");
    comes_back(unpack, out, (size_t)size, base, data, nbytes);
    long long less = pack(exact, (size_t)head, data, base, count, little, nbytes);
    demand(less == NO_GAIN || (less == size && !memcmp(out, little, (size_t)size)), "the same in little room, or none");
    free(header), free(exact), free(out), free(little);
}

static void pack_sparse_and_back(const uint8_t *data, const uint8_t *base, size_t nbytes, Form form) {
    size_t count = nbytes / (size_t)form.width, changed = 0, width = (size_t)form.width;
    for (size_t i = 0; i < count; i++) changed += memcmp(data + i * width, base + i * width, width) != 0;
    size_t capacity = HEADER_MAX + 4 * (KEYS + 1) + 16 * (changed + 2 * BLOCK);
    uint8_t *out = room(capacity), *little = room(HEADER_MAX), *none = room(0);
    long long size = pack_sparse(data, base, count, form, changed, out, capacity);
    demand(size > 0, "there is room for all changes");
    comes_back(unpack_sparse, out, (size_t)size, base, data, nbytes);
    size_t fewer[] = {changed - 1, changed / 2, changed / 4};
    for (int i = 0; changed && i < 3; i++)
        demand(pack_sparse(data, base, count, form, fewer[i], out, capacity) == NO_GAIN, "too many changes are not stored");
    long long less = pack_sparse(data, base, count, form, changed, little, HEADER_MAX);
    demand(less == NO_GAIN || less == size, "the same in little room, or none");
    demand(pack_sparse(data, base, count, form, changed, none, 0) == NO_GAIN, "no room at all");
    free(out), free(little), free(none);
}

static void split_and_back(const uint8_t *data, size_t nbytes, Form form) {
    size_t count = nbytes / (size_t)form.width;
    uint8_t *rows = room(nbytes), *out = room(nbytes);
    const uint8_t *row[8];
    split(data, count, form.width, form.ordered, rows);
    for (int i = 0; i < form.width; i++) row[i] = rows + (size_t)i * count;
    join(row, count, form.width, form.ordered, out);
    demand(!memcmp(out, data, nbytes), "rows come back");
    free(rows), free(out);
}

/* Every byte another one, or changes at places: two bytes of the rest say where, the third what changes there. */
static uint8_t *altered(const uint8_t *base, size_t nbytes, int how, const uint8_t *rest, size_t size) {
    uint8_t *data = copy(base, nbytes);
    if (!(how & PLACES))
        for (size_t i = 0; size && i < nbytes; i++) data[i] ^= rest[i % size];
    else
        for (size_t i = 0; nbytes && i + 3 <= size; i += 3) data[(size_t)(rest[i] | rest[i + 1] << 8) % nbytes] ^= rest[i + 2];
    return data;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    if (size < HEAD) return 0;
    Form form = {1 << (input[1] & 3), input[1] >> 2 & 1, input[2]};
    size_t nbytes = (size_t)(input[4] | input[5] << 8), period = (size_t)(input[6] | input[7] << 8);
    const uint8_t *pattern = input + HEAD;
    if (period > size - HEAD) period = size - HEAD;
    if (input[0] % KINDS == ROUND_TRIP && input[3] & LONG) nbytes *= 9;
    uint8_t *base = room(nbytes);
    for (size_t i = 0; i < nbytes; i++) base[i] = period ? pattern[i % period] : 0;
    const uint8_t *rest = pattern + period;
    size -= HEAD + period;
    if (input[0] % KINDS == DECODE) decode(unpack, rest, size, base, nbytes);
    else if (input[0] % KINDS == DECODE_SPARSE) decode(unpack_sparse, rest, size, base, nbytes);
    else if (form_is_known(form)) {
        nbytes -= nbytes % (size_t)form.width;
        uint8_t *exact = copy(base, nbytes), *data = altered(base, nbytes, input[3], rest, size);
        pack_and_back(data, exact, nbytes, form);
        pack_sparse_and_back(data, exact, nbytes, form);
        split_and_back(data, nbytes, form);
        free(exact), free(data);
    }
    free(base);
    return 0;
}

#ifdef ALONE

static uint64_t state;

static size_t below(size_t limit) { /* xorshift: the same everywhere */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return limit ? (size_t)(state % limit) : 0;
}

typedef struct {
    uint8_t *bytes;
    size_t size;
} Input;

static Input read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    demand(file != NULL && !fseek(file, 0, SEEK_END), "the seed can be read");
    long size = ftell(file);
    demand(size >= 0 && !fseek(file, 0, SEEK_SET), "the seed can be read");
    Input found = {room((size_t)size), (size_t)size};
    demand(fread(found.bytes, 1, found.size, file) == found.size, "the seed can be read");
    fclose(file);
    return found;
}

/* One to four changes: a bit, a byte, a number that lies, an end cut off, bytes twice, a part of another seed. */
static Input mutated(Input from, Input other) {
    Input out = {room(2 * from.size + other.size), from.size};
    memcpy(out.bytes, from.bytes, from.size);
    static const uint8_t odd[] = {0, 1, 2, 4, 8, 15, 16, 63, 64, 127, 128, 254, 255};
    for (size_t rounds = 1 + below(4); rounds; rounds--) {
        /* mostly near the beginning, where the tables are */
        size_t at = below(below(2) ? out.size : out.size < 200 ? out.size : 200), part;
        switch (below(6)) {
            case 0: out.bytes[at] ^= (uint8_t)(1u << below(8)); break;
            case 1: out.bytes[at] = (uint8_t)below(256); break;
            case 2: out.bytes[at] = odd[below(sizeof odd)]; break;
            case 3: out.size = below(8) ? out.size : HEAD + below(out.size - HEAD + 1); break;
            case 4:
                part = below(out.size - at < 64 ? out.size - at : 64);
                if (out.size + part > 2 * from.size) break;
                memmove(out.bytes + at + part, out.bytes + at, out.size - at);
                out.size += part;
                break;
            default:
                part = below(other.size < out.size - at ? other.size : out.size - at);
                memcpy(out.bytes + at, other.bytes + below(other.size - part + 1), part);
                break;
        }
    }
    Input exact = {copy(out.bytes, out.size), out.size};
    free(out.bytes);
    return exact;
}

int main(int argc, char **argv) {
    demand(argc > 3, "decoders COUNT SEED FILE…");
    long count = strtol(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) * 2 + 1;
    size_t seeds = (size_t)argc - 3;
    Input *seed = calloc(seeds, sizeof *seed);
    demand(seed != NULL, "there is memory");
    for (size_t i = 0; i < seeds; i++) {
        seed[i] = read_file(argv[3 + i]);
        demand(seed[i].size > HEAD, "a seed has a head");
        LLVMFuzzerTestOneInput(seed[i].bytes, seed[i].size);
    }
    for (long i = 0; i < count; i++) {
        size_t which = below(seeds), other = below(seeds);
        Input one = mutated(seed[which], seed[other]);
        LLVMFuzzerTestOneInput(one.bytes, one.size);
        free(one.bytes);
    }
    for (size_t i = 0; i < seeds; i++) free(seed[i].bytes);
    free(seed);
    printf("%ld inputs\n", count + (long)seeds);
    return 0;
}

#endif
