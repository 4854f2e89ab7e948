// Row mathematics of the vocabulary-parallel log-softmax, for one rank's shard of the logits.
//
// A row is summarised by its maximum and by two sums relative to that maximum. Summaries of several
// shards merge into those of the whole row, so the whole row never has to be in one place:
//   m = max m_r,  S = sum e^(m_r - m) S_r,  E = sum e^(m_r - m) (E_r + (m_r - m) S_r)
// and then log p_y = (u_y - m) - log S, entropy = log S - E / S, with u the logits over temperature.
//
// Free of Python and of any tensor library, so that it can be tested and reused as it stands.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sod_mcore {

struct RowStatistics {
  float max;              // m, -inf for a row without columns
  double exp_sum;         // S = sum e^(u_j - m)
  double exp_shifted_sum; // E = sum e^(u_j - m) (u_j - m)
};

inline float to_float(float value) { return value; }

// bfloat16 travels as its bits: the upper half of a float32.
inline float to_float(std::uint16_t bfloat16_bits) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16_bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Statistics of the first `num_columns` logits of a row; a NaN among them makes the sums NaN.
template <typename Logit>
RowStatistics row_statistics(const Logit *row, std::size_t num_columns, float inverse_temperature) {
  float max = -std::numeric_limits<float>::infinity();
  for (std::size_t j = 0; j < num_columns; ++j) {
    const float u = to_float(row[j]) * inverse_temperature;
    max = u > max ? u : max;
  }
  double exp_sum = 0.0;
  double exp_shifted_sum = 0.0;
  for (std::size_t j = 0; j < num_columns; ++j) {
    const float u = to_float(row[j]) * inverse_temperature;
    // A column masked to -inf has probability 0; 0 * -inf would be NaN.
    if (u == -std::numeric_limits<float>::infinity()) continue;
    const float shifted = u - max;
    const float e = std::exp(shifted);
    exp_sum += e;
    exp_shifted_sum += static_cast<double>(e) * shifted;
  }
  return {max, exp_sum, exp_shifted_sum};
}

} // namespace sod_mcore
