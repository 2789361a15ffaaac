#include "search/path_bindings.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "search/path_search.h"

namespace py = pybind11;

namespace fitcompress {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::string dtype_name(const py::array& array) { return py::str(py::object(array.dtype())); }

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
    case PathStatus::kInterrupted:
      return "interrupted";
    case PathStatus::kLimit:
      break;
  }
  return "limit";
}

// Looks at the clock, for signals, and tells Python how far the search is.
class Watch {
 public:
  Watch(double max_seconds, py::object progress)
      : max_seconds_(max_seconds), progress_(std::move(progress)) {}

  PathOrder operator()(const PathProgress& now) {
    const auto time = Clock::now();
    if (std::chrono::duration<double>(time - start_).count() >= max_seconds_) {
      return PathOrder::kGiveUp;
    }
    if (time - last_ < std::chrono::milliseconds(100)) return PathOrder::kGoOn;
    last_ = time;
    py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) {
      interrupted(py::error_already_set());
      return PathOrder::kInterrupt;
    }
    if (progress_.is_none()) return PathOrder::kGoOn;
    try {
      progress_(now.expansions, now.cost.value());
    } catch (py::error_already_set& error) {
      interrupted(error);
      return PathOrder::kInterrupt;
    }
    return PathOrder::kGoOn;
  }

  // Only Ctrl-C is worth an answer.
  static void interrupted(const py::error_already_set& error) {
    if (!error.matches(PyExc_KeyboardInterrupt)) throw error;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double max_seconds_;
  py::object progress_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
};

std::vector<double> values(const py::handle& object, std::size_t count, const char* name) {
  const auto array = Array<double>::ensure(object);
  if (!array || array.ndim() != 1 || static_cast<std::size_t>(array.size()) != count) {
    throw py::value_error(std::string("metric: ") + name + " is no array of " +
                          std::to_string(count) + " numbers");
  }
  return {array.data(), array.data() + count};
}

Steps steps_of(const py::object& metric, const std::vector<std::int32_t>& grids,
               std::int32_t sparsity) {
  py::array_t<std::int64_t> levels(static_cast<py::ssize_t>(grids.size()));
  std::copy(grids.begin(), grids.end(), levels.mutable_data());
  const py::tuple answer = metric(levels, sparsity);
  if (answer.size() != 5) {
    throw py::value_error("metric: got " + std::to_string(answer.size()) + " values, wanted 5");
  }
  Steps steps{values(answer[0], grids.size(), "grid_length"),
              values(answer[1], grids.size(), "norm"),
              values(answer[2], grids.size(), "norm_after"), answer[3].cast<double>(),
              answer[4].cast<double>()};
  const auto bad = [](double x) { return !(x >= 0.0 && x <= std::numeric_limits<double>::max()); };
  for (const auto* each : {&steps.grid_length, &steps.norm, &steps.norm_after}) {
    if (std::any_of(each->begin(), each->end(), bad)) {
      throw py::value_error("metric: a value is negative or not finite");
    }
  }
  if (bad(steps.prune_length) || bad(steps.norm_pruned)) {
    throw py::value_error("metric: a value is negative or not finite");
  }
  return steps;
}

Measure measure_with(const py::object& metric) {
  if (metric.is_none()) return {};
  return [&metric](const std::vector<std::int32_t>& grids, std::int32_t sparsity) {
    py::gil_scoped_acquire locked;
    try {
      return steps_of(metric, grids, sparsity);
    } catch (py::error_already_set& error) {
      Watch::interrupted(error);
    }
    throw PathInterrupted{};
  };
}

py::dict trace_of(const std::vector<PathVisit>& visits, std::size_t layers) {
  const auto count = static_cast<py::ssize_t>(visits.size());
  py::array_t<std::int64_t> grids({count, static_cast<py::ssize_t>(layers)});
  py::array_t<std::int64_t> sparsity(count), cost(count);
  py::array_t<double> g(count), f(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    const PathVisit& visit = visits[static_cast<std::size_t>(i)];
    for (std::size_t l = 0; l < layers; ++l) {
      grids.mutable_at(i, static_cast<py::ssize_t>(l)) = visit.levels.grids[l].value();
    }
    sparsity.mutable_at(i) = visit.levels.sparsity.value();
    cost.mutable_at(i) = visit.cost.value();
    g.mutable_at(i) = visit.g;
    f.mutable_at(i) = visit.f;
  }
  py::dict trace;
  trace["grids"] = grids;
  trace["sparsity"] = sparsity;
  trace["g"] = g;
  trace["f"] = f;
  trace["cost"] = cost;
  return trace;
}

py::dict wrapped(PathResult result, bool trace) {
  const std::size_t layers = result.levels.grids.size();
  py::array_t<std::int64_t> grids(static_cast<py::ssize_t>(layers));
  for (std::size_t l = 0; l < layers; ++l) {
    grids.mutable_at(static_cast<py::ssize_t>(l)) = result.levels.grids[l].value();
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
  if (trace) answer["trace"] = trace_of(result.trace, layers);
  return answer;
}

py::dict find_path(const py::array& grid_length, const py::array& prune_length,
                   const py::array& norm, const py::array& distortion, const py::array& cost,
                   double start_length, std::int64_t budget, std::int64_t reference_cost,
                   double lam, const std::string& mode, std::int64_t beam_width,
                   std::int64_t max_expansions, double max_seconds, const py::object& progress,
                   const py::object& metric, bool exact, bool trace) {
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
  if (!(max_seconds > 0.0)) {
    throw py::value_error("max_seconds: got " + std::to_string(max_seconds) + ", wanted above 0");
  }
  const PathOptions options{start_length,     Cost(budget), reference_cost, lam,
                            mode_named(mode), beam_width,   max_expansions, trace};
  const Measure measure = measure_with(metric);
  Watch watch(max_seconds, progress);
  PathResult result;
  {
    py::gil_scoped_release unlocked;
    result = path_search(tables, options, measure, exact, std::ref(watch));
  }
  if (result.status == PathStatus::kInterrupted && options.budget < result.cost) {
    PyErr_SetNone(PyExc_KeyboardInterrupt);
    throw py::error_already_set();
  }
  return wrapped(std::move(result), trace);
}

}  // namespace

void bind_path_search(py::module_& module) {
  module.def("path_search", &find_path, py::arg("grid_length"), py::arg("prune_length"),
             py::arg("norm"), py::arg("distortion"), py::arg("cost"), py::arg("start_length"),
             py::arg("budget"), py::arg("reference_cost"), py::arg("lam"), py::arg("mode"),
             py::arg("beam_width"), py::arg("max_expansions"),
             py::arg("max_seconds") = std::numeric_limits<double>::infinity(),
             py::arg("progress") = py::none(), py::arg("metric") = py::none(),
             py::arg("exact") = false, py::arg("trace") = false,
             "The levels at the end of a short path from the finest ones to the budget.");
}

}  // namespace fitcompress
