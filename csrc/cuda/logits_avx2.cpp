// The passes over logits for a CPU that has AVX2: compiled with it, and without anything that the linker could give to others.
#include "cuda/logits_avx2.h"

namespace llama_ext::cuda {
namespace {

int64_t argmax(const float* logits, int64_t size) {
  // Two loops without branches in them, so that they are made of vectors.
  float largest = -__builtin_inff();
  int bad = 0;
  for (int64_t i = 0; i < size; ++i) {
    bad |= logits[i] <= 0x1.fffffep127f ? 0 : 1;
    largest = logits[i] > largest ? logits[i] : largest;
  }
  if (bad != 0) return -1;
  int64_t at = 0;
  while (logits[at] != largest) ++at;
  return at;
}

double exp_sum(const float* logits, int64_t size, float largest) { return exp_sum_in_lanes(logits, size, largest); }

void weights(double* x, int64_t size, double largest, double temperature) {
  weights_in_place(x, size, largest, temperature);
}

constexpr LogitsLoops kLoops = {argmax, exp_sum, weights};

}  // namespace

const LogitsLoops& avx2_logits_loops() { return kLoops; }

}  // namespace llama_ext::cuda
