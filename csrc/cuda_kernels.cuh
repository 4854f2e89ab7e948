// The kernels on the GPU: one block for a row of logits, one warp for the loss of a token. The
// logits are read in 16-byte vectors, several in flight in each thread, since memory is the limit.
//
// g++ compiles this file too, so that the kernels are tested, also under sanitizers, on machines
// without a GPU; see tests/csrc/test_emulation.py.
#pragma once

#include "cuda_primitives.cuh"

#include "kernels.h"
#include "token_loss.h"

namespace sod_mcore {
namespace cuda {

// Threads of the block of a row; a short row would leave many of a large block without a vector.
#ifdef SOD_SMALL_BLOCKS
constexpr int kThreadsOfWideRow = 96; // in the emulation they are threads of the operating system
constexpr int kThreadsOfNarrowRow = 64;
constexpr std::int64_t kWideRow = 2048;
#else
constexpr int kThreadsOfWideRow = 512;
constexpr int kThreadsOfNarrowRow = 128;
constexpr std::int64_t kWideRow = 32768; // columns
#endif
constexpr int kThreadsPerMultiprocessor = 1024; // at least: 64 registers for each
constexpr int kVectorsPerThread = 4;            // 16-byte loads in flight
constexpr int kThreadsOfTokens = 128;

// Columns of a row to leave out, one bit each, in shared memory: a word for the columns before the
// vectors, one for those after them, and then one for each tile of each thread, with a byte for
// each of its vectors, so that a thread learns about all of them from one load.
template <int kThreads> struct LeftOut {
  static_assert(kVectorsPerThread <= 4, "a word has four bytes");
  static constexpr int kTile = kThreads * kVectorsPerThread; // vectors

  std::uint32_t *words;

  // Words for a row of so many vectors.
  SOD_DEVICE static std::int64_t num_words(std::int64_t num_vectors) {
    return 2 + (num_vectors + kTile - 1) / kTile * kThreads;
  }

  template <typename Logit>
  __device__ __forceinline__ void add(const Split &split, int column) const {
    constexpr int kCount = kPerVector<Logit>;
    if (column < split.head) {
      atomicOr(words, 1u << column);
    } else if (column >= split.tail) {
      atomicOr(words + 1, 1u << (column - split.tail));
    } else {
      const int vector = (column - split.head) / kCount;
      const int byte = vector / kThreads % kVectorsPerThread;
      atomicOr(words + 2 + vector / kTile * kThreads + vector % kThreads,
               1u << (8 * byte + (column - split.head) % kCount));
    }
  }

  __device__ __forceinline__ bool has_in_head(int column) const {
    return (words[0] >> column & 1u) != 0;
  }

  __device__ __forceinline__ bool has_in_tail(int column) const {
    return (words[1] >> column & 1u) != 0;
  }

  __device__ __forceinline__ std::uint32_t of_tile(int tile) const {
    return words[2 + tile * kThreads + threadIdx.x];
  }
};

// The bits of a row, all threads of the block together.
template <typename Logit, int kThreads>
__device__ __forceinline__ LeftOut<kThreads> find_left_out(const StatisticsCall &call,
                                                           std::int64_t row, const Split &split) {
  const Shard &shard = call.shard;
  const TokenIds &ids = call.ids;
  const LeftOut<kThreads> left_out = {dynamic_shared_words()};
  const int num_words = static_cast<int>(left_out.num_words(split.num_vectors));
  for (int i = threadIdx.x; i < num_words; i += kThreads) left_out.words[i] = 0;
  __syncthreads();
  for (int k = threadIdx.x; k < ids.num_topk; k += kThreads) {
    if (!is_bucket(ids, row, k)) continue;
    const std::int64_t column =
        local_column(topk_id_at(ids, row, k), shard.first_column, shard.num_valid_columns);
    if (column >= 0)
      left_out.template add<Logit>(split, static_cast<int>(column));
  }
  __syncthreads();
  return left_out;
}

// A thread's share of the summary of a row, E divided by log 2.
struct Partial {
  float max = kNoMaximum;
  float sum = 0.0f;
  float shifted_sum = 0.0f;
};

// Moves to a larger maximum. `scale` turns a difference of logits into a power of two.
__device__ __forceinline__ void rescale(Partial &row, float max, float scale) {
  const float shift = fmaxf((row.max - max) * scale, kSmallestPower);
  const float factor = power_of_two(shift);
  row.shifted_sum = factor * (row.shifted_sum + shift * row.sum);
  row.sum *= factor;
  row.max = max;
}

// Adds logits, with one exponential each and one for all.
template <int kCount>
__device__ __forceinline__ void add(Partial &row, const float (&logits)[kCount], float scale) {
  float max = row.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, logits[i]); // takes no NaN
  rescale(row, max, scale);
  // Summed apart from what was there: a long sum of small numbers would round each time.
  float sums[2] = {}, shifted_sums[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float power = (logits[i] - max) * scale;
    const float exponential = power_of_two(power);
    sums[i % 2] += exponential;
    shifted_sums[i % 2] += exponential * fmaxf(power, kSmallestPower);
  }
  row.sum += sums[0] + sums[1];
  row.shifted_sum += shifted_sums[0] + shifted_sums[1];
}

// The columns of a row that one thread takes.
template <typename Logit, int kThreads, bool kHasTopk>
__device__ __forceinline__ Partial summarise(const Logit *row, int num_columns, const Split &split,
                                             const LeftOut<kThreads> &left_out, float scale) {
  constexpr int kCount = kPerVector<Logit>;
  const int thread = threadIdx.x;
  Partial partial;
  const bool has_head = thread < split.head, has_tail = thread < num_columns - split.tail;
  if (has_head || has_tail) {
    float ends[2] = {-INFINITY, -INFINITY};
    if (has_head && !(kHasTopk && left_out.has_in_head(thread))) ends[0] = to_float(row[thread]);
    if (has_tail && !(kHasTopk && left_out.has_in_tail(thread)))
      ends[1] = to_float(row[split.tail + thread]);
    add(partial, ends, scale);
  }
  const uint4 *vectors = reinterpret_cast<const uint4 *>(row + split.head);
  const std::uint32_t masked = sizeof(Logit) == 2 ? 0xff80ff80u : 0xff800000u; // -inf
  for (int tile = 0; tile * kThreads * kVectorsPerThread + thread < split.num_vectors; ++tile) {
    const int first = tile * kThreads * kVectorsPerThread + thread;
    uint4 loaded[kVectorsPerThread];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int vector = first + v * kThreads;
      loaded[v] = uint4{masked, masked, masked, masked};
      if (vector < split.num_vectors) loaded[v] = vectors[vector];
    }
    float logits[kVectorsPerThread * kCount];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      float values[kCount];
      unpack(loaded[v], values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) logits[v * kCount + i] = values[i];
    }
    const std::uint32_t bits = kHasTopk ? left_out.of_tile(tile) : 0u;
    if (bits != 0) { // seldom
#pragma unroll
      for (int i = 0; i < kVectorsPerThread * kCount; ++i)
        if ((bits >> (i / kCount * 8 + i % kCount) & 1u) != 0) logits[i] = -INFINITY;
    }
    add(partial, logits, scale);
  }
  return partial;
}

// The summary of all threads' shares, in thread 0.
template <int kThreads>
__device__ __forceinline__ RowSummary merge_over_block(Partial partial, float scale) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ float maxima[kWarps];
  __shared__ double sums[kWarps], shifted_sums[kWarps];
  const int warp = threadIdx.x / kWarpSize;
  const bool is_first_lane = threadIdx.x % kWarpSize == 0;
  float max = max_over_warp(partial.max);
  if (is_first_lane) maxima[warp] = max;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) max = fmaxf(max, maxima[w]);
  rescale(partial, max, scale);
  const double sum = sum_over_warp(partial.sum);
  const double shifted_sum = sum_over_warp(partial.shifted_sum);
  if (is_first_lane) {
    sums[warp] = sum;
    shifted_sums[warp] = shifted_sum;
  }
  __syncthreads();
  RowSummary row = {max, 0.0, 0.0};
  if (threadIdx.x != 0) return row;
  for (int w = 0; w < kWarps; ++w) {
    row.sum += sums[w];
    row.shifted_sum += shifted_sums[w] * kLog2;
  }
  return row;
}

// Everything in a row of the statistics but the summary in the rank's own place.
template <int kThreads, typename Logit>
__device__ __forceinline__ void write_picked(const StatisticsCall &call, std::int64_t row,
                                             const Logit *logits, float *out) {
  const int num_summaries = static_cast<int>(3 * call.world_size);
  const int own = static_cast<int>(3 * call.rank);
  const int width = static_cast<int>(statistics_width(call.world_size, call.ids.num_topk));
  for (int i = threadIdx.x; i < width; i += kThreads) {
    if (i < num_summaries) {
      if (i < own || i >= own + 3) out[i] = 0.0f;
      continue;
    }
    const int k = i - num_summaries - 1;
    const std::int64_t id = k < 0 ? target_at(call.ids, row) : topk_id_at(call.ids, row, k);
    out[i] = pick(logits, id, call.shard.first_column, call.shard.num_valid_columns);
  }
}

template <typename Logit, int kThreads, bool kHasTopk>
__global__ void __launch_bounds__(kThreads, kThreadsPerMultiprocessor / kThreads)
    statistics_kernel(StatisticsCall call) {
  const Shard &shard = call.shard;
  const std::int64_t n = blockIdx.x;
  const std::int64_t width = statistics_width(call.world_size, call.ids.num_topk);
  float *out = call.statistics + n * width;
  if (target_at(call.ids, n) < 0) {
    for (int i = threadIdx.x; i < width; i += kThreads) out[i] = 0.0f;
    return;
  }
  const Logit *row = static_cast<const Logit *>(shard.logits) + n * shard.row_stride;
  const int num_columns = static_cast<int>(shard.num_valid_columns);
  const float scale = shard.inverse_temperature * kLog2E;
  const Split columns = split(row, num_columns);
  LeftOut<kThreads> left_out = {};
  if (kHasTopk) left_out = find_left_out<Logit, kThreads>(call, n, columns);
  write_picked<kThreads>(call, n, row, out);
  const Partial partial =
      summarise<Logit, kThreads, kHasTopk>(row, num_columns, columns, left_out, scale);
  const RowSummary summary = merge_over_block<kThreads>(partial, scale);
  if (threadIdx.x != 0) return;
  float *own = out + 3 * call.rank;
  own[0] = summary.max;
  own[1] = static_cast<float>(summary.sum);
  own[2] = static_cast<float>(summary.shifted_sum);
}

// The lanes of a warp share a token.
struct Warp {
  __device__ __forceinline__ int index() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int count() const { return kWarpSize; }
  __device__ __forceinline__ double sum(double value) const { return sum_over_warp(value); }
  __device__ __forceinline__ float max(float value) const { return max_over_warp(value); }
};

__global__ void __launch_bounds__(kThreadsOfTokens, 4) token_loss_kernel(TokenLossCall call) {
  constexpr int kTokensPerBlock = kThreadsOfTokens / kWarpSize;
  const std::int64_t n =
      static_cast<std::int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (n < call.num_rows) token_loss(call, n, Warp());
}

__global__ void __launch_bounds__(kThreadsOfTokens, 4)
    logprob_gradient_kernel(LogprobGradientCall call) {
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kThreadsOfTokens + threadIdx.x;
  if (n < call.num_rows) logprob_gradient(call, n);
}

template <int kThreads, typename Logit>
__device__ __forceinline__ void fill_with_zeros(Logit *values, int count) {
  const int thread = threadIdx.x;
  const Split columns = split(values, count);
  uint4 *vectors = reinterpret_cast<uint4 *>(values + columns.head);
  if (thread < columns.head) values[thread] = Logit{};
  for (int v = thread; v < columns.num_vectors; v += kThreads) vectors[v] = uint4{0, 0, 0, 0};
  if (columns.tail + thread < count) values[columns.tail + thread] = Logit{};
}

// From a logit to its gradient: e^((z - m) s) (alpha + beta (z - m) s), in powers of two.
struct DenseGradient {
  float max, scale, alpha, beta;

  // An addend of beta = 0 costs nothing: the kernel waits for memory.
  __device__ __forceinline__ float at(float logit) const {
    const float power = (logit - max) * scale;
    return power_of_two(power) * (alpha + beta * fmaxf(power, kSmallestPower));
  }
};

template <int kThreads, typename Logit>
__device__ __forceinline__ void write_dense(const Logit *row, Logit *out, int num_columns,
                                            const DenseGradient &gradient) {
  constexpr int kCount = kPerVector<Logit>;
  const int thread = threadIdx.x;
  const auto write = [&](int column) {
    from_float(gradient.at(to_float(row[column])), out[column]);
  };
  if ((reinterpret_cast<std::uintptr_t>(row) ^ reinterpret_cast<std::uintptr_t>(out)) % 16 != 0) {
    // No vector of the one is a vector of the other.
    for (int column = thread; column < num_columns; column += kThreads) write(column);
    return;
  }
  const Split columns = split(row, num_columns);
  if (thread < columns.head) write(thread);
  if (columns.tail + thread < num_columns) write(columns.tail + thread);
  const uint4 *vectors = reinterpret_cast<const uint4 *>(row + columns.head);
  uint4 *out_vectors = reinterpret_cast<uint4 *>(out + columns.head);
  for (int first = thread; first < columns.num_vectors; first += kThreads * kVectorsPerThread) {
    uint4 loaded[kVectorsPerThread];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int vector = first + v * kThreads;
      if (vector < columns.num_vectors) loaded[v] = vectors[vector];
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int vector = first + v * kThreads;
      if (vector >= columns.num_vectors) break;
      float values[kCount];
      unpack(loaded[v], values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = gradient.at(values[i]);
      out_vectors[vector] = pack(values);
    }
  }
}

template <typename Logit, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsPerMultiprocessor / kThreads)
    gradient_kernel(GradientCall call) {
  const Shard &shard = call.shard;
  const TokenIds &ids = call.ids;
  const std::int64_t n = blockIdx.x;
  const int num_columns = static_cast<int>(shard.num_valid_columns);
  const int width = static_cast<int>(shard.width);
  const float *coefficients = call.row_coefficients + 3 * n;
  const float upstream = call.upstream == nullptr ? 1.0f : call.upstream[n * call.upstream_stride];
  Logit *out = static_cast<Logit *>(call.gradient) + n * call.gradient_row_stride;
  if (has_no_dense_gradient(coefficients, upstream)) {
    fill_with_zeros<kThreads>(out, width);
  } else {
    const Logit *row = static_cast<const Logit *>(shard.logits) + n * shard.row_stride;
    const DenseGradient gradient = {coefficients[0], shard.inverse_temperature * kLog2E,
                                    coefficients[1] * upstream,
                                    coefficients[2] * upstream * static_cast<float>(kLog2)};
    write_dense<kThreads>(row, out, num_columns, gradient);
    fill_with_zeros<kThreads>(out + num_columns, width - num_columns);
  }
  const std::int64_t target = target_at(ids, n);
  if (target < 0) return;
  const float *sparse = call.sparse_gradient + n * (1 + ids.num_topk);
  __syncthreads(); // the dense values lie where the sparse ones go
  if (threadIdx.x == 0)
    put(out, target, shard.first_column, shard.num_valid_columns, sparse[0] * upstream);
  __syncthreads(); // the target may be one of the top-K
  for (int k = threadIdx.x; k < ids.num_topk; k += kThreads)
    if (is_bucket(ids, n, k))
      put(out, topk_id_at(ids, n, k), shard.first_column, shard.num_valid_columns,
          sparse[1 + k] * upstream);
}

} // namespace cuda
} // namespace sod_mcore
