// A CUDA device made of one CPU thread: enough of it to run csrc/*.cu in a test, shuffles included.
//
// The threads of a block are fibres that take turns; a fibre yields where its warp must meet. Shared
// memory is static, as blocks run one after the other.
#pragma once
#define GW_HOST
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define GW_INLINE static inline
#define __global__
#define __device__
#define __restrict__
#define __forceinline__
#define __shared__ static
#define __launch_bounds__(n)

struct Index { unsigned x; };
static Index threadIdx, blockIdx;

namespace host_device {
struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int meetings = 0;  // how often it has met its warp
};
static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static std::function<void()> body;
static float exchanged[1024];

static void run() {
  body();
  fibres[threadIdx.x].done = true;
  swapcontext(&fibres[threadIdx.x].context, &scheduler);
}

// Returns when every fibre of the warp has come here as often as this one.
static void meet() {
  const unsigned self = threadIdx.x, first = self / 32 * 32;
  const int meeting = ++fibres[self].meetings;
  for (long turns = 0;; ++turns) {
    bool all = true;
    for (unsigned i = first; i < first + 32; ++i) {
      if (fibres[i].done && fibres[i].meetings < meeting) {
        fprintf(stderr, "a warp meets without its thread %u, which has ended\n", i);
        abort();
      }
      all &= fibres[i].meetings >= meeting;
    }
    if (all) return;
    swapcontext(&fibres[self].context, &scheduler);
  }
}

template <class F>
static void launch(unsigned blocks, unsigned threads, F f) {
  body = f;
  for (unsigned b = 0; b < blocks; ++b) {
    fibres.assign(threads, Fibre{});
    for (auto& fibre : fibres) {
      fibre.stack.resize(32768);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = NULL;
      makecontext(&fibre.context, run, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned t = 0; t < threads; ++t) {
        if (fibres[t].done) continue;
        left = true;
        blockIdx.x = b;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibres[t].context);
      }
    }
  }
}
}  // namespace host_device

static inline void __syncwarp() { host_device::meet(); }

static inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  const unsigned self = threadIdx.x;
  host_device::exchanged[self] = x;
  host_device::meet();
  const float other = host_device::exchanged[self ^ lanes];
  host_device::meet();  // nobody writes again before all have read
  return other;
}

// The tensor cores' product of fragments; operands lose the bits that the hardware does not read.
static inline void multiply_tf32(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
  static float left[32][32][4], right[32][32][2];  // [warp][lane]
  const unsigned self = threadIdx.x, warp = self / 32, lane = self % 32;
  const auto cut = [](float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0xffffe000u;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int i = 0; i < 4; ++i) left[warp][lane][i] = cut(a[i]);
  for (int i = 0; i < 2; ++i) right[warp][lane][i] = cut(b[i]);
  host_device::meet();
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = acc[i];
    for (unsigned k = 0; k < 8; ++k)
      sum += left[warp][row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)] *
             right[warp][column * 4 + k % 4][k / 4];
    acc[i] = sum;
  }
  host_device::meet();
}

template <class T> static inline T atomicAdd(T* to, T x) { T old = *to; *to = old + x; return old; }
static inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline long long __float2ll_rn(float x) { return llrintf(x); }
static inline float f16_to_float(uint16_t bits) { _Float16 x; memcpy(&x, &bits, 2); return (float)x; }
static inline uint16_t float_to_f16(float x) {
  const _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
