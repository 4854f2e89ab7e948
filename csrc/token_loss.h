// The coefficient step: from a row's summed statistics to its loss and to the numbers that its
// gradient needs. One source for CPU and CUDA, in double, since it works on a handful of values.
//
// With l = log p of the student, q the teacher, p_R and q_R what the top-K ids leave, H the entropy
// and w the token's weight, the gradient of the loss by the scaled logits is
//   p_j (A + B l_j) + sparse_j,
// where a function F of l_y adds g = dF/dl_y to sparse_y and -g to A, an entropy of coefficient c
// adds -c H to A and -c to B, and a divergence F of the buckets (p_1 .. p_K, p_R), with
// h_b = dF/dlog p_b, adds h_R / p_R - sum h to A and h_k - p_k h_R / p_R to sparse_k.
// At a top-K id h_R / p_R cancels; it is left out there instead of being added and taken away.
#pragma once

#include "kernels.h"
#include "row_math.h"

namespace sod_mcore {

// exp(20) is 4.9e8: past it a ratio says nothing more. The bounds and floors below are those of
// sod_mcore.algorithm.policy_loss and .divergences.
constexpr double kMaxLogRatio = 20.0;
constexpr double kTeacherRestMin = 1e-6;
constexpr double kStudentRestLogprobMin = -80.0;
constexpr double kLogprobMin = -1e4;

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

// Value and derivative by the log-probability of one bucket.
struct BucketTerm {
  double value;
  double derivative;
};

SOD_DEVICE BucketTerm bucket_term(Divergence divergence, double beta, double log_p, double log_q) {
  if (divergence == Divergence::forward_kl) {
    const double q = exp(log_q);
    return {q * (log_q - log_p), -q};
  }
  const double p = exp(log_p);
  if (divergence == Divergence::reverse_kl) {
    // The derivative's p * 1 is left out: summed over all buckets it is the derivative of 1.
    const double value = p * (log_p - log_q);
    return {value, value};
  }
  const double q = exp(log_q);
  const double log_m = log(beta * q + (1.0 - beta) * p);
  const double student = p == 0.0 ? 0.0 : (1.0 - beta) * p * (log_p - log_m);
  const double teacher = q == 0.0 ? 0.0 : beta * q * (log_q - log_m);
  return {teacher + student, student};
}

// A loss of the sampled token's log-prob, and its derivative by it.
struct SampledTerm {
  double value;
  double derivative;
};

// "k2" and "k3" of J. Schulman's note "Approximating KL Divergence" (2020).
SOD_DEVICE SampledTerm k2_term(double logprob, double teacher_logprob) {
  const double d = teacher_logprob - logprob;
  return {0.5 * d * d, -d};
}

SOD_DEVICE SampledTerm k3_term(double logprob, double teacher_logprob) {
  const double d = teacher_logprob - logprob;
  const double held = fmin(fmax(d, -kMaxLogRatio), kMaxLogRatio);
  const double small = 1.0 + held / 3.0 * (1.0 + held / 4.0 * (1.0 + held / 5.0 * (1.0 + held / 6.0)));
  const double value = fabs(held) < 0.1 ? 0.5 * held * held * small : expm1(held) - held;
  return {value, held == d ? -expm1(held) : 0.0};
}

struct PolicyTerm {
  double value;
  double derivative;
  double ratio;
  bool is_clipped;
};

// PPO with two clip bounds and a dual clip; see sod_mcore.algorithm.policy_loss.
SOD_DEVICE PolicyTerm policy_term(const Objective &objective, double logprob, double old_logprob,
                                  double advantage) {
  const double log_ratio = logprob - old_logprob;
  const double held = fmin(fmax(log_ratio, -kMaxLogRatio), kMaxLogRatio);
  const double ratio = exp(held);
  const double bounded = fmin(fmax(ratio, 1.0 - static_cast<double>(objective.clip_low)),
                              1.0 + static_cast<double>(objective.clip_high));
  const double unclipped = -advantage * ratio;
  const double clipped = -advantage * bounded;
  bool is_clipped = clipped > unclipped;
  double value = is_clipped ? clipped : unclipped;
  const double bound = -advantage * objective.dual_clip;
  if (advantage < 0.0 && value > bound) {
    value = bound;
    is_clipped = true;
  }
  const bool is_flat = is_clipped || held != log_ratio;
  return {value, is_flat ? 0.0 : unclipped, ratio, is_clipped};
}

SOD_DEVICE void write_row_without_loss(const TokenLossCall &call, std::int64_t row) {
  call.token_loss[row] = call.logprobs[row] = call.entropy[row] = 0.0f;
  if (call.ratio != nullptr) call.ratio[row] = 0.0f;
  if (call.is_clipped != nullptr) call.is_clipped[row] = false;
  if (call.terms != nullptr)
    for (int term = 0; term < kNumTerms; ++term) call.terms[term * call.num_rows + row] = 0.0f;
  for (int i = 0; i < 3; ++i) call.row_coefficients[3 * row + i] = 0.0f;
}

// Loss and coefficients of one row. All lanes take the same path; lane 0 writes the row's values.
template <typename Lanes>
SOD_DEVICE void token_loss(const TokenLossCall &call, std::int64_t row, const Lanes &lanes) {
  const std::int64_t num_topk = call.ids.num_topk;
  float *sparse = call.sparse_gradient + row * (1 + num_topk);
  if (target_at(call.ids, row) < 0) {
    if (lanes.index() == 0) write_row_without_loss(call, row);
    for (std::int64_t k = lanes.index(); k < 1 + num_topk; k += lanes.count()) sparse[k] = 0.0f;
    if (call.topk_logprobs != nullptr)
      for (std::int64_t k = lanes.index(); k < num_topk; k += lanes.count())
        call.topk_logprobs[row * num_topk + k] = 0.0f;
    return;
  }
  const float scale = call.inverse_temperature;
  const float *statistics = call.statistics + row * statistics_width(call.world_size, num_topk);
  const float *logits = statistics + 3 * call.world_size; // of the target, then of the top-K
  const RowSoftmax softmax =
      reduce_row(statistics, call.world_size, call.ids, row, scale, lanes);
  const Objective &objective = call.objective;
  const double weight = call.token_weights == nullptr ? 1.0 : call.token_weights[row];
  const std::int64_t target = target_at(call.ids, row);

  // Rounded first: the ratio to an old log-prob that was written as float32 is exactly 1.
  const float logprob = static_cast<float>(softmax.logprob(logits[0], scale));
  double terms[kNumTerms] = {};
  double sampled = 0.0; // derivative of the loss by the sampled token's log-prob
  PolicyTerm policy = {0.0, 0.0, 0.0, false};
  if (call.advantages != nullptr)
    policy = policy_term(objective, logprob, call.old_logprobs[row], call.advantages[row]);
  // A term that is off may have inputs that are not finite, and 0 * NaN is NaN.
  if (objective.policy_coefficient != 0.0f) {
    terms[kPolicyTerm] = objective.policy_coefficient * policy.value;
    sampled += objective.policy_coefficient * policy.derivative;
  }
  if (objective.k2_coefficient != 0.0f) {
    const SampledTerm k2 = k2_term(logprob, call.teacher_logprobs[row]);
    terms[kK2Term] = weight * objective.k2_coefficient * k2.value;
    sampled += weight * objective.k2_coefficient * k2.derivative;
  }
  if (objective.k3_coefficient != 0.0f) {
    const SampledTerm k3 = k3_term(logprob, call.teacher_logprobs[row]);
    terms[kK3Term] = weight * objective.k3_coefficient * k3.value;
    sampled += weight * objective.k3_coefficient * k3.derivative;
  }
  terms[kEntropyTerm] = -static_cast<double>(objective.entropy_coefficient) * softmax.entropy;
  const double slope = objective.entropy_coefficient;                     // B
  double offset = objective.entropy_coefficient * softmax.entropy - sampled; // A without h_R / p_R

  const double divergence_factor = weight * objective.topk_coefficient;
  double rest_slope = 0.0; // h_R / p_R
  if (objective.topk_coefficient != 0.0f) {
    double value = 0.0, derivatives = 0.0, teacher_sum = 0.0;
    for (std::int64_t k = lanes.index(); k < num_topk; k += lanes.count()) {
      if (!is_bucket(call.ids, row, k)) continue;
      const double log_q = call.ids.teacher_topk_logprobs[row * num_topk + k];
      const double log_p = fmax(softmax.logprob(logits[1 + k], scale), kLogprobMin);
      const BucketTerm term = bucket_term(objective.topk_divergence, objective.jsd_beta, log_p, log_q);
      value += term.value;
      derivatives += log_p == kLogprobMin ? 0.0 : term.derivative;
      teacher_sum += exp(log_q);
    }
    value = lanes.sum(value);
    derivatives = lanes.sum(derivatives);
    const double q_rest = fmin(fmax(1.0 - lanes.sum(teacher_sum), kTeacherRestMin), 1.0);
    const double log_p_rest = fmax(softmax.rest_logprob, kStudentRestLogprobMin);
    const BucketTerm rest =
        bucket_term(objective.topk_divergence, objective.jsd_beta, log_p_rest, log(q_rest));
    const bool is_held = softmax.rest_logprob < kStudentRestLogprobMin;
    terms[kTopkTerm] = divergence_factor * (value + rest.value);
    rest_slope = is_held ? 0.0 : divergence_factor * rest.derivative / exp(log_p_rest);
    offset -= divergence_factor * (derivatives + (is_held ? 0.0 : rest.derivative));
  }

  // Final values at the sparse columns; the sampled token may be one of the top-K.
  const double target_logprob = softmax.logprob(logits[0], scale);
  const double target_p = exp(target_logprob);
  double target_value = target_p == 0.0 ? 0.0
                                        : target_p * (offset + rest_slope + slope * target_logprob);
  target_value += sampled;
  double target_bucket = 0.0; // the value where the target is a bucket, in one lane at most
  double is_target_bucket = 0.0;
  for (std::int64_t k = lanes.index(); k < num_topk; k += lanes.count()) {
    const double log_p = softmax.logprob(logits[1 + k], scale);
    if (call.topk_logprobs != nullptr)
      call.topk_logprobs[row * num_topk + k] =
          topk_id_at(call.ids, row, k) < 0 ? -INFINITY : static_cast<float>(log_p);
    double value = 0.0;
    if (is_bucket(call.ids, row, k)) {
      const double p = exp(log_p);
      if (p != 0.0) value = p * (offset + slope * log_p);
      if (objective.topk_coefficient != 0.0f && log_p > kLogprobMin)
        value += divergence_factor *
                 bucket_term(objective.topk_divergence, objective.jsd_beta, log_p,
                             call.ids.teacher_topk_logprobs[row * num_topk + k])
                     .derivative;
      if (topk_id_at(call.ids, row, k) == target) {
        value += sampled;
        target_bucket = value;
        is_target_bucket = 1.0;
      }
    }
    sparse[1 + k] = static_cast<float>(value * scale);
  }
  target_bucket = lanes.sum(target_bucket);
  is_target_bucket = lanes.sum(is_target_bucket);
  if (lanes.index() != 0) return;
  sparse[0] = static_cast<float>((is_target_bucket != 0.0 ? target_bucket : target_value) * scale);

  double loss = 0.0;
  for (int term = 0; term < kNumTerms; ++term) {
    loss += terms[term];
    if (call.terms != nullptr)
      call.terms[term * call.num_rows + row] = static_cast<float>(terms[term]);
  }
  call.token_loss[row] = static_cast<float>(loss);
  call.logprobs[row] = logprob;
  call.entropy[row] = static_cast<float>(softmax.entropy);
  if (call.ratio != nullptr) call.ratio[row] = static_cast<float>(policy.ratio);
  if (call.is_clipped != nullptr) call.is_clipped[row] = policy.is_clipped;
  float *coefficients = call.row_coefficients + 3 * row;
  coefficients[0] = softmax.max;
  coefficients[1] =
      static_cast<float>((offset + rest_slope - slope * softmax.log_sum) * scale / softmax.sum);
  coefficients[2] = static_cast<float>(slope * scale / softmax.sum);
}

// Coefficients of one row for given gradients of its log-prob and entropy.
SOD_DEVICE void logprob_gradient(const LogprobGradientCall &call, std::int64_t row) {
  float *coefficients = call.row_coefficients + 3 * row;
  if (target_at(call.ids, row) < 0) {
    coefficients[0] = coefficients[1] = coefficients[2] = call.sparse_gradient[row] = 0.0f;
    return;
  }
  const float scale = call.inverse_temperature;
  const float *statistics = call.statistics + row * statistics_width(call.world_size, 0);
  const RowSoftmax softmax =
      reduce_row(statistics, call.world_size, call.ids, row, scale, SingleLane());
  const double sampled = call.logprob_gradient == nullptr ? 0.0 : call.logprob_gradient[row];
  const double entropy = call.entropy_gradient == nullptr ? 0.0 : call.entropy_gradient[row];
  const double offset = -sampled - entropy * softmax.entropy;
  const double logprob = softmax.logprob(statistics[3 * call.world_size], scale);
  const double p = exp(logprob);
  const double dense = p == 0.0 ? 0.0 : p * (offset - entropy * logprob);
  coefficients[0] = softmax.max;
  coefficients[1] = static_cast<float>((offset + entropy * softmax.log_sum) * scale / softmax.sum);
  coefficients[2] = static_cast<float>(-entropy * scale / softmax.sum);
  call.sparse_gradient[row] = static_cast<float>((dense + sampled) * scale);
}

} // namespace sod_mcore
