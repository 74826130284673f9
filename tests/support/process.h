// Runs a program as a shell would: arguments, standard input, both outputs, exit code; and a folder that
// vanishes with the test.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace moend::test {

struct ProcessResult {
  int code = -1;  // exit code, or 128 + the signal that ended it
  std::string out, err;
};

struct ProcessOptions {
  std::string input;
  std::vector<std::pair<std::string, std::string>> environment;  // set on top of the caller's
  std::string stdout_path;                                       // instead of reading it
  // Once `when` has been seen on stdout or stderr, the process gets `signal`.
  int signal = 0;
  std::string when;
};

// Gives up (code -1, killed) after five minutes.
ProcessResult RunProcess(const std::string& program, const std::vector<std::string>& arguments,
                         const ProcessOptions& options = {});

class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string path(const std::string& name) const { return (path_ / name).string(); }
  // Writes a file and returns its path.
  std::string Write(const std::string& name, const std::string& content) const;

 private:
  std::filesystem::path path_;
};

// `moend` with one thread: tests run beside each other, and threads that wait for each other crawl on a busy
// machine.
inline ProcessResult Moend(const std::vector<std::string>& arguments, ProcessOptions options = {}) {
  options.environment.emplace_back("MOEND_ARG_THREADS", "1");
  return RunProcess(MOEND_BINARY, arguments, options);
}

inline bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string ReadAll(const std::string& path);  // empty when there is no such file

}  // namespace moend::test
