#include "moend/serve/saved_prefix.h"

#include <bit>
#include <cstring>

#include "moend/serve/sha256.h"

namespace moend::serve {
namespace {

static_assert(std::endian::native == std::endian::little, "saved prefixes are little endian");

constexpr std::string_view kMagic = "MOENDKV1";
constexpr std::size_t kChecksumBytes = 32;

template <class T>
void Append(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

// Reads from the front of a string; every size is compared with what is left.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : left_(bytes) {}
  template <class T>
  bool Number(T& value) {
    if (left_.size() < sizeof(T)) return false;
    std::memcpy(&value, left_.data(), sizeof(T));
    left_.remove_prefix(sizeof(T));
    return true;
  }
  bool Bytes(uint64_t n, std::string_view& out) {
    if (n > left_.size()) return false;
    out = left_.substr(0, n);
    left_.remove_prefix(n);
    return true;
  }
  bool empty() const { return left_.empty(); }

 private:
  std::string_view left_;
};

std::string_view AsBytes(std::span<const int32_t> tokens) {
  return {reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()};
}

}  // namespace

std::string Encode(const SavedPrefix& p) {
  std::string out;
  out.reserve(p.payload.size() + p.tokens.size() * 4 + p.cache_id.size() + p.scope.size() + 128);
  out += kMagic;
  Append<uint64_t>(out, 0);
  Append(out, static_cast<uint32_t>(p.cache_id.size()));
  out += p.cache_id;
  Append(out, static_cast<uint32_t>(p.scope.size()));
  out += p.scope;
  Append(out, static_cast<uint64_t>(p.tokens.size()));
  out += AsBytes(p.tokens);
  Append(out, static_cast<uint64_t>(p.payload.size()));
  out += p.payload;
  const uint64_t total = out.size() + kChecksumBytes;
  std::memcpy(out.data() + kMagic.size(), &total, sizeof total);
  const auto checksum = Sha256Of(out);
  out.append(reinterpret_cast<const char*>(checksum.data()), checksum.size());
  return out;
}

Expected<SavedPrefix> Decode(std::string_view bytes) {
  if (!bytes.starts_with(kMagic)) return Fail(ErrorCode::kCorrupt, "it does not begin with {}", kMagic);
  uint64_t total = 0;
  if (bytes.size() < kMagic.size() + sizeof total + kChecksumBytes)
    return Fail(ErrorCode::kCorrupt, "it has only {} bytes", bytes.size());
  std::memcpy(&total, bytes.data() + kMagic.size(), sizeof total);
  if (total != bytes.size())
    return Fail(ErrorCode::kCorrupt, "it has {} bytes and should have {}", bytes.size(), total);
  const std::string_view body = bytes.substr(0, bytes.size() - kChecksumBytes);
  const auto checksum = Sha256Of(body);
  if (std::memcmp(checksum.data(), bytes.data() + body.size(), kChecksumBytes) != 0)
    return Fail(ErrorCode::kCorrupt, "its checksum is wrong");
  Reader in(body.substr(kMagic.size() + sizeof total));
  uint32_t n = 0;
  uint64_t m = 0;
  std::string_view cache_id, scope, tokens, payload;
  const bool whole = in.Number(n) && in.Bytes(n, cache_id) && in.Number(n) && in.Bytes(n, scope) &&
                     in.Number(m) && m <= bytes.size() && in.Bytes(m * 4, tokens) && in.Number(m) &&
                     in.Bytes(m, payload) && in.empty();
  if (!whole) return Fail(ErrorCode::kCorrupt, "its parts do not add up");
  SavedPrefix p{std::string(cache_id), std::string(scope), {}, std::string(payload)};
  p.tokens.resize(tokens.size() / 4);
  if (!tokens.empty()) std::memcpy(p.tokens.data(), tokens.data(), tokens.size());
  return p;
}

std::vector<std::string> PrefixNames(const std::string& cache_id, const std::string& scope,
                                     std::span<const int32_t> tokens, std::span<const int64_t> lengths) {
  std::vector<std::string> names;
  const std::string folder = Hex(Sha256Of(cache_id)).substr(0, 16) + "/" + scope + "/";
  Sha256 running;
  int64_t done = 0;
  for (const int64_t length : lengths) {
    running.Update(
        AsBytes(tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(length - done))));
    done = length;
    Sha256 here = running;
    names.push_back(fmt::format("{}{}-{}", folder, length, Hex(here.Finish()).substr(0, 40)));
  }
  return names;
}

}  // namespace moend::serve
