// The instances of the rules, numbered: from a family and its flags at run time to a template.
#pragma once

#include "rules.h"

namespace fusedopt::FUSEDOPT_ISA {

struct FamilyEntry {
  const Family* family;
  int first_rule;  // the variant with flag bits b is rule first_rule + b
};

constexpr FamilyEntry kFamilies[] = {
    {&kAdamFamily, 0}, {&kSgdFamily, 2}, {&kRmspropFamily, 4}, {&kAdagradFamily, 8}};

constexpr int kStreamRule = 9;  // + the number of states

// Calls visit.template run<Rule>() for the rule with this number. (In CUDA kernels, too, with their
// own visitors: nvcc is not to ask whether the host's would run there.)
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class Visitor>
FUSEDOPT_HD inline void select_rule(int rule, Visitor&& visit) {
  switch (rule) {
    case 0: return visit.template run<Adam<T, false>>();
    case 1: return visit.template run<Adam<T, true>>();
    case 2: return visit.template run<Sgd<T, false>>();
    case 3: return visit.template run<Sgd<T, true>>();
    case 4: return visit.template run<Rmsprop<T, false, false>>();
    case 5: return visit.template run<Rmsprop<T, true, false>>();
    case 6: return visit.template run<Rmsprop<T, false, true>>();
    case 7: return visit.template run<Rmsprop<T, true, true>>();
    case 8: return visit.template run<Adagrad<T>>();
  }
}

// The same, for the rules that compute nothing, too.
template <class T, class Visitor>
inline void select_rule_or_stream(int rule, Visitor&& visit) {
  switch (rule - kStreamRule) {
    case 0: return visit.template run<Stream<T, 0>>();
    case 1: return visit.template run<Stream<T, 1>>();
    case 2: return visit.template run<Stream<T, 2>>();
    case 3: return visit.template run<Stream<T, 3>>();
    default: return select_rule<T>(rule, visit);
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
