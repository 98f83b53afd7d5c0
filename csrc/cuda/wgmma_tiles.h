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

}  // namespace llama_ext::cuda
