// Fuzzing without a fuzzing library: inputs are made from good ones by changes that a seed decides, so that
// every run does the same on every machine. What a parser says about an input, numbers and quoted text left
// out, takes the place of coverage: inputs that were answered in a new way are changed further.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace moend::fuzz {

// What a parser made of an input.
struct Outcome {
  bool accepted = false;
  std::string said = {};   // its error; or, accepted, a word for what it found
  std::string wrong = {};  // a promise that does not hold; empty: none
};

struct Parser {
  std::string name = {};
  std::vector<std::string> seeds = {};  // good inputs
  std::vector<std::string> words = {};  // of its language
  std::function<Outcome(const std::string&)> run = {};
  // Mends what would stop every changed input at the door (checksums); may be empty.
  std::function<void(std::string&)> seal = {};
};

// All of them, by name.
std::vector<Parser> Parsers();
void AddFileParsers(std::vector<Parser>& parsers);    // model, plan, profile, cache, session, suite
void AddHttpParsers(std::vector<Parser>& parsers);    // heads, bodies in chunks
void AddServerParsers(std::vector<Parser>& parsers);  // requests
void AddStoreParsers(std::vector<Parser>& parsers);   // saved prefixes, answers of a Redis
void AddChatParsers(std::vector<Parser>& parsers);    // chat templates, answers of models

struct Report {
  int64_t executions = 0, accepted = 0;
  int64_t outcomes = 0;  // different ones
  std::string wrong;     // the first broken promise, and the input that broke it; empty: none
};

Report Run(const Parser& parser, int64_t executions, uint64_t seed);

// One change of `input`; `others` are inputs to splice with.
void Mutate(std::string& input, const std::vector<std::string>& others, const std::vector<std::string>& words,
            std::mt19937_64& random);

// The input at work, for a handler of crashes.
std::string_view Current();

}  // namespace moend::fuzz
