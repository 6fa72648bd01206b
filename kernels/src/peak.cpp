#include "peak.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "error.h"
#include "table.h"

namespace bertrt {
namespace {

// Measurements among which the best one counts: a neighbour's interruption spoils some of them.
constexpr int kMeasurements = 10;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double measure_peak(PeakKind kind, Isa isa, double seconds) {
  if (!(seconds >= 0.001 && seconds <= 60)) {
    throw Error(ErrorCode::kInvalidArgument,
                "seconds is " + std::to_string(seconds) + ", but must be from 0.001 to 60");
  }
  if (*isa_problem(isa) != '\0') {
    throw Error(ErrorCode::kUnsupported, std::string(isa_name(isa)) + " cannot be used here: " + isa_problem(isa));
  }
  const KernelTable& table = *kernels_of(isa);
  const auto loop = kind == PeakKind::kInt8 ? table.peak_int8 : table.peak_float;
  const uint32_t state = table.enter();
  // Rounds that take about one measurement's time, found by doubling.
  int64_t rounds = 1024;
  for (;; rounds *= 2) {
    const auto start = std::chrono::steady_clock::now();
    loop(rounds);
    if (seconds_since(start) > seconds / kMeasurements / 2) break;
  }
  double best = 0;
  for (int i = 0; i < kMeasurements; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t products = loop(rounds);
    best = std::max(best, 2.0 * static_cast<double>(products) / seconds_since(start));
  }
  table.leave(state);
  return best;
}

}  // namespace bertrt
