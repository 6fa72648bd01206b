// What the values of a weight file must keep to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bertrt {

// Neither NaN nor infinite; `bytes` is a multiple of 64.
bool are_finite_float32(const void* values, size_t bytes);
bool are_finite_bfloat16(const void* values, size_t bytes);

// Each of `rows` rows of `padded` elements of four bytes ends, after `columns` of them, with zeros.
bool is_padded_with_zeros(const void* values, size_t rows, size_t columns, size_t padded);

// All of them finite and above zero.
bool are_scales(const float* values, size_t count);

// Panels (model.h) of elements of `size` bytes hold zeros beyond `outputs` and `inputs`.
bool are_panels_padded(const void* panels, size_t size, size_t panel_count, size_t steps, size_t outputs, size_t inputs);

enum class Int8Problem { kNone, kRange, kSums };

// Panels of int8 (model.h): no value is -128, and the sum of each of `outputs` is the one in `sums`.
Int8Problem check_int8(const void* panels, size_t panel_count, size_t steps, size_t outputs, const int32_t* sums);

}  // namespace bertrt
