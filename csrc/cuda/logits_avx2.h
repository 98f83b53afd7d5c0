#pragma once

#include "ops/logits_loops.h"

namespace llama_ext::cuda {

/// With AVX2; the same bits as the plain ones.
const LogitsLoops& avx2_logits_loops();

}  // namespace llama_ext::cuda
