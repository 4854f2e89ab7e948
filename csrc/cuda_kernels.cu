// Launches of the kernels on the GPU: which kernel for which call, in blocks of what size. Plain
// calls of the CUDA runtime and no <<< >>>, so that the emulation of the tests compiles it as well.
#include "cuda_kernels.cuh"

#include <limits>
#include <stdexcept>
#include <string>

namespace sod_mcore {
namespace cuda {
namespace {

void check(cudaError_t status, const char *kernel) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel +
                             " was not started: " + cudaGetErrorString(status));
}

struct Grid {
  std::int64_t blocks;
  int threads;
  std::int64_t shared_bytes; // dynamic
};

template <typename Call>
void launch(const char *name, void (*kernel)(Call), const Grid &grid, const Call &call,
            void *stream) {
  constexpr std::int64_t kAlwaysAllowed = 47 << 10; // of 48 KB, less the kernels' static arrays
  if (grid.blocks == 0) return;
  if (grid.shared_bytes > kAlwaysAllowed)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          name);
  void *arguments[] = {const_cast<Call *>(&call)};
  const cudaError_t status =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid.blocks)),
                       dim3(static_cast<unsigned>(grid.threads)), arguments,
                       static_cast<std::size_t>(grid.shared_bytes),
                       static_cast<cudaStream_t>(stream));
  const cudaError_t pending = cudaGetLastError(); // and none stays behind for the next to ask
  check(status != cudaSuccess ? status : pending, name);
}

std::int64_t blocks_of(std::int64_t num_items, int items_per_block) {
  return (num_items + items_per_block - 1) / items_per_block;
}

// Columns are counted in 32 bits inside a row.
void check_width(const Shard &shard, const char *kernel) {
  if (shard.width > std::numeric_limits<std::int32_t>::max() / 2)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": rows of " +
                             std::to_string(shard.width) + " logits are too wide");
}

template <typename Logit, int kThreads>
void launch_statistics(const StatisticsCall &call, void *stream) {
  const Shard &shard = call.shard;
  if (call.ids.num_topk == 0) {
    launch("statistics", &statistics_kernel<Logit, kThreads, false>, {shard.num_rows, kThreads, 0},
           call, stream);
    return;
  }
  const std::int64_t num_vectors = shard.num_valid_columns / kPerVector<Logit>;
  const std::int64_t shared = 4 * LeftOut<kThreads>::num_words(num_vectors);
  launch("statistics", &statistics_kernel<Logit, kThreads, true>,
         {shard.num_rows, kThreads, shared}, call, stream);
}

template <typename Logit> void launch_statistics(const StatisticsCall &call, void *stream) {
  if (call.shard.width >= kWideRow)
    launch_statistics<Logit, kThreadsOfWideRow>(call, stream);
  else
    launch_statistics<Logit, kThreadsOfNarrowRow>(call, stream);
}

template <typename Logit> void launch_gradient(const GradientCall &call, void *stream) {
  if (call.shard.width >= kWideRow)
    launch("gradient", &gradient_kernel<Logit, kThreadsOfWideRow>,
           {call.shard.num_rows, kThreadsOfWideRow, 0}, call, stream);
  else
    launch("gradient", &gradient_kernel<Logit, kThreadsOfNarrowRow>,
           {call.shard.num_rows, kThreadsOfNarrowRow, 0}, call, stream);
}

} // namespace

void run(const StatisticsCall &call, void *stream) {
  check_width(call.shard, "statistics");
  if (call.shard.is_bfloat16)
    launch_statistics<std::uint16_t>(call, stream);
  else
    launch_statistics<float>(call, stream);
}

void run(const TokenLossCall &call, void *stream) {
  const std::int64_t blocks = blocks_of(call.num_rows, kThreadsOfTokens / kWarpSize);
  launch("token_loss", &token_loss_kernel, {blocks, kThreadsOfTokens, 0}, call, stream);
}

void run(const LogprobGradientCall &call, void *stream) {
  const std::int64_t blocks = blocks_of(call.num_rows, kThreadsOfTokens);
  launch("logprob_gradient", &logprob_gradient_kernel, {blocks, kThreadsOfTokens, 0}, call,
         stream);
}

void run(const GradientCall &call, void *stream) {
  check_width(call.shard, "gradient");
  if (call.shard.is_bfloat16)
    launch_gradient<std::uint16_t>(call, stream);
  else
    launch_gradient<float>(call, stream);
}

} // namespace cuda
} // namespace sod_mcore
