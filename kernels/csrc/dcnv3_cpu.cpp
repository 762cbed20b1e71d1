// DCNv3 for CPUs: forward and backward, float32 and bfloat16 storage, float32 arithmetic.
//
// One task is one group of one image. It copies its channels into a private float32 image with a
// border of zeros, padded to whole vectors: no corner needs a bounds check, no channel count a tail,
// and the backward pass owns what it adds to, so it needs no atomics and its sums have one order
// whatever the number of threads. Coordinates are computed for a row of outputs at a time, over all
// points at once; the corners are then read as vectors over the channels.
//
// Built for one instruction set at a time (see groundwork/kernels/host_compiler.py). C interface,
// no headers but the compiler's own.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

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

extern "C" struct Dcnv3Problem {
  int64_t batch, height, width, out_height, out_width;
  int64_t groups, depth, points;
  int64_t stride_h, stride_w;
  int64_t origin_h, origin_w;     // centre of the kernel at output (0, 0), in pixels
  const float* grid_xy;           // (points, 2): offset_scale times the regular grid
  float offset_scale;
  int32_t softmax;
  int32_t value_dtype, offset_dtype, mask_dtype;
  int32_t threads;
};

namespace {

// ---- vectors ----

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

GW_INLINE Lanes every_second(int first) {
  Lanes order;
  for (int l = 0; l < LANES; ++l) order[l] = 2 * l + first;
  return order;
}

// The largest integer not above x, for |x| < 2^31.
GW_INLINE Lanes floored(Vec x) {
  const Lanes truncated = __builtin_convertvector(x, Lanes);
  return truncated + (Lanes)(__builtin_convertvector(truncated, Vec) > x);  // true is -1
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

// Short copies of a length known only at run time: a call of memcpy costs more than they do.
GW_INLINE void copy(float* to, const float* from, int64_t count) {
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

// ---- scratch of one thread ----

GW_INLINE int64_t vectors(int64_t depth) { return (depth + LANES - 1) / LANES; }

GW_INLINE size_t image_floats(const Dcnv3Problem& q) {
  return (size_t)(q.height + 2) * (q.width + 2) * vectors(q.depth) * LANES;
}

float* allocate(size_t floats) {
  void* memory = NULL;
  return posix_memalign(&memory, 64, floats * sizeof(float) + 64) ? NULL : (float*)memory;
}

// Samples of a row of outputs; each array has out_width * points entries.
struct Row {
  float *offset, *mask;                 // offset: (x, y) pairs
  float *right, *down;
  int32_t* inside;                      // -1 where a sample counts, else 0
  float *w00, *w01, *w10, *w11;         // of the corners: bilinear, times the mask
  int32_t* cell;                        // of the padded image, in pixels
  float *grad_weight, *grad_x, *grad_y;
};

// Where the samples of a row lie without offsets: x in the image, y from the row's own line.
struct Grid {
  float *x, *y;
};

// Pixels ahead of the one being read: a group's values are a stride of all channels apart, which
// the processor does not foresee.
#define AHEAD 8

GW_INLINE void fetch(const void* base, int dtype, int64_t start, int64_t count) {
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  const char* first = (const char*)base + start * bytes;
  for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(first + i);
}

// ---- one group of one image as float32 with a border ----

void copy_in(const Dcnv3Problem& q, const void* value, int64_t n, int64_t g, float* image) {
  const int64_t padded = vectors(q.depth) * LANES, stride = (q.width + 2) * padded;
  const int64_t channels = q.groups * q.depth;
  memset(image, 0, stride * sizeof(float));
  memset(image + (q.height + 1) * stride, 0, stride * sizeof(float));
  for (int64_t y = 0; y < q.height; ++y) {
    float* line = image + (y + 1) * stride;
    memset(line, 0, padded * sizeof(float));
    memset(line + (q.width + 1) * padded, 0, padded * sizeof(float));
    for (int64_t x = 0; x < q.width; ++x) {
      float* pixel = line + (x + 1) * padded;
      const int64_t start = ((n * q.height + y) * q.width + x) * channels + g * q.depth;
      fetch(value, q.value_dtype, start + AHEAD * channels, q.depth);
      load(pixel, value, q.value_dtype, start, q.depth);
      for (int64_t d = q.depth; d < padded; ++d) pixel[d] = 0.0f;
    }
  }
}

void copy_out(const Dcnv3Problem& q, const float* image, int64_t n, int64_t g, void* value) {
  const int64_t padded = vectors(q.depth) * LANES, stride = (q.width + 2) * padded;
  const int64_t channels = q.groups * q.depth;
  for (int64_t y = 0; y < q.height; ++y)
    for (int64_t x = 0; x < q.width; ++x)
      store(value, q.value_dtype, ((n * q.height + y) * q.width + x) * channels + g * q.depth,
            image + (y + 1) * stride + (x + 1) * padded, q.depth);
}

// ---- the samples of a row ----

void normalise(float* mask, int64_t rows, int64_t points) {
  for (int64_t x = 0; x < rows; ++x) {
    float* logits = mask + x * points;
    float largest = logits[0];
    for (int64_t p = 1; p < points; ++p) largest = logits[p] > largest ? logits[p] : largest;
    for (int64_t p = 0; p < points; ++p) logits[p] -= largest;
  }
  for (int64_t k = 0; k < rows * points; ++k) {
    const float e = exp_nonpositive(mask[k]);
    mask[k] = mask[k] == mask[k] ? e : mask[k];
  }
  for (int64_t x = 0; x < rows; ++x) {
    float* weights = mask + x * points;
    float sum = 0.0f;
    for (int64_t p = 0; p < points; ++p) sum += weights[p];
    const float inverse = 1.0f / sum;
    for (int64_t p = 0; p < points; ++p) weights[p] *= inverse;
  }
}

// POINTS: the number of kernel points, or 0 where it is known at run time only.
template <int POINTS>
void locate_row(const Dcnv3Problem& q, const void* offset, const void* mask, const Grid& grid,
                int64_t n, int64_t y, int64_t g, const Row& row) {
  const int64_t points = POINTS ? POINTS : q.points, count = q.out_width * points;
  for (int64_t x = 0; x < q.out_width; ++x) {
    const int64_t start = (((n * q.out_height + y) * q.out_width + x) * q.groups + g) * points;
    const int64_t ahead = start + AHEAD * q.groups * points;
    fetch(offset, q.offset_dtype, ahead * 2, points * 2);
    fetch(mask, q.mask_dtype, ahead, points);
    load(row.offset + x * points * 2, offset, q.offset_dtype, start * 2, points * 2);
    load(row.mask + x * points, mask, q.mask_dtype, start, points);
  }
  if (q.softmax) normalise(row.mask, q.out_width, points);
  // A sample lies in the cell [floor(X), floor(X)+1] x [floor(Y), floor(Y)+1], also where X or Y is
  // an integer. It counts if -1 <= X < W and -1 <= Y < H; all else, NaN included, adds nothing. At
  // X = -1 its weight is 0, but the right-sided derivative is not.
  const float line = (float)(y * q.stride_h + q.origin_h);
  const float height = (float)q.height, width = (float)q.width, scale = q.offset_scale;
  const int32_t pitch = (int32_t)q.width + 2;
  const Lanes even = every_second(0), odd = every_second(1);
  const Vec zero = Vec{};
  for (int64_t k = 0; k < count; k += LANES) {  // the arrays reach LANES past the last sample
    const Vec first = at(row.offset + 2 * k), second = at(row.offset + 2 * k + LANES);
    const Vec x = at(grid.x + k) + scale * shuffled(first, second, even);
    const Vec y = (line + at(grid.y + k)) + scale * shuffled(first, second, odd);
    const Lanes counts = (Lanes)(x >= -1.0f) & (Lanes)(x < width) & (Lanes)(y >= -1.0f) &
                         (Lanes)(y < height);
    // Chosen before the conversion: a far-away coordinate does not fit an integer.
    const Vec near_x = counts ? x : zero, near_y = counts ? y : zero;
    const Lanes x0 = floored(near_x), y0 = floored(near_y);
    const Vec right = near_x - __builtin_convertvector(x0, Vec);
    const Vec down = near_y - __builtin_convertvector(y0, Vec);
    const Vec weight = counts ? at(row.mask + k) : zero;
    const Vec lower = weight * down, upper = weight - lower;
    const Vec w11 = lower * right, w01 = upper * right;
    const Lanes cell = (y0 + 1) * pitch + x0 + 1;
    memcpy(row.cell + k, &cell, sizeof(cell));
    memcpy(row.inside + k, &counts, sizeof(counts));
    put(row.right + k, right);
    put(row.down + k, down);
    put(row.w00 + k, upper - w01);
    put(row.w01 + k, w01);
    put(row.w10 + k, lower - w11);
    put(row.w11 + k, w11);
  }
}

// ---- channels ----

template <int V, int POINTS>
GW_INLINE void gather(const float* image, int64_t line_floats, int64_t padded, int64_t points,
                      const Row& row, int64_t first, float* out) {
  // V is at most 2, so that 4 * V sums stay in registers: one chain of additions per corner.
  Vec sum[4][V];
  for (int c = 0; c < 4; ++c)
    for (int v = 0; v < V; ++v) sum[c][v] = Vec{};
  const int64_t end = first + (POINTS ? POINTS : points);
  for (int64_t k = first; k < end; ++k) {
    const float* top = image + (int64_t)row.cell[k] * padded;
    const float* bottom = top + line_floats;
    for (int v = 0; v < V; ++v) {
      sum[0][v] += row.w00[k] * at(top + v * LANES);
      sum[1][v] += row.w01[k] * at(top + padded + v * LANES);
      sum[2][v] += row.w10[k] * at(bottom + v * LANES);
      sum[3][v] += row.w11[k] * at(bottom + padded + v * LANES);
    }
  }
  for (int v = 0; v < V; ++v)
    put(out + v * LANES, (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]));
}

// Adds V vectors of channels to the gradient of the image. What each sample's weight, x and y gain
// is left in `partial`, a vector per sample and kind, still to be summed over its lanes.
template <int V, int POINTS>
GW_INLINE void scatter(const float* image, float* grad_image, int64_t line_floats, int64_t padded,
                       int64_t points, const Row& row, int64_t first, const float* grad_out,
                       bool is_first_chunk, float* partial) {
  Vec grad[V];
  for (int v = 0; v < V; ++v) grad[v] = at(grad_out + v * LANES);
  const int64_t number = POINTS ? POINTS : points;
  for (int64_t p = 0; p < number; ++p) {
    const int64_t k = first + p;
    const float right = row.right[k], down = row.down[k], left = 1.0f - right;
    const int64_t corner = (int64_t)row.cell[k] * padded;
    const float *top = image + corner, *bottom = top + line_floats;
    float *grad_top = grad_image + corner, *grad_bottom = grad_top + line_floats;
    Vec along_weight = Vec{}, along_x = Vec{}, along_y = Vec{};
    for (int v = 0; v < V; ++v) {
      const int64_t c = v * LANES;
      const Vec v00 = at(top + c), v01 = at(top + padded + c);
      const Vec v10 = at(bottom + c), v11 = at(bottom + padded + c);
      const Vec fall_left = v10 - v00, fall_right = v11 - v01;
      const Vec first_column = v00 + down * fall_left, second_column = v01 + down * fall_right;
      const Vec slope_x = second_column - first_column;
      along_weight += grad[v] * (first_column + right * slope_x);
      along_x += grad[v] * slope_x;
      along_y += grad[v] * (left * fall_left + right * fall_right);
      *(Vec*)(grad_top + c) += row.w00[k] * grad[v];
      *(Vec*)(grad_top + padded + c) += row.w01[k] * grad[v];
      *(Vec*)(grad_bottom + c) += row.w10[k] * grad[v];
      *(Vec*)(grad_bottom + padded + c) += row.w11[k] * grad[v];
    }
    float* of_weight = partial + p * LANES;
    float *of_x = of_weight + number * LANES, *of_y = of_x + number * LANES;
    put(of_weight, is_first_chunk ? along_weight : along_weight + at(of_weight));
    put(of_x, is_first_chunk ? along_x : along_x + at(of_x));
    put(of_y, is_first_chunk ? along_y : along_y + at(of_y));
  }
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

template <int HALF>
GW_INLINE void fold_all(Vec* rows) {
  for (int i = 0; i < HALF; ++i) rows[i] = fold<HALF>(rows[i], rows[i + HALF]);
  if constexpr (HALF > 1) fold_all<HALF / 2>(rows);
}

// The sum over its lanes of each of LANES vectors, as one vector.
GW_INLINE Vec lane_sums(const float* vectors) {
  Vec rows[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = at(vectors + i * LANES);
  fold_all<LANES / 2>(rows);
  return rows[0];
}

// ---- tasks ----

struct Buffers {
  float *image, *grad_image, *pixel, *partial, *sums;
  Grid grid;
  Row row;
};

GW_INLINE int64_t padded_sums(const Dcnv3Problem& q) {
  return (3 * q.points + LANES - 1) / LANES * LANES;
}

bool prepare(const Dcnv3Problem& q, bool backward, Buffers& b) {
  const size_t image = image_floats(q), padded = vectors(q.depth) * LANES;
  // Vectors are read and written up to one past the last sample.
  const size_t count = (size_t)q.out_width * q.points + LANES, sums = padded_sums(q);
  const size_t total = image * (backward ? 2 : 1) + padded + sums * (LANES + 1) + 16 * count;
  float* memory = allocate(total);
  b.image = memory;
  if (!memory) return false;
  float* next = memory;
  const auto take = [&](size_t n) { float* taken = next; next += n; return taken; };
  take(image);
  b.grad_image = backward ? take(image) : NULL;
  b.pixel = take(padded);
  b.partial = take(sums * LANES);
  b.sums = take(sums);
  b.row.offset = take(2 * count);
  b.row.cell = (int32_t*)take(count);
  b.row.inside = (int32_t*)take(count);
  for (float** array : {&b.grid.x, &b.grid.y, &b.row.mask, &b.row.right, &b.row.down, &b.row.w00,
                        &b.row.w01, &b.row.w10, &b.row.w11, &b.row.grad_weight, &b.row.grad_x,
                        &b.row.grad_y})
    *array = take(count);
  memset(b.partial, 0, (next - b.partial) * sizeof(float));
  for (int64_t x = 0; x < q.out_width; ++x)
    for (int64_t p = 0; p < q.points; ++p) {
      b.grid.x[x * q.points + p] = (float)(x * q.stride_w + q.origin_w) + q.grid_xy[2 * p];
      b.grid.y[x * q.points + p] = q.grid_xy[2 * p + 1];
    }
  return true;
}

template <int POINTS>
void forward_rows(const Dcnv3Problem& q, const void* offset, const void* mask, void* output,
                  int64_t n, int64_t g, int64_t y_begin, int64_t y_end, const Buffers& b) {
  const int64_t count = vectors(q.depth), padded = count * LANES, line = (q.width + 2) * padded;
  const bool direct = q.value_dtype == FLOAT32 && padded == q.depth;
  for (int64_t y = y_begin; y < y_end; ++y) {
    locate_row<POINTS>(q, offset, mask, b.grid, n, y, g, b.row);
    for (int64_t x = 0; x < q.out_width; ++x) {
      const int64_t first = x * q.points;
      const int64_t start = (((n * q.out_height + y) * q.out_width + x) * q.groups + g) * q.depth;
      float* out = direct ? (float*)output + start : b.pixel;
      int64_t v = 0;
      for (; v + 2 <= count; v += 2)
        gather<2, POINTS>(b.image + v * LANES, line, padded, q.points, b.row, first, out + v * LANES);
      if (v < count)
        gather<1, POINTS>(b.image + v * LANES, line, padded, q.points, b.row, first, out + v * LANES);
      if (!direct) store(output, q.value_dtype, start, b.pixel, q.depth);
    }
  }
}

template <int POINTS>
void backward_task(const Dcnv3Problem& q, const void* grad_output, const void* value,
                   const void* offset, const void* mask, void* grad_value, void* grad_offset,
                   void* grad_mask, int64_t n, int64_t g, const Buffers& b) {
  const int64_t count = vectors(q.depth), padded = count * LANES, line = (q.width + 2) * padded;
  const int64_t points = POINTS ? POINTS : q.points, samples = q.out_width * points;
  const bool direct = q.value_dtype == FLOAT32 && padded == q.depth;
  copy_in(q, value, n, g, b.image);
  memset(b.grad_image, 0, image_floats(q) * sizeof(float));
  for (int64_t d = q.depth; d < padded; ++d) b.pixel[d] = 0.0f;
  for (int64_t y = 0; y < q.out_height; ++y) {
    locate_row<POINTS>(q, offset, mask, b.grid, n, y, g, b.row);
    const int64_t first_pixel = (n * q.out_height + y) * q.out_width;
    for (int64_t x = 0; x < q.out_width; ++x) {
      const int64_t start = ((first_pixel + x) * q.groups + g) * q.depth, first = x * points;
      const float* grad = direct ? (const float*)grad_output + start : b.pixel;
      fetch(grad_output, q.value_dtype, start + AHEAD * q.groups * q.depth, q.depth);
      if (!direct) load(b.pixel, grad_output, q.value_dtype, start, q.depth);
      int64_t v = 0;
      for (; v + 2 <= count; v += 2)
        scatter<2, POINTS>(b.image + v * LANES, b.grad_image + v * LANES, line, padded, points,
                           b.row, first, grad + v * LANES, v == 0, b.partial);
      if (v < count)
        scatter<1, POINTS>(b.image + v * LANES, b.grad_image + v * LANES, line, padded, points,
                           b.row, first, grad + v * LANES, v == 0, b.partial);
      for (int64_t i = 0; i < padded_sums(q); i += LANES)
        put(b.sums + i, lane_sums(b.partial + i * LANES));
      copy(b.row.grad_weight + first, b.sums, points);
      copy(b.row.grad_x + first, b.sums + points, points);
      copy(b.row.grad_y + first, b.sums + 2 * points, points);
    }
    float* grad_xy = b.row.offset;  // not needed any more in this row
    Lanes first_pairs, second_pairs;
    for (int l = 0; l < LANES; ++l) {
      first_pairs[l] = l / 2 + l % 2 * LANES;
      second_pairs[l] = first_pairs[l] + LANES / 2;
    }
    const Vec zero = Vec{};
    for (int64_t k = 0; k < samples; k += LANES) {
      Lanes counts;
      memcpy(&counts, b.row.inside + k, sizeof(counts));
      const Vec factor = q.offset_scale * at(b.row.mask + k);
      const Vec x = counts ? factor * at(b.row.grad_x + k) : zero;
      const Vec y = counts ? factor * at(b.row.grad_y + k) : zero;
      put(grad_xy + 2 * k, shuffled(x, y, first_pairs));
      put(grad_xy + 2 * k + LANES, shuffled(x, y, second_pairs));
      put(b.row.grad_weight + k, counts ? at(b.row.grad_weight + k) : zero);
    }
    if (q.softmax)
      for (int64_t x = 0; x < q.out_width; ++x) {
        const float* weights = b.row.mask + x * points;
        float* grads = b.row.grad_weight + x * points;
        float mean = 0.0f;
        for (int64_t p = 0; p < points; ++p) mean += weights[p] * grads[p];
        for (int64_t p = 0; p < points; ++p) grads[p] = weights[p] * (grads[p] - mean);
      }
    for (int64_t x = 0; x < q.out_width; ++x) {
      const int64_t start = ((first_pixel + x) * q.groups + g) * points;
      store(grad_offset, q.offset_dtype, start * 2, grad_xy + x * points * 2, points * 2);
      store(grad_mask, q.mask_dtype, start, b.row.grad_weight + x * points, points);
    }
  }
  copy_out(q, b.grad_image, n, g, grad_value);
}

}  // namespace

// Both return 0, or 1 when memory ran out (the outputs are then incomplete).

extern "C" int32_t dcnv3_forward(const Dcnv3Problem* problem, const void* value, const void* offset,
                                 const void* mask, void* output) {
  const Dcnv3Problem& q = *problem;
  const int64_t groups = q.batch * q.groups;
  // Few groups and many threads: the rows of a group are divided, and its image copied by each part.
  const int64_t wanted = (q.threads + groups - 1) / groups;
  const int64_t parts = wanted < q.out_height ? wanted : q.out_height;
  int32_t failed = 0;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Buffers b;
    const bool ready = prepare(q, false, b);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups * parts; ++task) {
      if (!ready) continue;
      const int64_t group = task / parts, part = task % parts;
      const int64_t n = group / q.groups, g = group % q.groups;
      copy_in(q, value, n, g, b.image);
      const auto rows = q.points == 9 ? forward_rows<9> : forward_rows<0>;
      rows(q, offset, mask, output, n, g, part * q.out_height / parts,
           (part + 1) * q.out_height / parts, b);
    }
    free(b.image);
  }
  return failed;
}

extern "C" int32_t dcnv3_backward(const Dcnv3Problem* problem, const void* grad_output,
                                  const void* value, const void* offset, const void* mask,
                                  void* grad_value, void* grad_offset, void* grad_mask) {
  const Dcnv3Problem& q = *problem;
  int32_t failed = 0;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Buffers b;
    const bool ready = prepare(q, true, b);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < q.batch * q.groups; ++task)
      if (ready) {
        const auto run = q.points == 9 ? backward_task<9> : backward_task<0>;
        run(q, grad_output, value, offset, mask, grad_value, grad_offset, grad_mask,
            task / q.groups, task % q.groups, b);
      }
    free(b.image);
  }
  return failed;
}

// The size of the problem's structure, so that a mismatch with its Python twin is found at loading.
extern "C" int64_t dcnv3_problem_bytes(void) { return (int64_t)sizeof(Dcnv3Problem); }
