#include "overlap.h"

#include <algorithm>

namespace fusedopt {

void Overlaps::add(const void* data, int64_t bytes, int32_t entry) {
  const char* begin = static_cast<const char*>(data);
  if (bytes > 0) extents_.push_back({begin, begin + bytes, entry});
}

bool Overlaps::find(int32_t entries) {
  any_reader_ = false;
  if (extents_ == checked_ && size_t(entries) == written_.size()) {
    overlapping_ = written_;
    return false;
  }
  checked_ = sorted_ = extents_;
  overlapping_.assign(entries, false);
  any_ = false;
  std::sort(sorted_.begin(), sorted_.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  farthest_.clear();
  const Extent* farthest = nullptr;
  for (const Extent& extent : sorted_) {
    if (farthest != nullptr && extent.begin < farthest->end) {
      overlapping_[extent.entry] = overlapping_[farthest->entry] = any_ = true;
    }
    if (farthest == nullptr || extent.end > farthest->end) farthest = &extent;
    farthest_.push_back(farthest->end);
  }
  written_ = overlapping_;
  return true;
}

void Overlaps::add_reader(const void* data, int64_t bytes, int32_t entry) {
  if (bytes <= 0) return;
  const char *begin = static_cast<const char*>(data), *end = begin + bytes;
  const auto later =
      std::lower_bound(sorted_.begin(), sorted_.end(), end,
                       [](const Extent& extent, const char* at) { return extent.begin < at; });
  for (size_t i = later - sorted_.begin(); i > 0 && farthest_[i - 1] > begin; --i) {
    if (sorted_[i - 1].end <= begin) continue;
    overlapping_[entry] = overlapping_[sorted_[i - 1].entry] = any_reader_ = true;
  }
}

}  // namespace fusedopt
