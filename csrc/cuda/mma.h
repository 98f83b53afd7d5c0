// The tensor cores' product of one warp, and copies into shared memory that nobody waits for: instructions on the GPU, plain loops in
// the emulator of the tests.
//
// m16n8k16, `row` and `col`: with g = lane / 4 and t = lane % 4, a lane holds of A (16 x 16) the pairs of k (g, 2t), (g + 8, 2t),
// (g, 2t + 8), (g + 8, 2t + 8); of B (16 x 8) the pairs of k (2t, g), (2t + 8, g); of C the columns 2t and 2t + 1 of rows g
// and g + 8. The lower k of a pair is in the lower half of its word.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/numeric.h"

namespace llama_ext::cuda {

enum class MmaType : uint8_t { kBF16, kF16 };

#if !defined(__CUDA_ARCH__) && defined(LLAMA_EXT_CUDA_EMULATED)
struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
};
template <MmaType kType>
float mma_element(const uint32_t* words, int index) {
  const uint16_t bits = static_cast<uint16_t>(words[index / 2] >> (16 * (index % 2)));
  return kType == MmaType::kBF16 ? from_bf16(bits) : from_f16(bits);
}
#endif

/// c += a b, float32 sums.
template <MmaType kType>
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (kType == MmaType::kBF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = cuda_emulation::exchange("mma", mine);
  const unsigned g = cuda_emulation::lane() / 4;
  const unsigned t = cuda_emulation::lane() % 4;
  float rows[2][16];
  float columns[2][16];
  for (unsigned pair = 0; pair < 8; ++pair) {
    // Pair `pair` of k is the lane's of t = pair % 4, in its lower words for k < 8.
    const MmaOperands of_row = all[g * 4 + pair % 4];
    for (int i = 0; i < 2; ++i) {
      rows[0][2 * pair + i] = mma_element<kType>(of_row.a + 2 * (pair / 4), i);
      rows[1][2 * pair + i] = mma_element<kType>(of_row.a + 2 * (pair / 4) + 1, i);
    }
    for (unsigned column = 0; column < 2; ++column) {
      const MmaOperands of_column = all[(2 * t + column) * 4 + pair % 4];
      for (int i = 0; i < 2; ++i) columns[column][2 * pair + i] = mma_element<kType>(of_column.b + pair / 4, i);
    }
  }
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      float sum = c[2 * row + column];
      for (int k = 0; k < 16; ++k) sum = fmaf(rows[row][k], columns[column][k], sum);
      c[2 * row + column] = sum;
    }
  }
#endif
}

/// c += a b of bytes, exactly: m16n8k32, whose words hold four k where those of mma hold two. a: without a sign; b: with one.
__device__ __forceinline__ void mma_codes(int c[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = cuda_emulation::exchange("mma_codes", mine);
  const unsigned g = cuda_emulation::lane() / 4;
  const unsigned t = cuda_emulation::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned word = 0; word < 8; ++word) {
      const uint32_t codes = all[g * 4 + word % 4].a[2 * (word / 4) + i / 2];
      const uint32_t numbers = all[(2 * t + i % 2) * 4 + word % 4].b[word / 4];
      for (int k = 0; k < 4; ++k) {
        c[i] += static_cast<int>(codes >> (8 * k) & 255u) * static_cast<int8_t>(numbers >> (8 * k) & 255u);
      }
    }
  }
#endif
}

/// sum += the two numbers of 16 bits with a sign times bytes 2 kHalf and 2 kHalf + 1 of `codes`, which have none.
template <int kHalf>
__device__ __forceinline__ int dot_pair(uint32_t numbers, uint32_t codes, int sum) {
#if defined(__CUDA_ARCH__)
  if constexpr (kHalf == 0) {
    asm("dp2a.lo.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(numbers), "r"(codes));
  } else {
    asm("dp2a.hi.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(numbers), "r"(codes));
  }
  return sum;
#else
  const auto product = [&](int i) {
    return static_cast<int16_t>(numbers >> (16 * i) & 65535u) * static_cast<int>(codes >> (16 * kHalf + 8 * i) & 255u);
  };
  return sum + product(0) + product(1);
#endif
}

/// Four matrices of 8 x 8 16-bit numbers from shared memory: lane l names row l % 8 of matrix l / 8, and gets of each matrix its row
/// l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t out[4], const uint16_t* row) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  const auto rows = cuda_emulation::exchange("ldmatrix", row);
  const unsigned mine = cuda_emulation::lane() / 4;
  const unsigned first = cuda_emulation::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    out[i] = static_cast<uint32_t>(rows[8 * i + mine][first]) | static_cast<uint32_t>(rows[8 * i + mine][first + 1])
                                                                    << 16;
  }
#endif
}

/// Four matrices of 8 x 8 16-bit numbers from shared memory, transposed: lane l names row l % 8 of matrix l / 8, and gets of each
/// matrix its column l / 4, rows 2 (l % 4) and the next: operand B of mma, where k runs along rows.
__device__ __forceinline__ void load_transposed(uint32_t out[4], const uint16_t* row) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  const auto rows = cuda_emulation::exchange("ldmatrix", row);
  const unsigned column = cuda_emulation::lane() / 4;
  const unsigned first = cuda_emulation::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    out[i] = static_cast<uint32_t>(rows[8 * i + first][column]) | static_cast<uint32_t>(rows[8 * i + first + 1][column])
                                                                      << 16;
  }
#endif
}

/// 16 bytes of global to shared memory, both aligned to 16; zeros when not `is_there`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_there) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  static const uint4 zeros{0, 0, 0, 0};
  cuda_emulation::copy_async(shared, is_there ? global : &zeros, 16);
#endif
}

/// A number of global to shared memory.
__device__ __forceinline__ void copy_async(float* shared, const float* global) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  cuda_emulation::copy_async(shared, global, sizeof(float));
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  cuda_emulation::commit_copies();
#endif
}

/// Waits for all groups of the calling thread's copies but the last `kPending`; others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  cuda_emulation::wait_for_copies(kPending);
#endif
}

/// Two numbers rounded to bfloat16: the lower half is `low`.
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint32_t>(to_bf16(low)) | static_cast<uint32_t>(to_bf16(high)) << 16;
#endif
}

/// Two whole numbers of at most 8 bits and a sign as bfloat16, exactly: the lower half is `low`.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return (__float_as_uint(low) >> 16) | (__float_as_uint(high) & 0xffff0000u);
}

}  // namespace llama_ext::cuda
