// What generation decides beside the model: the order of prompts, guesses from a text, and how many of them.
#include <cstdint>
#include <vector>

#include "check.h"
#include "generate/draft.h"
#include "generate/draft_pace.h"
#include "generate/prefix.h"

namespace llama_ext::test {
namespace {

using Tokens = std::vector<int32_t>;

/// `count` tokens from `first` on, then `last`.
Tokens counted(int32_t first, int64_t count, const Tokens& last = {}) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(first + static_cast<int32_t>(i));
  tokens.insert(tokens.end(), last.begin(), last.end());
  return tokens;
}

void test_common_prefix() {
  CHECK(common_prefix({}, {1}) == 0);
  CHECK(common_prefix({1, 2, 3}, {1, 2}) == 2);
  CHECK(common_prefix({1, 2}, {1, 2, 3}) == 2);
  CHECK(common_prefix({1, 2, 3}, {1, 5, 3}) == 1);
  CHECK(common_prefix({4}, {5}) == 0);
}

void test_prompts_that_share_nothing_keep_their_order() {
  CHECK((prefix_order({{9}, {3}, {5}, {1}}) == std::vector<size_t>{0, 1, 2, 3}));
  // Too little to be worth it.
  CHECK((prefix_order({{9, 1}, {3}, {9, 0}}) == std::vector<size_t>{0, 1, 2}));
  CHECK(prefix_order({}).empty());
}

void test_prompts_that_share_become_neighbours_at_the_place_of_the_first() {
  const std::vector<Tokens> prompts = {
      counted(50, 30, {1}), counted(1, kWorthWaiting, {8}), {7},
      counted(50, 30, {0}), counted(1, kWorthWaiting, {3}), {7},
  };
  CHECK((prefix_order(prompts) == std::vector<size_t>{3, 0, 4, 1, 2, 5}));
  // A longer common part lies inside a shorter one.
  const std::vector<Tokens> nested = {counted(1, 20, {9, 9}), counted(1, 40, {5}), counted(1, 20, {9, 1}),
                                      counted(1, 40, {4})};
  const std::vector<size_t> order = prefix_order(nested);
  CHECK((order == std::vector<size_t>{2, 0, 3, 1}));
}

Row row_of(const Tokens& prompt, const Tokens& output) {
  Row row;
  row.prompt = &prompt;
  row.output = output;
  return row;
}

Tokens look_up(const Tokens& prompt, const Tokens& output, int64_t count) {
  return look_up_draft(row_of(prompt, output), count);
}

void test_a_draft_is_what_followed_the_same_end() {
  CHECK((look_up({1, 2, 3, 4, 5}, {9, 1, 2}, 3) == Tokens{3, 4, 5}));
  CHECK((look_up({1, 2, 3, 4, 5, 9, 1}, {2}, 2) == Tokens{3, 4}));
  // The longest end counts, then the latest.
  CHECK((look_up({7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2}, {}, 1) == Tokens{3}));
  CHECK((look_up({1, 2, 3, 1, 2, 4, 1, 2}, {}, 1) == Tokens{4}));
  // A single token is no reason.
  CHECK(look_up({1, 2, 3, 1}, {}, 4).empty());
  CHECK(look_up({1}, {}, 4).empty());
  CHECK(look_up({1, 1}, {}, 4).empty());
}

void test_a_short_period_is_continued_as_long_as_it_is_asked_for() {
  CHECK((look_up({5, 5, 5}, {}, 4) == Tokens{5, 5, 5, 5}));
  CHECK((look_up({1, 2, 1, 2, 1}, {}, 5) == Tokens{2, 1, 2, 1, 2}));
}

void test_the_pace_follows_what_is_accepted() {
  DraftPace pace(10);
  CHECK(pace.next() == 10);
  pace.record(10, 3);
  CHECK(pace.next() == 4);
  pace.record(4, 4);
  CHECK(pace.next() == 8);
  pace.record(8, 8);
  CHECK(pace.next() == 10);
  // Without a single right guess: a pause that doubles, up to a bound, and one guess after it.
  pace.record(10, 0);
  CHECK(pace.next() == 1);
  for (const int64_t expected : {1, 3, 7, 15, 15, 15}) {
    pace.record(1, 0);
    int64_t pauses = 0;
    while (pace.next() == 0) ++pauses;
    CHECK(pauses == expected);
  }
  pace.record(1, 1);
  CHECK(pace.next() == 2);
  CHECK(DraftPace().next() == 0);
}

}  // namespace

void test_generate() {
  test_common_prefix();
  test_prompts_that_share_nothing_keep_their_order();
  test_prompts_that_share_become_neighbours_at_the_place_of_the_first();
  test_a_draft_is_what_followed_the_same_end();
  test_a_short_period_is_continued_as_long_as_it_is_asked_for();
  test_the_pace_follows_what_is_accepted();
}

}  // namespace llama_ext::test
