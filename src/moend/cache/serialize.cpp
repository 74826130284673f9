#include "moend/cache/serialize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "moend/cache/layer_cache_impl.h"

namespace moend {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is written as it is in memory");

constexpr uint64_t kMagic = 0x766B646E656F6Du;  // "moendkv"
constexpr uint32_t kVersion = 3;                // pages
constexpr uint32_t kSlidingVersion = 4;  // a sliding layer's: raw tokens, and neither pages nor positions

struct Header {
  uint64_t magic = kMagic;
  uint32_t version = kVersion;
  uint16_t keep_scores = 0, rotated = 0;
  int64_t n_kv_heads = 0, head_size = 0;
  double keep = 0;
  int32_t k_bits = 0, v_bits = 0;
  int64_t sinks = 0, window = 0;
  int64_t tokens_seen = 0, n_raw = 0;
};
static_assert(sizeof(Header) == 80);

// Every step is a bijection of the state, so a single changed word always shows.
uint64_t Checksum(std::string_view bytes) {
  uint64_t state = 0x9E3779B97F4A7C15u * (bytes.size() + 1);
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min(sizeof(word), bytes.size() - i));
    state = std::rotl(state ^ word, 29) * 0xBF58476D1CE4E5B9u;
  }
  return state ^ (state >> 32);
}

template <class T>
void Write(std::string& blob, const T* from, int64_t n) {
  blob.append(reinterpret_cast<const char*>(from), static_cast<std::size_t>(n) * sizeof(T));
}

class Reader {
 public:
  explicit Reader(std::string_view blob) : left_(blob) {}
  // n >= 0
  template <class T>
  bool Read(T* to, int64_t n) {
    if (!Has(n, sizeof(T))) return false;
    const auto bytes = static_cast<std::size_t>(n) * sizeof(T);
    if (bytes) std::memcpy(to, left_.data(), bytes);
    left_.remove_prefix(bytes);
    return true;
  }
  bool Has(int64_t n, int64_t size) const { return n <= static_cast<int64_t>(left_.size()) / size; }
  bool AtEnd() const { return left_.empty(); }

 private:
  std::string_view left_;
};

bool AreFinite(const void* halves, int64_t n) {
  const auto* from = static_cast<const uint8_t*>(halves);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, from + i * 2, sizeof(half));
    if ((half & 0x7C00u) == 0x7C00u) return false;
  }
  return true;
}

// Whether every number in a page is one: codes always are.
bool IsFinitePage(const PageLayout& l, const uint8_t* page) {
  const int64_t elements = l.head_size * kPageTokens, groups = l.v_groups * kPageTokens;
  const bool k = l.k_bits == 16
                     ? AreFinite(page + l.k_codes, elements)
                     : AreFinite(page + l.k_scale, l.head_size) && AreFinite(page + l.k_min, l.head_size);
  const bool v = l.v_bits == 16 ? AreFinite(page + l.v_codes, elements)
                                : AreFinite(page + l.v_scale, groups) && AreFinite(page + l.v_min, groups);
  return k && v;
}

int64_t RawBlocks(int64_t n_raw) {
  return RoundUp(n_raw, kRawBlockTokens);
}

// Half floats of the raw K and V of one head. K is written in whole blocks, whatever the cache has room for;
// lanes without a token are 0.
int64_t RawKeyHalves(const LayerCache::Impl& s) {
  return RawBlocks(s.n_raw) * s.shape.head_size;
}
int64_t RawValueHalves(const LayerCache::Impl& s) {
  return s.n_raw * s.shape.head_size;
}

void WriteRaw(std::string& blob, const LayerCache::Impl& s, int64_t h) {
  std::array<uint16_t, kRawBlockTokens> row;
  for (int64_t begin = 0; begin < s.n_raw; begin += kRawBlockTokens) {
    const int64_t stride = s.raw.Lanes(begin / kRawBlockTokens),
                  n = std::min(kRawBlockTokens, s.n_raw - begin);
    for (int64_t c = 0; c < s.shape.head_size; ++c) {
      row.fill(0);
      std::copy_n(s.raw.keys(h) + begin * s.shape.head_size + c * stride, n, row.data());
      Write(blob, row.data(), kRawBlockTokens);
    }
  }
  Write(blob, s.raw.values(h), RawValueHalves(s));
}

// Positions below tokens_seen, as many as tokens, with the sinks and the newest ones among them.
bool ArePositionsSound(const LayerCache::Impl& s, const CacheHead& head) {
  const int64_t seen = s.tokens_seen;
  int64_t count = 0, sinks = 0, newest = 0;
  bool in_range = true;
  head.positions.ForEach([&](int64_t position) {
    ++count;
    in_range = in_range && position < seen;
    sinks += position < s.guard.sinks;
    newest += position >= seen - s.guard.window;
  });
  return in_range && count == head.paged + s.n_raw && sinks == std::min(s.guard.sinks, seen) &&
         newest == std::min(s.guard.window, seen);
}

Expected<void> ReadHead(Reader& reader, LayerCache::Impl& s, CacheHead& head, const auto& corrupt) {
  int64_t n_pages = 0;
  if (!reader.Read(&n_pages, 1) || n_pages < 0 || !reader.Has(n_pages, s.layout.refs) ||
      !reader.Has(BitmapBytes(s.tokens_seen), 1))
    return corrupt("its pages are not all there");
  MOEND_TRY(head.positions.StartEmpty(s.ledger, s.tokens_seen));
  if (!reader.Read(head.positions.words(), head.positions.n_words()))
    return corrupt("its positions are cut off");
  MOEND_TRY(head.table.Fit(n_pages));
  std::vector<uint64_t> live(static_cast<std::size_t>(n_pages));
  if (!reader.Read(live.data(), n_pages)) return corrupt("its page table is cut off");
  for (const uint64_t mask : live) head.paged += std::popcount(mask);
  // The last page's room does not count: it may have come since the last eviction.
  const int64_t room = live.empty() ? 0 : std::countl_zero(live.back());
  if (n_pages * kPageTokens - head.paged - room >= kPageTokens || room >= kPageTokens)
    return corrupt("a page's worth of its slots is dead");
  if (!ArePositionsSound(s, head)) return corrupt("its positions do not match its tokens");
  if (head.paged + s.n_raw == s.tokens_seen) head.positions.HoldAll();
  std::vector<float> scores(static_cast<std::size_t>(s.keep_scores ? n_pages * kPageTokens : 0));
  if (!reader.Read(scores.data(), std::ssize(scores))) return corrupt("its scores are cut off");
  for (int64_t i = 0; i < n_pages; ++i) {
    MOEND_ASSIGN(auto page, PageRef::Create(s.ledger, s.layout));
    if (!reader.Read(page.data(), s.layout.refs)) return corrupt("its pages are cut off");
    if (!IsFinitePage(s.layout, page.data())) return corrupt("a page holds numbers that are not finite");
    head.table.Push(std::move(page), live[static_cast<std::size_t>(i)]);
  }
  std::copy(scores.begin(), scores.end(), head.table.scores());
  return {};
}

}  // namespace

Expected<std::string> SerializeCache(const LayerCache& cache) {
  const LayerCache::Impl& s = *cache.impl_;
  if (s.filling) return Fail(ErrorCode::kInvalidArgument, "a cache that is being filled cannot be saved");
  return CatchBadAlloc([&]() -> Expected<std::string> {
    std::string blob;
    blob.reserve(static_cast<std::size_t>(cache.bytes()) + sizeof(Header) + 64);
    const Header header{.version = s.sliding ? kSlidingVersion : kVersion,
                        .keep_scores = s.keep_scores,
                        .rotated = s.rotations != nullptr,
                        .n_kv_heads = s.shape.n_kv_heads,
                        .head_size = s.shape.head_size,
                        .keep = s.expert.keep,
                        .k_bits = s.expert.k_bits,
                        .v_bits = s.expert.v_bits,
                        .sinks = s.guard.sinks,
                        .window = s.guard.window,
                        .tokens_seen = s.tokens_seen,
                        .n_raw = s.n_raw};
    Write(blob, &header, 1);
    for (int64_t h = 0; h < s.shape.n_kv_heads; ++h) {
      if (s.sliding) {
        WriteRaw(blob, s, h);
        continue;
      }
      const CacheHead& head = s.head(h);
      const int64_t n_pages = head.table.size();
      Write(blob, &n_pages, 1);
      for (int64_t w = 0; w < BitmapBytes(s.tokens_seen) / 8; ++w) {
        const uint64_t word = head.positions.word(w);
        Write(blob, &word, 1);
      }
      Write(blob, head.table.live(), n_pages);
      if (s.keep_scores) Write(blob, head.table.scores(), n_pages * kPageTokens);
      for (int64_t i = 0; i < n_pages; ++i) Write(blob, head.table.pages()[i], s.layout.refs);
      WriteRaw(blob, s, h);
    }
    const uint64_t checksum = Checksum(blob);
    Write(blob, &checksum, 1);
    return blob;
  });
}

Expected<LayerCache> DeserializeCache(std::shared_ptr<Ledger> ledger, std::string_view blob,
                                      std::string_view source,
                                      std::shared_ptr<const KeyRotations> rotations) {
  const auto corrupt = [&](const char* what) {
    return Fail(ErrorCode::kCorrupt, "{} is no saved K/V cache, or is damaged: {}", source, what);
  };
  Header header;
  uint64_t checksum = 0;
  if (blob.size() < sizeof(header) + sizeof(checksum)) return corrupt("it is too short");
  std::memcpy(&header, blob.data(), sizeof(header));
  std::memcpy(&checksum, blob.data() + blob.size() - sizeof(checksum), sizeof(checksum));
  blob.remove_suffix(sizeof(checksum));
  if (header.magic != kMagic) return corrupt("it does not begin as one");
  if (header.version != kVersion && header.version != kSlidingVersion)
    return Fail(ErrorCode::kMismatch,
                "{} has version {} of the saved K/V cache; this program reads version {}", source,
                header.version, kVersion);
  const bool sliding = header.version == kSlidingVersion;
  if (Checksum(blob) != checksum) return corrupt("its checksum is wrong");

  return CatchBadAlloc([&]() -> Expected<LayerCache> {
    const KvShape shape{header.n_kv_heads, header.head_size};
    const Expert expert{header.keep, header.k_bits, header.v_bits};
    const Protected guard{header.sinks, header.window};
    if (header.keep_scores > 1 || header.rotated > 1 || !CheckCacheConfig(shape, expert, guard))
      return corrupt("its shape or expert does not exist");
    if (sliding &&
        (expert != Expert{} || guard.sinks != 0 || guard.window < 1 || header.keep_scores || header.rotated))
      return corrupt("a sliding layer is not compressed");
    if (sliding) rotations = nullptr;
    if (header.rotated != (rotations != nullptr) || (rotations && rotations->shape() != shape))
      return Fail(ErrorCode::kMismatch, "{} has keys that are{} rotated; here they are{}", source,
                  header.rotated ? "" : " not", rotations ? " for other heads" : " not");
    const int64_t seen = header.tokens_seen, n_raw = header.n_raw;
    const int64_t guarded = guard.sinks + guard.window;
    if (seen < 0 || seen > int64_t{1} << 31 || n_raw < std::min(seen, guarded) ||
        n_raw > std::min(seen, guarded + kPageTokens - 1))
      return corrupt("its token counts contradict each other");

    Reader reader(blob.substr(sizeof(Header)));
    // Each head has at least its page count, its bitmap and its raw tokens.
    const int64_t head_bytes =
        (sliding ? 0 : 8 + BitmapBytes(seen)) + (RawBlocks(n_raw) + n_raw) * shape.head_size * 2;
    if (!reader.Has(shape.n_kv_heads, head_bytes)) return corrupt("it is too short for its tokens");
    LayerCache cache;
    MOEND_ASSIGN(cache.impl_, LayerCache::Impl::Create(std::move(ledger), shape, expert, guard,
                                                       header.keep_scores != 0, std::move(rotations)));
    LayerCache::Impl& s = *cache.impl_;
    s.sliding = sliding;
    s.tokens_seen = seen;
    s.n_raw = n_raw;
    MOEND_TRY(s.raw.Resize(s.ledger, RawBlocks(n_raw)));
    for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
      if (!sliding) MOEND_TRY(ReadHead(reader, s, s.head(h), corrupt));
      if (!reader.Read(s.raw.keys(h), RawKeyHalves(s)) || !reader.Read(s.raw.values(h), RawValueHalves(s)))
        return corrupt("its raw tokens are cut off");
      if (!AreFinite(s.raw.keys(h), RawKeyHalves(s)) || !AreFinite(s.raw.values(h), RawValueHalves(s)))
        return corrupt("a raw token holds numbers that are not finite");
    }
    if (!reader.AtEnd()) return corrupt("it has bytes behind its end");
    s.SettleRaw();
    return cache;
  });
}

}  // namespace moend
