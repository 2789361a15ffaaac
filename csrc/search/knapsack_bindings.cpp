// Python bindings of the exact search: check, unlock, call, wrap.
#include "search/knapsack_bindings.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "search/convex_front.h"
#include "search/knapsack.h"

namespace py = pybind11;

namespace fitcompress {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> checked(const py::array& array, const char* name, py::ssize_t dimensions) {
  if (!array.dtype().equal(py::dtype::of<T>())) {
    throw py::type_error(std::string(name) + ": got dtype " +
                         std::string(py::str(py::object(array.dtype()))) + ", wanted " +
                         std::string(py::str(py::object(py::dtype::of<T>()))));
  }
  if (array.ndim() != dimensions) {
    throw py::value_error(std::string(name) + ": got " + std::to_string(array.ndim()) +
                          " dimensions, wanted " + std::to_string(dimensions));
  }
  for (py::ssize_t i = 0; i < dimensions; ++i) {
    if (array.shape(i) > std::numeric_limits<std::int32_t>::max()) {
      throw py::value_error(std::string(name) + ": got a side of " +
                            std::to_string(array.shape(i)) + ", wanted at most 2147483647");
    }
  }
  return Array<T>(array);
}

KnapsackTables tables_of(const Array<std::int64_t>& cost, const Array<double>& value,
                         const Array<std::int64_t>& limit) {
  if (value.shape(0) != cost.shape(1) || value.shape(1) != cost.shape(2)) {
    throw py::value_error("value: got shape (" + std::to_string(value.shape(0)) + ", " +
                          std::to_string(value.shape(1)) + "), wanted (" +
                          std::to_string(cost.shape(1)) + ", " + std::to_string(cost.shape(2)) +
                          ") as of cost");
  }
  if (limit.shape(0) != cost.shape(0)) {
    throw py::value_error("limit: got " + std::to_string(limit.shape(0)) + " numbers, wanted " +
                          std::to_string(cost.shape(0)) + ", one a budget");
  }
  if (value.size() > std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error("value: got " + std::to_string(value.size()) +
                          " levels, wanted at most 2147483647");
  }
  return {static_cast<std::int32_t>(cost.shape(0)),
          static_cast<std::int32_t>(cost.shape(1)),
          static_cast<std::int32_t>(cost.shape(2)),
          cost.data(),
          value.data(),
          limit.data()};
}

const char* name_of(KnapsackStatus status) {
  switch (status) {
    case KnapsackStatus::kSolved:
      return "solved";
    case KnapsackStatus::kStopped:
      return "stopped";
    case KnapsackStatus::kInfeasible:
      break;
  }
  return "infeasible";
}

py::dict solve(const py::array& any_cost, const py::array& any_value, const py::array& any_limit,
               double gap, double seconds, const py::object& progress) {
  const auto cost = checked<std::int64_t>(any_cost, "cost", 3);
  const auto value = checked<double>(any_value, "value", 2);
  const auto limit = checked<std::int64_t>(any_limit, "limit", 1);
  const KnapsackTables tables = tables_of(cost, value, limit);
  if (!(gap >= 0.0)) throw py::value_error("gap: got " + std::to_string(gap) + ", wanted ≥ 0");
  if (!(seconds >= 0.0)) {
    throw py::value_error("seconds: got " + std::to_string(seconds) + ", wanted ≥ 0");
  }
  bool interrupted = false;
  const auto report = [&](double best, double bound) {
    const py::gil_scoped_acquire locked;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(best, bound);
    } catch (const py::error_already_set& error) {
      // Ctrl-C ends the search with the best so far; whatever else is raised goes on.
      if (!error.matches(PyExc_KeyboardInterrupt)) throw;
      interrupted = true;
    }
    return !interrupted;
  };
  const KnapsackOptions options{gap, seconds, report};
  KnapsackResult result;
  {
    const py::gil_scoped_release unlocked;
    result = knapsack(tables, options);
  }
  py::array_t<std::int64_t> choice(static_cast<py::ssize_t>(result.choice.size()));
  for (std::size_t l = 0; l < result.choice.size(); ++l) {
    choice.mutable_at(static_cast<py::ssize_t>(l)) = result.choice[l];
  }
  py::dict answer;
  answer["status"] = name_of(result.status);
  answer["choice"] = choice;
  answer["bound"] = result.bound;
  answer["nodes"] = result.nodes;
  answer["interrupted"] = interrupted;
  answer["timed_out"] = result.timed_out;
  return answer;
}

py::tuple front(const py::array& any_cost, const py::array& any_value) {
  const auto flat_cost = checked<std::int64_t>(any_cost, "cost", 2);
  const auto value = checked<double>(any_value, "value", 2);
  const Array<std::int64_t> cost(
      std::vector<py::ssize_t>{1, flat_cost.shape(0), flat_cost.shape(1)}, flat_cost.data());
  Array<std::int64_t> limit(1);
  limit.mutable_at(0) = std::numeric_limits<std::int64_t>::max() / 2;
  const KnapsackTables tables = tables_of(cost, value, limit);
  std::vector<std::int32_t> start;
  std::vector<HullEdge> edges;
  {
    const py::gil_scoped_release unlocked;
    tables.check();
    edges = convex_front(tables, &start);
  }
  py::array_t<std::int64_t> first(static_cast<py::ssize_t>(start.size()));
  for (std::size_t l = 0; l < start.size(); ++l) {
    first.mutable_at(static_cast<py::ssize_t>(l)) = start[l];
  }
  const auto steps = static_cast<py::ssize_t>(edges.size());
  py::array_t<std::int64_t> layer(steps), level(steps);
  for (py::ssize_t t = 0; t < steps; ++t) {
    layer.mutable_at(t) = edges[static_cast<std::size_t>(t)].layer;
    level.mutable_at(t) = edges[static_cast<std::size_t>(t)].to;
  }
  return py::make_tuple(first, layer, level);
}

}  // namespace

void bind_knapsack(py::module_& m) {
  m.def("knapsack", &solve, py::arg("cost"), py::arg("value"), py::arg("limit"), py::arg("gap"),
        py::arg("seconds"), py::arg("progress"),
        "One level for every layer, at the least value within the budgets, with a lower bound.");
  m.def("convex_front", &front, py::arg("cost"), py::arg("value"),
        "The cheapest level of every layer; then layer and new level of every step to the best.");
}

}  // namespace fitcompress
