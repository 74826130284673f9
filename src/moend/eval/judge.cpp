#include "moend/eval/judge.h"

#include <algorithm>
#include <cmath>

#include "moend/eval/distance.h"

namespace moend::eval {

Expected<Judge> Judge::Create(std::shared_ptr<Engine> engine) {
  Judge judge;
  const Tokenizer& tokenizer = engine->model().tokenizer();
  for (std::size_t i = 0; i < judge.letters_.size(); ++i) {
    const std::string letter(1, static_cast<char>('A' + i));
    for (const std::string& text : {letter, " " + letter}) {
      MOEND_ASSIGN(const auto tokens, tokenizer.Tokenize(text, false, false));
      if (tokens.size() == 1 && std::ranges::find(judge.letters_[i], tokens[0]) == judge.letters_[i].end())
        judge.letters_[i].push_back(tokens[0]);
    }
  }
  judge.engine_ = std::move(engine);
  return judge;
}

Expected<GoldRows> Judge::Read(const Session& session, std::span<const int32_t> gold) const {
  GoldRows rows;
  rows.first.assign(session.logits().begin(), session.logits().end());
  if (gold.size() < 2) return rows;
  MOEND_ASSIGN(Session fork, session.Fork());
  MOEND_TRY(fork.Prefill(gold.first(gold.size() - 1), {}, &rows.rest));
  return rows;
}

Expected<void> Judge::Compare(const GoldRows& rows, const GoldRows* full, std::span<const int32_t> gold,
                              Answer& answer) const {
  if (gold.empty()) return {};
  const GoldRows& base = full ? *full : rows;
  MOEND_ASSIGN(auto distances, DistancesOfLogits(*engine_, base.first, rows.first, gold.first(1)));
  if (gold.size() > 1) {
    MOEND_ASSIGN(const auto more, Distances(*engine_, base.rest, rows.rest, gold.subspan(1)));
    distances.insert(distances.end(), more.begin(), more.end());
  }
  answer.nll = 0;
  answer.kld.clear();
  answer.same_top = 0;
  answer.gold_tokens = std::ssize(distances);
  for (const TokenDistance& d : distances) {
    answer.nll += d.nll;
    if (!full) continue;
    // As the file holds it, so that going on from the file changes nothing.
    answer.kld.push_back(static_cast<float>(std::round(d.kld * 1e7) / 1e7));
    answer.same_top += d.same_top;
  }
  return {};
}

std::vector<double> Judge::Letters(std::span<const float> logits) const {
  std::vector<double> out;
  for (const auto& tokens : letters_) {
    if (tokens.empty()) return {};
    double p = 0;
    for (const int32_t token : tokens) p += std::exp(-LossOf(logits, token).nll);
    out.push_back(std::clamp(std::log(p), -1e3, 0.0));
  }
  return out;
}

}  // namespace moend::eval
