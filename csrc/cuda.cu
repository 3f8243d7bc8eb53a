// CUDA launchers: the only place with grids.
#include <cuda_runtime.h>

#include <algorithm>

#include "decide.cuh"
#include "dispatch.h"
#include "sumsq.cuh"
#include "update.cuh"

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
    if (table.count == 0) return "a tensor is larger than one grid can cover";
    run(table, blocks, begin);
  }
  return text(cudaGetLastError());
}

template <typename P, typename G, Rounding R>
Status update_rounded(const TensorRef* tensors, int64_t count, const UpdateArgs& args,
                      cudaStream_t stream) {
  const Update update(args);
  const auto run = [&](const auto& table, int64_t blocks, int64_t) {
    launch(lomo_update_kernel<P, G, R, table.capacity>, blocks, stream, table, update);
  };
  return count == 1 ? for_tables<1>(tensors, count, piece_of<P>, run)
                    : for_tables<kMany>(tensors, count, piece_of<P>, run);
}

template <typename P, typename G>
Status update_pair(Rounding rounding, const TensorRef* tensors, int64_t count,
                   const UpdateArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(typename P::Bits) == 2) {
    if (rounding == Rounding::stochastic)
      return update_rounded<P, G, Rounding::stochastic>(tensors, count, args, stream);
  }
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (rounding == Rounding::split)
      return update_rounded<P, G, Rounding::split>(tensors, count, args, stream);
  }
  return update_rounded<P, G, Rounding::nearest>(tensors, count, args, stream);
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
  return count == 1 ? for_tables<1>(grads, count, itself, run)
                    : for_tables<kMany>(grads, count, itself, run);
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
  return dispatch_pair(param, grad, [&](auto p, auto g) {
    return update_pair<decltype(p), decltype(g)>(rounding, tensors, count, args,
                                                 static_cast<cudaStream_t>(stream));
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

Status decide(const DecideArgs& args, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return text(guard.error());
  launch(decide_kernel, 1, static_cast<cudaStream_t>(stream), args);
  return text(cudaGetLastError());
}

}  // namespace lomo::cuda
