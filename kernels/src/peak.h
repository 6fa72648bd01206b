// The peak that one core of this machine reaches: what shares of it are measured against.
#pragma once

#include "isa.h"

namespace bertrt {

enum class PeakKind { kInt8, kFloat };

// Operations per second (two for each multiply-add) of the calling thread, the best of several measurements that
// take about `seconds` together. Throws Error (kUnsupported) for an instruction set that cannot be used here,
// kInvalidArgument for seconds that are not from 0.001 to 60.
double measure_peak(PeakKind kind, Isa isa, double seconds);

}  // namespace bertrt
