#include "overlap.h"

#include <algorithm>

namespace fusedopt {

void Overlaps::add(const void* data, int64_t bytes, int32_t entry) {
  const char* begin = static_cast<const char*>(data);
  if (bytes > 0) extents_.push_back({begin, begin + bytes, entry});
}

void Overlaps::find(int32_t entries) {
  if (extents_ == checked_ && size_t(entries) == overlapping_.size()) return;
  checked_ = extents_;
  overlapping_.assign(entries, false);
  any_ = false;
  std::vector<Extent> sorted = extents_;
  std::sort(sorted.begin(), sorted.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* farthest = nullptr;
  for (const Extent& extent : sorted) {
    if (farthest != nullptr && extent.begin < farthest->end) {
      overlapping_[extent.entry] = overlapping_[farthest->entry] = any_ = true;
    }
    if (farthest == nullptr || extent.end > farthest->end) farthest = &extent;
  }
}

}  // namespace fusedopt
