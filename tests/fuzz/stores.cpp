// What comes from a store of prefixes: a file of one, and the answers of a Redis server.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <thread>

#include "moend/serve/prefix_store.h"
#include "moend/serve/sha256.h"
#include "tests/fuzz/fuzz.h"

namespace moend::fuzz {
namespace {

using namespace serve;

constexpr std::size_t kChecksum = 32;  // ends a saved prefix

void SealPrefix(std::string& blob) {
  if (blob.size() < 16 + kChecksum) return;
  const uint64_t total = blob.size();
  std::memcpy(blob.data() + 8, &total, sizeof total);
  const auto sum = Sha256Of(std::string_view(blob).substr(0, blob.size() - kChecksum));
  std::memcpy(blob.data() + blob.size() - kChecksum, sum.data(), kChecksum);
}

// A store in which every name has the same bytes.
class OneBlob : public KvStore {
 public:
  explicit OneBlob(const std::string& bytes) : bytes_(bytes) {}
  std::string description() const override { return "a store"; }
  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string>) override { return 0; }
  Expected<std::string> Get(const std::string&) override { return bytes_; }
  Expected<void> Put(const std::string&, std::string_view) override { return {}; }
  Expected<void> Remove(const std::string&) override { return {}; }

 private:
  const std::string& bytes_;
};

// What is handed out is what was asked for, whatever the store holds; what is read is written to the same.
Parser PrefixParser() {
  const SavedPrefix wanted{"model plan", "key", {5, 6, 7, 8, -1, 1 << 30}, "payload \x01\x02"};
  std::vector<int32_t> prompt = wanted.tokens;
  prompt.insert(prompt.end(), {9, 10, 11, 12});
  return {.name = "prefix",
          .seeds = {Encode(wanted), Encode({"model plan", "key", {5}, std::string(300, 'x')}),
                    Encode({"another", "", {}, ""})},
          .words = {"MOENDKV1", "model plan", "key", std::string(8, '\0'), std::string("\x05\0\0\0", 4)},
          .run = [wanted, prompt](const std::string& input) -> Outcome {
            const auto read = Decode(input);
            if (read && Encode(*read) != input) return {.accepted = true, .wrong = "it is written otherwise"};
            std::string said;
            std::optional<SavedPrefix> found;
            {
              std::vector<std::unique_ptr<KvStore>> stores;
              stores.push_back(std::make_unique<OneBlob>(input));
              PrefixStore store(std::move(stores),
                                Log([&](LogLevel, const std::string& line) { said = line; }));
              store.Load(wanted.cache_id, wanted.scope, prompt, {1, 6},
                         [&](std::optional<SavedPrefix> prefix) { found = std::move(prefix); });
              store.Flush();
            }
            if (!read)
              return {.said = read.error().message, .wrong = found ? "a damaged prefix is used" : ""};
            if (!found) return {.accepted = true, .said = said};
            if (found->cache_id != wanted.cache_id || found->scope != wanted.scope || found->tokens.empty() ||
                found->tokens.size() >= prompt.size() ||
                !std::equal(found->tokens.begin(), found->tokens.end(), prompt.begin()))
              return {.accepted = true, .wrong = "a prefix of something else is used"};
            return {.accepted = true, .said = "used"};
          },
          .seal = SealPrefix};
}

// A server that takes any number of connections, and says the same bytes to each, whatever it is asked.
class Server {
 public:
  Server() : path(NewFolder() + "/socket"), socket_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::copy_n(path.c_str(), std::min(path.size(), sizeof address.sun_path - 1), address.sun_path);
    if (bind(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        listen(socket_, 8) != 0)
      return;
    thread_ = std::thread([this] { Serve(); });
  }
  ~Server() {
    shutdown(socket_, SHUT_RDWR);
    if (thread_.joinable()) thread_.join();
    for (const int client : open_) close(client);
    close(socket_);
    std::error_code ignored;
    std::filesystem::remove_all(std::filesystem::path(path).parent_path(), ignored);
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  void Say(const std::string& bytes) {
    const std::lock_guard lock(mutex_);
    bytes_ = bytes;
  }

  const std::string path;

 private:
  static std::string NewFolder() {
    std::string folder = (std::filesystem::temp_directory_path() / "moend-fuzz-XXXXXX").string();
    return mkdtemp(folder.data()) ? folder : std::string();
  }
  void Serve() {
    for (;;) {
      const int client = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) return;
      std::string bytes;
      {
        const std::lock_guard lock(mutex_);
        bytes = bytes_;
      }
      // All at once: no more than a socket takes without a reader. Closed when nobody can wait for it any
      // more: what was not read would make the client's end an error.
      if (send(client, bytes.data(), bytes.size(), MSG_NOSIGNAL) >= 0) shutdown(client, SHUT_WR);
      open_.push_back(client);
      if (open_.size() > 8) {
        close(open_.front());
        open_.pop_front();
      }
    }
  }

  int socket_;
  std::mutex mutex_;
  std::string bytes_;
  std::deque<int> open_;
  std::thread thread_;
};

Parser RedisParser() {
  const auto server = std::make_shared<Server>();
  return {
      .name = "redis",
      .seeds = {":0\r\n:1\r\n$5\r\nhello\r\n:1\r\n+OK\r\n", ":0\r\n:0\r\n$-1\r\n+OK\r\n",
                "+OK\r\n+OK\r\n:1\r\n:1\r\n$0\r\n\r\n:1\r\n", "-ERR no such thing\r\n:0\r\n-WRONGTYPE a\r\n"},
      .words = {"\r\n", "*3\r\n", "%1\r\n", "~2\r\n", "$1000000000\r\n", "$-1\r\n", "*-1\r\n", "_\r\n",
                "#t\r\n", ",1.5\r\n", "(123456789012345678901\r\n", "=8\r\ntxt:text\r\n", "-ERR\r\n", ":"},
      .run = [server](const std::string& input) -> Outcome {
        server->Say(input);
        auto store = OpenRedisStore("unix://" + server->path, 60);
        if (!store) return {.said = store.error().message, .wrong = "the address is refused"};
        Outcome outcome{.accepted = true};
        const std::string names[] = {"a", "b"};
        const auto first = (*store)->FirstPresent(names);
        outcome.said += first ? *first ? "found " : "absent " : first.error().message;
        if (first && *first && (**first < 0 || **first > 1)) outcome.wrong = "a name that was not asked for";
        const auto value = (*store)->Get("a");
        outcome.said += value ? "value " : value.error().message;
        if (value && input.find(*value) == std::string::npos) outcome.wrong = "a value that was not sent";
        const auto put = (*store)->Put("a", "bytes");
        outcome.said += put ? "put" : put.error().message;
        for (const Error* e : {first ? nullptr : &first.error(), value ? nullptr : &value.error(),
                               put ? nullptr : &put.error()})
          if (e && e->message.empty()) outcome.wrong = "an error that does not say why";
        outcome.accepted = first && value && put;
        return outcome;
      }};
}

}  // namespace

void AddStoreParsers(std::vector<Parser>& parsers) {
  parsers.push_back(PrefixParser());
  parsers.push_back(RedisParser());
}

}  // namespace moend::fuzz
