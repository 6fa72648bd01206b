#include "plan.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace bertrt {
namespace {

int32_t length_of(const int64_t* offsets, int64_t number) {
  return static_cast<int32_t>(offsets[number + 1] - offsets[number]);
}

double cost_of(int32_t length) { return length * (kCostPerToken + kCostPerPair * length); }

// What one member of the team shall compute alone.
struct Load {
  std::vector<int64_t> numbers;  // longest first
  double cost = 0;
};

// Longest processing time first: each sequence goes to the member that has the least to do.
std::vector<Load> deal(const int64_t* offsets, const std::vector<int64_t>& sorted, int team) {
  std::vector<Load> loads(static_cast<size_t>(team));
  using Entry = std::pair<double, size_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> least;
  for (size_t member = 0; member < loads.size(); ++member) least.emplace(0.0, member);
  for (int64_t number : sorted) {
    const size_t member = least.top().second;
    least.pop();
    loads[member].numbers.push_back(number);
    loads[member].cost += cost_of(length_of(offsets, number));
    least.emplace(loads[member].cost, member);
  }
  return loads;
}

// Takes sequences out of the fullest loads until all are nearly equal; returns what was taken.
std::vector<int64_t> level(const int64_t* offsets, std::vector<Load>& loads) {
  std::vector<int64_t> taken;
  const auto cheaper = [](const Load& a, const Load& b) { return a.cost < b.cost; };
  for (;;) {
    double total = 0;
    for (const Load& load : loads) total += load.cost;
    const auto [least, most] = std::minmax_element(loads.begin(), loads.end(), cheaper);
    if (most->cost * static_cast<double>(loads.size()) <= total * (1 + kImbalance)) return taken;
    // The shortest one that closes the gap, or else the longest.
    const double gap = most->cost - least->cost;
    auto choice = most->numbers.begin();
    for (auto it = choice; it != most->numbers.end() && cost_of(length_of(offsets, *it)) >= gap; ++it) choice = it;
    most->cost -= cost_of(length_of(offsets, *choice));
    taken.push_back(*choice);
    most->numbers.erase(choice);
    if (most->numbers.empty()) most->cost = 0;
  }
}

// Appends `numbers` to the plan as chunks of about equal size, none of which exceeds `limit` rows if it can be helped.
void cut(const int64_t* offsets, const std::vector<int64_t>& numbers, int32_t limit, Plan& plan,
         std::vector<PlannedChunk>& chunks) {
  int64_t rows_left = 0;
  for (int64_t number : numbers) rows_left += length_of(offsets, number);
  int64_t chunks_left = (rows_left + limit - 1) / limit;
  PlannedChunk chunk{static_cast<int64_t>(plan.sequences.size()), 0, 0, 0};
  const auto close = [&] {
    if (chunk.count == 0) return;
    chunks.push_back(chunk);
    rows_left -= chunk.rows;
    chunks_left = std::max<int64_t>(chunks_left - 1, (rows_left + limit - 1) / limit);
    chunk = {static_cast<int64_t>(plan.sequences.size()), 0, 0, 0};
  };
  for (int64_t number : numbers) {
    const int32_t length = length_of(offsets, number);
    // A chunk is full at its share of what is left, where the next sequence would carry it further off.
    const int64_t share = chunks_left > 0 ? (rows_left + chunks_left - 1) / chunks_left : limit;
    if (chunk.rows + length > limit || chunk.rows + length - share > share - chunk.rows) close();
    plan.sequences.push_back({offsets[number], length, chunk.rows});
    plan.numbers.push_back(number);
    ++chunk.count;
    chunk.rows += length;
    chunk.longest = std::max(chunk.longest, length);
  }
  close();
}

int32_t largest(const std::vector<PlannedChunk>& chunks) {
  int32_t rows = 0;
  for (const PlannedChunk& chunk : chunks) rows = std::max(rows, chunk.rows);
  return rows;
}

}  // namespace

Plan make_plan(const int64_t* offsets, const std::vector<int64_t>& numbers, int team) {
  Plan plan;
  plan.sequences.reserve(numbers.size());
  plan.numbers.reserve(numbers.size());

  std::vector<int64_t> sorted = numbers;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int64_t a, int64_t b) { return length_of(offsets, a) > length_of(offsets, b); });
  int64_t tokens = 0;
  for (int64_t number : sorted) tokens += length_of(offsets, number);
  if (!sorted.empty()) plan.longest = length_of(offsets, sorted.front());

  std::vector<int64_t> rest;
  const int64_t enough = team * kSoloTokensPerThread;
  if (tokens >= enough) {
    std::vector<Load> loads = deal(offsets, sorted, team);
    rest = level(offsets, loads);
    int64_t rest_tokens = 0;
    for (int64_t number : rest) rest_tokens += length_of(offsets, number);
    if (tokens - rest_tokens >= enough) {
      plan.solo.resize(static_cast<size_t>(team));
      for (size_t member = 0; member < loads.size(); ++member) {
        cut(offsets, loads[member].numbers, kSoloRows, plan, plan.solo[member]);
        plan.solo_rows = std::max(plan.solo_rows, largest(plan.solo[member]));
      }
    } else {
      rest = sorted;
    }
  } else {
    rest = sorted;
  }
  cut(offsets, rest, kSharedRows, plan, plan.shared);
  plan.shared_rows = largest(plan.shared);
  return plan;
}

}  // namespace bertrt
