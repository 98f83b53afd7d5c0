// The oracle: every operation as plain loops in float64, rounded once when it is written. Never optimised.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace llama_ext {

std::unique_ptr<Backend> make_reference_backend();

}  // namespace llama_ext
