// CUDA launchers: the only place with grids.
#include <cuda_runtime.h>

#include <type_traits>
#include <vector>

#include "adalomo.cuh"
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

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
constexpr Status kTooLarge = "a tensor is larger than one grid can cover";

// Calls run(table, blocks, begin) for consecutive pieces [begin, begin + table.count) of a list,
// as few as a table's size and a grid's allow. item_of turns a tensor into a table's item.
template <int kCapacity, typename Ref, typename ItemOf, typename Run>
Status for_tables(const Ref* tensors, int64_t count, const ItemOf& item_of, const Run& run) {
  Table<decltype(item_of(*tensors)), kCapacity> table;
  for (int64_t begin = 0; begin < count; begin += table.count) {
    int64_t blocks = 0;
    table.count = 0;
    for (int64_t k = begin; k < count && table.count < kCapacity; ++k) {
      const auto item = item_of(tensors[k]);
      if (blocks + blocks_of(item) > kMaxBlocks) break;
      table.item[table.count] = item;
      table.first_block[table.count++] = uint32_t(blocks);
      blocks += blocks_of(item);
    }
    if (table.count == 0) return kTooLarge;
    run(table, blocks, begin);
  }
  return text(cudaGetLastError());
}

// Likewise, in the smallest table that holds the list.
template <typename Ref, typename ItemOf, typename Run>
Status for_fitting_tables(const Ref* tensors, int64_t count, const ItemOf& item_of,
                          const Run& run) {
  if (count == 1) return for_tables<1>(tensors, count, item_of, run);
  if (count <= kFew) return for_tables<kFew>(tensors, count, item_of, run);
  return for_tables<kMany>(tensors, count, item_of, run);
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
Status sumsq_of(const GradRef* grads, int64_t count, const SumsqArgs& args, cudaStream_t stream) {
  int64_t chunks = 0;
  for (int64_t k = 0; k < count; ++k) chunks += blocks_of(grads[k]);
  // With one chunk a gradient, the chunks' sums are the result and the second launch is not needed.
  const bool direct = chunks == count;
  float* partials = direct ? args.sumsq : args.partials;
  const auto itself = [](const GradRef& grad) { return grad; };
  const auto run = [&](const auto& table, int64_t blocks, int64_t begin) {
    launch(sumsq_chunk_kernel<G, table.capacity>, blocks, stream, table, args.inv_scale,
           args.found_inf, partials);
    if (!direct)
      launch(sum_partials_kernel<table.capacity>, table.count, stream, table, partials,
             args.sumsq + begin);
    partials += blocks;
  };
  return for_fitting_tables(grads, count, itself, run);
}

template <typename G>
void statistics(const AdaItem& t, const AdaArgs& args, cudaStream_t stream) {
  const bool clips = args.clip_value < INFINITY;
  launch(clips ? ada_stats_kernel<G, true> : ada_stats_kernel<G, false>, t.tiles, stream, t, args);
}

void moments(const AdaItem& t, const AdaArgs& args, cudaStream_t stream) {
  const int64_t groups = t.batch * (t.row_groups + t.col_groups);
  if (groups > 0) launch(ada_moments_kernel, groups, stream, t, args);
}

// Calls sweep(table, blocks, whether it is a matrix) for a list. Rows and columns have kernels of
// their own, one tensor at a time; what is small, as tensors of less than two dimensions are in
// most models, shares launches.
template <typename Ref, typename ItemOf, typename Sweep>
Status for_kinds(const Ref* tensors, int64_t count, const ItemOf& item_of, const Sweep& sweep) {
  std::vector<Ref> together;
  for (int64_t k = 0; k < count; ++k) {
    if (!tensors[k].factored) {
      together.push_back(tensors[k]);
      continue;
    }
    const auto run = [&](const auto& table, int64_t blocks, int64_t) {
      sweep(table, blocks, std::true_type());
    };
    const Status status = for_tables<1>(&tensors[k], 1, item_of, run);
    if (status) return status;
  }
  const auto run = [&](const auto& table, int64_t blocks, int64_t) {
    sweep(table, blocks, std::false_type());
  };
  return for_tables<kAdaMany>(together.data(), int64_t(together.size()), item_of, run);
}

template <typename P, typename G, Rounding R>
Status adalomo_of(const AdaRef* tensors, int64_t count, const AdaArgs& args, cudaStream_t stream) {
  const AdaUpdate update(args);
  const auto whole = [](const AdaRef& ref) { return item_of(ref); };
  return for_kinds(tensors, count, whole, [&](const auto& table, int64_t blocks, auto factored) {
    constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
    if constexpr (factored.value) {
      statistics<G>(table.item[0], args, stream);
      moments(table.item[0], args, stream);
    }
    launch(ada_norm_kernel<G, factored.value, kCapacity>, blocks, stream, table, args);
    launch(ada_step_kernel<kCapacity>, table.count, stream, table, args);
    launch(ada_update_kernel<P, G, R, factored.value, kCapacity>, blocks, stream, table, update);
  });
}

template <typename P, typename G, Rounding R>
Status adalomo_parts_of(const AdaPart* parts, int64_t count, const AdaArgs& args, AdaCall call,
                        const AdaMessages& messages, cudaStream_t stream) {
  const auto tell = [&](const auto& item_of) {
    return for_tables<kAdaMany>(parts, count, item_of, [&](const auto& table, int64_t, int64_t) {
      launch(ada_tell_kernel<kAdaMany>, table.count, stream, table);
    });
  };
  const auto told_of = [&](const AdaPart& part) { return told(part, messages); };
  if (call == AdaCall::statistics) {
    for (int64_t k = 0; k < count; ++k) {
      if (!parts[k].factored) continue;
      const AdaItem t = telling(parts[k], messages);
      if (t.tiles > kMaxBlocks) return kTooLarge;
      if (t.numel > 0) statistics<G>(t, args, stream);
      moments(t, args, stream);
    }
    return tell([&](const AdaPart& part) {
      AdaItem t = telling(part, messages);
      t.norms = t.sums;
      return t;
    });
  }
  if (call == AdaCall::squares) {
    for (int64_t k = 0; k < count; ++k)
      if (parts[k].joined) moments(columns_of(parts[k], messages), args, stream);
    const Status status =
        for_kinds(parts, count, told_of, [&](const auto& table, int64_t blocks, auto factored) {
          constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
          launch(ada_norm_kernel<G, factored.value, kCapacity>, blocks, stream, table, args);
        });
    return status ? status : tell(told_of);
  }
  const auto step_of_part = [&](const AdaPart& part) {
    AdaItem t = told(part, messages);
    t.norms = t.told, t.sums = messages.statistics + part.slot;
    t.tiles = 1, t.numel = part.whole_numel;
    return t;
  };
  const Status status =
      for_tables<kAdaMany>(parts, count, step_of_part, [&](const auto& table, int64_t, int64_t) {
        launch(ada_step_kernel<kAdaMany>, table.count, stream, table, args);
      });
  if (status) return status;
  const AdaUpdate update(args);
  return for_kinds(parts, count, told_of, [&](const auto& table, int64_t blocks, auto factored) {
    constexpr int kCapacity = std::decay_t<decltype(table)>::capacity;
    launch(ada_update_kernel<P, G, R, factored.value, kCapacity>, blocks, stream, table, update);
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
                  int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch(grad, [&](auto g) {
    return sumsq_of<decltype(g)>(grads, count, args, static_cast<cudaStream_t>(stream));
  });
}

Status adalomo_update(const AdaRef* tensors, int64_t count, DType param, DType grad,
                      Rounding rounding, const AdaArgs& args, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  return dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    return adalomo_of<decltype(p), decltype(g), decltype(r)::value>(
        tensors, count, args, static_cast<cudaStream_t>(stream));
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
  const AdaItem t = item_of(tensor);
  if (t.tiles > kMaxBlocks) return kTooLarge;
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
