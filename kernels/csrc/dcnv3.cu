// DCNv3 for CUDA: forward and backward, any shape; float32, float16 and bfloat16 storage, float32
// coordinates, weights and sums.
//
// A unit is one group of one output pixel. LANES neighbouring lanes of a warp share a unit: they
// divide its kernel points among themselves to compute coordinates and weights once, leave them in
// shared memory, and then each reads WIDTH channels at a time from the corners. Units that follow
// one another are the groups of a pixel, so a warp writes one contiguous piece. Each unit finds its
// own image and pixel: no launch shape depends on them, and no tail is special.
//
// The backward pass here takes any depth and any offsets, and has the fixed-point sums; where the one of
// dcnv3_tile.cu can run, that one is meant to. Settings beside those of the header:
//
//   LANES    lanes per unit: a power of two, at most 32
//   THREADS  per block: a multiple of 32
//   UNROLL   points whose corners the forward pass has in flight
//   FIXED    whether grad_value is summed in 64-bit fixed point, which no order of sums can change
#include "dcnv3.cuh"

// WIDTH neighbouring channels: one load or store of up to 16 bytes.
struct alignas(WIDTH * sizeof(Value)) Piece { Value at[WIDTH]; };

GW_INLINE void read(const Value* from, float (&to)[WIDTH]) {
  if constexpr (VALUE_T == 1 && WIDTH > 1) {  // pairs: one instruction for each of the two
    struct alignas(WIDTH * sizeof(Value)) Words { uint32_t at[WIDTH / 2]; };
    const Words words = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      to[i] = __uint_as_float(i % 2 ? words.at[i / 2] & 0xffff0000u : words.at[i / 2] << 16);
  } else {
    const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) to[i] = widen<VALUE_T>(piece.at[i]);
  }
}

// ---- the samples of a unit ----

struct Unit {
  int64_t number;
  int group;
  int64_t image;             // first pixel of the image in value
  int top, left;             // origin of the kernel, in pixels
};

GW_INLINE Unit find_unit(const Problem& q, int64_t number) {
  Unit unit;
  unit.number = number;
  unit.group = (int)(number % q.groups);
  int64_t rest = number / q.groups;
  unit.left = (int)(rest % q.out_width) * q.stride_w + q.origin_w;
  rest /= q.out_width;
  unit.top = (int)(rest % q.out_height) * q.stride_h + q.origin_h;
  unit.image = rest / q.out_height * q.height * q.width;
  return unit;
}

GW_INLINE int clamped(int x, int limit) { return x < 0 ? 0 : x >= limit ? limit - 1 : x; }

// A sum or maximum over the LANES lanes of a unit, the same in all of them.
GW_INLINE float lanes_sum(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

GW_INLINE float lanes_max(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The lanes of a unit store its POINTS samples, as store(p, cell, weight after the softmax). Every lane
// of the warp calls this.
template <class Store>
GW_INLINE void find_samples(const Problem& q, const Unit& unit, bool active, int lane,
                            const float* grid_xy, const Offset* offset, const Mask* mask,
                            Store store) {
  constexpr int OWN = (POINTS + LANES - 1) / LANES;
  float weights[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int p = lane + i * LANES;
    weights[i] = active && p < POINTS ? widen<MASK_T>(mask[unit.number * POINTS + p]) : 0.0f;
  }
  if (SOFTMAX) {
    float largest = -3.402823466e38f;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (lane + i * LANES < POINTS) largest = fmaxf(largest, weights[i]);
    largest = lanes_max(largest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (lane + i * LANES < POINTS) sum += weights[i] = expf(weights[i] - largest);
    const float inverse = 1.0f / lanes_sum(sum);
#pragma unroll
    for (int i = 0; i < OWN; ++i) weights[i] *= inverse;
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int p = lane + i * LANES;
    if (!active || p >= POINTS) continue;
    const Pair moved = *reinterpret_cast<const Pair*>(offset + (unit.number * POINTS + p) * 2);
    const float x = coordinate(unit.left, grid_xy[2 * p], q.offset_scale, widen<OFFSET_T>(moved.x));
    const float y =
        coordinate(unit.top, grid_xy[2 * p + 1], q.offset_scale, widen<OFFSET_T>(moved.y));
    store(p, locate(x, y, q.height, q.width), weights[i]);
  }
  __syncwarp();
}

// ---- forward ----

// A sample as the forward pass needs it: the weights of its corners, which are 0 outside of the image,
// and where their group of channels begins in the image, in bytes; inside of it in any case.
struct alignas(16) Tap {
  float weight[4];
  uint32_t at[4];
};

GW_INLINE Tap make_tap(const Problem& q, const Cell& cell, float weight) {
  if (cell.inside == 0.0f) weight = 0.0f;
  const float left = cell.x0 >= 0 ? 1.0f - cell.right : 0.0f;
  const float right = cell.x0 + 1 < q.width ? cell.right : 0.0f;
  const float upper = cell.y0 >= 0 ? weight * (1.0f - cell.down) : 0.0f;
  const float lower = cell.y0 + 1 < q.height ? weight * cell.down : 0.0f;
  const uint32_t column = q.groups * q.depth * (uint32_t)sizeof(Value), line = column * q.width;
  const uint32_t x0 = clamped(cell.x0, q.width) * column;
  const uint32_t x1 = clamped(cell.x0 + 1, q.width) * column;
  const uint32_t y0 = clamped(cell.y0, q.height) * line;
  const uint32_t y1 = clamped(cell.y0 + 1, q.height) * line;
  Tap tap;
  tap.weight[0] = upper * left;
  tap.weight[1] = upper * right;
  tap.weight[2] = lower * left;
  tap.weight[3] = lower * right;
  tap.at[0] = y0 + x0;
  tap.at[1] = y0 + x1;
  tap.at[2] = y1 + x0;
  tap.at[3] = y1 + x1;
  return tap;
}

extern "C" __global__ void __launch_bounds__(THREADS)
dcnv3_forward(Problem q, const float* __restrict__ grid_xy, const Value* __restrict__ value,
              const Offset* __restrict__ offset, const Mask* __restrict__ mask,
              Value* __restrict__ output) {
  __shared__ Tap shared_taps[THREADS / LANES][POINTS];
  const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
  const int64_t number = (int64_t)blockIdx.x * (THREADS / LANES) + slot;
  const bool active = number < q.units;
  const Unit unit = find_unit(q, active ? number : 0);
  Tap* taps = shared_taps[slot];
  find_samples(q, unit, active, lane, grid_xy, offset, mask, [&](int p, const Cell& cell, float w) {
    taps[p] = make_tap(q, cell, w);
  });
  if (!active) return;
  const Value* image = value + unit.image * q.groups * q.depth + unit.group * q.depth;
  for (int channel = lane * WIDTH; channel < q.depth; channel += LANES * WIDTH) {
    const char* from = reinterpret_cast<const char*>(image + channel);
    float sum[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] = 0.0f;
#pragma unroll UNROLL
    for (int p = 0; p < POINTS; ++p) {
      const Tap tap = taps[p];
      float v[4][WIDTH];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        read(reinterpret_cast<const Value*>(from + tap.at[corner]), v[corner]);
      // In one order and fused by name: the bits depend neither on UNROLL nor on the compiler.
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
          sum[i] = fmaf(tap.weight[corner], v[corner][i], sum[i]);
    }
    Piece piece;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) piece.at[i] = narrow<VALUE_T>(sum[i]);
    *reinterpret_cast<Piece*>(output + unit.number * q.depth + channel) = piece;
  }
}

// ---- backward ----

struct Sample {
  float w00, w01, w10, w11;  // bilinear weights; those of corners outside are 0
  float weight;              // of the kernel point, after the softmax
  float right, down;
  // From the top: the pixel of the first corner, moved into the image; whether the lower, upper,
  // right and left corners are inside; whether the second line and column are another one.
  uint32_t place;
};

GW_INLINE Sample make_sample(const Problem& q, const Cell& cell, float weight) {
  const float right = cell.right, down = cell.down;
  const float in_left = cell.x0 >= 0, in_right = cell.x0 + 1 < q.width;
  const float in_top = cell.y0 >= 0, in_bottom = cell.y0 + 1 < q.height;
  Sample s;
  s.weight = weight;  // also where the sample does not count: the softmax has its gradient
  s.w00 = cell.inside * in_top * in_left * (1.0f - down) * (1.0f - right);
  s.w01 = cell.inside * in_top * in_right * (1.0f - down) * right;
  s.w10 = cell.inside * in_bottom * in_left * down * (1.0f - right);
  s.w11 = cell.inside * in_bottom * in_right * down * right;
  s.right = right;
  s.down = down;
  const int x0 = clamped(cell.x0, q.width), x1 = clamped(cell.x0 + 1, q.width);
  const int y0 = clamped(cell.y0, q.height), y1 = clamped(cell.y0 + 1, q.height);
  s.place = ((uint32_t)(y0 * q.width + x0) << 6) | (uint32_t)(in_bottom != 0.0f) << 5 |
            (uint32_t)(in_top != 0.0f) << 4 | (uint32_t)(in_right != 0.0f) << 3 |
            (uint32_t)(in_left != 0.0f) << 2 | (uint32_t)(y1 - y0) << 1 | (uint32_t)(x1 - x0);
  // Nothing of a sample that does not count may reach a gradient.
  if (cell.inside == 0.0f) s.place &= 3u;
  return s;
}

struct Corners {
  const Value *p00, *p01, *p10, *p11;
  int64_t first, line, column;  // element numbers
};

GW_INLINE Corners find_corners(const Problem& q, const Unit& unit, uint32_t place, int channel,
                               const Value* value) {
  const int64_t channels = (int64_t)q.groups * q.depth;
  Corners c;
  c.first = (unit.image + (place >> 6)) * channels + (int64_t)unit.group * q.depth + channel;
  c.column = (place & 1u) ? channels : 0;
  c.line = (place & 2u) ? channels * q.width : 0;
  c.p00 = value + c.first;
  c.p01 = c.p00 + c.column;
  c.p10 = c.p00 + c.line;
  c.p11 = c.p10 + c.column;
  return c;
}

#if FIXED
typedef uint64_t Sum;  // two's complement; adding wraps as signed integers do
#else
typedef float Sum;
#endif

// Adds weight * grad to WIDTH channels of the sums of grad_value.
GW_INLINE void add(Sum* to, float weight, const float (&grad)[WIDTH], float fixed_scale) {
#if FIXED
#pragma unroll
  for (int i = 0; i < WIDTH; ++i)
    atomicAdd(to + i, (uint64_t)__float2ll_rn(weight * grad[i] * fixed_scale));
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && WIDTH % 4 == 0
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4)
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i),
                 "f"(weight * grad[i]), "f"(weight * grad[i + 1]), "f"(weight * grad[i + 2]),
                 "f"(weight * grad[i + 3])
                 : "memory");
#else
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) atomicAdd(to + i, weight * grad[i]);
#endif
#endif
}

GW_INLINE float dot(const float (&a)[WIDTH], const float (&b)[WIDTH]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) sum += a[i] * b[i];
  return sum;
}

// value_sums: float32 or fixed-point sums of grad_value, zero at the start.
// fixed_scale: one float, the number of steps per unit (FIXED only).
extern "C" __global__ void __launch_bounds__(THREADS)
dcnv3_backward(Problem q, const float* __restrict__ grid_xy, const Value* __restrict__ grad_output,
               const Value* __restrict__ value, const Offset* __restrict__ offset,
               const Mask* __restrict__ mask, Sum* __restrict__ value_sums,
               Offset* __restrict__ grad_offset, Mask* __restrict__ grad_mask,
               const float* __restrict__ fixed_scale) {
  __shared__ Sample shared_samples[THREADS / LANES][POINTS];
  __shared__ float shared_grads[THREADS / LANES][POINTS][3];  // weight, x, y
  const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
  const int64_t number = (int64_t)blockIdx.x * (THREADS / LANES) + slot;
  const bool active = number < q.units;
  const Unit unit = find_unit(q, active ? number : 0);
  Sample* samples = shared_samples[slot];
  float(*grads)[3] = shared_grads[slot];
  find_samples(q, unit, active, lane, grid_xy, offset, mask, [&](int p, const Cell& cell, float w) {
    samples[p] = make_sample(q, cell, w);
  });
  const float scale = FIXED ? *fixed_scale : 1.0f;
  // All lanes take every turn, since they add up across lanes; those past the end add zeros.
  const int turns = (q.depth + LANES * WIDTH - 1) / (LANES * WIDTH);
  for (int turn = 0; turn < turns; ++turn) {
    const int channel = (turn * LANES + lane) * WIDTH;
    const bool reads = active && channel < q.depth;
    float grad[WIDTH];
    if (reads) read(grad_output + unit.number * q.depth + channel, grad);
#pragma unroll 1
    for (int p = 0; p < POINTS; ++p) {
      float along_weight = 0.0f, along_x = 0.0f, along_y = 0.0f;
      if (reads && (samples[p].place & 60u)) {
        const Sample s = samples[p];
        const Corners c = find_corners(q, unit, s.place, channel, value);
        const bool in_left = s.place & 4u, in_right = s.place & 8u;
        const bool in_top = s.place & 16u, in_bottom = s.place & 32u;
        float v[WIDTH];
        float d00 = 0.0f, d01 = 0.0f, d10 = 0.0f, d11 = 0.0f;
        Sum* sums = value_sums + c.first;
        if (in_top && in_left) {
          read(c.p00, v);
          d00 = dot(v, grad);
          add(sums, s.weight * s.w00, grad, scale);
        }
        if (in_top && in_right) {
          read(c.p01, v);
          d01 = dot(v, grad);
          add(sums + c.column, s.weight * s.w01, grad, scale);
        }
        if (in_bottom && in_left) {
          read(c.p10, v);
          d10 = dot(v, grad);
          add(sums + c.line, s.weight * s.w10, grad, scale);
        }
        if (in_bottom && in_right) {
          read(c.p11, v);
          d11 = dot(v, grad);
          add(sums + c.line + c.column, s.weight * s.w11, grad, scale);
        }
        along_weight = (s.w00 * d00 + s.w01 * d01) + (s.w10 * d10 + s.w11 * d11);
        along_x = (1.0f - s.down) * (d01 - d00) + s.down * (d11 - d10);
        along_y = (1.0f - s.right) * (d10 - d00) + s.right * (d11 - d01);
      }
      along_weight = lanes_sum(along_weight);
      along_x = lanes_sum(along_x);
      along_y = lanes_sum(along_y);
      if (active && lane == p % LANES) {
        grads[p][0] = turn ? grads[p][0] + along_weight : along_weight;
        grads[p][1] = turn ? grads[p][1] + along_x : along_x;
        grads[p][2] = turn ? grads[p][2] + along_y : along_y;
      }
    }
  }
  float mean = 0.0f;
  if (SOFTMAX) {
    for (int p = lane; active && p < POINTS; p += LANES) mean += samples[p].weight * grads[p][0];
    mean = lanes_sum(mean);
  }
  for (int p = lane; active && p < POINTS; p += LANES) {
    const float weight = samples[p].weight, factor = q.offset_scale * weight;
    const int64_t at = unit.number * POINTS + p;
    grad_mask[at] = narrow<MASK_T>(SOFTMAX ? weight * (grads[p][0] - mean) : grads[p][0]);
    Pair pair;
    pair.x = narrow<OFFSET_T>(factor * grads[p][1]);
    pair.y = narrow<OFFSET_T>(factor * grads[p][2]);
    *reinterpret_cast<Pair*>(grad_offset + at * 2) = pair;
  }
}
