#include "moend/serve/response.h"

#include <random>

namespace moend::serve {
namespace {

std::string Event(const OrderedJson& j) {
  return "data: " + Dump(j) + "\n\n";
}

OrderedJson Bytes(std::string_view piece) {
  OrderedJson bytes = OrderedJson::array();
  for (const char c : piece) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

OrderedJson ChatLogprobs(const std::vector<TokenReport>& tokens) {
  OrderedJson content = OrderedJson::array();
  for (const TokenReport& t : tokens) {
    OrderedJson top = OrderedJson::array();
    for (std::size_t i = 0; i < t.picked.top.size(); ++i)
      top.push_back({{"token", t.top_pieces[i]},
                     {"logprob", t.picked.top[i].second},
                     {"bytes", Bytes(t.top_pieces[i])}});
    content.push_back({{"token", t.piece},
                       {"logprob", t.picked.logprob},
                       {"bytes", Bytes(t.piece)},
                       {"top_logprobs", std::move(top)}});
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

// As OpenAI writes it where a name has to be text: two tokens that are parts of characters stay apart.
std::string TokenName(const std::string& piece) {
  if (IsUtf8(piece)) return piece;
  std::string name = "bytes:";
  for (const char c : piece) name += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return name;
}

OrderedJson CompletionLogprobs(const std::vector<TokenReport>& tokens) {
  OrderedJson out = {{"tokens", OrderedJson::array()},
                     {"token_logprobs", OrderedJson::array()},
                     {"top_logprobs", OrderedJson::array()},
                     {"text_offset", OrderedJson::array()}};
  for (const TokenReport& t : tokens) {
    out["tokens"].push_back(TokenName(t.piece));
    out["token_logprobs"].push_back(t.picked.logprob);
    OrderedJson top = OrderedJson::object();
    for (std::size_t i = 0; i < t.picked.top.size(); ++i)
      top[TokenName(t.top_pieces[i])] = t.picked.top[i].second;
    out["top_logprobs"].push_back(std::move(top));
    out["text_offset"].push_back(t.offset);
  }
  return out;
}

OrderedJson Frame(const AnswerHead& head, bool chunk) {
  OrderedJson j;
  j["id"] = head.id;
  j["object"] = head.chat ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  j["created"] = head.created;
  j["model"] = head.model;
  j["system_fingerprint"] = head.fingerprint;
  return j;
}

OrderedJson Chunk(const AnswerHead& head, OrderedJson delta, OrderedJson logprobs, OrderedJson reason) {
  OrderedJson j = Frame(head, true);
  OrderedJson choice = {{"index", 0}};
  if (head.chat) {
    choice["delta"] = std::move(delta);
  } else {
    choice["text"] = std::move(delta);
  }
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = std::move(reason);
  j["choices"] = OrderedJson::array({std::move(choice)});
  if (head.include_usage) j["usage"] = nullptr;
  return j;
}

// Whole ones have no index; of parts, only the first has id and name.
OrderedJson Calls(const std::vector<AnswerDelta::Call>& calls, bool whole) {
  OrderedJson list = OrderedJson::array();
  for (const AnswerDelta::Call& c : calls) {
    OrderedJson call = OrderedJson::object();
    if (!whole) call["index"] = c.index;
    if (!c.name.empty()) {
      call["id"] = c.id;
      call["type"] = "function";
      call["function"]["name"] = c.name;
    }
    call["function"]["arguments"] = c.arguments;
    list.push_back(std::move(call));
  }
  return list;
}

double PerSecond(int64_t n, double ms) {
  return ms > 0 ? static_cast<double>(n) * 1000 / ms : 0;
}

}  // namespace

std::string RandomId(std::string_view prefix) {
  constexpr std::string_view kAlphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  thread_local std::mt19937_64 random{std::random_device{}()};
  std::string id(prefix);
  for (int i = 0; i < 24; ++i) id += kAlphabet[random() % kAlphabet.size()];
  return id;
}

OrderedJson UsageJson(const Outcome& o) {
  return {{"prompt_tokens", o.prompt_tokens},
          {"completion_tokens", o.generated_tokens},
          {"total_tokens", o.prompt_tokens + o.generated_tokens},
          {"prompt_tokens_details", {{"cached_tokens", o.cached_tokens}}}};
}

OrderedJson TimingsJson(const Outcome& o, bool layers) {
  const int64_t read = o.prompt_tokens - o.cached_tokens;
  OrderedJson t = {{"cache_n", o.cached_tokens},
                   {"prompt_n", read},
                   {"prompt_ms", o.prompt_ms},
                   {"prompt_per_second", PerSecond(read, o.prompt_ms)},
                   {"predicted_n", o.generated_tokens},
                   {"predicted_ms", o.predicted_ms},
                   // The first token comes out of the prefill.
                   {"predicted_per_second", PerSecond(o.generated_tokens - 1, o.predicted_ms)},
                   {"queue_ms", o.queue_ms}};
  OrderedJson& kv = t["kv"];
  kv = {{"bytes", o.kv.bytes},
        {"full_bytes", o.kv.bytes_full},
        {"ratio", o.kv.compression()},
        {"tokens", o.prompt_tokens + o.generated_tokens}};
  if (layers) {
    kv["layers"] = OrderedJson::array();
    for (const LayerKvStats& l : o.kv.layers)
      kv["layers"].push_back({{"keep", l.expert.keep},
                              {"k_bits", l.expert.k_bits},
                              {"v_bits", l.expert.v_bits},
                              {"tokens", l.tokens},
                              {"bytes", l.bytes}});
  }
  return t;
}

OrderedJson WholeAnswer(const AnswerHead& head, const AnswerDelta& all,
                        const std::vector<TokenReport>& tokens, const Outcome& o) {
  OrderedJson j = Frame(head, false);
  OrderedJson choice = {{"index", 0}};
  OrderedJson logprobs = nullptr;
  if (head.chat) {
    OrderedJson& message = choice["message"] = {{"role", "assistant"}, {"content", all.content}};
    if (all.content.empty() && !all.calls.empty()) message["content"] = nullptr;
    if (!all.reasoning.empty()) message["reasoning_content"] = all.reasoning;
    message["refusal"] = nullptr;
    if (!all.calls.empty()) message["tool_calls"] = Calls(all.calls, /*whole=*/true);
    if (head.logprobs) logprobs = ChatLogprobs(tokens);
  } else {
    choice["text"] = all.content;
    if (head.logprobs) logprobs = CompletionLogprobs(tokens);
  }
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = o.finish_reason;
  j["choices"] = OrderedJson::array({std::move(choice)});
  j["usage"] = UsageJson(o);
  j["timings"] = TimingsJson(o, head.kv_layers);
  return j;
}

std::string FirstChunk(const AnswerHead& head) {
  if (!head.chat) return {};
  return Event(Chunk(head, {{"role", "assistant"}, {"content", ""}}, nullptr, nullptr));
}

std::string DeltaChunk(const AnswerHead& head, const AnswerDelta& delta,
                       const std::vector<TokenReport>& tokens) {
  OrderedJson logprobs = nullptr;
  if (head.logprobs) logprobs = head.chat ? ChatLogprobs(tokens) : CompletionLogprobs(tokens);
  OrderedJson content = delta.content;
  if (head.chat) {
    content = OrderedJson::object();
    if (!delta.reasoning.empty()) content["reasoning_content"] = delta.reasoning;
    if (!delta.content.empty() || (delta.reasoning.empty() && delta.calls.empty()))
      content["content"] = delta.content;
    if (!delta.calls.empty()) content["tool_calls"] = Calls(delta.calls, /*whole=*/false);
  }
  return Event(Chunk(head, std::move(content), std::move(logprobs), nullptr));
}

std::string LastChunks(const AnswerHead& head, const Outcome& o) {
  OrderedJson last =
      Chunk(head, head.chat ? OrderedJson::object() : OrderedJson(""), nullptr, o.finish_reason);
  last["timings"] = TimingsJson(o, head.kv_layers);
  std::string out = Event(last);
  if (head.include_usage) {
    OrderedJson usage = Frame(head, true);
    usage["choices"] = OrderedJson::array();
    usage["usage"] = UsageJson(o);
    out += Event(usage);
  }
  return out + "data: [DONE]\n\n";
}

std::string ErrorChunk(const ApiError& error) {
  return "data: " + ToJson(error) + "\n\n";
}

}  // namespace moend::serve
