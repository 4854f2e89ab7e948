// What the kernels on the GPU are made of: loads and stores of 16 bytes, exponentials of a single
// instruction, reductions over a warp. g++ compiles it too; see tests/csrc/test_emulation.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

#include "row_math.h"

namespace sod_mcore {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename Logit> constexpr int kPerVector = 16 / static_cast<int>(sizeof(Logit));

constexpr float kLog2E = 1.44269504f;
constexpr double kLog2 = 0.693147180559945309;
// 2^x is 0 below; x is held here where it multiplies 2^x, since 0 * -inf would be NaN.
constexpr float kSmallestPower = -150.0f;

// One instruction, within 2 units in the last place; NaN stays NaN.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return exp2f(x);
#endif
}

// Two bfloat16 in one word, rounded to nearest, ties to even.
__device__ __forceinline__ std::uint32_t pack_bfloat16(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  std::uint16_t halves[2];
  from_float(low, halves[0]);
  from_float(high, halves[1]);
  return halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
#endif
}

__device__ __forceinline__ void unpack(const uint4 &vector, float (&values)[4]) {
  const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = bits_to_float(words[i]);
}

__device__ __forceinline__ void unpack(const uint4 &vector, float (&values)[8]) {
  const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = bits_to_float(words[i] << 16);
    values[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack(const float (&values)[4]) {
  return {float_to_bits(values[0]), float_to_bits(values[1]), float_to_bits(values[2]),
          float_to_bits(values[3])};
}

__device__ __forceinline__ uint4 pack(const float (&values)[8]) {
  return {pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]),
          pack_bfloat16(values[4], values[5]), pack_bfloat16(values[6], values[7])};
}

// How columns that lie side by side split into vectors on addresses of 16 bytes and, at both ends,
// fewer columns than make a vector.
struct Split {
  int head; // columns
  int num_vectors;
  int tail; // first column after the vectors
};

template <typename Logit>
__device__ __forceinline__ Split split(const Logit *values, int count) {
  constexpr int kCount = kPerVector<Logit>;
  const int past_a_vector =
      static_cast<int>(reinterpret_cast<std::uintptr_t>(values) / sizeof(Logit) % kCount);
  const int to_next_vector = past_a_vector == 0 ? 0 : kCount - past_a_vector;
  const int head = to_next_vector < count ? to_next_vector : count;
  const int num_vectors = (count - head) / kCount;
  return {head, num_vectors, head + num_vectors * kCount};
}

__device__ __forceinline__ std::uint32_t *dynamic_shared_words() {
#ifdef __CUDACC__
  extern __shared__ std::uint32_t words[];
  return words;
#else
  return emulated_dynamic_shared_words();
#endif
}

__device__ __forceinline__ double sum_over_warp(double value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

} // namespace cuda
} // namespace sod_mcore
