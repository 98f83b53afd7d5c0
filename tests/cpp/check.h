// The smallest test harness that does the job: failures are counted and printed, and the program goes on.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "core/errors.h"

namespace llama_ext::test {

inline int failures = 0;

inline void report(bool ok, const char* file, int line, const std::string& claim) {
  if (ok) return;
  ++failures;
  std::printf("%s:%d: failed: %s\n", file, line, claim.c_str());
}

/// Whether `body` throws an Error of this kind whose message contains `text`.
template <typename Body>
void expect_error(ErrorKind kind, std::string_view text, const char* file, int line, Body&& body) {
  try {
    body();
    report(false, file, line, cat("expected an error with '", text, "', nothing was thrown"));
  } catch (const Error& error) {
    const bool matches = error.kind() == kind && std::string_view(error.what()).find(text) != std::string_view::npos;
    report(matches, file, line,
           cat("expected kind ", static_cast<int>(kind), " with '", text, "', got kind ",
               static_cast<int>(error.kind()), ": ", error.what()));
  } catch (const std::exception& error) {
    report(false, file, line, cat("expected an Error with '", text, "', got: ", error.what()));
  }
}

// Each in the file of its topic.
void test_sample();
void test_reference();
void test_matrix_values();
void test_generate();
void test_quant();
void test_codes();
void test_kv_store();
void test_rope_table();
void test_threads();
void test_matmul_backward();
void test_training_ops();
void test_causal_attention();
void test_trainer();
void test_observer();
void test_cgroup();

}  // namespace llama_ext::test

#define CHECK(condition) ::llama_ext::test::report((condition), __FILE__, __LINE__, #condition)
#define CHECK_NEAR(actual, expected, tolerance)                                                                \
  do {                                                                                                         \
    const double actual_value = static_cast<double>(actual);                                                   \
    const double expected_value = static_cast<double>(expected);                                               \
    ::llama_ext::test::report(std::fabs(actual_value - expected_value) <= (tolerance), __FILE__, __LINE__,     \
                              ::llama_ext::cat(#actual, " is ", actual_value, ", expected ", expected_value)); \
  } while (false)
#define CHECK_ERROR(kind, text, ...) \
  ::llama_ext::test::expect_error((kind), (text), __FILE__, __LINE__, [&] { __VA_ARGS__; })
