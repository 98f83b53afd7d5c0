// The tokens that end a sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/errors.h"

namespace llama_ext {

inline void check_eos(const std::vector<int32_t>& eos, int64_t vocabulary) {
  for (int32_t token : eos) {
    require(token >= 0 && token < vocabulary, ErrorKind::kOption, "eos: token id ", token,
            " is outside the vocabulary of ", vocabulary);
  }
}

inline bool contains(const std::vector<int32_t>& eos, int32_t token) {
  return std::find(eos.begin(), eos.end(), token) != eos.end();
}

}  // namespace llama_ext
