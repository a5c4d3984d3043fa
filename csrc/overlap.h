// Which parameters share memory with another one.
//
// Threads would race on shared memory, where torch updates one parameter after the other.
#pragma once

#include <stdint.h>

#include <vector>

namespace fusedopt {

class Overlaps {
 public:
  void clear() { extents_.clear(); }
  void add(const void* data, int64_t bytes, int32_t entry);

  // Finds the entries of which one extent overlaps another. Sorts only when something changed
  // since the last call.
  void find(int32_t entries);

  bool any() const { return any_; }
  bool has(int32_t entry) const { return overlapping_[entry]; }

 private:
  struct Extent {
    const char* begin;
    const char* end;
    int32_t entry;
    bool operator==(const Extent& other) const {
      return begin == other.begin && end == other.end && entry == other.entry;
    }
  };

  std::vector<Extent> extents_, checked_;
  std::vector<bool> overlapping_;
  bool any_ = false;
};

}  // namespace fusedopt
