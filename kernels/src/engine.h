// A model that answers: checks a batch, plans its chunks, runs them on a team.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "weights.h"

namespace bertrt {

struct Options {
  int threads = 0;      // of each run; 0: the processors that the process may use
  bool pin = false;     // bind the workers to processors
  bool verify = true;   // compare checksums of the weights
  bool huge = false;    // a copy of the weights in huge pages
};

// Sequences laid end to end; sequence i is offsets[i] .. offsets[i + 1].
struct Batch {
  const int32_t* ids;         // [tokens]
  const int32_t* segments;    // [tokens]
  int64_t tokens;
  const int64_t* offsets;     // [sequences + 1]
  int64_t sequences;
};

// What a run shall compute; a null pointer leaves a part out.
struct Request {
  const int64_t* mlm_positions = nullptr;   // [mlm_count] rows of the batch
  int64_t mlm_count = 0;
  float* mlm_logits = nullptr;              // [mlm_count][vocab]
  int64_t top_k = 0;
  int64_t* top_ids = nullptr;               // [mlm_count][top_k]
  float* top_log_probs = nullptr;           // [mlm_count][top_k]
  const int64_t* candidates = nullptr;      // [mlm_count][candidate_count]
  int64_t candidate_count = 0;
  float* candidate_log_probs = nullptr;     // [mlm_count][candidate_count]
  float* hidden_states = nullptr;           // [tokens][hidden]
  float* pooled = nullptr;                  // [sequences][hidden]
  float* nsp_logits = nullptr;              // [sequences][2]
  float* layers = nullptr;                  // [layers + 1][tokens][hidden]
};

class Engine {
 public:
  // Opens a weight file. Throws Error.
  Engine(const std::string& path, const Options& options);
  ~Engine();

  // May be called by many threads at once. Throws Error: kInvalidArgument (an id, segment, offset, position,
  // candidate or top_k out of range, a sequence that is empty or too long), kMissingHead, kOutOfMemory, kSystem.
  void run(const Batch& batch, const Request& request) const;

  const Architecture& architecture() const;
  const char* isa() const;   // name of the instruction set in use
  int threads() const;
  size_t weight_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bertrt
