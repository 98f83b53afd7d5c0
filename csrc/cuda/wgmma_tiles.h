// How matmul_wgmma.cu cuts a product into tiles, and in which order they are made: index arithmetic that hosts and kernels share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llama_ext::cuda {

/// Rows of x in a tile: 64 for each of two warpgroups.
inline constexpr int kTileRows = 128;
/// k of a stage: 128 bytes, the width of a swizzled row.
inline constexpr int kTileDepth = 64;
/// Rows of tiles that share their columns before the next columns come, so that x stays in the L2 cache.
inline constexpr int kBandRows = 2048;

/// Where the copy engine puts a vector of 8 numbers of a row of 64, and the tensor cores look for it.
__host__ __device__ constexpr int swizzled_byte(int row, int vector) { return row * 128 + (vector ^ row % 8) * 16; }

/// Tiles of (rows x columns), `high` of them stacked for a cluster.
struct TileGrid {
  int row_groups = 0;  // of `high` tiles
  int columns = 0;     // of tiles
  int band = 1;        // row groups

  __host__ __device__ int count() const { return row_groups * columns; }
};
struct TilePlace {
  int row_group;
  int column;
};

__host__ __device__ inline TileGrid tile_grid(int64_t rows, int64_t columns, int high, int tile_columns) {
  TileGrid grid;
  grid.row_groups = static_cast<int>((rows + high * kTileRows - 1) / (high * kTileRows));
  grid.columns = static_cast<int>((columns + tile_columns - 1) / tile_columns);
  grid.band = kBandRows / (high * kTileRows);
  return grid;
}

/// Down the rows of a band, then the next column of tiles, then the next band.
__host__ __device__ inline TilePlace tile_place(const TileGrid& grid, int index) {
  const int per_band = grid.band * grid.columns;
  const int first = index / per_band * grid.band;
  const int height = grid.row_groups - first < grid.band ? grid.row_groups - first : grid.band;
  const int rest = index % per_band;
  return {first + rest % height, rest / height};
}

/// A block's tile has kTileRows x columns numbers; `cluster` of them, one below the other, share the weights.
struct TileShape {
  int columns;
  int cluster;
  int cycles;  // of a step of kTileDepth k, about
};
inline constexpr TileShape kTileShapes[] = {{256, 2, 1100}, {192, 2, 850}, {128, 2, 640}, {128, 1, 720}, {64, 1, 450}};
inline constexpr int kTileShapeCount = sizeof(kTileShapes) / sizeof(kTileShapes[0]);
/// Of storing 128 x 64 numbers, and of what a tile takes however large it is.
inline constexpr int kCyclesPerStore = 1000;
inline constexpr int kCyclesPerTile = 1500;

/// The shape (index into kTileShapes) that makes a product in the least time: the last tiles should leave few multiprocessors idle.
inline int choose_tile_shape(int64_t rows, int64_t columns, int steps, int multiprocessors) {
  int best = 0;
  int64_t least = 0;
  for (int i = 0; i < kTileShapeCount; ++i) {
    const TileShape& shape = kTileShapes[i];
    const int64_t tiles = tile_grid(rows, columns, shape.cluster, shape.columns).count();
    const int64_t at_once = multiprocessors / shape.cluster > 0 ? multiprocessors / shape.cluster : 1;
    const int64_t rounds = (tiles + at_once - 1) / at_once;
    const int64_t cycles =
        rounds * (int64_t{steps} * shape.cycles + shape.columns / 64 * kCyclesPerStore + kCyclesPerTile);
    if (i == 0 || cycles < least) {
      best = i;
      least = cycles;
    }
  }
  return best;
}

}  // namespace llama_ext::cuda
