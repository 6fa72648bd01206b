// How the sequences of a batch are laid into chunks, and who computes which chunk. The plan says how fast an answer
// comes, never what it is.
#pragma once

#include <cstdint>
#include <vector>

#include "table.h"

namespace bertrt {

// Tokens per thread from which on every thread takes whole sequences of its own.
inline constexpr int64_t kSoloTokensPerThread = 256;
// By how much the most loaded thread may exceed the mean of all when each has sequences of its own.
inline constexpr double kImbalance = 0.08;
// Rows of a chunk that one thread computes, and of one that the whole team does; a longer sequence is a chunk alone.
inline constexpr int32_t kSoloRows = 256;
inline constexpr int32_t kSharedRows = 512;
// Cost of a sequence: length x (kCostPerToken + kCostPerPair x length), in units of any size. The products of
// BERT-base do about 7.1 million multiply-adds for each token and layer, attention 1,536 for each pair.
inline constexpr double kCostPerToken = 1.0;
inline constexpr double kCostPerPair = 1.0 / 1500;

// Sequences [first, first + count) of Plan::sequences.
struct PlannedChunk {
  int64_t first;
  int32_t count;
  int32_t rows;
  int32_t longest;
};

struct Plan {
  std::vector<Sequence> sequences;              // in the order of the chunks
  std::vector<int64_t> numbers;                 // of the batch, one for each of `sequences`
  std::vector<std::vector<PlannedChunk>> solo;  // for each member of the team, long sequences first
  std::vector<PlannedChunk> shared;
  int32_t solo_rows = 0;  // of the largest chunk of each kind
  int32_t shared_rows = 0;
  int32_t longest = 0;  // of all sequences
};

// Plans the sequences `numbers` of a batch for a team. `offsets` has been checked. Throws std::bad_alloc.
Plan make_plan(const int64_t* offsets, const std::vector<int64_t>& numbers, int team);

}  // namespace bertrt
