// Independent blocks of work on a few threads. _core knows nothing of torch and its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fitcompress {

// Calls work(b) for b in [0, blocks), on up to `threads` threads. What the first block to fail
// throws is thrown again.
template <class Work>
void for_blocks(std::int64_t blocks, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(blocks));
  const auto run = [&] {
    for (std::int64_t b = next++; b < blocks; b = next++) {
      try {
        work(b);
      } catch (...) {
        errors[static_cast<std::size_t>(b)] = std::current_exception();
      }
    }
  };
  std::vector<std::thread> others;
  const std::int64_t wanted = std::min<std::int64_t>(threads, blocks);
  try {
    for (std::int64_t i = 1; i < wanted; ++i) others.emplace_back(run);
  } catch (const std::exception&) {
    // A machine that gives no more threads, or no memory for them: those there are do the work.
  }
  run();
  for (std::thread& each : others) each.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace fitcompress
