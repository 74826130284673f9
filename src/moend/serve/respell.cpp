#include "moend/serve/respell.h"

#include <algorithm>
#include <string>

namespace moend::serve {

std::optional<RespelledPrompt> Respell(std::span<const int32_t> prompt, std::span<const int32_t> kept,
                                       std::span<const int32_t> tail, int64_t least, const Backend& backend) {
  const std::size_t n = kept.size() + tail.size();
  const auto token = [&](std::size_t at) { return at < kept.size() ? kept[at] : tail[at - kept.size()]; };
  std::size_t i = static_cast<std::size_t>(std::ranges::mismatch(kept, prompt).in1 - kept.begin()), j = i;
  std::string ours, theirs;  // what one side has spelled beyond the other
  bool differs = false;
  while (i < n || !ours.empty()) {
    if (ours.empty() && theirs.empty() && j < prompt.size() && token(i) == prompt[j]) {
      ++i;
      ++j;
      continue;
    }
    if (ours.empty()) ours = backend.Piece(token(i++));
    if (theirs.empty()) {
      if (j == prompt.size()) return std::nullopt;
      theirs = backend.Piece(prompt[j++]);
    }
    const std::size_t common = std::min(ours.size(), theirs.size());
    if (common == 0 || ours.compare(0, common, theirs, 0, common) != 0) return std::nullopt;
    ours.erase(0, common);
    theirs.erase(0, common);
    differs = true;
  }
  if (!differs || static_cast<int64_t>(j) <= least) return std::nullopt;
  RespelledPrompt out{{kept.begin(), kept.end()}, static_cast<int64_t>(j)};
  out.tokens.insert(out.tokens.end(), tail.begin(), tail.end());
  if (!theirs.empty()) {
    const auto rest = backend.Tokenize(theirs, false, false, {});
    if (!rest) return std::nullopt;
    std::string spelled;
    for (const int32_t t : *rest) spelled += backend.Piece(t);
    if (spelled != theirs) return std::nullopt;
    out.tokens.insert(out.tokens.end(), rest->begin(), rest->end());
  }
  const auto left = prompt.subspan(j);
  out.tokens.insert(out.tokens.end(), left.begin(), left.end());
  if (out.tokens.size() <= kept.size()) return std::nullopt;  // nothing would be left to read
  return out;
}

}  // namespace moend::serve
