// The fused update: one read of the gradient, one read and one write of the parameter.
#pragma once
#include "philox.h"
#include "tables.cuh"
#include "update.h"

namespace lomo::cuda {

// A thread updates one vector: 16 bytes of parameter. No loop over the grid and no unrolling: with
// a block per 4 KiB of parameter the scheduler keeps enough loads in flight.
template <typename P>
constexpr int kVector = 16 / int(sizeof(typename P::Bits));

// One tensor as a kernel sees it: up to kVector - 1 elements before the first 16-byte boundary of
// the parameter, then whole vectors, then up to kVector - 1 elements.
struct Piece {
  void* param;
  const void* grad;
  void* low;
  int64_t offset, vectors;
  uint32_t param_id;
  int16_t head, tail;
};
static_assert(sizeof(Table<Piece, kMany>) + sizeof(UpdateArgs) + sizeof(PhiloxKey) < 32764);

template <typename P>
inline Piece piece_of(const TensorRef& t) {
  constexpr int kWidth = sizeof(typename P::Bits);
  const int past = int(reinterpret_cast<uintptr_t>(t.param) & 15) / kWidth;
  const int64_t head = past == 0 ? 0 : kVector<P> - past;
  Piece piece{t.param, t.grad, t.low, t.offset, 0, uint32_t(t.param_id), 0, 0};
  piece.head = int16_t(head < t.numel ? head : t.numel);
  piece.vectors = (t.numel - piece.head) / kVector<P>;
  piece.tail = int16_t(t.numel - piece.head - piece.vectors * kVector<P>);
  return piece;
}

inline int64_t blocks_of(const Piece& piece) {
  return piece.vectors <= kThreads ? 1 : (piece.vectors + kThreads - 1) / kThreads;
}

// What a kernel needs to know besides its tensors.
struct Update {
  UpdateArgs args;
  PhiloxKey key;

  explicit Update(const UpdateArgs& a) : args(a), key(a.seed) {}
  __device__ bool skip() const { return args.skip && *args.skip != 0.0f; }
};

// False when the gradient was not finite or the step is to be skipped.
template <typename P, typename G, Rounding R>
__device__ __forceinline__ bool update_one(const Piece& t, int64_t i, const Update& update) {
  if (update.skip()) return false;
  auto* p = static_cast<typename P::Bits*>(t.param) + i;
  const auto g = static_cast<const typename G::Bits*>(t.grad)[i];
  int16_t unused = 0;
  int16_t& low = R == Rounding::split ? static_cast<int16_t*>(t.low)[i] : unused;
  const uint32_t random = R == Rounding::stochastic
                              ? random_element(update.key, update.args.step, t.param_id,
                                               uint64_t(t.offset) + uint64_t(i))
                              : 0;
  return update_element<P, G, R>(*p, g, low, random, rule_of(update.args));
}

template <typename P, typename G, Rounding R>
__device__ __forceinline__ bool update_vector(const Piece& t, int64_t i, const Update& update) {
  constexpr int kCount = kVector<P>;
  Vector<sizeof(typename P::Bits), kCount> pv;
  Vector<sizeof(typename G::Bits), kCount> gv;
  Vector<2, R == Rounding::split ? kCount : 8> lv = {};
  auto* p = static_cast<typename P::Bits*>(t.param) + i;
  auto* g = static_cast<const typename G::Bits*>(t.grad) + i;
  auto* l = static_cast<int16_t*>(t.low) + (R == Rounding::split ? i : 0);
  const uint64_t element = uint64_t(t.offset) + uint64_t(i);

  // The gradient may start elsewhere between two 16-byte boundaries than the parameter, and a view
  // may start inside a group of random bits.
  bool whole = gv.aligned(g);
  if constexpr (R == Rounding::split) whole &= lv.aligned(l);
  if constexpr (R == Rounding::stochastic) whole &= (element & 7) == 0;
  if (whole) {
    pv.load(p);
    gv.load(g);
    if constexpr (R == Rounding::split) lv.load(l);
    // Asked for after the streams, so that one latency covers them all.
    const UpdateRule rule = rule_of(update.args);
    const bool skip = update.skip();
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kCount; ++k) finite &= is_finite(G::load(gv[k]));
    if (finite) {
      Philox r = {};
      if constexpr (R == Rounding::stochastic)
        r = random_group(update.key, update.args.step, t.param_id, element >> 3);
      auto new_p = pv;
      auto new_l = lv;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        int16_t low = int16_t(lv[k]);
        const uint32_t random = r.word[k / 2] >> (16 * (k & 1));
        new_p.set(k, update_finite<P, G, R>(pv[k], gv[k], low, random, rule));
        if constexpr (R == Rounding::split) new_l.set(k, uint16_t(low));
      }
      if (skip) return false;
      new_p.store(p);
      if constexpr (R == Rounding::split) new_l.store(l);
      return true;
    }
  }
  bool good = true;
#pragma unroll 1
  for (int k = 0; k < kCount; ++k) good &= update_one<P, G, R>(t, i + k, update);
  return good;
}

template <typename P, typename G, Rounding R, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    lomo_update_kernel(const __grid_constant__ Table<Piece, kCapacity> table,
                       const __grid_constant__ Update update) {
  const int k = table.find(blockIdx.x);
  const Piece& t = table.item[k];
  const uint32_t block = blockIdx.x - table.first_block[k];
  const int64_t vector = int64_t(block) * kThreads + threadIdx.x;

  // An empty tensor has no element to carry the flag on.
  bool good = (blockIdx.x | threadIdx.x) != 0 || !update.skip();
  if (vector < t.vectors) good &= update_vector<P, G, R>(t, t.head + vector * kVector<P>, update);
  if (block == 0 && int(threadIdx.x) < t.head + t.tail) {
    const int64_t before = int(threadIdx.x) < t.head ? 0 : t.vectors * kVector<P>;
    good &= update_one<P, G, R>(t, before + threadIdx.x, update);
  }
  if (!good && update.args.found_inf) *update.args.found_inf = 1.0f;  // all write the same
}

}  // namespace lomo::cuda
