// CUDA launchers: the only place with grids.
#include <cuda_runtime.h>

#include <type_traits>
#include <vector>

#include "adalomo.cuh"
#include "adalomo_groups.h"
#include "decide.cuh"
#include "dispatch.h"
#include "grad_sumsq.cuh"
#include "lomo_update.cuh"

namespace lomo::cuda {
namespace {

Status text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Makes a device current for one call; the caller's device is back afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

#ifdef __CUDACC__  // the tests run this file on the CPU with a launch() of their own
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, cudaStream_t stream, const Args&... args) {
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(args...);
}
#endif

constexpr Status kTooLarge = "a tensor is larger than one grid can cover";

// Calls run(table, blocks, begin) for consecutive pieces [begin, begin + table.count) of a list,
// as few as a table's size and a grid's allow. item_of turns a tensor into a table's item.
template <int kCapacity, typename Ref, typename ItemOf, typename BlocksOf, typename Run>
Status for_tables(const Ref* tensors, int64_t count, const ItemOf& item_of,
                  const BlocksOf& blocks_of, const Run& run) {
  Table<decltype(item_of(*tensors)), kCapacity> table;
  for (int64_t begin = 0; begin < count; begin += table.count) {
    int64_t blocks = 0;
    table.count = 0;
    for (int64_t k = begin; k < count && table.count < kCapacity; ++k) {
      const auto item = item_of(tensors[k]);
      if (blocks + blocks_of(item) > Launch::kMaxBlocks) break;
      table.item[table.count] = item;
      table.first_block[table.count++] = uint32_t(blocks);
      blocks += blocks_of(item);
    }
    if (table.count == 0) return kTooLarge;
    if (blocks > 0) run(table, blocks, begin);
  }
  return text(cudaGetLastError());
}

// Likewise, in the smallest table that holds the list.
template <typename Ref, typename ItemOf, typename Run>
Status for_fitting_tables(const Ref* tensors, int64_t count, const ItemOf& item_of,
                          const Run& run) {
  const auto blocks = [](const auto& item) { return blocks_of(item); };
  if (count == 1) return for_tables<1>(tensors, count, item_of, blocks, run);
  if (count <= Launch::kFew) return for_tables<Launch::kFew>(tensors, count, item_of, blocks, run);
  return for_tables<Launch::kMany>(tensors, count, item_of, blocks, run);
}

template <typename P, typename G, Rounding R>
Status update_rounded(const TensorRef* tensors, int64_t count, const UpdateArgs& args,
                      cudaStream_t stream) {
  const Update update(args);
  const auto run = [&](const auto& table, int64_t blocks, int64_t) {
    launch(lomo_update_kernel<P, G, R, table.capacity>, blocks, stream, table, update);
  };
  return for_fitting_tables(tensors, count, piece_of<P>, run);
}

template <typename G>
Status sumsq_of(const GradRef* grads, int64_t count, const SumsqArgs& args, const Tickets& tickets,
                cudaStream_t stream) {
  static_assert(Launch::kMany <= kTickets);
  if (tickets.fresh) {
    const size_t bytes = kTickets * sizeof(uint32_t);
    if (const Status failed = text(cudaMemsetAsync(tickets.counters, 0, bytes, stream)))
      return failed;
  }
  float* partials = args.partials;
  const auto itself = [](const GradRef& grad) { return grad; };
  const auto run = [&](const auto& table, int64_t blocks, int64_t begin) {
    launch(sumsq_chunk_kernel<G, table.capacity>, blocks, stream, table, args.inv_scale,
           args.found_inf, partials, args.sumsq + begin, tickets.counters);
    if (partials) partials += blocks;
  };
  return for_fitting_tables(grads, count, itself, run);
}

// A list of AdaLomo's items in the smallest table that holds it.
template <bool kFactored, typename BlocksOf, typename Run>
Status for_items(const AdaItem* items, int64_t count, const BlocksOf& blocks, const Run& run) {
  constexpr int kFew = kFactored ? 1 : Launch::kAdaFew;  // a large matrix is alone
  const auto itself = [](const AdaItem& t) { return t; };
  const auto of_table = [&](const auto& table, int64_t n, int64_t) { run(table, n); };
  if (count <= kFew) return for_tables<kFew>(items, count, itself, blocks, of_table);
  return for_tables<Launch::kAdaMany>(items, count, itself, blocks, of_table);
}

constexpr auto kTiles = [](const AdaItem& t) { return blocks_of(t); };
constexpr auto kMoments = [](const AdaItem& t) { return moment_blocks_of(t); };
constexpr auto kOne = [](const AdaItem&) { return int64_t(1); };

// Calls sweep(first item, how many, whether they are matrices) for those that share launches.
template <typename Sweep>
Status for_groups(const AdaGroups& groups, const Sweep& sweep) {
  int64_t begin = 0;
  for (const int64_t end : groups.ends) {
    const Status status = sweep(&groups.matrices[begin], end - begin, std::true_type());
    if (status) return status;
    begin = end;
  }
  return sweep(groups.vectors.data(), int64_t(groups.vectors.size()), std::false_type());
}

template <typename G>
Status statistics(const AdaItem* items, int64_t count, const AdaArgs& args, cudaStream_t stream) {
  return for_items<true>(items, count, kTiles, [&](const auto& table, int64_t blocks) {
    constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
    const bool clips = args.clip_value < INFINITY;
    launch(clips ? ada_stats_kernel<G, true, kCapacity> : ada_stats_kernel<G, false, kCapacity>,
           blocks, stream, table, args);
  });
}

Status moments(const AdaItem* items, int64_t count, const AdaArgs& args, cudaStream_t stream) {
  return for_items<true>(items, count, kMoments, [&](const auto& table, int64_t blocks) {
    launch(ada_moments_kernel<std::decay_t<decltype(table)>::capacity>, blocks, stream, table,
           args);
  });
}

template <typename G, bool kFactored>
Status norms(const AdaItem* items, int64_t count, const AdaArgs& args, cudaStream_t stream) {
  return for_items<kFactored>(items, count, kTiles, [&](const auto& table, int64_t blocks) {
    constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
    launch(ada_norm_kernel<G, kFactored, kCapacity>, blocks, stream, table, args);
  });
}

template <bool kFactored>
Status steps(const AdaItem* items, int64_t count, const AdaArgs& args, cudaStream_t stream) {
  return for_items<kFactored>(items, count, kOne, [&](const auto& table, int64_t blocks) {
    launch(ada_step_kernel<std::decay_t<decltype(table)>::capacity>, blocks, stream, table, args);
  });
}

template <typename P, typename G, Rounding R, bool kFactored>
Status updates(const AdaItem* items, int64_t count, const AdaUpdate& update, cudaStream_t stream) {
  return for_items<kFactored>(items, count, kTiles, [&](const auto& table, int64_t blocks) {
    constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
    launch(ada_update_kernel<P, G, R, kFactored, kCapacity>, blocks, stream, table, update);
  });
}

// One block an item.
Status tell(const std::vector<AdaItem>& items, cudaStream_t stream) {
  const auto itself = [](const AdaItem& t) { return t; };
  return for_tables<Launch::kAdaMany>(items.data(), int64_t(items.size()), itself, kOne,
                                      [&](const auto& table, int64_t blocks, int64_t) {
                                        launch(ada_tell_kernel<Launch::kAdaMany>, blocks, stream,
                                               table);
                                      });
}

template <typename P, typename G, Rounding R>
Status adalomo_of(const AdaRef* tensors, int64_t count, const AdaArgs& args, float* scratch,
                  cudaStream_t stream) {
  const AdaUpdate update(args);
  const AdaGroups groups(tensors, count, scratch);
  return for_groups(groups, [&](const AdaItem* items, int64_t n, auto factored) {
    constexpr bool kFactored = decltype(factored)::value;
    Status status = nullptr;
    if (kFactored && !status) status = statistics<G>(items, n, args, stream);
    if (kFactored && !status) status = moments(items, n, args, stream);
    if (!status) status = norms<G, kFactored>(items, n, args, stream);
    if (!status) status = steps<kFactored>(items, n, args, stream);
    return status ? status : updates<P, G, R, kFactored>(items, n, update, stream);
  });
}

template <typename ItemOf>
std::vector<AdaItem> items_of(const AdaPart* parts, int64_t count, const ItemOf& item_of) {
  std::vector<AdaItem> items;
  for (int64_t k = 0; k < count; ++k) items.push_back(item_of(parts[k]));
  return items;
}

template <typename P, typename G, Rounding R>
Status adalomo_parts_of(const AdaPart* parts, int64_t count, const AdaArgs& args, AdaCall call,
                        const AdaMessages& messages, cudaStream_t stream) {
  if (call == AdaCall::statistics) {
    for (int64_t k = 0; k < count; ++k) {  // one after the other: their passing memory is one
      if (!parts[k].factored) continue;
      const AdaItem t = telling(parts[k], messages);
      Status status = t.numel > 0 ? statistics<G>(&t, 1, args, stream) : nullptr;
      if (!status) status = moments(&t, 1, args, stream);
      if (status) return status;
    }
    const auto of_squares = [&](const AdaPart& part) {
      AdaItem t = telling(part, messages);
      t.norms = t.sums;
      return t;
    };
    return tell(items_of(parts, count, of_squares), stream);
  }
  const auto told_items =
      items_of(parts, count, [&](const AdaPart& part) { return told(part, messages); });
  AdaGroups groups;
  for (const AdaItem& t : told_items) groups.add(t);
  if (call == AdaCall::squares) {
    std::vector<AdaItem> columns;
    for (int64_t k = 0; k < count; ++k)
      if (parts[k].joined) columns.push_back(columns_of(parts[k], messages));
    Status status = moments(columns.data(), int64_t(columns.size()), args, stream);
    if (status) return status;
    status = for_groups(groups, [&](const AdaItem* items, int64_t n, auto factored) {
      return norms<G, decltype(factored)::value>(items, n, args, stream);
    });
    return status ? status : tell(told_items, stream);
  }
  const auto step_items = items_of(parts, count, [&](const AdaPart& part) {
    AdaItem t = told(part, messages);
    t.norms = t.told, t.sums = messages.statistics + part.slot;
    t.tiles = 1, t.numel = part.whole_numel;
    return t;
  });
  const Status status = steps<false>(step_items.data(), count, args, stream);
  if (status) return status;
  const AdaUpdate update(args);
  return for_groups(groups, [&](const AdaItem* items, int64_t n, auto factored) {
    return updates<P, G, R, decltype(factored)::value>(items, n, update, stream);
  });
}

}  // namespace

Status device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  (void)cudaGetLastError();  // a missing driver is an answer here, not an error of the next call
  return text(error);
}

Status unavailable(int device) {
  const OnDevice guard(device);
  cudaError_t error = guard.error();
  cudaFuncAttributes attributes;
  if (error == cudaSuccess)  // fails where the build holds no code for the device's architecture
    error = cudaFuncGetAttributes(&attributes,
                                  lomo_update_kernel<BFloat16, BFloat16, Rounding::stochastic, 1>);
  (void)cudaGetLastError();
  return text(error);
}

Status lomo_update(const TensorRef* tensors, int64_t count, DType param, DType grad,
                   Rounding rounding, const UpdateArgs& args, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    return update_rounded<decltype(p), decltype(g), decltype(r)::value>(
        tensors, count, args, static_cast<cudaStream_t>(stream));
  });
}

Status grad_sumsq(const GradRef* grads, int64_t count, DType grad, const SumsqArgs& args,
                  const Tickets& tickets, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch(grad, [&](auto g) {
    return sumsq_of<decltype(g)>(grads, count, args, tickets, static_cast<cudaStream_t>(stream));
  });
}

Status adalomo_update(const AdaRef* tensors, int64_t count, DType param, DType grad,
                      Rounding rounding, const AdaArgs& args, float* scratch, int device,
                      void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    return adalomo_of<decltype(p), decltype(g), decltype(r)::value>(
        tensors, count, args, scratch, static_cast<cudaStream_t>(stream));
  });
}

Status adalomo_parts(const AdaPart* parts, int64_t count, DType param, DType grad,
                     Rounding rounding, const AdaArgs& args, AdaCall call,
                     const AdaMessages& messages, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    return adalomo_parts_of<decltype(p), decltype(g), decltype(r)::value>(
        parts, count, args, call, messages, static_cast<cudaStream_t>(stream));
  });
}

Status adalomo_sums(const AdaRef& tensor, DType param, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  const AdaItem t = item_of(tensor, tensor.rows, 0, nullptr, nullptr);
  if (t.tiles > Launch::kMaxBlocks) return kTooLarge;
  dispatch(param, [&](auto p) {
    launch(ada_sums_kernel<decltype(p)>, t.tiles, static_cast<cudaStream_t>(stream), t);
  });
  return text(cudaGetLastError());
}

Status decide(const DecideArgs& args, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  launch(decide_kernel, 1, static_cast<cudaStream_t>(stream), args);
  return text(cudaGetLastError());
}

}  // namespace lomo::cuda
