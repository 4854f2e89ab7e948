// As much of CUDA as csrc/cuda_kernels.cu uses, on the CPU: the kernels run where there is no GPU,
// and under sanitizers. Each CUDA thread is a thread of the operating system, so a barrier that is
// missing is a data race, and one that not all threads reach hangs. Blocks run one after another.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __global__ inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static // one block at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

namespace emulation {

constexpr int kWarpSize = 32;

struct Warp {
  std::barrier<> barrier{kWarpSize};
  std::uint64_t slots[kWarpSize];
};

struct Block {
  explicit Block(unsigned num_threads, std::size_t shared_bytes)
      : barrier(num_threads), warps(num_threads / kWarpSize), shared(shared_bytes / 4) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
  std::vector<std::uint32_t> shared; // as large as asked for: a sanitizer sees what lies outside
};

inline thread_local Block *block = nullptr;

} // namespace emulation

inline thread_local dim3 threadIdx, blockIdx;

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

template <typename Value> Value __shfl_xor_sync(unsigned, Value value, int mask) {
  static_assert(sizeof(Value) <= sizeof(std::uint64_t));
  emulation::Warp &warp = emulation::block->warps[threadIdx.x / emulation::kWarpSize];
  const unsigned lane = threadIdx.x % emulation::kWarpSize;
  std::memcpy(&warp.slots[lane], &value, sizeof(Value));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.slots[lane ^ static_cast<unsigned>(mask)], sizeof(Value));
  warp.barrier.arrive_and_wait(); // before the next value goes into the slot
  return value;
}

inline void atomicOr(std::uint32_t *address, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(*address).fetch_or(value, std::memory_order_relaxed);
}

inline std::uint32_t *emulated_dynamic_shared_words() { return emulation::block->shared.data(); }

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// As on the H100.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Call>
cudaError_t cudaLaunchKernel(void (*kernel)(Call), dim3 grid, dim3 threads, void **arguments,
                             std::size_t shared_bytes, cudaStream_t) {
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  const Call &call = *static_cast<const Call *>(arguments[0]);
  emulation::Block block(threads.x, shared_bytes);
  const auto run_thread = [&](unsigned index) {
    emulation::block = &block;
    threadIdx.x = index;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      // Shared memory starts with whatever was there.
      if (index == 0) block.shared.assign(block.shared.size(), 0xa5a5a5a5u);
      block.barrier.arrive_and_wait();
      kernel(call);
      block.barrier.arrive_and_wait();
    }
  };
  std::vector<std::thread> running;
  for (unsigned index = 0; index < threads.x; ++index) running.emplace_back(run_thread, index);
  for (std::thread &thread : running) thread.join();
  return cudaSuccess;
}
