// Whether a model can answer a batch and a request.
#pragma once

#include "engine.h"

namespace bertrt {

// Throws Error (kInvalidArgument, kMissingHead) that names the array, the index, the value and what it must be.
void check(const Architecture& sizes, const Batch& batch, const Request& request);

}  // namespace bertrt
