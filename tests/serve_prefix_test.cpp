// Kept prefixes: the radix tree, the fair queue, the cuts, saved files and the stores behind them.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>

#include "moend/serve/fair_queue.h"
#include "moend/serve/kv_store.h"
#include "moend/serve/prefix_cache.h"
#include "moend/serve/prefix_split.h"
#include "moend/serve/prefix_store.h"
#include "moend/serve/respell.h"
#include "moend/serve/sha256.h"
#include "tests/support/process.h"
#include "tests/support/serve_client.h"

namespace moend::serve {
namespace {

namespace fs = std::filesystem;
using moend::test::TemporaryFolder;
using test::Eventually;

struct BareContext : Context {
  explicit BareContext(std::vector<int32_t> t) : ids(std::move(t)) {}
  std::vector<int32_t> ids;
  const std::vector<int32_t>& tokens() const override { return ids; }
  std::span<const float> logits() const override { return {}; }
  KvStats stats() const override { return {}; }
  int64_t bytes() const override { return std::ssize(ids); }
};

std::unique_ptr<Context> Bare(std::vector<int32_t> t) {
  return std::make_unique<BareContext>(std::move(t));
}

TEST(PrefixCache, FindsTheLongestPrefixAsASearchThroughAllWould) {
  std::mt19937 random(1);
  PrefixCache cache;
  std::vector<std::pair<std::string, std::vector<int32_t>>> kept;
  const auto some_tokens = [&](std::size_t most) {
    std::vector<int32_t> t(1 + random() % most);
    for (auto& x : t) x = static_cast<int32_t>(random() % 2);  // much in common
    return t;
  };
  for (int step = 0; step < 3000; ++step) {
    const std::string scope = random() % 2 ? "a" : "b";
    const auto tokens = some_tokens(12);
    switch (random() % 3) {
      case 0:
        cache.Insert(scope, Bare(tokens), 0);
        if (std::ranges::find(kept, std::pair(scope, tokens)) == kept.end()) kept.emplace_back(scope, tokens);
        break;
      case 1:
        if (!kept.empty()) {
          const auto i = random() % kept.size();
          const auto& [s, t] = kept[i];
          const auto found = cache.Find(s, t, std::ssize(t));
          ASSERT_TRUE(found && found->context->tokens() == t);
          cache.Erase(found);
          kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(i));
        }
        break;
      default: {
        const int64_t most = static_cast<int64_t>(random() % 14);
        int64_t best = 0;
        for (const auto& [s, t] : kept)
          if (s == scope && t.size() <= tokens.size() && std::ssize(t) <= most &&
              std::equal(t.begin(), t.end(), tokens.begin()))
            best = std::max(best, std::ssize(t));
        const auto found = cache.Find(scope, tokens, most);
        ASSERT_EQ(found ? found->length() : 0, best);
        if (found) {
          ASSERT_EQ(found->scope, scope);
        }
      }
    }
    ASSERT_EQ(cache.size(), std::ssize(kept));
  }
}

TEST(PrefixCache, NeverCrossesScopes) {
  PrefixCache cache;
  cache.Insert("alice", Bare({1, 2, 3}), 0);
  const std::vector<int32_t> tokens = {1, 2, 3, 4};
  EXPECT_TRUE(cache.Find("alice", tokens, 4));
  EXPECT_FALSE(cache.Find("bob", tokens, 4));
}

TEST(PrefixCache, OldestPrefersUnforkedOnesAndKeepsTheBetterCopy) {
  PrefixCache cache;
  cache.Insert("s", Bare({1}), 0);
  cache.Insert("s", Bare({2}), 0);
  const auto any = [](const Prefix&) { return true; };
  EXPECT_EQ(cache.Oldest(any)->context->tokens()[0], 1);
  {
    const auto fork = cache.Find("s", std::vector<int32_t>{2}, 1);
    EXPECT_EQ(cache.Oldest(any)->context->tokens()[0], 1);
    const auto other = cache.Find("s", std::vector<int32_t>{1}, 1);
    EXPECT_EQ(cache.Oldest(any)->context->tokens()[0], 2);  // both forked: the older use
  }
  const auto fork = cache.Find("s", std::vector<int32_t>{2}, 1);
  EXPECT_EQ(cache.Oldest(any)->context->tokens()[0], 1);
  const auto first = cache.Oldest([](const Prefix& p) { return p.level > 0; });
  EXPECT_FALSE(first);
  fork->level = 2;
  cache.Insert("s", Bare({2}), 1);
  EXPECT_EQ(fork->level, 1);
  cache.Insert("s", Bare({2}), 3);
  EXPECT_EQ(fork->level, 1);
  EXPECT_EQ(cache.size(), 2);
}

// Letters, pairs of them, and a control token without text.
struct Letters : test::FakeBackend {
  static constexpr int32_t kAb = 200, kBc = 201, kAbc = 202, kControl = 203;
  std::string Piece(int32_t token) const override {
    switch (token) {
      case kAb:
        return "ab";
      case kBc:
        return "bc";
      case kAbc:
        return "abc";
      case kControl:
        return "";
      default:
        return FakeBackend::Piece(token);
    }
  }
};

TEST(Respell, PutsKeptTokensInThePlaceOfTheirText) {
  const Letters backend;
  using Tokens = std::vector<int32_t>;
  constexpr auto kAb = Letters::kAb, kBc = Letters::kBc, kAbc = Letters::kAbc, kEnd = Letters::kControl;
  const auto respell = [&](const Tokens& prompt, const Tokens& kept, const Tokens& tail = {},
                           int64_t least = 0) {
    const auto r = Respell(prompt, kept, tail, least, backend);
    return r ? std::optional(std::pair(r->tokens, r->replaced)) : std::nullopt;
  };
  using R = std::pair<Tokens, int64_t>;
  EXPECT_EQ(respell({'x', 'a', 'b', 'c', kEnd, 'y'}, {'x', kAb, 'c'}), (R{{'x', kAb, 'c', kEnd, 'y'}, 4}));
  EXPECT_EQ(respell({'x', kAbc, kEnd, 'y'}, {'x', kAb, 'c', kEnd}), (R{{'x', kAb, 'c', kEnd, 'y'}, 3}));
  EXPECT_EQ(respell({kAb, 'c', 'y'}, {'a', kBc}), (R{{'a', kBc, 'y'}, 2}));
  // The last token was picked but never read.
  EXPECT_EQ(respell({'a', 'b', 'c', 'y'}, {'a'}, {kBc}), (R{{'a', kBc, 'y'}, 3}));
  // The kept ones end within a token: its rest is tokenized anew.
  EXPECT_EQ(respell({'a', 'b', kAbc, 'y'}, {kAb, 'a'}), (R{{kAb, 'a', 'b', 'c', 'y'}, 3}));
  // The prompt's own tokens, another text, another control token, too little, nothing left to read.
  EXPECT_FALSE(respell({'a', 'b', 'c'}, {'a', 'b'}));
  EXPECT_FALSE(respell({'a', 'b', 'x'}, {kAb, 'c'}));
  EXPECT_FALSE(respell({'a', 'b', 'c', 'y'}, {kAb, kEnd}));
  EXPECT_FALSE(respell({'a', 'b', kEnd, 'c', 'y'}, {kAb, 'c'}));
  EXPECT_FALSE(respell({'a', 'b', 'c'}, {kAb}, {}, 2));
  EXPECT_FALSE(respell({'a', 'b'}, {kAb}));
  EXPECT_FALSE(respell({'a'}, {kAb}));
  EXPECT_FALSE(respell({'x', 'a', 'b', 'y'}, {kAb}));
}

TEST(FairQueue, TakesTurnsAndHoldsItsBounds) {
  FairQueue<int> q(6, 4);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(q.Push("a", i));
  EXPECT_FALSE(q.Push("a", 9));  // its share is full
  EXPECT_TRUE(q.Push("b", 10));
  EXPECT_TRUE(q.Push("c", 20));
  EXPECT_FALSE(q.Push("c", 21));  // all is full
  std::vector<int> order;
  while (!q.empty()) order.push_back(q.Pop());
  EXPECT_EQ(order, (std::vector<int>{0, 10, 20, 1, 2, 3}));
  for (int i = 0; i < 4; ++i) q.Push("a", i);
  q.Push("b", 10);
  q.RemoveIf([](int i) { return i == 0 || i == 10 || i == 2; });
  EXPECT_EQ(q.size(), 2);
  EXPECT_EQ(q.Pop(), 1);
  EXPECT_EQ(q.Pop(), 3);
  EXPECT_TRUE(q.empty());
}

TEST(PrefixSplit, DependsOnThePromptAlone) {
  EXPECT_EQ(SplitLength(200, 0, 256), 0);
  EXPECT_EQ(SplitLength(16020, 0, 256), 15872);
  EXPECT_EQ(SplitLength(16035, 0, 256), 15872);  // another short question after the same text
  EXPECT_EQ(SplitLength(1000, 900, 256), 900);   // a chat: before the last message
  EXPECT_EQ(SplitLength(1000, 100, 256), 768);   // a long message after a short system prompt
  EXPECT_EQ(SplitLength(300, 100, 256), 0);
  for (int64_t n = 1; n < 3000; ++n) {
    const int64_t cut = SplitLength(n, 0, 256);
    EXPECT_LT(cut, n);
    EXPECT_TRUE(cut == 0 || (cut >= 256 && n - cut >= kPrefixGrid)) << n;
  }
  EXPECT_EQ(GridLengths(129, 512), (std::vector<int64_t>{256, 384, 512}));
  EXPECT_TRUE(GridLengths(600, 512).empty());
}

SavedPrefix Sample() {
  return {"cache 1", "scope", {5, 6, 7, -1}, std::string("pay\0load", 8)};
}

TEST(SavedPrefix, ComesBackWhole) {
  const auto back = Decode(Encode(Sample()));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->cache_id, "cache 1");
  EXPECT_EQ(back->scope, "scope");
  EXPECT_EQ(back->tokens, Sample().tokens);
  EXPECT_EQ(back->payload, Sample().payload);
}

TEST(SavedPrefix, EveryFlippedBitAndEveryCutIsNoticed) {
  const std::string good = Encode(Sample());
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      EXPECT_FALSE(Decode(bad)) << i;
    }
    EXPECT_FALSE(Decode(good.substr(0, i))) << i;
  }
  EXPECT_FALSE(Decode(good + "x"));
}

TEST(SavedPrefix, SizesThatDoNotAddUpAreRefusedEvenWithAGoodChecksum) {
  const std::string good = Encode(Sample());
  std::mt19937_64 random(7);
  for (int i = 0; i < 20000; ++i) {
    std::string bad = good.substr(0, good.size() - 32);
    const std::size_t at = 16 + random() % (bad.size() - 16);
    const uint64_t value = random() % 3 ? random() >> (random() % 64) : UINT64_MAX;
    std::memcpy(bad.data() + at, &value, std::min<std::size_t>(8, bad.size() - at));
    const auto sum = Sha256Of(bad);
    bad.append(reinterpret_cast<const char*>(sum.data()), 32);
    const auto r = Decode(bad);  // must not crash, nor read out of bounds
    if (r) {
      EXPECT_LE(r->tokens.size(), bad.size());
    }
  }
}

TEST(PrefixNames, AreStableAndTellPrefixesApart) {
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> lengths = {2, 4};
  const auto names = PrefixNames("c", "s", tokens, lengths);
  ASSERT_EQ(names.size(), 2u);
  const int64_t four = 4;
  EXPECT_EQ(PrefixNames("c", "s", std::vector<int32_t>{1, 2, 3, 4}, {&four, 1})[0], names[1]);
  EXPECT_NE(PrefixNames("c", "s", std::vector<int32_t>{1, 2, 3, 5}, {&four, 1})[0], names[1]);
  EXPECT_NE(PrefixNames("d", "s", tokens, lengths)[1], names[1]);
  EXPECT_NE(PrefixNames("c", "t", tokens, lengths)[1], names[1]);
}

TEST(DiskStore, KeepsBytes) {
  const TemporaryFolder folder;
  const auto store = OpenDiskStore(folder.path() / "a" / "b", 1 << 20).value();
  const std::vector<std::string> names = {"x/1-a", "x/2-b"};
  EXPECT_EQ(store->FirstPresent(names).value(), std::nullopt);
  EXPECT_EQ(store->Get("x/2-b").error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(store->Put("x/2-b", "bytes"));
  EXPECT_EQ(store->FirstPresent(names).value(), 1);
  EXPECT_EQ(store->Get("x/2-b").value(), "bytes");
  ASSERT_TRUE(store->Put("x/2-b", "other"));
  EXPECT_EQ(store->Get("x/2-b").value(), "other");
  ASSERT_TRUE(store->Remove("x/2-b"));
  EXPECT_EQ(store->FirstPresent(names).value(), std::nullopt);
}

TEST(DiskStore, RefusesNamesAndLinksThatLeadOutside) {
  const TemporaryFolder folder;
  const auto store = OpenDiskStore(folder.path() / "store", 1 << 20).value();
  std::ofstream(folder.path() / "secret.kv") << "secret";
  for (const char* name : {"../secret", "/etc/passwd", "a/../../secret", "", "a//b"}) {
    EXPECT_FALSE(store->Get(name)) << name;
    EXPECT_FALSE(store->Put(name, "x")) << name;
  }
  EXPECT_FALSE(store->Get(std::string("a\0b", 3)));
  fs::create_symlink(folder.path() / "secret.kv", folder.path() / "store" / "link.kv");
  EXPECT_FALSE(store->Get("link"));
  ASSERT_EQ(mkfifo((folder.path() / "store" / "pipe.kv").c_str(), 0600), 0);
  EXPECT_FALSE(store->Get("pipe"));  // does not wait for a writer
}

TEST(DiskStore, DropsTheOldestAndWhatDeadWritersLeft) {
  const TemporaryFolder folder;
  const auto store = OpenDiskStore(folder.path(), 1000).value();
  const std::string bytes(400, 'x');
  ASSERT_TRUE(store->Put("a", bytes));
  ASSERT_TRUE(store->Put("b", bytes));
  const auto long_ago = fs::file_time_type::clock::now() - std::chrono::hours(1);
  fs::last_write_time(folder.path() / "a.kv", long_ago);
  std::ofstream(folder.path() / "dead.XX.tmp") << "half";
  std::ofstream(folder.path() / "busy.XX.tmp") << "half";
  fs::last_write_time(folder.path() / "dead.XX.tmp", long_ago);
  ASSERT_TRUE(store->Put("c", bytes));
  EXPECT_FALSE(fs::exists(folder.path() / "a.kv"));
  EXPECT_TRUE(fs::exists(folder.path() / "b.kv"));
  EXPECT_FALSE(fs::exists(folder.path() / "dead.XX.tmp"));
  EXPECT_TRUE(fs::exists(folder.path() / "busy.XX.tmp"));
  EXPECT_EQ(store->Put("d", std::string(1001, 'x')).error().code, ErrorCode::kBudget);
}

// A writer that is killed at any moment leaves the old content or the new one.
TEST(DiskStore, SurvivesKillNine) {
  const TemporaryFolder folder;
  SavedPrefix a = Sample(), b = Sample();
  a.payload.assign(300000, 'a');
  b.payload.assign(200000, 'b');
  const std::string first = Encode(a), second = Encode(b);
  const auto store = OpenDiskStore(folder.path(), 1 << 30).value();
  ASSERT_TRUE(store->Put("p", first));
  std::mt19937 random(3);
  int old_or_new[2] = {0, 0};
  // On a busy machine a writer may not get far within some milliseconds: then more, and later, kills.
  for (unsigned i = 0; i < 60 || (i < 600 && old_or_new[0] * old_or_new[1] == 0); ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (;;) {
        if (!store->Put("p", second) || !store->Put("p", first)) _exit(1);
      }
    }
    usleep(static_cast<useconds_t>(random() % (8000 + 500 * i)));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    const auto bytes = store->Get("p");
    ASSERT_TRUE(bytes);
    ASSERT_TRUE(*bytes == first || *bytes == second);
    ++old_or_new[*bytes == second];
  }
  EXPECT_GT(old_or_new[0] * old_or_new[1], 0) << "the kills always hit the same moment";
}

// --- PrefixStore over a store that can misbehave
// --------------------------------------------------------------

struct MapStore : KvStore {
  std::map<std::string, std::string>* values;
  std::atomic<bool>* fail;
  MapStore(std::map<std::string, std::string>* v, std::atomic<bool>* f) : values(v), fail(f) {}
  std::string description() const override { return "map"; }
  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) override {
    if (*fail) return Fail(ErrorCode::kIo, "down");
    for (std::size_t i = 0; i < names.size(); ++i)
      if (values->contains(names[i])) return static_cast<int64_t>(i);
    return std::nullopt;
  }
  Expected<std::string> Get(const std::string& name) override {
    if (*fail) return Fail(ErrorCode::kIo, "down");
    return values->at(name);
  }
  Expected<void> Put(const std::string& name, std::string_view bytes) override {
    if (*fail) return Fail(ErrorCode::kIo, "down");
    (*values)[name] = bytes;
    return {};
  }
  Expected<void> Remove(const std::string& name) override {
    values->erase(name);
    return {};
  }
};

class PrefixStoreTest : public ::testing::Test {
 protected:
  PrefixStoreTest() {
    std::vector<std::unique_ptr<KvStore>> stores;
    stores.push_back(std::make_unique<MapStore>(&values, &fail));
    store = std::make_unique<PrefixStore>(std::move(stores), Log([this](LogLevel, const std::string& m) {
                                            const std::lock_guard lock(mutex);
                                            warnings.push_back(m);
                                          }));
  }
  std::optional<SavedPrefix> Load(const std::string& cache, const std::string& scope,
                                  std::vector<int32_t> tokens, std::vector<int64_t> lengths) {
    std::optional<SavedPrefix> found;
    store->Load(cache, scope, std::move(tokens), std::move(lengths),
                [&](std::optional<SavedPrefix> p) { found = std::move(p); });
    store->Flush();
    return found;
  }
  std::map<std::string, std::string> values;
  std::atomic<bool> fail{false};
  std::mutex mutex;
  std::vector<std::string> warnings;
  std::unique_ptr<PrefixStore> store;
};

TEST_F(PrefixStoreTest, LoadsTheLongest) {
  store->Save({"c", "s", {1, 2}, "two"});
  store->Save({"c", "s", {1, 2, 3, 4}, "four"});
  store->Flush();
  EXPECT_EQ(Load("c", "s", {1, 2, 3, 4, 5}, {2, 3, 4})->payload, "four");
  EXPECT_EQ(Load("c", "s", {1, 2, 3, 9, 5}, {2, 3, 4})->payload, "two");
  EXPECT_FALSE(Load("c", "s", {1, 9, 3, 9, 5}, {2, 3, 4}));
  EXPECT_FALSE(Load("c", "other", {1, 2, 3, 4, 5}, {2, 3, 4}));
  EXPECT_FALSE(Load("other", "s", {1, 2, 3, 4, 5}, {2, 3, 4}));
  EXPECT_TRUE(warnings.empty());
}

TEST_F(PrefixStoreTest, IgnoresCorruptOnesAndFallsBackToAShorterOne) {
  store->Save({"c", "s", {1, 2}, "two"});
  store->Save({"c", "s", {1, 2, 3, 4}, "four"});
  store->Flush();
  for (auto& [name, bytes] : values)
    if (name.find("/4-") != std::string::npos) bytes[bytes.size() / 2] ^= 1;
  EXPECT_EQ(Load("c", "s", {1, 2, 3, 4, 5}, {2, 3, 4})->payload, "two");
  EXPECT_EQ(warnings.size(), 1u);
  EXPECT_EQ(values.size(), 1u);  // removed, so that it is written anew
}

TEST_F(PrefixStoreTest, ComparesTokensAndScopeNotOnlyNames) {
  store->Save({"c", "s", {1, 2}, "two"});
  store->Flush();
  // Pretend that the hash of something else is the same.
  const auto put = [&](const SavedPrefix& p) { values.begin()->second = Encode(p); };
  put({"c", "s", {1, 3}, "evil"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  put({"c", "mallory", {1, 2}, "evil"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  put({"d", "s", {1, 2}, "evil"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  put({"c", "s", {1, 2, 3}, "evil"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  put({"c", "s", {}, "evil"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  EXPECT_EQ(warnings.size(), 5u);
}

TEST_F(PrefixStoreTest, AFailingStoreIsAWarning) {
  fail = true;
  store->Save({"c", "s", {1, 2}, "two"});
  EXPECT_FALSE(Load("c", "s", {1, 2, 3}, {2}));
  EXPECT_EQ(warnings.size(), 2u);
}

}  // namespace
}  // namespace moend::serve
