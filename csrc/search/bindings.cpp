// Python bindings of fitcompress/_core, and nothing else: check, unlock, call, wrap.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "search/knapsack_bindings.h"
#include "search/path_bindings.h"
#include "storage/weight_codec.h"

namespace py = pybind11;

namespace fitcompress {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::bytes encode(const py::array& any) {
  if (!any.dtype().equal(py::dtype::of<std::int32_t>())) {
    const std::string dtype = py::str(py::object(any.dtype()));
    throw py::type_error("codes: got dtype " + dtype + ", wanted int32");
  }
  if (any.ndim() != 2) {
    throw py::value_error("codes: got " + std::to_string(any.ndim()) +
                          " dimensions, wanted 2 (rows, cols)");
  }
  const Array<std::int32_t> codes(any);
  std::vector<std::uint8_t> bytes;
  {
    py::gil_scoped_release unlocked;
    bytes = encode_weights(codes.data(), codes.shape(0), codes.shape(1));
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::array_t<std::int32_t> decode(const py::bytes& data, std::int64_t rows, std::int64_t cols) {
  const std::string_view view = data;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(view.data());
  check_stream(bytes, view.size(), rows, cols);
  py::array_t<std::int32_t> codes({rows, cols});
  std::int32_t* out = codes.mutable_data();
  {
    py::gil_scoped_release unlocked;
    decode_weights(bytes, view.size(), rows, cols, out);
  }
  return codes;
}

}  // namespace
}  // namespace fitcompress

PYBIND11_MODULE(_core, m) {
  using namespace fitcompress;
  m.doc() = "Searches and entropy coder of fitcompress, without torch.";
  bind_knapsack(m);
  m.def("encode", &encode, py::arg("codes"), py::pos_only(),
        "Integer codes [rows, cols] int32 as bytes.");
  m.def("decode", &decode, py::arg("data"), py::arg("rows"), py::arg("cols"),
        "The codes [rows, cols] that encode() turned into these bytes.");
  bind_path_search(m);
}
