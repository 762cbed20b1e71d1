// The backward pass of DCNv3 as matrix products: one warp, a block of its own, has 32 units (a tile of output pixels of
// one group of one image), one per lane, and the region of the image around it.
//
//   products  S[pixel][unit] = Σ_d value[pixel, d] · grad[unit, d]    over the region, on tensor cores
//   gather    each lane reads the 4 corners of its samples from its own column of S: gradients of
//             offset and mask, with no sum across lanes
//   scatter   each lane adds the weights of its samples to its own column of A[pixel][unit]
//   spread    grad_value[pixel, d] += Σ_unit A[pixel][unit] · grad[unit, d], on tensor cores, with one
//             atomic addition per pixel of the region and channel
//
// Per unit of 16 channels at 3x3 that is 4 to 5 rows of 64 bytes added to global memory instead of 36,
// and 36 scalars read and written in shared memory instead of 36 rows. S and A share one board. A lane
// touches only its own column, so nothing collides and no shared atomic is needed. Samples beyond the
// region are read and added in global memory, one by one.
//
// float32 operands are cut in two for tensor cores: see `multiply`. A grad that is not finite makes the
// whole region's grad_value not finite (0 · NaN). Settings beside those of the header:
//
//   DEPTH                  channels of a group, at most 32
//   TILE_H, TILE_W         output pixels of a warp: 32 together
//   REGION_H, REGION_W     pixels of the region
//   REGION_TOP, _LEFT      its first pixel, from the origin of the tile's first unit
#include "dcnv3.cuh"

// Rows come in sixteens for the matrix products. Four more columns than units: eight neighbouring
// rows then lie in different banks.
constexpr int REGION = REGION_H * REGION_W, ROWS = (REGION + 15) / 16 * 16, PITCH = 36;
constexpr int CHUNKS = (DEPTH + 15) / 16;  // of 16 channels
constexpr int OWN = 2 * CHUNKS;            // channels a lane loads at a time in `spread`
constexpr bool EXACT = VALUE_T != 0;       // float16 and bfloat16 fit the tensor cores' operands
// Sixteens of rows whose value is loaded at once: as many as registers hold.
constexpr int BATCH = (EXACT ? 4 : 3) - CHUNKS;
static_assert(TILE_H * TILE_W == 32 && 3 * POINTS <= ROWS && DEPTH <= 32, "settings");

struct alignas(16) Four { float at[4]; };
struct alignas(8) Two { float at[2]; };

// acc (16x8) += a (16x8) · b (8x8), in float32; a, b: high parts of `split`, low parts where not exact.
GW_INLINE void multiply(float (&acc)[4], const float (&a)[4], const float (&a_low)[4],
                        const float (&b)[2], const float (&b_low)[2], bool a_exact) {
  multiply_tf32(acc, a, b);
  if (!a_exact) multiply_tf32(acc, a_low, b);
  if (!EXACT) multiply_tf32(acc, a, b_low);
}

// N channels from `channel` on of the group's vector at from[at]; zeros past the depth, or at -1.
template <int N> GW_INLINE void read_channels(const Value* from, int at, int channel, float (&to)[N]) {
  const Value* first = from + (at < 0 ? 0 : at);
  if constexpr (WIDTH >= N && DEPTH % N == 0) {
    struct alignas(N * sizeof(Value)) Part { Value at[N]; };
    const bool exists = at >= 0 && channel < DEPTH;
    const Part part = *reinterpret_cast<const Part*>(first + (channel < DEPTH ? channel : 0));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = exists ? widen<VALUE_T>(part.at[i]) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      to[i] = at >= 0 && channel + i < DEPTH ? widen<VALUE_T>(first[channel + i]) : 0.0f;
  }
}

// Adds N channels from `channel` on to one group's sums.
template <int N> GW_INLINE void add_channels(float* to, int channel, const float (&x)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (N == 4 && DEPTH % 4 == 0) {
    if (channel < DEPTH)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + channel), "f"(x[0]),
                   "f"(x[1]), "f"(x[2]), "f"(x[3])
                   : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (channel + i < DEPTH) atomicAdd(to + channel + i, x[i]);
  }
}

struct Tile {
  int64_t unit;       // number of the tile's first unit
  int64_t image;      // where the group's channels of the image's first pixel lie in value
  int height, width;  // units of it that exist
  int top, left;      // first pixel of the region
  int across, pixel;  // from a line of output pixels to the next, in units; a pixel, in elements
};

// number: groups innermost, so that the blocks at work share what they read of offset and mask.
GW_INLINE Tile find_tile(const Problem& q, uint32_t number) {
  const uint32_t across = (q.out_width + TILE_W - 1) / TILE_W;
  const uint32_t down = (q.out_height + TILE_H - 1) / TILE_H;
  const int group = number % q.groups;
  uint32_t rest = number / q.groups;
  const int left = rest % across * TILE_W;
  rest /= across;
  const int top = rest % down * TILE_H;
  const int64_t image = rest / down;
  Tile tile;
  tile.across = q.out_width * q.groups;
  tile.pixel = q.groups * DEPTH;
  tile.image = image * q.height * q.width * tile.pixel + group * DEPTH;
  tile.unit = (image * q.out_height + top) * tile.across + left * q.groups + group;
  tile.height = q.out_height - top < TILE_H ? q.out_height - top : TILE_H;
  tile.width = q.out_width - left < TILE_W ? q.out_width - left : TILE_W;
  tile.top = top * q.stride_h + q.origin_h + (REGION_TOP);
  tile.left = left * q.stride_w + q.origin_w + (REGION_LEFT);
  return tile;
}

// The unit of a lane, counted from the tile's first, or -1 where the image ends before it.
GW_INLINE int unit_of(const Problem& q, const Tile& tile, int lane) {
  const int y = lane / TILE_W, x = lane % TILE_W;
  return y < tile.height && x < tile.width ? y * tile.across + x * q.groups : -1;
}

// Where a pixel of the region lies in its image, in elements, or -1 outside of it. Without branches,
// as are the loads from there: those of several rows are in flight at once.
GW_INLINE int pixel_at(const Problem& q, const Tile& tile, int y, int x) {
  y += tile.top;
  x += tile.left;
  const bool exists = (y >= 0) & (y < q.height) & (x >= 0) & (x < q.width);
  const int at = (y * q.width + x) * tile.pixel;
  return exists ? at : -1;
}

GW_INLINE int pixel_of(const Problem& q, const Tile& tile, int row) {
  const int at = pixel_at(q, tile, row / REGION_W, row % REGION_W);
  return row < REGION ? at : -1;
}

// A sample seen from its region.
struct Place {
  Cell cell;
  int y, x;     // its upper left corner, in the region
  bool counts;  // see Cell
  bool within;  // it does, and all corners are rows of the board
};

GW_INLINE Place find_place(const Problem& q, const Tile& tile, float x, float y) {
  Place place;
  place.cell = locate(x, y, q.height, q.width);
  place.y = place.cell.y0 - tile.top;
  place.x = place.cell.x0 - tile.left;
  place.counts = place.cell.inside != 0.0f;
  place.within = place.counts & (place.y >= 0) & (place.y < REGION_H - 1) & (place.x >= 0) &
                 (place.x < REGION_W - 1);
  return place;
}

// A corner of any sample: its row of the board, or -1 and its pixel, or both -1.
struct Corner { int row, pixel; };

GW_INLINE Corner find_corner(const Problem& q, const Tile& tile, const Place& place, int corner) {
  const int y = place.y + corner / 2, x = place.x + corner % 2;
  const bool on_board = (y >= 0) & (y < REGION_H) & (x >= 0) & (x < REGION_W);
  Corner found;
  found.row = on_board ? y * REGION_W + x : -1;
  found.pixel = on_board ? -1 : pixel_at(q, tile, y, x);
  return found;
}

// One of an array that has to stay in registers.
GW_INLINE float pick(const float (&from)[POINTS], int p) {
  float picked = from[0];
#pragma unroll
  for (int i = 1; i < POINTS; ++i) picked = i == p ? from[i] : picked;
  return picked;
}

GW_INLINE float product_in_memory(const Value* value, const Value* grad) {
  float sum = 0.0f;
#pragma unroll 1
  for (int channel = 0; channel < DEPTH; channel += 4) {
    float v[4], g[4];
    read_channels<4>(value, 0, channel, v);
    read_channels<4>(grad, 0, channel, g);
    sum += (v[0] * g[0] + v[1] * g[1]) + (v[2] * g[2] + v[3] * g[3]);
  }
  return sum;
}

GW_INLINE void add_in_memory(float* sums, const Value* grad, float weight) {
#pragma unroll 1
  for (int channel = 0; channel < DEPTH; channel += 4) {
    float g[4];
    read_channels<4>(grad, 0, channel, g);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] *= weight;
    add_channels<4>(sums, channel, g);
  }
}

// board[row][unit] = value of the row's pixel · grad of the unit.
GW_INLINE void find_products(const Problem& q, const Tile& tile, int lane, const Value* grad,
                             const Value* value, float (*board)[PITCH]) {
  const int member = lane % 4, row = lane / 4;  // of the fragments of a matrix product
  // Sums do not care for the order of channels: a lane's are neighbours, and one load.
  float g[CHUNKS][4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int unit = unit_of(q, tile, n * 8 + row);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      read_channels<4>(grad, unit < 0 ? -1 : unit * DEPTH, c * 16 + member * 4, g[c][n]);
  }
#pragma unroll 1
  for (int first = 0; first < ROWS; first += 16 * BATCH) {
    float v[BATCH][CHUNKS][2][4];
#pragma unroll
    for (int i = 0; i < BATCH * 2; ++i) {
      const int pixel = pixel_of(q, tile, first + row + 8 * i);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        read_channels<4>(value, pixel, c * 16 + member * 4, v[i / 2][c][i % 2]);
    }
#pragma unroll
    for (int batch = 0; batch < BATCH; ++batch) {
      if (first + 16 * batch >= ROWS) break;  // all lanes
      float sums[4][4] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int step = 0; step < 4; step += 2) {
          float a[4], a_low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) split(v[batch][c][i % 2][step + i / 2], EXACT, a[i], a_low[i]);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float b[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) split(g[c][n][step + i], EXACT, b[i], b_low[i]);
            multiply(sums[n], a, a_low, b, b_low, EXACT);
          }
        }
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Two two;
          two.at[0] = sums[n][2 * half];
          two.at[1] = sums[n][2 * half + 1];
          float* to = &board[first + 16 * batch + row + 8 * half][n * 8 + member * 2];
          *reinterpret_cast<Two*>(to) = two;
        }
    }
  }
}

// value_sums[pixel] += Σ_unit board[row of the pixel][unit] · grad[unit].
GW_INLINE void spread(const Problem& q, const Tile& tile, int lane, const Value* grad,
                      const float (*board)[PITCH], float* value_sums) {
  const int member = lane % 4, row = lane / 4;
  // Likewise for the order of units: a lane's eight are neighbours. And channel n of the lane's own
  // goes to column `row` of product n, so that its results are neighbours, too.
  float g[8][OWN];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int unit = unit_of(q, tile, member * 8 + i);
    read_channels<OWN>(grad, unit < 0 ? -1 : unit * DEPTH, row * OWN, g[i]);
  }
#pragma unroll 1
  for (int first = 0; first < ROWS; first += 16) {
    Four weights[2][2];  // [row or row + 8][units]
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[i / 2][i % 2] = *reinterpret_cast<const Four*>(
          &board[first + row + 8 * (i / 2)][member * 8 + 4 * (i % 2)]);
    __syncwarp();  // a matrix product needs all lanes, and not all have added rows above
    float sums[OWN][4] = {};
#pragma unroll
    for (int step = 0; step < 8; step += 2) {
      float a[4], a_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        split(weights[i % 2][step / 4].at[step % 4 + i / 2], false, a[i], a_low[i]);
#pragma unroll
      for (int n = 0; n < OWN; ++n) {
        float b[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) split(g[step + i][n], EXACT, b[i], b_low[i]);
        multiply(sums[n], a, a_low, b, b_low, false);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_of(q, tile, first + row + 8 * half);
      if (pixel < 0) continue;
#pragma unroll
      for (int part = 0; part < CHUNKS; ++part) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own = part * 4 + i;  // of the channels of columns 2·member and 2·member + 1
          x[i] = sums[own % OWN][2 * half + own / OWN];
        }
        add_channels<4>(value_sums + pixel, member * 2 * OWN + part * 4, x);
      }
    }
  }
}

// value_sums: float32 sums of grad_value, zero at the start.
extern "C" __global__ void __launch_bounds__(32)
dcnv3_backward_tile(Problem q, const float* __restrict__ grid_xy,
                    const Value* __restrict__ grad_output, const Value* __restrict__ value,
                    const Offset* __restrict__ offset, const Mask* __restrict__ mask,
                    float* __restrict__ value_sums, Offset* __restrict__ grad_offset,
                    Mask* __restrict__ grad_mask) {
  alignas(16) __shared__ float board[ROWS][PITCH];
  const int lane = threadIdx.x;
  const Tile tile = find_tile(q, blockIdx.x);
  const int unit = unit_of(q, tile, lane);
  // from here on of this tile's image, group and first unit
  value += tile.image;
  value_sums += tile.image;
  grad_output += tile.unit * DEPTH;
  offset += tile.unit * (POINTS * 2);
  grad_offset += tile.unit * (POINTS * 2);
  mask += tile.unit * POINTS;
  grad_mask += tile.unit * POINTS;
  const Value* grad = grad_output + unit * DEPTH;

  // Offsets and weights lie unit by unit in memory: read as such, handed over on the board.
  Pair moved[POINTS];
  Mask given[POINTS];
#pragma unroll
  for (int i = 0; i < POINTS; ++i) {
    const int from = unit_of(q, tile, (i * 32 + lane) / POINTS), p = (i * 32 + lane) % POINTS;
    const int at = from < 0 ? 0 : from * POINTS + p;  // something, where there is no unit
    moved[i] = reinterpret_cast<const Pair*>(offset)[at];
    given[i] = mask[at];
  }
#pragma unroll
  for (int i = 0; i < POINTS; ++i) {
    const int owner = (i * 32 + lane) / POINTS, p = (i * 32 + lane) % POINTS;
    board[3 * p][owner] = widen<OFFSET_T>(moved[i].x);
    board[3 * p + 1][owner] = widen<OFFSET_T>(moved[i].y);
    board[3 * p + 2][owner] = widen<MASK_T>(given[i]);
  }
  __syncwarp();
  float x[POINTS], y[POINTS], weight[POINTS];
  const int left = tile.left - (REGION_LEFT) + lane % TILE_W * q.stride_w;
  const int top = tile.top - (REGION_TOP) + lane / TILE_W * q.stride_h;
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    x[p] = coordinate(left, grid_xy[2 * p], q.offset_scale, board[3 * p][lane]);
    y[p] = coordinate(top, grid_xy[2 * p + 1], q.offset_scale, board[3 * p + 1][lane]);
    if (unit < 0) x[p] = -1e30f;  // what does not exist has its samples at no place
    weight[p] = unit < 0 ? 0.0f : board[3 * p + 2][lane];
  }
  if (SOFTMAX) {
    float largest = weight[0], sum = 0.0f;
#pragma unroll
    for (int p = 1; p < POINTS; ++p) largest = fmaxf(largest, weight[p]);
#pragma unroll
    for (int p = 0; p < POINTS; ++p) sum += weight[p] = expf(weight[p] - largest);
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int p = 0; p < POINTS; ++p) weight[p] *= inverse;
  }
  __syncwarp();

  find_products(q, tile, lane, grad_output, value, board);
  __syncwarp();
  float along_weight[POINTS], along_x[POINTS], along_y[POINTS];
  const auto set_along = [&](int p, const Cell& cell, const float(&d)[4]) {
    const float right = cell.right, down = cell.down;
    along_x[p] = (1.0f - down) * (d[1] - d[0]) + down * (d[3] - d[2]);
    along_y[p] = (1.0f - right) * (d[2] - d[0]) + right * (d[3] - d[1]);
    along_weight[p] =
        (1.0f - down) * (d[0] + right * (d[1] - d[0])) + down * (d[2] + right * (d[3] - d[2]));
  };
  uint32_t far = 0;  // the points whose samples count and are not within
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    const Place place = find_place(q, tile, x[p], y[p]);
    float d[4] = {};
    if (place.within) {
      const float* at = &board[place.y * REGION_W + place.x][lane];
      d[0] = at[0];
      d[1] = at[PITCH];
      d[2] = at[REGION_W * PITCH];
      d[3] = at[(REGION_W + 1) * PITCH];
    } else if (place.counts) {
      far |= 1u << p;
    }
    set_along(p, place.cell, d);
  }
#pragma unroll 1
  for (int p = 0; far >> p; ++p) {
    if (!(far >> p & 1u)) continue;
    const Place place = find_place(q, tile, pick(x, p), pick(y, p));
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Corner corner = find_corner(q, tile, place, i);
      d[i] = corner.row >= 0     ? board[corner.row][lane]
             : corner.pixel >= 0 ? product_in_memory(value + corner.pixel, grad)
                                 : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < POINTS; ++i)
      if (i == p) set_along(i, place.cell, d);
  }
  float mean = 0.0f;
#pragma unroll
  for (int p = 0; p < POINTS; ++p) mean += weight[p] * along_weight[p];
  __syncwarp();
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    board[3 * p][lane] = q.offset_scale * weight[p] * along_x[p];
    board[3 * p + 1][lane] = q.offset_scale * weight[p] * along_y[p];
    board[3 * p + 2][lane] = SOFTMAX ? weight[p] * (along_weight[p] - mean) : along_weight[p];
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 32 * POINTS; i += 32) {
    const int to = unit_of(q, tile, i / POINTS), p = i % POINTS;
    if (to < 0) continue;
    Pair pair;
    pair.x = narrow<OFFSET_T>(board[3 * p][i / POINTS]);
    pair.y = narrow<OFFSET_T>(board[3 * p + 1][i / POINTS]);
    *reinterpret_cast<Pair*>(grad_offset + (to * POINTS + p) * 2) = pair;
    grad_mask[to * POINTS + p] = narrow<MASK_T>(board[3 * p + 2][i / POINTS]);
  }
  __syncwarp();

  for (int i = lane; i < ROWS * PITCH / 4; i += 32) reinterpret_cast<Four*>(board)[i] = Four{};
  __syncwarp();
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    const Place place = find_place(q, tile, x[p], y[p]);
    if (!place.within) continue;
    const float right = place.cell.right, down = place.cell.down;
    const float upper = weight[p] * (1.0f - down), lower = weight[p] * down;
    // A row outside of the image may be added to: it is not spread.
    float* at = &board[place.y * REGION_W + place.x][lane];
    at[0] += upper * (1.0f - right);
    at[PITCH] += upper * right;
    at[REGION_W * PITCH] += lower * (1.0f - right);
    at[(REGION_W + 1) * PITCH] += lower * right;
  }
#pragma unroll 1
  for (int p = 0; far >> p; ++p) {
    if (!(far >> p & 1u)) continue;
    const Place place = find_place(q, tile, pick(x, p), pick(y, p));
    const float w = pick(weight, p);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const Corner corner = find_corner(q, tile, place, i);
      const float part = w * (i / 2 ? place.cell.down : 1.0f - place.cell.down) *
                         (i % 2 ? place.cell.right : 1.0f - place.cell.right);
      if (corner.row >= 0) board[corner.row][lane] += part;
      else if (corner.pixel >= 0) add_in_memory(value_sums + corner.pixel, grad, part);
    }
  }
  __syncwarp();
  spread(q, tile, lane, grad_output, board, value_sums);
}
