// Contexts that nobody is using now, kept because a later prompt may begin with their tokens. One radix tree
// a key: a match compares tokens, and never crosses keys. Used by the scheduler's thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moend/serve/backend.h"

namespace moend::serve {

struct Prefix {
  std::string scope = {};
  std::unique_ptr<Context> context = {};
  int level = 0;                   // how far it was compressed beyond the plan
  bool answered = false;           // a chat up to an answer of the model
  std::vector<int32_t> tail = {};  // of that answer, behind the context's tokens
  bool stuck = false;              // compressing it further failed or gained nothing
  uint64_t last_used = 0;
  int64_t length() const { return static_cast<int64_t>(context->tokens().size()); }
};

class PrefixCache {
 public:
  // The longest kept context whose tokens begin `tokens`, with at most `most` of them; null if there is none.
  // Counts as a use.
  std::shared_ptr<Prefix> Find(const std::string& scope, std::span<const int32_t> tokens, int64_t most);

  // Keeps a context; one with the same tokens is replaced if it was compressed further, else the new one is
  // dropped. `tail`: of a chat's answer, see Prefix.
  std::shared_ptr<Prefix> Insert(const std::string& scope, std::unique_ptr<Context> context, int level,
                                 std::optional<std::vector<int32_t>> tail = {});

  void Erase(const std::shared_ptr<Prefix>& prefix);

  // The least recently used prefix among those for which `eligible` is true, unforked ones first; null if
  // none.
  std::shared_ptr<Prefix> Oldest(const std::function<bool(const Prefix&)>& eligible) const;

  int64_t size() const { return static_cast<int64_t>(all_.size()); }
  int64_t tokens() const;
  std::span<const std::shared_ptr<Prefix>> all() const { return all_; }

 private:
  struct Node {
    std::vector<int32_t> edge;  // tokens from the parent to here
    std::map<int32_t, std::unique_ptr<Node>> children;
    std::shared_ptr<Prefix> prefix;
  };
  std::map<std::string, Node> roots_;
  std::vector<std::shared_ptr<Prefix>> all_;
  uint64_t clock_ = 0;
};

}  // namespace moend::serve
