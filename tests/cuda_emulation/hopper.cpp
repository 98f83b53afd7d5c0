#include "hopper.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "device_memory.h"

namespace cuda_emulation {
namespace {

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

/// A barrier's eight bytes.
struct Phase {
  uint16_t missing;  // arrivals
  uint8_t count;
  uint8_t parity;
  int32_t bytes;  // announced and not yet here, or, negative, here and not yet announced
};
static_assert(sizeof(Phase) == sizeof(uint64_t));

Phase load(const uint64_t* barrier) {
  Phase phase;
  std::memcpy(&phase, barrier, sizeof phase);
  return phase;
}

/// A phase that is complete makes way for the next.
void store(uint64_t* barrier, Phase phase) {
  if (phase.missing == 0 && phase.bytes == 0) {
    phase.missing = phase.count;
    phase.parity ^= 1;
  }
  std::memcpy(barrier, &phase, sizeof phase);
}

/// What lies at the same place of another block's shared memory.
template <typename T>
T* same_in(unsigned char* other_window, T* here) {
  return reinterpret_cast<T*>(other_window + (reinterpret_cast<unsigned char*>(here) - shared_window()));
}

/// The 16-byte vectors of eight rows of 128 bytes lie where three bits of their rows' addresses say.
size_t swizzle(size_t address) { return address ^ (address >> 7 & 7) << 4; }

float number_at(const unsigned char* window, size_t address) {
  uint16_t bits;
  std::memcpy(&bits, window + swizzle(address), sizeof bits);
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

/// An operand in shared memory, as its 64 bits describe it (PTX: matrix descriptor format).
struct Operand {
  const unsigned char* window;
  size_t start;
  size_t leading;  // bytes between columns of 64 numbers, of transposed ones
  size_t stride;   // bytes between eight rows

  explicit Operand(uint64_t description)
      : window(shared_window()),
        start((description & 0x3fff) * 16),
        leading((description >> 16 & 0x3fff) * 16),
        stride((description >> 32 & 0x3fff) * 16) {
    if ((description & ~uint64_t{0x00003fff3fff3fff}) != kSwizzle128)
      fail_launch("an operand that is not swizzled by 128 bytes");
  }
  float of_row(int row, int k) const {
    const size_t byte = static_cast<size_t>(row) / 8 * stride + static_cast<size_t>(row % 8 * 128 + 2 * k);
    return number_at(window, start + byte);
  }
  float across(int k, int column) const {
    const size_t byte = static_cast<size_t>(column) / 64 * leading + static_cast<size_t>(k) / 8 * stride;
    return number_at(window, start + byte + static_cast<size_t>(k % 8 * 128 + column % 64 * 2));
  }
};

void multiply_now(const Product& p) {
  constexpr int kDepth = 16;
  const int warp = static_cast<int>(thread().number / kWarpSize % 4);
  const int g = static_cast<int>(lane() / 4);
  const int t = static_cast<int>(lane() % 4);
  float rows[2][kDepth];
  if (p.fragments != nullptr) {
    struct Fragment {
      uint32_t words[4];
    } mine;
    std::memcpy(mine.words, p.fragments, sizeof mine.words);
    const auto all = exchange("wgmma", mine);
    for (int k = 0; k < kDepth; ++k) {
      const Fragment of_lane = all[static_cast<unsigned>(g * 4 + k % 8 / 2)];
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = of_lane.words[half + k / 8 * 2];
        rows[half][k] = __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
      }
    }
  } else {
    const Operand a(p.a);
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < kDepth; ++k) rows[half][k] = a.of_row(warp * 16 + g + 8 * half, k);
    }
  }
  const Operand b(p.b);
  for (int pair = 0; pair < p.columns / 8; ++pair) {
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * pair + 2 * t + i;
      float numbers[kDepth];
      for (int k = 0; k < kDepth; ++k) numbers[k] = p.is_transposed ? b.across(k, column) : b.of_row(column, k);
      for (int half = 0; half < 2; ++half) {
        float& c = p.c[4 * pair + 2 * half + i];
        float sum = p.adds ? c : 0.0f;
        for (int k = 0; k < kDepth; ++k) sum = std::fma(rows[half][k], numbers[k], sum);
        c = sum;
      }
    }
  }
}

}  // namespace

void init_barrier(uint64_t* barrier, int count) {
  // Every kernel of Hopper's instructions comes by here.
  if (architecture_of_code() < 90) fail_launch("a kernel of Hopper's instructions that was compiled for other GPUs");
  stop_watching();
  const auto all = static_cast<uint8_t>(count);
  store(barrier, {all, all, 0, 0});
}

void arrive_at(uint64_t* barrier, unsigned rank, int bytes) {
  uint64_t* there = same_in(shared_window_of(rank), barrier);
  Phase phase = load(there);
  if (phase.missing == 0) fail_launch("more arrivals at a barrier than it counts");
  --phase.missing;
  phase.bytes += bytes;
  store(there, phase);
}

void wait_barrier(uint64_t* barrier, unsigned parity) {
  while (load(barrier).parity == parity) wait_for_change(barrier, *barrier);
}

void bring_box(const CUtensorMap& map, const int (&first)[3], void* shared, uint64_t* barrier, unsigned mask) {
  const size_t row_bytes = map.box[0] * sizeof(uint16_t);
  const size_t rows = size_t{map.box[1]} * (map.rank > 2 ? map.box[2] : 1);
  auto* here = static_cast<unsigned char*>(shared);
  const auto at = static_cast<size_t>(here - shared_window());
  if (at % 128 != 0) fail_launch("a box for a place that is no multiple of 128 bytes");
  struct Target {
    unsigned char* window;
    uint64_t* barrier;
  };
  std::vector<Target> targets;
  for (unsigned rank = 0; mask >> rank != 0; ++rank) {
    if ((mask >> rank & 1u) == 0) continue;
    unsigned char* window = shared_window_of(rank);
    std::memset(window + at, 0xff, rows * row_bytes);
    targets.push_back({window, same_in(window, barrier)});
  }
  const int begin[3] = {first[0], first[1], first[2]};
  copy_later([=] {
    for (size_t row = 0; row < rows; ++row) {
      const int64_t y = begin[1] + static_cast<int64_t>(row % map.box[1]);
      const int64_t z = begin[2] + static_cast<int64_t>(row / map.box[1]);
      const bool is_row_there = y >= 0 && y < static_cast<int64_t>(map.sizes[1]) &&
                                (map.rank < 3 || (z >= 0 && z < static_cast<int64_t>(map.sizes[2])));
      for (size_t i = 0; i < map.box[0]; ++i) {
        const int64_t x = begin[0] + static_cast<int64_t>(i);
        uint16_t number = 0;
        if (is_row_there && x >= 0 && x < static_cast<int64_t>(map.sizes[0])) {
          const unsigned char* from = map.data + y * static_cast<int64_t>(map.pitches[0]) + x * 2;
          if (map.rank > 2) from += z * static_cast<int64_t>(map.pitches[1]);
          std::memcpy(&number, from, sizeof number);
        }
        for (const Target& target : targets)
          std::memcpy(target.window + swizzle(at + row * row_bytes + i * 2), &number, sizeof number);
      }
    }
    for (const Target& target : targets) {
      Phase phase = load(target.barrier);
      phase.bytes -= static_cast<int32_t>(rows * row_bytes);
      store(target.barrier, phase);
    }
  });
}

void multiply(const Product& product) {
  multiply_later([product] { multiply_now(product); });
}

/// As the driver does: an error for what the copy engine does not take.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
  if (rank < 2 || rank > 3 || reinterpret_cast<uintptr_t>(data) % 16 != 0 || box[0] * sizeof(uint16_t) != 128) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<const unsigned char*>(data), rank, {}, {}, {}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (uint64_t{1} << 32) || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i + 1 == rank) break;
    if (pitches[i] % 16 != 0 || pitches[i] >= (uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    map->pitches[i] = pitches[i];
  }
  return CUDA_SUCCESS;
}

}  // namespace cuda_emulation

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const std::string_view wanted(name);
  *function = wanted == "cuTensorMapEncodeTiled"       ? reinterpret_cast<void*>(&cuda_emulation::encode_tiled)
              : wanted == "cuDevicePrimaryCtxGetState" ? reinterpret_cast<void*>(&cuda_emulation::primary_context_state)
                                                       : nullptr;
  *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
