// Finds the texts of special tokens ("<|im_end|>") in a text, in time that grows with its length.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moend {

struct SpecialMatch {
  int64_t begin = 0, end = 0;  // bytes
  int32_t token = 0;
};

class SpecialTokens {
 public:
  // Empty texts are left out.
  void Add(std::string text, int32_t token);
  void Finish();  // after the last Add

  // All occurrences, also overlapping ones, by where they begin.
  std::vector<SpecialMatch> All(std::string_view text) const;
  // Those that a tokenizer takes: none overlaps another, the longest come first, as in libllama. An
  // occurrence that one of `seams` (offsets, ascending) lies in, its first byte included, is none.
  std::vector<SpecialMatch> Cut(std::string_view text, std::span<const int64_t> seams) const;

 private:
  struct Entry {
    std::string text;
    int32_t token;
  };
  std::vector<Entry> entries_;                            // sorted by text
  std::array<std::pair<int32_t, int32_t>, 256> first_{};  // entries by their first byte
};

}  // namespace moend
