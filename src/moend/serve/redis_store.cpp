// Saved prefixes in a Valkey or Redis that several servers share, through hiredis.
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <mutex>
#include <vector>

#include "moend/serve/kv_store.h"

namespace moend::serve {
namespace {

constexpr auto kSilence = std::chrono::milliseconds(200);  // without a byte: the server counts as dead
constexpr auto kPatience = std::chrono::seconds(5);        // for a whole answer
// Most bytes of an answer: Redis itself takes no longer strings by default.
constexpr int64_t kMostBytes = int64_t{512} << 20;
constexpr int64_t kShortBytes = 64 << 10;              // of an answer that is a number or a word
constexpr auto kRetryAfter = std::chrono::seconds(5);  // a dead server is not asked for every prompt
constexpr std::string_view kKeyPrefix = "moend:kv:";

struct Address {
  std::string host = "127.0.0.1", user = {}, password = {}, socket = {};
  int port = 6379, database = 0;
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

// What an error of the server says, as a line that can be shown: it may be empty, long, or of any bytes.
std::string ErrorText(const redisReply& reply) {
  constexpr std::size_t kLongest = 200;
  std::string text(reply.str, std::min(reply.len, kLongest));
  std::ranges::replace_if(
      text, [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
  return text.empty() ? "it refuses, and does not say why" : text;
}

// hiredis reserves memory for as many elements as a list announces. None of our questions has a list for an
// answer.
template <class Size>
void* NoList(const redisReadTask*, Size) {
  return nullptr;
}

// One connection. hiredis connects, and parses what comes; reading and writing are ours, for their bounds.
class Link {
 public:
  explicit Link(const Address& address) : address_(address) {}

  // Sends the commands together and takes all their answers. An answer that is an error is one of the
  // answers.
  Expected<std::vector<Reply>> Ask(std::span<const std::vector<std::string_view>> commands,
                                   int64_t most_bytes) {
    const std::lock_guard lock(mutex_);
    if (!context_) MOEND_TRY(Connect());
    return Exchange(commands, most_bytes);
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::unexpected<Error> Broken(std::string why) {
    context_.reset();
    retry_at_ = Clock::now() + kRetryAfter;
    return Fail(ErrorCode::kIo, "{}", why);
  }

  Expected<void> Connect() {
    if (Clock::now() < retry_at_)
      return Fail(ErrorCode::kIo, "it failed a moment ago and is not asked again yet");
    constexpr timeval kTime = {0, std::chrono::microseconds(kSilence).count()};
    context_.reset(address_.socket.empty()
                       ? redisConnectWithTimeout(address_.host.c_str(), address_.port, kTime)
                       : redisConnectUnixWithTimeout(address_.socket.c_str(), kTime));
    if (!context_) return Broken("no memory for a connection");
    if (context_->err) return Broken(context_->errstr);
    if (fcntl(context_->fd, F_SETFL, fcntl(context_->fd, F_GETFL) | O_NONBLOCK) != 0)
      return Broken(std::strerror(errno));
    functions_ = *context_->reader->fn;
    functions_.createArray = NoList;
    context_->reader->fn = &functions_;
    std::vector<std::vector<std::string_view>> login;
    const std::string database = std::to_string(address_.database);
    if (!address_.password.empty()) {
      login.push_back({"AUTH", address_.password});
      if (!address_.user.empty()) login[0].insert(login[0].begin() + 1, address_.user);
    }
    if (address_.database > 0) login.push_back({"SELECT", database});
    MOEND_ASSIGN(const auto replies, Exchange(login, kShortBytes));
    for (const Reply& reply : replies)
      if (reply->type == REDIS_REPLY_ERROR) return Broken(ErrorText(*reply));
    return {};
  }

  Expected<std::vector<Reply>> Exchange(std::span<const std::vector<std::string_view>> commands,
                                        int64_t most_bytes) {
    const auto deadline = Clock::now() + kPatience;
    constexpr std::size_t kLarge = 64 << 10;  // goes out from where it is; all else together
    std::string out;
    for (const auto& words : commands) {
      out += fmt::format("*{}\r\n", words.size());
      for (const std::string_view w : words) {
        out += fmt::format("${}\r\n", w.size());
        if (w.size() < kLarge) {
          out += w;
        } else {
          MOEND_TRY(Send(out, deadline));
          MOEND_TRY(Send(w, deadline));
          out.clear();
        }
        out += "\r\n";
      }
    }
    MOEND_TRY(Send(out, deadline));
    std::vector<Reply> replies;
    while (replies.size() < commands.size()) {  // every one is taken, whatever the others say
      MOEND_ASSIGN(Reply reply, Receive(most_bytes, deadline));
      replies.push_back(std::move(reply));
    }
    return replies;
  }

  // Waits until the socket is ready, or the server has been silent for too long.
  Expected<void> Wait(short what, Clock::time_point deadline) {
    const auto left = std::min<Clock::duration>(kSilence, deadline - Clock::now());
    pollfd p{context_->fd, what, 0};
    int ready = 0;
    do {
      ready = poll(
          &p, 1,
          std::max(0, static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(left).count())));
    } while (ready < 0 && errno == EINTR);
    if (ready > 0) return {};
    return Broken(ready < 0 ? std::string(std::strerror(errno)) : "it does not answer in time");
  }

  Expected<void> Send(std::string_view bytes, Clock::time_point deadline) {
    while (!bytes.empty()) {
      const ssize_t n = send(context_->fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n >= 0) {
        bytes.remove_prefix(static_cast<std::size_t>(n));
        if (Clock::now() > deadline) return Broken("it does not take a value in time");
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        MOEND_TRY(Wait(POLLOUT, deadline));
      } else if (errno != EINTR) {
        return Broken(std::strerror(errno));
      }
    }
    return {};
  }

  Expected<Reply> Receive(int64_t most_bytes, Clock::time_point deadline) {
    redisReader* reader = context_->reader;
    for (;;) {
      void* raw = nullptr;
      if (redisReaderGetReply(reader, &raw) != REDIS_OK)
        return Broken(fmt::format("it sent what is no answer ({})", reader->errstr));
      if (raw) return Reply(static_cast<redisReply*>(raw));
      const std::string_view unread(reader->buf + reader->pos, reader->len - reader->pos);
      if (std::max(std::ssize(unread), Announced(unread)) > most_bytes)
        return Broken(fmt::format("it announced or sent more than {} bytes", most_bytes));
      char bytes[65536];
      const ssize_t n = recv(context_->fd, bytes, sizeof bytes, 0);
      if (n == 0) return Broken("it closed the connection");
      if (n > 0) {
        if (redisReaderFeed(reader, bytes, static_cast<std::size_t>(n)) != REDIS_OK)
          return Broken("no memory for its answer");
        if (Clock::now() > deadline) return Broken("it does not answer in time");
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        MOEND_TRY(Wait(POLLIN, deadline));
      } else if (errno != EINTR) {
        return Broken(std::strerror(errno));
      }
    }
  }

  // The length of a string that is on its way: "$123\r\n", of which the reader may have taken the sign. Other
  // answers are a line, and so complete.
  static int64_t Announced(std::string_view unread) {
    if (unread.starts_with('$')) unread.remove_prefix(1);
    const std::string_view line = unread.substr(0, unread.find("\r\n"));
    if (line.empty() || line.size() == unread.size()) return 0;
    int64_t size = 0;
    const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), size);
    if (end != line.data() + line.size()) return 0;
    return error == std::errc() ? size : INT64_MAX;
  }

  const Address& address_;
  std::mutex mutex_;
  redisReplyObjectFunctions functions_{};
  std::unique_ptr<redisContext, ContextDeleter> context_;
  Clock::time_point retry_at_{};
};

class RedisStore : public KvStore {
 public:
  RedisStore(Address address, int64_t ttl_seconds) : address_(std::move(address)), ttl_(ttl_seconds) {}

  std::string description() const override {
    return address_.socket.empty()
               ? fmt::format("redis://{}:{}/{}", address_.host, address_.port, address_.database)
               : "unix://" + address_.socket;
  }

  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) override {
    std::vector<std::string> keys;
    for (const std::string& name : names) keys.push_back(Key(name));
    std::vector<std::vector<std::string_view>> commands;
    for (const std::string& key : keys) commands.push_back({"EXISTS", key});
    MOEND_ASSIGN(const auto replies, loads_.Ask(commands, kShortBytes));
    for (std::size_t i = 0; i < replies.size(); ++i) {
      MOEND_TRY(Check(*replies[i]));
      if (replies[i]->type == REDIS_REPLY_INTEGER && replies[i]->integer > 0) return static_cast<int64_t>(i);
    }
    return std::nullopt;
  }

  Expected<std::string> Get(const std::string& name) override {
    const std::string key = Key(name), ttl = std::to_string(ttl_);
    MOEND_ASSIGN(const Reply reply, Ask(loads_, {"GET", key}, kMostBytes));
    if (reply->type == REDIS_REPLY_NIL) return Fail(ErrorCode::kNotFound, "{} is not there any more", name);
    if (reply->type != REDIS_REPLY_STRING) return Fail(ErrorCode::kCorrupt, "{} is no string", name);
    if (ttl_ > 0) {
      MOEND_ASSIGN([[maybe_unused]] const Reply kept, Ask(loads_, {"EXPIRE", key, ttl}, kShortBytes));
    }
    return std::string(reply->str, reply->len);
  }

  Expected<void> Put(const std::string& name, std::string_view bytes) override {
    if (std::ssize(bytes) > kMostBytes)
      return Fail(ErrorCode::kTooLong, "{} bytes are more than the {} of a value", bytes.size(), kMostBytes);
    const std::string key = Key(name), ttl = std::to_string(ttl_);
    std::vector<std::string_view> command = {"SET", key, bytes};
    if (ttl_ > 0) command.insert(command.end(), {"EX", ttl});
    MOEND_ASSIGN([[maybe_unused]] const Reply reply, Ask(saves_, command, kShortBytes));
    return {};
  }

  Expected<void> Remove(const std::string& name) override {
    const std::string key = Key(name);
    MOEND_ASSIGN([[maybe_unused]] const Reply reply, Ask(loads_, {"DEL", key}, kShortBytes));
    return {};
  }

 private:
  static std::string Key(const std::string& name) { return std::string(kKeyPrefix) + name; }

  static Expected<void> Check(const redisReply& reply) {
    if (reply.type != REDIS_REPLY_ERROR) return {};
    return Fail(ErrorCode::kIo, "{}", ErrorText(reply));
  }

  static Expected<Reply> Ask(Link& link, const std::vector<std::string_view>& command, int64_t most_bytes) {
    MOEND_ASSIGN(auto replies, link.Ask({&command, 1}, most_bytes));
    MOEND_TRY(Check(*replies[0]));
    return std::move(replies[0]);
  }

  const Address address_;
  const int64_t ttl_;
  Link loads_{address_}, saves_{address_};  // a long save does not hold up a load
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
