// Thresholds of importance on the CPU: selection by histograms of keys.
//
// A first pass counts keys by their leading bits. A rank that is wanted lies in one bin; this bin
// is a bracket of keys. Brackets usually hold less than 1 % of all weights, so a second pass lists
// these, and a selection within the list gives key and flat index of each rank. Where a list would
// be too long, as with many equal keys, brackets are split by further counts until they are short
// or one key; the wanted one of equal keys is then searched in the part of the weights that the
// counts tell. A task owns one of a few parts of fixed size and its own counts. Bound: two reads of
// the layer, one counter a weight in the first.
#include "distortion/thresholds.h"

#include <algorithm>

#include "common/parallel.h"

namespace fitcompress {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kTogether = 8;
constexpr int64_t kMaxParts = 16;
constexpr int64_t kWorthAPart = 65536;
constexpr int64_t kWorthAThread = 16384;      // listed weights: waking one up takes as long
constexpr int kMinSplit = 7, kMaxSplit = 13;  // bits
constexpr uint32_t kInfinity = 0x7f800000u;

// A listed weight: its key, from the bracket's lowest on, in the upper bits; its index below.
using Entry = uint64_t;
constexpr int kIndexBits = 33;

// Keys [low, low + 2^bits) among which the keys of some ranks are.
struct Bracket {
  uint32_t bin;
  uint32_t low;
  int bits;
  int64_t below;              // number of keys less than low
  std::vector<int64_t> part;  // how many keys each part has in it

  int64_t inside() const {
    int64_t sum = 0;
    for (const int64_t keys : part) sum += keys;
    return sum;
  }
};

// Numbers of every part: [parts, size], 0 at first.
template <class N>
struct PerPart {
  int64_t size;
  N* values;
  PerPart(int64_t parts, int64_t size_of_part, Workspace* workspace)
      : size(size_of_part), values(workspace->take<N>(parts * size_of_part)) {
    std::fill(values, values + parts * size, N{});
  }
  N* of(int64_t part) const { return values + part * size; }
};

template <class T>
class Selection {
 public:
  Selection(const Importance<T>& importance, int64_t count, const std::vector<int64_t>& dropped,
            uint32_t max_key, int64_t memory, Workspace* workspace)
      : importance_(importance),
        count_(count),
        dropped_(dropped),
        max_key_(max_key),
        memory_(memory),
        workspace_(workspace),
        bracket_of_(dropped.size()) {
    const int64_t affordable = memory / (int64_t{Thresholds::kBins} * 4);
    while (parts_ < kMaxParts && 2 * parts_ <= std::min(count / kWorthAPart, affordable)) {
      parts_ *= 2;
    }
    part_size_ = ((count + parts_ - 1) / parts_ + kBlock - 1) / kBlock * kBlock;
  }

  Thresholds run() {
    count_bins();
    while (listed() * static_cast<int64_t>(sizeof(Entry)) > memory_ || count_ >> kIndexBits > 0) {
      if (listed() == 0) break;
      split_brackets();
    }
    select();
    return std::move(thresholds_);
  }

 private:
  int64_t begin_of(int64_t part) const { return std::min(part * part_size_, count_); }

  // Calls body(begin, count, keys, bins) for the blocks of every part, on several threads.
  template <class Body>
  void for_each_block(const Body& body) const {
    parallel_for(parts_, 1, [&](int64_t first, int64_t last) {
      dispatch_isa([&](auto) __attribute__((always_inline)) {
        uint32_t key[kBlock], bin[kBlock];
        for (int64_t part = first; part < last; ++part) {
          const int64_t end = begin_of(part + 1);
          for (int64_t begin = begin_of(part); begin < end; begin += kBlock) {
            const int64_t count = std::min(kBlock, end - begin);
            importance_.keys(begin, count, key);
            for (int64_t j = 0; j < count; ++j) bin[j] = thresholds_.bin(key[j]);
            body(part, begin, count, key, bin);
          }
        }
      });
    });
  }

  // Calls body(part, bracket, key - bracket.low, index) for every weight in a bracket.
  template <class Body>
  void for_each_inside(const Body& body) const {
    const uint16_t* const bin_class = thresholds_.bin_class.data();
    const auto visit = [&](int64_t part, uint32_t key, uint32_t bin, int64_t index) {
      for (size_t b = bracket_of_[bin_class[bin] - Thresholds::kMixed];
           b < brackets_.size() && brackets_[b].bin == bin; ++b) {
        const Bracket& bracket = brackets_[b];
        const uint32_t offset = key - bracket.low;
        if (key >= bracket.low && uint64_t{offset} >> bracket.bits == 0) {
          body(part, b, offset, index);
          return;
        }
      }
    };
    for_each_block([&](int64_t part, int64_t begin, int64_t count, const uint32_t* key,
                       const uint32_t* bin) __attribute__((always_inline)) {
      const auto visit_mixed = [&](int64_t first, int64_t last) {
        for (int64_t j = first; j < last; ++j) {
          if (bin_class[bin[j]] >= Thresholds::kMixed) visit(part, key[j], bin[j], begin + j);
        }
      };
      int64_t first = 0;
      for (; first + kTogether <= count; first += kTogether) {  // with one branch
        uint32_t any = 0;
        for (int64_t j = first; j < first + kTogether; ++j) any |= bin_class[bin[j]];
        if (__builtin_expect(any >= Thresholds::kMixed, 0)) visit_mixed(first, first + kTogether);
      }
      visit_mixed(first, count);
    });
  }

  // How many weights are in brackets of more than one key.
  int64_t listed() const {
    int64_t sum = 0;
    for (const Bracket& bracket : brackets_) sum += bracket.bits > 0 ? bracket.inside() : 0;
    return sum;
  }

  // Appends the keys [low, low + 2^bits) of a bin as a bracket if they have a rank from `rank` on;
  // returns the first rank beyond.
  size_t add_bracket(size_t rank, size_t last_rank, Bracket bracket,
                     std::vector<size_t>* bracket_of, std::vector<Bracket>* brackets) const {
    const int64_t end = bracket.below + bracket.inside();
    size_t next = rank;
    for (; next < last_rank && dropped_[next] < end; ++next) (*bracket_of)[next] = brackets->size();
    if (next > rank) brackets->push_back(std::move(bracket));
    return next;
  }

  void count_bins() {
    const uint32_t top = max_key_ >> Thresholds::kBinBits;
    thresholds_.first_bin = top > Thresholds::kBins - 2 ? top - (Thresholds::kBins - 2) : 0;
    thresholds_.short_keys = importance_.zero_bits() >= Thresholds::kBinBits;
    thresholds_.bin_class.resize(Thresholds::kBins);
    const PerPart<uint32_t> counts(parts_, Thresholds::kBins, workspace_);
    for_each_block([&](int64_t part, int64_t, int64_t count, const uint32_t*, const uint32_t* bin)
                       __attribute__((always_inline)) {
                         uint32_t* const of_part = counts.of(part);
                         for (int64_t j = 0; j < count; ++j) ++of_part[bin[j]];
                       });
    std::vector<int64_t> inside_bin(Thresholds::kBins, 0);
    for (int64_t p = 0; p < parts_; ++p) {
      const uint32_t* const of_part = counts.of(p);
      for (size_t bin = 0; bin < inside_bin.size(); ++bin) inside_bin[bin] += of_part[bin];
    }
    int64_t below = 0;
    size_t rank = 0;
    for (uint32_t bin = 0; bin < Thresholds::kBins; ++bin) {
      const int64_t inside = inside_bin[bin];
      thresholds_.bin_class[bin] = static_cast<uint16_t>(rank);
      if (rank < dropped_.size() && dropped_[rank] < below + inside) {
        thresholds_.bin_class[bin] = static_cast<uint16_t>(Thresholds::kMixed + rank);
        Bracket bracket = bracket_of_bin(bin);
        bracket.below = below;
        for (int64_t p = 0; p < parts_; ++p) bracket.part.push_back(counts.of(p)[bin]);
        rank = add_bracket(rank, dropped_.size(), std::move(bracket), &bracket_of_, &brackets_);
      }
      below += inside;
    }
  }

  Bracket bracket_of_bin(uint32_t bin) const {
    Bracket bracket{bin, (thresholds_.first_bin + bin) << Thresholds::kBinBits, 0, 0, {}};
    if (bin == 0) {
      bracket.low = 0;
    } else if (bin == 1) {  // and all that is smaller
      bracket.low = 0;
      bracket.bits = 31;
    } else if (bin + 1 == Thresholds::kBins && max_key_ >= kInfinity) {  // and NaN
      bracket.bits = 31;
    } else if (!thresholds_.short_keys) {
      bracket.bits = Thresholds::kBinBits;
    }
    return bracket;
  }

  void split_brackets() {
    const auto old = static_cast<int64_t>(brackets_.size());
    int split = kMinSplit;
    while (split < kMaxSplit && (old * parts_ * 4 << (split + 1)) <= memory_) ++split;
    const PerPart<uint32_t> counts(parts_, old << split, workspace_);
    for_each_inside([&](int64_t part, size_t b, uint32_t offset, int64_t) {
      const int shift = std::max(0, brackets_[b].bits - split);
      ++counts.of(part)[(static_cast<int64_t>(b) << split) + (offset >> shift)];
    });
    std::vector<Bracket> finer;
    std::vector<size_t> finer_of(dropped_.size());
    size_t rank = 0;
    for (size_t b = 0; b < brackets_.size(); ++b) {
      const size_t last_rank = static_cast<size_t>(
          std::upper_bound(bracket_of_.begin(), bracket_of_.end(), b) - bracket_of_.begin());
      const int bits = std::max(0, brackets_[b].bits - split);
      int64_t below = brackets_[b].below;
      for (uint32_t k = 0; k < 1u << std::min(split, brackets_[b].bits) && rank < last_rank; ++k) {
        Bracket bracket{brackets_[b].bin, brackets_[b].low + (k << bits), bits, below, {}};
        for (int64_t p = 0; p < parts_; ++p) {
          bracket.part.push_back(counts.of(p)[(static_cast<int64_t>(b) << split) + k]);
        }
        below += bracket.inside();
        rank = add_bracket(rank, last_rank, std::move(bracket), &finer_of, &finer);
      }
    }
    brackets_ = std::move(finer);
    bracket_of_ = std::move(finer_of);
  }

  // Lists the weights in brackets of more than one key, by bracket and part, and finds each rank.
  void select() {
    const size_t old = brackets_.size();
    std::vector<int64_t> begin(old + 1, 0);
    std::vector<int64_t> cursor(static_cast<size_t>(parts_) * old);
    for (size_t b = 0; b < old; ++b) {
      begin[b + 1] = begin[b];
      for (int64_t p = 0; p < parts_; ++p) {
        cursor[static_cast<size_t>(p) * old + b] = begin[b + 1];
        if (brackets_[b].bits > 0) begin[b + 1] += brackets_[b].part[static_cast<size_t>(p)];
      }
    }
    Entry* const entries = workspace_->take<Entry>(begin.back());
    if (begin.back() > 0) {
      for_each_inside([&](int64_t part, size_t b, uint32_t offset, int64_t index) {
        if (brackets_[b].bits == 0) return;
        entries[cursor[static_cast<size_t>(part) * old + b]++] =
            (Entry{offset} << kIndexBits) | static_cast<Entry>(index);
      });
    }
    thresholds_.key.resize(dropped_.size());
    thresholds_.position.resize(dropped_.size());
    const bool few = begin.back() < kWorthAThread;
    const int64_t grain = few ? static_cast<int64_t>(old) : 1;
    parallel_for(static_cast<int64_t>(old), grain, [&](int64_t first, int64_t last) {
      for (auto b = static_cast<size_t>(first); b < static_cast<size_t>(last); ++b) {
        const auto ranks = std::equal_range(bracket_of_.begin(), bracket_of_.end(), b);
        Entry* const end = entries + begin[b + 1];
        Entry* from = entries + begin[b];
        for (auto of = ranks.first; of != ranks.second; ++of) {
          const auto rank = static_cast<size_t>(of - bracket_of_.begin());
          const int64_t number = dropped_[rank] - brackets_[b].below;
          thresholds_.key[rank] = brackets_[b].low;
          if (brackets_[b].bits == 0) {
            thresholds_.position[rank] = find_equal(brackets_[b], number);
            continue;
          }
          Entry* const wanted = entries + begin[b] + number;
          std::nth_element(from, wanted, end);
          from = wanted;
          thresholds_.key[rank] += static_cast<uint32_t>(*wanted >> kIndexBits);
          thresholds_.position[rank] =
              static_cast<int64_t>(*wanted & ((Entry{1} << kIndexBits) - 1));
        }
      }
    });
  }

  // The flat index of number `number` among the keys of a bracket of one key.
  int64_t find_equal(const Bracket& bracket, int64_t number) const {
    size_t part = 0;
    for (; number >= bracket.part[part]; ++part) number -= bracket.part[part];
    const int64_t end = begin_of(static_cast<int64_t>(part) + 1);
    int64_t found = end;
    dispatch_isa([&](auto) __attribute__((always_inline)) {
      uint32_t key[kBlock];
      for (int64_t i = begin_of(static_cast<int64_t>(part)); i < end; i += kBlock) {
        const int64_t count = std::min(kBlock, end - i);
        importance_.keys(i, count, key);
        uint32_t equal = 0;
        for (int64_t j = 0; j < count; ++j) equal += key[j] == bracket.low ? 1 : 0;
        if (number >= equal) {
          number -= equal;
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          if (key[j] == bracket.low && number-- == 0) {
            found = i + j;
            return;
          }
        }
      }
    });
    return found;
  }

  const Importance<T>& importance_;
  const int64_t count_;
  const std::vector<int64_t>& dropped_;
  const uint32_t max_key_;
  const int64_t memory_;
  Workspace* const workspace_;
  int64_t parts_ = 1, part_size_;
  Thresholds thresholds_;
  std::vector<Bracket> brackets_;   // in ascending order
  std::vector<size_t> bracket_of_;  // of every rank
};

}  // namespace

template <class T>
Thresholds find_thresholds(const Importance<T>& importance, int64_t count,
                           const std::vector<int64_t>& dropped, uint32_t max_key, int64_t memory,
                           Workspace* workspace) {
  return Selection<T>(importance, count, dropped, max_key, memory, workspace).run();
}

template Thresholds find_thresholds<float>(const Importance<float>&, int64_t,
                                           const std::vector<int64_t>&, uint32_t, int64_t,
                                           Workspace*);
template Thresholds find_thresholds<BFloat16>(const Importance<BFloat16>&, int64_t,
                                              const std::vector<int64_t>&, uint32_t, int64_t,
                                              Workspace*);
template Thresholds find_thresholds<Float16>(const Importance<Float16>&, int64_t,
                                             const std::vector<int64_t>&, uint32_t, int64_t,
                                             Workspace*);

}  // namespace fitcompress
