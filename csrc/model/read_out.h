// What a model would say if its layers ended here.
#pragma once

#include "model/transformer.h"

namespace llama_ext {

/// The final norm and the head: logits of rows of the residual stream, with the bits of forward()'s where the rows are those that
/// its last layer leaves: any of them on a CPU, all of a pass on a GPU, or 128 after 128 from its first on. x: (rows, C), logits: (rows, V; a classifier's labels), f32, host memory, row-major. Logits may be infinite or
/// NaN. Throws OutOfMemoryError, Interrupted.
void read_out(const Model& model, const float* x, int64_t rows, float* logits);

}  // namespace llama_ext
