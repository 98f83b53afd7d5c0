// Hopper's own instructions: products of a warpgroup (wgmma) on operands in shared memory, what a copy engine brings there
// (TMA), and the barriers that count its bytes. Machine code for sm_90a alone; other targets see nothing of it, and the emulator has
// functions of the same names (hopper.h).
//
// Operands are tiles of rows of 64 numbers (k) of 16 bits: 128 bytes, whose eight vectors of 16 are swizzled by the row's number, as
// the copy engine writes them (CU_TENSOR_MAP_SWIZZLE_128B). A tile begins at a multiple of 1024 bytes.
//
// m64nNk16: warp w of the four has rows 16 w to 16 w + 15 of C; with g = lane / 4 and t = lane % 4, and for each 8 columns j, a lane
// holds in c[4 j ...] the columns 8 j + 2 t and the next of row g, then those of row g + 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LLAMA_EXT_CUDA_EMULATED)
#define LLAMA_EXT_HAS_WGMMA 1
#endif

#if defined(LLAMA_EXT_CUDA_EMULATED)
#include <hopper.h>
#elif defined(LLAMA_EXT_HAS_WGMMA)
namespace llama_ext::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Barriers in shared memory. A phase ends when `count` arrivals and all announced bytes have come.

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/// Before a barrier of the cluster, so that others and the copy engine see initialised barriers.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// At the barrier of the same name in block `rank` of the cluster. Orders no ordinary memory between blocks: that would be a fence of
/// the whole GPU, a microsecond each.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
/// Waits for the end of the phase of that parity.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barriers of some warps of a block by number, 1 to 15: `count` threads sync or arrive.
__device__ __forceinline__ void sync_warps(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive_warps(int barrier, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
/// Before a barrier, so that the tensor cores and the copy engine see what the calling thread has stored in shared memory.
__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of all blocks of the cluster.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/// Brings a box of a matrix (first column, first row) to the same place in every block of the cluster that `mask` has a bit for,
/// and its bytes to their barriers. Called by one thread.
template <bool kIsMulticast>
__device__ __forceinline__ void bring_box(const void* map, int column, int row, void* shared, uint64_t* barrier,
                                          uint16_t mask) {
  if constexpr (kIsMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(mask)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
  }
}
/// The same of a stack of matrices, for this block alone.
__device__ __forceinline__ void bring_box(const void* map, int column, int row, int matrix, void* shared,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Registers that a warpgroup has: all four warps ask.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits for all groups of products but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers of c as operands of the instruction.
#define LLAMA_EXT_F4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define LLAMA_EXT_F16(c, i) LLAMA_EXT_F4(c, i), LLAMA_EXT_F4(c, i + 4), LLAMA_EXT_F4(c, i + 8), LLAMA_EXT_F4(c, i + 12)
#define LLAMA_EXT_F32(c, i) LLAMA_EXT_F16(c, i), LLAMA_EXT_F16(c, i + 16)

/// c = a b, or c += a b: one instruction of the warpgroup, bfloat16 operands. c is in use until wait_for_products().
template <int kColumns>
__device__ __forceinline__ void product_of_tiles(float (&c)[kColumns / 2], uint64_t a, uint64_t b, bool adds) {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128 || kColumns == 192 || kColumns == 256);
  if constexpr (kColumns == 32) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "%16, %17, p, 1, 1, 0, 0;\n}"
        : LLAMA_EXT_F16(c, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  } else if constexpr (kColumns == 64) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : LLAMA_EXT_F32(c, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  } else if constexpr (kColumns == 128) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : LLAMA_EXT_F32(c, 0), LLAMA_EXT_F32(c, 32)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  } else if constexpr (kColumns == 192) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95}, "
        "%96, %97, p, 1, 1, 0, 0;\n}"
        : LLAMA_EXT_F32(c, 0), LLAMA_EXT_F32(c, 32), LLAMA_EXT_F32(c, 64)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  } else if constexpr (kColumns == 256) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
        "%128, %129, p, 1, 1, 0, 0;\n}"
        : LLAMA_EXT_F32(c, 0), LLAMA_EXT_F32(c, 32), LLAMA_EXT_F32(c, 64), LLAMA_EXT_F32(c, 96)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  }
}

/// The same with a in registers, as mma.h lays it out for the warp's 16 rows. kIsTransposed: b is a transposed_operand().
template <int kColumns, bool kIsTransposed>
__device__ __forceinline__ void product_of_registers(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                                     bool adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  if constexpr (kColumns == 64) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
        : LLAMA_EXT_F32(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), "n"(kIsTransposed ? 1 : 0));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
        : LLAMA_EXT_F32(c, 0), LLAMA_EXT_F32(c, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), "n"(kIsTransposed ? 1 : 0));
  }
}
#undef LLAMA_EXT_F4
#undef LLAMA_EXT_F16
#undef LLAMA_EXT_F32

}  // namespace llama_ext::cuda
#endif

#if defined(LLAMA_EXT_HAS_WGMMA)
namespace llama_ext::cuda {

/// What wgmma takes for an operand: rows of 128 bytes, swizzled, groups of eight rows 1024 bytes apart. k advances by 32 bytes
/// for 16 numbers: 2 in these units.
__device__ __forceinline__ uint64_t operand(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupOfRows = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kGroupOfRows | kUnused | ((shared_address(tile) & 0x3ffff) / 16);
}
inline constexpr uint64_t kOperandStep = 2;
/// An operand b whose rows are k and whose 64 numbers are columns; the next 64 columns come `bytes` later. k advances by 16 rows.
__device__ __forceinline__ uint64_t transposed_operand(const void* tile, int bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupOfRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kGroupOfRows | (static_cast<uint64_t>(bytes / 16) << 16) |
         ((shared_address(tile) & 0x3ffff) / 16);
}
inline constexpr uint64_t kTransposedStep = 2048 / 16;

}  // namespace llama_ext::cuda
#endif
