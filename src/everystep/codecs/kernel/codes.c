/* Codes of symbols: lengths from counts, tables from lengths, and the header that carries them. */
#include "words.h"

/* Huffman's lengths by two queues; counts ascending. Lengths come out descending. */
static void huffman(const uint64_t *counts, int n, uint8_t *lengths) {
    uint64_t weight[2 * SYMBOLS + 4];
    int parent[2 * SYMBOLS + 4], leaf = 0, node = n, made = n;
    memcpy(weight, counts, (size_t)n * sizeof(uint64_t));
    for (; made < 2 * n - 1; made++) {
        weight[made] = 0;
        for (int side = 0; side < 2; side++) {
            int least = leaf < n && (node == made || weight[leaf] <= weight[node]) ? leaf++ : node++;
            weight[made] += weight[least];
            parent[least] = made;
        }
    }
    uint8_t depth[2 * SYMBOLS + 4];
    depth[made - 1] = 0;
    for (int i = made - 2; i >= 0; i--) depth[i] = (uint8_t)(depth[parent[i]] + 1);
    memcpy(lengths, depth, (size_t)n);
}

/* Cuts lengths to CODE_BITS and makes them complete again: a symbol of the longest other length goes one deeper. */
static void limit(uint8_t *lengths, int n) {
    int of_length[2 * SYMBOLS + 4] = {0}, total = 0;
    for (int i = 0; i < n; i++) of_length[lengths[i] > CODE_BITS ? CODE_BITS : lengths[i]]++;
    for (int i = 1; i <= CODE_BITS; i++) total += of_length[i] << (CODE_BITS - i);
    while (total > 1 << CODE_BITS) {
        int i = CODE_BITS - 1;
        while (!of_length[i]) i--;
        of_length[CODE_BITS]--;
        of_length[i]--;
        of_length[i + 1] += 2;
        total--;
    }
    for (int i = CODE_BITS, at = 0; i > 0; i--)
        for (int j = 0; j < of_length[i]; j++) lengths[at++] = (uint8_t)i;
}

/* Symbols under a 256th of all are escaped: their codes would be longer than CODE_BITS. */
uint64_t build_code(const uint32_t *counts, Code *code) {
    int symbol[SYMBOLS + 1], n = 0, used = 0;
    uint64_t total = 0, rare = 0, count[SYMBOLS + 1];
    for (int i = 0; i < SYMBOLS; i++) total += counts[i], used += counts[i] > 0;
    for (int i = 0; i < SYMBOLS; i++) {
        if (!counts[i]) continue;
        if ((uint64_t)counts[i] << CODE_BITS >= total && n < (1 << CODE_BITS) - 1) symbol[n] = i, count[n++] = counts[i];
        else rare += counts[i];
    }
    if (!n) symbol[n] = 0, count[n++] = 1;
    symbol[n] = SYMBOLS, count[n++] = rare ? rare : 1;
    for (int i = 1; i < n; i++) { /* by count, equal ones as they stood */
        int s = symbol[i], j = i;
        uint64_t c = count[i];
        for (; j > 0 && count[j - 1] > c; j--) symbol[j] = symbol[j - 1], count[j] = count[j - 1];
        symbol[j] = s, count[j] = c;
    }
    uint8_t lengths[SYMBOLS + 1];
    huffman(count, n, lengths);
    limit(lengths, n);
    memset(code, 0, sizeof *code);
    int first = SYMBOLS, last = -1;
    uint64_t bits = 0;
    for (int i = 0; i < n; i++) {
        int s = symbol[i];
        if (s == SYMBOLS) {
            code->escape = lengths[i];
            continue;
        }
        code->length[s] = lengths[i];
        first = s < first ? s : first, last = s > last ? s : last;
    }
    code->first = (uint8_t)first, code->count = (uint8_t)(last - first + 1);
    for (int i = 0; i < SYMBOLS; i++) {
        unsigned length = code->length[i] ? code->length[i] : code->escape + 7u;
        bits += (uint64_t)counts[i] * (length + (unsigned)low_of_symbol((unsigned)i));
    }
    return bits;
}

/* tables ----------------------------------------------------------------------------------------------------------- */

static unsigned reversed(unsigned code, unsigned length) {
    unsigned out = 0;
    for (unsigned i = 0; i < length; i++) out |= ((code >> i) & 1) << (length - 1 - i);
    return out;
}

/* Canonical: by length, then by symbol, the escape behind all symbols. Entry: code << 4 | length. Whether complete. */
static int assign(const Code *code, uint16_t *row) {
    unsigned next = 0;
    memset(row, 0, ENCODER_ROW * sizeof *row);
    for (unsigned length = 1; length <= CODE_BITS; length++) {
        for (int i = 0; i <= SYMBOLS; i++) {
            unsigned own = i < SYMBOLS ? code->length[i] : code->escape;
            if (own == length) row[i] = (uint16_t)(reversed(next++, length) << 4 | length);
            if (next > 1u << length) return 0;
        }
        next <<= 1;
    }
    return next == 2u << CODE_BITS;
}

void fill_encoder(const Header *header, int codes, uint16_t *tables) {
    for (int i = 0; i < codes; i++) assign(&header->code[i], tables + i * ENCODER_ROW);
}

const char *fill_decoder(const Header *header, int codes, uint32_t *tables) {
    uint16_t code[ENCODER_ROW];
    for (int c = 0; c < codes; c++) {
        uint32_t *row = tables + c * DECODER_ROW;
        if (!assign(&header->code[c], code)) return "codes that are not complete";
        for (unsigned symbol = 0; symbol <= SYMBOLS; symbol++) {
            unsigned length = code[symbol] & 15, low = (unsigned)low_of_symbol(symbol);
            if (!length) continue;
            uint32_t entry = symbol < SYMBOLS ? low << 16 | (length + low) << 8 | (symbol - 2 * low) << 4 | length : length;
            for (unsigned i = code[symbol] >> 4; i < DECODER_ROW; i += 1u << length) row[i] = entry;
        }
    }
    return NULL;
}

/* A code: the first symbol that has a length and how many from there on; lengths by half bytes, the escape's first. */
static uint8_t *write_code(const Code *code, uint8_t *at) {
    uint8_t half = code->escape;
    *at++ = code->first;
    *at++ = code->count;
    for (int i = 0; i < code->count; i++) {
        uint8_t length = code->length[code->first + i];
        if (i & 1) half = length;
        else *at++ = (uint8_t)(half | length << 4);
    }
    if (!(code->count & 1)) *at++ = half;
    return at;
}

/* How many bytes it takes; 0 where it is none. */
static size_t read_code(Code *code, const uint8_t *stored, size_t size, unsigned most) {
    memset(code, 0, sizeof *code);
    if (size < 3) return 0;
    code->first = stored[0];
    code->count = stored[1];
    size_t bytes = 2 + ((size_t)code->count + 2) / 2;
    if ((unsigned)code->first + code->count > most || size < bytes) return 0;
    code->escape = stored[2] & 15;
    for (unsigned i = 0; i < code->count; i++)
        code->length[code->first + i] = i & 1 ? stored[2 + (i + 1) / 2] & 15 : stored[2 + i / 2] >> 4;
    for (unsigned i = 0; i < code->count; i++)
        if (code->length[code->first + i] > CODE_BITS) return 0;
    return code->escape > CODE_BITS ? 0 : bytes;
}

/* the header ------------------------------------------------------------------------------------------------------- */

/* width, ordered + 2 if sparse, shift, keys with a context (2); then each context: its key and its codes. */
size_t write_header(const Header *header, int sparse, uint8_t *out) {
    int each = sparse ? 2 : 1;
    uint8_t *at = out;
    *at++ = (uint8_t)header->form.width;
    *at++ = (uint8_t)(header->form.ordered | (sparse ? SPARSE_FLAG : 0));
    *at++ = (uint8_t)header->form.shift;
    store_word(at, (uint64_t)(header->contexts - 1), 2);
    at += 2;
    for (int i = 0; i < header->contexts * each; i++) {
        if (i >= each && i % each == 0) *at++ = header->key[i / each];
        at = write_code(&header->code[i], at);
    }
    return (size_t)(at - out);
}

const char *read_header(const uint8_t *stored, size_t size, int sparse, Header *header, size_t *end) {
    static const char *early = "it ends within its header";
    size_t at = 5, bytes;
    int each = sparse ? 2 : 1, last = -1;
    if (size < at) return early;
    header->form.width = stored[0];
    header->form.ordered = stored[1] & 1;
    header->form.shift = stored[2];
    if (stored[1] >> 1 != (sparse ? 1 : 0) || !form_is_known(header->form)) return "a header that makes no sense";
    header->contexts = (int)load_word(stored + 3, 2) + 1;
    if (header->contexts > KEYS + 1) return "more contexts than keys";
    memset(header->of_key, 0, sizeof header->of_key);
    for (int i = 0; i < header->contexts * each; i++) {
        if (i >= each && i % each == 0) {
            if (at == size) return early;
            int key = stored[at++];
            if (key <= last) return "keys out of order";
            header->key[i / each] = (uint8_t)key;
            header->of_key[last = key] = (uint16_t)(i / each);
        }
        unsigned most = symbols_of(sparse && i % 2 == 0 ? GAP_WIDTH : header->form.width);
        if (!(bytes = read_code(&header->code[i], stored + at, size - at, most))) return "a code that makes no sense";
        at += bytes;
    }
    *end = at;
    return NULL;
}
