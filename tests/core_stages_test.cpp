// What a step does around the rule, and how weights, states and gradients are kept. Part of
// core_test.cpp, which includes it for the sake of its helpers.

namespace {

float from_bits(uint32_t bits) { return base::bit_cast<float>(bits); }
uint32_t bits_of(float x) { return base::bit_cast<uint32_t>(x); }
bool same_float(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// The bits of a weight of 16 bits.
uint16_t code_of(const Tensor& tensor, int64_t i) { return tensor.as<uint16_t>(i); }
float to_half(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? base::rounded<base::BFloat16>(x)
                                   : base::rounded<base::Float16>(x);
}
float half_value(uint16_t code, DType dtype) {
  return dtype == DType::kBFloat16 ? base::widen(base::BFloat16{code})
                                   : base::widen(base::Float16{code});
}

// State k as state 0, which is what encode_state and decode_state know.
template <class F>
void with_state(const Step& step, size_t i, int k, F&& f) {
  Task task = step.task(i);
  Extras extras = *task.extras;
  task.state[0] = task.state[k];
  extras.scale[0] = extras.scale[k];
  extras.square[0] = extras.square[k];
  task.extras = &extras;
  f(task);
}

std::vector<float> whole_weights(const Kernels* kernels, const Step& step, size_t i) {
  std::vector<float> whole(step.task(i).numel);
  kernels->join_weights(step.task(i), whole.data());
  return whole;
}

// A dense model with all that the setup asks for; what it does not ask for holds garbage.
Model make_model(const Setup& setup, const std::vector<int64_t>& sizes) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  Model model;
  for (int64_t n : sizes) {
    const DType dtypes[] = {setup.param, setup.grad,     setup.state, setup.state,
                            setup.state, setup.hidden(), setup.ema,   setup.grad_sum};
    std::vector<Tensor> tensors;
    for (DType dtype : dtypes) tensors.emplace_back(dtype, n, 1);
    for (int k = 0; k < kMaxStates; ++k) {
      tensors.emplace_back(DType::kFloat32, (n + kBlock - 1) / kBlock, 1);
    }
    model.push_back(std::move(tensors));
  }
  const Step step(model, setup);
  for (size_t i = 0; i < model.size(); ++i) {
    std::vector<float> values(sizes[i]);
    for (int k = 0; k < kSlots; ++k) {
      if (k == kHidden || k >= kScale) continue;
      const bool state = k >= kState && k < kHidden;
      for (float& value : values) {
        const float x = normal(random);
        value = !state ? x : k == kState ? 2 + x * x : 0.3f + 0.05f * x * x;
      }
      if (k == kParam && setup.precision != WeightPrecision::kNearest) {
        base::kKernels.split_weights(step.task(i), values.data());
      } else if (state && setup.coded()) {
        with_state(step, i, k - kState,
                   [&](const Task& task) { base::kKernels.encode_state(task, values.data()); });
      } else {
        for (int64_t j = 0; j < sizes[i]; ++j) model[i][k].set(j, values[j]);
      }
    }
  }
  return model;
}

// The same with gaps between the elements, each tensor its own way. (8-bit states and their scales
// are always dense.)
Model spread(const Model& dense) {
  Model model;
  for (const auto& tensors : dense) {
    std::vector<Tensor> wide;
    for (int k = 0; k < kSlots; ++k) {
      const Tensor& from = tensors[k];
      const bool gaps = k < kScale && from.dtype != DType::kUInt8;
      wide.emplace_back(from.dtype, from.numel, gaps ? 2 + k % 3 : 1, gaps && k % 2 == 0 ? 37 : 0);
      for (int64_t i = 0; i < from.numel; ++i) {
        std::memcpy(wide[k].at(i), from.at(i), from.item);
      }
    }
    model.push_back(std::move(wide));
  }
  return model;
}

bool same_elements(const Model& a, const Model& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t k = 0; k < a[i].size(); ++k) {
      for (int64_t j = 0; j < a[i][k].numel; ++j) {
        if (std::memcmp(a[i][k].at(j), b[i][k].at(j), a[i][k].item)) return false;
      }
    }
  }
  return true;
}

void switch_on_all_stages(Setup& setup) {
  setup.stages = {0.6, 0.5, 0.7, 0.9, true};
  setup.group.sign = -1;
  setup.group.l1 = 5;  // times the learning rate: 0.05
  setup.averages = setup.accumulated = true;
}

// The step in small: writes out the gradients that the stages make, runs the rule alone on them,
// and does what comes after it. T is the type of all tensors.
template <class T>
void run_in_small(const Model& model, const Setup& setup, const Kernels* kernels) {
  const Stages& stages = setup.stages;
  for (const auto& tensors : model) {
    for (int64_t j = 0; j < tensors[kParam].numel; ++j) {
      T& g = tensors[kGrad].as<T>(j);
      const T sum = tensors[kGradSum].as<T>(j);
      if (setup.accumulated) g = setup.no_gradients ? sum : sum + g;
      g *= T(stages.grad_multiplier);
      const T limit = T(stages.max_grad_value);
      if (limit >= 0) g = std::min(std::max(g, -limit), limit);
      g *= T(stages.clip_coefficient * setup.group.sign);
    }
  }
  Setup plain = setup;
  plain.stages = {};
  plain.group.sign = 1;
  plain.group.l1 = 0;
  plain.averages = plain.accumulated = plain.no_gradients = false;
  Step(model, plain).update(kernels);
  const T threshold = T(setup.group.l1 * setup.group.hyper[0]);
  for (size_t i = 0; i < model.size(); ++i) {
    const double t = setup.step + double(i / 3 % 2);
    const double warm = (1 + t) / (10 + t);
    const double decay = stages.ema_warmup ? std::min(stages.ema_decay, warm) : stages.ema_decay;
    for (int64_t j = 0; j < model[i][kParam].numel; ++j) {
      T& p = model[i][kParam].as<T>(j);
      if (threshold > 0) p = std::fabs(p) <= threshold ? 0 : p - std::copysign(threshold, p);
      T& ema = model[i][kEma].as<T>(j);
      if (setup.averages) ema = T(decay * (long double)(ema) + (1 - decay) * (long double)(p));
    }
  }
}

template <class T>
void test_stages(DType dtype) {
  const std::vector<int64_t> sizes = {0, 1, 255, 256, 257, 512, 513, 1100};
  for (int rule = 0; rule < kRules; ++rule) {
    // One by one, none and all, and all of the gradient's with only accumulated ones.
    for (int stages : {0, 1, 2, 4, 8, 16, 32, 63, 96, 103}) {
      Setup setup(rule, dtype);
      setup.ema = setup.grad_sum = dtype;
      if (stages & 1) setup.stages.grad_multiplier = 0.6;
      if (stages & 2) setup.stages.max_grad_value = 0.5;
      if (stages & 4) setup.stages.clip_coefficient = 0.7, setup.group.sign = -1;
      if (stages & 8) setup.group.l1 = 5;
      setup.averages = stages & 16;
      setup.stages.ema_decay = rule % 3 == 0 ? 0.2 : 0.9;  // the warm-up is between the two
      setup.stages.ema_warmup = rule % 2 == 0;
      setup.accumulated = stages & 32;
      setup.no_gradients = stages & 64;
      const Model start = make_model(setup, sizes);
      Model base_result, fused_result;
      for (const Isa& isa : isas()) {
        Model expected = start;
        run_in_small<T>(expected, setup, isa.kernels);
        Model result = start;
        Step(result, setup).update(isa.kernels);
        for (size_t i = 0; i < start.size(); ++i) {
          expected[i][kGrad] = start[i][kGrad];  // never written
          for (int k = 0; k < kSlots; ++k) {
            if (k != kEma) {
              check(same_bits(result[i][k], expected[i][k]), isa.name, rule, stages, k);
              continue;
            }
            bool near = true;
            for (int64_t j = 0; j < sizes[i]; ++j) {
              const double x = result[i][k].get(j), y = expected[i][k].get(j);
              near = near && std::fabs(x - y) <= (sizeof(T) == 8 ? 1e-15 : 5e-7) * (1 + fabs(y));
            }
            check(near, "the average", rule, stages);
          }
        }
        for (int parts : {2, 7}) {
          Model model = start;
          Step(model, setup).update(isa.kernels, parts);
          check(same_bits(model, result), "stages in any number of parts", rule, stages, parts);
        }
        if (isa.kernels == &base::kKernels) {
          base_result = result;
          continue;
        }
        check(close(result, base_result, setup.tolerance()), "stages as base", rule, stages);
        if (fused_result.empty()) fused_result = result;
        check(same_bits(result, fused_result), "stages: avx2 and avx512 agree", rule, stages);
      }
    }
  }
}

// Adam with all stages against the formulas, in long double.
template <class T>
void test_formulas(DType dtype) {
  Setup setup(0, dtype);
  setup.ema = setup.grad_sum = dtype;
  switch_on_all_stages(setup);
  setup.group.hyper[5] = 1;  // decoupled
  const Model start = make_model(setup, {700, 1, 2, 3, 33, 333});
  for (const Isa& isa : isas()) {
    Model model = start;
    Step(model, setup).update(isa.kernels, 2);
    for (size_t i = 0; i < start.size(); ++i) {
      for (int64_t j = 0; j < start[i][kParam].numel; ++j) {
        const auto old = [&](int k) { return (long double)(start[i][k].get(j)); };
        const long double t = i < 3 ? 3 : 4, decay = (1 + t) / (10 + t);
        long double g = (old(kGradSum) + old(kGrad)) * 0.6L;
        g = std::min(std::max(g, -0.5L), 0.5L) * -0.7L;
        const long double m = 0.9L * old(kState) + 0.1L * g;
        const long double v = 0.1L * old(kState + 1) + 0.9L * g * g;
        long double p = old(kParam) * (1 - 0.01L * 0.5L);
        p -= 0.01L * (m / (1 - std::pow(0.9L, t))) / (sqrtl(v / (1 - std::pow(0.1L, t))) + 1e-6L);
        p = std::fabs(p) <= 0.05L ? 0 : p - std::copysign(0.05L, p);
        const long double expected[] = {
            p, old(kGrad), m, v, old(kState + 2), 0, decay * old(kEma) + (1 - decay) * p};
        for (int k : {int(kParam), int(kGrad), int(kState), kState + 1, kState + 2, int(kEma)}) {
          const double error = std::fabs(double(model[i][k].get(j) - expected[k]));
          check(error <= (sizeof(T) == 8 ? 1e-14 : 2e-6) * (1 + fabs(double(expected[k]))),
                "as the formulas", int(dtype), k, j);
        }
      }
    }
  }
}

void test_special_gradients() {
  const float grads[] = {kNan, kInf, -kInf, 3e38f, -3e38f, 0.5f, -0.0f};
  for (const Isa& isa : isas()) {
    const auto run = [&](float start, Setup setup) {
      Model model = make_model(setup, {7});
      for (int j = 0; j < 7; ++j) {
        model[0][kParam].as<float>(j) = start;
        model[0][kGrad].as<float>(j) = grads[j];
      }
      Step(model, setup).update(isa.kernels);
      return std::vector<float>(&model[0][kParam].as<float>(0), &model[0][kParam].as<float>(0) + 7);
    };
    const auto check_all = [&](const std::vector<float>& got, std::vector<float> expected,
                               const char* what) {
      for (int j = 0; j < 7; ++j) check(same_float(got[j], expected[j]), what, j);
    };
    Setup setup(kStream);
    setup.stages.max_grad_value = 1;
    check_all(run(0, setup), {kNan, 1, -1, 1, -1, 0.5f, 0}, "limit: nan stays, inf does not");
    setup.stages.max_grad_value = 0;
    check_all(run(1, setup), {kNan, 1, 1, 1, 1, 1, 1}, "a limit of zero");
    setup.stages.max_grad_value = -1;
    setup.stages.grad_multiplier = setup.stages.clip_coefficient = 1e-30;
    const float tiny = 3e38f * 1e-30f * 1e-30f;
    check_all(run(0, setup), {kNan, kInf, -kInf, tiny, -tiny, 0, 0},
              "the product of two factors underflows where the gradient's would not");
    setup.stages = {};
    setup.group.l1 = 50;  // a threshold of 0.5
    check_all(run(0, setup), {kNan, kInf, -kInf, 3e38f, -3e38f, 0, 0}, "shrinking");
    check_all(run(-0.25f, setup), {kNan, kInf, -kInf, 3e38f, -3e38f, 0, 0}, "shrinks to zero");
  }
}

// Every way to keep weights and states, in every number of parts, with gaps, on all sets alike.
void test_extras() {
  const std::vector<int64_t> sizes = {0, 1, 255, 256, 257, 513, 1100};
  std::vector<Setup> setups;
  for (int rule : {0, kStream + 2}) {
    for (DType state : {DType::kFloat32, DType::kBFloat16, DType::kUInt8}) {
      for (DType param : {DType::kBFloat16, DType::kFloat16}) {
        for (auto precision :
             {WeightPrecision::kNearest, WeightPrecision::kMaster, WeightPrecision::kRemainder,
              WeightPrecision::kStochastic, WeightPrecision::kKahan}) {
          if (precision == WeightPrecision::kRemainder && param == DType::kFloat16) continue;
          Setup setup(rule, param);
          setup.precision = precision;
          setup.state = state;
          setup.random_state = state == DType::kBFloat16;
          setup.ema = state == DType::kBFloat16 ? state : DType::kFloat32;
          setup.grad_sum = state == DType::kFloat32 ? param : DType::kFloat32;
          setups.push_back(setup);
        }
      }
    }
  }
  for (int rule : {1, 3, 5, 8, kStream + 3}) {
    for (DType param : kFloats) {
      Setup setup(rule, param);
      setup.state = DType::kUInt8;
      setup.ema = setup.grad_sum = param;
      setups.push_back(setup);
    }
  }
  for (size_t s = 0; s < setups.size(); ++s) {
    Setup& setup = setups[s];
    switch_on_all_stages(setup);
    // The rule that only adds has no multiply-adds, so every set gives the same bits; but for the
    // average's.
    const bool exact = setup.group.rule >= kStream;
    setup.averages = !exact;
    const Model start = make_model(setup, sizes);
    Model base_result, fused_result;
    for (const Isa& isa : isas()) {
      Model result = start;
      Step(result, setup).update(isa.kernels);
      check(!same_bits(start, result), "the kernel does something", int(s));
      for (int parts : {2, 7}) {
        Model model = start;
        Step(model, setup).update(isa.kernels, parts);
        check(same_bits(model, result), "extras in any number of parts", int(s), parts);
      }
      Model strided = spread(start);
      Step(strided, setup).update(isa.kernels, 2);
      check(same_elements(strided, result), "extras, strided", int(s));
      check_gaps(strided, int(s));
      if (isa.kernels == &base::kKernels) {
        base_result = result;
        continue;
      }
      check(exact ? same_bits(result, base_result) : close(result, base_result, setup.tolerance()),
            "extras as base", int(s));
      if (fused_result.empty()) fused_result = result;
      check(same_bits(result, fused_result), "extras: avx2 and avx512 agree", int(s));
    }
  }
  // A task is none of its neighbours' business: the same bits alone, and in a longer tensor.
  for (auto precision : {WeightPrecision::kStochastic, WeightPrecision::kKahan}) {
    Setup setup(kStream + 2, DType::kBFloat16);
    setup.precision = precision;
    setup.state = DType::kUInt8;
    const Model start = make_model(setup, {1100, 1100, 1100});
    Model all = start;
    Step(all, setup).update(&base::kKernels, 3);
    Setup alone = setup;
    ++alone.seed;
    Model one;
    one.push_back(start[1]);
    Step(one, alone).update(&base::kKernels);
    for (int k = 0; k < kSlots; ++k) check(same_bits(one[0][k], all[1][k]), "alone", k);
    Model shorter = make_model(setup, {512});
    for (int k = 0; k < kSlots; ++k) {
      for (int64_t j = 0; j < shorter[0][k].numel; ++j) {
        std::memcpy(shorter[0][k].at(j), start[0][k].at(j), shorter[0][k].item);
      }
    }
    Step(shorter, setup).update(&base::kKernels);
    for (int k = 0; k < kSlots; ++k) {
      check(!std::memcmp(shorter[0][k].block.get(), all[0][k].block.get(), shorter[0][k].bytes()),
            "the first blocks of a longer one", k);
    }
  }
}

// The whole engine: threads, and the backward walk after a measurement.
void test_threads_with_stages() {
  std::vector<Setup> setups;
  for (int s = 0; s < 4; ++s) {
    Setup setup(s == 3 ? 7 : 0, s == 3 ? DType::kFloat32 : DType::kBFloat16);
    if (s == 0) setup.precision = WeightPrecision::kRemainder;
    if (s == 1) setup.precision = WeightPrecision::kStochastic;
    if (s == 2) setup.precision = WeightPrecision::kMaster;
    if (s < 3) setup.state = DType::kUInt8;
    switch_on_all_stages(setup);
    setups.push_back(setup);
  }
  setups.emplace_back(0);  // nothing around the rule
  for (size_t s = 0; s < setups.size(); ++s) {
    const Setup& setup = setups[s];
    const Model start = make_model(setup, {100000, 3, 0, 70001, 1});
    Model expected = start;
    Step(expected, setup).update(&cpu_kernels());
    for (int threads = 1; threads <= 8; ++threads) {
      for (bool measured : {false, true}) {
        Model model = start;
        cpu_update(Step(model, setup).plan(), threads, measured);
        check(same_bits(model, expected), "stages on any number of threads", int(s), threads,
              measured);
      }
    }
  }
}

// Floats of every kind, and those around what 16 bits can tell: on, just beside and half-way
// between bfloat16 numbers.
std::vector<float> telling_floats() {
  std::vector<float> list = {kNan, -kNan, from_bits(0x7f800001), from_bits(0xffffffff)};
  std::mt19937 random(3);
  for (uint32_t upper = 0; upper < 65536; ++upper) {
    const uint32_t any = random() & 0xffff;
    for (uint32_t low : {0u, 1u, 2u, 0x7ffeu, 0x7fffu, 0x8000u, 0x8001u, 0x8002u, 0xfffeu, 0xffffu,
                         0x1000u, 0x3000u, any})
      list.push_back(from_bits(upper << 16 | low));
  }
  return list;
}

// From a whole weight to parameter and hidden part and back, for all uppers.
void test_split_and_join() {
  const std::vector<float> whole = telling_floats();
  const int64_t n = whole.size();
  for (const Isa& isa : isas()) {
    for (DType param : {DType::kBFloat16, DType::kFloat16}) {
      for (auto precision :
           {WeightPrecision::kMaster, WeightPrecision::kRemainder, WeightPrecision::kKahan}) {
        const bool bfloat = param == DType::kBFloat16;
        if (precision == WeightPrecision::kRemainder && !bfloat) continue;
        Setup setup(0, param);
        setup.precision = precision;
        const Model model = make_model(setup, {n});
        const Step step(model, setup);
        isa.kernels->split_weights(step.task(0), whole.data());
        const Tensor kept = model[0][kParam];
        const std::vector<float> joined = whole_weights(isa.kernels, step, 0);
        for (int64_t i = 0; i < n; ++i) {
          const float x = whole[i];
          const uint32_t bits = bits_of(x), low = bits & 0xffff, odd = bits >> 16 & 1;
          const float p = half_value(code_of(kept, i), param);
          if (x != x) {
            check(p != p && joined[i] != joined[i], "nan stays", int(precision), int(param), i);
            continue;
          }
          // To the nearest, and to even from the middle.
          const uint32_t nearest = (bits >> 16) + (low > 0x8000 || (low == 0x8000 && odd));
          check(bfloat ? code_of(kept, i) == nearest : same_float(p, to_half(x, param)),
                "the parameter is the nearest", int(precision), int(param), i);
          if (precision == WeightPrecision::kKahan) {
            // It is kept in 2^-16 of a unit, up to almost half of one. (Near zero, where not even a
            // unit is much, it may be lost; and there is none beyond infinity.)
            const int least = bfloat ? -70 : -24, digits = bfloat ? 7 : 10;
            const int exponent = p == 0 ? least : std::max(std::ilogb(p) - digits, least);
            double error = std::ldexp(bfloat && low != 0x8000 ? 0.5 : 1.0, exponent - 16);
            if (exponent == least) error = std::max(error, std::fabs(double(x) - p));
            check(std::isfinite(p) ? std::fabs(double(joined[i]) - x) <= error : joined[i] == p,
                  "kahan", int(param), 0, i);
          } else {
            // Exactly, but for the tie above an even number.
            const bool moves = bfloat && low == 0x8000 && !odd;
            check(bits_of(joined[i]) == bits - moves, "the whole weight", int(precision),
                  int(param), i);
          }
        }
        check(same_bits(kept, model[0][kParam]), "joining leaves the parameter", int(precision));
        if (precision == WeightPrecision::kKahan) continue;
        isa.kernels->split_weights(step.task(0), joined.data());
        check(same_bits(kept, model[0][kParam]), "a second time", int(precision));
      }
    }
  }
}

void fill_gradients(Model& model, std::mt19937& random) {
  std::normal_distribution<double> normal;
  for (auto& tensors : model) {
    for (int64_t j = 0; j < tensors[kGrad].numel; ++j) tensors[kGrad].set(j, normal(random));
  }
}

float off_tie(float x, DType param) {
  const bool moves = param == DType::kBFloat16 && (bits_of(x) & 0x1ffff) == 0x8000;
  return from_bits(bits_of(x) - moves);
}

// Weights with a hidden part train as float32 ones do: to the bit, but kahan.
void test_hidden_weights_train_like_floats() {
  const std::vector<int64_t> sizes = {1, 600, 257};
  for (const Isa& isa : isas()) {
    for (DType param : {DType::kBFloat16, DType::kFloat16}) {
      for (auto precision :
           {WeightPrecision::kMaster, WeightPrecision::kRemainder, WeightPrecision::kKahan}) {
        if (precision == WeightPrecision::kRemainder && param == DType::kFloat16) continue;
        for (int rule : {0, 3}) {
          Setup setup(rule, param);
          setup.precision = precision;
          setup.state = DType::kFloat32;
          switch_on_all_stages(setup);
          setup.group.l1 = 0.01;  // seldom zero
          setup.group.hyper[2] = 0.99;
          Model model = make_model(setup, sizes);
          Setup wide = setup;
          wide.param = DType::kFloat32;
          wide.precision = WeightPrecision::kNearest;
          Model reference = make_model(wide, sizes);
          for (size_t i = 0; i < sizes.size(); ++i) {
            for (int k = 0; k < kHidden; ++k) {
              if (k != kParam) reference[i][k] = model[i][k];
            }
            const auto whole = whole_weights(&base::kKernels, Step(model, setup), i);
            std::memcpy(reference[i][kParam].block.get(), whole.data(), 4 * whole.size());
            reference[i][kEma] = model[i][kEma];
            reference[i][kGradSum] = model[i][kGradSum];
          }
          std::mt19937 random(17);
          for (int t = 1; t <= 30; ++t) {
            setup.step = wide.step = t;
            fill_gradients(model, random);
            for (size_t i = 0; i < sizes.size(); ++i) reference[i][kGrad] = model[i][kGrad];
            Step(model, setup).update(isa.kernels);
            Step(reference, wide).update(isa.kernels);
            for (size_t i = 0; i < sizes.size(); ++i) {
              Model copy = model;  // joining is free to write
              const auto whole = whole_weights(isa.kernels, Step(copy, setup), i);
              if (precision == WeightPrecision::kKahan) {
                for (int64_t j = 0; j < sizes[i]; ++j) {
                  const float x = reference[i][kParam].as<float>(j);
                  check(std::fabs(whole[j] - x) <= t * 0x1p-23f * (1 + std::fabs(x)),
                        "kahan trains", t, int(param), j);
                }
                continue;
              }
              for (int k = kState; k < kHidden; ++k) {
                check(same_bits(model[i][k], reference[i][k]), "states", int(precision), t, k);
              }
              check(same_bits(model[i][kEma], reference[i][kEma]),
                    "the average is that of whole weights", int(precision), t);
              for (int64_t j = 0; j < sizes[i]; ++j) {
                float& x = reference[i][kParam].as<float>(j);
                x = off_tie(x, param);
                check(bits_of(whole[j]) == bits_of(x), "trains like a float", int(precision), t, j);
                check(half_value(code_of(model[i][kParam], j), param) == to_half(x, param),
                      "and shows the nearest", int(precision), t, j);
              }
            }
          }
        }
      }
    }
  }
}

// Remainder and master are the same weights, through any number of updates and on the worst of
// numbers.
void test_remainder_is_master() {
  std::vector<float> start = {kNan, kInf, -kInf};
  const uint32_t uppers[] = {0,      1,      2,      0x7f,   0x80,   0x3f7f, 0x3f80,
                             0x3f81, 0x3fff, 0x4000, 0x7f7e, 0x7f7f, 0x0100};
  for (uint32_t upper : uppers) {
    for (uint32_t low : {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}) {
      for (uint32_t sign : {0u, 1u << 31}) start.push_back(from_bits(sign | upper << 16 | low));
    }
  }
  const int64_t n = start.size();
  int ties[2][2] = {};  // by sign and by the parity of the upper half
  for (const Isa& isa : isas()) {
    for (int rule : {kStream, 0}) {
      Setup setups[] = {Setup(rule, DType::kBFloat16), Setup(rule, DType::kBFloat16)};
      std::vector<Model> models;
      for (int k = 0; k < 2; ++k) {
        setups[k].precision = k ? WeightPrecision::kRemainder : WeightPrecision::kMaster;
        setups[k].grad = setups[k].state = DType::kFloat32;
        models.push_back(make_model(setups[k], {n}));
        isa.kernels->split_weights(Step(models[k], setups[k]).task(0), start.data());
      }
      std::mt19937 random(19);
      std::vector<float> whole = start;
      for (int t = 1; t <= 300; ++t) {
        for (int64_t j = 0; j < n; ++j) {
          // To a number near by, mostly on a tie or next to one.
          const uint32_t lows[] = {0x8000, 0x8000, 0x8001, 0x7fff, 0, uint32_t(random()) >> 16};
          const uint32_t upper = (bits_of(whole[j]) >> 16) + random() % 3 - 1;
          const float target = from_bits(upper << 16 | lows[random() % 6]);
          const float g = rule == kStream ? target - whole[j] : target;
          for (Model& model : models) model[0][kGrad].as<float>(j) = g;
          const float sum = whole[j] + g;
          ties[sum < 0][bits_of(sum) >> 16 & 1] += (bits_of(sum) & 0xffff) == 0x8000 && sum == sum;
        }
        std::vector<float> wholes[2];
        for (int k = 0; k < 2; ++k) {
          setups[k].step = t;
          Step(models[k], setups[k]).update(isa.kernels);
          Model copy = models[k];
          wholes[k] = whole_weights(isa.kernels, Step(copy, setups[k]), 0);
        }
        check(same_bits(models[0][0][kParam], models[1][0][kParam]), "remainder is master", t);
        for (int64_t j = 0; j < n; ++j) {
          check(same_float(wholes[0][j], wholes[1][j]), "whole remainder is master", t, 0, j);
        }
        whole = wholes[0];
        if (t % 10 == 0) {  // from other places
          for (int64_t j = 0; j < n; ++j) {
            whole[j] = from_bits(bits_of(start[j]) ^ (random() & 0x807f8000));
          }
          for (int k = 0; k < 2; ++k) {
            isa.kernels->split_weights(Step(models[k], setups[k]).task(0), whole.data());
          }
          for (int64_t j = 0; j < n; ++j) whole[j] = off_tie(whole[j], DType::kBFloat16);
        }
      }
    }
  }
  for (auto& of_sign : ties) {
    for (int count : of_sign) check(count > 1000, "there were ties", count);
  }
}

// What a user writes into a parameter between two updates is the weight from then on.
void test_overwritten_weights() {
  std::vector<float> wholes = {kNan, kInf, -kInf};
  for (float x : {0.f, 1.f, -1.f, 1.001f, -1.001f, 0.999f, 300.7f, 1e-5f, 1e-40f, 6e4f}) {
    for (uint32_t low : {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}) {
      wholes.push_back(from_bits((bits_of(x) & 0xffff0000) | low));
    }
  }
  const int64_t n = wholes.size();
  const float values[] = {0.f,  -0.f,     1.f,   -1.f, 1.5f,  0.0078125f, 300.f,
                          kInf, 65504.0f, -kInf, kNan, 6e-8f, -1e-7f};
  for (const Isa& isa : isas()) {
    for (DType param : {DType::kBFloat16, DType::kFloat16}) {
      for (auto precision : {WeightPrecision::kMaster, WeightPrecision::kRemainder,
                             WeightPrecision::kStochastic, WeightPrecision::kKahan}) {
        if (precision == WeightPrecision::kRemainder && param == DType::kFloat16) continue;
        for (float value : values) {
          Setup setup(kStream, param);
          setup.precision = precision;
          Model model = make_model(setup, {n});
          const Step step(model, setup);
          isa.kernels->split_weights(step.task(0), wholes.data());
          const float written = to_half(value, param);
          for (int64_t j = 0; j < n; ++j) {
            model[0][kParam].set(j, value);
            model[0][kGrad].set(j, -0.0);
          }
          Model copy = model;
          const auto whole = whole_weights(isa.kernels, Step(copy, setup), 0);
          step.update(isa.kernels);
          // (A hidden part that means the same number may stay, and -0 become 0.)
          const auto means = [&](float x) { return x == written || same_float(x, written); };
          for (int64_t j = 0; j < n; ++j) {
            check(means(float(model[0][kParam].get(j))), "the user's weight", int(precision),
                  code_of(copy[0][kParam], j), j);
            check(means(to_half(whole[j], param)), "the user's whole weight", int(precision),
                  code_of(copy[0][kParam], j), j);
          }
        }
      }
    }
  }
}

// Statistics. All is a function of the seeds, so what passes once passes always; the bounds leave
// a true random generator a chance of failing of about one in a million.

std::vector<uint32_t> draw(uint64_t seed, uint64_t step, uint32_t stream, uint32_t block,
                           uint32_t first, int64_t n) {
  const base::RandomKey key = base::random_key(seed, step, stream, block);
  std::vector<uint32_t> numbers(n);
  for (int64_t i = 0; i < n; ++i) numbers[i] = base::random_bits(key, first + uint32_t(i));
  return numbers;
}

// How many standard deviations chi-squared is off, of counts that should be equal.
double deviation(const std::vector<int>& counts, int64_t n) {
  const double expected = double(n) / counts.size(), freedom = counts.size() - 1.0;
  double sum = 0;
  for (int count : counts) sum += (count - expected) * (count - expected) / expected;
  return (sum - freedom) / std::sqrt(2 * freedom);
}

// Random numbers, and each of their bits on its own, packed.
struct Sequence {
  std::vector<uint32_t> numbers;
  std::vector<uint64_t> bit[32];

  Sequence(std::vector<uint32_t> list) : numbers(std::move(list)) {
    numbers.resize(numbers.size() / 64 * 64);
    for (int k = 0; k < 32; ++k) {
      bit[k].resize(numbers.size() / 64);
      for (size_t i = 0; i < numbers.size(); ++i) {
        bit[k][i / 64] |= uint64_t(numbers[i] >> k & 1) << i % 64;
      }
    }
  }
};

// That every bit and every field is even.
void check_uniform(const Sequence& x, const char* what, int a) {
  const double n = double(x.numbers.size());
  for (int k = 0; k < 32; ++k) {
    int64_t ones = 0;
    for (uint64_t word : x.bit[k]) ones += __builtin_popcountll(word);
    check(std::fabs(ones - n / 2) <= 5 * std::sqrt(n / 4), what, a, k, ones);
  }
  // The halves that elements use. (Their numbers may be more even than chance would have it.)
  for (int shift : {16, 0}) {
    std::vector<int> counts(65536);
    for (uint32_t number : x.numbers) ++counts[number >> shift & 0xffff];
    check(deviation(counts, n) <= 6, what, a, shift);
  }
}

// That no bit of one follows any bit of the other, nor does a pair of their upper parts.
void check_unrelated(const Sequence& x, const Sequence& y, const char* what, int a, int b = 0) {
  const double n = double(x.numbers.size());
  for (int j = 0; j < 32; ++j) {
    for (int k = 0; k < 32; ++k) {
      int64_t unequal = 0;
      for (size_t i = 0; i < x.bit[j].size(); ++i) {
        unequal += __builtin_popcountll(x.bit[j][i] ^ y.bit[k][i]);
      }
      check(std::fabs(unequal - n / 2) <= 6 * std::sqrt(n / 4), what, a, b, 32 * j + k);
    }
  }
  double product = 0;
  std::vector<int> pairs(256);
  for (size_t i = 0; i < x.numbers.size(); ++i) {
    product += (x.numbers[i] * 0x1p-32 - 0.5) * (y.numbers[i] * 0x1p-32 - 0.5);
    ++pairs[x.numbers[i] >> 28 << 4 | y.numbers[i] >> 28];
  }
  check(std::fabs(product * 12) <= 5 * std::sqrt(n), what, a, b, -1);
  check(deviation(pairs, n) <= 8, what, a, b, -2);
}

void test_random_bits() {
  constexpr int64_t n = 1 << 18;
  for (uint64_t seed : {uint64_t(0), ~uint64_t(0)}) {
    for (uint64_t step : {1, 1000}) {
      // The next step, seed, stream and block: each another sequence.
      const Sequence sequences[] = {
          draw(seed, step, 0, 0, 0, n),     draw(seed, step + 1, 0, 0, 0, n),
          draw(seed + 1, step, 0, 0, 0, n), draw(seed ^ uint64_t(1) << 40, step, 0, 0, 0, n),
          draw(seed, step, 1, 0, 0, n),     draw(seed, step, 0, 1, 0, n),
      };
      for (int i = 0; i < 6; ++i) {
        check_uniform(sequences[i], "random bits are even", i);
        for (int j = 0; j < i; ++j) {
          check_unrelated(sequences[i], sequences[j], "other random bits", i, j);
        }
      }
      for (int distance : {1, 2, 3, 16, 256, 512}) {
        check_unrelated(sequences[0], draw(seed, step, 0, 0, distance, n), "neighbours", distance);
      }
    }
  }
  for (const base::RandomKey key : {base::RandomKey{8, 6}, {7, 7}}) {
    check(base::random_bits(key, 5) != base::random_bits({7, 6}, 5), "both halves of a key count");
  }
  // One element through the steps, and through the seeds.
  for (uint32_t index : {0u, 1u, 12345u, ~0u}) {
    std::vector<uint32_t> steps, seeds;
    for (int64_t t = 0; t <= n; ++t) {
      steps.push_back(draw(5, t, 0, 0, index, 1)[0]);
      seeds.push_back(draw(t, 5, 1, 0, index, 1)[0]);
    }
    for (const auto& x : {steps, seeds}) {
      const std::vector<uint32_t> next(x.begin() + 1, x.end());
      check_uniform(x, "an element's bits are even", int(index));
      check_unrelated(x, next, "an element's next", int(index));
    }
    check_unrelated(steps, seeds, "steps and seeds", int(index));
  }
}

// An element's bits when it uses them again: each value once, unrelated to the others.
void test_bits_again() {
  for (int k = 0; k < kMaxStates; ++k) {
    std::vector<bool> seen(65536);
    for (uint32_t r = 0; r < 65536; ++r) seen[base::again(uint16_t(r), k)] = true;
    check(std::count(seen.begin(), seen.end(), true) == 65536, "a permutation", k);
    for (int j = 0; j < k; ++j) {
      // Pairs fill the square: 64 x 64 cells of 16 each, if it were perfect.
      std::vector<int> counts(4096);
      double product = 0;
      for (uint32_t r = 0; r < 65536; ++r) {
        const uint16_t x = base::again(uint16_t(r), j), y = base::again(uint16_t(r), k);
        ++counts[x >> 10 << 6 | y >> 10];
        product += (x * 0x1p-16 - 0.5) * (y * 0x1p-16 - 0.5);
      }
      const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
      check(*least >= 12 && *most <= 20, "pairs are even", j, k, *least);
      check(std::fabs(product / 65536 * 12) < 1e-3, "pairs do not correlate", j, k);
    }
  }
}

// The 16 bits of elements 0 to n - 1.
std::vector<uint16_t> bits_of_elements(uint64_t seed, uint64_t step, uint32_t stream, int64_t n) {
  const std::vector<uint32_t> pairs = draw(seed, step, stream, 0, 0, (n + 1) / 2);
  std::vector<uint16_t> bits(n);
  for (int64_t j = 0; j < n; ++j) bits[j] = uint16_t(pairs[j / 2] >> j % 2 * 16);
  return bits;
}

// round_randomly: one of the two neighbours, up as often as the fraction says.
template <class Half>
void test_random_rounding_to(DType dtype, uint32_t code_of_inf) {
  std::mt19937 random(23);
  const auto round = [](float x, uint16_t bits) {
    return base::widen(base::round_randomly(x, bits, Half{}));
  };
  // Numbers of 16 bits stay, whatever the random bits are; so do inf and nan.
  for (uint32_t code = 0; code < 65536; ++code) {
    const float x = half_value(uint16_t(code), dtype);
    for (uint32_t bits : {0u, 1u, 0xffffu, 0x8000u, 0xff00u, uint32_t(random())}) {
      check(same_float(round(x, uint16_t(bits)), x), "an exact number stays", int(dtype),
            int(code));
    }
  }
  for (uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    for (uint16_t bits : {0, 0xffff}) {
      const float x = round(from_bits(nan), bits);
      check(x != x, "nan is nan", int(dtype), int(nan));
    }
  }
  constexpr int kDraws = 1 << 12;
  for (int i = 0; i < 3000; ++i) {
    // Some from each binade, subnormals among them, then the largest, then those below the least.
    const uint32_t code = i < 2800 ? random() % code_of_inf : i < 2900 ? code_of_inf - 1 : 0;
    const double lower = half_value(uint16_t(code), dtype);
    const double unit = code == code_of_inf - 1 ? lower - half_value(uint16_t(code - 1), dtype)
                                                : half_value(uint16_t(code + 1), dtype) - lower;
    const float magnitude = float(lower + unit * (random() % 65537) * 0x1p-16);
    const float x = i % 2 ? magnitude : -magnitude;
    const double fraction = (double(magnitude) - lower) / unit;
    const auto numbers = draw(29, i, 0, 0, random(), kDraws);
    int ups = 0;
    for (uint32_t bits : numbers) {
      const float y = round(x, uint16_t(bits >> 16));
      const float size = std::fabs(y);
      const bool up = size != float(lower);
      const float upper = code == code_of_inf - 1 ? kInf : float(lower + unit);
      check((!up || size == upper) && std::signbit(y) == std::signbit(x), "a neighbour", int(dtype),
            i);
      ups += up;
    }
    // (Subnormal halves are rounded by 13 random bits.)
    const double slack = kDraws * 0x1p-13;
    const double sigma = std::sqrt(kDraws * fraction * (1 - fraction));
    check(std::fabs(ups - kDraws * fraction) <= 5 * sigma + slack, "up as often as the fraction",
          int(dtype), i, ups);
    // Spread evenly over the random bits there are, it is right to the last of them.
    ups = 0;
    for (uint32_t k = 0; k < 65536 && i % 30 == 0; ++k) {
      ups += std::fabs(round(x, uint16_t(k))) != float(lower);
    }
    if (i % 30 == 0) {
      check(std::fabs(ups - 65536 * fraction) <= (dtype == DType::kBFloat16 ? 0.5 : 8),
            "the fraction, exactly", int(dtype), i, ups);
    }
  }
  for (float x : {65536.f, 1e5f, 3.4e38f}) {
    for (uint16_t bits : {0, 0xffff, 0x8000}) {
      const float y = round(-x, bits);
      check(dtype == DType::kFloat16 ? y == -kInf : y <= -x * 0.99f, "overflow", int(dtype));
    }
  }
}

void test_random_rounding() {
  test_random_rounding_to<base::BFloat16>(DType::kBFloat16, 0x7f80);
  test_random_rounding_to<base::Float16>(DType::kFloat16, 0x7c00);
  // The kernels do the same, and take element i's own bits.
  const std::vector<float> whole = telling_floats();
  for (DType param : {DType::kBFloat16, DType::kFloat16}) {
    Setup setup(kStream, param);
    setup.precision = WeightPrecision::kStochastic;
    const auto random = bits_of_elements(setup.seed, uint64_t(setup.step), 0, whole.size());
    for (const Isa& isa : isas()) {
      Model model = make_model(setup, {int64_t(whole.size())});
      isa.kernels->split_weights(Step(model, setup).task(0), whole.data());
      for (size_t j = 0; j < whole.size(); ++j) {
        const float x = whole[j];
        const float y = param == DType::kBFloat16
                            ? base::widen(base::round_randomly(x, random[j], base::BFloat16{}))
                            : base::widen(base::round_randomly(x, random[j], base::Float16{}));
        check(same_float(half_value(code_of(model[0][kParam], j), param), y),
              "rounds by the element's bits", int(param), 0, j);
      }
    }
  }
}

// Stochastic weights on average do what whole ones do, each element on its own.
void test_stochastic_weights() {
  constexpr int64_t n = 1 << 16;
  for (DType param : {DType::kBFloat16, DType::kFloat16}) {
    Setup setup(kStream, param);
    setup.precision = WeightPrecision::kStochastic;
    setup.grad = DType::kFloat32;
    const double unit = param == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
    Model model = make_model(setup, {n});
    for (int64_t j = 0; j < n; ++j) {
      model[0][kParam].set(j, 1);
      model[0][kGrad].set(j, 0.01 * unit);
    }
    const Model start = model;
    constexpr int kSteps = 200;
    for (int t = 1; t <= kSteps; ++t) {
      setup.step = t;
      Step(model, setup).update(&cpu_kernels());
    }
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double moved = (model[0][kParam].get(j) - 1) / unit;
      sum += moved;
      squares += moved * moved;
    }
    // A binomial distribution: 200 chances of one in a hundred.
    const double variance = kSteps * 0.01 * 0.99, mean = sum / n;
    check(std::fabs(mean - kSteps * 0.01) <= 5 * std::sqrt(variance / n), "the mean is right",
          int(param));
    check(std::fabs(squares / n - mean * mean - variance) <= 0.05 * variance,
          "steps are independent", int(param));
    // The average is that of the weights before they are rounded.
    setup.averages = true;
    Model averaged = start;
    Step(averaged, setup).update(&cpu_kernels());
    for (int64_t j = 0; j < n; ++j) {
      check(averaged[0][kEma].get(j) == 1 + float(0.01 * unit), "the average is not rounded");
    }
    setup.averages = false;
    // Another seed, another step: other bits; the same ones: the same.
    const auto once = [&](uint64_t seed, double step) {
      setup.seed = seed;
      setup.step = step;
      Model copy = start;
      for (int64_t j = 0; j < n; ++j) copy[0][kGrad].set(j, 0.5 * unit);
      Step(copy, setup).update(&cpu_kernels());
      return copy;
    };
    const auto differences = [&](const Model& a, const Model& b) {
      int64_t count = 0;
      for (int64_t j = 0; j < n; ++j) count += a[0][kParam].get(j) != b[0][kParam].get(j);
      return count;
    };
    const Model first = once(1, 1);
    check(differences(first, once(1, 1)) == 0, "the same seed, the same bits");
    for (const Model& other : {once(2, 1), once(1, 2), once(uint64_t(1) << 63, 1)}) {
      check(std::abs(differences(first, other) - n / 2) <= 5 * 128, "another seed or step",
            int(param), 0, differences(first, other));
    }
  }
}

float decode(bool square, int code, float scale) {
  return square ? base::decode<true>(uint8_t(code), scale)
                : base::decode<false>(uint8_t(code), scale);
}

// `random`: 20 bits.
int encode(bool square, float x, float scale, uint32_t random) {
  const float inverse = base::inverse_scale(scale);
  return square ? base::encode<true>(x, inverse, uint16_t(random >> 4), random & 15)
                : base::encode<false>(x, inverse, uint16_t(random >> 4), random & 15);
}

void test_codes() {
  constexpr uint32_t kBits = 1u << 20;
  std::mt19937 random(31);
  for (bool square : {false, true}) {
    for (int exponent : {-90, -89, -24, -1, 0, 1, 60, 126}) {
      const float scale = std::ldexp(1.f, exponent);
      check(base::inverse_scale(scale) == std::ldexp(1.f, -exponent), "the inverse", exponent);
      for (int code = 0; code < 256; ++code) {
        const float x = decode(square, code, scale);
        for (uint32_t bits : {0u, 1u, kBits / 2, kBits - 1, uint32_t(random()) % kBits}) {
          check(encode(square, x, scale, bits) == code, "a code is itself", square, code, exponent);
        }
        check(same_float(base::rounded<base::BFloat16>(x), x) && std::isfinite(x),
              "exact in bfloat16", square, code, exponent);
        check((x == 0) == (code == 0 || (!square && code == 0x80)), "zero is zero", square, code);
        check(std::signbit(x) == (!square && code >= 0x80), "the sign", square, code);
        const int top = square ? 255 : code | 0x7f;
        if (code < top && code != 0x80) {
          const float next = decode(square, code + 1, scale);
          check(std::fabs(next) > std::fabs(x), "codes are in order", square, code, exponent);
        }
      }
      // Between two codes: one of them, up as often as the fraction says.
      for (int i = 0; i < 400; ++i) {
        const int code = 1 + random() % (square ? 254 : 126);
        const double lower = decode(square, code, scale);
        const double gap = decode(square, code + 1, scale) - lower;
        const float x = float(lower + gap * (random() % 1025) / 1024);
        const float sign = !square && i % 2 ? -1.f : 1.f;
        double sum = 0;
        int others = 0;
        for (uint32_t k = 0; k < 1024; ++k) {
          const int got = encode(square, sign * x, scale, k * 1024 + random() % 1024);
          const double y = sign * decode(square, got, scale);
          others += y != lower && y != lower + gap;
          others += std::fabs(y - x) > x / 8;
          sum += y;
        }
        check(others == 0, "a neighbour, at most an eighth away", square, code, exponent);
        check(std::fabs(sum / 1024 - x) <= gap / 1000, "right in the mean", square, code, exponent);
        const int nearest = encode(square, x, scale, uint32_t(base::kNearest) << 4);
        check(std::fabs(decode(square, nearest, scale) - x) <= gap / 2, "to the nearest", square,
              code, exponent);
      }
      for (uint32_t bits : {0u, kBits / 2, kBits - 1}) {
        check(encode(square, 0.f, scale, bits) == 0, "zero stays", square);
        for (float x : {1e-45f, 1e-38f, scale * 0x1p-40f, scale * 0x1p-32f, scale * 0x1p-31f}) {
          const int code = encode(square, x, scale, bits);
          if (square) check(code == 1, "no square becomes zero", exponent, int(bits));
          // An average that is too small becomes zero; no more than the least number is lost.
          if (!square) check(code <= 1, "small averages are small", exponent, int(bits));
        }
        const int most = square ? 255 : 127;
        check(encode(square, 1.875f * scale, scale, bits) == most, "the largest", exponent);
        check(encode(square, 1.8751f * scale, scale, bits) == most, "no code above", exponent);
      }
    }
  }
  // The scale.
  const float floor = std::ldexp(1.f, -90);
  for (int i = 0; i < 300000; ++i) {
    const uint32_t bits = i < 65536 ? uint32_t(i) << 15 : random() & 0x7fffffff;
    const float largest = from_bits(bits), scale = base::block_scale(bits);
    if (!std::isfinite(largest)) {
      check(scale == kInf, "inf and nan spread", int(bits));
      continue;
    }
    if (largest > 1.5e38f) {
      // Here the scale's inverse ends. What does not fit may become inf, but not small.
      for (bool square : {false, true}) {
        const int code = encode(square, largest, scale, uint32_t(base::kNearest) << 4);
        check(scale == kInf || decode(square, code, scale) >= largest / 2, "the last", int(bits));
      }
      continue;
    }
    int exponent;
    check(std::frexp(scale, &exponent) == 0.5f && scale >= floor, "a power of two", int(bits));
    check(double(largest) <= 1.87502 * scale, "the largest fits", int(bits));
    check(scale == floor || largest >= 0.9375f * scale, "no bit is wasted", int(bits));
    check(same_float(base::block_scale(bits_of(1.875f * scale)), scale), "1.875 keeps its scale");
  }
}

// 8-bit states through the kernels.
void test_coded_states() {
  const std::vector<int64_t> sizes = {0, 1, 255, 256, 257, 511, 513, 1100};
  std::mt19937 random(37);
  std::normal_distribution<float> normal;
  // Values of all sizes, each block with its own; some blocks of zeros, some with inf and nan.
  std::vector<std::vector<float>> values;
  for (int64_t n : sizes) {
    std::vector<float> list(n);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t block = j / kBlock;
      list[j] = block == 2 ? 0 : std::ldexp(normal(random), int(20 * block) - 40);
      if (j % 50 == 7) list[j] = j % 100 == 7 ? 0.f : -0.f;
    }
    if (n == 1100) list[1024 + 75] = kInf;
    if (n == 513) list[512] = kNan;
    if (n == 511) list[3] = -kInf;
    if (n == 257) list[5] = from_bits(0x7fffffff);
    values.push_back(std::move(list));
  }
  for (bool square : {false, true}) {
    Setup setup(square ? kStream + 1 : 3);
    setup.state = DType::kUInt8;
    Model reference;
    for (const Isa& isa : isas()) {
      Model model = make_model(setup, sizes);
      const Step step(model, setup);
      for (size_t i = 0; i < sizes.size(); ++i) {
        std::vector<float> input = values[i], output(sizes[i]);
        for (float& x : input) x = square ? std::fabs(x) : x;
        isa.kernels->encode_state(step.task(i), input.data());
        isa.kernels->decode_state(step.task(i), output.data());
        for (int64_t j = 0; j < sizes[i]; ++j) {
          const int64_t from = j / kBlock * kBlock, to = std::min(from + kBlock, sizes[i]);
          float largest = 0;
          bool finite = true;
          for (int64_t k = from; k < to; ++k) {
            finite = finite && std::isfinite(input[k]);
            largest = std::max(largest, std::fabs(input[k]));
          }
          if (!finite) {
            check(!std::isfinite(output[j]), "inf and nan spread in their block", square, 0, j);
            continue;
          }
          const float scale = model[i][kScale].as<float>(j / kBlock);
          check(scale == base::block_scale(bits_of(largest)), "the block's scale", square, 0, j);
          const float x = std::fabs(input[j]), least = scale * (square ? 0x1p-31f : 0x1p-15f);
          check(std::fabs(output[j] - input[j]) <= x / 16 + (x < 1.125f * least ? least : 0),
                "to the nearest, state", square, 0, j);
          check(input[j] == 0 ? output[j] == 0 : !square || output[j] > 0, "zero and only zero",
                square, 0, j);
        }
        // What was read and is written back, keeps its value, whatever happens to its scale.
        Model again = model;
        const Step second(again, setup);
        isa.kernels->encode_state(second.task(i), output.data());
        std::vector<float> twice(sizes[i]);
        isa.kernels->decode_state(second.task(i), twice.data());
        for (int64_t j = 0; j < sizes[i]; ++j) {
          check(same_float(twice[j], output[j]) || !std::isfinite(output[j]), "a second time",
                square, 0, j);
        }
      }
      if (reference.empty()) reference = model;
      check(same_bits(model, reference), "codes on all sets", square);
    }
  }
}

// In a step: each state is a neighbour of what the rule left, in 8 bits or bfloat16, the mean is
// right, each state and the weights have bits of their own, and what does not move keeps its bits.
void test_random_states(DType dtype) {
  constexpr int64_t n = (1 << 16) + 3;
  const bool coded = dtype == DType::kUInt8;
  for (const Isa& isa : isas()) {
    Setup setup(kStream + 3, DType::kBFloat16);
    setup.precision = WeightPrecision::kStochastic;
    setup.grad = DType::kFloat32;
    setup.state = dtype;
    setup.random_state = true;
    const Model start = make_model(setup, {n});
    const auto values = [&](const Model& model, int k) {
      std::vector<float> list(n);
      for (int64_t j = 0; !coded && j < n; ++j) list[j] = float(model[0][kState + k].get(j));
      if (!coded) return list;
      with_state(Step(model, setup), 0, k,
                 [&](const Task& task) { isa.kernels->decode_state(task, list.data()); });
      return list;
    };
    Model before = start;
    // States of 1 in blocks whose largest is 1.7; the next code is 1.125. Weights of 2; the next is
    // 1/64 away.
    const double unit = coded ? 0.125 : 0x1p-7, move = 0.08 * unit;
    std::vector<float> ones(n, 1);
    for (int64_t j = 0; j < n; ++j) {
      before[0][kParam].set(j, 2);
      before[0][kGrad].set(j, move);
      if (j % kBlock == 0) ones[j] = 1.7f;
    }
    for (int k = 0; k < kMaxStates; ++k) {
      for (int64_t j = 0; !coded && j < n; ++j) before[0][kState + k].set(j, ones[j]);
      if (!coded) continue;
      with_state(Step(before, setup), 0, k,
                 [&](const Task& task) { isa.kernels->encode_state(task, ones.data()); });
    }
    constexpr int kSteps = 10;
    const double chance[] = {0.08, 0.08, 0.08, move * 64};  // the weights' at last
    int64_t ups[4] = {}, both[4][4] = {}, trials = 0;
    for (int t = 1; t <= kSteps; ++t) {
      setup.step = t;
      Model model = before;
      Step(model, setup).update(isa.kernels);
      std::vector<float> now[kMaxStates];
      for (int k = 0; k < kMaxStates; ++k) now[k] = values(model, k);
      for (int64_t j = 0; j < n; ++j) {
        if (j % kBlock == 0) continue;
        ++trials;
        bool up[4];
        for (int k = 0; k < kMaxStates; ++k) {
          up[k] = now[k][j] != 1;
          check(now[k][j] == 1 || now[k][j] == 1 + unit, "a neighbour", k, t, j);
        }
        up[3] = model[0][kParam].get(j) != 2;
        for (int k = 0; k < 4; ++k) {
          ups[k] += up[k];
          for (int l = 0; l < k; ++l) both[k][l] += up[k] && up[l];
        }
      }
    }
    for (int k = 0; k < 4; ++k) {
      const double sigma = std::sqrt(chance[k] * (1 - chance[k]) / trials);
      check(std::fabs(double(ups[k]) / trials - chance[k]) <= 5 * sigma, "right in the mean", k, 0,
            ups[k]);
      for (int l = 0; l < k; ++l) {
        // States share some bits, but not the ones that decide. (Nearly: 6 bits further down.)
        const double expected = chance[k] * chance[l];
        check(std::fabs(double(both[k][l]) / trials - expected) <= 0.02 * chance[l],
              "each has bits of its own", k, l, both[k][l]);
      }
    }
    // Without a change all values stay, step after step.
    Model model = start;
    for (int64_t j = 0; j < n; ++j) model[0][kGrad].set(j, -0.0);
    for (int t = 1; t <= 5; ++t) {
      setup.step = t;
      Step(model, setup).update(isa.kernels);
      for (int k = 0; k < kMaxStates; ++k) {
        check(values(model, k) == values(start, k), "what does not move stays", k, t);
      }
    }
  }
}

// The norm's chunks from the kernels themselves, in parts, or one by one (0). Each has to be
// measured once.
std::vector<ChunkNorm> measure(const Kernels* kernels, const Step& step, NormType type, int parts) {
  const Plan& plan = step.plan();
  std::vector<int64_t> first = {0};
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    first.push_back(first.back() + (plan.tasks[i]->numel + kNormChunk - 1) / kNormChunk);
  }
  std::vector<ChunkNorm> all(first.back());
  std::vector<int> times(first.back());
  const auto run = [&](int64_t task, int64_t from, int64_t to) {
    std::vector<ChunkNorm> out(first.back(), ChunkNorm{-1, false});
    kernels->measure(plan, type, 1, first.data(), task, from, to, out.data());
    for (size_t c = 0; c < out.size(); ++c) {
      if (out[c].value == -1) continue;
      all[c] = out[c];
      ++times[c];
    }
  };
  if (parts > 0) {
    step.for_parts(parts, run);
  } else {
    std::vector<int64_t> cuts;  // where chunks begin, and the tasks
    for (int64_t i = 0; i < plan.n_tasks; ++i) {
      const int64_t chunks = std::max<int64_t>(first[i + 1] - first[i], 1);
      for (int64_t c = 0; c < chunks; ++c) cuts.push_back(plan.begin[i] + c * kNormChunk);
    }
    cuts.push_back(plan.begin[plan.n_tasks]);
    step.for_cuts(cuts, run);
  }
  for (int count : times) check(count == 1, "each chunk is measured once", parts, count);
  return all;
}

// A gradient as the norm has to see it.
double seen(const std::vector<Tensor>& tensors, const Setup& setup, int64_t j) {
  const double g = setup.no_gradients ? 0 : tensors[kGrad].get(j);
  if (!setup.accumulated) return g;
  const double sum = tensors[kGradSum].get(j) + g;
  return setup.param == DType::kFloat64 ? sum : float(sum);
}

void test_norm() {
  const std::vector<int64_t> sizes = {0, 1, 31, 33, 0, 513, 16383, 16384, 16385, 0, 90001};
  for (DType param : {DType::kFloat32, DType::kFloat64}) {
    for (DType grad : kFloats) {
      for (int kind = 0; kind < 3; ++kind) {  // alone, with accumulated ones, only those
        Setup setup(0, param);
        setup.grad = grad;
        setup.grad_sum = kind == 1 ? grad : param;
        setup.accumulated = kind > 0;
        setup.no_gradients = kind == 2;
        setup.stages.grad_multiplier = 0.25;
        setup.stages.max_grad_value = setup.stages.clip_coefficient = 0.001;  // not yet
        const Model dense = make_model(setup, sizes), wide = spread(dense);
        long double squares = 0, largest = 0;
        for (const auto& tensors : dense) {
          for (int64_t j = 0; j < tensors[kGrad].numel; ++j) {
            const long double g = seen(tensors, setup, j);
            squares += g * g;
            largest = std::max(largest, std::fabs(g));
          }
        }
        for (NormType type : {NormType::kTwo, NormType::kInfinity}) {
          const bool two = type == NormType::kTwo;
          // Squares of doubles are rounded where there is no FMA.
          std::vector<ChunkNorm> expected_of[2];
          for (const Isa& isa : isas()) {
            for (int parts : {1, 2, 7, 0}) {
              for (const Model* model : {&dense, &wide}) {
                const auto chunks = measure(isa.kernels, Step(*model, setup), type, parts);
                const bool fused = isa.kernels != &base::kKernels;
                auto& expected = expected_of[fused && two && param == DType::kFloat64];
                if (expected.empty()) expected = chunks;
                bool same = true;
                for (size_t c = 0; c < chunks.size(); ++c) {
                  same = same && chunks[c].finite && chunks[c].value == expected[c].value;
                }
                check(same, "norms on any set, in any parts", int(param), int(grad), parts);
              }
            }
          }
          double first = -1;
          for (int threads = 1; threads <= 8; ++threads) {
            for (const Model* model : {&dense, &wide}) {
              const Norm norm = cpu_measure(Step(*model, setup).plan(), type, threads);
              if (first < 0) first = norm.total;
              check(norm.total == first, "norms on any number of threads", int(param), threads);
              check(norm.nonfinite_task == -1, "finite", int(param), threads);
            }
          }
          const long double truth = 0.25L * (two ? sqrtl(squares) : largest);
          const double norm = base::norm_of(type, first, 0.25);
          check(std::fabs(norm - truth) <= (two ? 1e-13L : 0) * truth, "the norm", int(param),
                int(grad), int(type));
        }
        const Norm none = cpu_measure(Step(dense, setup).plan(), NormType::kNone, 2);
        check(none.nonfinite_task == -1, "no norm, but the test", int(param), int(grad));
      }
    }
  }
  const Setup setup;
  for (const std::vector<int64_t>& empty : {std::vector<int64_t>{0}, {0, 0}}) {
    const Norm norm = cpu_measure(Step(make_model(setup, empty), setup).plan(), NormType::kTwo, 2);
    check(norm.total == 0 && norm.nonfinite_task == -1, "nothing has norm zero");
  }
}

// nan and inf are found wherever they are, and nothing else is taken for them.
void test_nonfinite() {
  const std::vector<int64_t> sizes = {5, 0, 33001, 33, 513};
  const std::vector<int64_t> places[] = {
      {0, 4},
      {},
      {0, 1, 31, 32, 511, 512, 8000, 16383, 16384, 20000, 32767, 32768, 33000},
      {31, 32},
      {0, 511, 512}};
  for (DType param : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (DType grad : kFloats) {
      for (int kind = 0; kind < 3; ++kind) {
        Setup setup(0, param);
        setup.grad = setup.grad_sum = grad;
        setup.accumulated = kind > 0;
        setup.no_gradients = kind == 2;
        const Model start = make_model(setup, sizes);
        const int slot = kind == 0 ? kGrad : kGradSum;
        for (const Isa& isa : isas()) {
          for (NormType type : {NormType::kNone, NormType::kTwo, NormType::kInfinity}) {
            const auto at = [&](int64_t task, int64_t place, double value, bool wide) {
              Model model;
              model.push_back(start[task]);
              model[0][slot].set(place, value);
              if (wide) model = spread(model);
              const auto chunks = measure(isa.kernels, Step(model, setup), type, 1);
              for (size_t c = 0; c < chunks.size(); ++c) {
                const bool here = int64_t(c) == place / kNormChunk;
                check(chunks[c].finite == !here, "nan and inf are found", int(grad), kind, place);
                const double norm = chunks[c].value;
                check(here ? (value != value ? norm != norm : norm == kInf) : std::isfinite(norm),
                      "and make the norm", int(grad), kind, place);
              }
            };
            int turn = 0;
            for (size_t task = 0; task < sizes.size(); ++task) {
              for (int64_t place : places[task]) {
                // In turns, for the time it takes.
                const double value = ++turn % 3 == 0 ? kInf : turn % 3 == 1 ? kNan : -kInf;
                at(task, place, value, (turn / 3 + int(type)) % 2);
              }
            }
          }
        }
        // The first of the tasks is named.
        for (const std::vector<int>& tasks : {std::vector<int>{2}, {4}, {0}, {2, 4}, {0, 3}}) {
          Model model = start;
          for (int task : tasks) model[task][slot].set(sizes[task] / 2, task % 4 ? kNan : -kInf);
          for (NormType type : {NormType::kNone, NormType::kTwo, NormType::kInfinity}) {
            const Norm norm = cpu_measure(Step(model, setup).plan(), type, 2);
            check(norm.nonfinite_task == tasks[0], "the first task is named", tasks[0], int(type));
            check(!std::isfinite(norm.total), "the norm is not finite", tasks[0], int(type));
          }
        }
      }
    }
  }
  // The largest numbers are finite, though their squares may not be; so are the smallest.
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    const double largest = dtype == DType::kFloat64   ? std::numeric_limits<double>::max()
                           : dtype == DType::kFloat32 ? std::numeric_limits<float>::max()
                                                      : 0x1.fep127;
    for (double value : {largest, -largest, dtype == DType::kFloat64 ? 1e200 : 1e38, 1e-320}) {
      Setup setup(0, dtype);
      setup.grad_sum = dtype;
      Model model = make_model(setup, {20000, 3});
      for (auto& tensors : model) {
        for (int64_t j = 0; j < tensors[kGrad].numel; ++j) tensors[kGrad].set(j, value);
      }
      const double kept = std::fabs(model[1][kGrad].get(0));
      for (NormType type : {NormType::kNone, NormType::kTwo, NormType::kInfinity}) {
        const Norm norm = cpu_measure(Step(model, setup).plan(), type, 2);
        check(norm.nonfinite_task == -1, "large numbers are finite", int(dtype), int(type));
        if (type == NormType::kInfinity) check(norm.total == kept, "the largest", int(dtype));
        for (const Isa& isa : isas()) {
          for (const ChunkNorm& chunk : measure(isa.kernels, Step(model, setup), type, 2)) {
            check(chunk.finite, "large numbers are finite, chunk", int(dtype), int(type));
          }
        }
      }
      // What counts is what they are when multiplied.
      for (double multiplier : {0.5, 1.0, 1.5, 3.0}) {
        setup.stages.grad_multiplier = multiplier;
        const bool finite =
            std::isfinite(dtype == DType::kFloat64 ? kept * multiplier : float(kept * multiplier));
        for (NormType type : {NormType::kNone, NormType::kTwo, NormType::kInfinity}) {
          const Norm norm = cpu_measure(Step(model, setup).plan(), type, 2);
          check(norm.nonfinite_task == (finite ? -1 : 0), "multiplied", int(dtype), int(type));
        }
      }
      setup.stages.grad_multiplier = 1;
      // Two finite ones may add up to inf.
      setup.accumulated = true;
      for (auto& tensors : model) tensors[kGradSum] = tensors[kGrad];
      const Norm norm = cpu_measure(Step(model, setup).plan(), NormType::kTwo, 1);
      const bool overflows =
          !std::isfinite(dtype == DType::kFloat64 ? kept + kept : float(kept) + float(kept));
      check(norm.nonfinite_task == (overflows ? 0 : -1), "the sum counts", int(dtype), overflows);
    }
  }
}

void test_accumulate() {
  const std::vector<int64_t> sizes = {0, 1, 255, 256, 257, 513, 1100};
  for (DType param : kFloats) {
    for (DType grad : kFloats) {
      for (DType sum : kFloats) {
        Setup setup(0, param);
        setup.grad = grad;
        setup.grad_sum = sum;
        for (bool accumulated : {false, true}) {
          setup.accumulated = accumulated;
          setup.grad_sums = true;
          Model start = make_model(setup, sizes);
          for (auto& tensors : start) {
            // Before the first, memory is as it was: nan, here.
            if (!accumulated) {
              std::memset(tensors[kGradSum].block.get(), 0xff, tensors[kGradSum].bytes());
            }
          }
          Model expected = start;
          for (auto& tensors : expected) {
            for (int64_t j = 0; j < tensors[kGrad].numel; ++j) {
              const double g = tensors[kGrad].get(j);
              double all = accumulated ? tensors[kGradSum].get(j) + g : g;
              if (param != DType::kFloat64) {
                all = accumulated ? float(tensors[kGradSum].get(j)) + float(g) : float(g);
              }
              tensors[kGradSum].set(j, all);
            }
          }
          for (const Isa& isa : isas()) {
            for (int parts : {1, 2, 7}) {
              for (bool gaps : {false, true}) {
                const Model model = gaps ? spread(start) : start;
                const Step step(model, setup);
                step.for_parts(parts, [&](int64_t first, int64_t from, int64_t to) {
                  isa.kernels->accumulate(step.plan(), first, from, to);
                });
                check(same_elements(model, expected), "accumulate", int(param), int(grad),
                      int(sum));
                check_gaps(model, int(param), int(sum));
              }
            }
          }
        }
      }
    }
  }
  // On threads, twice.
  Setup setup(kStream);
  setup.grad_sums = true;
  const Model start = make_model(setup, {100000, 3, 0, 70001, 1});
  for (int threads = 1; threads <= 8; ++threads) {
    Model sums = start;
    setup.accumulated = false;
    cpu_accumulate(Step(sums, setup).plan(), threads);
    setup.accumulated = true;
    cpu_accumulate(Step(sums, setup).plan(), threads);
    for (size_t i = 0; i < sums.size(); ++i) {
      for (int64_t j = 0; j < sums[i][kGrad].numel; ++j) {
        const float g = sums[i][kGrad].as<float>(j);
        check(sums[i][kGradSum].as<float>(j) == g + g, "accumulate on threads", threads, int(i), j);
      }
      sums[i][kGradSum] = start[i][kGradSum];
    }
    check(same_bits(sums, start), "accumulate writes nothing else", threads);
  }
}

}  // namespace
