// What a product of few rows and decoding attention take, as kernels of their own (matmul_rows_mma.cu, attention_decode.cu) and as links of
// a chain.
#pragma once

#include "cuda/attention_view.h"
#include "cuda/kernels.h"

namespace llama_ext::cuda {

struct DecodeView {
  AttentionView attention;
  KvRowsView rows;
  int* arrived = nullptr;  // (tokens, K): parts that are there; zeros, before and after
};
void start_attention_decode(const Gpu& gpu, const DecodeView& view);

namespace rows_mma {

struct RowsMmaView {
  ProductView product;
  int tiles;
  int along_k;      // warps that share a tile's k: a block has kWarps / along_k tiles at a time
  int k_shift;      // along_k as a power of two
  int groups;       // of a row, with codes
  int group_shift;  // steps of a group, as a power of two
  bool is_whole;    // rows of x are as long as W's padded ones, and they and the norm's weight lie at 16 bytes
};

/// Of a product of at most rows_of_mma() rows.
RowsMmaView rows_mma_view(const ProductView& product);
/// Shared memory that a block of it needs, as Shared says.
size_t rows_mma_shared_bytes(const ProductView& product);
void start_rows_mma(const Gpu& gpu, const RowsMmaView& view);

}  // namespace rows_mma
}  // namespace llama_ext::cuda
