// What the layers with a LayerNorm over the channels share: padded rows, their moments, the normal
// distribution, and memory. Included after vectors.h.
#pragma once
#include <stdlib.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// A row of `count` channels is held in `padded` floats: a whole number of vectors, and an odd one,
// so that rows that follow one another do not fall into the same few sets of the cache.
struct Channels {
  int64_t count, vectors, padded;
  Lanes last;  // -1 in the lanes of the last vector that are channels
};

GW_INLINE Channels make_channels(int64_t count) {
  Channels c;
  c.count = count;
  c.vectors = vectors(count);
  c.padded = (c.vectors | 1) * LANES;
  for (int l = 0; l < LANES; ++l) c.last[l] = (c.vectors - 1) * LANES + l < count ? -1 : 0;
  return c;
}

// Whether rows of a tensor can be read and written as whole vectors where they are.
GW_INLINE bool is_direct(const Channels& c, int dtype) {
  return dtype == FLOAT32 && c.count == c.vectors * LANES;
}

float* allocate(size_t floats) {
  void* memory = NULL;
  return posix_memalign(&memory, 64, floats * sizeof(float) + 64) ? NULL : (float*)memory;
}

// The channels of a row as float32, and zeros up to a whole vector.
GW_INLINE void load_row(float* out, const void* base, int dtype, int64_t row, const Channels& c) {
  load(out, base, dtype, row * c.count, c.count);
  for (int64_t i = c.count; i < c.vectors * LANES; ++i) out[i] = 0.0f;
}

GW_INLINE Vec filled(float x) { return Vec{} + x; }

// 1 / x within 2 units in the last place, for x of a usual size: a division takes four times as long.
GW_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX__)
  const Vec guess = (Vec)_mm256_rcp_ps((__m256)x);
#else
  const Vec guess = 1.0f / x;
#endif
  return guess + guess * (1.0f - x * guess);  // a step of Newton's method
}

GW_INLINE Vec inverse_root(Vec x) {
  Vec result;
  for (int l = 0; l < LANES; ++l) result[l] = 1.0f / sqrtf(x[l]);
  return result;
}

// exp for arguments <= 0, as exp_nonpositive is.
GW_INLINE Vec exp_of_nonpositive(Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
  const Lanes underflows = x < -87.0f;
  const Vec clipped = underflows ? filled(-87.0f) : x;
  const Lanes whole = __builtin_convertvector(clipped * 1.44269504f - 0.5f, Lanes);
  const Vec n = __builtin_convertvector(whole, Vec);
  const Vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = filled(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Vec power = (Vec)(((Bits)whole + 127u) << 23);
  return underflows ? Vec{} : p * power;
}

// Of the standard normal distribution: P(X <= u), and exp(-u^2/2).
struct Normal {
  Vec below, bell;
};

// erfc(z) exp(z^2) = t q(t) with t = 1 / (1 + p z): a fit by least squares, reweighted until the
// largest error of erfc was the least (3e-7, of which float32 arithmetic makes most).
GW_INLINE Normal normal(Vec u) {
  const Vec z = (u < 0.0f ? -u : u) * 0.70710678f;
  const Vec t = reciprocal(1.0f + 0.48f * z);
  Normal result;
  result.bell = exp_of_nonpositive(-(z * z));
  Vec q = filled(0.0887670815f);
  q = q * t - 0.39891988f;
  q = q * t + 0.527427554f;
  q = q * t - 0.0598902963f;
  q = q * t + 0.311670542f;
  q = q * t + 0.259411186f;
  q = q * t + 0.271533847f;
  const Vec tail = 0.5f * (t * q * result.bell);
  result.below = u < 0.0f ? tail : 1.0f - tail;
  return result;
}

// One value for each of up to LANES rows.
struct Moments {
  Vec mean, inverse;  // inverse: of the deviation
};

// The sum over the channels of a row, lane by lane.
GW_INLINE Vec row_sum(const float* row, const Channels& c) {
  Vec even = Vec{}, odd = Vec{};
  int64_t v = 0;
  for (; v + 2 <= c.vectors; v += 2) {
    even += at(row + v * LANES);
    odd += at(row + (v + 1) * LANES);
  }
  if (v < c.vectors) even += at(row + v * LANES);
  return even + odd;
}

// rows: where each of the `n` rows begins.
GW_INLINE Moments moments(const float* const* rows, int n, const Channels& c, float eps) {
  Vec sums[LANES];
  for (int p = 0; p < LANES; ++p) sums[p] = p < n ? row_sum(rows[p], c) : Vec{};
  const float share = 1.0f / (float)c.count;
  const int64_t last = c.vectors - 1;
  Moments result;
  result.mean = lane_sums(sums) * share;
  for (int p = 0; p < LANES; ++p) {
    Vec even = Vec{}, odd = Vec{};
    if (p < n) {
      const Vec mean = filled(result.mean[p]);
      int64_t v = 0;
      for (; v + 2 <= last; v += 2) {
        const Vec a = at(rows[p] + v * LANES) - mean, b = at(rows[p] + (v + 1) * LANES) - mean;
        even += a * a;
        odd += b * b;
      }
      if (v < last) {
        const Vec a = at(rows[p] + v * LANES) - mean;
        even += a * a;
      }
      const Vec a = c.last ? at(rows[p] + last * LANES) - mean : Vec{};
      odd += a * a;
    }
    sums[p] = even + odd;
  }
  result.inverse = inverse_root(lane_sums(sums) * share + eps);
  return result;
}

// A cut of `count` things into parts that depends on nothing else, so that sums over a part, and then
// over the parts in their order, have the same bits for any number of threads.
GW_INLINE int64_t part_begin(int64_t part, int64_t parts, int64_t count) {
  return part * count / parts;
}

// sums[i] += the same entry of every part, in their order.
void add_parts(const float* parts, int64_t count, int64_t floats, float* sums, int threads) {
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (floats + 255) / 256; ++block) {
    const int64_t first = block * 256, end = first + 256 < floats ? first + 256 : floats;
    for (int64_t part = 0; part < count; ++part)
      for (int64_t i = first; i < end; ++i) sums[i] += parts[part * floats + i];
  }
}

}  // namespace
