// The mathematics of one row of vocabulary-sharded logits, written once for CPU and CUDA.
//
// With z the logits of a row, s = 1 / temperature and m = max z, each shard is summarised by
//   m,  S = sum e^((z_j - m) s),  E = sum e^((z_j - m) s) (z_j - m) s,
// and summaries merge, so that a row never has to be in one place:
//   m = max m_r,  f_r = e^((m_r - m) s),  S = sum f_r S_r,  E = sum f_r (E_r + (m_r - m) s S_r).
// Then log p_y = (z_y - m) s - log S and the entropy is log S - E / S. The maximum is subtracted
// from the logits themselves: that difference is exact, a difference of log-normalisers is not.
//
// The gradient of every loss here has one form, grad_j = e^((z_j - m) s) (alpha + beta (z_j - m) s),
// but for the sampled token and the teacher's top-K tokens, whose final values are stored apart.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "portability.h"

namespace sod_mcore {

// Stands for the maximum of a shard without columns, and of a row masked to -inf throughout. It is
// finite because it travels through a sum over ranks: 0 * inf would be NaN.
constexpr float kNoMaximum = -FLT_MAX;
// A column so far below its row's maximum counts as probability 0: float32 has no normal number for
// it. -inf is held here, so that e^d * d is 0 and not NaN.
constexpr float kSmallestExponent = -87.3f;

struct RowSummary {
  float max;
  double sum;         // S
  double shifted_sum; // E
};

// Adds the summary `b` to `a`, both of the same row.
SOD_DEVICE void merge(RowSummary &a, const RowSummary &b, float inverse_temperature) {
  const float max = b.max > a.max ? b.max : a.max;
  const RowSummary parts[2] = {a, b};
  a = {max, 0.0, 0.0};
  for (const RowSummary &part : parts) {
    if (part.sum == 0.0) continue; // no columns, or all masked: its maximum means nothing
    const double shift = (static_cast<double>(part.max) - max) * inverse_temperature;
    const double factor = exp(shift);
    a.sum += factor * part.sum;
    // 0 * -inf would be NaN.
    if (factor != 0.0) a.shifted_sum += factor * (part.shifted_sum + shift * part.sum);
  }
}

// bfloat16 travels as its bits, the upper half of a float32.
SOD_DEVICE float bits_to_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SOD_DEVICE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SOD_DEVICE float to_float(float value) { return value; }
SOD_DEVICE float to_float(std::uint16_t bfloat16_bits) {
  return bits_to_float(static_cast<std::uint32_t>(bfloat16_bits) << 16);
}

SOD_DEVICE void from_float(float value, float &out) { out = value; }

// Rounds to nearest, ties to even, as torch does.
SOD_DEVICE void from_float(float value, std::uint16_t &out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // A NaN whose upper mantissa bits are empty would round to infinity.
  out = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Where the column of a global id lies in a shard; -1 if another shard or none has it.
SOD_DEVICE std::int64_t local_column(std::int64_t id, std::int64_t first_column,
                                     std::int64_t num_valid_columns) {
  const std::int64_t column = id - first_column;
  return id >= 0 && column >= 0 && column < num_valid_columns ? column : -1;
}

// The logit of a global id, 0 where the shard has not got it.
template <typename Logit>
SOD_DEVICE float pick(const Logit *row, std::int64_t id, std::int64_t first_column,
                      std::int64_t num_valid_columns) {
  const std::int64_t column = local_column(id, first_column, num_valid_columns);
  return column < 0 ? 0.0f : to_float(row[column]);
}

// Stores the value of a global id where the shard has it.
template <typename Logit>
SOD_DEVICE void put(Logit *row, std::int64_t id, std::int64_t first_column,
                    std::int64_t num_valid_columns, float value) {
  const std::int64_t column = local_column(id, first_column, num_valid_columns);
  if (column >= 0) from_float(value, row[column]);
}

// Whether a row's gradient is 0 but at its sparse columns, so that its logits need not be read: it
// carries no loss, or every clip bound holds.
SOD_DEVICE bool has_no_dense_gradient(const float *row_coefficients, float upstream) {
  return (row_coefficients[1] == 0.0f && row_coefficients[2] == 0.0f) || upstream == 0.0f;
}

} // namespace sod_mcore
