// Greedy generation with an exported model in onnxruntime, on the CPU: generate MODEL.onnx COUNT TOKEN...
// Prints the prompt's tokens and COUNT more. For graphs whose keys and values are float32: every dtype but float16 and bfloat16.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <iostream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 4) return std::cerr << "usage: generate MODEL.onnx COUNT TOKEN...\n", 2;
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "generate");
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  // input_ids, attention_mask, position_ids, then keys and values, layer by layer; logits, then the same of all positions.
  std::vector<std::string> names;
  std::vector<Ort::Value> cache;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    if (i < 3) continue;
    const Ort::TypeInfo type = session.GetInputTypeInfo(i);
    std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();  // (B, K, P, D)
    shape[0] = 1;
    shape[2] = 0;
    cache.push_back(Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));
  }
  const size_t inputs = names.size();
  for (size_t i = 0; i < session.GetOutputCount(); ++i) {
    names.emplace_back(session.GetOutputNameAllocated(i, allocator).get());
  }
  std::vector<const char*> pointers;
  for (const std::string& name : names) pointers.push_back(name.c_str());

  std::vector<int64_t> tokens;
  for (int i = 3; i < argc; ++i) tokens.push_back(std::stoll(argv[i]));
  size_t seen = 0;  // positions in the cache
  for (int step = 0; step < std::stoi(argv[2]); ++step) {
    std::vector<int64_t> mask(tokens.size(), 1);
    std::vector<int64_t> positions(tokens.size() - seen);
    std::iota(positions.begin(), positions.end(), static_cast<int64_t>(seen));
    const auto row = [&](int64_t* data, size_t size) {
      const std::array<int64_t, 2> shape = {1, static_cast<int64_t>(size)};
      return Ort::Value::CreateTensor<int64_t>(memory, data, size, shape.data(), shape.size());
    };
    std::vector<Ort::Value> values;
    values.push_back(row(tokens.data() + seen, positions.size()));
    values.push_back(row(mask.data(), mask.size()));
    values.push_back(row(positions.data(), positions.size()));
    std::move(cache.begin(), cache.end(), std::back_inserter(values));

    std::vector<Ort::Value> results = session.Run(Ort::RunOptions{}, pointers.data(), values.data(), inputs,
                                                  pointers.data() + inputs, names.size() - inputs);
    const int64_t vocabulary = results[0].GetTensorTypeAndShapeInfo().GetShape()[2];
    const float* logits = results[0].GetTensorData<float>() + (positions.size() - 1) * static_cast<size_t>(vocabulary);
    seen = tokens.size();
    tokens.push_back(std::max_element(logits, logits + vocabulary) - logits);
    cache.assign(std::make_move_iterator(results.begin() + 1), std::make_move_iterator(results.end()));
  }
  for (const int64_t token : tokens) std::cout << token << ' ';
  std::cout << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
