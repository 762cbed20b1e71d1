// x + keep * gamma * LN(y) in one pass over memory, for CPUs: forward and backward, float32 and
// bfloat16 storage, float32 arithmetic.
//
// Up to LANES rows are normalised at a time, so that the sums over their channels are one shuffle of
// vectors; fewer where they would leave the first cache. Statistics are computed again in the backward pass. What a part of the rows adds to the
// gradients of the parameters is summed in the order of the parts, which are cut by the shape alone.
#include "vectors.h"
#include "layer_norm.h"

extern "C" struct ResidualNormProblem {
  int64_t rows, channels, rows_per_sample;
  float eps;
  int32_t x, y, out;  // dtypes; parameters and their gradients are float32
  int32_t threads;
};

typedef ResidualNormProblem Problem;

namespace {

struct Scratch {
  float* memory;
  float *first, *second, *third;  // LANES rows each
};

bool make_scratch(const Channels& c, Scratch& to) {
  to.memory = allocate(3 * LANES * c.padded);
  to.first = to.memory;
  to.second = to.first + LANES * c.padded;
  to.third = to.second + LANES * c.padded;
  return to.memory != NULL;
}

// `count` rows of a tensor as whole vectors: where they are, or copied.
GW_INLINE void find(const void* base, int dtype, int64_t row, int count, const Channels& c,
                    float* scratch, const float** rows) {
  const bool direct = is_direct(c, dtype);
  for (int p = 0; p < count; ++p) {
    rows[p] = direct ? (const float*)base + (row + p) * c.count : scratch + p * c.padded;
    if (!direct) load_row(scratch + p * c.padded, base, dtype, row + p, c);
  }
}

// Where to write a row: in place, or to a scratch that `finish` stores.
GW_INLINE float* begin(void* base, int dtype, int64_t row, const Channels& c, float* scratch) {
  return is_direct(c, dtype) ? (float*)base + row * c.count : scratch;
}

GW_INLINE void finish(void* base, int dtype, int64_t row, const Channels& c, const float* from) {
  if (!is_direct(c, dtype)) store(base, dtype, row * c.count, from, c.count);
}

// Parameters times gamma, in whole vectors.
struct Parameters {
  float *scale, *shift;
};

bool make_parameters(const Channels& c, const float* scale, const float* shift, const float* gamma,
                     Parameters& to) {
  to.scale = allocate(2 * c.padded);
  if (!to.scale) return false;
  to.shift = to.scale + c.padded;
  memset(to.scale, 0, 2 * c.padded * sizeof(float));
  for (int64_t i = 0; i < c.count; ++i) {
    to.scale[i] = scale[i] * gamma[i];
    to.shift[i] = shift[i] * gamma[i];
  }
  return true;
}

void forward_block(const Problem& q, const Channels& c, const Parameters& w, const void* x,
                   const void* y, const float* keep, void* out, int64_t row, int count,
                   const Scratch& s) {
  const float *from[LANES], *to_add[LANES];
  find(y, q.y, row, count, c, s.first, from);
  find(x, q.x, row, count, c, s.second, to_add);
  const Moments m = moments(from, count, c, q.eps);
  for (int p = 0; p < count; ++p) {
    const Vec factor = filled(m.inverse[p]), mean = filled(m.mean[p]);
    const float kept = keep ? keep[(row + p) / q.rows_per_sample] : 1.0f;
    float* to = begin(out, q.out, row + p, c, s.third);
    for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
      const Vec normed = (at(from[p] + v) - mean) * factor;
      put(to + v, at(to_add[p] + v) + kept * (normed * at(w.scale + v) + at(w.shift + v)));
    }
    finish(out, q.out, row + p, c, to);
  }
}

// What ROWS rows from `first` on add to the sums, and to those over their own channels: of
// keep * gradient * scale, and of that times the normed row.
template <int ROWS>
GW_INLINE void add_rows(const Problem& q, const Channels& c, const Parameters& w, const Moments& m,
                        const float* const* from, const float* const* grads, const float* keep,
                        float* sums, int64_t row, int first, Vec* along_mean, Vec* along_scale) {
  Vec factor[ROWS], mean[ROWS], kept[ROWS], total[ROWS], product[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    factor[r] = filled(m.inverse[first + r]);
    mean[r] = filled(m.mean[first + r]);
    kept[r] = filled(keep ? keep[(row + first + r) / q.rows_per_sample] : 1.0f);
    total[r] = product[r] = Vec{};
  }
  for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
    const Vec scale = at(w.scale + v);
    Vec along_normed = at(sums + v), along = at(sums + c.padded + v);
    for (int r = 0; r < ROWS; ++r) {
      const Vec normed = (at(from[first + r] + v) - mean[r]) * factor[r];
      const Vec grad = kept[r] * at(grads[first + r] + v), both = grad * normed;
      along_normed += both;
      along += grad;
      total[r] += grad * scale;
      product[r] += both * scale;
    }
    put(sums + v, along_normed);
    put(sums + c.padded + v, along);
  }
  for (int r = 0; r < ROWS; ++r) {
    along_mean[first + r] = total[r];
    along_scale[first + r] = product[r];
  }
}

// The gradient of the rows `from`, given that of the output, and what they add to `sums`: of
// keep * gradient * normed row (the first), and of keep * gradient (the second).
GW_INLINE void backward_rows(const Problem& q, const Channels& c, const Parameters& w,
                             const float* const* from, const float* const* grads,
                             const float* keep, void* grad_y, float* sums, int64_t row, int count,
                             float* scratch) {
  const float share = 1.0f / (float)c.count;
  const Moments m = moments(from, count, c, q.eps);
  Vec along_mean[LANES], along_scale[LANES];
  for (int p = 0; p < LANES; ++p) along_mean[p] = along_scale[p] = Vec{};
  int done = 0;
  for (; done + 4 <= count; done += 4)
    add_rows<4>(q, c, w, m, from, grads, keep, sums, row, done, along_mean, along_scale);
  for (; done < count; ++done)
    add_rows<1>(q, c, w, m, from, grads, keep, sums, row, done, along_mean, along_scale);
  const Vec means = lane_sums(along_mean) * share, products = lane_sums(along_scale) * share;
  for (int p = 0; p < count; ++p) {
    const Vec factor = filled(m.inverse[p]), mean = filled(m.mean[p]);
    const float kept = keep ? keep[(row + p) / q.rows_per_sample] : 1.0f;
    const Vec less = filled(means[p]), product = filled(products[p]);
    float* to = begin(grad_y, q.y, row + p, c, scratch);
    for (int64_t v = 0; v < c.vectors * LANES; v += LANES) {
      const Vec normed = (at(from[p] + v) - mean) * factor;
      put(to + v, factor * (kept * at(grads[p] + v) * at(w.scale + v) - less - normed * product));
    }
    finish(grad_y, q.y, row + p, c, to);
  }
}

#define MAX_PARTS 256
#define LEAST_ROWS 64

// Rows at a time: at least four, and up to 8 KiB of a tensor.
GW_INLINE int64_t block_rows(const Channels& c) {
  const int64_t rows = 2048 / (c.count ? c.count : 1);
  return rows < 4 ? 4 : rows < LANES ? rows : LANES;
}

// Runs body(sums, first row, rows) over the parts and adds up their sums: (2, channels).
template <class Body>
int32_t backward(const Problem& q, const Channels& c, float* sums, Body body) {
  const int64_t wanted = (q.rows + LEAST_ROWS - 1) / LEAST_ROWS, floats = 2 * c.padded;
  const int64_t parts = wanted < MAX_PARTS ? wanted : MAX_PARTS, size = block_rows(c);
  float* partial = allocate((parts + 1) * floats);
  if (!partial) return 1;
  memset(partial, 0, (parts + 1) * floats * sizeof(float));
  int32_t failed = 0;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Scratch s;
    const bool ready = make_scratch(c, s);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t end = part_begin(part + 1, parts, q.rows);
      for (int64_t row = part_begin(part, parts, q.rows); ready && row < end; row += size)
        body(partial + part * floats, row, (int)(end - row < size ? end - row : size), s);
    }
    free(s.memory);
  }
  float* total = partial + parts * floats;
  add_parts(partial, parts, floats, total, q.threads);
  memcpy(sums, total, c.count * sizeof(float));
  memcpy(sums + c.count, total + c.padded, c.count * sizeof(float));
  free(partial);
  return failed;
}

template <class Body>
int32_t forward(const Problem& q, const Channels& c, Body body) {
  int32_t failed = 0;
  const int64_t size = block_rows(c), blocks = (q.rows + size - 1) / size;
#pragma omp parallel num_threads(q.threads) reduction(| : failed)
  {
    Scratch s;
    const bool ready = make_scratch(c, s);
    failed |= !ready;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * size;
      if (ready) body(row, (int)(q.rows - row < size ? q.rows - row : size), s);
    }
    free(s.memory);
  }
  return failed;
}

}  // namespace

// Both return 0, or 1 when memory ran out (the outputs are then incomplete). keep may be NULL.
// grads: of scale, shift and gamma, (3, channels).

extern "C" int32_t residual_norm_forward(const Problem* problem, const void* x, const void* y,
                                               const float* scale, const float* shift,
                                               const float* gamma, const float* keep, void* out) {
  const Problem& q = *problem;
  const Channels c = make_channels(q.channels);
  Parameters w;
  if (!make_parameters(c, scale, shift, gamma, w)) return 1;
  const int32_t failed = forward(q, c, [&](int64_t row, int count, const Scratch& s) {
    forward_block(q, c, w, x, y, keep, out, row, count, s);
  });
  free(w.scale);
  return failed;
}

extern "C" int32_t residual_norm_backward(const Problem* problem, const void* grad_out,
                                                const void* y, const float* scale,
                                                const float* shift, const float* gamma,
                                                const float* keep, void* grad_y, float* grads) {
  const Problem& q = *problem;
  const Channels c = make_channels(q.channels);
  Parameters w;
  if (!make_parameters(c, scale, shift, gamma, w)) return 1;
  const int32_t failed =
      backward(q, c, grads, [&](float* own, int64_t row, int count, const Scratch& s) {
        const float *from[LANES], *along[LANES];
        find(y, q.y, row, count, c, s.first, from);
        find(grad_out, q.out, row, count, c, s.second, along);
        backward_rows(q, c, w, from, along, keep, grad_y, own, row, count, s.third);
      });
  free(w.scale);
  for (int64_t i = 0; i < c.count; ++i) {
    grads[2 * c.count + i] = scale[i] * grads[i] + shift[i] * grads[c.count + i];
    grads[i] *= gamma[i];
    grads[c.count + i] *= gamma[i];
  }
  return failed;
}

// The size of the problem's structure, so that a mismatch with its Python twin is found at loading.
extern "C" int64_t residual_norm_problem_bytes(void) { return (int64_t)sizeof(Problem); }
