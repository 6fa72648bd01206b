// Plans: every sequence in one chunk, chunks within their limits, threads that have about equally much to do.
#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "plan.h"

namespace {

using bertrt::Plan;
using bertrt::PlannedChunk;

struct Case {
  std::vector<int64_t> offsets{0};
  std::vector<int64_t> numbers;

  explicit Case(const std::vector<int64_t>& lengths) {
    for (int64_t length : lengths) {
      numbers.push_back(static_cast<int64_t>(numbers.size()));
      offsets.push_back(offsets.back() + length);
    }
  }
  int64_t length(int64_t number) const {
    return offsets[static_cast<size_t>(number) + 1] - offsets[static_cast<size_t>(number)];
  }
  Plan plan(int team) const { return bertrt::make_plan(offsets.data(), numbers, team); }
};

double cost(int64_t length) {
  const double n = static_cast<double>(length);
  return n * bertrt::kCostPerToken + n * n * bertrt::kCostPerPair;
}

// Checks one chunk, and marks its sequences as seen. Returns its cost.
double check_chunk(const Case& given, const Plan& plan, const PlannedChunk& chunk, int32_t limit,
                   std::vector<int>& seen) {
  int32_t rows = 0, longest = 0;
  double total = 0;
  CHECK(chunk.count > 0, "an empty chunk");
  for (int32_t i = 0; i < chunk.count; ++i) {
    const size_t at = static_cast<size_t>(chunk.first + i);
    CHECK(at < plan.sequences.size(), "chunk beyond the sequences");
    const bertrt::Sequence& sequence = plan.sequences[at];
    const int64_t number = plan.numbers[at];
    CHECK(sequence.begin == given.offsets[static_cast<size_t>(number)], "sequence %d begins wrongly", i);
    CHECK(sequence.length == given.length(number), "sequence %d has another length", i);
    CHECK(sequence.row == rows, "row %d, expected %d", sequence.row, rows);
    rows += sequence.length;
    longest = std::max(longest, sequence.length);
    total += cost(sequence.length);
    ++seen[static_cast<size_t>(number)];
  }
  CHECK(chunk.rows == rows && chunk.longest == longest, "rows %d and longest %d, expected %d and %d", chunk.rows,
        chunk.longest, rows, longest);
  CHECK(rows <= limit || chunk.count == 1, "%d rows of %d sequences, at most %d", rows, chunk.count, limit);
  CHECK(longest <= plan.longest, "longest %d of the chunk, %d of the plan", longest, plan.longest);
  return total;
}

void check_plan(const Case& given, int team) {
  const Plan plan = given.plan(team);
  std::vector<int> seen(given.offsets.size() - 1);
  CHECK(plan.solo.empty() || static_cast<int>(plan.solo.size()) == team, "%d lists for %d threads",
        static_cast<int>(plan.solo.size()), team);
  std::vector<double> loads;
  int64_t solo_tokens = 0;
  for (const std::vector<PlannedChunk>& list : plan.solo) {
    loads.push_back(0);
    for (const PlannedChunk& chunk : list) {
      loads.back() += check_chunk(given, plan, chunk, bertrt::kSoloRows, seen);
      CHECK(chunk.rows <= plan.solo_rows, "a chunk larger than its buffers");
      solo_tokens += chunk.rows;
    }
  }
  if (!loads.empty()) {
    double mean = 0;
    for (double load : loads) mean += load / team;
    const double most = *std::max_element(loads.begin(), loads.end());
    CHECK(most <= mean * (1 + bertrt::kImbalance) * (1 + 1e-9), "the most loaded has %g, the mean is %g", most, mean);
    CHECK(solo_tokens >= team * bertrt::kSoloTokensPerThread, "only %lld tokens alone",
          static_cast<long long>(solo_tokens));
  }
  for (const PlannedChunk& chunk : plan.shared) {
    check_chunk(given, plan, chunk, bertrt::kSharedRows, seen);
    CHECK(chunk.rows <= plan.shared_rows, "a chunk larger than its buffers");
  }
  std::vector<int> expected(seen.size());
  for (int64_t number : given.numbers) expected[static_cast<size_t>(number)] = 1;
  CHECK(seen == expected, "a sequence that is missing, planned twice, or not wanted");
}

size_t solo_chunks(const Plan& plan) {
  size_t count = 0;
  for (const std::vector<PlannedChunk>& list : plan.solo) count += list.size();
  return count;
}

void small_batches_are_shared() {
  for (int team : {1, 2, 7}) {
    const Case given({bertrt::kSoloTokensPerThread * team - 1});
    check_plan(given, team);
    const Plan plan = given.plan(team);
    CHECK(solo_chunks(plan) == 0 && plan.shared.size() == 1, "not one shared chunk for %d threads", team);
  }
}

void equal_sequences_are_dealt_out() {
  const Case given(std::vector<int64_t>(8, 128));
  check_plan(given, 2);
  const Plan plan = given.plan(2);
  CHECK(plan.shared.empty() && solo_chunks(plan) == 4 && plan.solo_rows == 256, "8 x 128 not in 4 chunks of 256");
}

void what_does_not_divide_is_shared() {
  const Case given({512, 512, 512});
  check_plan(given, 2);
  const Plan plan = given.plan(2);
  CHECK(solo_chunks(plan) == 2 && plan.shared.size() == 1, "3 x 512 on 2 threads: %d alone, %d shared",
        static_cast<int>(solo_chunks(plan)), static_cast<int>(plan.shared.size()));
}

void one_long_sequence_is_shared() {
  const Case given({4000, 8});
  check_plan(given, 2);
  CHECK(given.plan(2).solo.empty(), "one sequence on two threads alone");
}

void only_wanted_sequences_are_planned() {
  Case given({10, 20, 30, 500, 40, 512});
  given.numbers = {1, 3, 4};
  check_plan(given, 1);
  check_plan(given, 2);
  CHECK(given.plan(2).longest == 500, "longest of all, not of the wanted ones");
  given.numbers = {};
  check_plan(given, 2);
}

void chunks_are_about_equal() {
  const Case given(std::vector<int64_t>(13, 50));
  const Plan plan = given.plan(1);
  CHECK(solo_chunks(plan) == 3, "%d chunks", static_cast<int>(solo_chunks(plan)));
  for (const PlannedChunk& chunk : plan.solo[0]) {
    CHECK(chunk.rows >= 200, "a chunk of %d rows where 200 and 250 would do", chunk.rows);
  }
}

void a_large_batch_needs_no_larger_chunks() {
  const Case given(std::vector<int64_t>(1000, 100));
  check_plan(given, 4);
  const Plan plan = given.plan(4);
  CHECK(plan.shared.empty() && plan.solo_rows <= bertrt::kSoloRows, "%d rows", plan.solo_rows);
}

void random_batches() {
  std::mt19937_64 random(1);
  for (int round = 0; round < 3000; ++round) {
    const int64_t count = 1 + static_cast<int64_t>(random() % (round % 10 == 0 ? 300 : 20));
    const uint64_t longest = 1 + random() % (round % 7 == 0 ? 2000 : 512);
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < count; ++i) lengths.push_back(1 + static_cast<int64_t>(random() % longest));
    Case given(lengths);
    if (round % 3 == 0) std::erase_if(given.numbers, [&](int64_t) { return random() % 2 == 0; });
    check_plan(given, 1 + static_cast<int>(random() % (round % 5 == 0 ? 64 : 8)));
  }
}

constexpr Test kTests[] = {
    {"small_batches_are_shared", small_batches_are_shared},
    {"equal_sequences_are_dealt_out", equal_sequences_are_dealt_out},
    {"what_does_not_divide_is_shared", what_does_not_divide_is_shared},
    {"one_long_sequence_is_shared", one_long_sequence_is_shared},
    {"only_wanted_sequences_are_planned", only_wanted_sequences_are_planned},
    {"chunks_are_about_equal", chunks_are_about_equal},
    {"a_large_batch_needs_no_larger_chunks", a_large_batch_needs_no_larger_chunks},
    {"random_batches", random_batches},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc, argv); }
