// Which instruction sets this machine and this build have, and which one to use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace llama_ext {

/// Tiers compiled into this build, weakest first: "x86-64-v2", "avx2", "avx2-vnni", "avx512", "avx512-bf16", "amx".
std::vector<std::string> compiled_isas();

/// Those of them that this CPU and operating system can run (CPUID, XGETBV and, for AMX, the kernel's permission).
std::vector<std::string> available_isas();

/// The strongest available tier that is worth using: AVX-512 counts only from Ice Lake and Zen 4 on, as earlier CPUs lower their
/// clock for it by more than it gains.
std::string best_isa();

/// What the CPU says it has, among the features the tiers look at; for reports.
std::vector<std::string> cpu_features();
std::string cpu_name();

/// The kernels of a tier: `requested`, or else LLAMA_EXT_ISA, or else best_isa(). Throws DeviceError, listing what there is,
/// for a name that is not available.
const KernelTable& kernel_table(const std::string& requested);

}  // namespace llama_ext
