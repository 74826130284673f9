// Saved prefixes in a Valkey or Redis that several servers share, through hiredis.
#include <hiredis/hiredis.h>
#include <pthread.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <vector>

#include "moend/serve/kv_store.h"

namespace moend::serve {
namespace {

constexpr timeval kConnectTimeout = {1, 0};
constexpr timeval kCommandTimeout = {5, 0};
constexpr auto kRetryAfter = std::chrono::seconds(5);  // a dead server is not asked for every prompt
constexpr std::string_view kKeyPrefix = "moend:kv:";

struct Address {
  std::string host = "127.0.0.1", user = {}, password = {}, socket = {};
  int port = 6379, database = 0;
};

// hiredis writes with write(2): a server that went away would raise SIGPIPE, which ends a process that has
// not thought of it. Held back while this exists, on this thread only.
class NoSigPipe {
 public:
  NoSigPipe() {
    sigset_t pending;
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~NoSigPipe() {
    const timespec now{};
    if (!was_pending_)
      while (sigtimedwait(&pipe_, nullptr, &now) > 0) {
      }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  NoSigPipe(const NoSigPipe&) = delete;
  NoSigPipe& operator=(const NoSigPipe&) = delete;

 private:
  sigset_t pipe_, before_;
  bool was_pending_ = false;
};

struct ReplyDeleter {
  void operator()(redisReply* r) const { freeReplyObject(r); }
};
struct ContextDeleter {
  void operator()(redisContext* c) const { redisFree(c); }
};
using Reply = std::unique_ptr<redisReply, ReplyDeleter>;

// %41 to A.
std::optional<std::string> Unescape(std::string_view in) {
  std::string out;
  for (std::size_t i = 0; i < in.size(); ++i) {
    if (in[i] != '%') {
      out.push_back(in[i]);
      continue;
    }
    unsigned value = 0;
    if (i + 2 >= in.size()) return std::nullopt;
    const auto [end, error] = std::from_chars(in.data() + i + 1, in.data() + i + 3, value, 16);
    if (error != std::errc() || end != in.data() + i + 3) return std::nullopt;
    out.push_back(static_cast<char>(value));
    i += 2;
  }
  return out;
}

bool Number(std::string_view text, int low, int high, int& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= low && value <= high;
}

std::optional<Address> ParseUrl(std::string_view url) {
  Address a;
  if (url.starts_with("unix://")) {
    a.socket = url.substr(7);
    if (!a.socket.starts_with('/')) return std::nullopt;
    return a;
  }
  if (!url.starts_with("redis://") && !url.starts_with("valkey://")) return std::nullopt;
  url.remove_prefix(url.find("//") + 2);
  if (const auto slash = url.find('/'); slash != std::string_view::npos) {
    const std::string_view database = url.substr(slash + 1);
    if (!database.empty() && !Number(database, 0, 1'000'000, a.database)) return std::nullopt;
    url = url.substr(0, slash);
  }
  if (const auto at = url.rfind('@'); at != std::string_view::npos) {
    const std::string_view login = url.substr(0, at);
    const auto colon = login.find(':');
    const auto user = Unescape(login.substr(0, colon));
    const auto password = Unescape(colon == std::string_view::npos ? "" : login.substr(colon + 1));
    if (!user || !password || colon == std::string_view::npos) return std::nullopt;
    a.user = *user;
    a.password = *password;
    url.remove_prefix(at + 1);
  }
  if (url.starts_with('[')) {  // IPv6
    const auto end = url.find(']');
    if (end == std::string_view::npos) return std::nullopt;
    a.host = url.substr(1, end - 1);
    url.remove_prefix(end + 1);
    if (!url.empty() && !url.starts_with(':')) return std::nullopt;
  } else {
    a.host = url.substr(0, url.find(':'));
    url.remove_prefix(a.host.size());
  }
  if (!url.empty() && !Number(url.substr(1), 1, 65535, a.port)) return std::nullopt;
  if (a.host.empty()) return std::nullopt;
  return a;
}

class RedisStore : public KvStore {
 public:
  RedisStore(Address address, int64_t ttl_seconds) : address_(std::move(address)), ttl_(ttl_seconds) {}

  std::string description() const override {
    return address_.socket.empty()
               ? fmt::format("redis://{}:{}/{}", address_.host, address_.port, address_.database)
               : "unix://" + address_.socket;
  }

  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) override {
    const NoSigPipe guard;
    MOEND_TRY(Connect());
    for (const std::string& name : names) {
      const std::string key = Key(name);
      if (redisAppendCommand(context_.get(), "EXISTS %b", key.data(), key.size()) != REDIS_OK)
        return Broken();
    }
    std::optional<int64_t> first;
    for (std::size_t i = 0; i < names.size(); ++i) {  // all replies have to be taken
      void* raw = nullptr;
      if (redisGetReply(context_.get(), &raw) != REDIS_OK) return Broken();
      const Reply reply(static_cast<redisReply*>(raw));
      MOEND_TRY(Check(*reply));
      if (!first && reply->type == REDIS_REPLY_INTEGER && reply->integer > 0) first = static_cast<int64_t>(i);
    }
    return first;
  }

  Expected<std::string> Get(const std::string& name) override {
    const std::string key = Key(name), ttl = std::to_string(ttl_);
    MOEND_ASSIGN(const Reply reply, Command({"GET", key}));
    if (reply->type == REDIS_REPLY_NIL) return Fail(ErrorCode::kNotFound, "{} is not there any more", name);
    if (reply->type != REDIS_REPLY_STRING) return Fail(ErrorCode::kCorrupt, "{} is no string", name);
    if (ttl_ > 0) {
      MOEND_ASSIGN([[maybe_unused]] const Reply kept, Command({"EXPIRE", key, ttl}));
    }
    return std::string(reply->str, reply->len);
  }

  Expected<void> Put(const std::string& name, std::string_view bytes) override {
    const std::string key = Key(name), ttl = std::to_string(ttl_);
    std::vector<std::string_view> command = {"SET", key, bytes};
    if (ttl_ > 0) command.insert(command.end(), {"EX", ttl});
    MOEND_ASSIGN([[maybe_unused]] const Reply reply, Command(command));
    return {};
  }

  Expected<void> Remove(const std::string& name) override {
    const std::string key = Key(name);
    MOEND_ASSIGN([[maybe_unused]] const Reply reply, Command({"DEL", key}));
    return {};
  }

 private:
  using Clock = std::chrono::steady_clock;

  static std::string Key(const std::string& name) { return std::string(kKeyPrefix) + name; }

  std::unexpected<Error> Broken() {
    std::string why = context_ && context_->err ? context_->errstr : "the connection broke";
    context_.reset();
    retry_at_ = Clock::now() + kRetryAfter;
    return Fail(ErrorCode::kIo, "{}", why);
  }

  static Expected<void> Check(const redisReply& reply) {
    if (reply.type != REDIS_REPLY_ERROR) return {};
    return Fail(ErrorCode::kIo, "{}", std::string(reply.str, reply.len));
  }

  Expected<void> Connect() {
    if (context_) return {};
    if (Clock::now() < retry_at_)
      return Fail(ErrorCode::kIo, "it failed a moment ago and is not asked again yet");
    context_.reset(address_.socket.empty()
                       ? redisConnectWithTimeout(address_.host.c_str(), address_.port, kConnectTimeout)
                       : redisConnectUnixWithTimeout(address_.socket.c_str(), kConnectTimeout));
    if (!context_ || context_->err) return Broken();
    redisSetTimeout(context_.get(), kCommandTimeout);
    if (!address_.password.empty()) {
      std::vector<std::string_view> login = {"AUTH", address_.password};
      if (!address_.user.empty()) login = {"AUTH", address_.user, address_.password};
      if (auto ok = Command(login); !ok) return LoginFailed(ok.error());
    }
    if (address_.database > 0)
      if (auto ok = Command({"SELECT", std::to_string(address_.database)}); !ok)
        return LoginFailed(ok.error());
    return {};
  }

  std::unexpected<Error> LoginFailed(const Error& error) {
    context_.reset();
    retry_at_ = Clock::now() + kRetryAfter;
    return std::unexpected(error);
  }

  Expected<Reply> Command(const std::vector<std::string_view>& words) {
    const NoSigPipe guard;
    if (!context_) MOEND_TRY(Connect());
    std::vector<const char*> data;
    std::vector<std::size_t> sizes;
    for (const std::string_view w : words) {
      data.push_back(w.data());
      sizes.push_back(w.size());
    }
    Reply reply(static_cast<redisReply*>(
        redisCommandArgv(context_.get(), static_cast<int>(words.size()), data.data(), sizes.data())));
    if (!reply) return Broken();
    MOEND_TRY(Check(*reply));
    return reply;
  }

  Address address_;
  int64_t ttl_;
  std::unique_ptr<redisContext, ContextDeleter> context_;
  Clock::time_point retry_at_{};
};

}  // namespace

Expected<std::unique_ptr<KvStore>> OpenRedisStore(const std::string& url, int64_t ttl_seconds) {
  auto address = ParseUrl(url);
  // The URL is not repeated: it may hold a password.
  if (!address)
    return Fail(
        ErrorCode::kInvalidArgument,
        "the address of the K/V store is not understood; redis://[user:password@]host[:port][/database] or "
        "unix:///path is wanted");
  return std::make_unique<RedisStore>(std::move(*address), ttl_seconds);
}

}  // namespace moend::serve
