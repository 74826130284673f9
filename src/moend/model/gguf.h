// Reads GGUF files, versions 2 and 3, without trusting a byte of them. Every count, length, offset and size
// is checked against the file before it is used, and nothing is allocated by a number that the file only
// claims. Format: ggml's docs/gguf.md.
//
//     "GGUF" u32 version, u64 n_tensors, u64 n_keys | keys: name, type, value | tensors: name, dims, type,
//     offset | padding | tensor data, each tensor aligned
#pragma once

#include <ggml.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/mapped_file.h"

namespace moend {

enum class GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};
const char* Name(GgufType type);

// A checked value inside the file; `bytes` are its elements as stored (little endian, unaligned; a string is
// u64 length + characters).
struct GgufValue {
  GgufType type = GgufType::kUint8;  // of an element, if an array
  bool is_array = false;
  int64_t count = 1;
  std::span<const uint8_t> bytes;
};

// A tensor whose shape, type and place in the file are checked. ne[0] is the row length, a multiple of the
// type's block size; unused dimensions are 1.
struct GgufTensor {
  std::string_view name;
  ggml_type type = GGML_TYPE_F32;
  std::array<int64_t, 4> ne = {1, 1, 1, 1};
  int64_t offset = 0;  // from the start of its file
  int64_t bytes = 0;
  int64_t part = 0;               // which of GgufFile::parts() it lies in
  const uint8_t* data = nullptr;  // [bytes], in the mapping
};

// Text of the file made fit for a message: what is not ASCII as \x.., cut to a line.
std::string Escaped(std::string_view text);
// Shape as people write it: "[64, 128]"; trailing ones are left out.
std::string ShapeText(const std::array<int64_t, 4>& ne);

class GgufFile {
 public:
  // Maps the file, or reads it, and checks it as a whole; the first of a model's parts
  // (NAME-00001-of-00003.gguf) opens the others too. kCorrupt names what contradicts what, kNotFound a part
  // that is missing; kUnsupported for versions and byte orders that moend does not read.
  static Expected<GgufFile> Open(const std::string& path, bool map = true);
  // The same over bytes that the caller keeps alive; `path` is for messages.
  static Expected<GgufFile> Parse(std::span<const uint8_t> file, const std::string& path);

  const std::string& path() const { return path_; }
  // The bytes of each part; one unless the model is split.
  std::span<const std::span<const uint8_t>> parts() const { return parts_; }
  int64_t total_bytes() const;
  // kCorrupt when a part is another file by now, or was written to. For who has read them by their names once
  // more.
  Expected<void> CheckUnchanged() const;
  std::span<const GgufTensor> tensors() const { return tensors_; }
  const GgufTensor* FindTensor(std::string_view name) const;
  const GgufValue* Find(std::string_view key) const;

  // Values by key. A missing key is kCorrupt where no fallback is given, a wrong type or a value outside
  // [low, high] is kCorrupt too; integers may be stored in any integer type.
  Expected<int64_t> Integer(std::string_view key, int64_t low, int64_t high,
                            std::optional<int64_t> fallback = {}) const;
  // One number, or an array of `count` equal numbers (some files repeat a number for every layer).
  Expected<int64_t> SameInteger(std::string_view key, int64_t count, int64_t low, int64_t high,
                                std::optional<int64_t> fallback = {}) const;
  Expected<float> Real(std::string_view key, std::optional<float> fallback = {}) const;  // finite
  Expected<bool> Boolean(std::string_view key, bool fallback) const;
  // An array of `count` booleans (or of integers, of which 0 is false).
  Expected<std::vector<bool>> Booleans(std::string_view key, int64_t count) const;
  // An array of `count` integers from low to high.
  Expected<std::vector<int64_t>> Integers(std::string_view key, int64_t count, int64_t low,
                                          int64_t high) const;
  Expected<std::string_view> String(std::string_view key,
                                    std::optional<std::string_view> fallback = {}) const;
  // Array elements; a missing key is an empty list.
  Expected<std::vector<std::string_view>> Strings(std::string_view key) const;

 private:
  friend class GgufParser;
  std::string path_;
  Expected<void> AddParts(bool map);
  std::vector<MappedFile> mappings_;       // none where the caller keeps the bytes
  std::vector<std::string> mapped_paths_;  // of each
  std::vector<std::span<const uint8_t>> parts_;
  std::unordered_map<std::string_view, GgufValue> values_;  // names and values point into parts_
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, int64_t> tensor_index_;
};

// Most keys and tensors a file may have; real ones have some dozen and a few thousand. The bound keeps the
// quadratic look-ups of other readers of the same file short.
inline constexpr int64_t kMaxGgufKeys = 1 << 12;
inline constexpr int64_t kMaxGgufTensors = 1 << 14;
// Most elements of an array; the longest real ones have an entry for each token or merge.
inline constexpr int64_t kMaxGgufArray = 1 << 24;

}  // namespace moend
