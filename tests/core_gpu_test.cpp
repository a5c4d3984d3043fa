// What the CUDA engine does otherwise than the CPU's: the norm, decisions and counters on the
// device, and how it cuts its work. Part of core_test.cpp. (That its kernels compute the same is
// tested with the others: they are one of isas().)

namespace {

const std::vector<int64_t> kOddSizes = {0, 1, 3, 17, 255, 256, 257, 1025, 5000};

std::vector<Setup> mixed_setups() {
  std::vector<Setup> setups = {Setup(0), Setup(1, DType::kFloat64), Setup(3, DType::kBFloat16),
                               Setup(8, DType::kFloat16)};
  setups[2].accumulated = true;
  return setups;
}

// Several rules and types in one step, so that it takes several launches.
struct Mixed {
  std::vector<Group> groups;
  std::vector<Model> models;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<Task> tasks;
  std::vector<const Task*> pointers;
  std::vector<int64_t> begin = {0};

  Mixed() : Mixed(models_of(mixed_setups())) {}
  Mixed(const Mixed& other) : Mixed(other.models) {}

  explicit Mixed(std::vector<Model> given) : models(std::move(given)) {
    const std::vector<Setup> setups = mixed_setups();
    for (size_t s = 0; s < setups.size(); ++s) {
      groups.push_back(setups[s].group);
      steps.push_back(std::make_unique<Step>(models[s], setups[s]));
      for (size_t i = 0; i < models[s].size(); ++i) {
        tasks.push_back(steps[s]->task(i));
        tasks.back().group = int32_t(s);
      }
    }
    for (const Task& task : tasks) {
      pointers.push_back(&task);
      begin.push_back(begin.back() + task.numel + kTaskOverhead);
    }
  }

  static std::vector<Model> models_of(const std::vector<Setup>& setups) {
    std::vector<Model> result;
    for (const Setup& setup : setups) result.push_back(make_model(setup, kOddSizes));
    return result;
  }

  Plan plan(const Stages& stages = {}) const {
    return {groups.data(), pointers.data(), int64_t(tasks.size()), begin.data(), stages};
  }
};

emulated::Options gpu_options(const Plan& plan) {
  emulated::Options options;
  options.stages.stages = plan.stages;
  for (int64_t i = 0; i < plan.n_tasks; ++i) options.steps.push_back(plan.tasks[i]->step - 1);
  return options;
}

bool same_models(const Mixed& a, const Mixed& b) {
  for (size_t s = 0; s < a.models.size(); ++s) {
    if (!same_bits(a.models[s], b.models[s])) return false;
  }
  return true;
}

void test_gpu_norm() {
  for (NormType type : {NormType::kTwo, NormType::kInfinity}) {
    for (double multiplier : {1.0, 0.25}) {
      const Mixed mixed;
      Stages stages;
      stages.grad_multiplier = multiplier;
      const double expected =
          base::norm_of(type, cpu_measure(mixed.plan(), type, 1).total, multiplier);
      double norms[3];
      const std::pair<int, int> grids[] = {{1, 1}, {5, 3}, {64, 8}};
      for (int k = 0; k < 3; ++k) {
        emulated::Options options = gpu_options(mixed.plan());
        options.stages.divisor = 1 / multiplier;
        options.stages.norm = type;
        options.n_warps = grids[k].first, options.chunk_spans = grids[k].second;
        DeviceControl control = {};
        // What was left of the step before does not matter.
        control.total = 1e300, control.found = 7;
        emulated::measure(mixed.plan(), options, &control, &norms[k]);
        check(std::fabs(norms[k] - expected) <= 0x1p-23 * expected, "gpu norm", int(type), k);
        check(type == NormType::kTwo || norms[k] == expected, "gpu inf norm", k);
        check(control.found == 0 && control.nonfinite == 0, "all finite", k);
      }
    }
  }
}

void test_gpu_nonfinite() {
  for (NormType type : {NormType::kTwo, NormType::kInfinity}) {
    for (double bad : {double(kInf), -double(kInf), double(kNan)}) {
      for (int task : {1, 8, 10, 20, 35}) {
        Mixed mixed;
        // Two of them: the first counts.
        for (int i : {task, 35}) {
          Tensor& grad = mixed.models[i / 9][i % 9][kGrad];
          grad.set(grad.numel - 1, bad);
        }
        const Norm measured = cpu_measure(mixed.plan(), type, 1);
        const double expected = base::norm_of(type, measured.total, 1);
        emulated::Options options = gpu_options(mixed.plan());
        options.stages.norm = type;
        options.stages.skip_nonfinite = true;
        DeviceControl control = {};
        double norm = 0;
        emulated::measure(mixed.plan(), options, &control, &norm);
        check(measured.nonfinite_task == task && control.found == uint64_t(task) + 1,
              "the first that is not finite", task, int(control.found));
        check(norm == expected || (norm != norm && expected != expected), "its norm", int(type),
              task);
        const Mixed before(mixed);
        const std::vector<double> steps = options.steps;
        emulated::update(mixed.plan(), &options, &control);
        check(same_models(mixed, before) && options.steps == steps, "nothing is written", task);
        check(control.skipped == 1, "one step was skipped", task);
      }
    }
  }
}

// Clipped by the device's norm, unscaled by the device's scale: as the CPU with these numbers.
void test_gpu_stages() {
  for (double limit : {0.01, 1e9, double(kInf)}) {
    Mixed mixed;
    Mixed reference(mixed);
    const float scale = 8;
    emulated::Options options = gpu_options(mixed.plan());
    options.narrow_steps = limit < 1;
    options.stages.divisor = 3;
    options.stages.grad_scale = &scale;
    options.stages.norm = NormType::kInfinity;  // (does not depend on the order)
    options.stages.max_grad_norm = limit;
    DeviceControl control = {};
    double norm = 0;
    emulated::measure(mixed.plan(), options, &control, &norm);
    emulated::update(mixed.plan(), &options, &control);

    Stages stages;
    stages.grad_multiplier = 1.0 / 24;
    const Norm measured = cpu_measure(reference.plan(stages), NormType::kInfinity, 1);
    const double expected =
        base::norm_of(NormType::kInfinity, measured.total, stages.grad_multiplier);
    stages.clip_coefficient = base::clip_coefficient(expected, limit);
    const Plan plan = reference.plan(stages);
    avx2::kKernels.update(plan, 0, 0, plan.begin[plan.n_tasks]);
    check(norm == expected, "unscaled norm");
    check((limit < 1) == (stages.clip_coefficient < 1), "clips");
    check(same_models(mixed, reference), "unscales and clips", int(limit < 1));
    for (int64_t i = 0; i < plan.n_tasks; ++i) {
      check(options.steps[i] == plan.tasks[i]->step, "the counters advance", int(i));
    }
    check(control.skipped == 0, "none is skipped");
  }
}

void test_gpu_found_inf() {
  Mixed mixed;
  const Mixed before(mixed);
  float found_inf = 1;
  emulated::Options options = gpu_options(mixed.plan());
  options.stages.found_inf = &found_inf;
  options.stages.norm = NormType::kTwo;
  const std::vector<double> steps = options.steps;
  DeviceControl control = {};
  double norm = 0;
  for (int t = 1; t <= 2; ++t) {
    emulated::measure(mixed.plan(), options, &control, &norm);
    emulated::update(mixed.plan(), &options, &control);
    check(control.skipped == uint64_t(t) && norm != norm, "skipped", t);
  }
  check(same_models(mixed, before) && options.steps == steps, "a skipped step writes nothing");
  // The buffers that have never been written still have not: the next step is the first.
  found_inf = 0;
  emulated::update(mixed.plan(), &options, &control);
  Mixed reference(before);
  const Plan plan = reference.plan();
  avx2::kKernels.update(plan, 0, 0, plan.begin[plan.n_tasks]);
  check(same_models(mixed, reference), "the step after it");
  emulated::update(mixed.plan(), &options, &control);
  for (Task& task : reference.tasks) task.step += 1, task.first = false;
  avx2::kKernels.update(plan, 0, 0, plan.begin[plan.n_tasks]);
  check(same_models(mixed, reference), "and the next one");
  check(control.skipped == 2, "none of them was skipped");
}

// Parameters without a gradient stay in the table, and out of the step.
void test_gpu_missing_gradients() {
  Mixed mixed;
  const Mixed before(mixed);
  for (size_t i = 0; i < mixed.tasks.size(); ++i) {
    if (i % 2 == 0 && i / 9 != 2) mixed.tasks[i].grad.data = nullptr;
  }
  emulated::Options options = gpu_options(mixed.plan());
  options.stages.norm = NormType::kTwo;
  const std::vector<double> steps = options.steps;
  DeviceControl control = {};
  double norm = 0;
  emulated::measure(mixed.plan(), options, &control, &norm);
  emulated::update(mixed.plan(), &options, &control);
  double squares = 0;
  for (size_t i = 0; i < mixed.tasks.size(); ++i) {
    const bool takes_part = mixed.tasks[i].grad.data != nullptr;
    check(options.steps[i] == steps[i] + takes_part, "counts its own steps", int(i));
    const auto& now = mixed.models[i / 9][i % 9];
    const auto& then = before.models[i / 9][i % 9];
    check(takes_part || same_bits(now[kParam], then[kParam]), "stays as it is", int(i));
    for (int64_t j = 0; takes_part && j < now[kGrad].numel; ++j) {
      const double g = now[kGrad].get(j) + (i / 9 == 2 ? now[kGradSum].get(j) : 0);
      squares += g * g;
    }
  }
  check(std::fabs(norm - std::sqrt(squares)) <= 1e-6 * norm, "the norm of those that do");
}

// Beyond the tensor's end a lane's numbers are no numbers; the block's scale must not know.
void test_gpu_ends_of_coded_states() {
  Setup setup(5);  // RMSprop with momentum
  setup.group.hyper[2] = 0;
  setup.state = DType::kUInt8;
  const Model start = make_model(setup, {1, 100, 300});
  Model model = start, expected = start;
  Step(model, setup).update(&emulated::kKernels);
  Step(expected, setup).update(&avx2::kKernels);
  check(same_bits(model, expected), "the ends of 8-bit states");
  check(std::isfinite(model[2][kScale + 1].as<float>(1)), "a finite scale");
}

void test_gpu_learning_rate() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    const double wide = 0.25;
    const float narrow = 0.25;
    Mixed mixed;
    Mixed reference(mixed);
    emulated::Options options = gpu_options(mixed.plan());
    options.lr = dtype == DType::kFloat64 ? static_cast<const void*>(&wide) : &narrow;
    options.lr_dtype = dtype;
    DeviceControl control = {};
    emulated::update(mixed.plan(), &options, &control);
    for (Group& group : reference.groups) group.hyper[0] = 0.25;
    const Plan plan = reference.plan();
    avx2::kKernels.update(plan, 0, 0, plan.begin[plan.n_tasks]);
    check(same_models(mixed, reference), "a learning rate on the device", int(dtype));
  }
}

// Any grid; tensors that begin anywhere; many that are smaller than a tile.
void test_gpu_grids() {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 10000; ++i) sizes.push_back(i * 7 % 67);
  Setup setup(0);
  const Model start = make_model(setup, sizes);
  Model expected = start;
  Step(expected, setup).update(&avx2::kKernels);
  const int grids[][3] = {{1, 1, 1}, {7, 5, 2}, {300, 16, 3}, {2, 64, 8}};
  for (const auto& [n_warps, chunk_spans, depth] : grids) {
    Model model = start;
    const Step step(model, setup);
    emulated::Options options = gpu_options(step.plan());
    options.n_warps = n_warps, options.chunk_spans = chunk_spans, options.depth = depth;
    DeviceControl control = {};
    emulated::update(step.plan(), &options, &control);
    check(same_bits(model, expected), "tiny tensors", n_warps, depth);
  }

  const int64_t n = 777;
  for (int64_t shift = 1; shift < 5; ++shift) {
    Setup whole(0);
    Model unaligned = make_model(whole, {n + shift});
    const Model copy = unaligned;
    const Step step(unaligned, whole);
    const Step reference(copy, whole);
    const auto shifted = [&](const Step& from, Plan* plan, Task* task) {
      *task = from.task(0);
      task->numel = n;
      for (Operand* operand : {&task->param, &task->grad, &task->state[0], &task->state[1]}) {
        operand->data = static_cast<float*>(operand->data) + shift;
      }
      *plan = from.plan();
    };
    Plan plan, other;
    Task task, same;
    shifted(step, &plan, &task);
    shifted(reference, &other, &same);
    const Task* tasks[] = {&task};
    const Task* others[] = {&same};
    const int64_t begin[] = {0, n + kTaskOverhead};
    plan.tasks = tasks, other.tasks = others;
    plan.begin = other.begin = begin;
    emulated::Options options = gpu_options(plan);
    DeviceControl control = {};
    emulated::update(plan, &options, &control);
    avx2::kKernels.update(other, 0, 0, begin[1]);
    check(same_bits(unaligned, copy), "tensors that are not aligned", int(shift));
  }
}

// Each combination of formats goes to its own kernel, as long as nothing else is there.
void test_gpu_formats() {
  for (int rule = 0; rule < kRules; ++rule) {
    for (int i = 0; i < emulated::count_direct_formats(rule); ++i) {
      const Formats& formats = kFormats[i];
      Setup setup(rule);
      setup.param = formats.param, setup.grad = formats.grad, setup.state = formats.state;
      setup.precision = formats.precision, setup.averages = formats.ema;
      Model model = make_model(setup, {700, 0, 3});
      const Step step(model, setup);
      const emulated::Options options = gpu_options(step.plan());
      const std::vector<int> one = {i}, none = {kAnyFormats};
      check(emulated::formats_of_launches(step.plan(), options) == one, "a kernel of its own", rule,
            i);
      Setup accumulates = setup;
      accumulates.accumulated = true;
      Model other = make_model(accumulates, {700});
      const Step accumulated(other, accumulates);
      check(emulated::formats_of_launches(accumulated.plan(), gpu_options(accumulated.plan())) ==
                none,
            "the general kernel accumulates", rule, i);
      Task task = step.task(0);
      task.grad.data = static_cast<char*>(task.grad.data) + 4;
      const Task* tasks[] = {&task};
      Plan plan = step.plan();
      plan.tasks = tasks, plan.n_tasks = 1;
      check(emulated::formats_of_launches(plan, gpu_options(plan)) == none,
            "the general kernel takes what is not aligned", rule, i);
    }
  }
  Setup halves(0, DType::kFloat16);
  Model model = make_model(halves, {700});
  const Step step(model, halves);
  check(emulated::formats_of_launches(step.plan(), gpu_options(step.plan())) ==
            std::vector<int>{kAnyFormats},
        "and other formats");
}

// Tiles in which some or all numbers are such that roots and quotients are computed the long way.
void test_gpu_unusual_numbers() {
  const float numbers[] = {0.0f, -0.0f, 1e-45f, -1e-38f, 1e-30f, 1e-19f, 1e19f, 3e38f, -kInf, kNan};
  for (int rule = 0; rule < kRules; ++rule) {
    for (int i = 0; i < emulated::count_direct_formats(rule); ++i) {
      for (double eps : {0.0, 1e-20, 1e-8}) {
        Setup setup(rule);
        setup.param = kFormats[i].param, setup.grad = kFormats[i].grad;
        setup.state = kFormats[i].state, setup.precision = kFormats[i].precision;
        setup.averages = kFormats[i].ema;
        setup.group.hyper[rule < 2 ? 3 : 2] = eps;
        const Model start = make_model(setup, {256 * 12, 300, 5});
        Model model = start;
        for (size_t t = 0; t < model.size(); ++t) {
          for (int64_t j = 0; j < model[t][kGrad].numel; ++j) {
            const int64_t tile = j / 256;
            const bool all = tile % 2 == 0;
            if (!all && j % 97 != 0) continue;
            const float x = numbers[(tile + (all ? 0 : j)) % 10];
            model[t][kGrad].set(j, x);
            if (setup.coded()) continue;
            model[t][kState].set(j, j % 2 ? x : 0.0f);
            model[t][kState + 1].set(j, std::fabs(x));
          }
        }
        Model expected = model;
        Step(model, setup).update(&emulated::kKernels);
        Step(expected, setup).update(&avx2::kKernels);
        check(same_bits(model, expected), "unusual numbers", rule, i);
      }
    }
  }
}

// All mantissas for roots, many for quotients; with estimates of reciprocals that are off.
void test_quick_numbers() {
  const auto same = [](float a, float b) { return bits_of(a) == bits_of(b); };
  for (int exponent : {127, 128, 27, 28, 227, 254}) {
    int64_t wrong = 0, unsure = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
      const float x = from_bits(uint32_t(exponent) << 23 | mantissa);
      const auto [root, exact] = emulated::quick_root(x);
      wrong += exact && !same(root, std::sqrt(x));
      unsure += !exact;
    }
    check(wrong == 0 && unsure == 0, "quick roots", exponent, int(wrong), unsure);
  }
  std::mt19937 random(3);
  int64_t wrong = 0, unsure = 0;
  for (int i = 0; i < 10'000'000; ++i) {
    const uint32_t low = uint32_t(random()), high = uint32_t(random());
    // Few bits in one of them: quotients next to the middle between two floats.
    const uint32_t mask = i % 3 == 0 ? 0x7ff000 : i % 3 == 1 ? 0x7fffff : 0x700007;
    const float a = from_bits((low & 0x80000000u) | (112 + low % 31) << 23 | (low >> 3 & 0x7fffff));
    const float b = from_bits((112 + high % 29) << 23 | (high >> 5 & mask));
    const auto [quotient, exact] = emulated::quick_quotient(a, b);
    wrong += exact && !same(quotient, a / b);
    unsure += !exact;
  }
  for (uint32_t exponent = 112; exponent <= 140; ++exponent) {  // where Markstein has an exception
    for (uint32_t mantissa = 0x7ffff0; mantissa <= 0x7fffff; ++mantissa) {
      const float b = from_bits(exponent << 23 | mantissa);
      for (uint32_t bits : {0x3f800000u, 0xbf800000u, 0x3f800001u, 0x3f7fffffu, 0x43000000u}) {
        const float a = from_bits(bits);
        const auto [quotient, exact] = emulated::quick_quotient(a, b);
        wrong += exact && !same(quotient, a / b);
        unsure += !exact;
      }
    }
  }
  check(wrong == 0 && unsure == 0, "quick quotients", int(wrong), int(unsure));
  for (int i = 0; i < 10'000'000; ++i) {  // of any numbers
    const float a = from_bits(uint32_t(random())), b = from_bits(uint32_t(random()));
    const auto [quotient, sure] = emulated::quick_quotient(a, b);
    const auto [root, certain] = emulated::quick_root(a);
    wrong += (sure && !same(quotient, a / b)) || (certain && !same(root, std::sqrt(a)));
  }
  check(wrong == 0, "quick or not sure", int(wrong));
  constexpr float kLargest = 0x1.fffffep127f, kSubnormal = 0x1.fffffcp-127f;
  for (float x : {kInf, -kInf, kNan, -1.0f, -kLargest, 1e-45f, -1e-45f, kSubnormal, -kSubnormal}) {
    check(!emulated::quick_root(x).second, "roots of what is no normal number");
    check(!emulated::quick_quotient(1, x).second, "quotients by what is none");
    const bool usual = std::isfinite(x) && std::fabs(x) >= 1;
    check(emulated::quick_quotient(x, 1).second == usual, "quotients of what is none");
  }
  for (float zero : {0.0f, -0.0f}) {
    const auto [root, exact] = emulated::quick_root(zero);
    check(exact && same(root, zero), "roots of zero");
    check(!emulated::quick_quotient(1, zero).second, "quotients by zero");
    for (float b : {0x1p-50f, 1e-8f, 1.0f, 0x1.fffffep-1f, 3e38f}) {
      const auto [quotient, sure] = emulated::quick_quotient(zero, b);
      check(sure && same(quotient, zero), "quotients of zero");
    }
    for (float b : {0.0f, -0.0f, -1.0f, kInf, kNan, kSubnormal}) {
      check(!emulated::quick_quotient(zero, b).second, "quotients of zero by what is none");
    }
  }
}

// The bound of norm.h: 2^-22 for squares' sums.
void test_sums_of_squares() {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 2'000'000; ++i) {
    float g[8];
    long double exact = 0;
    const float scale = std::ldexp(1.0f, int(random() % 240) - 130);
    for (float& x : g) {
      const int part = int(random() % 8);
      x = part == 0 ? 0 : normal(random) * scale * (part == 1 ? 1e-20f : 1);
      exact += (long double)x * x;
    }
    const double sum = emulated::sum_of_eight_squares(g);
    check(std::fabs((long double)sum - exact) <= 0x1p-22L * exact, "a sum of squares", i);
  }
  for (float odd : {kInf, -kInf, kNan}) {
    const float g[8] = {1, 2, odd, 4, 5, 6, 7, 8};
    const double sum = emulated::sum_of_eight_squares(g);
    check(odd != odd ? sum != sum : sum == double(kInf), "that is not finite");
  }
}

void test_gpu() {
  if (!std::strstr(cpu_isas(), "avx2")) return;
  test_quick_numbers();
  test_sums_of_squares();
  test_gpu_formats();
  test_gpu_unusual_numbers();
  test_gpu_norm();
  test_gpu_nonfinite();
  test_gpu_stages();
  test_gpu_found_inf();
  test_gpu_missing_gradients();
  test_gpu_ends_of_coded_states();
  test_gpu_learning_rate();
  test_gpu_grids();
}

}  // namespace
