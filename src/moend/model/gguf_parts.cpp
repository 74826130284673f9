// A model that is split over several files, as llama-gguf-split writes them: the first has all keys, and each
// has some of the tensors.
#include <utility>

#include "moend/model/gguf.h"

namespace moend {
namespace {

constexpr int64_t kMostParts = 1024;

std::string Suffix(int64_t part, int64_t count) {
  return fmt::format("-{:05}-of-{:05}.gguf", part + 1, count);
}

}  // namespace

int64_t GgufFile::total_bytes() const {
  int64_t bytes = 0;
  for (const auto& part : parts_) bytes += static_cast<int64_t>(part.size());
  return bytes;
}

Expected<void> GgufFile::CheckUnchanged() const {
  for (std::size_t i = 0; i < mappings_.size(); ++i) MOEND_TRY(mappings_[i].CheckUnchanged(mapped_paths_[i]));
  return {};
}

Expected<void> GgufFile::AddParts(bool map) {
  MOEND_ASSIGN(const int64_t count, Integer("split.count", 0, kMostParts, 0));
  if (count <= 1) return {};
  MOEND_ASSIGN(const int64_t number, Integer("split.no", 0, count - 1));
  const std::string own = Suffix(number, count);
  if (!path_.ends_with(own))
    return Fail(ErrorCode::kInvalidArgument,
                "{} is part {} of {} of a model, so its name must end with {} for the others to be found",
                path_, number + 1, count, own);
  const std::string stem = path_.substr(0, path_.size() - own.size());
  if (number != 0)
    return Fail(ErrorCode::kInvalidArgument, "{} is part {} of {} of a model; name the first, {}{}", path_,
                number + 1, count, stem, Suffix(0, count));
  for (int64_t p = 1; p < count; ++p) {
    const std::string path = stem + Suffix(p, count);
    auto mapping = MappedFile::Open(path, map);
    if (!mapping && mapping.error().code == ErrorCode::kNotFound)
      return Fail(ErrorCode::kNotFound, "{} is the first of {} parts of a model; part {}, {}, is missing",
                  path_, count, p + 1, path);
    if (!mapping) return Forward(mapping);
    MOEND_ASSIGN(GgufFile part, Parse(mapping->bytes(), path));
    MOEND_ASSIGN(const int64_t part_count, part.Integer("split.count", 0, INT64_MAX, 0));
    MOEND_ASSIGN(const int64_t part_number, part.Integer("split.no", 0, INT64_MAX, 0));
    if (part_count != count || part_number != p)
      return Fail(ErrorCode::kCorrupt, "{} says that it is part {} of {}, not {} of {} as its name has it",
                  path, part_number + 1, part_count, p + 1, count);
    for (GgufTensor tensor : part.tensors_) {
      tensor.part = p;
      if (!tensor_index_.emplace(tensor.name, static_cast<int64_t>(tensors_.size())).second)
        return Fail(ErrorCode::kCorrupt,
                    "{} has the tensor {}, which an earlier part has too; are they of one model?", path,
                    Escaped(tensor.name));
      tensors_.push_back(tensor);
    }
    parts_.push_back(mapping->bytes());
    mappings_.push_back(std::move(*mapping));
    mapped_paths_.push_back(path);
  }
  MOEND_ASSIGN(const int64_t tensors,
               Integer("split.tensors.count", 0, INT64_MAX, static_cast<int64_t>(tensors_.size())));
  if (tensors != static_cast<int64_t>(tensors_.size()))
    return Fail(ErrorCode::kCorrupt,
                "{} is the first of {} parts with {} tensors in all, but they have {}; are they of "
                "one model?",
                path_, count, tensors, tensors_.size());
  return {};
}

}  // namespace moend
