// Turns the pieces of generated tokens into text that may be shown: valid UTF-8 in whole characters, and no
// part of a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moend {

class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stop = {});

  // Takes the bytes of one token and returns the text that is final now: it can no longer become part of a
  // stop string. Bytes that are no UTF-8 become U+FFFD.
  std::string Push(std::string_view bytes);

  // What was held back, when nothing follows any more.
  std::string Finish();

  // Bytes of text that Push() and Finish() returned so far, and these with what is held back.
  int64_t given() const { return given_; }
  int64_t taken() const { return given_ + static_cast<int64_t>(held_.size()); }

  bool stopped() const { return stopped_; }  // a stop string was met; nothing comes any more

 private:
  std::string Release(bool all);

  std::vector<std::string> stop_;
  std::string bytes_;  // a character that is not complete yet
  std::string held_;   // whole characters that may begin a stop string
  int64_t given_ = 0;
  bool stopped_ = false;
};

// Moves the whole characters at the front of `bytes` to the end of `text`; with `all` an unfinished one at
// the end as well, as U+FFFD.
void TakeUtf8(std::string& bytes, std::string& text, bool all);

}  // namespace moend
