// Waiting requests: bounded, and served round robin over the keys, so that a key with a thousand requests
// delays another key's only one by a single turn. Not thread safe.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

namespace moend::serve {

template <class T>
class FairQueue {
 public:
  FairQueue(int64_t most, int64_t most_per_key) : most_(most), most_per_key_(most_per_key) {}

  bool Push(const std::string& key, T item) {
    if (size_ >= most_) return false;
    std::deque<T>& lane = lanes_[key];
    if (std::ssize(lane) >= most_per_key_) return false;
    if (lane.empty()) turns_.push_back(key);
    lane.push_back(std::move(item));
    ++size_;
    return true;
  }

  // Precondition: not empty.
  T Pop() {
    const std::string key = std::move(turns_.front());
    turns_.pop_front();
    const auto lane = lanes_.find(key);
    T item = std::move(lane->second.front());
    lane->second.pop_front();
    --size_;
    if (lane->second.empty()) {
      lanes_.erase(lane);
    } else {
      turns_.push_back(key);
    }
    return item;
  }

  // Takes out the items for which `gone`, which must not throw, is true.
  void RemoveIf(const std::function<bool(const T&)>& gone) {
    for (auto lane = lanes_.begin(); lane != lanes_.end();) {
      size_ -= static_cast<int64_t>(std::erase_if(lane->second, gone));
      if (lane->second.empty()) {
        std::erase(turns_, lane->first);
        lane = lanes_.erase(lane);
      } else {
        ++lane;
      }
    }
  }

  bool empty() const { return size_ == 0; }
  int64_t size() const { return size_; }

 private:
  int64_t most_, most_per_key_, size_ = 0;
  std::map<std::string, std::deque<T>> lanes_;
  std::deque<std::string> turns_;  // keys with items, next first
};

}  // namespace moend::serve
