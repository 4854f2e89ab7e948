// From the statistics that all ranks have summed to a row's softmax: maximum, normaliser, entropy and
// the probability outside the top-K, in double.
#pragma once

#include "kernels.h"
#include "row_math.h"

namespace sod_mcore {

// How the work on one row is shared: alone, or by the lanes of a warp.
struct SingleLane {
  SOD_DEVICE int index() const { return 0; }
  SOD_DEVICE int count() const { return 1; }
  SOD_DEVICE double sum(double value) const { return value; }
  SOD_DEVICE float max(float value) const { return value; }
};

SOD_DEVICE std::int64_t id_at(const void *ids, bool is_64_bit, std::int64_t index) {
  return is_64_bit ? static_cast<const std::int64_t *>(ids)[index]
                   : static_cast<const std::int32_t *>(ids)[index];
}

SOD_DEVICE std::int64_t target_at(const TokenIds &ids, std::int64_t row) {
  return id_at(ids.targets, ids.targets_are_64_bit, row);
}

SOD_DEVICE std::int64_t topk_id_at(const TokenIds &ids, std::int64_t row, std::int64_t k) {
  return id_at(ids.topk_ids, ids.topk_ids_are_64_bit, row * ids.num_topk + k);
}

// Whether an id is a bucket of its own, and so no part of the rest.
SOD_DEVICE bool is_bucket(const TokenIds &ids, std::int64_t row, std::int64_t k) {
  if (topk_id_at(ids, row, k) < 0) return false;
  if (ids.teacher_topk_logprobs == nullptr) return true;
  return ids.teacher_topk_logprobs[row * ids.num_topk + k] != -INFINITY;
}

// A row's softmax over the whole vocabulary.
struct RowSoftmax {
  float max;
  double sum;
  double log_sum;
  double entropy;
  double rest_logprob; // log of the probability outside the top-K buckets

  // Log-prob of a column from its logit.
  SOD_DEVICE double logprob(float logit, float inverse_temperature) const {
    return (static_cast<double>(logit) - max) * inverse_temperature - log_sum;
  }
};

template <typename Lanes>
SOD_DEVICE RowSoftmax reduce_row(const float *statistics, std::int64_t world_size,
                                 const TokenIds &ids, std::int64_t row, float inverse_temperature,
                                 const Lanes &lanes) {
  RowSummary rest = {kNoMaximum, 0.0, 0.0};
  for (std::int64_t r = 0; r < world_size; ++r)
    merge(rest, {statistics[3 * r], statistics[3 * r + 1], statistics[3 * r + 2]},
          inverse_temperature);
  const float *logits = statistics + 3 * world_size + 1;
  RowSummary buckets = {kNoMaximum, 0.0, 0.0};
  for (std::int64_t k = lanes.index(); k < ids.num_topk; k += lanes.count())
    if (is_bucket(ids, row, k) && logits[k] > buckets.max) buckets.max = logits[k];
  buckets.max = lanes.max(buckets.max);
  for (std::int64_t k = lanes.index(); k < ids.num_topk; k += lanes.count()) {
    if (!is_bucket(ids, row, k)) continue;
    const double d = (static_cast<double>(logits[k]) - buckets.max) * inverse_temperature;
    const double e = exp(d);
    buckets.sum += e;
    if (e != 0.0) buckets.shifted_sum += e * d;
  }
  buckets.sum = lanes.sum(buckets.sum);
  buckets.shifted_sum = lanes.sum(buckets.shifted_sum);

  RowSummary whole = rest;
  merge(whole, buckets, inverse_temperature);
  const double log_sum = log(whole.sum);
  const double rest_shift = (static_cast<double>(rest.max) - whole.max) * inverse_temperature;
  return {whole.max, whole.sum, log_sum, log_sum - whole.shifted_sum / whole.sum,
          rest.sum == 0.0 ? -INFINITY : rest_shift + log(rest.sum) - log_sum};
}

} // namespace sod_mcore
