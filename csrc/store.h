// Between memory and arithmetic: how an element is read from its storage format and written back.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

template <class T, class Stored>
FUSEDOPT_HD inline T load(const Stored& from) {
  return narrow(widen(from), T{});
}

template <class T, class Stored>
FUSEDOPT_HD inline void store(T value, Stored& to) {
  to = narrow(value, Stored{});
}

}  // namespace fusedopt::FUSEDOPT_ISA
