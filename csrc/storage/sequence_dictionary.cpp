#include "storage/sequence_dictionary.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <utility>

namespace fitcompress {
namespace {

constexpr std::uint64_t kOne = std::uint64_t{1} << 31;

// The shares of the symbols as probabilities, of 2^31, at least 1.
std::vector<std::uint64_t> probabilities(const std::vector<std::uint32_t>& roots) {
  std::vector<std::uint64_t> squares;
  std::uint64_t sum = 0;
  for (const std::uint64_t root : roots) {
    squares.push_back(root * root);
    sum += squares.back();
  }
  int shift = 0;
  while (sum >> shift >= kOne) ++shift;
  for (auto& p : squares) p = std::max<std::uint64_t>(((p >> shift) << 31) / (sum >> shift), 1);
  return squares;
}

// A node of the tree while it grows. Leaves have no children.
struct Node {
  Sequence sequence;
  std::int32_t first_child;  // the others follow; -1: none
};

std::vector<Node> grow(const std::vector<std::int8_t>& symbols, const std::vector<std::uint64_t>& p,
                       int limit) {
  std::vector<Node> nodes{{{{}, 0, static_cast<std::uint32_t>(kOne), 0, 0}, -1}};
  // The likeliest first, of equals the oldest.
  using Candidate = std::pair<std::uint32_t, std::int64_t>;
  std::priority_queue<Candidate> candidates;
  candidates.emplace(nodes[0].sequence.probability, 0);
  const auto more = static_cast<int>(symbols.size()) - 1;
  for (int leaves = 1; !candidates.empty() && leaves + more <= limit; leaves += more) {
    const auto parent = static_cast<std::size_t>(-candidates.top().second);
    candidates.pop();
    nodes[parent].first_child = static_cast<std::int32_t>(nodes.size());
    for (std::size_t s = 0; s < symbols.size(); ++s) {
      Sequence child = nodes[parent].sequence;
      child.symbols[child.length++] = symbols[s];
      child.probability = static_cast<std::uint32_t>((child.probability * p[s]) >> 31);
      if (child.length < kLongestSequence) {
        candidates.emplace(child.probability, -static_cast<std::int64_t>(nodes.size()));
      }
      nodes.push_back({child, -1});
    }
  }
  return nodes;
}

// Rounds probabilities to frequencies of at least 1 that add up to 2^bits: what is over or
// missing goes round the sequences, one each, the most frequent first.
void set_frequencies(std::vector<Sequence>* sequences, int bits) {
  std::int64_t missing = std::int64_t{1} << bits;
  for (Sequence& each : *sequences) {
    const std::uint64_t half = std::uint64_t{1} << (30 - bits);
    each.frequency = std::max<std::uint32_t>(
        static_cast<std::uint32_t>((each.probability + half) >> (31 - bits)), 1);
    missing -= each.frequency;
  }
  std::vector<std::size_t> order(sequences->size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return (*sequences)[a].frequency > (*sequences)[b].frequency;
  });
  for (std::size_t i = 0; missing != 0; i = (i + 1) % order.size()) {
    std::uint32_t& frequency = (*sequences)[order[i]].frequency;
    if (missing > 0) {
      ++frequency;
      --missing;
    } else if (frequency > 1) {
      --frequency;
      ++missing;
    }
  }
  std::uint32_t sum = 0;
  for (Sequence& each : *sequences) {
    each.first = sum;
    sum += each.frequency;
  }
}

}  // namespace

SequenceDictionary build_dictionary(const SymbolShares& shares, int limit, int bits) {
  const std::vector<Node> nodes = grow(shares.symbols, probabilities(shares.roots), limit);
  SequenceDictionary result;
  // Inner nodes and leaves are numbered in the order in which they were made.
  std::vector<std::int32_t> number(nodes.size());
  std::int32_t inner = 0;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].first_child >= 0) {
      number[i] = inner++;
    } else {
      number[i] = -1 - static_cast<std::int32_t>(result.sequences.size());
      result.sequences.push_back(nodes[i].sequence);
    }
  }
  for (const Node& node : nodes) {
    if (node.first_child < 0) continue;
    for (std::size_t s = 0; s < shares.symbols.size(); ++s) {
      result.next.push_back(number[static_cast<std::size_t>(node.first_child) + s]);
    }
  }
  set_frequencies(&result.sequences, bits);
  return result;
}

}  // namespace fitcompress
