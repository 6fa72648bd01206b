#include "weight_values.h"

#include <cstring>

namespace bertrt {
namespace {

// Whether a value with an exponent of all ones is there, looking at eight bytes at a time: such a value, its sign taken
// away, plus one unit of the exponent reaches the sign. `sign` and `unit` hold these bits of each value in the word;
// no carry leaves a value.
bool has_full_exponent(const void* values, size_t bytes, uint64_t sign, uint64_t unit) {
  const unsigned char* next = static_cast<const unsigned char*>(values);
  constexpr size_t kStep = 32;
  uint64_t seen[4] = {0, 0, 0, 0};
  uint64_t words[4];
  for (size_t i = 0; i < bytes; i += kStep) {
    std::memcpy(words, next + i, kStep);
    for (int lane = 0; lane < 4; ++lane) seen[lane] |= (words[lane] & ~sign) + unit;
  }
  return ((seen[0] | seen[1] | seen[2] | seen[3]) & sign) != 0;
}

}  // namespace

bool are_finite_float32(const void* values, size_t bytes) {
  return !has_full_exponent(values, bytes, 0x8000000080000000u, 0x0080000000800000u);
}

bool are_finite_bfloat16(const void* values, size_t bytes) {
  return !has_full_exponent(values, bytes, 0x8000800080008000u, 0x0080008000800080u);
}

bool is_padded_with_zeros(const void* values, size_t rows, size_t columns, size_t padded) {
  const uint32_t* row = static_cast<const uint32_t*>(values);
  uint32_t seen = 0;
  for (size_t r = 0; r < rows; ++r, row += padded) {
    for (size_t i = columns; i < padded; ++i) seen |= row[i];
  }
  return seen == 0;
}

bool are_scales(const float* values, size_t count) {
  bool good = true;
  // NaN fails both comparisons, infinity the second.
  for (size_t i = 0; i < count; ++i) good &= values[i] > 0.0f && values[i] <= 3.40282347e38f;
  return good;
}

Int8Problem check_int8(const void* panels, size_t panel_count, size_t steps, size_t outputs, const int32_t* sums) {
  constexpr size_t kOutputs = 32, kHalf = 16, kGroup = 4;
  const int8_t* next = static_cast<const int8_t*>(panels);
  for (size_t panel = 0; panel < panel_count; ++panel) {
    int32_t found[kOutputs] = {};
    int8_t lowest = 0;
    for (size_t step = 0; step < steps; ++step) {
      for (size_t half = 0; half < kOutputs; half += kHalf) {
        for (size_t group = 0; group < kHalf; ++group, next += kHalf * kGroup) {
          for (size_t i = 0; i < kHalf * kGroup; ++i) lowest = next[i] < lowest ? next[i] : lowest;
          for (size_t n = 0; n < kHalf; ++n) {
            const int8_t* const four = next + n * kGroup;
            found[half + n] += four[0] + four[1] + four[2] + four[3];
          }
        }
      }
    }
    if (lowest == -128) return Int8Problem::kRange;
    for (size_t n = 0; n < kOutputs; ++n) {
      const size_t output = panel * kOutputs + n;
      if (found[n] != (output < outputs ? sums[output] : 0)) return Int8Problem::kSums;
    }
  }
  return Int8Problem::kNone;
}

bool are_panels_padded(const void* panels, size_t size, size_t panel_count, size_t steps, size_t outputs,
                       size_t inputs) {
  const auto* bytes = static_cast<const unsigned char*>(panels);
  const size_t group = 4 / size, step_inputs = 16 * group;
  for (size_t panel = 0; panel < panel_count; ++panel) {
    const bool last_panel = (panel + 1) * 32 > outputs;
    // Only the last panel and the last step have padding.
    for (size_t step = last_panel ? 0 : steps - 1; step < steps; ++step) {
      const unsigned char* tiles = bytes + (panel * steps + step) * 2048;
      for (size_t i = 0; i < 2048 / size; ++i) {
        const size_t output = panel * 32 + i / (256 * group) * 16 + i / group % 16;
        const size_t input = step * step_inputs + i / (16 * group) % 16 * group + i % group;
        if (output < outputs && input < inputs) continue;
        for (size_t byte = 0; byte < size; ++byte) {
          if (tiles[i * size + byte] != 0) return false;
        }
      }
    }
  }
  return true;
}

}  // namespace bertrt
