// Python module `sod_mcore.ops._C`: checks the buffers that numpy hands over and runs the row
// mathematics on them, without holding the interpreter lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "row_statistics.h"

namespace py = pybind11;

namespace {

// No forcecast: a silent copy of the logits would cost more than the operation itself.
template <typename Value> using Array = py::array_t<Value, py::array::c_style>;

template <typename Logit>
py::tuple row_statistics(const Array<Logit> &logits, py::ssize_t num_valid_columns,
                         float temperature) {
  if (logits.ndim() != 2)
    throw std::invalid_argument("logits has " + std::to_string(logits.ndim()) +
                                " dimensions; it must be [N, V/tp]");
  const py::ssize_t num_rows = logits.shape(0);
  const py::ssize_t width = logits.shape(1);
  if (num_valid_columns < 0 || num_valid_columns > width)
    throw std::invalid_argument("num_valid_columns=" + std::to_string(num_valid_columns) +
                                " must lie in [0, " + std::to_string(width) + "]");
  if (!(temperature > 0.0f))
    throw std::invalid_argument("temperature=" + std::to_string(temperature) +
                                " must be positive");
  py::array_t<float> max(num_rows);
  py::array_t<double> exp_sum(num_rows);
  py::array_t<double> exp_shifted_sum(num_rows);
  const Logit *rows = logits.data();
  float *max_out = max.mutable_data();
  double *exp_sum_out = exp_sum.mutable_data();
  double *exp_shifted_sum_out = exp_shifted_sum.mutable_data();
  {
    py::gil_scoped_release unlocked;
    for (py::ssize_t n = 0; n < num_rows; ++n) {
      const sod_mcore::RowStatistics statistics = sod_mcore::row_statistics(
          rows + n * width, static_cast<std::size_t>(num_valid_columns), 1.0f / temperature);
      max_out[n] = statistics.max;
      exp_sum_out[n] = statistics.exp_sum;
      exp_shifted_sum_out[n] = statistics.exp_shifted_sum;
    }
  }
  return py::make_tuple(max, exp_sum, exp_shifted_sum);
}

} // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Row statistics of vocabulary-sharded logits on the CPU.";
  const char *doc = "(max float32, exp_sum float64, exp_shifted_sum float64), each [N], of the first "
                    "num_valid_columns of C-contiguous logits [N, V/tp] divided by temperature.";
  module.def("row_statistics_float32", &row_statistics<float>, py::arg("logits").noconvert(),
             py::arg("num_valid_columns"), py::arg("temperature"), doc);
  module.def("row_statistics_bfloat16", &row_statistics<std::uint16_t>,
             py::arg("logits").noconvert(), py::arg("num_valid_columns"), py::arg("temperature"),
             doc);
}
