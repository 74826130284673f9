// The shared store, against a real Valkey or Redis from the system's packages.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <thread>

#include "moend/serve/kv_store.h"
#include "tests/support/process.h"
#include "tests/support/serve_client.h"

namespace moend::serve {
namespace {

namespace fs = std::filesystem;
using moend::test::TemporaryFolder;
using test::Eventually;

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t n = sizeof a;
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&a), n), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&a), &n), 0);
  close(fd);
  return ntohs(a.sin_port);
}

// The file is there a moment before the server listens on it.
bool Connects(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  path.copy(a.sun_path, sizeof a.sun_path - 1);
  const bool connected = connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0;
  close(fd);
  return connected;
}

struct RedisServer {
  explicit RedisServer(const std::vector<std::string>& extra = {}) {
    socket = (folder.path() / "redis.sock").string();
    pid = fork();
    if (pid == 0) {
      std::vector<std::string> words = {
          "redis-server", "--port", "0",     "--unixsocket",         socket,      "--save",   "",
          "--appendonly", "no",     "--dir", folder.path().string(), "--logfile", "/dev/null"};
      words.insert(words.end(), extra.begin(), extra.end());
      std::vector<char*> argv;
      for (auto& w : words) argv.push_back(w.data());
      argv.push_back(nullptr);
      execvp("redis-server", argv.data());
      words[0] = "valkey-server";
      argv[0] = words[0].data();
      execvp("valkey-server", argv.data());
      _exit(127);
    }
    up = Eventually([&] { return Connects(socket) || waitpid(pid, nullptr, WNOHANG) != 0; }) &&
         Connects(socket);
  }
  ~RedisServer() { Stop(); }
  void Stop() {
    if (pid <= 0) return;
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    pid = -1;
  }
  TemporaryFolder folder;
  std::string socket;
  pid_t pid = -1;
  bool up = false;
};

TEST(RedisStore, KeepsBytesInARealServer) {
  RedisServer server;
  if (!server.up) GTEST_SKIP() << "neither redis-server nor valkey-server is installed";
  const auto store = OpenRedisStore("unix://" + server.socket, 100).value();
  const std::vector<std::string> names = {"x/1-a", "x/2-b", "x/3-c"};
  EXPECT_EQ(store->FirstPresent(names).value(), std::nullopt);
  EXPECT_EQ(store->Get("x/2-b").error().code, ErrorCode::kNotFound);
  std::string bytes(5 << 20, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7);
  ASSERT_TRUE(store->Put("x/2-b", bytes));
  ASSERT_TRUE(store->Put("x/3-c", "c"));
  EXPECT_EQ(store->FirstPresent(names).value(), 1);
  EXPECT_EQ(store->Get("x/2-b").value(), bytes);
  ASSERT_TRUE(store->Remove("x/2-b"));
  EXPECT_EQ(store->FirstPresent(names).value(), 2);
  // Another server's view.
  EXPECT_EQ(OpenRedisStore("unix://" + server.socket, 100).value()->Get("x/3-c").value(), "c");
  server.Stop();
  EXPECT_EQ(store->FirstPresent(names).error().code, ErrorCode::kIo);
  const Error again = store->Get("x/3-c").error();
  EXPECT_EQ(again.code, ErrorCode::kIo);
  EXPECT_NE(again.message.find("not asked again yet"), std::string::npos) << again.message;
}

TEST(RedisStore, LogsInAndChoosesADatabase) {
  // A port that was free a moment ago; a password needs an address, a socket's path has none.
  const int port = FreePort();
  RedisServer server({"--requirepass", "p@ss", "--bind", "127.0.0.1", "--port", std::to_string(port)});
  if (!server.up) GTEST_SKIP() << "neither redis-server nor valkey-server is installed";
  const auto denied = OpenRedisStore("unix://" + server.socket, 0).value()->Put("a", "b");
  ASSERT_FALSE(denied);
  EXPECT_NE(denied.error().message.find("NOAUTH"), std::string::npos);
  const auto open = [&](const std::string& login, const char* database) {
    return OpenRedisStore("redis://" + login + "@127.0.0.1:" + std::to_string(port) + database, 100).value();
  };
  const auto wrong = open(":wrong", "")->Put("a", "b");
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().message.find("wrong "), std::string::npos);  // the password is not repeated
  ASSERT_TRUE(open(":p%40ss", "/3")->Put("a", "b"));
  EXPECT_EQ(open("default:p%40ss", "/3")->Get("a").value(), "b");
  EXPECT_EQ(open(":p%40ss", "")->Get("a").error().code, ErrorCode::kNotFound);
  EXPECT_EQ(open(":p%40ss", "/99")->Get("a").error().code, ErrorCode::kIo);
}

// A server that says what it is told to. Each answer is sent when so many commands have come.
struct ScriptedServer {
  struct Answer {
    int commands;
    std::string text;
  };
  explicit ScriptedServer(std::vector<Answer> answers) : path(folder.path("redis.sock")) {
    listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    std::memcpy(a.sun_path, path.data(), path.size());
    EXPECT_EQ(bind(listening, reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
    EXPECT_EQ(listen(listening, 8), 0);
    thread = std::thread([this, answers = std::move(answers)] {
      const int fd = accept(listening, nullptr, nullptr);
      std::size_t next = 0;
      int64_t commands = 0;
      char bytes[4096];
      for (ssize_t n; (n = recv(fd, bytes, sizeof bytes, 0)) > 0;) {
        commands += std::count(bytes, bytes + n, '*');
        for (; next < answers.size() && commands >= answers[next].commands; ++next) {
          commands -= answers[next].commands;
          [[maybe_unused]] const auto sent =
              send(fd, answers[next].text.data(), answers[next].text.size(), MSG_NOSIGNAL);
        }
      }
      close(fd);
    });
  }
  ~ScriptedServer() {
    shutdown(listening, SHUT_RDWR);
    thread.join();
    close(listening);
  }
  TemporaryFolder folder;
  std::string path;
  int listening = -1;
  std::thread thread;
};

// An error among the answers takes none of the others' places.
TEST(RedisStore, AnErrorDoesNotShiftTheAnswers) {
  ScriptedServer server({{3, "-LOADING the data\r\n:1\r\n:0\r\n"}, {1, "$2\r\nv1\r\n"}, {2, ":0\r\n:1\r\n"}});
  const auto store = OpenRedisStore("unix://" + server.path, 0).value();
  const std::vector<std::string> three = {"k0", "k1", "k2"}, two = {"k0", "k1"};
  const auto first = store->FirstPresent(three);
  ASSERT_FALSE(first);
  EXPECT_NE(first.error().message.find("LOADING"), std::string::npos);
  EXPECT_EQ(store->Get("k1").value(), "v1");
  EXPECT_EQ(store->FirstPresent(two).value(), 1);
}

TEST(RedisStore, ShowsErrorsOfAnyText) {
  ScriptedServer server({{1, "-\r\n"}, {1, "-a\tb\x1b[2J\r\n"}});
  const auto store = OpenRedisStore("unix://" + server.path, 0).value();
  EXPECT_NE(store->Get("k").error().message, "");
  EXPECT_EQ(store->Get("k").error().message, "a?b?[2J");
}

TEST(RedisStore, BelievesNoSizeThatNoAnswerHas) {
  for (const std::string answer :
       {"*1000000000\r\n", "$2147483648\r\n", "$99999999999999999999\r\n", "*0\r\n", "%3\r\n", "\r\n"}) {
    ScriptedServer server({{1, answer}});
    const auto store = OpenRedisStore("unix://" + server.path, 0).value();
    const auto got = store->Get("k");
    ASSERT_FALSE(got) << answer;
    EXPECT_EQ(got.error().code, ErrorCode::kIo) << got.error().message;
    EXPECT_EQ(got.error().message.find("in time"), std::string::npos) << answer << got.error().message;
  }
  // More than a number or a word can have, where one of these is the answer.
  ScriptedServer server({{1, "$100000\r\n"}});
  const std::string name = "k";
  const auto present = OpenRedisStore("unix://" + server.path, 0).value()->FirstPresent({&name, 1});
  ASSERT_FALSE(present);
  EXPECT_NE(present.error().message.find("announced"), std::string::npos);
}

TEST(RedisStore, GivesUpOnOneThatIsSilent) {
  for (const std::string begun : {"", "$5\r\nab"}) {
    ScriptedServer server({{1, begun}});
    const auto store = OpenRedisStore("unix://" + server.path, 0).value();
    const auto got = store->Get("k");
    ASSERT_FALSE(got);
    EXPECT_NE(got.error().message.find("in time"), std::string::npos) << got.error().message;
    EXPECT_NE(store->Get("k").error().message.find("not asked again yet"), std::string::npos);
  }
}

TEST(RedisStore, UnderstandsAddresses) {
  const auto name = [](const char* url) -> std::string {
    const auto r = OpenRedisStore(url, 0);
    return r ? (*r)->description() : "";
  };
  EXPECT_EQ(name("redis://host"), "redis://host:6379/0");
  EXPECT_EQ(name("redis://user:p%40ss@host:1234/5"), "redis://host:1234/5");
  EXPECT_EQ(name("valkey://:secret@[::1]:1/"), "redis://::1:1/0");
  EXPECT_EQ(name("unix:///run/redis.sock"), "unix:///run/redis.sock");
  for (const char* bad :
       {"", "host", "http://host", "redis://", "redis://host:0", "redis://host:99999", "redis://host/x",
        "redis://user@host", "redis://u:%4@host", "unix://relative", "redis://[::1", "redis://host:1x"})
    EXPECT_EQ(name(bad), "") << bad;
}

}  // namespace
}  // namespace moend::serve
