// What the kernels take and give, the same for CPU and CUDA: plain pointers and sizes, no tensor
// library. All pointers of one call lie on one device. Arrays are C-contiguous except the logits,
// whose rows may lie further apart than they are wide.
#pragma once

#include <cstdint>

#include "portability.h"

namespace sod_mcore {

// The logits of one rank: columns [first_column, first_column + num_valid_columns) of the
// vocabulary, then padding up to `width`, which is never read and whose gradient is 0.
struct Shard {
  const void *logits;
  bool is_bfloat16; // else float32
  std::int64_t num_rows;
  std::int64_t width;
  std::int64_t row_stride; // elements
  std::int64_t num_valid_columns;
  std::int64_t first_column;
  float inverse_temperature;
};

// Global token ids of each row; an id of -1 is absent, and a row with target -1 carries no loss:
// it is not read, its outputs are 0 and so is its gradient.
struct TokenIds {
  const void *targets; // [N]
  bool targets_are_64_bit;
  const void *topk_ids; // [N, K], or null
  bool topk_ids_are_64_bit;
  std::int64_t num_topk; // K
  // [N, K], or null; a token to which the teacher gives -inf belongs to the rest.
  const float *teacher_topk_logprobs;
};

// Columns of the buffer that is summed over the ranks: three for each rank (max, S, E; zeros but in
// a rank's own place), then the logits of the target and of the K ids (from the rank that owns
// them). S and E leave the top-K tokens out, so that the rest's probability is a sum and not a
// difference.
SOD_DEVICE std::int64_t statistics_width(std::int64_t world_size, std::int64_t num_topk) {
  return 3 * world_size + 1 + num_topk;
}

struct StatisticsCall {
  Shard shard;
  TokenIds ids;
  std::int64_t rank;
  std::int64_t world_size;
  float *statistics; // [N, statistics_width], written whole
};

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2 };

// sod_mcore.ops.Objective; all coefficients 0 leaves log-probs and entropies.
struct Objective {
  float policy_coefficient;
  float clip_low;
  float clip_high;
  float dual_clip; // infinity: none
  float k2_coefficient;
  float k3_coefficient;
  Divergence topk_divergence;
  float topk_coefficient;
  float jsd_beta;
  float entropy_coefficient;
};

enum Term : int { kPolicyTerm, kK2Term, kK3Term, kTopkTerm, kEntropyTerm, kNumTerms };

// The coefficient step: from the summed statistics to the loss of each token and to what its
// gradient needs. Every rank computes it from the same numbers, so all take the same branches.
struct TokenLossCall {
  std::int64_t num_rows;
  std::int64_t world_size;
  float inverse_temperature;
  TokenIds ids;
  const float *statistics;       // [N, statistics_width], summed over the ranks
  Objective objective;
  const float *token_weights;    // [N], or null: 1
  const float *advantages;       // [N], or null: no policy term and no ratio
  const float *old_logprobs;     // [N], or null likewise
  const float *teacher_logprobs; // [N], or null where neither k2 nor k3 is on
  float *token_loss;             // [N]
  float *logprobs;               // [N]
  float *entropy;                // [N]
  float *ratio;                  // [N], or null
  bool *is_clipped;              // [N], or null
  float *terms;                  // [kNumTerms, N], or null
  float *topk_logprobs;          // [N, K] the student's, or null
  float *row_coefficients;       // [N, 3] m, alpha, beta
  float *sparse_gradient;        // [N, 1 + K] final values at the target and the top-K ids
};

// The same for log-probs and entropies with gradients of their own.
struct LogprobGradientCall {
  std::int64_t num_rows;
  std::int64_t world_size;
  float inverse_temperature;
  TokenIds ids; // without top-K
  const float *statistics;
  const float *logprob_gradient; // [N], or null: 0
  const float *entropy_gradient; // [N], or null: 0
  float *row_coefficients;       // [N, 3]
  float *sparse_gradient;        // [N, 1]
};

struct GradientCall {
  Shard shard;
  TokenIds ids;
  const float *row_coefficients;
  const float *sparse_gradient;
  const float *upstream;         // gradient of each token's loss, or null: 1
  std::int64_t upstream_stride;  // 0 where one value stands for all rows
  void *gradient;                // [N, width] of the logits' type; may be the logits themselves
  std::int64_t gradient_row_stride;
};

namespace cpu {
void run(const StatisticsCall &call, int num_threads);
void run(const TokenLossCall &call, int num_threads);
void run(const LogprobGradientCall &call, int num_threads);
void run(const GradientCall &call, int num_threads);
const char *target(); // the instruction set chosen for this processor
} // namespace cpu

#ifdef SOD_WITH_CUDA
// Each is one kernel on the given stream (a cudaStream_t) and does not wait for it.
// Throws std::runtime_error with CUDA's message if the launch fails.
namespace cuda {
void run(const StatisticsCall &call, void *stream);
void run(const TokenLossCall &call, void *stream);
void run(const LogprobGradientCall &call, void *stream);
void run(const GradientCall &call, void *stream);
} // namespace cuda
#endif

} // namespace sod_mcore
