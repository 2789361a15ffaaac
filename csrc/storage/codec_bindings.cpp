#include "storage/codec_bindings.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "storage/weight_codec.h"

namespace py = pybind11;

namespace fitcompress {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 30;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The array as T, which it must have already: a silent conversion could change values.
template <class T>
Array<T> exactly(const py::array& any, const char* name, const char* wanted) {
  if (!any.dtype().equal(py::dtype::of<T>())) {
    const std::string dtype = py::str(py::object(any.dtype()));
    throw py::type_error(std::string(name) + ": got dtype " + dtype + ", wanted " + wanted);
  }
  return Array<T>(any);
}

const std::uint8_t* bytes_of(std::string_view view) {
  return reinterpret_cast<const std::uint8_t*>(view.data());
}

std::int32_t checked_largest(std::int64_t largest) {
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(largest, 0, kLargest));
}

Coding coding_of(const std::string& name) {
  if (name == "smallest") return Coding::kSmallest;
  if (name == "adaptive") return Coding::kAdaptive;
  if (name == "static") return Coding::kStatic;
  throw py::value_error("coding: got '" + name + "', wanted smallest, adaptive or static");
}

py::bytes encode(const py::array& any, const std::string& name, int threads) {
  const Coding coding = coding_of(name);
  const auto codes = exactly<std::int32_t>(any, "codes", "int32");
  if (codes.ndim() != 2) {
    throw py::value_error("codes: got " + std::to_string(codes.ndim()) +
                          " dimensions, wanted 2 (rows, cols)");
  }
  std::vector<std::uint8_t> bytes;
  {
    py::gil_scoped_release unlocked;
    bytes = encode_weights(codes.data(), codes.shape(0), codes.shape(1), coding, threads);
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::array_t<std::int32_t> decode(const py::bytes& data, std::int64_t rows, std::int64_t cols,
                                 std::int64_t largest, int threads) {
  const std::string_view view = data;
  check_stream(bytes_of(view), view.size(), rows, cols);
  py::array_t<std::int32_t> codes({rows, cols});
  std::int32_t* out = codes.mutable_data();
  {
    py::gil_scoped_release unlocked;
    decode_weights(bytes_of(view), view.size(), rows, cols, checked_largest(largest), threads, out);
  }
  return codes;
}

py::array_t<float> dequantize(const py::bytes& data, std::int64_t rows, std::int64_t cols,
                              const py::array& any, std::int64_t largest, int threads) {
  const std::string_view view = data;
  check_stream(bytes_of(view), view.size(), rows, cols);
  const auto scales = exactly<float>(any, "scales", "float32");
  if (scales.ndim() != 1 || (scales.size() != 1 && scales.size() != rows)) {
    throw py::value_error("scales: got " + std::to_string(scales.size()) + " in " +
                          std::to_string(scales.ndim()) + " dimensions, wanted [1] or [" +
                          std::to_string(rows) + "]");
  }
  py::array_t<float> values({rows, cols});
  float* out = values.mutable_data();
  {
    py::gil_scoped_release unlocked;
    decode_values(bytes_of(view), view.size(), rows, cols, checked_largest(largest), threads,
                  scales.data(), scales.size() > 1, out);
  }
  return values;
}

}  // namespace

void bind_codec(py::module_& m) {
  m.def("encode", &encode, py::arg("codes"), py::pos_only(), py::kw_only(),
        py::arg("coding") = "smallest", py::arg("threads") = 1,
        "Integer codes [rows, cols] int32 as bytes: smallest, adaptive or static coding.");
  m.def("decode", &decode, py::arg("data"), py::arg("rows"), py::arg("cols"), py::kw_only(),
        py::arg("largest") = kLargest, py::arg("threads") = 1,
        "The codes [rows, cols] that encode() turned into these bytes, within ±largest.");
  m.def("dequantize", &dequantize, py::arg("data"), py::arg("rows"), py::arg("cols"),
        py::arg("scales"), py::kw_only(), py::arg("largest") = kLargest, py::arg("threads") = 1,
        "decode() in float32 times the scales, [1] or [rows] float32.");
}

}  // namespace fitcompress
