// Any batch and any request given to an engine: it answers, or throws Error, and touches nothing outside the arrays.
// Built like fuzz_weights.cpp, on all of the library and with the folder of seeds as BERTRT_SEEDS.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "error.h"

namespace {

using bertrt::Engine;

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  // Mostly from 0 to limit - 1, at times anything.
  int64_t number(int64_t limit) {
    const uint8_t value = byte();
    if (value < 250) return limit > 0 ? value % limit : 0;
    constexpr int64_t kOdd[] = {-1, INT64_MIN, INT64_MAX, INT32_MAX, int64_t{1} << 40};
    return value == 250 ? limit : kOdd[value - 251];
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

const std::vector<std::unique_ptr<Engine>>& engines() {
  static const auto* opened = [] {
    auto* list = new std::vector<std::unique_ptr<Engine>>;
    const std::string folder = BERTRT_SEEDS "/";
    for (const char* name : {"int8-tied", "bf16-encoder", "fp32-untied"}) {
      for (int threads : {1, 2}) {
        list->push_back(std::make_unique<Engine>(folder + name + ".bertrt", bertrt::Options{threads, false, true}));
      }
    }
    return list;
  }();
  return *opened;
}

// Memory for an output of `count` x `width` elements where that is not absurd; null otherwise or by chance.
template <class T>
class Output {
 public:
  Output(Reader& reader, int64_t count, int64_t width) {
    if (reader.byte() % 3 == 0 || count < 0 || count > 4096 || width < 0 || width > 4096) return;
    values_.resize(static_cast<size_t>(count * width));
    values_.shrink_to_fit();
    present_ = !values_.empty();
  }
  T* data() { return present_ ? values_.data() : nullptr; }

 private:
  std::vector<T> values_;
  bool present_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const Engine& engine = *engines()[reader.byte() % engines().size()];
  const bertrt::Architecture& sizes = engine.architecture();

  std::vector<int64_t> offsets{reader.byte() == 255 ? 1 : 0};
  for (int64_t i = reader.byte() % 90; i > 0; --i) {
    const uint8_t step = reader.byte();
    offsets.push_back(offsets.back() + (step < 250 ? 1 + step % 2 : static_cast<int64_t>(step) - 253));
  }
  // Only the arrays' sizes are promised by the caller.
  const int64_t tokens = offsets.back() < 0 ? 0 : offsets.back();
  std::vector<int32_t> ids, segments;
  for (int64_t i = 0; i < tokens; ++i) {
    ids.push_back(static_cast<int32_t>(reader.number(sizes.vocab)));
    segments.push_back(static_cast<int32_t>(reader.number(sizes.segments)));
  }
  const int64_t sequences = static_cast<int64_t>(offsets.size()) - 1;
  const bertrt::Batch batch = {ids.data(), segments.data(), tokens, offsets.data(), sequences};

  std::vector<int64_t> positions, candidates;
  for (int64_t i = reader.byte() % 100; i > 0; --i) positions.push_back(reader.number(tokens));
  const int64_t asked = static_cast<int64_t>(positions.size());
  bertrt::Request request;
  request.mlm_positions = reader.byte() == 255 ? nullptr : positions.data();
  request.mlm_count = asked;
  request.top_k = reader.number(sizes.vocab + 1);
  request.candidate_count = reader.byte() % 5;
  for (int64_t i = 0; i < asked * request.candidate_count; ++i) candidates.push_back(reader.number(sizes.vocab));
  request.candidates = candidates.data();

  Output<float> logits(reader, asked, sizes.vocab), log_probs(reader, asked, request.top_k),
      candidate_log_probs(reader, asked, request.candidate_count), hidden(reader, tokens, sizes.hidden),
      pooled(reader, sequences, sizes.hidden), nsp(reader, sequences, 2),
      layers(reader, (int64_t{sizes.layers} + 1) * tokens, sizes.hidden);
  Output<int64_t> top_ids(reader, asked, request.top_k);
  request.mlm_logits = logits.data();
  request.top_log_probs = log_probs.data();
  request.top_ids = top_ids.data();
  request.candidate_log_probs = candidate_log_probs.data();
  request.hidden_states = hidden.data();
  request.pooled = pooled.data();
  request.nsp_logits = nsp.data();
  request.layers = layers.data();
  try {
    engine.run(batch, request);
  } catch (const bertrt::Error& error) {
    const bool expected =
        error.code() == bertrt::ErrorCode::kInvalidArgument || error.code() == bertrt::ErrorCode::kMissingHead;
    if (!expected) std::abort();
  }
  return 0;
}
