// What the CUDA sources of DCNv3 share: where a sample lies, the problem, storage, matrix products.
//
// float32 coordinates, weights and sums, whatever the storage. No system headers: NVRTC compiles the
// sources with this text put in place of its `#include`. The host build of the tests runs the same text
// with the handful of CUDA names that it uses defined in C++. Settings of all sources:
//
//   VALUE_T, OFFSET_T, MASK_T   0 float32, 1 bfloat16, 2 float16
//   WIDTH    channels per load: a power of two that divides the depth, at most 16 bytes
//   POINTS   kernel points
//   SOFTMAX  whether the mask holds logits
#pragma once
#include "storage.cuh"

// ---- where a sample lies ----

// In the cell [floor(X), floor(X)+1] x [floor(Y), floor(Y)+1], also where X or Y is an integer. It
// counts if -1 <= X < W and -1 <= Y < H; all else, NaN included, contributes nothing. At X = -1 its
// weight is 0, but the right-sided derivative is not.
struct Cell {
  int x0, y0;           // upper left corner; 0 for a sample that does not count
  float right, down;    // distance from it, in [0, 1)
  float inside;         // 1 where the sample counts, else 0
};

GW_INLINE Cell locate(float x, float y, int height, int width) {
  const float floor_x = floorf(x), floor_y = floorf(y);
  const bool counts = (x >= -1.0f) & (x < (float)width) & (y >= -1.0f) & (y < (float)height);
  Cell cell;
  cell.inside = counts ? 1.0f : 0.0f;
  // Chosen before the conversion: a far-away coordinate does not fit an integer.
  cell.x0 = (int)(counts ? floor_x : 0.0f);
  cell.y0 = (int)(counts ? floor_y : 0.0f);
  cell.right = counts ? x - floor_x : 0.0f;
  cell.down = counts ? y - floor_y : 0.0f;
  return cell;
}

// The coordinate of kernel point i along one axis at output position o. The regular grid is exact
// and comes first, so that a zero offset samples exactly on it.
GW_INLINE float coordinate(int origin, float scaled_grid, float scale, float offset) {
  return ((float)origin + scaled_grid) + scale * offset;
}

struct Problem {
  int64_t units;  // batch * out_height * out_width * groups
  int height, width, out_height, out_width;
  int groups, depth;
  int stride_h, stride_w, origin_h, origin_w;
  float offset_scale;
};

// ---- storage ----

typedef typename Storage<VALUE_T>::type Value;
typedef typename Storage<OFFSET_T>::type Offset;
typedef typename Storage<MASK_T>::type Mask;

struct alignas(2 * sizeof(Offset)) Pair { Offset x, y; };

// ---- tensor cores ----

// x as an operand of a matrix product, which keeps 10 bits of a mantissa, and what is left of it: the two
// hold 21 to 22 bits of a float32. An `exact` x fits as it is.
GW_INLINE void split(float x, bool exact, float& high, float& low) {
  high = exact ? x : __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
  low = exact ? 0.0f : x - high;
}

#ifndef GW_HOST
// acc (16x8) += a (16x8) · b (8x8). With row = lane / 4 and member = lane % 4 a lane holds
//   a: (row, member), (row + 8, member), (row, member + 4), (row + 8, member + 4)
//   b: (member, row), (member + 4, row)
//   acc: (row, 2·member), (row, 2·member + 1), (row + 8, 2·member), (row + 8, 2·member + 1)
GW_INLINE void multiply_tf32(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}
#endif
