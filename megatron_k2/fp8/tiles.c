/* 1x128 E4M3 tiles on a CPU, the bytes of tiles.py.

   Matrices are row-major [rows, width]; the last tile of a row may be shorter. Maxima are taken over
   the bits of the magnitudes, whose order is that of the numbers with NaN above infinity. */

#include "e4m3.h"

#define TILE 128

/* Scale of a tile from its largest magnitude's bits, and what its numbers are multiplied by. */
static inline float factors(uint32_t largest, float *scale) {
    const float floor = 448.0f * 0x1p-126f;
    float amax = as_float(largest);
    amax = amax < floor ? floor : amax;
    *scale = amax / 448.0f;
    return 448.0f / amax;
}

static inline void quantize_tile_f32(const float *x, uint8_t *codes, float *scale, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = as_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float factor = factors(largest, scale);
    for (int64_t i = 0; i < n; i++) codes[i] = to_e4m3(x[i] * factor);
}

static inline void quantize_tile_bf16(const uint16_t *x, uint8_t *codes, float *scale, int64_t n) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = x[i] & 0x7fffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float factor = factors((uint32_t)largest << 16, scale);
    for (int64_t i = 0; i < n; i++) codes[i] = to_e4m3(from_bf16(x[i]) * factor);
}

static inline void dequantize_tile_f32(const uint8_t *codes, float scale, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = from_e4m3(codes[i]) * scale;
}

static inline void dequantize_tile_bf16(const uint8_t *codes, float scale, uint16_t *out,
                                        int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = to_bf16(from_e4m3(codes[i]) * scale);
}

/* A tile of 128 is a call with a constant length, of which the compiler makes code of its own. */
#define OVER_TILES(CALL, LAST)                                                   \
    for (int64_t row = 0; row < rows; row++) {                                   \
        int64_t at = row * width, end = at + width;                              \
        for (; at + TILE <= end; at += TILE, scales++) CALL;                     \
        if (at < end) {                                                          \
            LAST;                                                                \
            scales++;                                                            \
        }                                                                        \
    }

void quantize_f32(const float *restrict x, uint8_t *restrict codes, float *restrict scales,
                  int64_t rows, int64_t width) {
    OVER_TILES(quantize_tile_f32(x + at, codes + at, scales, TILE),
               quantize_tile_f32(x + at, codes + at, scales, end - at))
}

void quantize_bf16(const uint16_t *restrict x, uint8_t *restrict codes, float *restrict scales,
                   int64_t rows, int64_t width) {
    OVER_TILES(quantize_tile_bf16(x + at, codes + at, scales, TILE),
               quantize_tile_bf16(x + at, codes + at, scales, end - at))
}

void dequantize_f32(float *restrict out, const uint8_t *restrict codes,
                    const float *restrict scales, int64_t rows, int64_t width) {
    OVER_TILES(dequantize_tile_f32(codes + at, *scales, out + at, TILE),
               dequantize_tile_f32(codes + at, *scales, out + at, end - at))
}

void dequantize_bf16(uint16_t *restrict out, const uint8_t *restrict codes,
                     const float *restrict scales, int64_t rows, int64_t width) {
    OVER_TILES(dequantize_tile_bf16(codes + at, *scales, out + at, TILE),
               dequantize_tile_bf16(codes + at, *scales, out + at, end - at))
}
