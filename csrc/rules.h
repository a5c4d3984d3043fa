// THE MATH. Every update rule, once, for every processor.
//
// A rule is built from the group's hyper-parameters and the parameter's step number, in double,
// as stock torch computes its scalars; it is then applied to each element in the parameter's
// arithmetic type T (double for float64 parameters, float for all others):
//
//     Rule<T> rule(hyper, step, first);
//     rule(p, g, s);       // p: weight, g: gradient, s: the rule's state, all read and written
//
// Elements are numbers of that type or of another kind, E, that computes with its values (quick.h).
// (Rules can also be left uninitialized, to be assigned later.) The gradient has been unscaled and
// signed already (gradient.h), and whatever happens to the weight on its way to memory happens
// afterwards (store.h). No rule knows of data types, layouts, threads or devices.
//
// The build forbids the compiler to contract a * b + c into a fused multiply-add by itself; the
// rules say where one rounding is meant (multiply_add), mostly where stock torch's kernels have
// it. Division and square root round correctly everywhere. So a rule gives the same bits on every
// processor that has the instruction; but the constructors call pow() in double, in which a GPU's
// library may differ from the CPU's by an ulp or two: float64 parameters may show it.
#pragma once

#include <math.h>

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

// What the Python side must know of a rule. A family is one optimizer class with variants: the
// group options named in `flags` (true when not zero) select the variant, flag i counting 2^i, and
// with it the states that exist. Hyper-parameters are listed in the order in which the
// constructors below read them; "betas.0" is the first element of the option "betas", and
// "amsgrad?" is 1 or 0 as that option is true or not.
struct StateInfo {
  const char* name;
  int flag;     // exists when this flag is set; -1: always
  bool square;  // an average or sum of squares: never negative
};

struct Family {
  const char* name;
  const char* hyper[8];
  const char* flags[2];
  StateInfo states[3];
  bool counts_steps;        // keeps state["step"]
  bool first_writes_state;  // a missing state[0] is written, not read, by the first update
  int first_hyper;          // unless this one is 0, that is not the same as reading zeros
};

// g + l2 * p, and exactly g when there is no decay, whatever p is.
template <class T>
struct L2Penalty {
  T l2;
  Gate<T> gate;

  L2Penalty() = default;
  FUSEDOPT_HD explicit L2Penalty(double weight_decay)
      : l2(weight_decay != 0 ? T(weight_decay) : T(-0.0)), gate(weight_decay != 0) {}

  template <class E>
  FUSEDOPT_ELEMENT E operator()(E p, E g) const {
    return multiply_add(l2, gate(p), g);
  }
};

// Adam: Kingma & Ba 2015, Algorithm 1. AdamW: Loshchilov & Hutter 2019, Algorithm 2, which decays
// the weight itself ("decoupled") where Adam adds the decay to the gradient.
// AMSGrad: Reddi, Kale & Kumar 2018, Algorithm 2.
constexpr Family kAdamFamily = {
    "adam",
    {"lr", "betas.0", "betas.1", "eps", "weight_decay", "decoupled_weight_decay?"},
    {"amsgrad?"},
    {{"exp_avg", -1, false}, {"exp_avg_sq", -1, true}, {"max_exp_avg_sq", 0, true}},
    true,
    false,
    -1};

template <class T, bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool is_square(int k) { return kAdamFamily.states[k].square; }

  L2Penalty<T> penalty;
  T keep, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;

  Adam() = default;
  FUSEDOPT_HD Adam(const double* h, double step, bool /*first*/) : penalty(h[5] != 0 ? 0 : h[4]) {
    const double lr = h[0], beta1 = h[1], b2 = h[2];
    // Kingma & Ba, section 2: both bias corrections move into the step size, here with eps scaled
    // by the same factor, which keeps the published formula exactly and saves a division:
    //   lr * m_hat / (sqrt(v_hat) + eps),  m_hat = m / (1 - beta1^t),  v_hat = v / (1 - beta2^t)
    const double bias1 = 1 - pow(beta1, step);
    const double root_bias2 = sqrt(1 - pow(b2, step));
    keep = T(h[5] != 0 ? 1 - lr * h[4] : 1);
    one_minus_beta1 = T(1 - beta1);
    beta2 = T(b2);
    one_minus_beta2 = T(1 - b2);
    step_size = T(lr * root_bias2 / bias1);
    eps = T(h[3] * root_bias2);
  }

  template <class E>
  FUSEDOPT_ELEMENT void operator()(E& p, E g, E* s) const {
    g = penalty(p, g);
    p *= keep;
    s[0] = interpolate(s[0], g, one_minus_beta1);
    s[1] = multiply_add(one_minus_beta2 * g, g, beta2 * s[1]);
    E v = s[1];
    if constexpr (kAmsgrad) v = s[2] = maximum(s[2], v);
    p -= step_size * s[0] / (square_root(v) + eps);
  }
};

// SGD with momentum as Sutskever et al. 2013, in torch's form: the buffer starts as the first
// gradient, undampened, and the learning rate multiplies it at every step. With dampening equal
// to momentum it is the exponentially weighted average s_t = b s_(t-1) + (1 - b) g_t, s_1 = g_1.
constexpr Family kSgdFamily = {"sgd",
                               {"lr", "momentum", "dampening", "weight_decay", "nesterov?"},
                               {"momentum"},
                               {{"momentum_buffer", 0, false}},
                               false,
                               true,
                               2};

template <class T, bool kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr bool is_square(int k) { return kSgdFamily.states[k].square; }

  L2Penalty<T> penalty;
  T lr, momentum, gain, lookahead;
  Gate<T> buffer, direct;

  Sgd() = default;
  FUSEDOPT_HD Sgd(const double* h, double /*step*/, bool first)
      : penalty(h[3]), buffer(!first), direct(h[4] != 0) {
    lr = T(h[0]);
    momentum = T(h[1]);
    gain = T(first ? 1 : 1 - h[2]);
    lookahead = T(h[4] != 0 ? h[1] : 1);
  }

  template <class E>
  FUSEDOPT_ELEMENT void operator()(E& p, E g, E* s) const {
    g = penalty(p, g);
    if constexpr (kMomentum) {
      // Before the first update s[0] is whatever the memory held.
      s[0] = multiply_add(gain, g, momentum * buffer(s[0]));
      g = multiply_add(lookahead, s[0], direct(g));  // Nesterov; without, s[0] itself
    }
    p = multiply_add(-lr, g, p);
  }
};

// RMSprop: Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, equations 38 to 45.
// As in torch, eps is added to the root, not under it.
constexpr Family kRmspropFamily = {
    "rmsprop",
    {"lr", "alpha", "eps", "weight_decay", "momentum"},
    {"momentum", "centered?"},
    {{"square_avg", -1, true}, {"momentum_buffer", 0, false}, {"grad_avg", 1, false}},
    true,
    false,
    -1};

template <class T, bool kMomentum, bool kCentered>
struct Rmsprop {
  static constexpr int kStates = 1 + kMomentum + kCentered;
  static constexpr int kGradAvg = 1 + kMomentum;
  static constexpr bool is_square(int k) {
    return kRmspropFamily.states[k != 0 && !kMomentum ? k + 1 : k].square;
  }

  L2Penalty<T> penalty;
  T lr, alpha, one_minus_alpha, eps, momentum;

  Rmsprop() = default;
  FUSEDOPT_HD Rmsprop(const double* h, double /*step*/, bool /*first*/) : penalty(h[3]) {
    lr = T(h[0]);
    alpha = T(h[1]);
    one_minus_alpha = T(1 - h[1]);
    eps = T(h[2]);
    momentum = T(h[4]);
  }

  template <class E>
  FUSEDOPT_ELEMENT void operator()(E& p, E g, E* s) const {
    g = penalty(p, g);
    s[0] = multiply_add(one_minus_alpha * g, g, alpha * s[0]);
    E v = s[0];
    if constexpr (kCentered) {
      s[kGradAvg] = interpolate(s[kGradAvg], g, one_minus_alpha);
      v = multiply_add(-s[kGradAvg], s[kGradAvg], v);
    }
    const E denominator = square_root(v) + eps;
    if constexpr (kMomentum) {
      s[1] = momentum * s[1] + g / denominator;
      p = multiply_add(-lr, s[1], p);
    } else {
      p -= lr * g / denominator;
    }
  }
};

// Adagrad: Duchi, Hazan & Singer 2011, the diagonal form of figure 1. The learning rate decays as
// lr / (1 + lr_decay (t - 1)).
constexpr Family kAdagradFamily = {
    "adagrad", {"lr", "lr_decay", "eps", "weight_decay"}, {}, {{"sum", -1, true}}, true, false, -1};

template <class T>
struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr bool is_square(int k) { return kAdagradFamily.states[k].square; }

  L2Penalty<T> penalty;
  T lr, eps;

  Adagrad() = default;
  FUSEDOPT_HD Adagrad(const double* h, double step, bool /*first*/) : penalty(h[3]) {
    lr = T(h[0] / (1 + (step - 1) * h[1]));
    eps = T(h[2]);
  }

  template <class E>
  FUSEDOPT_ELEMENT void operator()(E& p, E g, E* s) const {
    g = penalty(p, g);
    s[0] = multiply_add(g, g, s[0]);
    p -= lr * g / (square_root(s[0]) + eps);
  }
};

// No optimizer: reads and writes what an optimizer with this many states does, and computes next
// to nothing. The streaming limit that benchmarks quote.
template <class T, int kN>
struct Stream {
  static constexpr int kStates = kN;
  static constexpr bool is_square(int) { return false; }

  Stream() = default;
  FUSEDOPT_HD Stream(const double*, double, bool) {}

  template <class E>
  FUSEDOPT_ELEMENT void operator()(E& p, E g, E* s) const {
    p += g;
    for (int k = 0; k < kN; ++k) s[k] += g;
  }
};

}  // namespace fusedopt::FUSEDOPT_ISA
