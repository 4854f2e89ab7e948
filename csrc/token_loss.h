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
#include "row_softmax.h"

namespace sod_mcore {

// exp(20) is 4.9e8: past it a ratio says nothing more. The bounds and floors below are those of
// sod_mcore.algorithm.policy_loss and .divergences.
constexpr double kMaxLogRatio = 20.0;
constexpr double kTeacherRestMin = 1e-6;
constexpr double kStudentRestLogprobMin = -70.0;
constexpr double kLogprobMin = -1e4;

// Unlike fmin and fmax, these pass NaN on.
SOD_DEVICE double at_least(double value, double lowest) {
  return value < lowest ? lowest : value;
}

SOD_DEVICE double held_within(double value, double lowest, double highest) {
  return value > highest ? highest : at_least(value, lowest);
}

// Whether a bound took the place of a value, which then has no gradient.
SOD_DEVICE bool is_held(double value, double held) { return held < value || held > value; }

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
  const double held = held_within(d, -kMaxLogRatio, kMaxLogRatio);
  const double series = 1.0 + held / 3.0 * (1.0 + held / 4.0 * (1.0 + held / 5.0 * (1.0 + held / 6.0)));
  const double value = fabs(held) < 0.1 ? 0.5 * held * held * series : expm1(held) - held;
  return {value, is_held(d, held) ? 0.0 : -expm1(held)};
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
  const double held = held_within(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  const double ratio = exp(held);
  const double bounded = held_within(ratio, 1.0 - static_cast<double>(objective.clip_low),
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
  const bool is_flat = is_clipped || is_held(log_ratio, held);
  return {value, is_flat ? 0.0 : unclipped, ratio, is_clipped};
}

// What the terms of a row add up to: its loss term by term, and the parts of its gradient (see the
// top of this file).
struct RowLoss {
  double terms[kNumTerms];
  double sampled;    // derivative by the sampled token's log-prob
  double slope;      // B
  double offset;     // A without h_R / p_R
  double rest_slope; // h_R / p_R
  double ratio;
  bool is_clipped;
};

SOD_DEVICE double weight_of(const TokenLossCall &call, std::int64_t row) {
  return call.token_weights == nullptr ? 1.0 : call.token_weights[row];
}

// The policy loss, k2 and k3. A term that is off is not computed: its inputs need not be finite.
SOD_DEVICE void add_sampled_terms(const TokenLossCall &call, std::int64_t row, float logprob,
                                  RowLoss &loss) {
  const Objective &objective = call.objective;
  const double weight = weight_of(call, row);
  if (call.advantages != nullptr) {
    const PolicyTerm policy =
        policy_term(objective, logprob, call.old_logprobs[row], call.advantages[row]);
    loss.ratio = policy.ratio;
    loss.is_clipped = policy.is_clipped;
    if (objective.policy_coefficient != 0.0f) {
      loss.terms[kPolicyTerm] = objective.policy_coefficient * policy.value;
      loss.sampled += objective.policy_coefficient * policy.derivative;
    }
  }
  if (objective.k2_coefficient != 0.0f) {
    const SampledTerm k2 = k2_term(logprob, call.teacher_logprobs[row]);
    loss.terms[kK2Term] = weight * objective.k2_coefficient * k2.value;
    loss.sampled += weight * objective.k2_coefficient * k2.derivative;
  }
  if (objective.k3_coefficient != 0.0f) {
    const SampledTerm k3 = k3_term(logprob, call.teacher_logprobs[row]);
    loss.terms[kK3Term] = weight * objective.k3_coefficient * k3.value;
    loss.sampled += weight * objective.k3_coefficient * k3.derivative;
  }
  loss.offset -= loss.sampled;
}

SOD_DEVICE void add_entropy_term(const Objective &objective, double entropy, RowLoss &loss) {
  if (objective.entropy_coefficient == 0.0f) return;
  loss.terms[kEntropyTerm] = -static_cast<double>(objective.entropy_coefficient) * entropy;
  loss.slope += objective.entropy_coefficient;
  loss.offset += objective.entropy_coefficient * entropy;
}

// The student's log-prob of a bucket, and the bucket's share of the divergence.
struct Bucket {
  double logprob;
  BucketTerm term;
};

SOD_DEVICE Bucket bucket_at(const TokenLossCall &call, std::int64_t row, std::int64_t k,
                            float logit, const RowSoftmax &softmax) {
  const double logprob = softmax.logprob(logit, call.inverse_temperature);
  if (call.objective.topk_coefficient == 0.0f) return {logprob, {0.0, 0.0}};
  const double held = at_least(logprob, kLogprobMin);
  BucketTerm term = bucket_term(call.objective.topk_divergence, call.objective.jsd_beta, held,
                                call.ids.teacher_topk_logprobs[row * call.ids.num_topk + k]);
  if (is_held(logprob, held)) term.derivative = 0.0;
  return {logprob, term};
}

// The divergence over the buckets and the rest.
template <typename Lanes>
SOD_DEVICE void add_topk_term(const TokenLossCall &call, std::int64_t row, const float *logits,
                              const RowSoftmax &softmax, const Lanes &lanes, RowLoss &loss) {
  const Objective &objective = call.objective;
  if (objective.topk_coefficient == 0.0f) return;
  double value = 0.0, derivatives = 0.0, teacher_sum = 0.0;
  for (std::int64_t k = lanes.index(); k < call.ids.num_topk; k += lanes.count()) {
    if (!is_bucket(call.ids, row, k)) continue;
    const Bucket bucket = bucket_at(call, row, k, logits[k], softmax);
    value += bucket.term.value;
    derivatives += bucket.term.derivative;
    teacher_sum += exp(call.ids.teacher_topk_logprobs[row * call.ids.num_topk + k]);
  }
  value = lanes.sum(value);
  derivatives = lanes.sum(derivatives);
  const double q_rest = held_within(1.0 - lanes.sum(teacher_sum), kTeacherRestMin, 1.0);
  const double held = at_least(softmax.rest_logprob, kStudentRestLogprobMin);
  BucketTerm rest = bucket_term(objective.topk_divergence, objective.jsd_beta, held, log(q_rest));
  if (is_held(softmax.rest_logprob, held)) rest.derivative = 0.0;

  const double factor = weight_of(call, row) * objective.topk_coefficient;
  loss.terms[kTopkTerm] = factor * (value + rest.value);
  loss.offset -= factor * (derivatives + rest.derivative);
  loss.rest_slope = factor * rest.derivative / exp(held);
}

// p (A + B log p), 0 for a column masked to -inf.
SOD_DEVICE double dense_part(double logprob, double offset, double slope) {
  const double p = exp(logprob);
  return p == 0.0 ? 0.0 : p * (offset + slope * logprob);
}

// Final values at the sparse columns; the sampled token may be one of the buckets.
template <typename Lanes>
SOD_DEVICE void write_sparse(const TokenLossCall &call, std::int64_t row, const float *logits,
                             const RowSoftmax &softmax, const RowLoss &loss, const Lanes &lanes) {
  const std::int64_t target = target_at(call.ids, row);
  const double factor = weight_of(call, row) * call.objective.topk_coefficient;
  float *out = call.sparse_gradient + row * (1 + call.ids.num_topk);
  double target_bucket = 0.0, is_target_bucket = 0.0; // not 0 in one lane at most
  for (std::int64_t k = lanes.index(); k < call.ids.num_topk; k += lanes.count()) {
    double value = 0.0;
    if (is_bucket(call.ids, row, k)) {
      const Bucket bucket = bucket_at(call, row, k, logits[1 + k], softmax);
      value = dense_part(bucket.logprob, loss.offset, loss.slope) + factor * bucket.term.derivative;
      if (topk_id_at(call.ids, row, k) == target) {
        value += loss.sampled;
        target_bucket = value;
        is_target_bucket = 1.0;
      }
    }
    out[1 + k] = static_cast<float>(value * call.inverse_temperature);
  }
  target_bucket = lanes.sum(target_bucket);
  is_target_bucket = lanes.sum(is_target_bucket);
  if (lanes.index() != 0) return;
  const double logprob = softmax.logprob(logits[0], call.inverse_temperature);
  const double target_value =
      is_target_bucket != 0.0
          ? target_bucket
          : dense_part(logprob, loss.offset + loss.rest_slope, loss.slope) + loss.sampled;
  out[0] = static_cast<float>(target_value * call.inverse_temperature);
}

// The student's log-probs of the top-K ids, -inf where there is none.
template <typename Lanes>
SOD_DEVICE void write_topk_logprobs(const TokenLossCall &call, std::int64_t row,
                                    const float *logits, const RowSoftmax &softmax,
                                    const Lanes &lanes) {
  if (call.topk_logprobs == nullptr) return;
  float *out = call.topk_logprobs + row * call.ids.num_topk;
  for (std::int64_t k = lanes.index(); k < call.ids.num_topk; k += lanes.count())
    out[k] = topk_id_at(call.ids, row, k) < 0
                 ? -INFINITY
                 : static_cast<float>(softmax.logprob(logits[k], call.inverse_temperature));
}

SOD_DEVICE void write_row(const TokenLossCall &call, std::int64_t row, float logprob,
                          const RowSoftmax &softmax, const RowLoss &loss) {
  double total = 0.0;
  for (int term = 0; term < kNumTerms; ++term) {
    total += loss.terms[term];
    if (call.terms != nullptr)
      call.terms[term * call.num_rows + row] = static_cast<float>(loss.terms[term]);
  }
  call.token_loss[row] = static_cast<float>(total);
  call.logprobs[row] = logprob;
  call.entropy[row] = static_cast<float>(softmax.entropy);
  if (call.ratio != nullptr) call.ratio[row] = static_cast<float>(loss.ratio);
  if (call.is_clipped != nullptr) call.is_clipped[row] = loss.is_clipped;
  const double scale = call.inverse_temperature / softmax.sum;
  float *coefficients = call.row_coefficients + 3 * row;
  coefficients[0] = softmax.max;
  coefficients[1] = static_cast<float>(
      (loss.offset + loss.rest_slope - loss.slope * softmax.log_sum) * scale);
  coefficients[2] = static_cast<float>(loss.slope * scale);
}

template <typename Lanes>
SOD_DEVICE void write_row_without_loss(const TokenLossCall &call, std::int64_t row,
                                       const Lanes &lanes) {
  const std::int64_t num_topk = call.ids.num_topk;
  for (std::int64_t k = lanes.index(); k < 1 + num_topk; k += lanes.count())
    call.sparse_gradient[row * (1 + num_topk) + k] = 0.0f;
  if (call.topk_logprobs != nullptr)
    for (std::int64_t k = lanes.index(); k < num_topk; k += lanes.count())
      call.topk_logprobs[row * num_topk + k] = 0.0f;
  if (lanes.index() != 0) return;
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
  if (target_at(call.ids, row) < 0) {
    write_row_without_loss(call, row, lanes);
    return;
  }
  const float *statistics =
      call.statistics + row * statistics_width(call.world_size, call.ids.num_topk);
  const float *logits = statistics + 3 * call.world_size; // of the target, then of the top-K
  const RowSoftmax softmax = reduce_row(statistics, call.world_size, call.ids, row,
                                        call.inverse_temperature, lanes);
  // Rounded first: the ratio to an old log-prob that was written as float32 is exactly 1.
  const float logprob = static_cast<float>(softmax.logprob(logits[0], call.inverse_temperature));

  RowLoss loss = {};
  add_sampled_terms(call, row, logprob, loss);
  add_entropy_term(call.objective, softmax.entropy, loss);
  add_topk_term(call, row, logits + 1, softmax, lanes, loss);
  write_sparse(call, row, logits, softmax, loss, lanes);
  write_topk_logprobs(call, row, logits + 1, softmax, lanes);
  if (lanes.index() == 0) write_row(call, row, logprob, softmax, loss);
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
  const double slope = call.entropy_gradient == nullptr ? 0.0 : -call.entropy_gradient[row];
  const double offset = slope * softmax.entropy - sampled;
  const double logprob = softmax.logprob(statistics[3 * call.world_size], scale);
  coefficients[0] = softmax.max;
  coefficients[1] = static_cast<float>((offset - slope * softmax.log_sum) * scale / softmax.sum);
  coefficients[2] = static_cast<float>(slope * scale / softmax.sum);
  call.sparse_gradient[row] =
      static_cast<float>((dense_part(logprob, offset, slope) + sampled) * scale);
}

} // namespace sod_mcore
