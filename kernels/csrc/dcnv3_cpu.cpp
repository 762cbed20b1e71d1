// DCNv3 for CPUs: forward and backward, float32 and bfloat16 storage, float32 arithmetic.
//
// One task is one group of one image. It copies its channels into a private float32 image with a
// border of zeros, padded to whole vectors: no corner needs a bounds check, no channel count a tail,
// and the backward pass owns what it adds to, so it needs no atomics and its sums have one order
// whatever the number of threads. Where threads outnumber the groups of all images, the forward pass
// divides their rows, and the threads share the images: memory is never more than one padded copy
// of the value. Coordinates are computed for a row of outputs at a time, over all
// points at once; the corners are then read as vectors over the channels.
//
// Built for one instruction set at a time (see groundwork/kernels/host_compiler.py). C interface,
// no headers but the compiler's own.
#include <stdlib.h>

#include <initializer_list>

#include "vectors.h"

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

// ---- scratch of one thread ----

// A line of zeros above and two below: a sample that does not count lies between the latter.
GW_INLINE size_t image_floats(const Dcnv3Problem& q) {
  return (size_t)(q.height + 3) * (q.width + 2) * vectors(q.depth) * LANES;
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
  float* grad_mask;
  float* grad;                          // of the outputs, in whole vectors, and one of zeros
  int32_t* pixel;                       // where in `grad` a sample's output begins
  float* dots;                          // of that with the corners 00, 01, 10, 11
};

// Where the samples of a row lie without offsets: x in the image, y from the row's own line.
struct Grid {
  float *x, *y;
};

// Pixels ahead of the one being read: a group's values are a stride of all channels apart, which
// the processor does not foresee.
#define AHEAD 8

template <bool WRITE = false>
GW_INLINE void fetch(const void* base, int dtype, int64_t start, int64_t count) {
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  const char* first = (const char*)base + start * bytes;
  for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(first + i, WRITE);
}

// ---- one group of one image as float32 with a border ----

// Lines y_begin to y_end of the image; the borders above and below come with the first and the last.
void copy_in(const Dcnv3Problem& q, const void* value, int64_t n, int64_t g, int64_t y_begin,
             int64_t y_end, float* image) {
  const int64_t padded = vectors(q.depth) * LANES, stride = (q.width + 2) * padded;
  const int64_t channels = q.groups * q.depth;
  if (y_begin == 0) memset(image, 0, stride * sizeof(float));
  if (y_end == q.height)
    memset(image + (q.height + 1) * stride, 0, 2 * stride * sizeof(float));
  for (int64_t y = y_begin; y < y_end; ++y) {
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
    for (int64_t x = 0; x < q.width; ++x) {
      const int64_t start = ((n * q.height + y) * q.width + x) * channels + g * q.depth;
      fetch<true>(value, q.value_dtype, start + AHEAD * channels, q.depth);
      store(value, q.value_dtype, start, image + (y + 1) * stride + (x + 1) * padded, q.depth);
    }
}

// ---- the samples of a row ----

template <int POINTS>
void normalise(float* mask, int64_t rows, int64_t number) {
  const int64_t points = POINTS ? POINTS : number;
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
  if (q.softmax) normalise<POINTS>(row.mask, q.out_width, points);
  // A sample lies in the cell [floor(X), floor(X)+1] x [floor(Y), floor(Y)+1], also where X or Y is
  // an integer. It counts if -1 <= X < W and -1 <= Y < H; all else, NaN included, adds nothing. At
  // X = -1 its weight is 0, but the right-sided derivative is not.
  const float line = (float)(y * q.stride_h + q.origin_h);
  const float height = (float)q.height, width = (float)q.width, scale = q.offset_scale;
  const int32_t pitch = (int32_t)q.width + 2;
  const int32_t nowhere = (int32_t)(q.height + 1) * pitch;
  const Vec zero = Vec{};
  for (int64_t k = 0; k < count; k += LANES) {  // the arrays reach LANES past the last sample
    const Vec first = at(row.offset + 2 * k), second = at(row.offset + 2 * k + LANES);
    const Vec x = at(grid.x + k) + scale * every_second(first, second, 0);
    const Vec y = (line + at(grid.y + k)) + scale * every_second(first, second, 1);
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
    const Lanes cell = counts ? (y0 + 1) * pitch + x0 + 1 : nowhere + Lanes{};
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

// Samples whose four dot products fill a vector.
#define TOGETHER (LANES / 4)

// Adds the output's gradient at TOGETHER samples to the image's. Returns its dot products with the
// corners 00, 01, 10, 11 of the first sample, then of the next. V: vectors of channels, or 0 where
// their number is known at run time only.
template <int V>
GW_INLINE Vec scatter(const float* image, float* grad_image, int64_t line_floats, int64_t number,
                      const Row& row, int64_t first) {
  const int64_t padded = (V ? V : number) * LANES;
  Vec dots[LANES];
  for (int s = 0; s < TOGETHER; ++s) {
    const int64_t k = first + s, corner = row.cell[k] * padded;
    const float w00 = row.w00[k], w01 = row.w01[k], w10 = row.w10[k], w11 = row.w11[k];
    const float *grad_out = row.grad + row.pixel[k];
    const float *top = image + corner, *bottom = top + line_floats;
    float *grad_top = grad_image + corner, *grad_bottom = grad_top + line_floats;
    Vec d00 = Vec{}, d01 = Vec{}, d10 = Vec{}, d11 = Vec{};
    for (int64_t c = 0; c < padded; c += LANES) {
      const Vec grad = at(grad_out + c);
      d00 += grad * at(top + c);
      d01 += grad * at(top + padded + c);
      d10 += grad * at(bottom + c);
      d11 += grad * at(bottom + padded + c);
      *(Vec*)(grad_top + c) += w00 * grad;
      *(Vec*)(grad_top + padded + c) += w01 * grad;
      *(Vec*)(grad_bottom + c) += w10 * grad;
      *(Vec*)(grad_bottom + padded + c) += w11 * grad;
    }
    dots[4 * s] = d00, dots[4 * s + 1] = d01, dots[4 * s + 2] = d10, dots[4 * s + 3] = d11;
  }
  return lane_sums(dots);
}

template <int V>
void scatter_row(const float* image, float* grad_image, int64_t line_floats, int64_t number,
                 const Row& row, int64_t samples) {
  for (int64_t k = 0; k < samples; k += TOGETHER)
    put(row.dots + 4 * k, scatter<V>(image, grad_image, line_floats, number, row, k));
}

// ---- tasks ----

struct Buffers {
  float *memory, *image, *grad_image, *pixel;
  Grid grid;
  Row row;
};

// images: of the thread's own, 2 for the backward pass; 0 where threads share them.
bool prepare(const Dcnv3Problem& q, int images, Buffers& b) {
  const bool backward = images == 2;
  const size_t image = image_floats(q), padded = vectors(q.depth) * LANES;
  // Vectors are read and written up to one past the last sample.
  const size_t count = (size_t)q.out_width * q.points + LANES;
  const size_t grads = backward ? (q.out_width + 1) * padded + 6 * count : 0;
  const size_t total = image * images + padded + 13 * count + grads;
  float* memory = allocate(total);
  b.memory = memory;
  if (!memory) return false;
  float* next = memory;
  const auto take = [&](size_t n) { float* taken = next; next += n; return taken; };
  b.image = images ? take(image) : NULL;
  b.grad_image = backward ? take(image) : NULL;
  b.pixel = take(padded);
  b.row.offset = take(2 * count);
  b.row.cell = (int32_t*)take(count);
  b.row.inside = (int32_t*)take(count);
  for (float** array : {&b.grid.x, &b.grid.y, &b.row.mask, &b.row.right, &b.row.down, &b.row.w00,
                        &b.row.w01, &b.row.w10, &b.row.w11})
    *array = take(count);
  if (backward) {
    b.row.grad = take((q.out_width + 1) * padded);
    b.row.grad_mask = take(count);
    b.row.pixel = (int32_t*)take(count);
    b.row.dots = take(4 * count);
  }
  memset(b.pixel, 0, (next - b.pixel) * sizeof(float));
  for (int64_t x = 0; x < q.out_width; ++x)
    for (int64_t p = 0; p < q.points; ++p) {
      b.grid.x[x * q.points + p] = (float)(x * q.stride_w + q.origin_w) + q.grid_xy[2 * p];
      b.grid.y[x * q.points + p] = q.grid_xy[2 * p + 1];
    }
  if (backward)
    for (size_t k = 0; k < count; ++k) {
      const int64_t x = k / q.points;  // past the last sample: the zeros behind the last output
      b.row.pixel[k] = (int32_t)((x < q.out_width ? x : q.out_width) * padded);
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

// From the samples' dot products to the gradients of mask, and of offset in the place of offset.
template <int POINTS>
void finish_row(const Dcnv3Problem& q, const Row& row) {
  const int64_t points = POINTS ? POINTS : q.points;
  const Vec zero = Vec{};
  for (int64_t k = 0; k < q.out_width * points; k += LANES) {
    const float* dots = row.dots + 4 * k;
    const Vec a = at(dots), b = at(dots + LANES);
    const Vec c = at(dots + 2 * LANES), d = at(dots + 3 * LANES);
    const Vec firsts = every_second(a, b, 0), seconds = every_second(a, b, 1);
    const Vec more_firsts = every_second(c, d, 0), more_seconds = every_second(c, d, 1);
    const Vec d00 = every_second(firsts, more_firsts, 0);
    const Vec d10 = every_second(firsts, more_firsts, 1);
    const Vec d01 = every_second(seconds, more_seconds, 0);
    const Vec d11 = every_second(seconds, more_seconds, 1);
    Lanes counts;
    memcpy(&counts, row.inside + k, sizeof(counts));
    const Vec right = at(row.right + k), down = at(row.down + k);
    const Vec fall_left = d10 - d00, fall_right = d11 - d01;
    const Vec first_column = d00 + down * fall_left, second_column = d01 + down * fall_right;
    const Vec slope_x = second_column - first_column;
    const Vec slope_y = fall_left + right * (fall_right - fall_left);
    const Vec factor = q.offset_scale * at(row.mask + k);
    const Vec x = counts ? factor * slope_x : zero, y = counts ? factor * slope_y : zero;
    put(row.offset + 2 * k, interleaved(x, y, 0));
    put(row.offset + 2 * k + LANES, interleaved(x, y, LANES / 2));
    put(row.grad_mask + k, counts ? first_column + right * slope_x : zero);
  }
  if (!q.softmax) return;
  for (int64_t x = 0; x < q.out_width; ++x) {
    const float* weights = row.mask + x * points;
    float* grads = row.grad_mask + x * points;
    float mean = 0.0f;
    for (int64_t p = 0; p < points; ++p) mean += weights[p] * grads[p];
    for (int64_t p = 0; p < points; ++p) grads[p] = weights[p] * (grads[p] - mean);
  }
}

template <int POINTS>
void backward_task(const Dcnv3Problem& q, const void* grad_output, const void* value,
                   const void* offset, const void* mask, void* grad_value, void* grad_offset,
                   void* grad_mask, int64_t n, int64_t g, const Buffers& b) {
  const int64_t count = vectors(q.depth), padded = count * LANES, line = (q.width + 2) * padded;
  const int64_t points = POINTS ? POINTS : q.points, samples = q.out_width * points;
  copy_in(q, value, n, g, 0, q.height, b.image);
  memset(b.grad_image, 0, image_floats(q) * sizeof(float));
  for (int64_t y = 0; y < q.out_height; ++y) {
    const int64_t first_pixel = (n * q.out_height + y) * q.out_width;
    for (int64_t x = 0; x < q.out_width; ++x) {
      const int64_t start = ((first_pixel + x) * q.groups + g) * q.depth;
      fetch(grad_output, q.value_dtype, start + AHEAD * q.groups * q.depth, q.depth);
      load(b.row.grad + x * padded, grad_output, q.value_dtype, start, q.depth);
      // What is written at the row's end is fetched while its samples are computed.
      const int64_t sample = ((first_pixel + x) * q.groups + g) * points;
      fetch<true>(grad_offset, q.offset_dtype, sample * 2, points * 2);
      fetch<true>(grad_mask, q.mask_dtype, sample, points);
    }
    locate_row<POINTS>(q, offset, mask, b.grid, n, y, g, b.row);
    const auto scatter = count == 1 ? scatter_row<1> : count == 2 ? scatter_row<2> : scatter_row<0>;
    scatter(b.image, b.grad_image, line, count, b.row, samples);
    finish_row<POINTS>(q, b.row);
    for (int64_t x = 0; x < q.out_width; ++x) {
      const int64_t start = ((first_pixel + x) * q.groups + g) * points;
      store(grad_offset, q.offset_dtype, start * 2, b.row.offset + x * points * 2, points * 2);
      store(grad_mask, q.mask_dtype, start, b.row.grad_mask + x * points, points);
    }
  }
  copy_out(q, b.grad_image, n, g, grad_value);
}

// Nothing to compute, and nothing to divide among threads.
bool is_empty(const Dcnv3Problem& q) {
  return q.batch < 1 || q.groups < 1 || q.depth < 1 || q.out_height < 1 || q.out_width < 1;
}

// A thread without a group would only hold memory.
[[maybe_unused]] int threads_for(const Dcnv3Problem& q, int64_t tasks) {
  const int64_t threads = q.threads < tasks ? q.threads : tasks;
  return threads < 1 ? 1 : (int)threads;
}

// Of many groups: each by one thread, which copies its image.
int32_t forward_by_groups(const Dcnv3Problem& q, const void* value, const void* offset,
                          const void* mask, void* output) {
  const int64_t groups = q.batch * q.groups;
  int32_t failed = 0;
#pragma omp parallel num_threads(threads_for(q, groups)) reduction(| : failed)
  {
    Buffers b;
    const bool ready = prepare(q, 1, b);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups; ++task) {
      if (!ready) continue;
      const int64_t n = task / q.groups, g = task % q.groups;
      copy_in(q, value, n, g, 0, q.height, b.image);
      const auto rows = q.points == 9 ? forward_rows<9> : forward_rows<0>;
      rows(q, offset, mask, output, n, g, 0, q.out_height, b);
    }
    free(b.memory);
  }
  return failed;
}

// Of fewer groups than threads: all images are copied, then their rows are divided.
int32_t forward_by_rows(const Dcnv3Problem& q, const void* value, const void* offset,
                        const void* mask, void* output) {
  const int64_t groups = q.batch * q.groups, image = image_floats(q);
  // Parts are smaller than a thread's share, so that none waits long for the last.
  const int64_t wanted = 4 * ((q.threads + groups - 1) / groups);
  const int64_t copies = wanted < q.height ? wanted : q.height;
  const int64_t parts = wanted < q.out_height ? wanted : q.out_height;
  float* images = allocate(groups * image);
  if (!images) return 1;
  int32_t failed = 0;
#pragma omp parallel num_threads(threads_for(q, groups * parts)) reduction(| : failed)
  {
    Buffers b;
    const bool ready = prepare(q, 0, b);
    failed |= !ready;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < groups * copies; ++task) {
      const int64_t group = task / copies, part = task % copies;
      copy_in(q, value, group / q.groups, group % q.groups, part * q.height / copies,
              (part + 1) * q.height / copies, images + group * image);
    }
    // Here all threads have waited for all images.
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups * parts; ++task) {
      if (!ready) continue;
      const int64_t group = task / parts, part = task % parts;
      b.image = images + group * image;
      const auto rows = q.points == 9 ? forward_rows<9> : forward_rows<0>;
      rows(q, offset, mask, output, group / q.groups, group % q.groups,
           part * q.out_height / parts, (part + 1) * q.out_height / parts, b);
    }
    free(b.memory);
  }
  free(images);
  return failed;
}

}  // namespace

// Both return 0, or 1 when memory ran out (the outputs are then incomplete).

extern "C" int32_t dcnv3_forward(const Dcnv3Problem* problem, const void* value, const void* offset,
                                 const void* mask, void* output) {
  const Dcnv3Problem& q = *problem;
  if (is_empty(q)) return 0;
  const auto run = q.batch * q.groups < q.threads ? forward_by_rows : forward_by_groups;
  return run(q, value, offset, mask, output);
}

// What is empty has no gradient but zeros, which are the caller's to write.
extern "C" int32_t dcnv3_backward(const Dcnv3Problem* problem, const void* grad_output,
                                  const void* value, const void* offset, const void* mask,
                                  void* grad_value, void* grad_offset, void* grad_mask) {
  const Dcnv3Problem& q = *problem;
  if (is_empty(q)) return 0;
  int32_t failed = 0;
#pragma omp parallel num_threads(threads_for(q, q.batch * q.groups)) reduction(| : failed)
  {
    Buffers b;
    const bool ready = prepare(q, 2, b);
    failed |= !ready;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < q.batch * q.groups; ++task)
      if (ready) {
        const auto run = q.points == 9 ? backward_task<9> : backward_task<0>;
        run(q, grad_output, value, offset, mask, grad_value, grad_offset, grad_mask,
            task / q.groups, task % q.groups, b);
      }
    free(b.memory);
  }
  return failed;
}

// The size of the problem's structure, so that a mismatch with its Python twin is found at loading.
extern "C" int64_t dcnv3_problem_bytes(void) { return (int64_t)sizeof(Dcnv3Problem); }
