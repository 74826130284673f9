// Loads the model that is named and generates a few tokens with an installed moend.
#include <cstdio>

#include "moend/engine/engine.h"
#include "moend/engine/generate.h"

int main(int argc, char** argv) {
  auto model = moend::Model::Load(argc > 1 ? argv[1] : "");
  if (!model) return std::fprintf(stderr, "%s\n", model.error().message.c_str()), 1;
  auto engine = moend::Engine::Create(*model);
  if (!engine) return std::fprintf(stderr, "%s\n", engine.error().message.c_str()), 1;
  auto session = moend::Session::Create(*engine, moend::FullPlan((*engine)->fingerprint(), 256));
  if (!session) return std::fprintf(stderr, "%s\n", session.error().message.c_str()), 1;
  const auto tokens = (*model)->tokenizer().Tokenize("It was a dark and", true, true);
  if (!tokens || !session->Prefill(*tokens)) return 1;
  moend::GenerateOptions options;
  options.max_tokens = 4;
  const auto generated = moend::Generate(*session, options);
  return generated && generated->tokens.size() == 4 ? 0 : 1;
}
