// Python bindings of fitcompress/_core, and nothing else: check, unlock, call, wrap.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "search/knapsack_bindings.h"
#include "search/path_search.h"
#include "storage/weight_codec.h"

namespace py = pybind11;

namespace fitcompress {
namespace {

std::string dtype_name(const py::array& array) { return py::str(py::object(array.dtype())); }

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::bytes encode(const py::array& any) {
  if (!any.dtype().equal(py::dtype::of<std::int32_t>())) {
    throw py::type_error("codes: got dtype " + dtype_name(any) + ", wanted int32");
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

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text;
  for (const py::ssize_t side : shape) text += (text.empty() ? "(" : ", ") + std::to_string(side);
  return text.empty() ? "()" : text + ")";
}

template <class T>
Array<T> table(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
  if (!array.dtype().equal(py::dtype::of<T>())) {
    throw py::type_error(std::string(name) + ": got dtype " + dtype_name(array) + ", wanted " +
                         std::string(py::str(py::object(py::dtype::of<T>()))));
  }
  const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
  if (array.ndim() != 3 || got != shape) {
    throw py::value_error(std::string(name) + ": got shape " + shape_text(got) + ", wanted " +
                          (shape.size() == 3 ? shape_text(shape) : "[layers, grids, sparsities]"));
  }
  return Array<T>(array);
}

PathMode mode_named(const std::string& name) {
  if (name == "greedy") return PathMode::kGreedy;
  if (name == "beam") return PathMode::kBeam;
  if (name == "best_first") return PathMode::kBestFirst;
  throw py::value_error("mode: got '" + name + "', wanted 'greedy', 'beam' or 'best_first'");
}

const char* name_of(PathStatus status) {
  switch (status) {
    case PathStatus::kReached:
      return "reached";
    case PathStatus::kExhausted:
      return "exhausted";
    case PathStatus::kLimit:
      break;
  }
  return "limit";
}

bool signalled() {
  py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

py::dict find_path(const py::array& grid_length, const py::array& prune_length,
                   const py::array& norm, const py::array& distortion, const py::array& cost,
                   double start_length, std::int64_t budget, std::int64_t reference_cost,
                   double lam, const std::string& mode, std::int64_t beam_width,
                   std::int64_t max_expansions) {
  const std::vector<py::ssize_t> shape(grid_length.shape(),
                                       grid_length.shape() + grid_length.ndim());
  const auto lengths = table<double>(grid_length, "grid_length", shape);
  const auto prunes = table<double>(prune_length, "prune_length", shape);
  const auto norms = table<double>(norm, "norm", shape);
  const auto distortions = table<double>(distortion, "distortion", shape);
  const auto costs = table<std::int64_t>(cost, "cost", shape);
  for (const py::ssize_t side : shape) {
    if (side > std::numeric_limits<std::int32_t>::max()) {
      throw py::value_error("tables: got a side of " + std::to_string(side) +
                            ", wanted at most 2147483647");
    }
  }
  const PathTables tables{static_cast<std::int32_t>(shape[0]),
                          static_cast<std::int32_t>(shape[1]),
                          static_cast<std::int32_t>(shape[2]),
                          lengths.data(),
                          prunes.data(),
                          norms.data(),
                          distortions.data(),
                          costs.data()};
  const PathOptions options{start_length,     Cost(budget), reference_cost, lam,
                            mode_named(mode), beam_width,   max_expansions};
  PathResult result;
  try {
    py::gil_scoped_release unlocked;
    result = path_search(tables, options, signalled);
  } catch (const PathInterrupted&) {
    throw py::error_already_set();
  }
  py::array_t<std::int64_t> grids(shape[0]);
  for (py::ssize_t l = 0; l < shape[0]; ++l) {
    grids.mutable_at(l) = result.levels.grids[static_cast<std::size_t>(l)].value();
  }
  py::list moves;
  for (const Move& move : result.moves) {
    moves.append(py::make_tuple(move.layer.value(), move.index));
  }
  py::dict answer;
  answer["grids"] = grids;
  answer["sparsity"] = result.levels.sparsity.value();
  answer["length"] = result.length;
  answer["distortion"] = result.distortion;
  answer["cost"] = result.cost.value();
  answer["expansions"] = result.expansions;
  answer["status"] = name_of(result.status);
  answer["moves"] = moves;
  return answer;
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
  m.def("path_search", &find_path, py::arg("grid_length"), py::arg("prune_length"), py::arg("norm"),
        py::arg("distortion"), py::arg("cost"), py::arg("start_length"), py::arg("budget"),
        py::arg("reference_cost"), py::arg("lam"), py::arg("mode"), py::arg("beam_width"),
        py::arg("max_expansions"),
        "The levels at the end of a short path from the finest ones to the budget.");
}
