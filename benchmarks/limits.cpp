// What this machine allows: the rate at which memory is read, and the peak rate of each multiply-add instruction.
//
// Usage: limits [--threads 1,2,...] [--bytes N] [--seconds S] [--only read]
// Prints one JSON object. Every rate is the best of several short rounds, because a neighbour can only slow a round
// down. The loops over instructions are assembly, so no compiler folds or spills them; what is written with intrinsics
// carries its own target attribute. Each runs only after a CPUID and XGETBV check, so no -march is needed.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

volatile uint64_t g_sink;

// ------------------------------------------------------------------------------------------------- the processor

struct Features {
  bool avx2_fma = false, avx_vnni = false, avx512 = false, vnni = false, bf16 = false, amx_bf16 = false,
       amx_int8 = false;
};

Features detect() {
  Features f;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return f;
  const bool fma = (c & bit_FMA) != 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_ymm = (low & 0x6) == 0x6;
  const bool saves_zmm = (low & 0xe6) == 0xe6;
  const bool saves_tiles = (low & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  const uint32_t subleaves = a;
  constexpr uint32_t kV4 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  f.avx2_fma = saves_ymm && fma && (b & bit_AVX2) != 0;
  f.avx512 = saves_zmm && (b & kV4) == kV4;
  f.vnni = f.avx512 && (c & bit_AVX512VNNI) != 0;
  bool tiles = saves_tiles && (d & (1u << 24)) != 0;
  // Linux lets only those use AMX that have asked for it.
  if (tiles) tiles = syscall(SYS_arch_prctl, 0x1023L, 18L) == 0;
  f.amx_bf16 = tiles && (d & (1u << 22)) != 0;
  f.amx_int8 = tiles && (d & (1u << 25)) != 0;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    f.avx_vnni = f.avx2_fma && (a & (1u << 4)) != 0;
    f.bf16 = f.avx512 && (a & bit_AVX512BF16) != 0;
  }
  return f;
}

// ---------------------------------------------------------------------------------------------------- arithmetic
//
// Each function issues `rounds` (even) times twelve instructions, of which twelve are independent, with 512 bits 24: enough
// for the latency of two pipes (8 to 12 in flight; twelve alone left 6% of VDPBF16PS on Zen 5, which takes six cycles). The
// whole loop is assembly with named registers, because a compiler may keep an array of them in memory.

constexpr double kInstructions = 12;

#define LLAMA_EXT_TWELVE(op, from, to)                                                                             \
  op from to "0\n" op from to "1\n" op from to "2\n" op from to "3\n" op from to "4\n" op from to "5\n" op from to \
             "6\n" op from to "7\n" op from to "8\n" op from to "9\n" op from to "10\n" op from to "11\n"

#define LLAMA_EXT_CLOBBERED                                                                                         \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15"

/// SSE has no fused multiply-add: six multiplications and six additions.
void mul_add_128(int64_t rounds) {
  const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  __asm__ volatile(
      "movups %1, %%xmm14\n"
      LLAMA_EXT_TWELVE("movups ", "%%xmm14, ", "%%xmm")
      "1:\n"
      "mulps %%xmm14, %%xmm0\n addps %%xmm14, %%xmm1\n mulps %%xmm14, %%xmm2\n addps %%xmm14, %%xmm3\n"
      "mulps %%xmm14, %%xmm4\n addps %%xmm14, %%xmm5\n mulps %%xmm14, %%xmm6\n addps %%xmm14, %%xmm7\n"
      "mulps %%xmm14, %%xmm8\n addps %%xmm14, %%xmm9\n mulps %%xmm14, %%xmm10\n addps %%xmm14, %%xmm11\n"
      "dec %0\n jnz 1b\n"
      : "+r"(rounds)
      : "m"(one)
      : LLAMA_EXT_CLOBBERED);
}

// The operands are 0.0115 in float32 and in bfloat16, 60 in int8: ordinary numbers, nothing denormal.
// clang-format off
#define LLAMA_EXT_VECTOR_PEAK(name, instruction, registers)                                                     \
  void name(int64_t rounds) {                                                                                   \
    const uint32_t pattern = 0x3c3c3c3c;                                                                        \
    __asm__ volatile(                                                                                           \
        "vpbroadcastd %1, %%" registers "14\n"                                                                  \
        "vpbroadcastd %1, %%" registers "15\n"                                                                  \
        "vxorps %%xmm13, %%xmm13, %%xmm13\n"                                                                    \
        LLAMA_EXT_TWELVE("vxorps ", "%%xmm13, %%xmm13, ", "%%xmm")                                               \
        "1:\n"                                                                                                  \
        LLAMA_EXT_TWELVE(instruction " ", "%%" registers "14, %%" registers "15, ", "%%" registers)             \
        "dec %0\n jnz 1b\n vzeroupper\n"                                                                        \
        : "+r"(rounds)                                                                                          \
        : "m"(pattern)                                                                                          \
        : LLAMA_EXT_CLOBBERED);                                                                                 \
  }
// clang-format on

LLAMA_EXT_VECTOR_PEAK(fma_128, "vfmadd231ps", "xmm")
LLAMA_EXT_VECTOR_PEAK(fma_256, "vfmadd231ps", "ymm")
LLAMA_EXT_VECTOR_PEAK(int8_dot_256, "%{vex%} vpdpbusd", "ymm")

// clang-format off
#define LLAMA_EXT_TWELVE_MORE(op, from, to)                                                                          \
  op from to "16\n" op from to "17\n" op from to "18\n" op from to "19\n" op from to "20\n" op from to "21\n" op from to \
             "22\n" op from to "23\n" op from to "24\n" op from to "25\n" op from to "26\n" op from to "27\n"

#define LLAMA_EXT_PEAK_512(name, instruction)                                                                        \
  __attribute__((target("avx512f"))) void name(int64_t rounds) {                                                \
    const uint32_t pattern = 0x3c3c3c3c;                                                                        \
    __asm__ volatile(                                                                                           \
        "vpbroadcastd %1, %%zmm14\n"                                                                            \
        "vpbroadcastd %1, %%zmm15\n"                                                                            \
        "vpxord %%zmm13, %%zmm13, %%zmm13\n"                                                                    \
        LLAMA_EXT_TWELVE("vmovaps ", "%%zmm13, ", "%%zmm")                                                       \
        LLAMA_EXT_TWELVE_MORE("vmovaps ", "%%zmm13, ", "%%zmm")                                                  \
        "1:\n"                                                                                                  \
        LLAMA_EXT_TWELVE(instruction " ", "%%zmm14, %%zmm15, ", "%%zmm")                                         \
        LLAMA_EXT_TWELVE_MORE(instruction " ", "%%zmm14, %%zmm15, ", "%%zmm")                                    \
        "sub $2, %0\n jg 1b\n vzeroupper\n"                                                                    \
        : "+r"(rounds)                                                                                          \
        : "m"(pattern)                                                                                          \
        : LLAMA_EXT_CLOBBERED, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", \
          "xmm26", "xmm27");                                                                                    \
  }
// clang-format on

LLAMA_EXT_PEAK_512(fma_512, "vfmadd231ps")
LLAMA_EXT_PEAK_512(bf16_512, "vdpbf16ps")
LLAMA_EXT_PEAK_512(int8_512, "vpdpbusd")

// What AVX2 has for whole numbers takes two instructions: products of neighbours, added in pairs, and their addition to
// the sum. The product goes to one register by turns with another, which renaming makes as many as are needed.
// clang-format off
#define LLAMA_EXT_PAIR(product, add, to, sum)            \
  product " %%ymm14, %%ymm15, %%ymm" to "\n"             \
  add " %%ymm" to ", %%ymm" sum ", %%ymm" sum "\n"
#define LLAMA_EXT_TWO_PAIRS(product, add, even, odd) \
  LLAMA_EXT_PAIR(product, add, "12", even) LLAMA_EXT_PAIR(product, add, "13", odd)
#define LLAMA_EXT_PAIR_PEAK(name, product, add)                                                                  \
  void name(int64_t rounds) {                                                                                   \
    const uint32_t pattern = 0x3c3c3c3c;                                                                        \
    __asm__ volatile(                                                                                           \
        "vpbroadcastd %1, %%ymm14\n"                                                                            \
        "vpbroadcastd %1, %%ymm15\n"                                                                            \
        "vxorps %%xmm13, %%xmm13, %%xmm13\n"                                                                    \
        LLAMA_EXT_TWELVE("vxorps ", "%%xmm13, %%xmm13, ", "%%xmm")                                               \
        "1:\n"                                                                                                  \
        LLAMA_EXT_TWO_PAIRS(product, add, "0", "1") LLAMA_EXT_TWO_PAIRS(product, add, "2", "3")                 \
        LLAMA_EXT_TWO_PAIRS(product, add, "4", "5") LLAMA_EXT_TWO_PAIRS(product, add, "6", "7")                 \
        LLAMA_EXT_TWO_PAIRS(product, add, "8", "9") LLAMA_EXT_TWO_PAIRS(product, add, "10", "11")               \
        "dec %0\n jnz 1b\n vzeroupper\n"                                                                       \
        : "+r"(rounds)                                                                                          \
        : "m"(pattern)                                                                                          \
        : LLAMA_EXT_CLOBBERED);                                                                                 \
  }
// clang-format on

/// int16 by int16 into int32: any 8-bit codes, exactly.
LLAMA_EXT_PAIR_PEAK(int8_madd_256, "vpmaddwd", "vpaddd")
/// uint8 by int8 into int16: twice as many, where a sum of several products fits into 16 bits (codes of 4 bits).
LLAMA_EXT_PAIR_PEAK(int8_maddubs_256, "vpmaddubsw", "vpaddw")

/// Eight 16 x 64-byte tiles: six accumulators, enough for the latency of 52 cycles at one product per 16, and two
/// operands.
__attribute__((target("amx-tile"))) void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) uint8_t operand[1024];
  std::memset(operand, 0x3c, sizeof operand);
  // Not _tile_loadconfig: g++ 12 tells the optimiser of 8 bytes of its operand only, and the rest may never be written.
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  __asm__ volatile("" : : "r"(operand) : "memory");
  _tile_loadd(6, operand, 64);
  _tile_loadd(7, operand, 64);
}

// clang-format off
#define LLAMA_EXT_TILE_PEAK(name, isa, product)                         \
  __attribute__((target("amx-tile," isa))) void name(int64_t rounds) {  \
    configure_tiles();                                                  \
    for (int64_t i = 0; i < rounds; ++i) {                              \
      product(0, 6, 7);                                                 \
      product(1, 6, 7);                                                 \
      product(2, 6, 7);                                                 \
      product(3, 6, 7);                                                 \
      product(4, 6, 7);                                                 \
      product(5, 6, 7);                                                 \
    }                                                                   \
    _tile_release();                                                    \
  }
// clang-format on

LLAMA_EXT_TILE_PEAK(bf16_amx, "amx-bf16", _tile_dpbf16ps)
LLAMA_EXT_TILE_PEAK(int8_amx, "amx-int8", _tile_dpbusd)

struct Peak {
  const char* name;
  bool available;
  void (*run)(int64_t rounds);
  double operations;  // of one round: a multiply-add is two
};

std::vector<Peak> peaks(const Features& f) {
  constexpr double kVector = 2 * kInstructions;  // times the elements of a register
  return {
      {"f32_mul_add_128", true, mul_add_128, kInstructions * 4},
      {"f32_fma_128", f.avx2_fma, fma_128, kVector * 4},
      {"f32_fma_256", f.avx2_fma, fma_256, kVector * 8},
      {"f32_fma_512", f.avx512, fma_512, kVector * 16},
      {"bf16_dot_512", f.bf16, bf16_512, kVector * 32},
      {"bf16_amx", f.amx_bf16, bf16_amx, 2.0 * 6 * 16 * 16 * 32},
      {"int8_madd_256", f.avx2_fma, int8_madd_256, kVector * 16},
      {"int8_maddubs_256", f.avx2_fma, int8_maddubs_256, kVector * 32},
      {"int8_dot_256", f.avx_vnni, int8_dot_256, kVector * 32},
      {"int8_dot_512", f.vnni, int8_512, kVector * 64},
      {"int8_amx", f.amx_int8, int8_amx, 2.0 * 6 * 16 * 16 * 64},
  };
}

// -------------------------------------------------------------------------------------------------------- memory
//
// Each thread reads its own part with the widest loads there are, from front to back. How many streams at once and
// whether software prefetching help differs from machine to machine, so several ways are tried; the best counts.

struct Way {
  int64_t streams;  // places of its part that a thread reads by turns
  int64_t ahead;    // bytes to prefetch ahead; 0: leave it to the hardware
};

constexpr Way kWays[] = {{1, 0}, {1, 4096}, {4, 0}, {4, 1024}};
constexpr int64_t kBlock = 4 * 64;

// clang-format off
#define LLAMA_EXT_READER(name, isa, Vector, load, combine)                                           \
  __attribute__((target(isa))) void name(const char* begin, int64_t bytes, Way way) {                \
    constexpr int kLoads = static_cast<int>(kBlock / sizeof(Vector));                                \
    const int64_t stride = bytes / way.streams;                                                      \
    Vector sums[4] = {};                                                                             \
    for (int64_t i = 0; i < stride; i += kBlock) {                                                   \
      for (int64_t stream = 0; stream < way.streams; ++stream) {                                     \
        const char* block = begin + stream * stride + i;                                             \
        if (way.ahead > 0) {                                                                         \
          _Pragma("GCC unroll 4") for (int k = 0; k < 4; ++k) {                                      \
            _mm_prefetch(block + way.ahead + 64 * k, _MM_HINT_T0);                                   \
          }                                                                                          \
        }                                                                                            \
        _Pragma("GCC unroll 16") for (int k = 0; k < kLoads; ++k) {                                  \
          const char* from = block + k * static_cast<int64_t>(sizeof(Vector));                       \
          sums[k % 4] = combine(sums[k % 4], load(reinterpret_cast<const Vector*>(from)));           \
        }                                                                                            \
      }                                                                                              \
    }                                                                                                \
    uint64_t words[4 * sizeof(Vector) / 8];                                                          \
    std::memcpy(words, sums, sizeof sums);                                                           \
    for (uint64_t word : words) g_sink = word;                                                       \
  }
// clang-format on

LLAMA_EXT_READER(read_128, "sse2", __m128i, _mm_load_si128, _mm_xor_si128)
LLAMA_EXT_READER(read_256, "avx2", __m256i, _mm256_load_si256, _mm256_xor_si256)
LLAMA_EXT_READER(read_512, "avx512f", __m512i, _mm512_load_si512, _mm512_xor_si512)

using Reader = void (*)(const char* begin, int64_t bytes, Way way);

class Buffer {
 public:
  Buffer(int64_t bytes, int threads) : bytes_(bytes) {
    void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      std::fprintf(stderr, "limits: cannot allocate %lld bytes\n", static_cast<long long>(bytes));
      std::exit(1);
    }
    huge_pages_ = madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE) == 0;
    data_ = static_cast<char*>(data);
    // Whoever touches a page first decides which memory node it is on.
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([=, this] { std::memset(part(t, threads), 1, static_cast<size_t>(part_bytes(threads))); });
    }
    for (std::thread& worker : workers) worker.join();
  }
  ~Buffer() { munmap(data_, static_cast<size_t>(bytes_)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t part_bytes(int threads) const { return bytes_ / threads / 16384 * 16384; }
  char* part(int index, int threads) const { return data_ + index * part_bytes(threads); }
  bool huge_pages() const { return huge_pages_; }

 private:
  int64_t bytes_;
  char* data_ = nullptr;
  bool huge_pages_ = false;
};

// -------------------------------------------------------------------------------------------------------- timing

/// Seconds from the first thread's start to the last one's end, the best of the rounds that fit into `budget` (at least
/// three). The threads live through all rounds, so starting them costs no round anything.
double best_seconds(int threads, double budget, const std::function<void(int)>& work) {
  std::vector<double> begin(static_cast<size_t>(threads)), end(static_cast<size_t>(threads));
  std::barrier gate(threads);
  double best = 1e300;
  bool again = true;
  const double started = now();
  const auto loop = [&](int t) {
    const size_t index = static_cast<size_t>(t);
    for (int round = 1;; ++round) {
      gate.arrive_and_wait();
      if (!again) return;
      begin[index] = now();
      work(t);
      end[index] = now();
      gate.arrive_and_wait();
      if (t != 0) continue;
      const double first = *std::min_element(begin.begin(), begin.end());
      const double last = *std::max_element(end.begin(), end.end());
      best = std::min(best, last - first);
      again = round < 3 || now() - started < budget;
    }
  };
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(loop, t);
  loop(0);
  for (std::thread& worker : workers) worker.join();
  return best;
}

double peak_rate(const Peak& peak, int threads, double budget) {
  // Rounds of about 10 ms: long beside a barrier, short beside a neighbour's time slice.
  int64_t count = 1000;
  double seconds = 0;
  while (seconds < 0.01) {
    const double start = now();
    peak.run(count);
    seconds = now() - start;
    if (seconds < 0.01) count = seconds < 0.001 ? count * 8 : count * 2;
  }
  const double best = best_seconds(threads, budget, [&](int) { peak.run(count); });
  return peak.operations * static_cast<double>(count) * threads / best / 1e9;
}

double read_rate(const Buffer& buffer, Reader reader, int threads, double budget) {
  const int64_t bytes = buffer.part_bytes(threads);
  double best = 0;
  for (const Way& way : kWays) {
    const double seconds =
        best_seconds(threads, budget / std::size(kWays), [&](int t) { reader(buffer.part(t, threads), bytes, way); });
    best = std::max(best, static_cast<double>(bytes) * threads / seconds / 1e9);
  }
  return best;
}

std::vector<int> parse_counts(const std::string& text) {
  std::vector<int> counts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    counts.push_back(std::max(1, std::atoi(text.substr(begin, comma - begin).c_str())));
    begin = comma + 1;
  }
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> counts = {1, static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};
  int64_t bytes = int64_t{2} << 30;
  double budget = 0.2;
  bool only_reads = false;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--threads") counts = parse_counts(argv[i + 1]);
    if (option == "--bytes") bytes = std::max<int64_t>(int64_t{1} << 20, std::atoll(argv[i + 1]));
    if (option == "--seconds") budget = std::atof(argv[i + 1]);
    if (option == "--only") only_reads = std::string(argv[i + 1]) == "read";
  }
  const Features features = detect();
  const Reader reader = features.avx512 ? read_512 : features.avx2_fma ? read_256 : read_128;
  const Buffer buffer(bytes, *std::max_element(counts.begin(), counts.end()));

  std::printf("{\"bytes\": %lld, \"huge_pages\": %s", static_cast<long long>(bytes),
              buffer.huge_pages() ? "true" : "false");
  std::printf(", \"read_gb_per_s\": {");
  for (size_t i = 0; i < counts.size(); ++i) {
    std::printf("%s\"%d\": %.2f", i ? ", " : "", counts[i], read_rate(buffer, reader, counts[i], budget));
  }
  if (only_reads) {
    std::printf("}}\n");
    return 0;
  }
  std::printf("}, \"peak_gflop_per_s\": {");
  bool first = true;
  for (const Peak& peak : peaks(features)) {
    if (!peak.available) continue;
    std::printf("%s\"%s\": {", first ? "" : ", ", peak.name);
    first = false;
    for (size_t i = 0; i < counts.size(); ++i) {
      std::printf("%s\"%d\": %.1f", i ? ", " : "", counts[i], peak_rate(peak, counts[i], budget));
    }
    std::printf("}");
  }
  std::printf("}}\n");
  return 0;
}
