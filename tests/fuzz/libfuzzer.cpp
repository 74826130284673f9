// The same parsers and promises under clang's libFuzzer, which goes by coverage:
//   moend_libfuzzer --list
//   moend_libfuzzer --parser=NAME [libFuzzer's flags] CORPUS    good inputs are put into the folder first
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>

#include "tests/fuzz/fuzz.h"

namespace moend::fuzz {
namespace {

std::optional<Parser> chosen;

}  // namespace
}  // namespace moend::fuzz

extern "C" std::size_t LLVMFuzzerMutate(uint8_t* data, std::size_t size, std::size_t most);

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  using namespace moend::fuzz;
  constexpr std::string_view kParser = "--parser=";
  std::string name, corpus;
  bool list = false;
  for (int i = 1; i < *argc; ++i) {
    const std::string_view argument = (*argv)[i];
    if (argument == "--list") list = true;
    if (argument.starts_with(kParser)) name = argument.substr(kParser.size());
    if (!argument.starts_with('-') && corpus.empty()) corpus = argument;
  }
  for (Parser& parser : Parsers()) {
    if (list) std::puts(parser.name.c_str());
    if (parser.name == name) chosen = std::move(parser);
  }
  if (list) std::exit(0);
  if (!chosen) {
    std::fprintf(stderr, "moend_libfuzzer: there is no parser \"%s\"; --list names them\n", name.c_str());
    std::exit(2);
  }
  for (std::size_t i = 0; i < chosen->seeds.size() && !corpus.empty(); ++i)
    std::ofstream(corpus + "/good-" + std::to_string(i), std::ios::binary) << chosen->seeds[i];
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  using namespace moend::fuzz;
  std::string input(reinterpret_cast<const char*>(data), size);
  if (chosen->seal) chosen->seal(input);
  const Outcome outcome = chosen->run(input);
  std::string wrong = outcome.wrong;
  if (!outcome.accepted && outcome.said.empty()) wrong = "it refuses the input and does not say why";
  if (!wrong.empty()) {
    std::fprintf(stderr, "BROKEN: %s\n", wrong.c_str());
    std::abort();
  }
  return 0;
}

// libFuzzer's changes, and by turns ours, which know the words of the language and how numbers are written.
extern "C" std::size_t LLVMFuzzerCustomMutator(uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned seed) {
  using namespace moend::fuzz;
  if (seed % 2) return LLVMFuzzerMutate(data, size, most);
  std::mt19937_64 random(seed);
  std::string input(reinterpret_cast<const char*>(data), size);
  Mutate(input, chosen->seeds, chosen->words, random);
  if (input.size() > most) input.resize(most);
  std::memcpy(data, input.data(), input.size());
  return input.size();
}
