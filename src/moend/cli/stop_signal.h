// SIGINT and SIGTERM for a server: they end it at once until it is ready, then ask it to finish, and end it
// at once when they come again.
#pragma once

#include <string>

namespace moend::cli {

// One a process, made before its threads.
class StopSignal {
 public:
  StopSignal();
  // A file that a sudden end removes as well.
  void RemoveAtEnd(const std::string& path);
  void Ready();
  // Whether a signal came within the time.
  bool Wait(int seconds) const;
};

}  // namespace moend::cli
