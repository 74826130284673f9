#include "moend/model/grammar.h"

#include <fcntl.h>
#include <ggml.h>
#include <llama-cpp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>
#include <exception>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <unordered_map>

#include "moend/model/chat_format.h"

namespace moend {
namespace {

constexpr std::size_t kMostBytes = 1 << 20;  // of a grammar's text
// To follow a grammar may take so much on the whole, and as much again with every token: looking at every
// token of a large vocabulary takes a tenth of a second.
constexpr int64_t kFirstMicroseconds = 2'000'000, kMicrosecondsPerToken = 100'000;
constexpr int64_t kMostCheckMicroseconds = 1'000'000;

// What is asked of the processes: a byte, then its arguments; and their answers.
enum Op : char { kPing, kMake, kNext, kFree, kCheck, kSchema };
enum Status : char { kDone, kUnknown, kRefused };

template <class T>
void Put(std::string& to, const T& value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class T>
T Take(std::string_view& from) {
  T value{};
  if (from.size() < sizeof value) throw std::runtime_error("a message is cut short");
  std::memcpy(&value, from.data(), sizeof value);
  from.remove_prefix(sizeof value);
  return value;
}

void PutTokens(std::string& to, std::span<const int32_t> tokens) {
  Put(to, static_cast<uint32_t>(tokens.size()));
  to.append(reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes());
}

std::vector<int32_t> TakeTokens(std::string_view& from) {
  std::vector<int32_t> tokens(Take<uint32_t>(from));
  if (from.size() < tokens.size() * sizeof(int32_t)) throw std::runtime_error("a message is cut short");
  std::memcpy(tokens.data(), from.data(), tokens.size() * sizeof(int32_t));
  from.remove_prefix(tokens.size() * sizeof(int32_t));
  return tokens;
}

std::string Pack(const GrammarSource& source, std::span<const int32_t> begun) {
  nlohmann::json j = {{"text", source.text}, {"lazy", source.lazy}, {"triggers", nlohmann::json::array()}};
  for (const GrammarTrigger& t : source.triggers)
    j["triggers"].push_back({{"text", t.text}, {"regex", t.is_regex}});
  j["begun"] = std::vector<int32_t>(begun.begin(), begun.end());
  std::string out;
  nlohmann::json::to_msgpack(j, out);
  return out;
}

std::string EscapeRegex(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (std::strchr(".^$|()*+?[]{}\\", c) && c != '\0') out += '\\';
    out += c;
  }
  return out;
}

// What libraries say, in a line of text.
std::string OneLine(std::string_view text) {
  constexpr std::size_t kLongest = 240;
  for (std::string_view known :
       {"JSON schema conversion failed:\n", "JSON schema error at #: ", "JSON schema error at "})
    if (text.starts_with(known)) text.remove_prefix(known.size());
  std::string out(text.substr(0, kLongest));
  std::ranges::replace_if(
      out, [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
  return out;
}

// ---- in the process
// ----------------------------------------------------------------------------------------------

int64_t CpuMicroseconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000 + now.tv_nsec / 1000;
}

// What is written to stderr while this lives: there libllama says what is wrong with a grammar.
class Overheard {
 public:
  Overheard() : file_(memfd_create("stderr", MFD_CLOEXEC)), before_(dup(2)) {
    if (file_ >= 0) dup2(file_, 2);
  }
  ~Overheard() {
    if (before_ >= 0) dup2(before_, 2);
    close(before_);
    close(file_);
  }
  std::string text() const {
    std::string out(4096, '\0');
    const ssize_t n = file_ < 0 ? 0 : pread(file_, out.data(), out.size(), 0);
    out.resize(static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
    return out;
  }

 private:
  int file_, before_;
};

// The first line of what libllama says, from behind `after` on.
std::string Said(const std::string& text, std::string_view after) {
  const auto at = text.find(after);
  if (at == std::string::npos) return {};
  std::string_view line = std::string_view(text).substr(at + after.size());
  line = line.substr(0, line.find('\n'));
  return OneLine(line);
}

class Process {
 public:
  explicit Process(const GrammarVocabulary& vocabulary)
      : vocab_(static_cast<const llama_vocab*>(vocabulary.llama_vocab)), n_tokens_(vocabulary.n_tokens) {
    // Not with a debugger's picture of the stack.
    ggml_set_abort_callback([](const char*) { _exit(1); });
  }

  std::string Work(std::string_view request) {
    const int64_t start = CpuMicroseconds();
    std::string reply(1, kDone);
    Put(reply, int64_t{0});
    try {
      const Op op = static_cast<Op>(Take<char>(request));
      if (op == kSchema) {
        reply += Schema(std::string(request));
      } else if (op == kCheck) {
        const auto sampler = Make(request);
        All(*sampler);
      } else if (op == kMake) {
        const auto id = Take<uint64_t>(request);
        samplers_[id] = Make(request);
      } else if (op == kFree) {
        samplers_.erase(Take<uint64_t>(request));
      } else if (op == kNext) {
        const auto found = samplers_.find(Take<uint64_t>(request));
        if (found == samplers_.end()) return std::string(1, kUnknown);
        for (const int32_t token : TakeTokens(request)) llama_sampler_accept(found->second.get(), token);
        const bool all = Take<char>(request) != 0;
        reply += all ? All(*found->second) : Some(*found->second, TakeTokens(request));
      }
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& e) {
      return std::string(1, kRefused) + e.what();
    }
    const int64_t took = CpuMicroseconds() - start;
    std::memcpy(reply.data() + 1, &took, sizeof took);
    return reply;
  }

 private:
  static std::string Schema(const std::string& schema) {
    const Overheard overheard;
    std::string grammar = SchemaToGrammar(schema);
    const std::string passed_over = Said(overheard.text(), "conversion was incomplete: ");
    if (!passed_over.empty()) throw std::runtime_error(passed_over);
    return grammar;
  }

  llama_sampler_ptr Make(std::string_view packed) const {
    const nlohmann::json j = nlohmann::json::from_msgpack(packed);
    const auto text = j.at("text").get<std::string>();
    std::vector<std::string> patterns;
    for (const nlohmann::json& t : j.at("triggers")) {
      const auto trigger = t.at("text").get<std::string>();
      patterns.push_back(t.at("regex").get<bool>() ? trigger : EscapeRegex(trigger));
    }
    const Overheard overheard;
    llama_sampler_ptr sampler;
    if (j.at("lazy").get<bool>()) {
      std::vector<const char*> texts;
      for (const std::string& p : patterns) texts.push_back(p.c_str());
      sampler.reset(llama_sampler_init_grammar_lazy_patterns(vocab_, text.c_str(), "root", texts.data(),
                                                             texts.size(), nullptr, 0));
    } else {
      sampler.reset(llama_sampler_init_grammar(vocab_, text.c_str(), "root"));
    }
    if (!sampler) {
      std::string why = Said(overheard.text(), "error parsing grammar: ");
      if (why.empty() && text.find("root") == std::string::npos) why = "it has no rule root";
      throw std::runtime_error(why.empty() ? "a rule begins with itself, or there is no rule root" : why);
    }
    for (const int32_t token : j.at("begun").get<std::vector<int32_t>>())
      llama_sampler_accept(sampler.get(), token);
    return sampler;
  }

  std::string Some(llama_sampler& sampler, const std::vector<int32_t>& tokens) const {
    std::string mask(tokens.size(), 0);
    std::vector<llama_token_data> data;
    std::vector<std::size_t> places;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i] >= 0 && tokens[i] < n_tokens_) {
        data.push_back({tokens[i], 0, 0});
        places.push_back(i);
      }
    llama_token_data_array array{data.data(), data.size(), -1, false};
    llama_sampler_apply(&sampler, &array);
    for (std::size_t i = 0; i < places.size(); ++i) mask[places[i]] = data[i].logit == 0;
    return mask;
  }

  // In parts: a grammar has a table for every token that it looks at.
  std::string All(llama_sampler& sampler) const {
    constexpr int64_t kPart = 16384;
    std::string mask;
    for (int64_t from = 0; from < n_tokens_; from += kPart) {
      std::vector<int32_t> part;
      for (int64_t t = from; t < std::min(n_tokens_, from + kPart); ++t)
        part.push_back(static_cast<int32_t>(t));
      mask += Some(sampler, part);
    }
    return mask;
  }

  const llama_vocab* vocab_;
  int64_t n_tokens_;
  std::unordered_map<uint64_t, llama_sampler_ptr> samplers_;
};

Worker::Work Runner(const GrammarVocabulary& vocabulary) {
  auto process = std::make_shared<std::unique_ptr<Process>>();
  return [vocabulary, process](std::string_view request) {
    if (!*process) *process = std::make_unique<Process>(vocabulary);
    return (*process)->Work(request);
  };
}

}  // namespace

struct GrammarHost::Impl {
  explicit Impl(const GrammarVocabulary& v)
      : vocabulary(v),
        checker(Runner(v), {.cpu_seconds = 1}),
        follower(Runner(v), {.cpu_seconds = 2, .memory_bytes = int64_t{512} << 20}) {}
  GrammarVocabulary vocabulary;
  Worker checker, follower;
  std::atomic<uint64_t> next_id{1};

  std::string Piece(int32_t token) const {
    const auto* vocab = static_cast<const llama_vocab*>(vocabulary.llama_vocab);
    char piece[64];
    const int32_t n = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, true);
    if (n >= 0) return {piece, static_cast<std::size_t>(n)};
    std::string longer(static_cast<std::size_t>(-n), '\0');
    llama_token_to_piece(vocab, token, longer.data(), -n, 0, true);
    return longer;
  }
};

namespace {

class Followed final : public Grammar {
 public:
  Followed(std::shared_ptr<GrammarHost::Impl> host, const GrammarSource& source,
           std::span<const int32_t> begun)
      : host_(std::move(host)), id_(host_->next_id++), packed_(Pack(source, begun)) {
    waiting_ = source.lazy && !source.triggers.empty();
    for (const GrammarTrigger& t : source.triggers) {
      if (t.is_regex || t.text.empty()) waiting_ = false;  // the process waits
      triggers_.push_back(t.text);
      longest_ = std::max(longest_, t.text.size());
    }
  }

  ~Followed() override {
    if (!made_) return;
    try {
      std::string request(1, kFree);
      Put(request, id_);
      (void)host_->follower.Call(request);
    } catch (const std::exception&) {  // no memory; the process ends with this one
    }
  }

  Expected<std::vector<bool>> Allows(std::span<const int32_t> tokens) override {
    if (waiting_) return std::vector<bool>(tokens.size(), true);
    return Ask(&tokens, tokens.size());
  }

  Expected<std::vector<bool>> AllowsOfAll() override {
    const auto n = static_cast<std::size_t>(host_->vocabulary.n_tokens);
    if (waiting_) return std::vector<bool>(n, true);
    return Ask(nullptr, n);
  }

  void Accept(int32_t token) override {
    tokens_.push_back(token);
    if (waiting_) LookForTrigger(token);
  }

 private:
  void LookForTrigger(int32_t token) {
    const std::size_t from = text_.size() - std::min(text_.size(), longest_ - 1);
    text_ += host_->Piece(token);
    ends_.push_back(text_.size());
    std::size_t start = std::string::npos;
    for (const std::string& t : triggers_) start = std::min(start, text_.find(t, from));
    std::size_t keep = 0;  // tokens before it are of no use any more
    const std::size_t needed =
        start != std::string::npos ? start : text_.size() - std::min(text_.size(), longest_ - 1);
    while (keep < ends_.size() && ends_[keep] <= needed) ++keep;
    if (start != std::string::npos) {
      waiting_ = false;
      tokens_.erase(tokens_.begin(), tokens_.begin() + static_cast<std::ptrdiff_t>(keep));
      text_.clear();
      ends_.clear();
      return;
    }
    constexpr std::size_t kOften = 256;
    if (keep < kOften) return;
    const std::size_t cut = ends_[keep - 1];
    tokens_.erase(tokens_.begin(), tokens_.begin() + static_cast<std::ptrdiff_t>(keep));
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<std::ptrdiff_t>(keep));
    text_.erase(0, cut);
    for (std::size_t& e : ends_) e -= cut;
  }

  Expected<std::vector<bool>> Ask(const std::span<const int32_t>* tokens, std::size_t n) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      if (!made_) {
        std::string request(1, kMake);
        Put(request, id_);
        request += packed_;
        MOEND_TRY(Call(request));
        made_ = true;
        sent_ = 0;
      }
      std::string request(1, kNext);
      Put(request, id_);
      PutTokens(request, std::span(tokens_).subspan(sent_));
      request += static_cast<char>(tokens == nullptr);
      if (tokens) PutTokens(request, *tokens);
      MOEND_ASSIGN(const auto reply, Call(request));
      if (!reply) {  // another grammar's end took the process with it
        made_ = false;
        continue;
      }
      sent_ = tokens_.size();
      if (reply->size() != n)
        return Fail(ErrorCode::kInternal, "a grammar gave {} answers for {} tokens", reply->size(), n);
      std::vector<bool> allowed(n);
      for (std::size_t i = 0; i < n; ++i) allowed[i] = (*reply)[i] != 0;
      return allowed;
    }
    return Fail(ErrorCode::kUnsupported, "the grammar's process ended twice");
  }

  // Nothing when the process does not know this grammar.
  Expected<std::optional<std::string>> Call(const std::string& request) {
    auto reply = host_->follower.Call(request);
    if (!reply) {
      made_ = false;
      if (reply.error().code == ErrorCode::kOutOfMemory) return Forward(reply);
      return Fail(ErrorCode::kUnsupported, "the grammar cannot be followed: {}", reply.error().message);
    }
    if (!reply->empty() && (*reply)[0] == kUnknown) return std::optional<std::string>();
    if (reply->empty() || (*reply)[0] == kRefused)
      return Fail(ErrorCode::kUnsupported, "the grammar cannot be followed: {}",
                  OneLine(std::string_view(*reply).substr(1)));
    std::string_view rest = std::string_view(*reply).substr(1);
    microseconds_ += Take<int64_t>(rest);
    if (microseconds_ > kFirstMicroseconds + kMicrosecondsPerToken * std::ssize(tokens_))
      return Fail(ErrorCode::kUnsupported, "the grammar takes too long: {} ms for {} tokens",
                  microseconds_ / 1000, tokens_.size());
    return std::optional<std::string>(rest);
  }

  std::shared_ptr<GrammarHost::Impl> host_;
  uint64_t id_;
  std::string packed_;
  bool made_ = false;
  std::vector<int32_t> tokens_;  // since the beginning, or since the trigger
  std::size_t sent_ = 0;
  int64_t microseconds_ = 0;
  // Until a trigger is written:
  bool waiting_ = false;
  std::vector<std::string> triggers_;
  std::size_t longest_ = 0;
  std::string text_;
  std::vector<std::size_t> ends_;  // of the tokens' pieces in text_
};

}  // namespace

GrammarHost::GrammarHost(const GrammarVocabulary& vocabulary) : impl_(std::make_shared<Impl>(vocabulary)) {}
GrammarHost::~GrammarHost() = default;

Expected<std::unique_ptr<Grammar>> GrammarHost::Make(const GrammarSource& source,
                                                     std::vector<int32_t> begun) const {
  if (source.text.size() > kMostBytes)
    return Fail(ErrorCode::kInvalidArgument, "the grammar has {} bytes; {} are the most", source.text.size(),
                kMostBytes);
  if (source.text.find('\0') != std::string::npos)
    return Fail(ErrorCode::kInvalidArgument, "the grammar has a zero byte");
  std::string request(1, kCheck);
  request += Pack(source, begun);
  auto reply = impl_->checker.Call(request);
  if (!reply && reply.error().code == ErrorCode::kOutOfMemory) return Forward(reply);
  if (!reply) return Fail(ErrorCode::kUnsupported, "the grammar cannot be used: {}", reply.error().message);
  if (reply->empty() || (*reply)[0] != kDone)
    return Fail(ErrorCode::kInvalidArgument, "the grammar is none: {}",
                OneLine(std::string_view(*reply).substr(1)));
  std::string_view rest = std::string_view(*reply).substr(1);
  if (const auto took = Take<int64_t>(rest); took > kMostCheckMicroseconds)
    return Fail(ErrorCode::kUnsupported, "the grammar is too large: its first token takes {} ms",
                took / 1000);
  return std::make_unique<Followed>(impl_, source, begun);
}

Expected<std::string> GrammarHost::FromSchema(const std::string& schema) const {
  auto reply = impl_->checker.Call(std::string(1, kSchema) + schema);
  if (!reply && reply.error().code == ErrorCode::kOutOfMemory) return Forward(reply);
  if (!reply)
    return Fail(ErrorCode::kUnsupported, "the JSON schema cannot be used: {}", reply.error().message);
  if (reply->empty() || (*reply)[0] != kDone)
    return Fail(ErrorCode::kInvalidArgument, "the JSON schema cannot be used: {}",
                OneLine(std::string_view(*reply).substr(1)));
  return reply->substr(1 + sizeof(int64_t));
}

void GrammarHost::Start() const {
  const std::string ping(1, kPing);
  (void)impl_->checker.Call(ping);
  (void)impl_->follower.Call(ping);
}

}  // namespace moend
