// moend_fuzz [-n EXECUTIONS] [-s SEED] [PARSER...]: a line for each parser; 1 when a promise was broken.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/fuzz/fuzz.h"

namespace moend::fuzz {
namespace {

// The input that crashes is left behind.
void Leave(int signal) {
  const std::string_view input = Current();
  const int file = open("fuzz-crash", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file >= 0 && write(file, input.data(), input.size()) == static_cast<ssize_t>(input.size())) {
    static constexpr char kText[] = "moend_fuzz: the input is in fuzz-crash\n";
    if (write(STDERR_FILENO, kText, sizeof kText - 1) < 0) _exit(3);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

int Main(int argc, char** argv) {
  int64_t executions = 2000;
  uint64_t seed = 1;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (!std::strcmp(argv[i], "-n") && has_value) {
      executions = std::atoll(argv[++i]);
    } else if (!std::strcmp(argv[i], "-s") && has_value) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      names.emplace_back(argv[i]);
    }
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGFPE, SIGBUS, SIGILL}) std::signal(signal, Leave);
  int code = 0;
  std::size_t ran = 0;
  for (const Parser& parser : Parsers()) {
    if (!names.empty() && std::ranges::find(names, parser.name) == names.end()) continue;
    ++ran;
    const auto start = std::chrono::steady_clock::now();
    const Report report = Run(parser, executions, seed);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    fmt::print("{:<20} {:>9} executions, {:>8} accepted, {:>4} answers, {:>7.1f} s{}\n", parser.name,
               report.executions, report.accepted, report.outcomes, seconds,
               report.wrong.empty() ? "" : "  BROKEN: " + report.wrong);
    std::fflush(stdout);
    if (!report.wrong.empty()) code = 1;
  }
  if (ran < names.size() || ran == 0) {
    fmt::print(stderr, "moend_fuzz: there is no such parser\n");
    return 2;
  }
  return code;
}

}  // namespace
}  // namespace moend::fuzz

int main(int argc, char** argv) {
  return moend::fuzz::Main(argc, argv);
}
