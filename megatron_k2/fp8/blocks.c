/* 128x128 E4M3 blocks of a weight on a CPU, the bytes of checkpoint/block_fp8/reference.py.

   Matrices are row-major [rows, width]; blocks at the lower and right edge may be smaller. Scales are
   [ceil(rows / 128), ceil(width / 128)]. Weights are bf16 or fp32, widened a run at a time: a run is
   the part of one row that lies in one block. */

#include "e4m3.h"

#define BLOCK 128

typedef struct {
    int is_bf16;
    int64_t width;
} Matrix;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t number_size(Matrix m) { return m.is_bf16 ? 2 : 4; }

static inline void load(float *run, Matrix m, const void *weight, int64_t at, int64_t n) {
    const uint16_t *half = (const uint16_t *)weight + at;
    if (!m.is_bf16)
        memcpy(run, (const float *)weight + at, (size_t)n * sizeof *run);
    else
        for (int64_t i = 0; i < n; i++) run[i] = from_bf16(half[i]);
}

static inline void store(void *weight, int64_t at, Matrix m, const float *run, int64_t n) {
    uint16_t *half = (uint16_t *)weight + at;
    if (!m.is_bf16)
        memcpy((float *)weight + at, run, (size_t)n * sizeof *run);
    else
        for (int64_t i = 0; i < n; i++) half[i] = to_bf16(run[i]);
}

static inline void decode(float *run, const uint8_t *codes, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) run[i] = from_e4m3(codes[i]) * scale;
}

static inline void encode(uint8_t *codes, const float *run, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = run[i] / scale;
        x = x > 448.0f ? 448.0f : x; /* false for NaN, which stays */
        x = x < -448.0f ? -448.0f : x;
        codes[i] = to_e4m3(x);
    }
}

static inline uint8_t largest_code(const uint8_t *codes, int64_t n) {
    uint8_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint8_t magnitude = codes[i] & 0x7fu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* Whether codes give the weights back, bit for bit. */
static inline int gives_back(Matrix m, const void *weight, int64_t at, const uint8_t *codes,
                             float scale, int64_t n) {
    float run[BLOCK], back[BLOCK];
    decode(run, codes, scale, n);
    store(back, 0, m, run, n);
    return !memcmp(back, (const char *)weight + at * number_size(m), (size_t)(n * number_size(m)));
}

/* amax / 448 of a block, rounded up to a power of two if asked; bits of magnitudes have the order of
   the numbers, NaN above infinity. */
static inline float fresh_scale(Matrix m, const void *weight, int64_t at, int64_t rows, int64_t n,
                                int power_of_two) {
    uint32_t largest = 0;
    for (int64_t r = 0; r < rows; r++) {
        float run[BLOCK];
        load(run, m, weight, at + r * m.width, n);
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude = as_bits(run[i]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    float amax = as_float(largest);
    float scale = amax > 0.0f ? amax / 448.0f : 1.0f; /* also where it is NaN */
    return power_of_two ? as_float((as_bits(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

/* Codes of a block by a scale; with ``must_fit`` only as long as they give the weights back. */
static inline int encode_block(Matrix m, const void *weight, uint8_t *codes, int64_t at, float scale,
                               int64_t rows, int64_t n, int must_fit) {
    for (int64_t r = 0; r < rows; r++, at += m.width) {
        float run[BLOCK];
        load(run, m, weight, at, n);
        encode(codes + at, run, scale, n);
        if (must_fit && !gives_back(m, weight, at, codes + at, scale, n)) return 0;
    }
    return 1;
}

static inline int64_t requantize(Matrix m, const void *weight, uint8_t *codes, float *scales,
                                 const float *source, int power_of_two, int64_t num_rows) {
    int64_t num_kept = 0;
    for (int64_t top = 0; top < num_rows; top += BLOCK)
        for (int64_t left = 0; left < m.width; left += BLOCK, scales++) {
            int64_t at = top * m.width + left;
            int64_t rows = least(BLOCK, num_rows - top), n = least(BLOCK, m.width - left);
            if (source) *scales = *source++;
            if (source && encode_block(m, weight, codes, at, *scales, rows, n, 1)) {
                num_kept++;
                continue;
            }
            *scales = fresh_scale(m, weight, at, rows, n, power_of_two);
            encode_block(m, weight, codes, at, *scales, rows, n, 0);
        }
    return num_kept;
}

static inline void dequantize(Matrix m, void *out, const uint8_t *codes, const float *scales,
                              uint8_t *largest, int64_t num_rows) {
    int64_t num_blocks = (m.width + BLOCK - 1) / BLOCK;
    memset(largest, 0, (size_t)((num_rows + BLOCK - 1) / BLOCK * num_blocks));
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t j = 0; j < num_blocks; j++) {
            float run[BLOCK];
            int64_t at = row * m.width + j * BLOCK, n = least(BLOCK, m.width - j * BLOCK);
            int64_t block = row / BLOCK * num_blocks + j;
            uint8_t top = largest_code(codes + at, n);
            largest[block] = top > largest[block] ? top : largest[block];
            decode(run, codes + at, scales[block], n);
            store(out, at, m, run, n);
        }
}

/* Weights of codes, and each block's largest code without its sign. */
void dequantize_blocks(void *out, int is_bf16, const uint8_t *codes, const float *scales,
                       uint8_t *largest, int64_t rows, int64_t width) {
    if (is_bf16)
        dequantize((Matrix){1, width}, out, codes, scales, largest, rows);
    else
        dequantize((Matrix){0, width}, out, codes, scales, largest, rows);
}

/* Codes and scales of weights; a block that a source's scale (may be null) gives back, bit for bit,
   keeps it. Returns how many do. */
int64_t requantize_blocks(const void *weight, int is_bf16, uint8_t *codes, float *scales,
                          const float *source, int power_of_two, int64_t rows, int64_t width) {
    if (is_bf16)
        return requantize((Matrix){1, width}, weight, codes, scales, source, power_of_two, rows);
    return requantize((Matrix){0, width}, weight, codes, scales, source, power_of_two, rows);
}
