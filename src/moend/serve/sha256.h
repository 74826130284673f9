// SHA-256 (FIPS 180-4): names of saved prefixes, names of API keys where they must not be readable,
// checksums.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace moend::serve {

class Sha256 {
 public:
  Sha256();
  void Update(std::string_view bytes);
  std::array<uint8_t, 32> Finish();  // once

 private:
  void Block(const uint8_t* p);
  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> buffer_{};
  uint64_t length_ = 0;
};

std::array<uint8_t, 32> Sha256Of(std::string_view bytes);
std::string Hex(std::span<const uint8_t> bytes);

// Compares without telling by its duration where two equally long strings differ.
bool ConstantTimeEqual(std::span<const uint8_t> a, std::span<const uint8_t> b);

}  // namespace moend::serve
