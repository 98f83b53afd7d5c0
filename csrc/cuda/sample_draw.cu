// The end of sample_next.cu: a token is drawn from what is kept, by its weight, in the order of ids as on the host.
#include "cuda/sample_parts.h"

namespace llama_ext::cuda::sampling {
namespace {

template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ Sampling s) {
  using K = Keys<kNarrow>;
  wait_for_predecessors();
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory());  // (kThreads)
  auto* chosen = sums + kThreads;                             // (4)
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const Choice& choice = s.choices[row];
  const Cut cut = v.top_p < 1.0 ? choice.top_p : choice.top_k;
  const auto weight_at = [&](double x) {
    const double weight = weight_of(s, choice, x);
    return weight >= v.min_p ? in_multiples(s, weight) : 0;
  };

  Drawn mine{0, 0};
  const auto look = [&](int first, uint64_t weights[kOfThread], bool at_cut[kOfThread]) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      weights[i] = 0;
      at_cut[i] = false;
      if (first + i >= v.vocabulary) continue;
      const double x = processed(v, row, first + i);
      const uint64_t key = K::of(x);
      if (key < cut.key || key <= K::kOfNothing) continue;
      weights[i] = weight_at(x);
      at_cut[i] = key == cut.key;
      if (at_cut[i]) {
        mine.equals += 1;
      } else {
        mine.above += weights[i];
      }
    }
  };
  uint64_t weights[kOfThread];
  bool at_cut[kOfThread];
  look(static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread, weights, at_cut);
  Drawn block{0, 0};
  sum_before(mine.above, sums, block.above);
  sum_before(mine.equals, sums, block.equals);
  if (thread == 0) s.drawn[int64_t{row} * gridDim.x + blockIdx.x] = block;
  if (!is_last_block(v.state[row], reinterpret_cast<uint32_t*>(chosen))) return;

  // The block in which the draw lies. Blocks in their order, so many at a time as there are threads.
  const Drawn* all = s.drawn + int64_t{row} * gridDim.x;
  const int blocks = static_cast<int>(gridDim.x);
  const uint64_t equal_weight = cut.key <= K::kOfNothing ? 0 : weight_at(K::number(cut.key));
  uint64_t total = 0;
  uint64_t target = 0;
  for (int round = 0; round < 2; ++round) {  // for the total first, then for the place
    uint64_t before = 0;
    uint64_t equals_before = 0;
    for (int begin = 0; begin < blocks; begin += static_cast<int>(kThreads)) {
      const int i = begin + thread;
      const Drawn drawn = i < blocks ? all[i] : Drawn{0, 0};
      uint64_t all_equals = 0;
      const uint64_t equals = equals_before + sum_before(drawn.equals, sums, all_equals);
      const uint64_t room = cut.equals > equals ? cut.equals - equals : 0;
      const uint64_t weight = drawn.above + (drawn.equals < room ? drawn.equals : room) * equal_weight;
      uint64_t all_weight = 0;
      const uint64_t reached = before + sum_before(weight, sums, all_weight);
      if (round == 1 && reached <= target && reached + weight > target) {
        chosen[0] = static_cast<uint64_t>(i);
        chosen[1] = reached;
        chosen[2] = equals;
      }
      before += all_weight;
      equals_before += all_equals;
    }
    if (round == 0) {
      total = before;
      // floor(u total), of u in multiples of 2^-53
      const uint64_t u = random_bits(v.state[row].key);
      target = __umul64hi(u, total) << 11 | u * total >> 53;
    }
  }
  __syncthreads();
  const bool is_valid = choice.is_valid != 0 && total > 0;
  if (!is_valid) {
    if (thread == 0) finish(s, row, 0, false);
    return;
  }

  // The token.
  const int first = static_cast<int>(chosen[0]) * kOfBlock + thread * kOfThread;
  uint64_t reached = chosen[1];
  uint64_t rank = chosen[2];
  mine = {0, 0};
  look(first, weights, at_cut);
  uint64_t ignored = 0;
  rank += sum_before(mine.equals, sums, ignored);
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if (at_cut[i] && rank++ >= cut.equals) weights[i] = 0;
    sum += weights[i];
  }
  reached += sum_before(sum, sums, ignored);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if (reached <= target && reached + weights[i] > target) finish(s, row, first + i, true);
    reached += weights[i];
  }
}

/// The draw where top_k keeps few.
template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) draw_few_kernel(const __grid_constant__ Sampling s) {
  using K = Keys<kNarrow>;
  wait_for_predecessors();
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory());  // (kThreads)
  auto* keys = sums + kThreads;                               // (kFew)
  auto* weights = keys + kFew;                                // (kFew)
  auto* tokens = reinterpret_cast<int32_t*>(weights + kFew);  // (kFew)
  auto* place = reinterpret_cast<uint32_t*>(tokens + kFew);
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  Choice& choice = s.choices[row];
  const Cut cut = choice.top_k;
  int32_t* above = s.few + int64_t{row} * (kFew + kMostEquals);
  int32_t* equals = above + kFew;
  const int first = static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread;
  for (int i = 0; i < kOfThread; ++i) {
    if (first + i >= v.vocabulary) break;
    const uint64_t key = K::of(processed(v, row, first + i));
    if (key <= K::kOfNothing || key < cut.key) continue;
    const bool is_above = key > cut.key;
    const uint32_t at = atomicAdd(is_above ? &choice.few_above : &choice.few_equals, 1u);
    if (is_above && at < kFew) above[at] = first + i;
    if (!is_above && at < kMostEquals) equals[at] = first + i;
  }
  if (!is_last_block(v.state[row], place)) return;

  // In any order: what follows does not depend on it.
  const int count_above = static_cast<int>(choice.few_above < kFew ? choice.few_above : kFew);
  const int found_equals = static_cast<int>(choice.few_equals < 0x7fffffffu ? choice.few_equals : 0x7fffffffu);
  const int room = kFew - count_above;
  const int count_equals = static_cast<int>(cut.equals < static_cast<uint64_t>(room) ? cut.equals : room);
  const int count = count_above + min(count_equals, found_equals);
  if (thread < count_above) tokens[thread] = above[thread];
  if (found_equals <= kMostEquals) {
    for (int i = thread; i < found_equals; i += static_cast<int>(kThreads)) {
      int rank = 0;
      for (int j = 0; j < found_equals; ++j) rank += equals[j] < equals[i] ? 1 : 0;
      if (rank < count_equals) tokens[count_above + rank] = equals[i];
    }
  } else {
    // So many that the first ones are looked for where they are.
    uint64_t before = 0;
    for (int begin = 0; begin < v.vocabulary && before < static_cast<uint64_t>(count_equals);
         begin += static_cast<int>(kThreads)) {
      const int token = begin + thread;
      const bool is_equal = token < v.vocabulary && K::of(processed(v, row, token)) == cut.key;
      uint64_t found = 0;
      const uint64_t rank = before + sum_before(is_equal ? 1 : 0, sums, found);
      if (is_equal && rank < static_cast<uint64_t>(count_equals)) tokens[count_above + static_cast<int>(rank)] = token;
      before += found;
    }
  }
  __syncthreads();

  const bool is_mine = thread < count;
  const int32_t token = is_mine ? tokens[thread] : 0;
  const double x = is_mine ? processed(v, row, token) : 0.0;
  const uint64_t key = K::of(x);
  const double likelihood = is_mine ? weight_of(s, choice, x) : 0.0;
  uint64_t weight = is_mine ? in_multiples(s, likelihood) : 0;
  keys[thread] = key;
  weights[thread] = weight;
  uint64_t total = 0;
  sum_before(weight, sums, total);
  if (v.top_p < 1.0) {
    // As in find_cut_kernel.
    uint64_t wanted = static_cast<uint64_t>(ceil(v.top_p * static_cast<double>(total)));
    if (wanted < 1) wanted = 1;
    if (wanted > total) wanted = total;
    uint64_t likelier = 0;
    for (int j = 0; j < count; ++j) {
      if (keys[j] > key || (keys[j] == key && tokens[j] < token)) likelier += weights[j];
    }
    if (likelier >= wanted) weight = 0;
  }
  if (!(likelihood >= v.min_p)) weight = 0;
  __syncthreads();
  weights[thread] = weight;
  sum_before(weight, sums, total);  // its barriers make the weights visible, too
  if (choice.is_valid == 0 || total == 0) {
    if (thread == 0) finish(s, row, 0, false);
    return;
  }
  const uint64_t u = random_bits(v.state[row].key);
  const uint64_t target = __umul64hi(u, total) << 11 | u * total >> 53;
  uint64_t reached = 0;
  for (int j = 0; j < count; ++j) {
    if (tokens[j] < token) reached += weights[j];
  }
  const bool is_chosen = is_mine && reached <= target && reached + weight > target;
  __syncthreads();  // the key is another one once a thread has finished
  if (is_chosen) finish(s, row, token, true);
}

template <bool kNarrow>
void start(const Gpu& gpu, const Sampling& s, dim3 grid) {
  if (s.few != nullptr) {
    const size_t shared = (kThreads + 2 * kFew) * sizeof(uint64_t) + (kFew + 1) * sizeof(int32_t);
    launch<Start::kEarly>(gpu, draw_few_kernel<kNarrow>, grid, kThreads, shared, s);
    return;
  }
  launch<Start::kEarly>(gpu, draw_kernel<kNarrow>, grid, kThreads, (kThreads + 4) * sizeof(uint64_t), s);
}

}  // namespace

void start_draw(const Gpu& gpu, const Sampling& s, dim3 grid) {
  if (is_narrow(s.v)) return start<true>(gpu, s, grid);
  start<false>(gpu, s, grid);
}

}  // namespace llama_ext::cuda::sampling
