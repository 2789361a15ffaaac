// What libFuzzer does, in little, for compilers without it: mutates a corpus and keeps the inputs
// that reach new edges. The target is compiled with -fsanitize-coverage=trace-pc, this file not.
//
//   codec_fuzz SECONDS SEED CORPUS [SAVED]
//   codec_fuzz FILE...
//
// New inputs go to the folder SAVED, one that ends the program to crash-input.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" void __sanitizer_cov_trace_pc();

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kEdges = 1 << 16;
constexpr std::size_t kMostBytes = 4096;
constexpr std::size_t kHeader = 8;
std::array<std::uint8_t, kEdges> hits;   // of this input
std::array<std::uint8_t, kEdges> known;  // counts seen so far, a bit for each order of magnitude
thread_local std::uintptr_t last = 0;

std::uint8_t magnitude(std::uint8_t count) {
  std::uint8_t bit = 1;
  for (; count > 1; count >>= 1) bit = static_cast<std::uint8_t>(bit << 1);
  return bit;
}

bool reaches_something_new() {
  bool found = false;
  for (std::size_t i = 0; i < kEdges; ++i) {
    if (hits[i] == 0) continue;
    const std::uint8_t bit = magnitude(hits[i]);
    found |= (known[i] & bit) == 0;
    known[i] |= bit;
  }
  return found;
}

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const std::filesystem::path& path, const Bytes& data) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
}

// An input that reached something new, and how long that took.
struct Kept {
  Bytes data;
  double seconds;
};

Bytes current;

void keep_current() { write("crash-input", current); }

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::size_t below(std::size_t n) { return random_() % n; }

  Bytes mutated(const std::vector<Kept>& corpus) {
    // Mostly a fast one.
    const Kept* picked = &corpus[below(corpus.size())];
    for (std::size_t n = below(8) == 0 ? 0 : 3; n > 0; --n) {
      const Kept& other = corpus[below(corpus.size())];
      if (other.seconds < picked->seconds) picked = &other;
    }
    Bytes data = picked->data;
    for (std::size_t n = std::size_t{1} << below(5); n > 0; --n) {
      change(&data, corpus[below(corpus.size())].data);
    }
    data.resize(std::min(data.size(), kMostBytes));
    data.resize(std::max(data.size(), kHeader + 2));
    return data;
  }

 private:
  void change(Bytes* data, const Bytes& other) {
    if (data->empty()) data->push_back(0);
    // Half of the changes are to the first bytes, which decide most.
    const std::size_t reach =
        below(2) == 0 ? std::min<std::size_t>(data->size(), 24) : data->size();
    const std::size_t at = below(reach);
    const auto offset = [](std::size_t n) { return static_cast<std::ptrdiff_t>(n); };
    const std::size_t length = std::min(std::size_t{1} << below(6), data->size() - at);
    switch (below(8)) {
      case 0:
        (*data)[at] ^= static_cast<std::uint8_t>(1u << below(8));
        break;
      case 1:
        (*data)[at] = static_cast<std::uint8_t>(random_());
        break;
      case 2: {
        constexpr std::array<std::uint8_t, 8> kSpecial = {0, 1, 2, 15, 16, 127, 128, 255};
        (*data)[at] = kSpecial[below(kSpecial.size())];
        break;
      }
      case 3:
        (*data)[at] = static_cast<std::uint8_t>((*data)[at] + below(9) - 4);
        break;
      case 4:
        data->erase(data->begin() + offset(at), data->begin() + offset(at + length));
        break;
      case 5:
        data->insert(data->begin() + offset(at), length, static_cast<std::uint8_t>(random_()));
        break;
      case 6:  // the head of one, the tail of another
        data->resize(at);
        data->insert(data->end(), other.begin() + offset(std::min(at, other.size())), other.end());
        break;
      default: {  // a piece of another
        const std::size_t from = below(other.size());
        const std::size_t end = std::min(other.size(), from + length);
        std::copy(other.begin() + offset(from),
                  other.begin() + offset(std::min(end, from + data->size() - at)),
                  data->begin() + offset(at));
      }
    }
  }

  std::mt19937_64 random_;
};

struct Totals {
  std::uint64_t runs = 0, accepted = 0;
  double seconds = 0, slowest = 0;  // of the last, of any
};

bool run(const Bytes& data, Totals* totals) {
  hits.fill(0);
  last = 0;
  const auto start = Clock::now();
  const int result = LLVMFuzzerTestOneInput(data.data(), data.size());
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  totals->seconds = seconds;
  ++totals->runs;
  totals->accepted += result > 0;
  if (seconds > 1) {
    write("slow-" + std::to_string(totals->runs), data);
    std::printf("SLOW: %.2f s\n", seconds);
  }
  totals->slowest = std::max(totals->slowest, seconds);
  return reaches_something_new();
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  std::uint8_t& count = hits[(here ^ (last >> 1) * 31) % kEdges];
  if (count < 255) ++count;
  last = here;
}

int main(int argc, char** argv) {
  Totals totals;
  if (argc < 4 || std::filesystem::is_regular_file(argv[1])) {
    for (int i = 1; i < argc; ++i) {
      std::printf("%s\n", argv[i]);
      run(read(argv[i]), &totals);
    }
    return 0;
  }
  __sanitizer_set_death_callback(keep_current);
  std::signal(SIGABRT, [](int) { keep_current(); });
  std::vector<Kept> corpus;
  std::vector<std::filesystem::path> paths;
  for (const auto& file : std::filesystem::directory_iterator(argv[3])) paths.push_back(file);
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths) {
    current = read(path);
    run(current, &totals);
    corpus.push_back({current, totals.seconds});
  }
  Mutator mutator(std::stoull(argv[2]));
  const auto end = Clock::now() + std::chrono::seconds(std::stoul(argv[1]));
  while (Clock::now() < end) {
    for (int i = 0; i < 256; ++i) {
      current = mutator.mutated(corpus);
      if (!run(current, &totals)) continue;
      corpus.push_back({current, totals.seconds});
      if (argc > 4) write(std::filesystem::path(argv[4]) / std::to_string(totals.runs), current);
    }
  }
  const auto edges = kEdges - static_cast<std::size_t>(std::count(known.begin(), known.end(), 0));
  std::printf("%llu inputs, %llu accepted, %zu edges, %zu inputs kept, slowest %.2f s\n",
              static_cast<unsigned long long>(totals.runs),
              static_cast<unsigned long long>(totals.accepted), edges, corpus.size(),
              totals.slowest);
}
