// GELU(LayerNorm(depthwise convolution)) for CPUs, NHWC: forward and backward, float32 and bfloat16
// storage, float32 arithmetic.
//
// One task is a band of rows of one image. It keeps the last k rows in a private ring, as float32
// with borders of zeros and whole vectors of channels: no tap needs a bounds check, no channel count
// a tail. The convolution of LANES pixels is normalised and activated while it is in the first cache,
// and is written nowhere. The backward pass computes it again, keeps a ring of its gradients, and
// gathers the gradient of the image from that: each is written once. What bands add to the gradients
// of the parameters is summed in the order of the bands, which are cut by the shape alone.
#include "vectors.h"
#include "layer_norm.h"

extern "C" struct DepthwiseNormGeluProblem {
  int64_t batch, height, width, channels, kernel;
  float eps;
  int32_t image, output;  // dtypes; parameters and their gradients are float32
  int32_t threads;
};

typedef DepthwiseNormGeluProblem Problem;

namespace {

// Parameters in whole vectors. weight: (k*k, padded), and the same from the last tap to the first.
struct Parameters {
  float *weight, *reversed, *bias, *scale, *shift;
};

struct Scratch {
  float* memory;
  float *rows, *grads;   // rings of k rows of width + k - 1 pixels
  float* zeros;          // a row
  float *block, *grad;   // LANES pixels
};

GW_INLINE int64_t row_floats(const Problem& q, const Channels& c) {
  return (q.width + q.kernel - 1) * c.padded;
}

float* make_parameters(const Problem& q, const Channels& c, const float* weight, const float* bias,
                       const float* scale, const float* shift, Parameters& to) {
  const int64_t taps = q.kernel * q.kernel;
  float* memory = allocate((2 * taps + 3) * c.padded);
  if (!memory) return NULL;
  memset(memory, 0, (2 * taps + 3) * c.padded * sizeof(float));
  to.weight = memory;
  to.reversed = to.weight + taps * c.padded;
  to.bias = to.reversed + taps * c.padded;
  to.scale = to.bias + c.padded;
  to.shift = to.scale + c.padded;
  for (int64_t i = 0; i < c.count; ++i) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      to.weight[tap * c.padded + i] = weight[i * taps + tap];
      to.reversed[(taps - 1 - tap) * c.padded + i] = weight[i * taps + tap];
    }
    to.bias[i] = bias[i];
    to.scale[i] = scale[i];
    to.shift[i] = shift[i];
  }
  return memory;
}

bool make_scratch(const Problem& q, const Channels& c, bool backward, Scratch& to) {
  const int64_t ring = q.kernel * row_floats(q, c);
  const int64_t floats = (backward ? 2 : 1) * ring + row_floats(q, c) + 2 * LANES * c.padded;
  to.memory = allocate(floats);
  if (!to.memory) return false;
  memset(to.memory, 0, floats * sizeof(float));  // the borders stay so
  to.rows = to.memory;
  to.grads = to.rows + (backward ? ring : 0);
  to.zeros = to.grads + ring;
  to.block = to.zeros + row_floats(q, c);
  to.grad = to.block + LANES * c.padded;
  return true;
}

// The place of row y in a ring, or the row of zeros where there is no such row.
GW_INLINE float* ring_row(const Problem& q, const Channels& c, const Scratch& s, float* ring,
                          int64_t y) {
  if (y < 0 || y >= q.height) return s.zeros;
  return ring + y % q.kernel * row_floats(q, c);
}

GW_INLINE void find_rows(const Problem& q, const Channels& c, const Scratch& s, float* ring,
                         int64_t y, const float** rows) {
  for (int64_t i = 0; i < q.kernel; ++i) rows[i] = ring_row(q, c, s, ring, y + i - q.kernel / 2);
}

void load_image_row(const Problem& q, const Channels& c, const void* image, int64_t n, int64_t y,
                    const Scratch& s) {
  if (y < 0 || y >= q.height) return;
  float* row = ring_row(q, c, s, s.rows, y) + q.kernel / 2 * c.padded;
  const int64_t first = (n * q.height + y) * q.width;
  for (int64_t x = 0; x < q.width; ++x) load_row(row + x * c.padded, image, q.image, first + x, c);
}

// out[p] = start + sum over taps of weight[i, j] * rows[i][p + j], for `n` pixels from x on.
template <int K, int PIXELS>
GW_INLINE void correlate_pixels(int64_t kernel, const Channels& c, const float* const* rows,
                                const float* weight, const float* start, int64_t x, float* out) {
  const int64_t k = K ? K : kernel;
  for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
    Vec sums[PIXELS];
    for (int p = 0; p < PIXELS; ++p) sums[p] = start ? at(start + v) : Vec{};
    for (int64_t i = 0; i < k; ++i) {
      const float* from = rows[i] + x * c.padded + v;
      for (int64_t j = 0; j < k; ++j) {
        const Vec w = at(weight + (i * k + j) * c.padded + v);
        for (int p = 0; p < PIXELS; ++p) sums[p] += at(from + (p + j) * c.padded) * w;
      }
    }
    for (int p = 0; p < PIXELS; ++p) put(out + p * c.padded + v, sums[p]);
  }
}

template <int K>
GW_INLINE void correlate(int64_t kernel, const Channels& c, const float* const* rows,
                         const float* weight, const float* start, int64_t x, int n, float* out) {
  int p = 0;
  for (; p + 4 <= n; p += 4)
    correlate_pixels<K, 4>(kernel, c, rows, weight, start, x + p, out + p * c.padded);
  for (; p < n; ++p)
    correlate_pixels<K, 1>(kernel, c, rows, weight, start, x + p, out + p * c.padded);
}

GW_INLINE Moments block_moments(const Problem& q, const Channels& c, const float* block, int n) {
  const float* rows[LANES];
  for (int p = 0; p < LANES; ++p) rows[p] = block + p * c.padded;
  return moments(rows, n, c, q.eps);
}

template <int K>
void forward_band(const Problem& q, const Channels& c, const Parameters& w, const void* image,
                  void* output, int64_t n, int64_t begin, int64_t end, const Scratch& s) {
  const float** rows = (const float**)__builtin_alloca(q.kernel * sizeof(float*));
  const int64_t half = q.kernel / 2;
  const bool direct = is_direct(c, q.output);
  for (int64_t y = begin - half; y < begin + half; ++y) load_image_row(q, c, image, n, y, s);
  for (int64_t y = begin; y < end; ++y) {
    load_image_row(q, c, image, n, y + half, s);
    find_rows(q, c, s, s.rows, y, rows);
    const int64_t first = (n * q.height + y) * q.width;
    for (int64_t x = 0; x < q.width; x += LANES) {
      const int count = q.width - x < LANES ? (int)(q.width - x) : LANES;
      correlate<K>(q.kernel, c, rows, w.weight, w.bias, x, count, s.block);
      const Moments m = block_moments(q, c, s.block, count);
      for (int p = 0; p < count; ++p) {
        float* from = s.block + p * c.padded;
        float* to = direct ? (float*)output + (first + x + p) * c.count : from;
        const Vec factor = filled(m.inverse[p]), mean = filled(m.mean[p]);
        for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
          const Vec u = (at(from + v) - mean) * factor * at(w.scale + v) + at(w.shift + v);
          put(to + v, u * normal(u).below);
        }
        if (!direct) store(output, q.output, (first + x + p) * c.count, to, c.count);
      }
    }
  }
}

// What a band adds to the gradients of the parameters: (k*k + 3, padded).
struct Sums {
  float *weight, *bias, *scale, *shift;
};

// The gradient of row y of the convolution's output, into its place in the ring. With `owned`, what
// the row adds to the gradients of bias, scale and shift.
template <int K>
GW_INLINE void grad_row(const Problem& q, const Channels& c, const Parameters& w,
                        const float* const* rows, const void* grad_output, int64_t n, int64_t y,
                        bool owned, const Sums& sums, const Scratch& s) {
  const float share = 1.0f / (float)c.count;
  const bool direct = is_direct(c, q.output);
  float* row = ring_row(q, c, s, s.grads, y) + q.kernel / 2 * c.padded;
  const int64_t first = (n * q.height + y) * q.width;
  for (int64_t x = 0; x < q.width; x += LANES) {
    const int count = q.width - x < LANES ? (int)(q.width - x) : LANES;
    correlate<K>(q.kernel, c, rows, w.weight, w.bias, x, count, s.block);
    const Moments m = block_moments(q, c, s.block, count);
    Vec along_mean[LANES], along_scale[LANES];
    for (int p = 0; p < LANES; ++p) {
      along_mean[p] = along_scale[p] = Vec{};
      if (p >= count) continue;
      const Vec factor = filled(m.inverse[p]), mean = filled(m.mean[p]);
      float* block = s.block + p * c.padded;
      float* to = row + (x + p) * c.padded;
      const float* grad = (const float*)grad_output + (first + x + p) * c.count;
      if (!direct) load_row(s.grad, grad_output, q.output, first + x + p, c);
      if (!direct) grad = s.grad;
      Vec total = Vec{}, product = Vec{};
      for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
        const Vec scale = at(w.scale + v), normed = (at(block + v) - mean) * factor;
        const Vec u = normed * scale + at(w.shift + v);
        const Normal f = normal(u);
        const Vec along = at(grad + v) * (f.below + u * f.bell * 0.39894228f);
        if (owned) {
          put(sums.shift + v, at(sums.shift + v) + along);
          put(sums.scale + v, at(sums.scale + v) + along * normed);
        }
        const Vec scaled = along * scale;
        total += scaled;
        product += scaled * normed;
        put(block + v, normed);
        put(to + v, scaled);
      }
      along_mean[p] = total;
      along_scale[p] = product;
    }
    const Vec means = lane_sums(along_mean) * share, products = lane_sums(along_scale) * share;
    for (int p = 0; p < count; ++p) {
      const Vec factor = filled(m.inverse[p]);
      const Vec mean = filled(means[p]), product = filled(products[p]);
      const float* block = s.block + p * c.padded;
      float* to = row + (x + p) * c.padded;
      for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
        const Vec along = factor * (at(to + v) - mean - at(block + v) * product);
        put(to + v, along);
        if (owned) put(sums.bias + v, at(sums.bias + v) + along);
      }
    }
  }
}

// sums[i, j] += sum over pixels of rows[i][p + j] * grads[p]; ROWS rows of taps at a time.
template <int K, int ROWS>
GW_INLINE void add_weight_grads(const Problem& q, const Channels& c, const float* const* rows,
                                const float* grads, float* sums) {
  for (int64_t v = 0; v < c.vectors * LANES; v += LANES)
    for (int i = 0; i < K; i += ROWS) {
      Vec total[ROWS * K];
      for (int t = 0; t < ROWS * K; ++t) total[t] = at(sums + (i * K + t) * c.padded + v);
      for (int64_t x = 0; x < q.width; ++x) {
        const Vec grad = at(grads + x * c.padded + v);
        for (int r = 0; r < ROWS; ++r)
          for (int j = 0; j < K; ++j)
            total[r * K + j] += at(rows[i + r] + (x + j) * c.padded + v) * grad;
      }
      for (int t = 0; t < ROWS * K; ++t) put(sums + (i * K + t) * c.padded + v, total[t]);
    }
}

void add_weight_grads_of_any_kernel(const Problem& q, const Channels& c, const float* const* rows,
                                    const float* grads, float* sums) {
  const int64_t k = q.kernel;
  for (int64_t v = 0; v < c.vectors * LANES; v += LANES)
    for (int64_t tap = 0; tap < k * k; ++tap) {
      const float* row = rows[tap / k] + tap % k * c.padded + v;
      Vec total = at(sums + tap * c.padded + v);
      for (int64_t x = 0; x < q.width; ++x)
        total += at(row + x * c.padded) * at(grads + x * c.padded + v);
      put(sums + tap * c.padded + v, total);
    }
}

template <int K>
void backward_band(const Problem& q, const Channels& c, const Parameters& w, const void* grad_output,
                   const void* image, void* grad_image, int64_t n, int64_t begin, int64_t end,
                   const Sums& sums, const Scratch& s) {
  const float** rows = (const float**)__builtin_alloca(q.kernel * sizeof(float*));
  const int64_t half = q.kernel / 2;
  const bool direct = is_direct(c, q.image);
  for (int64_t y = begin - 2 * half; y < begin; ++y) load_image_row(q, c, image, n, y, s);
  for (int64_t y = begin - half; y < end + half; ++y) {
    load_image_row(q, c, image, n, y + half, s);
    if (y >= 0 && y < q.height) {
      const bool owned = y >= begin && y < end;
      find_rows(q, c, s, s.rows, y, rows);
      grad_row<K>(q, c, w, rows, grad_output, n, y, owned, sums, s);
      const float* grads = ring_row(q, c, s, s.grads, y) + half * c.padded;
      if (owned) {
        if constexpr (K == 0) add_weight_grads_of_any_kernel(q, c, rows, grads, sums.weight);
        else add_weight_grads<K, K == 3 ? 3 : 1>(q, c, rows, grads, sums.weight);
      }
    }
    if (y - half < begin) continue;
    find_rows(q, c, s, s.grads, y - half, rows);
    const int64_t first = (n * q.height + y - half) * q.width;
    for (int64_t x = 0; x < q.width; x += LANES) {
      const int count = q.width - x < LANES ? (int)(q.width - x) : LANES;
      correlate<K>(q.kernel, c, rows, w.reversed, NULL, x, count, s.block);
      for (int p = 0; p < count; ++p) {
        const float* from = s.block + p * c.padded;
        const int64_t to = (first + x + p) * c.count;
        if (direct)
          for (int64_t v = 0; v < c.count; v += LANES) put((float*)grad_image + to + v, at(from + v));
        else
          store(grad_image, q.image, to, from, c.count);
      }
    }
  }
}

#define ENOUGH_TASKS 64
#define MAX_PARTS 256

// How many bands an image is cut into: few, as each computes k - 1 rows twice.
GW_INLINE int64_t bands(const Problem& q, int64_t least_rows) {
  const int64_t most = (q.height + least_rows - 1) / least_rows;
  const int64_t wanted = (ENOUGH_TASKS + q.batch - 1) / (q.batch ? q.batch : 1);
  return wanted < most ? wanted : most;
}

}  // namespace

// Both return 0, or 1 when memory ran out (the outputs are then incomplete).

extern "C" int32_t depthwise_norm_gelu_forward(const Problem* problem, const void* image,
                                               const float* weight, const float* bias,
                                               const float* scale, const float* shift,
                                               void* output) {
  const Problem& q = *problem;
  const Channels c = make_channels(q.channels);
  Parameters w;
  float* memory = make_parameters(q, c, weight, bias, scale, shift, w);
  if (!memory) return 1;
  const int64_t per_image = bands(q, 14), k = q.kernel;
  const auto run = k == 3 ? forward_band<3> : k == 5 ? forward_band<5> : k == 7 ? forward_band<7>
                                                                              : forward_band<0>;
  int32_t failed = 0;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Scratch s;
    const bool ready = make_scratch(q, c, false, s);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < q.batch * per_image; ++task) {
      const int64_t band = task % per_image;
      if (ready)
        run(q, c, w, image, output, task / per_image, part_begin(band, per_image, q.height),
            part_begin(band + 1, per_image, q.height), s);
    }
    free(s.memory);
  }
  free(memory);
  return failed;
}

// grads: (k*k + 3, channels) of weight (taps outermost), bias, scale, shift, in float32.
extern "C" int32_t depthwise_norm_gelu_backward(const Problem* problem, const void* grad_output,
                                                const void* image, const float* weight,
                                                const float* bias, const float* scale,
                                                const float* shift, void* grad_image,
                                                float* grads) {
  const Problem& q = *problem;
  const Channels c = make_channels(q.channels);
  Parameters w;
  float* memory = make_parameters(q, c, weight, bias, scale, shift, w);
  const int64_t k = q.kernel, per_image = bands(q, 28), tasks = q.batch * per_image;
  const int64_t parts = tasks < MAX_PARTS ? tasks : MAX_PARTS, floats = (k * k + 3) * c.padded;
  float* partial = allocate((parts + 1) * floats);
  if (!memory || !partial) {
    free(memory);
    free(partial);
    return 1;
  }
  const auto run = k == 3 ? backward_band<3> : k == 5 ? backward_band<5> : k == 7 ? backward_band<7>
                                                                                : backward_band<0>;
  int32_t failed = 0;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Scratch s;
    const bool ready = make_scratch(q, c, true, s);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) {
      if (!ready) continue;
      float* own = partial + part * floats;
      memset(own, 0, floats * sizeof(float));
      const Sums sums = {own, own + k * k * c.padded, own + (k * k + 1) * c.padded,
                         own + (k * k + 2) * c.padded};
      for (int64_t task = part_begin(part, parts, tasks); task < part_begin(part + 1, parts, tasks);
           ++task) {
        const int64_t band = task % per_image;
        run(q, c, w, grad_output, image, grad_image, task / per_image,
            part_begin(band, per_image, q.height), part_begin(band + 1, per_image, q.height), sums,
            s);
      }
    }
    free(s.memory);
  }
  if (!failed) {
    float* total = partial + parts * floats;
    memset(total, 0, floats * sizeof(float));
    add_parts(partial, parts, floats, total, q.threads);
    for (int64_t i = 0; i < k * k + 3; ++i)
      memcpy(grads + i * c.count, total + i * c.padded, c.count * sizeof(float));
  }
  free(memory);
  free(partial);
  return failed;
}

// The size of the problem's structure, so that a mismatch with its Python twin is found at loading.
extern "C" int64_t depthwise_norm_gelu_problem_bytes(void) { return (int64_t)sizeof(Problem); }
