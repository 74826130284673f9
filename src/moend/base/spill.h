// Memory that may leave the machine's RAM: blocks are mapped from files without a name in a folder, so the
// system can write them out when memory is short and read them back when they are used.
#pragma once

#include <memory>
#include <string>

#include "moend/base/error.h"
#include "moend/base/ledger.h"

namespace moend {

class SpillLedger : public Ledger {
 public:
  // kIo names the folder when no file can be made in it. A folder in memory (tmpfs) saves nothing.
  static Expected<std::shared_ptr<Ledger>> Create(const std::string& folder);

 protected:
  // The disk space is reserved here: a full disk refuses the block instead of failing a later access. nullptr
  // then.
  void* Take(int64_t bytes) override;
  void Give(void* p, int64_t bytes) override;

 private:
  explicit SpillLedger(std::string folder) : folder_(std::move(folder)) {}
  std::string folder_;
};

}  // namespace moend
