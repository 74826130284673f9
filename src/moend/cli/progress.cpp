#include "moend/cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace moend::cli {
namespace {

constexpr int kBarWidth = 30;
constexpr double kRedrawSeconds = 0.1;

bool IsTerminal() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) == 1 && !(term && std::strcmp(term, "dumb") == 0);
}

}  // namespace

ProgressBar::ProgressBar(std::string label, double delay_seconds)
    : label_(std::move(label)),
      terminal_(IsTerminal()),
      delay_(delay_seconds),
      start_(Clock::now()),
      last_(start_) {}

ProgressBar::~ProgressBar() {
  Clear();
}

void ProgressBar::Update(double share, const std::string& detail) {
  share = std::clamp(share, 0.0, 1.0);
  // Work that goes on where an earlier run stopped begins above 0; its speed is measured from there.
  if (first_share_ < 0) first_share_ = share;
  const auto now = Clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  if (!terminal_ || elapsed < delay_) return;
  if (drawn_ && std::chrono::duration<double>(now - last_).count() < kRedrawSeconds && share < 1) return;
  last_ = now;
  drawn_ = true;
  const int filled = static_cast<int>(std::lround(share * kBarWidth));
  std::string left = "?";
  if (share > first_share_) left = Duration(elapsed * (1 - share) / (share - first_share_));
  fmt::print(stderr, "\r{} [{:=<{}}{:{}}] {:3.0f}%  {} left{}{}\x1b[K", label_, "", filled, "",
             kBarWidth - filled, share * 100, left, detail.empty() ? "" : "  ", detail);
  std::fflush(stderr);
}

void ProgressBar::Clear() {
  if (!drawn_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  drawn_ = false;
}

std::string Duration(double seconds) {
  const auto s = static_cast<long long>(std::clamp(seconds, 0.0, 3.6e6) + 0.5);
  if (s < 3600) return fmt::format("{}:{:02}", s / 60, s % 60);
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

}  // namespace moend::cli
