#include "check.h"

#include <string>

#include "error.h"

namespace bertrt {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

std::string at(const char* name, int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

void check_not_null(const char* name, const void* pointer) {
  if (pointer == nullptr) refuse(std::string(name) + " is null; give an array");
}

// Every value is from 0 to limit - 1, where `limit` counts `what`.
template <class T>
void check_range(const char* name, const T* values, int64_t count, int64_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      refuse(at(name, i) + " is " + std::to_string(values[i]) + ", but must be from 0 to " + std::to_string(limit - 1) +
             ": " + what + " " + std::to_string(limit));
    }
  }
}

void check_count(const char* name, int64_t count, int64_t least) {
  if (count < least) {
    refuse(std::string(name) + " is " + std::to_string(count) + ", but must be at least " + std::to_string(least));
  }
}

// No index into an array of `rows` x `columns` elements overflows.
void check_size(const char* name, int64_t rows, int64_t columns) {
  constexpr int64_t kLargest = int64_t{1} << 58;
  if (columns != 0 && rows > kLargest / columns) {
    refuse(std::string(name) + " has " + std::to_string(rows) + " x " + std::to_string(columns) +
           " elements, more than can be addressed; run smaller batches");
  }
}

void check_batch(const Architecture& sizes, const Batch& batch) {
  check_count("tokens", batch.tokens, 1);
  check_count("sequences", batch.sequences, 1);
  check_not_null("input_ids", batch.ids);
  check_not_null("token_type_ids", batch.segments);
  check_not_null("offsets", batch.offsets);
  if (batch.offsets[0] != 0) refuse("offsets[0] is " + std::to_string(batch.offsets[0]) + ", but must be 0");
  for (int64_t i = 0; i < batch.sequences; ++i) {
    const int64_t begin = batch.offsets[i], end = batch.offsets[i + 1];
    if (end <= begin || end > batch.tokens) {
      refuse(at("offsets", i + 1) + " is " + std::to_string(end) + ", but must be from " + std::to_string(begin + 1) +
             " (" + at("offsets", i) + " + 1; no sequence is empty) to " + std::to_string(batch.tokens) +
             " (the number of tokens)");
    }
    if (end - begin > sizes.positions) {
      refuse("sequence " + std::to_string(i) + " (" + at("offsets", i) + " to " + at("offsets", i + 1) + ") has " +
             std::to_string(end - begin) + " tokens, but the model has " + std::to_string(sizes.positions) +
             " positions; cut it");
    }
  }
  if (batch.offsets[batch.sequences] != batch.tokens) {
    refuse(at("offsets", batch.sequences) + " is " + std::to_string(batch.offsets[batch.sequences]) +
           ", but the last offset must be the number of tokens, " + std::to_string(batch.tokens));
  }
  check_range("input_ids", batch.ids, batch.tokens, sizes.vocab, "the size of the vocabulary is");
  check_range("token_type_ids", batch.segments, batch.tokens, sizes.segments, "the number of segments is");
}

void check_heads(const Architecture& sizes, const Request& request) {
  const auto refuse_head = [](const char* head) {
    throw Error(ErrorCode::kMissingHead,
                std::string("this engine has no ") + head + " head: its checkpoint has none; ask for another output");
  };
  const bool mlm = request.mlm_positions != nullptr || request.mlm_logits != nullptr || request.top_ids != nullptr ||
                   request.top_log_probs != nullptr || request.candidate_log_probs != nullptr;
  if (mlm && !sizes.has_mlm) refuse_head("masked-LM");
  if (request.pooled != nullptr && !sizes.has_pooler) refuse_head("pooler");
  if (request.nsp_logits != nullptr && !(sizes.has_nsp && sizes.has_pooler)) refuse_head("next-sentence");
}

void check_mlm(const Architecture& sizes, const Batch& batch, const Request& request) {
  const int64_t count = request.mlm_count;
  check_count("mlm_count", count, 0);
  check_count("candidate_count", request.candidate_count, 0);
  if (request.top_k < 0 || request.top_k > sizes.vocab) {
    refuse("top_k is " + std::to_string(request.top_k) + ", but must be from 0 to the size of the vocabulary, " +
           std::to_string(sizes.vocab));
  }
  if (count == 0) return;
  check_size("mlm_logits", count, sizes.vocab);  // also bounds what is asked for with top_k
  check_size("candidates", count, request.candidate_count);
  check_not_null("mlm_positions", request.mlm_positions);
  check_range("mlm_positions", request.mlm_positions, count, batch.tokens, "the number of tokens is");
  if (request.top_k > 0) {
    check_not_null("top_ids", request.top_ids);
    check_not_null("top_log_probs", request.top_log_probs);
  }
  if (request.candidate_count > 0) {
    check_not_null("candidates", request.candidates);
    check_not_null("candidate_log_probs", request.candidate_log_probs);
    check_range("candidates", request.candidates, count * request.candidate_count, sizes.vocab,
                "the size of the vocabulary is");
  }
}

}  // namespace

void check(const Architecture& sizes, const Batch& batch, const Request& request) {
  check_batch(sizes, batch);
  check_heads(sizes, request);
  check_mlm(sizes, batch, request);
  check_size("layers", batch.tokens, (int64_t{sizes.layers} + 1) * sizes.hidden);
}

}  // namespace bertrt
