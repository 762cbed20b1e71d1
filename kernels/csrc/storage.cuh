// Storage of float32 (0), bfloat16 (1) and float16 (2), computed with as float32; integers by their size.
//
// In a host build (GW_HOST) whoever includes it has defined these types, GW_INLINE, the conversions of
// float16 and the two bit casts.
#pragma once
#ifndef GW_HOST
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define GW_INLINE __device__ __forceinline__
#endif

GW_INLINE float bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

GW_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifndef GW_HOST
GW_INLINE float f16_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
GW_INLINE uint16_t float_to_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

template <int T> struct Storage { typedef uint16_t type; };
template <> struct Storage<0> { typedef float type; };

template <int T> GW_INLINE float widen(typename Storage<T>::type x) {
  if constexpr (T == 0) return x;
  else if constexpr (T == 1) return bf16_to_float(x);
  else return f16_to_float(x);
}

template <int T> GW_INLINE typename Storage<T>::type narrow(float x) {
  if constexpr (T == 0) return x;
  else if constexpr (T == 1) return float_to_bf16(x);
  else return float_to_f16(x);
}
