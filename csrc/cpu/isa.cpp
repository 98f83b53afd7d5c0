#include "cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>

#include "core/errors.h"

namespace llama_ext {

extern const KernelTable kTable_x86_64_v2;
extern const KernelTable kTable_avx2;
extern const KernelTable kTable_avx2_vnni;
extern const KernelTable kTable_avx512;
extern const KernelTable kTable_avx512_bf16;
extern const KernelTable kTable_amx;

namespace {

struct Features {
  bool sse42 = false, popcnt = false;
  bool avx2 = false, fma = false, f16c = false;
  bool v3_rest = false;  // AVX, MOVBE, BMI1, BMI2, LZCNT: what else x86-64-v3 allows a compiler
  bool avx_vnni = false;
  bool avx512 = false;  // F, BW, CD, DQ, VL: x86-64-v4
  bool avx512_vbmi2 = false, avx512_vnni = false, avx512_bf16 = false;
  bool amx_bf16 = false;
};

uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

/// The kernel only lets a process use AMX that asked for it; the permission holds for all threads and children.
bool request_amx() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Features detect() {
  Features f;
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
  uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return f;
  f.sse42 = (c & bit_SSE4_2) != 0;
  f.popcnt = (c & bit_POPCNT) != 0;
  const bool has_xgetbv = (c & bit_OSXSAVE) != 0;
  const uint64_t saved = has_xgetbv ? read_xcr0() : 0;
  // A feature counts only when the operating system saves its registers.
  const bool saves_ymm = (saved & 0x6) == 0x6;
  const bool saves_zmm = (saved & 0xe6) == 0xe6;
  const bool saves_tiles = (saved & 0x60000) == 0x60000;
  f.fma = saves_ymm && (c & bit_FMA) != 0;
  f.f16c = saves_ymm && (c & bit_F16C) != 0;
  const bool has_avx = saves_ymm && (c & bit_AVX) != 0 && (c & bit_MOVBE) != 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  const uint32_t subleaves = a;
  f.avx2 = saves_ymm && (b & bit_AVX2) != 0;
  const bool has_bmi = (b & bit_BMI) != 0 && (b & bit_BMI2) != 0;
  constexpr uint32_t kV4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  f.avx512 = saves_zmm && (b & kV4) == kV4;
  f.avx512_vbmi2 = f.avx512 && (c & bit_AVX512VBMI2) != 0;
  f.avx512_vnni = f.avx512 && (c & bit_AVX512VNNI) != 0;
  constexpr uint32_t kAmxBf16 = 1u << 22;
  constexpr uint32_t kAmxTile = 1u << 24;
  const bool has_amx = saves_tiles && (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    constexpr uint32_t kAvxVnni = 1u << 4;
    f.avx_vnni = f.avx2 && (a & kAvxVnni) != 0;
    f.avx512_bf16 = f.avx512 && (a & bit_AVX512BF16) != 0;
  }
  f.amx_bf16 = has_amx && f.avx512_bf16 && request_amx();
  const bool has_lzcnt = __get_cpuid(0x80000001u, &a, &b, &c, &d) != 0 && (c & bit_LZCNT) != 0;
  f.v3_rest = has_avx && has_bmi && has_lzcnt;
  return f;
}

const Features& features() {
  static const Features detected = detect();
  return detected;
}

struct Tier {
  const KernelTable* table;
  bool available;
  bool by_default;
};

/// Weakest first.
std::array<Tier, 6> tiers() {
  const Features& f = features();
  const bool v2 = f.sse42 && f.popcnt;
  const bool v3 = v2 && f.avx2 && f.fma && f.f16c && f.v3_rest;
  // VPDPBUSD came to AVX-512 a generation before the CPUs that AVX-512 is worth using on. Without AVX-512, Intel's desktop and mobile
  // processors have had it since 2021.
  const bool v4 = v3 && f.avx512 && f.avx512_vnni;
  const bool bf16 = v4 && f.avx512_bf16;
  // VBMI2 came with Ice Lake and Zen 4.
  const bool fast512 = v4 && f.avx512_vbmi2;
  return {{{&kTable_x86_64_v2, v2, v2},
           {&kTable_avx2, v3, v3},
           {&kTable_avx2_vnni, v3 && f.avx_vnni, v3 && f.avx_vnni},
           {&kTable_avx512, v4, fast512},
           {&kTable_avx512_bf16, bf16, bf16 && fast512},
           {&kTable_amx, bf16 && f.amx_bf16, bf16 && f.amx_bf16}}};
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : tiers()) names.emplace_back(tier.table->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : tiers()) {
    if (tier.available) names.emplace_back(tier.table->name);
  }
  return names;
}

std::string best_isa() {
  std::string best;
  for (const Tier& tier : tiers()) {
    if (tier.by_default) best = tier.table->name;
  }
  require(!best.empty(), ErrorKind::kDevice,
          "this CPU lacks SSE4.2 and POPCNT (x86-64-v2), the least that llama_ext needs");
  return best;
}

std::vector<std::string> cpu_features() {
  const Features& f = features();
  std::vector<std::string> names;
  const auto add = [&](bool has, const char* name) {
    if (has) names.emplace_back(name);
  };
  add(f.sse42, "sse4.2");
  add(f.popcnt, "popcnt");
  add(f.avx2, "avx2");
  add(f.fma, "fma");
  add(f.f16c, "f16c");
  add(f.avx_vnni, "avx_vnni");
  add(f.avx512, "avx512");
  add(f.avx512_vbmi2, "avx512_vbmi2");
  add(f.avx512_vnni, "avx512_vnni");
  add(f.avx512_bf16, "avx512_bf16");
  add(f.amx_bf16, "amx_bf16");
  return names;
}

std::string cpu_name() {
  std::array<uint32_t, 12> words{};
  // An int in Clang's header.
  if (static_cast<uint32_t>(__get_cpuid_max(0x80000000u, nullptr)) < 0x80000004u) return "unknown x86-64";
  for (uint32_t i = 0; i < 3; ++i) {
    __get_cpuid(0x80000002u + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]);
  }
  char text[sizeof words + 1] = {};
  std::memcpy(text, words.data(), sizeof words);
  const std::string name(text);
  const size_t begin = name.find_first_not_of(' ');
  return begin == std::string::npos ? "unknown x86-64" : name.substr(begin);
}

const KernelTable& kernel_table(const std::string& requested) {
  std::string name = requested;
  std::string source = "isa";
  if (name.empty()) {
    if (const char* forced = std::getenv("LLAMA_EXT_ISA"); forced != nullptr && *forced != '\0') {
      name = forced;
      source = "LLAMA_EXT_ISA";
    } else {
      name = best_isa();
    }
  }
  std::string available;
  for (const Tier& tier : tiers()) {
    if (!tier.available) continue;
    if (name == tier.table->name) return *tier.table;
    available += (available.empty() ? "" : ", ") + std::string(tier.table->name);
  }
  fail(ErrorKind::kDevice, source, ": '", name, "' is not available on this machine; available: ", available);
}

}  // namespace llama_ext
