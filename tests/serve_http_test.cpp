// The bytes of HTTP: strict heads, chunked bodies, and a transport that keeps its bounds against slow, large
// and vanishing clients.
#include <gtest/gtest.h>

#include <sys/un.h>

#include <filesystem>
#include <new>

#include "moend/serve/auth.h"
#include "moend/serve/cors.h"
#include "moend/serve/sha256.h"
#include "moend/serve/transport.h"
#include "tests/support/process.h"
#include "tests/support/serve_client.h"

namespace moend::serve {
namespace {

using namespace std::string_literals;
using test::Client;
using test::Eventually;
using test::ParseReply;

int StatusOf(const std::string& head, const Limits& limits = {}) {
  const auto r = ParseRequestHead(head, limits);
  return r ? 200 : r.error().status;
}

TEST(RequestHead, ReadsAWellFormedOne) {
  const auto h = ParseRequestHead(
      "POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\nCONTENT-Length: 12\r\nX:\t b c \t\r\nConnection: a, "
      "Close\r\n\r\n",
      {});
  ASSERT_TRUE(h);
  EXPECT_EQ(h->method, "POST");
  EXPECT_EQ(h->path(), "/v1/x");
  EXPECT_EQ(h->content_length, 12);
  EXPECT_EQ(h->Get("x"), "b c");
  EXPECT_FALSE(h->keep_alive);
  EXPECT_TRUE(ParseRequestHead("GET / HTTP/1.1\r\n\r\n", {})->keep_alive);
  EXPECT_FALSE(ParseRequestHead("GET / HTTP/1.0\r\n\r\n", {})->keep_alive);
  const auto no_chunks = ParseRequestHead("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", {});
  ASSERT_FALSE(no_chunks);
  EXPECT_EQ(no_chunks.error().status, 400);
}

TEST(RequestHead, RefusesWhatIsAmbiguousOrStrange) {
  const std::string post = "POST / HTTP/1.1\r\n";
  EXPECT_EQ(StatusOf("GET /\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET  / HTTP/1.1\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET / HTTP/2.0\r\n\r\n"), 505);
  EXPECT_EQ(StatusOf("GET http://a/ HTTP/1.1\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET /a\x01 HTTP/1.1\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("PUT / HTTP/1.1\r\n\r\n"), 405);
  EXPECT_EQ(StatusOf("PRI * HTTP/2.0\r\n\r\n"), 505);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\nbad\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\n folded: 1\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\nname : 1\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\nname: a\0b\r\n\r\n"s), 400);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\nname: a\nb: c\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf(post + "\r\n"), 411);
  EXPECT_EQ(StatusOf(post + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n"), 400);
  for (const char* bad : {"-1", "+1", "1a", "", "0x10", "1 1", "99999999999999999999"})
    EXPECT_EQ(StatusOf(post + "Content-Length: " + bad + "\r\n\r\n"), 400) << bad;
  EXPECT_EQ(StatusOf(post + "Content-Length: 4194305\r\n\r\n"), 413);
  EXPECT_EQ(StatusOf(post + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf(post + "Transfer-Encoding: gzip, chunked\r\n\r\n"), 501);
  EXPECT_EQ(StatusOf(post + "Content-Length: 1\r\nContent-Encoding: gzip\r\n\r\n"), 415);
  EXPECT_EQ(StatusOf(post + "Content-Length: 1\r\nExpect: tea\r\n\r\n"), 417);
  EXPECT_EQ(StatusOf("GET /" + std::string(3000, 'a') + " HTTP/1.1\r\n\r\n"), 414);
  Limits few;
  few.header_count = 2;
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\na: 1\r\nb: 2\r\n\r\n", few), 200);
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\n\r\n", few), 431);
}

TEST(ChunkDecoder, DecodesInPiecesOfAnySize) {
  const std::string in = "4;ext=1\r\nWiki\r\n00A\r\npedia in c\r\n1\r\n.\r\n0\r\nTrailer: x\r\n\r\nGET";
  for (std::size_t piece = 1; piece <= in.size(); ++piece) {
    ChunkDecoder d(100);
    std::string out, left = in;
    while (!d.done()) {
      const auto used = d.Feed(std::string_view(left).substr(0, piece), out);
      ASSERT_TRUE(used);
      ASSERT_GT(*used, 0u);
      left.erase(0, *used);
    }
    EXPECT_EQ(out, "Wikipedia in c.");
    EXPECT_EQ(left, "GET");
  }
}

TEST(ChunkDecoder, RefusesBadAndLargeOnes) {
  const auto status = [](const std::string& in) {
    ChunkDecoder d(10);
    std::string out;
    const auto r = d.Feed(in, out);
    return r ? 200 : r.error();
  };
  EXPECT_EQ(status("a\r\n0123456789\r\n0\r\n\r\n"), 200);
  EXPECT_EQ(status("b\r\n"), 413);
  EXPECT_EQ(status("5\r\n01234\r\n6\r\n"), 413);
  EXPECT_EQ(status("ffffffffffffffffff\r\n"), 413);
  EXPECT_EQ(status("0000000000000000\r\n"), 400);
  EXPECT_EQ(status("\r\n"), 400);
  EXPECT_EQ(status("g\r\n"), 400);
  EXPECT_EQ(status("-1\r\n"), 400);
  EXPECT_EQ(status("1\n"), 400);
  EXPECT_EQ(status("1\r\nab"), 400);
  EXPECT_EQ(status("1;" + std::string(5000, 'x')), 400);
  EXPECT_EQ(status("0\r\n" + std::string(5000, 'x')), 400);
}

TEST(Sha256, AgreesWithTheStandard) {
  EXPECT_EQ(Hex(Sha256Of("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Hex(Sha256Of("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Hex(Sha256Of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Hex(Sha256Of(std::string(1000000, 'a'))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (std::size_t cut = 0; cut <= 200; ++cut) {
    const std::string text(200, 'x');
    Sha256 h;
    h.Update(text.substr(0, cut));
    h.Update(text.substr(cut));
    EXPECT_EQ(h.Finish(), Sha256Of(text)) << cut;
  }
}

TEST(ApiKeys, GiveEachKeyItsScope) {
  const auto keys = ApiKeys::Create({"alpha", "beta"});
  ASSERT_TRUE(keys);
  const auto alpha = keys->Scope("Bearer alpha");
  ASSERT_TRUE(alpha);
  EXPECT_EQ(keys->Scope("bearer alpha"), alpha);
  EXPECT_EQ(keys->Scope("Basic dXNlcjphbHBoYQ=="), alpha);  // user:alpha
  EXPECT_NE(keys->Scope("Bearer beta"), alpha);
  EXPECT_EQ(alpha->find("alpha"), std::string::npos);
  for (const char* wrong : {"", "alpha", "Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "Bearer  alpha",
                            "Basic alpha", "Basic ====", "Basic dXNlcg==", "Digest alpha", "Bearer alpha "})
    EXPECT_FALSE(keys->Scope(wrong)) << wrong;
  EXPECT_EQ(ApiKeys().Scope(""), "public");
  EXPECT_FALSE(ApiKeys::Create({""}));
  EXPECT_FALSE(ApiKeys::Create({"a b"}));
  EXPECT_EQ(*ApiKeys::ParseFile("# team a\nk1\r\n\n k2 \n", "f"), (std::vector<std::string>{"k1", " k2"}));
  EXPECT_FALSE(ApiKeys::ParseFile("# nothing\n\n", "f"));
}

// A transport that says how long the body was.
struct Echo {
  explicit Echo(const Limits& limits, const std::string& host = "127.0.0.1")
      : transport(limits, {.handle = [this](const HttpRequest& q, HttpResponse& r) { Handle(q, r); },
                           .check = [this](const RequestHead&) -> std::optional<ApiError> {
                             if (throws) throw std::bad_alloc();
                             return std::nullopt;
                           },
                           .headers = {},
                           .refused = [this](int status) { refused = status; }}) {
    port = transport.Listen(host, 0).value();
    transport.Start();
  }
  void Handle(const HttpRequest& q, HttpResponse& r) {
    if (q.path == "/wait") {
      waiting = true;
      gone = Eventually([] { return ClientGone(); }, 5);
      r.SetContent("late", "text/plain");
    } else if (q.path == "/large") {
      r.SetContent(std::string(64 << 20, 'x'), "text/plain");
    } else if (q.path == "/stream") {
      r.stream = [](BodyWriter& out) { return out.Write("one ") && out.Write("two"); };
    } else if (q.path == "/broken") {
      r.stream = [](BodyWriter& out) { return out.Write("half") && false; };
    } else if (q.path == "/throws") {
      throw std::bad_alloc();
    } else {
      r.SetContent(std::to_string(q.body.size()), "text/plain");
    }
  }
  std::atomic<bool> waiting{false}, gone{false}, throws{false};
  std::atomic<int> refused{0};
  Transport transport;
  int port = 0;
};

TEST(Transport, AnswersAndKeepsConnections) {
  Echo echo({});
  Client c(echo.port);
  const std::string one = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
  const std::string two =
      "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: "
      "close\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n";
  c.Send(one + two);  // pipelined
  const std::string all = c.ReadAll();
  EXPECT_TRUE(c.closed());
  EXPECT_NE(all.find("\r\n\r\n3HTTP/1.1 200"), std::string::npos) << all;
  EXPECT_TRUE(all.ends_with("\r\n\r\n5")) << all;
}

TEST(Transport, SaysContinue) {
  Echo echo({});
  Client c(echo.port);
  c.Send("POST / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n");
  c.Read([](const std::string& s) { return s.ends_with("\r\n\r\n"); });
  c.Send("abc");
  const std::string all = c.ReadAll();
  EXPECT_TRUE(all.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")) << all;
}

TEST(Transport, BoundsHeadBodyAndTime) {
  Limits limits;
  limits.header_bytes = 1000;
  limits.body_bytes = 1000;
  limits.header_seconds = 0.3;
  limits.body_seconds = 0.3;
  Echo echo(limits);
  EXPECT_EQ(test::Ask(echo.port, "GET / HTTP/1.1\r\na: " + std::string(2000, 'x') + "\r\n\r\n").status, 431);
  EXPECT_EQ(test::Ask(echo.port, std::string(100000, 'x')).status, 431);
  EXPECT_EQ(test::Ask(echo.port, "POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n").status, 413);
  EXPECT_EQ(test::Ask(echo.port, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n").status, 413);
  EXPECT_EQ(test::Ask(echo.port, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").status, 400);
  EXPECT_EQ(test::Ask(echo.port, "GET / HTTP/1.1\r\nHost").status, 408);
  EXPECT_EQ(test::Ask(echo.port, "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc").status, 408);
  // A slow sender does not win time with every byte.
  Client slow(echo.port);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100 && slow.Send("G"); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  slow.ReadAll();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(3));
}

TEST(Transport, BoundsTheSumOfBodies) {
  Limits limits;
  limits.total_body_bytes = 1000;
  Echo echo(limits);
  Client holder(echo.port);
  holder.Send("POST / HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + std::string(800, 'x'));
  EXPECT_TRUE(Eventually([&] {
    // Closed, or an answer that comes before the holder is seen would keep this waiting.
    return test::Ask(echo.port, "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 300\r\n\r\n" +
                                    std::string(300, 'x'))
               .status == 503;
  }));
  holder.Close();
  EXPECT_TRUE(Eventually([&] {
    return test::Ask(echo.port, "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 300\r\n\r\n" +
                                    std::string(300, 'x'))
               .status == 200;
  }));
}

TEST(Transport, WritesAnswersOfUnknownLength) {
  Echo echo({});
  const std::string raw = [&] {
    Client c(echo.port);
    c.Send("GET /stream HTTP/1.1\r\nConnection: close\r\n\r\n");
    return c.ReadAll();
  }();
  EXPECT_TRUE(raw.ends_with("\r\n\r\n4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")) << raw;
  // HTTP/1.0 knows no chunks: the end of the connection is the end of the text.
  Client old(echo.port);
  old.Send("GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  EXPECT_TRUE(old.ReadAll().ends_with("\r\n\r\none two"));
  EXPECT_TRUE(old.closed());
  // Half an answer never looks like a whole one.
  Client half(echo.port);
  half.Send("GET /broken HTTP/1.1\r\n\r\n");
  const std::string text = half.ReadAll();
  EXPECT_TRUE(half.closed());
  EXPECT_TRUE(text.ends_with("4\r\nhalf\r\n")) << text;
  // A question for the head alone.
  Client head(echo.port);
  head.Send("HEAD /x HTTP/1.1\r\nConnection: close\r\n\r\n");
  const std::string only = head.ReadAll();
  EXPECT_TRUE(only.find("Content-Length: 1\r\n") != std::string::npos && only.ends_with("\r\n\r\n")) << only;
}

// Wherever memory ends, the client hears of it.
TEST(Transport, ShortOfMemoryItSays503) {
  Echo echo({});
  for (const char* request :
       {"GET /throws HTTP/1.1\r\n\r\n", "POST /throws HTTP/1.1\r\nContent-Length: 1\r\n\r\nx"}) {
    const auto r = test::Ask(echo.port, request);
    EXPECT_EQ(r.status, 503);
    EXPECT_EQ(r.json()["error"]["code"], "out_of_memory") << r.body;
  }
  echo.throws = true;
  // The body is still on its way when the answer comes.
  const auto r =
      test::Ask(echo.port, "POST / HTTP/1.1\r\nContent-Length: 500000\r\n\r\n" + std::string(400000, 'x'));
  EXPECT_EQ(r.status, 503);
  EXPECT_NE(r.head.find("Retry-After"), std::string::npos);
  EXPECT_EQ(echo.refused, 503);
}

TEST(Transport, ShortOfThreadsItSays503) {
  Limits limits;
  limits.stack_bytes = int64_t{1} << 46;  // no system gives a thread so much
  Echo echo(limits);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 100; ++i) {  // more than are remembered while they read
    clients.push_back(std::make_unique<Client>(echo.port));
    clients.back()->Send("POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx");
  }
  for (const auto& c : clients) EXPECT_EQ(ParseReply(c->ReadAll()).status, 503);
  EXPECT_EQ(echo.transport.open_connections(), 0);
}

TEST(Transport, ListensOnAUnixSocket) {
  const moend::test::TemporaryFolder folder;
  const std::string path = folder.path("sock");
  const auto ask = [&] {
    Client c(path);
    c.Send("POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc");
    return ParseReply(c.ReadAll()).body;
  };
  {
    Echo echo({}, "unix:" + path);
    EXPECT_EQ(echo.port, 0);
    EXPECT_EQ(ask(), "3");
    Transport second({}, {.handle = [](const HttpRequest&, HttpResponse&) {}});
    const auto taken = second.Listen("unix:" + path, 0);
    ASSERT_FALSE(taken);
    EXPECT_NE(taken.error().message.find(path), std::string::npos);
    EXPECT_EQ(ask(), "3");  // the attempt did it no harm
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  // One that a killed server left behind.
  const int left = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  std::memcpy(a.sun_path, path.data(), path.size());
  ASSERT_EQ(bind(left, reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
  close(left);
  Echo again({}, "unix:" + path);
  EXPECT_EQ(ask(), "3");
  // Another file in the way is left alone.
  const std::string file = folder.Write("file", "x");
  Transport third({}, {.handle = [](const HttpRequest&, HttpResponse&) {}});
  EXPECT_FALSE(third.Listen("unix:" + file, 0));
  EXPECT_EQ(moend::test::ReadAll(file), "x");
  EXPECT_FALSE(third.Listen("unix:" + std::string(200, 'x'), 0));
  EXPECT_FALSE(third.Listen("unix:", 0));
}

TEST(Cors, AllowsWhatWasNamed) {
  const auto allows = [](const std::vector<std::string>& origins, std::string_view origin) {
    return Cors::Create(origins)->Allows(origin);
  };
  EXPECT_FALSE(Cors().enabled());
  EXPECT_TRUE(allows({"*"}, "https://any.example"));
  EXPECT_TRUE(allows({"https://a.example", "http://b.example:81"}, "http://b.example:81"));
  EXPECT_TRUE(allows({"https://A.example"}, "https://a.example"));
  EXPECT_FALSE(allows({"https://a.example"}, "http://a.example"));
  EXPECT_FALSE(allows({"https://a.example"}, "https://a.example.evil"));
  EXPECT_FALSE(allows({"https://a.example"}, "null"));
  EXPECT_FALSE(allows({"*"}, ""));
  for (const char* local : {"http://localhost", "http://localhost:5173", "https://127.0.0.1:1",
                            "http://[::1]:80", "http://[::1]"})
    EXPECT_TRUE(allows({"localhost"}, local)) << local;
  for (const char* other : {"http://localhost.evil", "http://evil:80", "localhost", "http://[::2]"})
    EXPECT_FALSE(allows({"localhost"}, other)) << other;
  for (const char* bad : {"", "a.example", "ftp://a", "https://", "https://a/", "https://*.a", "https://a b"})
    EXPECT_FALSE(Cors::Create({bad})) << bad;
}

TEST(Transport, BoundsConnectionsInFavourOfNewOnes) {
  Limits limits;
  limits.connections = 4;
  Echo echo(limits);
  std::vector<std::unique_ptr<Client>> idle;
  for (int i = 0; i < 4; ++i) idle.push_back(std::make_unique<Client>(echo.port));
  ASSERT_TRUE(Eventually([&] { return echo.transport.open_connections() == 4; }));
  const std::string request = "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx";
  EXPECT_EQ(test::Ask(echo.port, request).status, 503);  // all of them are young
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_EQ(test::Ask(echo.port, request).status, 200);  // the one that dawdled longest had to go
}

// A burst neither passes the bound nor sacrifices one connection for all of them.
TEST(Transport, ABurstKeepsTheBound) {
  Limits limits;
  limits.connections = 4;
  Echo echo(limits);
  std::vector<std::unique_ptr<Client>> old;
  for (int i = 0; i < 4; ++i) old.push_back(std::make_unique<Client>(echo.port));
  ASSERT_TRUE(Eventually([&] { return echo.transport.open_connections() == 4; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  std::atomic<bool> done{false};
  int64_t most = 0;
  std::thread watch([&] {
    while (!done) most = std::max(most, echo.transport.open_connections());
  });
  std::vector<std::unique_ptr<Client>> fresh;
  for (int i = 0; i < 4; ++i) {
    fresh.push_back(std::make_unique<Client>(echo.port));
    fresh.back()->Send("POST /wait HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
  }
  int closed = 0;
  for (const auto& c : old) {
    c->ReadAll(5);
    closed += c->closed();
  }
  done = true;
  watch.join();
  EXPECT_EQ(closed, 4);
  EXPECT_LE(most, 4);
  EXPECT_TRUE(Eventually([&] { return echo.transport.open_connections() == 4; }));  // all the new ones are in
}

TEST(Transport, NoticesThatAClientLeft) {
  Echo echo({});
  Client c(echo.port);
  c.Send("POST /wait HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
  ASSERT_TRUE(Eventually([&] { return echo.waiting.load(); }));
  c.Close();
  EXPECT_TRUE(Eventually([&] { return echo.gone.load(); }, 2));
}

TEST(Transport, GivesUpOnReadersThatDoNotRead) {
  Limits limits;
  limits.write_seconds = 0.3;
  Echo echo(limits);
  Client c(echo.port);
  c.Send("GET /large HTTP/1.1\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return echo.transport.open_connections() == 0; }, 5));
}

TEST(Transport, StopsIdleConnectionsAtOnceAndBusyOnesWhenDone) {
  auto echo = std::make_unique<Echo>(Limits{});
  Client idle(echo->port), busy(echo->port);
  busy.Send("POST /wait HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
  ASSERT_TRUE(Eventually([&] { return echo->waiting && echo->transport.open_connections() == 2; }));
  echo->transport.StopAccepting();
  EXPECT_TRUE(Eventually([&] { return echo->transport.open_connections() == 1; }));
  EXPECT_FALSE(echo->transport.WaitIdle(std::chrono::steady_clock::now() + std::chrono::milliseconds(50)));
  EXPECT_FALSE(Client(echo->port).connected());
  busy.Close();
  EXPECT_TRUE(echo->transport.WaitIdle(std::chrono::steady_clock::now() + std::chrono::seconds(5)));
}

TEST(Transport, ListenNamesABadAddress) {
  Transport t({}, {.handle = [](const HttpRequest&, HttpResponse&) {}});
  const auto r = t.Listen("256.0.0.1", 0);
  ASSERT_FALSE(r);
  EXPECT_NE(r.error().message.find("256.0.0.1"), std::string::npos);
}

}  // namespace
}  // namespace moend::serve
