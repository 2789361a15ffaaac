// One column of the beam search: what the paths propose, and which proposals survive.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/rounding.h"

namespace fitcompress {

constexpr int64_t kMostChoices = 4;  // proposals of a path
constexpr int64_t kMostLanes = 16;   // doubles that are worked on at a time, at most

// One row's part in proposing codes for a column.
struct ProposalRule {
  double step;         // Δ
  double diagonal;     // U_jj
  double max_code;     // infinity: codes are unbounded
  double price;        // λΔ²
  const double* bits;  // bits[k]
};

// Proposals of a column, those of a path side by side; left-out ones cost infinity.
struct Proposals {
  explicit Proposals(int64_t beam)
      : value(make_buffer<double>(beam)),
        best(make_buffer<double>(beam)),
        code(make_buffer<double>(kMostChoices * beam)),
        error(make_buffer<double>(kMostChoices * beam)),
        cost(make_buffer<double>(kMostChoices * beam)),
        kept_cost(make_buffer<double>(kMostChoices * beam + kMostLanes)),
        kept(make_buffer<int32_t>(kMostChoices * beam)),
        order(make_buffer<int32_t>(kMostChoices * beam)) {}

  Buffer<double> value;  // w_j of every path
  Buffer<double> best;   // the cost of its cheapest proposal
  Buffer<double> code, error, cost;
  Buffer<double> kept_cost;  // of the proposals that may survive, and which they are
  Buffer<int32_t> kept;
  Buffer<int32_t> order;  // the survivors, the cheapest first
};

// Fills proposals from `value` and the costs of the paths. Choices: 1 for zero only, 2 for the two
// nearest codes, 4 for these, one step towards zero, and zero. Returns false if a code or a cost is
// out of range.
template <int Choices, bool Rated>
FITCOMPRESS_INLINE bool propose(const ProposalRule& rule, int64_t paths, const double* path_cost,
                                const Proposals& to) {
  constexpr double kCodeLimit = 2147483647.0;
  constexpr double kCostLimit = std::numeric_limits<double>::max();
  constexpr double kLeftOut = std::numeric_limits<double>::infinity();
  const double most = rule.max_code < kCodeLimit ? rule.max_code : kCodeLimit;
  const double* __restrict value = to.value.get();
  double* __restrict best = to.best.get();
  double* __restrict codes = to.code.get();
  double* __restrict errors = to.error.get();
  double* __restrict costs = to.cost.get();
  int64_t bad = 0;
  for (int64_t p = 0; p < paths; ++p) {
    const double w = value[p];
    double code[Choices] = {0.0};
    bool used[Choices] = {true};
    if constexpr (Choices > 1) {
      const double x = w / rule.step;
      double near = round_even(x);
      near = near < -rule.max_code ? -rule.max_code : near;
      near = near > rule.max_code ? rule.max_code : near;
      const bool fits = near >= -kCodeLimit && near <= kCodeLimit;
      bad |= fits ? 0 : 1;
      near = fits ? near : 0.0;
      const double other = x > near ? near + 1.0 : near - 1.0;
      code[0] = near;
      used[1] = other >= -most && other <= most;
      code[1] = used[1] ? other : 0.0;
      if constexpr (Choices == 4) {
        code[2] = near > 0.0 ? near - 1.0 : near + 1.0;
        used[2] = near != 0.0 && code[2] != other;
        code[2] = used[2] ? code[2] : 0.0;
        code[3] = 0.0;
        used[3] = near != 0.0 && near != 1.0 && near != -1.0;
      }
    }
    double least = kLeftOut;
    for (int c = 0; c < Choices; ++c) {
      const double error = (w - code[c] * rule.step) / rule.diagonal;
      double added = error * error;
      if constexpr (Rated) added += rule.price * rule.bits[static_cast<int32_t>(code[c])];
      const double total = path_cost[p] + added;
      bad |= (total >= -kCostLimit && total <= kCostLimit) || !used[c] ? 0 : 1;
      const double cost = used[c] ? total : kLeftOut;
      codes[Choices * p + c] = code[c];
      errors[Choices * p + c] = error;
      costs[Choices * p + c] = cost;
      least = cost < least ? cost : least;
    }
    best[p] = least;
  }
  return bad == 0;
}

// order[r] = kept[i], where r is the rank of kept_cost[i] in the order of cost, then place. The
// costs are followed by as many infinities as fill a vector.
template <int Lanes>
FITCOMPRESS_INLINE void order_by_rank(int64_t count, const Proposals& proposals) {
  const double* const cost = proposals.kept_cost.get();
  for (int64_t begin = 0; begin < count; begin += Lanes) {
    double mine[Lanes];
    int64_t rank[Lanes];
    for (int l = 0; l < Lanes; ++l) {
      mine[l] = cost[begin + l];
      rank[l] = 0;
    }
    const int64_t end = std::min<int64_t>(begin + Lanes, count);
    for (int64_t i = 0; i < begin; ++i) {
      for (int l = 0; l < Lanes; ++l) rank[l] += cost[i] <= mine[l] ? 1 : 0;
    }
    for (int64_t i = begin; i < end; ++i) {
      const double limit = cost[i];
      const int64_t place = i - begin;
      for (int l = 0; l < Lanes; ++l) {
        rank[l] += limit < mine[l] || (limit == mine[l] && place < l) ? 1 : 0;
      }
    }
    for (int64_t i = end; i < count; ++i) {
      for (int l = 0; l < Lanes; ++l) rank[l] += cost[i] < mine[l] ? 1 : 0;
    }
    for (int64_t i = begin; i < end; ++i) {
      proposals.order[rank[i - begin]] = proposals.kept[i];
    }
  }
}

// Puts the cheapest `beam` of the proposals into `order`, in order of cost, ties in order of
// proposal, and returns how many there are.
template <int Lanes>
FITCOMPRESS_INLINE int64_t select(int64_t paths, int64_t choices, int64_t beam,
                                  const Proposals& proposals) {
  constexpr int64_t kRanked = 256;  // beyond, sorting is faster
  const double* const cost = proposals.cost.get();
  // In a full beam, every path has a proposal that costs no more than this.
  double limit = std::numeric_limits<double>::max();
  if (paths == beam) {
    limit = *std::max_element(proposals.best.get(), proposals.best.get() + paths);
  }
  int64_t count = 0;
  for (int64_t i = 0; i < paths * choices; ++i) {
    proposals.kept_cost[count] = cost[i];
    proposals.kept[count] = static_cast<int32_t>(i);
    count += cost[i] <= limit ? 1 : 0;
  }
  if (count <= kRanked) {
    for (int l = 0; l < kMostLanes; ++l) {
      proposals.kept_cost[count + l] = std::numeric_limits<double>::infinity();
    }
    order_by_rank<Lanes>(count, proposals);
    return std::min(count, beam);
  }
  int32_t* const order = proposals.order.get();
  std::copy_n(proposals.kept.get(), count, order);
  const auto before = [cost](int32_t a, int32_t b) {
    return cost[a] < cost[b] || (cost[a] == cost[b] && a < b);
  };
  if (count > beam) std::nth_element(order, order + beam, order + count, before);
  count = std::min(count, beam);
  std::sort(order, order + count, before);
  return count;
}

}  // namespace fitcompress
