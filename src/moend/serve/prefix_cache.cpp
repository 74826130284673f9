#include "moend/serve/prefix_cache.h"

#include <algorithm>

namespace moend::serve {
namespace {

std::size_t CommonLength(std::span<const int32_t> a, std::span<const int32_t> b) {
  return static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

}  // namespace

std::shared_ptr<Prefix> PrefixCache::Find(const std::string& scope, std::span<const int32_t> tokens,
                                          int64_t most) {
  const auto root = roots_.find(scope);
  if (root == roots_.end()) return nullptr;
  tokens = tokens.first(std::min(tokens.size(), static_cast<std::size_t>(std::max<int64_t>(most, 0))));
  std::shared_ptr<Prefix> best;
  for (const Node* node = &root->second; node;) {
    if (node->prefix) best = node->prefix;
    if (tokens.empty()) break;
    const auto child = node->children.find(tokens[0]);
    if (child == node->children.end() ||
        CommonLength(child->second->edge, tokens) < child->second->edge.size())
      break;
    node = child->second.get();
    tokens = tokens.subspan(node->edge.size());
  }
  if (best) best->last_used = ++clock_;
  return best;
}

std::shared_ptr<Prefix> PrefixCache::Insert(const std::string& scope, std::unique_ptr<Context> context,
                                            int level, std::optional<std::vector<int32_t>> tail) {
  std::span<const int32_t> tokens = context->tokens();
  Node* node = &roots_[scope];
  while (!tokens.empty()) {
    auto& child = node->children[tokens[0]];
    if (!child) {
      child = std::make_unique<Node>();
      child->edge.assign(tokens.begin(), tokens.end());
    }
    const std::size_t common = CommonLength(child->edge, tokens);
    if (common < child->edge.size()) {  // the new prefix leaves the edge halfway
      auto middle = std::make_unique<Node>();
      middle->edge.assign(child->edge.begin(), child->edge.begin() + static_cast<std::ptrdiff_t>(common));
      child->edge.erase(child->edge.begin(), child->edge.begin() + static_cast<std::ptrdiff_t>(common));
      const int32_t first = child->edge[0];
      middle->children[first] = std::move(child);
      child = std::move(middle);
    }
    node = child.get();
    tokens = tokens.subspan(common);
  }
  if (node->prefix) {
    if (tail) {
      node->prefix->answered = true;
      node->prefix->tail = std::move(*tail);
    }
    if (node->prefix->level > level) {
      node->prefix->context = std::move(context);
      node->prefix->level = level;
      node->prefix->stuck = false;
    }
    node->prefix->last_used = ++clock_;
    return node->prefix;
  }
  node->prefix = std::make_shared<Prefix>(Prefix{.scope = scope,
                                                 .context = std::move(context),
                                                 .level = level,
                                                 .answered = tail.has_value(),
                                                 .tail = std::move(tail).value_or(std::vector<int32_t>()),
                                                 .last_used = ++clock_});
  all_.push_back(node->prefix);
  return node->prefix;
}

void PrefixCache::Erase(const std::shared_ptr<Prefix>& prefix) {
  const auto root = roots_.find(prefix->scope);
  if (root == roots_.end()) return;
  std::vector<Node*> path = {&root->second};
  for (std::span<const int32_t> tokens = prefix->context->tokens(); !tokens.empty();) {
    const auto child = path.back()->children.find(tokens[0]);
    if (child == path.back()->children.end() || child->second->edge.size() > tokens.size()) return;
    path.push_back(child->second.get());
    tokens = tokens.subspan(path.back()->edge.size());
  }
  if (path.back()->prefix != prefix) return;
  path.back()->prefix.reset();
  std::erase(all_, prefix);
  // Nodes without a prefix and without children go; one with a single child is joined with it.
  for (std::size_t i = path.size(); i-- > 1;) {
    Node* node = path[i];
    if (node->prefix) break;
    if (node->children.empty()) {
      path[i - 1]->children.erase(node->edge[0]);
    } else if (node->children.size() == 1) {
      auto child = std::move(node->children.begin()->second);
      child->edge.insert(child->edge.begin(), node->edge.begin(), node->edge.end());
      path[i - 1]->children[child->edge[0]] = std::move(child);
      break;
    } else {
      break;
    }
  }
  if (root->second.children.empty() && !root->second.prefix) roots_.erase(root);
}

std::shared_ptr<Prefix> PrefixCache::Oldest(const std::function<bool(const Prefix&)>& eligible) const {
  std::shared_ptr<Prefix> oldest;
  bool oldest_forked = false;
  for (const auto& p : all_) {
    if (!eligible(*p)) continue;
    // Beside the two of the tree, owners are running forks: its pages stay alive with them.
    const bool forked = p.use_count() > 2;
    if (!oldest || std::pair(forked, p->last_used) < std::pair(oldest_forked, oldest->last_used)) {
      oldest = p;
      oldest_forked = forked;
    }
  }
  return oldest;
}

int64_t PrefixCache::tokens() const {
  int64_t n = 0;
  for (const auto& p : all_) n += p->length();
  return n;
}

}  // namespace moend::serve
