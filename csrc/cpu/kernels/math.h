// The exponential and the largest of a row, in vectors.
#pragma once

#include <cstdint>

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// e^x to about 1 ulp; 0 below -87.3 (so also for -inf), inf above 88.3; NaN stays NaN.
/// Source: the polynomial of Moshier's Cephes expf.
static inline vf vexp(vf x) {
  const vf bound = vset1(-87.33654f);
  const vf clamped = vmax(bound, vmin(vset1(89.0f), x));  // operand order keeps NaN
  const vf n = vround(vmul(clamped, vset1(1.44269504088896341f)));
  vf r = vfma(n, vset1(-0.693359375f), clamped);
  r = vfma(n, vset1(2.12194440e-4f), r);
  vf p = vset1(1.9875691500e-4f);
  p = vfma(p, r, vset1(1.3981999507e-3f));
  p = vfma(p, r, vset1(8.3334519073e-3f));
  p = vfma(p, r, vset1(4.1665795894e-2f));
  p = vfma(p, r, vset1(1.6666665459e-1f));
  p = vfma(p, r, vset1(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), vadd(r, vset1(1.0f)));
  return vzero_below(x, bound, vmul(p, vpow2(n)));
}

/// The largest element, -inf when there is none. A NaN may go unnoticed: what follows must propagate it.
static inline float row_max(const float* x, int64_t size) {
  const float lowest = -__builtin_inff();
  vf best = vset1(lowest);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) best = vmax(vload(x + i), best);
  if (i < size) best = vmax(vload_n(x + i, size - i, lowest), best);
  return reduce_max(best);
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
