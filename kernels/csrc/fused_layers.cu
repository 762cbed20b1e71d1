// InternImage's fused layers for CUDA, forward and backward; float32, float16 and bfloat16 storage,
// float32 arithmetic:
//
//   SIDE = 0   x + keep * gamma * LN(y)
//   SIDE > 0   GELU(LN(depthwise SIDE x SIDE convolution)), NHWC
//
// LANES neighbouring lanes of a warp share a row of channels: each holds PIECES pieces of WIDTH
// channels, LANES * WIDTH channels apart, in registers, so that LN reads nothing twice. In a
// convolution they share PIXELS neighbouring pixels, for which a weight and most of the image are
// read once. The gradients of the parameters are sums over rows: another kernel gives a lane a few
// channels and `span` rows, and the caller adds up what it finds, in a fixed order.
//
// No system headers: NVRTC compiles this text with ours in place of its `#include`; the host build of
// the tests runs the same. Settings:
//
//   X_T, Y_T, OUT_T   0 float32, 1 bfloat16, 2 float16
//   CHANNELS, WIDTH   of a row, and of a load: a power of two that divides CHANNELS
//   LANES, PIECES     LANES * PIECES * WIDTH >= CHANNELS; LANES a power of two, at most 32
//   SIDE, PIXELS      see above
//   THREADS           per block: a multiple of 32
#include "storage.cuh"

struct Problem {
  int64_t rows, rows_per_sample;  // rows: pixels of all images
  int64_t span;                   // rows of a lane of the kernel that sums
  int height, width;              // of an image (SIDE > 0)
  float eps;
};

typedef Storage<X_T>::type X;
typedef Storage<Y_T>::type Y;
typedef Storage<OUT_T>::type Out;

// WIDTH neighbouring channels: one load or store (two of float32 beside a 16-bit dtype).
template <int T> GW_INLINE void read(const typename Storage<T>::type* from, float (&to)[WIDTH]) {
  typedef typename Storage<T>::type Element;
  constexpr int BYTES = WIDTH * sizeof(Element) > 16 ? 16 : WIDTH * sizeof(Element);
  struct alignas(BYTES) Piece { Element at[WIDTH]; };
  const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = widen<T>(piece.at[i]);
}

template <int T> GW_INLINE void write(typename Storage<T>::type* to, const float (&from)[WIDTH]) {
  typedef typename Storage<T>::type Element;
  constexpr int BYTES = WIDTH * sizeof(Element) > 16 ? 16 : WIDTH * sizeof(Element);
  struct alignas(BYTES) Piece { Element at[WIDTH]; } piece;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) piece.at[i] = narrow<T>(from[i]);
  *reinterpret_cast<Piece*>(to) = piece;
}

// A sum over the LANES lanes of a row, the same in all of them.
GW_INLINE float lanes_sum(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Where piece `p` of a lane begins; beyond CHANNELS there is none.
GW_INLINE int channel_of(int lane, int p) { return (p * LANES + lane) * WIDTH; }

struct Moments { float mean, inverse; };

// y becomes what lies beyond its mean, over its deviation. Every lane of the warp calls this.
GW_INLINE Moments normalise(float (&y)[PIECES][WIDTH], int lane, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p)
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += y[p][i];  // zeros where there is no channel
  Moments m;
  m.mean = lanes_sum(sum) / CHANNELS;
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p)
    if (channel_of(lane, p) < CHANNELS)
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) squares += (y[p][i] - m.mean) * (y[p][i] - m.mean);
  m.inverse = 1.0f / sqrtf(lanes_sum(squares) / CHANNELS + eps);
#pragma unroll
  for (int p = 0; p < PIECES; ++p)
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) y[p][i] = (y[p][i] - m.mean) * m.inverse;
  return m;
}

#if SIDE == 0

GW_INLINE void read_row(const Y* y, int64_t row, int lane, bool active, float (&to)[PIECES][WIDTH]) {
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = channel_of(lane, p);
    if (active && channel < CHANNELS) {
      read<Y_T>(y + row * CHANNELS + channel, to[p]);
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) to[p][i] = 0.0f;
    }
  }
}

// keep: one per sample, or a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
residual_norm_forward(Problem q, const X* __restrict__ x, const Y* __restrict__ y,
                      const float* __restrict__ scale, const float* __restrict__ shift,
                      const float* __restrict__ gamma, const float* __restrict__ keep,
                      Out* __restrict__ out) {
  const int lane = threadIdx.x % LANES;
  const int64_t row = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const bool active = row < q.rows;
  float normed[PIECES][WIDTH];
  read_row(y, row, lane, active, normed);
  normalise(normed, lane, q.eps);
  if (!active) return;
  const float kept = keep ? keep[row / q.rows_per_sample] : 1.0f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = channel_of(lane, p);
    if (channel >= CHANNELS) continue;
    float sum[WIDTH];
    read<X_T>(x + row * CHANNELS + channel, sum);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      sum[i] += kept * gamma[channel + i] *
                (normed[p][i] * scale[channel + i] + shift[channel + i]);
    write<OUT_T>(out + row * CHANNELS + channel, sum);
  }
}

// moments: (rows, 2), of each row, for residual_norm_sums.
extern "C" __global__ void __launch_bounds__(THREADS)
residual_norm_backward(Problem q, const Out* __restrict__ grad, const Y* __restrict__ y,
                       const float* __restrict__ scale, const float* __restrict__ gamma,
                       const float* __restrict__ keep, Y* __restrict__ grad_y,
                       float* __restrict__ moments) {
  const int lane = threadIdx.x % LANES;
  const int64_t row = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const bool active = row < q.rows;
  float normed[PIECES][WIDTH], along[PIECES][WIDTH];
  read_row(y, row, lane, active, normed);
  const Moments m = normalise(normed, lane, q.eps);
  const float kept = active && keep ? keep[row / q.rows_per_sample] : 1.0f;
  float total = 0.0f, product = 0.0f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = channel_of(lane, p);
    if (!active || channel >= CHANNELS) continue;
    read<OUT_T>(grad + row * CHANNELS + channel, along[p]);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      along[p][i] *= kept * gamma[channel + i] * scale[channel + i];
      total += along[p][i];
      product += along[p][i] * normed[p][i];
    }
  }
  total = lanes_sum(total) / CHANNELS;
  product = lanes_sum(product) / CHANNELS;
  if (!active) return;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = channel_of(lane, p);
    if (channel >= CHANNELS) continue;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      along[p][i] = m.inverse * (along[p][i] - total - normed[p][i] * product);
    write<Y_T>(grad_y + row * CHANNELS + channel, along[p]);
  }
  if (lane == 0) {
    moments[2 * row] = m.mean;
    moments[2 * row + 1] = m.inverse;
  }
}

// sums: (spans, 2, CHANNELS), over a span of rows, of keep * grad * normed and of keep * grad.
extern "C" __global__ void __launch_bounds__(THREADS)
residual_norm_sums(Problem q, const Out* __restrict__ grad, const Y* __restrict__ y,
                   const float* __restrict__ keep, const float* __restrict__ moments,
                   float* __restrict__ sums) {
  constexpr int COLUMNS = CHANNELS / WIDTH;
  const int64_t unit = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const int channel = (int)(unit % COLUMNS) * WIDTH;
  const int64_t number = unit / COLUMNS, first = number * q.span;
  if (first >= q.rows) return;
  const int64_t end = first + q.span < q.rows ? first + q.span : q.rows;
  float along_normed[WIDTH], along[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) along_normed[i] = along[i] = 0.0f;
  int64_t sample = first / q.rows_per_sample, next = (sample + 1) * q.rows_per_sample;
  float kept = keep ? keep[sample] : 1.0f;
#pragma unroll 2
  for (int64_t row = first; row < end; ++row) {
    if (row == next) {
      kept = keep ? keep[++sample] : 1.0f;
      next += q.rows_per_sample;
    }
    float g[WIDTH], v[WIDTH];
    read<OUT_T>(grad + row * CHANNELS + channel, g);
    read<Y_T>(y + row * CHANNELS + channel, v);
    const float mean = moments[2 * row], inverse = moments[2 * row + 1];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      along[i] += kept * g[i];
      along_normed[i] += kept * g[i] * ((v[i] - mean) * inverse);
    }
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    sums[(number * 2) * CHANNELS + channel + i] = along_normed[i];
    sums[(number * 2 + 1) * CHANNELS + channel + i] = along[i];
  }
}

#else

#define TAPS (SIDE * SIDE)

GW_INLINE float below(float u) { return 0.5f * erfcf(-0.70710678f * u); }  // P(X <= u)
GW_INLINE float bell(float u) { return 0.39894228f * expf(-0.5f * u * u); }

// PIXELS neighbouring pixels of a line.
struct Strip {
  int64_t line;  // of all images
  int y, x;
  bool active;
};

GW_INLINE Strip find_strip(const Problem& q) {
  const int64_t number = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const int per_line = (q.width + PIXELS - 1) / PIXELS;
  Strip strip;
  strip.line = number / per_line;
  strip.x = (int)(number % per_line) * PIXELS;
  strip.y = (int)(strip.line % q.height);
  strip.active = strip.line * q.width < q.rows;
  return strip;
}

// sums = bias + sum over taps of weight[tap] * image there; with REVERSED the taps from the last to
// the first, which is the gradient of the image. weight: (TAPS, CHANNELS).
template <bool REVERSED>
GW_INLINE void convolve(const Problem& q, const Strip& s, const X* image, const float* weight,
                        const float* bias, int lane, float (&sums)[PIXELS][PIECES][WIDTH]) {
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) {
    const int channel = channel_of(lane, piece);
    const bool reads = s.active && channel < CHANNELS;
#pragma unroll
    for (int p = 0; p < PIXELS; ++p)
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        sums[p][piece][i] = reads && !REVERSED ? bias[channel + i] : 0.0f;
    if (!reads) continue;
#pragma unroll 1
    for (int i = 0; i < SIDE; ++i) {
      const int y = s.y + i - SIDE / 2;
      if ((uint32_t)y >= (uint32_t)q.height) continue;
      const X* line = image + (s.line + i - SIDE / 2) * q.width * CHANNELS + channel;
      float w[SIDE][WIDTH];
#pragma unroll
      for (int j = 0; j < SIDE; ++j) {
        const int tap = REVERSED ? TAPS - 1 - (i * SIDE + j) : i * SIDE + j;
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) w[j][c] = weight[tap * CHANNELS + channel + c];
      }
#pragma unroll
      for (int column = 0; column < PIXELS + SIDE - 1; ++column) {
        const int x = s.x + column - SIDE / 2;
        if ((uint32_t)x >= (uint32_t)q.width) continue;
        float v[WIDTH];
        read<X_T>(line + (int64_t)x * CHANNELS, v);
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
          const int j = column - p;
          if (j < 0 || j >= SIDE) continue;
#pragma unroll
          for (int c = 0; c < WIDTH; ++c) sums[p][piece][c] += w[j][c] * v[c];
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_norm_gelu_forward(Problem q, const X* __restrict__ image,
                            const float* __restrict__ weight, const float* __restrict__ bias,
                            const float* __restrict__ scale, const float* __restrict__ shift,
                            Out* __restrict__ out) {
  const int lane = threadIdx.x % LANES;
  const Strip s = find_strip(q);
  float normed[PIXELS][PIECES][WIDTH];
  convolve<false>(q, s, image, weight, bias, lane, normed);
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    normalise(normed[p], lane, q.eps);
    const bool writes = s.active && s.x + p < q.width;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int channel = channel_of(lane, piece);
      if (!writes || channel >= CHANNELS) continue;
      float result[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float u = normed[p][piece][i] * scale[channel + i] + shift[channel + i];
        result[i] = u * below(u);
      }
      write<OUT_T>(out + (s.line * q.width + s.x + p) * CHANNELS + channel, result);
    }
  }
}

// The gradient of the convolution's output, in the storage of the image; moments: (rows, 2).
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_norm_gelu_backward(Problem q, const Out* __restrict__ grad, const X* __restrict__ image,
                             const float* __restrict__ weight, const float* __restrict__ bias,
                             const float* __restrict__ scale, const float* __restrict__ shift,
                             X* __restrict__ along_output, float* __restrict__ moments) {
  const int lane = threadIdx.x % LANES;
  const Strip s = find_strip(q);
  float normed[PIXELS][PIECES][WIDTH];
  convolve<false>(q, s, image, weight, bias, lane, normed);
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    const Moments m = normalise(normed[p], lane, q.eps);
    const bool writes = s.active && s.x + p < q.width;
    const int64_t row = s.line * q.width + s.x + p;
    float along[PIECES][WIDTH];
    float total = 0.0f, product = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int channel = channel_of(lane, piece);
      if (!writes || channel >= CHANNELS) continue;
      read<OUT_T>(grad + row * CHANNELS + channel, along[piece]);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float u = normed[p][piece][i] * scale[channel + i] + shift[channel + i];
        along[piece][i] *= (below(u) + u * bell(u)) * scale[channel + i];
        total += along[piece][i];
        product += along[piece][i] * normed[p][piece][i];
      }
    }
    total = lanes_sum(total) / CHANNELS;
    product = lanes_sum(product) / CHANNELS;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int channel = channel_of(lane, piece);
      if (!writes || channel >= CHANNELS) continue;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        along[piece][i] = m.inverse * (along[piece][i] - total - normed[p][piece][i] * product);
      write<X_T>(along_output + row * CHANNELS + channel, along[piece]);
    }
    if (writes && lane == 0) {
      moments[2 * row] = m.mean;
      moments[2 * row + 1] = m.inverse;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_norm_gelu_image(Problem q, const X* __restrict__ along_output,
                          const float* __restrict__ weight, X* __restrict__ grad_image) {
  const int lane = threadIdx.x % LANES;
  const Strip s = find_strip(q);
  float sums[PIXELS][PIECES][WIDTH];
  convolve<true>(q, s, along_output, weight, weight, lane, sums);
#pragma unroll
  for (int p = 0; p < PIXELS; ++p)
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int channel = channel_of(lane, piece);
      if (s.active && s.x + p < q.width && channel < CHANNELS)
        write<X_T>(grad_image + (s.line * q.width + s.x + p) * CHANNELS + channel, sums[p][piece]);
    }
}

// sums: (spans, TAPS + 3, CHANNELS), over a span of pixels: of weight, bias, scale, shift. A lane has
// one channel, and computes the convolution again, as it needs the image of every tap anyway.
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_norm_gelu_sums(Problem q, const Out* __restrict__ grad, const X* __restrict__ image,
                         const X* __restrict__ along_output, const float* __restrict__ weight,
                         const float* __restrict__ bias, const float* __restrict__ scale,
                         const float* __restrict__ shift, const float* __restrict__ moments,
                         float* __restrict__ sums) {
  const int64_t unit = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const int channel = (int)(unit % CHANNELS);
  const int64_t number = unit / CHANNELS, first = number * q.span;
  if (first >= q.rows) return;
  const int64_t end = first + q.span < q.rows ? first + q.span : q.rows;
  const float own_bias = bias[channel], own_scale = scale[channel], own_shift = shift[channel];
  float w[TAPS], along_weight[TAPS];
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    w[t] = weight[t * CHANNELS + channel];
    along_weight[t] = 0.0f;
  }
  float along_bias = 0.0f, along_scale = 0.0f, along_shift = 0.0f;
  int x = (int)(first % q.width), y = (int)(first / q.width % q.height);
#pragma unroll 1
  for (int64_t row = first; row < end; ++row) {
    const float along = widen<X_T>(along_output[row * CHANNELS + channel]);
    float c = own_bias;
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
      const int down = t / SIDE - SIDE / 2, right = t % SIDE - SIDE / 2;
      if (y + down < 0 || y + down >= q.height || x + right < 0 || x + right >= q.width) continue;
      const int64_t from = (row + (int64_t)down * q.width + right) * CHANNELS + channel;
      const float v = widen<X_T>(image[from]);
      c += w[t] * v;
      along_weight[t] += along * v;
    }
    const float normed = (c - moments[2 * row]) * moments[2 * row + 1];
    const float u = normed * own_scale + own_shift;
    const float along_u = widen<OUT_T>(grad[row * CHANNELS + channel]) * (below(u) + u * bell(u));
    along_bias += along;
    along_scale += along_u * normed;
    along_shift += along_u;
    if (++x == q.width) {
      x = 0;
      if (++y == q.height) y = 0;
    }
  }
  float* to = sums + number * (TAPS + 3) * CHANNELS + channel;
#pragma unroll
  for (int t = 0; t < TAPS; ++t) to[t * CHANNELS] = along_weight[t];
  to[TAPS * CHANNELS] = along_bias;
  to[(TAPS + 1) * CHANNELS] = along_scale;
  to[(TAPS + 2) * CHANNELS] = along_shift;
}

#endif
