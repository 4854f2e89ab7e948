// The kernels on the CPU: rows spread over threads, each row in vectors of the widest instruction
// set that the processor has, chosen at run time.
#include "kernels.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "row_math.h"
#include "threads.h"
#include "token_loss.h"

namespace sod_mcore {
namespace cpu {
namespace {

struct RowFunctions {
  RowSummary (*summarise_float32)(const float *, std::int64_t, const std::int64_t *, std::int64_t,
                                  float);
  RowSummary (*summarise_bfloat16)(const std::uint16_t *, std::int64_t, const std::int64_t *,
                                   std::int64_t, float);
  void (*write_gradient_float32)(const float *, std::int64_t, float, float, float, float, float *);
  void (*write_gradient_bfloat16)(const std::uint16_t *, std::int64_t, float, float, float, float,
                                  std::uint16_t *);
};

#define SOD_INLINE static inline __attribute__((always_inline))

namespace baseline {
#include "cpu_rows.inc"
} // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SOD_HAS_TARGETS 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace x86_64_v3 {
#include "cpu_rows.inc"
} // namespace x86_64_v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace x86_64_v4 {
#include "cpu_rows.inc"
} // namespace x86_64_v4
#pragma GCC pop_options
#endif

struct Target {
  const char *name;
  const RowFunctions *functions;
};

Target choose_target() {
#ifdef SOD_HAS_TARGETS
  // Features and not models: "arch=haswell" would turn an AMD processor away.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return {"x86-64-v4", &x86_64_v4::kFunctions};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return {"x86-64-v3", &x86_64_v3::kFunctions};
#endif
  return {"baseline", &baseline::kFunctions};
}

const Target &chosen_target() {
  static const Target target = choose_target();
  return target;
}

// Local columns, ascending, of the ids that count as buckets and lie on this shard.
void find_buckets(const Shard &shard, const TokenIds &ids, std::int64_t row,
                  std::vector<std::int64_t> &columns) {
  columns.clear();
  for (std::int64_t k = 0; k < ids.num_topk; ++k) {
    if (!is_bucket(ids, row, k)) continue;
    const std::int64_t column =
        local_column(topk_id_at(ids, row, k), shard.first_column, shard.num_valid_columns);
    if (column >= 0) columns.push_back(column);
  }
  std::sort(columns.begin(), columns.end());
}

RowSummary summarise(const float *row, const Shard &shard,
                     const std::vector<std::int64_t> &left_out) {
  return chosen_target().functions->summarise_float32(
      row, shard.num_valid_columns, left_out.data(), static_cast<std::int64_t>(left_out.size()),
      shard.inverse_temperature);
}

RowSummary summarise(const std::uint16_t *row, const Shard &shard,
                     const std::vector<std::int64_t> &left_out) {
  return chosen_target().functions->summarise_bfloat16(
      row, shard.num_valid_columns, left_out.data(), static_cast<std::int64_t>(left_out.size()),
      shard.inverse_temperature);
}

template <typename Logit>
void write_statistics(const StatisticsCall &call, std::int64_t begin, std::int64_t end) {
  const Shard &shard = call.shard;
  const TokenIds &ids = call.ids;
  const std::int64_t width = statistics_width(call.world_size, ids.num_topk);
  std::vector<std::int64_t> buckets;
  for (std::int64_t n = begin; n < end; ++n) {
    float *out = call.statistics + n * width;
    std::fill(out, out + width, 0.0f);
    const std::int64_t target = target_at(ids, n);
    if (target < 0) continue;
    const Logit *row = static_cast<const Logit *>(shard.logits) + n * shard.row_stride;
    find_buckets(shard, ids, n, buckets);
    const RowSummary summary = summarise(row, shard, buckets);
    float *own = out + 3 * call.rank;
    own[0] = summary.max;
    own[1] = static_cast<float>(summary.sum);
    own[2] = static_cast<float>(summary.shifted_sum);
    float *picked = out + 3 * call.world_size;
    picked[0] = pick(row, target, shard.first_column, shard.num_valid_columns);
    for (std::int64_t k = 0; k < ids.num_topk; ++k)
      picked[1 + k] =
          pick(row, topk_id_at(ids, n, k), shard.first_column, shard.num_valid_columns);
  }
}

void write_dense(const float *row, const GradientCall &call, const float *coefficients,
                 float upstream, float *out) {
  chosen_target().functions->write_gradient_float32(
      row, call.shard.num_valid_columns, call.shard.inverse_temperature, coefficients[0],
      coefficients[1] * upstream, coefficients[2] * upstream, out);
}

void write_dense(const std::uint16_t *row, const GradientCall &call, const float *coefficients,
                 float upstream, std::uint16_t *out) {
  chosen_target().functions->write_gradient_bfloat16(
      row, call.shard.num_valid_columns, call.shard.inverse_temperature, coefficients[0],
      coefficients[1] * upstream, coefficients[2] * upstream, out);
}

template <typename Logit>
void write_gradients(const GradientCall &call, std::int64_t begin, std::int64_t end) {
  const Shard &shard = call.shard;
  const TokenIds &ids = call.ids;
  for (std::int64_t n = begin; n < end; ++n) {
    const Logit *row = static_cast<const Logit *>(shard.logits) + n * shard.row_stride;
    Logit *out = static_cast<Logit *>(call.gradient) + n * call.gradient_row_stride;
    const float *coefficients = call.row_coefficients + 3 * n;
    const float upstream =
        call.upstream == nullptr ? 1.0f : call.upstream[n * call.upstream_stride];
    std::fill(out + shard.num_valid_columns, out + shard.width, Logit{});
    if (has_no_dense_gradient(coefficients, upstream))
      std::fill(out, out + shard.num_valid_columns, Logit{});
    else
      write_dense(row, call, coefficients, upstream, out);
    const std::int64_t target = target_at(ids, n);
    if (target < 0) continue;
    const float *sparse = call.sparse_gradient + n * (1 + ids.num_topk);
    put(out, target, shard.first_column, shard.num_valid_columns, sparse[0] * upstream);
    for (std::int64_t k = 0; k < ids.num_topk; ++k)
      if (is_bucket(ids, n, k))
        put(out, topk_id_at(ids, n, k), shard.first_column, shard.num_valid_columns,
            sparse[1 + k] * upstream);
  }
}

} // namespace

const char *target() { return chosen_target().name; }

void run(const StatisticsCall &call, int num_threads) {
  for_rows(call.shard.num_rows, call.shard.width, num_threads,
           [&](std::int64_t begin, std::int64_t end) {
             if (call.shard.is_bfloat16)
               write_statistics<std::uint16_t>(call, begin, end);
             else
               write_statistics<float>(call, begin, end);
           });
}

void run(const TokenLossCall &call, int num_threads) {
  constexpr std::int64_t kValuesPerId = 64; // a few exponentials in double
  for_rows(call.num_rows, kValuesPerId * (8 + call.ids.num_topk), num_threads,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t n = begin; n < end; ++n) token_loss(call, n, SingleLane());
           });
}

void run(const LogprobGradientCall &call, int) {
  for (std::int64_t n = 0; n < call.num_rows; ++n) logprob_gradient(call, n);
}

void run(const GradientCall &call, int num_threads) {
  for_rows(call.shard.num_rows, call.shard.width, num_threads,
           [&](std::int64_t begin, std::int64_t end) {
             if (call.shard.is_bfloat16)
               write_gradients<std::uint16_t>(call, begin, end);
             else
               write_gradients<float>(call, begin, end);
           });
}

} // namespace cpu
} // namespace sod_mcore
