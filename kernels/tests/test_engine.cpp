// Whole runs, for the sanitizers: random batches on weight files, on every instruction set that there is here, by one
// thread and several, alone and at once. The answers must be the same bit for bit.
//   test_engine WEIGHTS...
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "engine.h"
#include "error.h"
#include "isa.h"

namespace {

using bertrt::Architecture;
using bertrt::Engine;
using Random = std::mt19937_64;

int64_t below(Random& random, int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); }

struct Input {
  std::vector<int32_t> ids, segments;
  std::vector<int64_t> offsets{0}, positions, candidates;
  int64_t top_k = 0, candidate_count = 0;

  Input(const Architecture& sizes, Random& random, int64_t most_tokens) {
    const int64_t longest = 1 + below(random, sizes.positions);
    do {
      offsets.push_back(offsets.back() + 1 + below(random, longest));
    } while (offsets.back() < most_tokens && below(random, 40) != 0);
    const int64_t tokens = offsets.back();
    for (int64_t i = 0; i < tokens; ++i) {
      ids.push_back(static_cast<int32_t>(below(random, sizes.vocab)));
      segments.push_back(static_cast<int32_t>(below(random, sizes.segments)));
    }
    top_k = below(random, 4) == 0 ? sizes.vocab : below(random, std::min(sizes.vocab, 9));
    candidate_count = below(random, 4);
    if (!sizes.has_mlm) return;
    for (int64_t i = below(random, 150); i > 0; --i) {
      positions.push_back(below(random, tokens));
      for (int64_t j = 0; j < candidate_count; ++j) candidates.push_back(below(random, sizes.vocab));
    }
  }
};

// Exactly as large as the outputs are, so that a sanitizer sees every step beyond.
struct Output {
  std::vector<float> logits, log_probs, candidate_log_probs, hidden, pooled, nsp, layers;
  std::vector<int64_t> ids;

  bool operator==(const Output&) const = default;
};

Output run(const Engine& engine, const Input& input, unsigned parts) {
  const Architecture& sizes = engine.architecture();
  const size_t tokens = input.ids.size(), sequences = input.offsets.size() - 1, asked = input.positions.size();
  const size_t hidden = static_cast<size_t>(sizes.hidden), vocab = static_cast<size_t>(sizes.vocab);
  const bertrt::Batch batch = {input.ids.data(), input.segments.data(), static_cast<int64_t>(tokens),
                               input.offsets.data(), static_cast<int64_t>(sequences)};
  Output output;
  bertrt::Request request;
  const auto want = [&](int part, std::vector<float>& values, size_t size, float*& pointer) {
    if ((parts >> part & 1) == 0) return;
    values.assign(size, std::nanf(""));
    pointer = values.data();
  };
  if (asked > 0) {
    request.mlm_positions = input.positions.data();
    request.mlm_count = static_cast<int64_t>(asked);
    want(0, output.logits, asked * vocab, request.mlm_logits);
    want(1, output.log_probs, asked * static_cast<size_t>(input.top_k), request.top_log_probs);
    if (!output.log_probs.empty()) {
      request.top_k = input.top_k;
      output.ids.assign(output.log_probs.size(), -1);
      request.top_ids = output.ids.data();
    }
    want(2, output.candidate_log_probs, input.candidates.size(), request.candidate_log_probs);
    if (!output.candidate_log_probs.empty()) {
      request.candidate_count = input.candidate_count;
      request.candidates = input.candidates.data();
    }
  }
  want(3, output.hidden, tokens * hidden, request.hidden_states);
  want(4, output.layers, tokens * hidden * (static_cast<size_t>(sizes.layers) + 1), request.layers);
  if (sizes.has_pooler) want(5, output.pooled, sequences * hidden, request.pooled);
  if (sizes.has_nsp) want(6, output.nsp, sequences * 2, request.nsp_logits);
  engine.run(batch, request);
  return output;
}

void check_written(const Output& output) {
  for (const auto* values : {&output.logits, &output.log_probs, &output.candidate_log_probs, &output.hidden,
                             &output.pooled, &output.nsp, &output.layers}) {
    for (float value : *values) CHECK(std::isfinite(value), "an output that is not a number or was not written");
  }
  for (int64_t id : output.ids) CHECK(id >= 0, "a token that was not written");
}

void test_file(const char* path, const char* isa) {
  CHECK(setenv("BERTRT_ISA", isa, 1) == 0, "setenv");
  std::printf("%s, %s\n", path, isa);
  std::fflush(stdout);
  const Engine alone(path, {1, false, true}), team(path, {3, false, true});
  const bool small = alone.weight_bytes() < 1'000'000;
  Random random(7);
  for (int round = 0; round < (small ? 60 : 2); ++round) {
    const Input input(alone.architecture(), random, round % 4 == 0 ? 800 : 60);
    const unsigned parts = static_cast<unsigned>(random());
    const Output expected = run(alone, input, parts);
    check_written(expected);
    CHECK(run(team, input, parts) == expected, "another answer with three threads, round %d", round);
    // Several at once on one engine.
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] { CHECK(run(team, input, parts) == expected, "another answer beside others"); });
    }
    for (std::thread& caller : callers) caller.join();
  }
}

}  // namespace

int main(int argc, char** argv) {
  unsetenv("BERTRT_ISA");
  CHECK(argc > 1, "usage: %s WEIGHTS...", argv[0]);
  for (int file = 1; file < argc; ++file) {
    for (int i = 0; i < bertrt::kIsaCount; ++i) {
      const auto isa = static_cast<bertrt::Isa>(i);
      // ThreadSanitizer takes minutes for each, and what threads share is the same for all: the engine's best one.
      if (UNDER_TSAN && &bertrt::select_kernels() != bertrt::kernels_of(isa)) continue;
      if (*bertrt::isa_problem(isa) == '\0') test_file(argv[file], bertrt::isa_name(isa));
    }
  }
  return 0;
}
