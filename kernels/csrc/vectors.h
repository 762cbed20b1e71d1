// Vectors of float32 as wide as the instruction set has them, and storage in float32 or bfloat16.
//
// Written with the compiler's vector extensions (GCC and Clang), so that one source serves AVX-512,
// AVX2, SSE and NEON. No headers but the compiler's own.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GW_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

enum DType { FLOAT32 = 0, BFLOAT16 = 1 };

namespace {

// ---- vectors ----

GW_INLINE int64_t vectors(int64_t floats) { return (floats + LANES - 1) / LANES; }

GW_INLINE Vec at(const float* from) { return *(const Vec*)from; }
GW_INLINE void put(float* to, Vec x) { *(Vec*)to = x; }

// Lanes of a and b, one after the other, in the order of `order` (a constant).
GW_INLINE Vec shuffled(Vec a, Vec b, Lanes order) {
#if defined(__clang__)
  Vec result;
  for (int l = 0; l < LANES; ++l) result[l] = order[l] < LANES ? a[order[l]] : b[order[l] - LANES];
  return result;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// Every second lane of a and b, one after the other, from lane `first` on.
GW_INLINE Vec every_second(Vec a, Vec b, int first) {
  Lanes order;
  for (int l = 0; l < LANES; ++l) order[l] = 2 * l + first;
  return shuffled(a, b, order);
}

// a0 b0 a1 b1 ..., from lane `first` of both on.
GW_INLINE Vec interleaved(Vec a, Vec b, int first) {
  Lanes order;
  for (int l = 0; l < LANES; ++l) order[l] = first + l / 2 + l % 2 * LANES;
  return shuffled(a, b, order);
}

// The largest integer not above x, for |x| < 2^31.
GW_INLINE Lanes floored(Vec x) {
  const Lanes truncated = __builtin_convertvector(x, Lanes);
  return truncated + (Lanes)(__builtin_convertvector(truncated, Vec) > x);  // true is -1
}

// a and b, each in blocks of 2 * HALF lanes, added half to half: the even halves of the result come
// from a, the odd ones from b. The first shuffle is a blend, which costs less than one.
template <int HALF>
GW_INLINE Vec fold(Vec a, Vec b) {
  Lanes stay, cross;
  for (int l = 0; l < LANES; ++l) {
    stay[l] = l & HALF ? LANES + l : l;
    cross[l] = l & HALF ? LANES + l - HALF : l + HALF;
  }
  return shuffled(a, b, stay) + shuffled(a, b, cross);
}

// The sum over its lanes of each of the 2 * HALF = LANES rows, as one vector. Overwrites the rows.
template <int HALF = LANES / 2>
GW_INLINE Vec lane_sums(Vec* rows) {
  for (int i = 0; i < HALF; ++i) rows[i] = fold<HALF>(rows[i], rows[i + HALF]);
  if constexpr (HALF > 1) return lane_sums<HALF / 2>(rows);
  return rows[0];
}

// ---- storage ----

GW_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float result;
  memcpy(&result, &wide, 4);
  return result;
}

GW_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

// Short copies: a call of memcpy costs more than they do, and is made only where the compiler knows
// the length and writes the copy out.
GW_INLINE void copy(float* to, const float* from, int64_t count) {
  if (__builtin_constant_p(count)) {
    memcpy(to, from, count * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) put(to + i, at(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

GW_INLINE void load(float* out, const void* base, int dtype, int64_t start, int64_t count) {
  if (dtype == FLOAT32) {
    copy(out, (const float*)base + start, count);
  } else {
    const uint16_t* in = (const uint16_t*)base + start;
    for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(in[i]);
  }
}

GW_INLINE void store(void* base, int dtype, int64_t start, const float* in, int64_t count) {
  if (dtype == FLOAT32) {
    copy((float*)base + start, in, count);
  } else {
    uint16_t* out = (uint16_t*)base + start;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i]);
  }
}

// exp for arguments <= 0, within 2 units in the last place; a function that loops can vectorise.
GW_INLINE float exp_nonpositive(float x) {
  const bool underflows = x < -87.0f;
  const float clipped = underflows ? -87.0f : x;
  const float n = (float)(int32_t)(clipped * 1.44269504f - 0.5f);  // to nearest: it is negative
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // Through unsigned, so that a NaN that came this far is no undefined shift.
  const uint32_t bits = (uint32_t)((int32_t)(n == n ? n : 0.0f) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  const float result = p * power;
  return underflows ? 0.0f : result;
}

}  // namespace
