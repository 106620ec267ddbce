/* Numbers of tiles.c and blocks.c, by their bits. Plain C: the compiler makes vectors of it. Exact
   also where the processor takes subnormal fp32 numbers for zero, as Megatron's CPU host makes it. */

#ifndef MEGATRON_K2_E4M3_H
#define MEGATRON_K2_E4M3_H

#include <stdint.h>
#include <string.h>

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }

/* To nearest, ties to even; NaN stays NaN and keeps its sign. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = 0x7fc0u | (bits >> 16 & 0x8000u);
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* To nearest, ties to even, for magnitudes up to 448. */
static inline uint8_t to_e4m3(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 960u;
    /* Below 2^-6 codes are 2^-9 apart, as floats are around 2^14: adding it rounds. */
    uint32_t subnormal = as_bits(as_float(magnitude) + 16384.0f) - 0x46800000u;
    uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
    code = magnitude > 0x7f800000u ? 0x7fu : code;
    return (uint8_t)(code | ((bits >> 24) & 0x80u));
}

static inline float from_e4m3(uint8_t code) {
    uint32_t magnitude = code & 0x7fu;
    uint32_t normal = (magnitude << 20) + (120u << 23);
    uint32_t subnormal = as_bits((float)(int32_t)magnitude * 0x1p-9f);
    uint32_t bits = magnitude < 8u ? subnormal : normal;
    bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
    return as_float(bits | ((uint32_t)(code & 0x80u) << 24));
}

#endif
