// Which parameters share memory with another one.
//
// Threads would race on shared memory, where torch updates one parameter after the other. What is
// only read, as gradients are, may be shared with what is only read.
#pragma once

#include <stdint.h>

#include <vector>

namespace fusedopt {

class Overlaps {
 public:
  void clear() { extents_.clear(); }
  void add(const void* data, int64_t bytes, int32_t entry);

  // Finds the entries of which one extent overlaps another. Sorts only when something changed
  // since the last call; returns whether it has.
  bool find(int32_t entries);

  // After that: adds the entry, and those whose extents overlap what it reads.
  void add_reader(const void* data, int64_t bytes, int32_t entry);

  bool any() const { return any_ || any_reader_; }
  bool any_reader() const { return any_reader_; }
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
  std::vector<Extent> sorted_;               // by where they begin,
  std::vector<const char*> farthest_;        // and how far those up to each reach
  std::vector<bool> overlapping_, written_;  // the latter without readers
  bool any_ = false, any_reader_ = false;
};

}  // namespace fusedopt
