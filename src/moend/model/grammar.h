// Output that is held to a grammar, by libllama's. A grammar is a program from somebody who is not trusted:
// it can take a time and memory that grow exponentially, recurse without end, and libllama stops the process
// where one contradicts itself. So grammars run in processes of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/chat.h"
#include "moend/model/worker.h"

namespace moend {

// One output. Not thread safe.
class Grammar {
 public:
  virtual ~Grammar() = default;
  // Which of `tokens` may come next: one that ends the output if the grammar's text may end here. Tokens
  // that are none of the vocabulary may not. kUnsupported when the grammar takes more time or memory than it
  // may.
  virtual Expected<std::vector<bool>> Allows(std::span<const int32_t> tokens) = 0;
  // Which of all of the vocabulary, by id.
  virtual Expected<std::vector<bool>> AllowsOfAll() = 0;
  // `token` was chosen; it was allowed, and does not end the output.
  virtual void Accept(int32_t token) = 0;
};

struct GrammarVocabulary {
  const void* llama_vocab = nullptr;  // outlives the host
  int64_t n_tokens = 0;
};

// The processes in which grammars run, one that checks new ones and one that follows those in use. Thread
// safe; outlives its grammars.
class GrammarHost {
 public:
  explicit GrammarHost(const GrammarVocabulary& vocabulary);
  ~GrammarHost();

  // `begun` are the tokens of source.begun. kInvalidArgument with libllama's words where the text is no
  // grammar, or not one for `begun`; kUnsupported where it takes too long.
  Expected<std::unique_ptr<Grammar>> Make(const GrammarSource& source, std::vector<int32_t> begun) const;
  // A JSON schema as a grammar. kInvalidArgument names what cannot be had.
  Expected<std::string> FromSchema(const std::string& schema) const;
  // Splits the processes off now, while this one is small.
  void Start() const;

  struct Impl;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace moend
