/* Words into rows of bytes of equal significance, and back. */
#include "blocks.h"

void split(const uint8_t *data, size_t count, int width, int turn, uint8_t *rows) {
    for (size_t at = 0; at < count; at += BLOCK) {
        size_t n = count - at < BLOCK ? count - at : BLOCK;
        if (width == 8) split_8(data + 8 * at, n, turn, rows + at, count);
        else if (width == 4) split_4(data + 4 * at, n, turn, rows + at, count);
        else if (width == 2) split_2(data + 2 * at, n, turn, rows + at, count);
        else split_1(data + at, n, turn, rows + at, count);
    }
}

void join(const uint8_t *const *rows, size_t count, int width, int turn, uint8_t *out) {
    for (size_t at = 0; at < count; at += BLOCK) {
        size_t n = count - at < BLOCK ? count - at : BLOCK;
        if (width == 8) join_8(rows, at, n, turn, out);
        else if (width == 4) join_4(rows, at, n, turn, out);
        else if (width == 2) join_2(rows, at, n, turn, out);
        else join_1(rows, at, n, turn, out);
    }
}
