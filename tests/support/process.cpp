#include "tests/support/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace moend::test {
namespace {

constexpr auto kPatience = std::chrono::minutes(5);

struct Pipe {
  int read = -1, write = -1;
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) == 0) read = ends[0], write = ends[1];
  }
  ~Pipe() {
    CloseRead();
    CloseWrite();
  }
  void CloseRead() { Close(read); }
  void CloseWrite() { Close(write); }
  static void Close(int& fd) {
    if (fd >= 0) close(fd);
    fd = -1;
  }
};

[[noreturn]] void Become(const std::string& program, const std::vector<std::string>& arguments,
                         const ProcessOptions& options, const Pipe& in, const Pipe& out, const Pipe& err) {
  dup2(in.read, STDIN_FILENO);
  const int to = options.stdout_path.empty() ? out.write : open(options.stdout_path.c_str(), O_WRONLY);
  dup2(to, STDOUT_FILENO);
  dup2(err.write, STDERR_FILENO);
  for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
  std::vector<char*> argv = {const_cast<char*>(program.c_str())};
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  execv(program.c_str(), argv.data());
  _exit(127);
}

}  // namespace

ProcessResult RunProcess(const std::string& program, const std::vector<std::string>& arguments,
                         const ProcessOptions& options) {
  ProcessResult result;
  Pipe in, out, err;
  const pid_t child = fork();
  if (child < 0) return result;
  if (child == 0) Become(program, arguments, options, in, out, err);
  in.CloseRead();
  out.CloseWrite();
  err.CloseWrite();
  signal(SIGPIPE, SIG_IGN);
  // Inputs of tests fit into the pipe's buffer.
  if (!options.input.empty() && write(in.write, options.input.data(), options.input.size()) < 0)
    return result;
  in.CloseWrite();

  const auto end = std::chrono::steady_clock::now() + kPatience;
  bool signalled = false;
  while (out.read >= 0 || err.read >= 0) {
    pollfd fds[2] = {{out.read, POLLIN, 0}, {err.read, POLLIN, 0}};
    if (poll(fds, 2, 1000) < 0) break;
    for (int i = 0; i < 2; ++i) {
      if (!(fds[i].revents & (POLLIN | POLLHUP))) continue;
      char block[4096];
      const ssize_t n = read(fds[i].fd, block, sizeof block);
      if (n > 0)
        (i == 0 ? result.out : result.err).append(block, static_cast<std::size_t>(n));
      else
        i == 0 ? out.CloseRead() : err.CloseRead();
    }
    const bool seen = result.out.find(options.when) != std::string::npos ||
                      result.err.find(options.when) != std::string::npos;
    if (options.signal && !signalled && seen) {
      kill(child, options.signal);
      signalled = true;
    }
    if (std::chrono::steady_clock::now() > end) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
      result.err += "\n(killed: no end after five minutes)";
      return result;
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "moend-test-XXXXXX").string();
  if (const char* made = mkdtemp(pattern.data())) path_ = made;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryFolder::Write(const std::string& name, const std::string& content) const {
  std::ofstream(path_ / name, std::ios::binary) << content;
  return path(name);
}

std::string ReadAll(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

}  // namespace moend::test
