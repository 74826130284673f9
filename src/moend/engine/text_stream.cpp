#include "moend/engine/text_stream.h"

#include <algorithm>

namespace moend {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Bytes of the character that `text` begins with: > 0 when it is whole, 0 when more bytes are needed, and
// -n when the first n bytes cannot begin any character (Unicode 15, table 3-7; n as in "maximal subpart").
int CharacterBytes(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const int length = first >= 0xC2 && first <= 0xDF   ? 2
                     : (first & 0xF0) == 0xE0         ? 3
                     : first >= 0xF0 && first <= 0xF4 ? 4
                                                      : 0;
  if (length == 0) return -1;
  for (int i = 1; i < length; ++i) {
    if (static_cast<std::size_t>(i) >= text.size()) return 0;
    // The second byte also rules out overlong forms, surrogates and values above U+10FFFF.
    const unsigned char low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (byte(static_cast<std::size_t>(i)) < low || byte(static_cast<std::size_t>(i)) > high) return -i;
  }
  return length;
}

}  // namespace

void TakeUtf8(std::string& bytes, std::string& text, bool all) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const int n = CharacterBytes(std::string_view(bytes).substr(at));
    if (n > 0) {
      text.append(bytes, at, static_cast<std::size_t>(n));
      at += static_cast<std::size_t>(n);
    } else if (n < 0) {
      text += kReplacement;
      at += static_cast<std::size_t>(-n);
    } else if (all) {
      text += kReplacement;
      at = bytes.size();
    } else {
      break;
    }
  }
  bytes.erase(0, at);
}

TextStream::TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {
  std::erase(stop_, std::string());
}

std::string TextStream::Push(std::string_view bytes) {
  if (stopped_) return {};
  bytes_ += bytes;
  TakeUtf8(bytes_, held_, false);
  return Release(false);
}

std::string TextStream::Finish() {
  if (stopped_) return {};
  TakeUtf8(bytes_, held_, true);
  return Release(true);
}

std::string TextStream::Release(bool all) {
  std::size_t end = std::string::npos;
  for (const std::string& s : stop_) end = std::min(end, held_.find(s));
  if (end != std::string::npos) {
    stopped_ = true;
  } else {
    // The longest end of the text that begins a stop string has to wait.
    std::size_t wait = 0;
    for (const std::string& s : stop_) {
      for (std::size_t n = std::min(s.size() - 1, held_.size()); !all && n > wait; --n)
        if (held_.ends_with(std::string_view(s).substr(0, n))) wait = n;
    }
    end = held_.size() - wait;
  }
  std::string text = held_.substr(0, end);
  held_.erase(0, end);
  given_ += static_cast<int64_t>(text.size());
  return text;
}

}  // namespace moend
