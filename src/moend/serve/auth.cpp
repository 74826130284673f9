#include "moend/serve/auth.h"

#include <algorithm>

#include "moend/base/base64.h"
#include "moend/serve/sha256.h"

namespace moend::serve {
namespace {

bool StartsWithNoCase(std::string_view s, std::string_view lower_prefix) {
  return s.size() >= lower_prefix.size() &&
         std::equal(lower_prefix.begin(), lower_prefix.end(), s.begin(), [](char want, char got) {
           return want == (got >= 'A' && got <= 'Z' ? static_cast<char>(got - 'A' + 'a') : got);
         });
}

}  // namespace

Expected<ApiKeys> ApiKeys::Create(const std::vector<std::string>& keys) {
  ApiKeys out;
  for (const std::string& key : keys) {
    const auto visible = [](char c) { return static_cast<unsigned char>(c) > 0x20 && c != 0x7f; };
    if (key.empty() || !std::ranges::all_of(key, visible))
      return Fail(ErrorCode::kInvalidArgument,
                  "API key {} is empty or has white space; a key is a word of visible characters",
                  out.digests_.size() + 1);
    out.digests_.push_back(Sha256Of(key));
  }
  return out;
}

Expected<std::vector<std::string>> ApiKeys::ParseFile(const std::string& text, const std::string& source) {
  std::vector<std::string> keys;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ' || line.back() == '\t'))
      line.pop_back();
    if (!line.empty() && line[0] != '#') keys.push_back(std::move(line));
  }
  // A file that was meant to protect the server must not leave it open by being empty.
  if (keys.empty())
    return Fail(ErrorCode::kInvalidArgument, "{}: holds no API key; one key a line is wanted", source);
  return keys;
}

std::optional<std::string> ApiKeys::Scope(std::string_view authorization) const {
  if (!required()) return "public";
  std::string key;
  if (StartsWithNoCase(authorization, "bearer ")) {
    key = authorization.substr(7);
  } else if (StartsWithNoCase(authorization, "basic ")) {
    const auto pair = DecodeBase64(authorization.substr(6));
    const auto colon = pair ? pair->find(':') : std::string::npos;
    if (colon != std::string::npos) key = pair->substr(colon + 1);
  }
  const auto digest = Sha256Of(key);
  bool found = false;
  for (const auto& known : digests_) found |= ConstantTimeEqual(known, digest);
  if (!found || key.empty()) return std::nullopt;
  // Stable over restarts and servers, and no way back to the key.
  return Hex(Sha256Of("moend scope " + key)).substr(0, 32);
}

}  // namespace moend::serve
