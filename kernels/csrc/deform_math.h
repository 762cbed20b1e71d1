// Where a sample of a deformable convolution lies, and what its corners weigh.
//
// Shared by the CPU kernel and the CUDA kernels, so that tests on the CPU prove the arithmetic of
// both. Plain C++ without any header; GW_INLINE is set by the including file.
//
// A sample lies in the cell [floor(X), floor(X)+1] x [floor(Y), floor(Y)+1], also where X or Y is an
// integer. It counts if -1 <= X < W and -1 <= Y < H; all else, NaN included, contributes nothing.
// At X = -1 its weight is 0, but the right-sided derivative is not.
#pragma once

struct Cell {
  int x0, y0;           // upper left corner; 0 for a sample that does not count
  float right, down;    // distance from it, in [0, 1)
  float inside;         // 1 where the sample counts, else 0
};

GW_INLINE Cell locate(float x, float y, int height, int width) {
  const float floor_x = GW_FLOOR(x), floor_y = GW_FLOOR(y);
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
