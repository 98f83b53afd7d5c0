// Conversions, sums and maxima that kernels share. Kernels are compiled with -fmad=false, and so is the emulator: a product and
// a sum are one operation where fmaf says so, and nowhere else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#if defined(LLAMA_EXT_CUDA_EMULATED)
#include "core/half.h"
#endif

namespace llama_ext::cuda {

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float from_f16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  return f16_to_f32(bits);
#else
  return static_cast<float>(bits);  // the host's pass of nvcc, which never runs it
#endif
}

/// To nearest, ties to even.
__device__ __forceinline__ uint16_t to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  return f32_to_bf16(value);
#else
  return static_cast<uint16_t>(value);
#endif
}

__device__ __forceinline__ uint16_t to_f16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  return f32_to_f16(value);
#else
  return static_cast<uint16_t>(value);
#endif
}

__device__ __forceinline__ float round_to_bf16(float value) { return from_bf16(to_bf16(value)); }

/// A whole number below 2^22 as a float, less `zero` (a float too), in one addition: converting costs four times as much.
__device__ __forceinline__ float code_to_float(uint32_t code, float magic) {
  return __uint_as_float(0x4b000000u | code) - magic;
}
inline constexpr float kCodeMagic = 8388608.0f;  // plus what is to be subtracted

// Sums over lanes in one fixed order: every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
__device__ __forceinline__ double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
/// NaN when any lane has one.
__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = max_or_nan(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

/// Over all threads of a block, in one fixed order; `place`: 32 numbers of shared memory, free again after the next barrier.
template <typename Number>
__device__ __forceinline__ Number block_sum(Number value, Number* place) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) place[threadIdx.x / kWarp] = value;
  __syncthreads();
  Number sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += place[warp];
  __syncthreads();
  return sum;
}
__device__ __forceinline__ float block_max(float value, float* place) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) place[threadIdx.x / kWarp] = value;
  __syncthreads();
  float largest = place[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) largest = max_or_nan(largest, place[warp]);
  __syncthreads();
  return largest;
}

inline constexpr float kLog2E = 1.4426950408889634f;
/// 2^x, and e^x, where 16 bits are kept of it: one instruction, and two.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2E); }

__device__ __forceinline__ float silu(float z) { return z / (1.0f + expf(-z)); }

/// quant/kv_row.h's scale of a head of one position, from its largest magnitude.
__device__ __forceinline__ float kv_scale(float largest) {
  if (!(largest <= 3.4028235e38f)) return __uint_as_float(0x7fc00000u);
  if (largest < 1e-30f) return 0.0f;
  return __uint_as_float((__float_as_uint(largest / 127.0f) + 0xffu) & ~0xffu);
}
/// Its code of x, with inverse = 1 / scale.
__device__ __forceinline__ int kv_code(float x, float inverse) {
  const float code = (x * inverse + 12582912.0f) - 12582912.0f;
  return static_cast<int>(fminf(fmaxf(code, -127.0f), 127.0f));
}

/// 2^n that brings `largest` to [2^14, 2^15), or as near as float32 can; 1 for what is zero or not finite.
__device__ __forceinline__ float power_for_f16(float largest) {
  if (!(largest > 0.0f && largest <= 3.4028235e38f)) return 1.0f;
  const int wanted = 14 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127);
  return __uint_as_float(static_cast<uint32_t>(min(wanted, 100) + 127) << 23);
}

}  // namespace llama_ext::cuda
