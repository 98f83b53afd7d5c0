// What csrc/cuda/wgmma.h has for sm_90a, emulated: the same functions. Barriers count arrivals and bytes; the copy engine brings a box when
// no thread can go on, and what it will overwrite is NaN from the moment that it is asked; products are made when they are waited
// for, from what shared memory holds then, or, where turns go backward, when they are asked for. Places in shared memory are
// swizzled by their addresses, as the hardware does, and operands are read as their descriptions say.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cuda_emulation {

void init_barrier(uint64_t* barrier, int count);
/// At the barrier of that name in block `rank` of the cluster.
void arrive_at(uint64_t* barrier, unsigned rank, int bytes);
void wait_barrier(uint64_t* barrier, unsigned parity);
void bring_box(const CUtensorMap& map, const int (&first)[3], void* shared, uint64_t* barrier, unsigned mask);

/// c (64, columns) of a warpgroup = or += a b. a: a description, or fragments of a warp's 16 rows.
struct Product {
  float* c;
  int columns;
  uint64_t a;
  const uint32_t* fragments;  // or null
  uint64_t b;
  bool is_transposed;  // b
  bool adds;
};
void multiply(const Product& product);

}  // namespace cuda_emulation

namespace llama_ext::cuda {

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - cuda_emulation::shared_window());
}

inline void init_barrier(uint64_t* barrier, int count) { cuda_emulation::init_barrier(barrier, count); }
inline void publish_barriers() {}
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  cuda_emulation::arrive_at(barrier, cuda_emulation::cluster_rank(), bytes);
}
inline void arrive(uint64_t* barrier) { cuda_emulation::arrive_at(barrier, cuda_emulation::cluster_rank(), 0); }
inline void arrive_at(uint64_t* barrier, uint32_t rank) { cuda_emulation::arrive_at(barrier, rank, 0); }
inline void wait_barrier(uint64_t* barrier, uint32_t parity) { cuda_emulation::wait_barrier(barrier, parity); }

inline void sync_warps(int barrier, int count) { cuda_emulation::meet_at(barrier, static_cast<unsigned>(count), true); }
inline void arrive_warps(int barrier, int count) {
  cuda_emulation::meet_at(barrier, static_cast<unsigned>(count), false);
}
inline void publish_stores() {}
inline uint32_t cluster_rank() { return cuda_emulation::cluster_rank(); }
inline void sync_cluster() { cuda_emulation::sync_cluster(); }

template <bool kIsMulticast>
inline void bring_box(const CUtensorMap* map, int column, int row, void* shared, uint64_t* barrier, uint16_t mask) {
  const unsigned here = 1u << cuda_emulation::cluster_rank();
  cuda_emulation::bring_box(*map, {column, row, 0}, shared, barrier, kIsMulticast ? mask : here);
}
inline void bring_box(const CUtensorMap* map, int column, int row, int matrix, void* shared, uint64_t* barrier) {
  cuda_emulation::bring_box(*map, {column, row, matrix}, shared, barrier, 1u << cuda_emulation::cluster_rank());
}
inline void prefetch_map(const CUtensorMap*) {}
template <int kCount>
inline void give_registers() {
  cuda_emulation::have_registers(kCount);
}
template <int kCount>
inline void take_registers() {
  cuda_emulation::have_registers(kCount);
}

inline void fence_products() {}
inline void commit_products() { cuda_emulation::commit_products(); }
template <int kPending>
inline void wait_for_products() {
  cuda_emulation::wait_for_products(kPending);
  cuda_emulation::exchange("wgmma.wait_group", 0);  // a warp's lanes are done together
}
template <int kColumns>
inline void product_of_tiles(float (&c)[kColumns / 2], uint64_t a, uint64_t b, bool adds) {
  cuda_emulation::multiply({c, kColumns, a, nullptr, b, false, adds});
}
template <int kColumns, bool kIsTransposed>
inline void product_of_registers(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool adds) {
  cuda_emulation::multiply({c, kColumns, 0, a, b, kIsTransposed, adds});
}

}  // namespace llama_ext::cuda
