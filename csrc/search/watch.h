// When a search has to stop.
#pragma once

#include <chrono>

#include "search/knapsack.h"

namespace fitcompress {

class Watch {
 public:
  explicit Watch(const KnapsackOptions& options)
      : seconds_(options.seconds), progress_(options.progress) {}

  // What values were multiplied by.
  void set_scale(double scale) { scale_ = scale; }

  // Cheap enough for every microsecond or two of work.
  bool says_stop(double best, double bound) {
    if (stopped_) return true;
    const double now = elapsed();
    stopped_ = timed_out_ = now > seconds_;
    if (!stopped_ && progress_ && now >= next_report_) {
      next_report_ = now + 0.03;
      stopped_ = !progress_(best / scale_, bound / scale_);
    }
    return stopped_;
  }
  bool stopped() const { return stopped_; }
  bool timed_out() const { return timed_out_; }

 private:
  using Clock = std::chrono::steady_clock;

  double elapsed() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  const Clock::time_point start_ = Clock::now();
  const double seconds_;
  const KnapsackProgress& progress_;
  double scale_ = 1.0;
  double next_report_ = 0.03;
  bool stopped_ = false;
  bool timed_out_ = false;
};

}  // namespace fitcompress
