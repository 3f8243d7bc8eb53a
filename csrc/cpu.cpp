// CPU launchers: which instruction set, which threads, which piece of which tensor.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "adalomo_groups.h"
#include "cpu_loops.h"
#include "decide.h"

namespace lomo {

int64_t adalomo_scratch(const AdaRef* tensors, int64_t count) {
  int64_t floats = 0;
  AdaGroups(tensors, count, nullptr, &floats);
  return floats;
}

AdaSizes adalomo_sizes(int64_t batch, int64_t rows, int64_t cols, bool factored,
                       int64_t whole_rows) {
  AdaRef ref{};
  ref.batch = batch, ref.rows = rows, ref.cols = cols, ref.factored = factored;
  AdaSizes sizes;
  item_of(ref, whole_rows, 0, nullptr, nullptr, &sizes);
  return sizes;
}

}  // namespace lomo

namespace lomo::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Loops* loops;
};

// Best first.
std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets;
#ifdef LOMO_X86_DISPATCH
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back({"avx512", &loops_avx512});
  if (__builtin_cpu_supports("avx2")) sets.push_back({"avx2", &loops_avx2});
#endif
  sets.push_back({"baseline", &loops_baseline});
  return sets;
}

InstructionSet& chosen() {
  static InstructionSet set = available().front();
  return set;
}

// Threads are started per call instead of kept: starting one was measured at about 80 us, half of
// what its least share of work takes; nothing spins beside PyTorch's own threads between calls, and
// a forked process finds no dead pool.
constexpr int64_t kElementsPerThread = 1 << 19;
constexpr int64_t kElementsPerItem = 1 << 16;

template <typename F>
void parallel_for(int64_t items, int64_t elements, int max_threads, const F& run) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(i);
  };
  int64_t threads = elements / kElementsPerThread;
  threads = threads < max_threads ? threads : max_threads;
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no more threads to give: those that started and this one do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
}

// Cuts a list of tensors into items of at most `size` elements, an empty tensor into one.
class Items {
 public:
  template <typename Ref>
  Items(const Ref* tensors, int64_t count, int64_t size) : first_(count + 1), size_(size) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = tensors[k].numel;
      first_[k + 1] = first_[k] + (n > size ? (n + size - 1) / size : 1);
      elements_ += n;
    }
  }
  int64_t total() const { return first_.back(); }
  int64_t elements() const { return elements_; }
  int64_t first(int64_t tensor) const { return first_[tensor]; }
  int64_t tensor(int64_t item) const {
    int64_t low = 0, high = int64_t(first_.size()) - 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= item ? low : high) = middle;
    }
    return low;
  }
  int64_t begin(int64_t item, int64_t tensor) const { return (item - first_[tensor]) * size_; }

 private:
  std::vector<int64_t> first_;
  int64_t size_, elements_ = 0;
};

struct AdaFormats {
  DType param, grad;
  Rounding rounding;
};

// AdaLomo's sweeps over one tensor, or over a part of it.
struct AdaSweeps {
  const AdaItem t;
  const AdaFormats& formats;
  const AdaArgs& args;
  const int threads;
  const AdaRule rule;
  const Loops& loops;

  AdaSweeps(const AdaItem& item, const AdaFormats& f, const AdaArgs& a, int max_threads)
      : t(item),
        formats(f),
        args(a),
        threads(max_threads),
        rule(rule_of(a, *item.step)),
        loops(*chosen().loops) {}

  template <typename F>
  void for_tiles(const F& run) const {
    parallel_for(t.tiles, t.numel, threads, run);
  }

  void statistics() const {
    for_tiles([&](int64_t tile) { loops.ada_stats(formats.grad, t, tile, rule); });
  }

  void moments() const {
    const int64_t parts = t.batch * (t.across * t.rows + t.down * t.cols);
    parallel_for(t.batch * (t.row_groups + t.col_groups), parts, threads,
                 [&](int64_t group) { loops.ada_moments(t, group, rule); });
  }

  void norm() const {
    for_tiles([&](int64_t tile) { loops.ada_norm(formats.grad, t, tile, rule); });
  }

  float total(const float* tiles) const {
    return t.tiles == 1 ? *tiles : loops.sum_partials(tiles, t.tiles);
  }

  void update(float update_square, float param_square, int64_t numel) const {
    const AdaStep step = step_of(args, update_square, param_square, numel);
    if (step.size != step.size) {
      if (args.found_inf) *args.found_inf = 1.0f;
      return;
    }
    const PhiloxKey key(args.seed);
    for_tiles([&](int64_t tile) {
      loops.ada_update(formats.param, formats.grad, formats.rounding, t, tile, rule, step, key);
    });
    if (t.factored) {
      std::copy_n(t.new_row, t.batch * t.rows, t.row);
      std::copy_n(t.new_col, t.batch * t.cols, t.col);
    }
    *t.step += 1;
  }
};

}  // namespace

const char* instruction_set() { return chosen().name; }

bool use_instruction_set(const char* name) {
  for (const InstructionSet& set : available()) {
    if (std::strcmp(set.name, name) == 0) {
      chosen() = set;
      return true;
    }
  }
  return false;
}

Status lomo_update(const TensorRef* tensors, int64_t count, DType param, DType grad,
                   Rounding rounding, const UpdateArgs& args, int threads) {
  if (args.skip && *args.skip != 0.0f) {
    if (args.found_inf) *args.found_inf = 1.0f;
    return nullptr;
  }
  const UpdateRule rule = rule_of(args);
  const PhiloxKey key(args.seed);
  const Loops& loops = *chosen().loops;
  const Items items(tensors, count, kElementsPerItem);
  std::atomic<bool> finite{true};
  parallel_for(items.total(), items.elements(), threads, [&](int64_t item) {
    const int64_t k = items.tensor(item);
    const TensorRef& t = tensors[k];
    const int64_t begin = items.begin(item, k), end = begin + kElementsPerItem;
    if (!loops.update(param, grad, rounding, t, begin, end < t.numel ? end : t.numel, rule,
                      args.step, key))
      finite.store(false, std::memory_order_relaxed);
  });
  if (!finite && args.found_inf) *args.found_inf = 1.0f;
  return nullptr;
}

Status grad_sumsq(const GradRef* grads, int64_t count, DType grad, const SumsqArgs& args,
                  int threads) {
  const float inv_scale = args.inv_scale ? *args.inv_scale : 1.0f;
  const Loops& loops = *chosen().loops;
  const Items items(grads, count, kNormChunk);
  const int64_t width = grad == DType::float32 ? 4 : 2;
  // With one chunk a gradient, the chunks' sums are the result.
  float* partials = items.total() == count ? args.sumsq : args.partials;
  std::atomic<bool> finite{true};
  parallel_for(items.total(), items.elements(), threads, [&](int64_t item) {
    const int64_t k = items.tensor(item), begin = items.begin(item, k);
    const int64_t left = grads[k].numel - begin;
    bool chunk_finite = true;
    partials[item] =
        loops.sumsq_chunk(grad, static_cast<const char*>(grads[k].grad) + begin * width,
                          left < kNormChunk ? left : kNormChunk, inv_scale, &chunk_finite);
    if (!chunk_finite) finite.store(false, std::memory_order_relaxed);
  });
  if (items.total() != count) {
    for (int64_t k = 0; k < count; ++k)
      args.sumsq[k] =
          loops.sum_partials(partials + items.first(k), items.first(k + 1) - items.first(k));
  }
  if (!finite && args.found_inf) *args.found_inf = 1.0f;
  return nullptr;
}

Status adalomo_update(const AdaRef* tensors, int64_t count, DType param, DType grad,
                      Rounding rounding, const AdaArgs& args, float* scratch, int threads) {
  const AdaFormats formats{param, grad, rounding};
  const AdaGroups groups(tensors, count, scratch);
  for (const auto* items : {&groups.vectors, &groups.matrices}) {
    for (const AdaItem& t : *items) {
      const AdaSweeps sweeps(t, formats, args, threads);
      if (t.factored) {
        sweeps.statistics();
        sweeps.moments();
      }
      sweeps.norm();
      sweeps.update(sweeps.total(t.norms), sweeps.total(t.sums), t.numel);
    }
  }
  return nullptr;
}

Status adalomo_parts(const AdaPart* parts, int64_t count, DType param, DType grad,
                     Rounding rounding, const AdaArgs& args, AdaCall call,
                     const AdaMessages& messages, int threads) {
  const AdaFormats formats{param, grad, rounding};
  for (int64_t k = 0; k < count; ++k) {
    const AdaPart& part = parts[k];
    if (call == AdaCall::statistics) {
      const AdaSweeps sweeps(telling(part, messages), formats, args, threads);
      const AdaItem& t = sweeps.t;
      if (t.factored) {
        sweeps.statistics();
        sweeps.moments();
      }
      t.told[0] = sweeps.total(t.sums);
      if (part.joined) t.told[1] = sweeps.loops.ada_row_sum(t, 0);
      continue;
    }
    const AdaSweeps sweeps(told(part, messages), formats, args, threads);
    const AdaItem& t = sweeps.t;
    if (call == AdaCall::update) {
      sweeps.update(*t.told, messages.statistics[part.slot], part.whole_numel);
      continue;
    }
    if (part.joined) AdaSweeps(columns_of(part, messages), formats, args, threads).moments();
    sweeps.norm();
    *t.told = sweeps.total(t.norms);
  }
  return nullptr;
}

Status adalomo_sums(const AdaRef& tensor, DType param, int threads) {
  const AdaItem t = item_of(tensor, tensor.rows, 0, nullptr, nullptr);
  const Loops& loops = *chosen().loops;
  parallel_for(t.tiles, t.numel, threads, [&](int64_t tile) { loops.ada_sums(param, t, tile); });
  return nullptr;
}

Status decide(const DecideArgs& args) {
  double lane[kDecideLanes] = {};
  for (int64_t i = 0; i < args.count; ++i) {
    double& sum = lane[i % kDecideLanes];
    sum = sum + args.sumsq[i];
  }
  for (int width = kDecideLanes / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[2 * i] + lane[2 * i + 1];
  bool found = args.decisions[kFoundInf] != 0.0f || args.decisions[kSkip] != 0.0f;
  for (int64_t i = 0; i < args.flags; ++i) found |= args.found_inf[i] != 0.0f;
  lomo::decide(args, lane[0], found);
  return nullptr;
}

}  // namespace lomo::cpu
