// A line of progress on stderr: a bar that redraws itself on a terminal, nothing elsewhere.
#pragma once

#include <chrono>
#include <string>

namespace moend::cli {

class ProgressBar {
 public:
  // Shows nothing before `delay_seconds`, so that short work leaves no trace.
  explicit ProgressBar(std::string label, double delay_seconds = 0.5);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Update(double share, const std::string& detail = {});  // 0 to 1
  void Clear();                                               // wipes the line

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  bool terminal_ = false, drawn_ = false;
  double delay_ = 0, first_share_ = -1;
  Clock::time_point start_, last_;
};

// 0:07, 2:31, 1:05:09
std::string Duration(double seconds);

}  // namespace moend::cli
