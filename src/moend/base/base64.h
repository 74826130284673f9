// RFC 4648 base64.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace moend {

std::string EncodeBase64(std::string_view bytes);                // padded
std::optional<std::string> DecodeBase64(std::string_view text);  // nothing when malformed

}  // namespace moend
