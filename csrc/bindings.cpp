// Python module `sod_mcore.ops._C`: pointers, sizes and the stream go in as numbers, so that the
// binary depends neither on torch nor on its version. Nothing is checked here: whoever passes a
// pointer has checked the tensor behind it (sod_mcore/ops/arguments.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h> // std::optional

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t; // 0: no such array

template <typename Value> const Value *in(Address address) {
  return reinterpret_cast<const Value *>(address);
}

template <typename Value> Value *out(Address address) { return reinterpret_cast<Value *>(address); }

sod_mcore::Divergence divergence_of(const std::string &name) {
  if (name == "forward_kl") return sod_mcore::Divergence::forward_kl;
  if (name == "reverse_kl") return sod_mcore::Divergence::reverse_kl;
  if (name == "jsd") return sod_mcore::Divergence::jsd;
  throw std::invalid_argument("topk_divergence=" + name +
                              " must be forward_kl, reverse_kl or jsd");
}

sod_mcore::Shard make_shard(Address logits, bool is_bfloat16, std::int64_t num_rows,
                            std::int64_t width, std::int64_t row_stride,
                            std::int64_t num_valid_columns, std::int64_t first_column,
                            float inverse_temperature) {
  return {in<void>(logits), is_bfloat16,       num_rows,     width,
          row_stride,       num_valid_columns, first_column, inverse_temperature};
}

sod_mcore::TokenIds make_ids(Address targets, bool targets_are_64_bit, Address topk_ids,
                             bool topk_ids_are_64_bit, std::int64_t num_topk,
                             Address teacher_topk_logprobs) {
  return {in<void>(targets),   targets_are_64_bit, in<void>(topk_ids),
          topk_ids_are_64_bit, num_topk,           in<float>(teacher_topk_logprobs)};
}

sod_mcore::Objective make_objective(float policy_coefficient, float clip_low, float clip_high,
                                    std::optional<float> dual_clip, float k2_coefficient,
                                    float k3_coefficient, const std::string &topk_divergence,
                                    float topk_coefficient, float jsd_beta,
                                    float entropy_coefficient) {
  return {policy_coefficient,
          clip_low,
          clip_high,
          dual_clip.value_or(std::numeric_limits<float>::infinity()),
          k2_coefficient,
          k3_coefficient,
          divergence_of(topk_divergence),
          topk_coefficient,
          jsd_beta,
          entropy_coefficient};
}

// Where a kernel runs: on the CPU on some threads, or on a CUDA stream.
struct Cpu {
  int num_threads;
  template <typename Call> void run(const Call &call) const {
    const py::gil_scoped_release unlocked;
    sod_mcore::cpu::run(call, num_threads);
  }
};

#ifdef SOD_WITH_CUDA
struct Cuda {
  Address stream;
  template <typename Call> void run(const Call &call) const {
    const py::gil_scoped_release unlocked;
    sod_mcore::cuda::run(call, reinterpret_cast<void *>(stream));
  }
};
#endif

template <typename Place> void define_kernels(py::class_<Place> &place) {
  using namespace py::literals;
  place.def(
      "row_statistics",
      [](const Place &self, const sod_mcore::Shard &shard, const sod_mcore::TokenIds &ids,
         std::int64_t rank, std::int64_t world_size, Address statistics) {
        self.run(sod_mcore::StatisticsCall{shard, ids, rank, world_size, out<float>(statistics)});
      },
      "shard"_a, "ids"_a, py::kw_only(), "rank"_a, "world_size"_a, "statistics"_a);
  place.def(
      "token_loss",
      [](const Place &self, const sod_mcore::TokenIds &ids, const sod_mcore::Objective &objective,
         std::int64_t num_rows, std::int64_t world_size, float inverse_temperature,
         Address statistics, Address token_weights, Address advantages, Address old_logprobs,
         Address teacher_logprobs, Address token_loss, Address logprobs, Address entropy,
         Address ratio, Address is_clipped, Address terms, Address topk_logprobs,
         Address row_coefficients, Address sparse_gradient) {
        self.run(sod_mcore::TokenLossCall{
            num_rows, world_size, inverse_temperature, ids, in<float>(statistics), objective,
            in<float>(token_weights), in<float>(advantages), in<float>(old_logprobs),
            in<float>(teacher_logprobs), out<float>(token_loss), out<float>(logprobs),
            out<float>(entropy), out<float>(ratio), out<bool>(is_clipped), out<float>(terms),
            out<float>(topk_logprobs), out<float>(row_coefficients),
            out<float>(sparse_gradient)});
      },
      "ids"_a, "objective"_a, py::kw_only(), "num_rows"_a, "world_size"_a,
      "inverse_temperature"_a, "statistics"_a, "token_weights"_a, "advantages"_a,
      "old_logprobs"_a, "teacher_logprobs"_a, "token_loss"_a, "logprobs"_a, "entropy"_a, "ratio"_a,
      "is_clipped"_a, "terms"_a, "topk_logprobs"_a, "row_coefficients"_a, "sparse_gradient"_a);
  place.def(
      "logprob_gradient",
      [](const Place &self, const sod_mcore::TokenIds &ids, std::int64_t num_rows,
         std::int64_t world_size, float inverse_temperature, Address statistics,
         Address logprob_gradient, Address entropy_gradient, Address row_coefficients,
         Address sparse_gradient) {
        self.run(sod_mcore::LogprobGradientCall{
            num_rows, world_size, inverse_temperature, ids, in<float>(statistics),
            in<float>(logprob_gradient), in<float>(entropy_gradient), out<float>(row_coefficients),
            out<float>(sparse_gradient)});
      },
      "ids"_a, py::kw_only(), "num_rows"_a, "world_size"_a, "inverse_temperature"_a,
      "statistics"_a, "logprob_gradient"_a, "entropy_gradient"_a, "row_coefficients"_a,
      "sparse_gradient"_a);
  place.def(
      "logits_gradient",
      [](const Place &self, const sod_mcore::Shard &shard, const sod_mcore::TokenIds &ids,
         Address row_coefficients, Address sparse_gradient, Address upstream,
         std::int64_t upstream_stride, Address gradient, std::int64_t gradient_row_stride) {
        self.run(sod_mcore::GradientCall{shard, ids, in<float>(row_coefficients),
                                         in<float>(sparse_gradient), in<float>(upstream),
                                         upstream_stride, out<void>(gradient),
                                         gradient_row_stride});
      },
      "shard"_a, "ids"_a, py::kw_only(), "row_coefficients"_a, "sparse_gradient"_a, "upstream"_a,
      "upstream_stride"_a, "gradient"_a, "gradient_row_stride"_a);
}

// What the build knew; see setup.py.
void define_build(py::module_ &module) {
#ifdef SOD_WITH_CUDA
  module.attr("with_cuda") = true;
#else
  module.attr("with_cuda") = false;
#endif
#ifndef SOD_CUDA_ARCHITECTURES
#define SOD_CUDA_ARCHITECTURES ""
#endif
#ifndef SOD_CUDA_VERSION
#define SOD_CUDA_VERSION ""
#endif
#ifndef SOD_CUDA_MISSING_REASON
#define SOD_CUDA_MISSING_REASON ""
#endif
  module.attr("cuda_architectures") = SOD_CUDA_ARCHITECTURES;
  module.attr("cuda_version") = SOD_CUDA_VERSION;
  module.attr("cuda_missing_reason") = SOD_CUDA_MISSING_REASON;
  module.def("cpu_target", &sod_mcore::cpu::target,
             "Instruction set chosen for this processor: x86-64-v4, x86-64-v3 or baseline.");
}

} // namespace

PYBIND11_MODULE(_C, module) {
  using namespace py::literals;
  module.doc() = "Kernels of the vocabulary-parallel loss; csrc/kernels.h says what they take.";
  define_build(module);
  py::class_<sod_mcore::Shard>(module, "Shard")
      .def(py::init(&make_shard), py::kw_only(), "logits"_a, "is_bfloat16"_a, "num_rows"_a,
           "width"_a, "row_stride"_a, "num_valid_columns"_a, "first_column"_a,
           "inverse_temperature"_a);
  py::class_<sod_mcore::TokenIds>(module, "TokenIds")
      .def(py::init(&make_ids), py::kw_only(), "targets"_a, "targets_are_64_bit"_a, "topk_ids"_a,
           "topk_ids_are_64_bit"_a, "num_topk"_a, "teacher_topk_logprobs"_a);
  py::class_<sod_mcore::Objective>(module, "Objective")
      .def(py::init(&make_objective), py::kw_only(), "policy_coefficient"_a, "clip_low"_a,
           "clip_high"_a, "dual_clip"_a, "k2_coefficient"_a, "k3_coefficient"_a,
           "topk_divergence"_a, "topk_coefficient"_a, "jsd_beta"_a, "entropy_coefficient"_a);
  py::class_<Cpu> cpu(module, "Cpu");
  cpu.def(py::init([](int num_threads) { return Cpu{num_threads}; }), py::kw_only(),
          "num_threads"_a);
  define_kernels(cpu);
#ifdef SOD_WITH_CUDA
  py::class_<Cuda> cuda(module, "Cuda");
  cuda.def(py::init([](Address stream) { return Cuda{stream}; }), py::kw_only(), "stream"_a);
  define_kernels(cuda);
#endif
}
