// The fused update: one read of the gradient, one read and one write of the parameter.
#pragma once
#include "lomo_update.h"
#include "philox.h"
#include "tables.cuh"

namespace lomo::cuda {

constexpr int kVectors = Launch::kUpdateVectors;

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
static_assert(sizeof(Table<Piece, Launch::kMany>) + sizeof(UpdateArgs) + sizeof(PhiloxKey) <
              Launch::kArgumentBytes);

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
  constexpr int64_t kSize = kThreads * kVectors;
  return piece.vectors <= kSize ? 1 : (piece.vectors + kSize - 1) / kSize;
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

// Vectors `first` and those kThreads further on, as far as the tensor has them -> a bit for each
// that has to be updated one element after the other.
template <typename P, typename G, Rounding R>
__device__ __forceinline__ uint32_t update_vectors(const Piece& t, int64_t first,
                                                   const Update& update, bool* good) {
  constexpr int kCount = kVector<P>;
  Vector<sizeof(typename P::Bits), kCount> pv[kVectors];
  Vector<sizeof(typename G::Bits), kCount> gv[kVectors];
  Vector<2, R == Rounding::split ? kCount : 8> lv[kVectors] = {};
  const int64_t begin = t.head + first * kCount;  // index of the first element
  auto* p = static_cast<typename P::Bits*>(t.param) + begin;
  auto* g = static_cast<const typename G::Bits*>(t.grad) + begin;
  auto* l = static_cast<int16_t*>(t.low) + (R == Rounding::split ? begin : 0);
  const uint64_t element = uint64_t(t.offset) + uint64_t(begin);
  // A vector that is not there is the first once more, and is not stored.
  const int64_t left = t.vectors - first;

  // The gradient may start elsewhere between two 16-byte boundaries than the parameter, and a view
  // may start inside a group of random bits; all vectors of a tensor do alike.
  bool whole = gv[0].aligned(g);
  if constexpr (R == Rounding::split) whole &= lv[0].aligned(l);
  if constexpr (R == Rounding::stochastic) whole &= (element & 7) == 0;
  uint32_t rest = 0;
  if (!whole) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) rest |= uint32_t(v * kThreads < left) << v;
    return rest;
  }
  constexpr int kStride = kThreads * kCount;
  int at[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    at[v] = v * kThreads < left ? v * kStride : 0;
    pv[v].load(p + at[v]);
    gv[v].load(g + at[v]);
    if constexpr (R == Rounding::split) lv[v].load(l + at[v]);
  }
  // Asked for after the streams, so that one latency covers them all.
  const UpdateRule rule = rule_of(update.args);
  const bool skip = update.skip();
  if (skip) *good = false;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    bool usual =
        true;  // every gradient is finite, and no parameter that is rounded at random a NaN
#pragma unroll
    for (int k = 0; k < kCount; ++k) usual &= is_finite(G::load(gv[v][k]));
    Philox r = {};
    if constexpr (R == Rounding::stochastic)
      r = random_group(update.key, update.args.step, t.param_id, (element + at[v]) >> 3);
    auto new_p = pv[v];
    auto new_l = lv[v];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      int16_t low = int16_t(lv[v][k]);
      const float master = rule(master_of<P, R>(pv[v][k], low), G::load(gv[v][k]));
      if constexpr (R == Rounding::stochastic) {
        usual &= master == master;
        new_p.set(k, P::stochastic_of_number(master, r.word[k / 2] >> (16 * (k & 1))));
      } else {
        new_p.set(k, stored<P, R>(master, low, 0));
      }
      if constexpr (R == Rounding::split) new_l.set(k, uint16_t(low));
    }
    if (v * kThreads >= left || skip) continue;
    if (usual) {
      new_p.store(p + at[v]);
      if constexpr (R == Rounding::split) new_l.store(l + at[v]);
    } else {
      rest |= 1u << v;
    }
  }
  return rest;
}

template <typename P, typename G, Rounding R, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    lomo_update_kernel(const __grid_constant__ Table<Piece, kCapacity> table,
                       const __grid_constant__ Update update) {
  const int k = table.find(blockIdx.x);
  const Piece& t = table.item[k];
  const uint32_t block = blockIdx.x - table.first_block[k];
  const int64_t first = int64_t(block) * (kThreads * kVectors) + threadIdx.x;
  constexpr int kCount = kVector<P>;

  // An empty tensor has no element to carry the flag on.
  bool good = (blockIdx.x | threadIdx.x) != 0 || !update.skip();
  uint32_t rest = 0;
  if (first < t.vectors) rest = update_vectors<P, G, R>(t, first, update, &good);
  // Of head and tail, too, a thread has an element.
  if (block == 0 && int(threadIdx.x) < t.head + t.tail) rest |= 1u << kVectors;
  if (rest) {
#pragma unroll 1
    for (int n = 0; n <= kVectors * kCount; ++n) {
      const int v = n / kCount;
      if (!(rest >> v & 1)) continue;
      int64_t i = t.head + (first + v * kThreads) * kCount + n % kCount;
      if (v == kVectors)
        i = int(threadIdx.x) + (int(threadIdx.x) < t.head ? 0 : t.vectors * kCount);
      good &= update_one<P, G, R>(t, i, update);
    }
  }
  if (!good && update.args.found_inf) *update.args.found_inf = 1.0f;  // all write the same
}

}  // namespace lomo::cuda
