// AdaLomo's sweeps (adalomo.h, Note [Tiles]). A block of 256 threads takes a tile: a warp a row,
// eight rows at a time, eight consecutive columns a thread; or one group of rows or columns. No
// atomics and no flags: the same bits whatever the grid.
#pragma once
#include "adalomo.h"
#include "grad_sumsq.cuh"
#include "lomo_update.cuh"

namespace lomo::cuda {

static_assert(kTileCols == kThreads && kTileRows == 8 * kAdaLanes && kThreads / 32 == kAdaLanes);

inline int64_t blocks_of(const AdaItem& t) { return t.tiles; }
inline int64_t moment_blocks_of(const AdaItem& t) {
  return t.batch * (t.row_groups + t.col_groups);
}

struct AdaUpdate {
  AdaArgs args;
  PhiloxKey key;

  explicit AdaUpdate(const AdaArgs& a) : args(a), key(a.seed) {}
};
static_assert(sizeof(Table<AdaItem, Launch::kAdaMany>) + sizeof(AdaUpdate) <
              Launch::kArgumentBytes);

// Eight consecutive elements in a row of a tile.
struct Eight {
  int64_t first;  // index in the tensor
  int count;      // of them in the tensor

  // `row`: of the tile.
  __device__ Eight(const AdaItem& t, const TilePlace& at, int row) {
    const int64_t col = at.col + 8 * (threadIdx.x % 32);
    first = (at.batch * t.rows + at.row + row) * t.cols + col;
    const int64_t in_row = t.cols - col, left = t.numel - first;
    const int64_t in_tensor = in_row < left ? in_row : left;
    count = at.row + row >= t.rows || in_tensor <= 0 ? 0 : in_tensor < 8 ? int(in_tensor) : 8;
  }

  // What is missing is a stored zero. `kLast`: nobody reads it after this sweep.
  template <bool kLast, typename Vector, typename Bits>
  __device__ __forceinline__ void load(Vector& v, const Bits* from) const {
    if (count == 8 && v.aligned(from + first)) {
      v.template load<kLast>(from + first);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) v.set(k, k < count ? uint32_t(from[first + k]) : 0);
    }
  }

  template <typename Vector, typename Bits>
  __device__ __forceinline__ void store(const Vector& v, Bits* to) const {
    if (count == 8 && v.aligned(to + first)) {
      v.store(to + first);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < count) to[first + k] = Bits(v[k]);
    }
  }
};

template <typename F>
using EightOf = Vector<sizeof(typename F::Bits), 8>;

constexpr int kSteps = kTileRows / kAdaLanes;  // of a block through its tile

__device__ __forceinline__ int row_of_thread(int step) {
  return step * kAdaLanes + int(threadIdx.x / 32);
}

// The sums over a warp of kRows rows at once, in the order of add_warp: in the first exchanges a
// lane gives half of its rows for the other half of its neighbour's, so that six take the place of
// twenty. Lane l has the sum of row_of_lane(l).
template <int kRows>
__device__ __forceinline__ float add_rows(float (&row)[kRows]) {
  static_assert(kRows == 2 || kRows == 4);
  int distance = 1;
#pragma unroll
  for (int half = kRows / 2; half >= 1; half /= 2, distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? row[i] : row[i + half];
      const float kept = upper ? row[i + half] : row[i];
      row[i] = kept + __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
  float sum = row[0];
#pragma unroll
  for (; distance < 32; distance *= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <int kRows>
__device__ __forceinline__ int row_of_lane(int lane) {
  return kRows == 2 ? lane & 1 : (lane & 1) * 2 + (lane >> 1 & 1);
}

// First sweep: squares of the gradient by rows and columns of the tile. kClips: whether clipping by
// value may make a finite number of an infinite one; without it an infinity shows in the sums.
template <typename G, bool kClips, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_stats_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table,
                     const __grid_constant__ AdaArgs args) {
  const int item = table.find(blockIdx.x);
  const AdaItem& t = table.item[item];
  const TilePlace at(t, blockIdx.x - table.first_block[item]);
  auto* grad = static_cast<const typename G::Bits*>(t.grad);
  const AdaRule rule = rule_of(args, *t.step);
  constexpr int kAtOnce = Launch::kStatsBytes / int(8 * sizeof(typename G::Bits));  // rows
  float column[8] = {};
  bool finite = true;
#pragma unroll 1
  for (int begin = 0; begin < kSteps; begin += kAtOnce) {
    EightOf<G> g[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      Eight(t, at, row_of_thread(begin + i)).load<false>(g[i], grad);
    float sums[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float square[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float stored_g = G::load(g[i][k]);
        const float x = rule.clip(stored_g);
        if constexpr (kClips) finite &= is_finite(stored_g);
        square[k] = x * x;
        column[k] = column[k] + square[k];
      }
      sums[i] = add_eight(square);
    }
    const float sum = add_rows(sums);
    const int lane = int(threadIdx.x % 32);
    const int64_t row = at.row + row_of_thread(begin + row_of_lane<kAtOnce>(lane));
    if (lane < kAtOnce && row < t.rows)
      t.row_parts[(at.batch * t.across + at.tj) * t.rows + row] = sum;
  }
  __shared__ float lanes[kAdaLanes][kTileCols];
#pragma unroll
  for (int k = 0; k < 8; ++k)
    lanes[threadIdx.x / 32][8 * (threadIdx.x % 32) + k] = finite ? column[k] : NAN;
  __syncthreads();
  float lane[kAdaLanes];
#pragma unroll
  for (int k = 0; k < kAdaLanes; ++k) lane[k] = lanes[k][threadIdx.x];
  const int64_t col = at.col + threadIdx.x;
  if (col < t.cols) t.col_parts[(at.batch * t.down + at.ti) * t.cols + col] = add_eight(lane);
}

// The moments to be, of 256 rows or columns, a thread each.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_moments_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table,
                       const __grid_constant__ AdaArgs args) {
  const int item = table.find(blockIdx.x);
  const AdaItem& t = table.item[item];
  const int64_t groups = t.row_groups + t.col_groups;
  const int64_t block = blockIdx.x - table.first_block[item];
  const int64_t batch = block / groups, place = block % groups;
  const bool rows = place < t.row_groups;
  const int64_t i = (rows ? place : place - t.row_groups) * kTileCols + threadIdx.x;
  const int64_t size = rows ? t.rows : t.cols, other = rows ? t.cols : t.whole_rows;
  const int64_t parts = rows ? t.across : t.down;
  const AdaRule rule = rule_of(args, *t.step);
  float next = 0.0f;
  if (i < size) {
    const float* part = (rows ? t.row_parts : t.col_parts) + batch * parts * size + i;
    float lane[kAdaLanes] = {};
    for (int64_t first = 0; first < parts; first += kAdaLanes) {
#pragma unroll
      for (int k = 0; k < kAdaLanes; ++k)
        lane[k] = lane[k] + (first + k < parts ? part[(first + k) * size] : 0.0f);
    }
    const float sum = add_eight(lane);
    if (!rows && t.told_cols) {
      t.told_cols[i] = sum;
    } else {
      next = rule.moment((rows ? t.row : t.col)[batch * size + i], sum / float(other));
      (rows ? t.new_row : t.new_col)[batch * size + i] = next;
    }
  }
  const float sum = add_threads(next);
  if (rows && threadIdx.x == 0) t.means[batch * t.row_groups + place] = sum;
}

// Of the moments of a matrix's rows; all threads have it.
__device__ __forceinline__ float row_sum(const AdaItem& t, int64_t batch) {
  float lane = 0.0f;
  for (int64_t k = threadIdx.x; k < t.row_groups; k += kThreads)
    lane = lane + t.means[batch * t.row_groups + k];
  return add_threads(lane);
}

// One over the roots of a tile's moments: the rows' over their mean, and this thread's columns'.
struct TileFactors {
  float col[8];

  __device__ __forceinline__ TileFactors(const AdaItem& t, const TilePlace& at,
                                         float (&row)[kTileRows]) {
    const float mean = row_sum(t, at.batch) / float(t.whole_rows);
    __shared__ float columns[kTileCols];
    const int64_t i = at.row + threadIdx.x, j = at.col + threadIdx.x;
    // 0 for what is missing: the updates there are 0, too.
    if (threadIdx.x < kTileRows)
      row[threadIdx.x] = i < t.rows ? inverse_root(t.new_row[at.batch * t.rows + i] / mean) : 0.0f;
    columns[threadIdx.x] = j < t.cols ? inverse_root(t.new_col[at.batch * t.cols + j]) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 8; ++k) col[k] = columns[8 * (threadIdx.x % 32) + k];
  }
};

// The updates of eight elements, 0 for what is missing, because its gradient is 0; and their
// moments, where they keep their own.
template <typename G, bool kFactored>
__device__ __forceinline__ void updates_of(const Eight& e, const EightOf<G>& g, const AdaItem& t,
                                           const AdaRule& rule, float row, const float (&col)[8],
                                           float (&update)[8], Vector<4, 8>& moments) {
  if constexpr (!kFactored) e.load<false>(moments, reinterpret_cast<const uint32_t*>(t.row));
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float stored_g = G::load(g[k]);
    const float x = rule.clip(stored_g);
    if constexpr (kFactored) {
      update[k] = (x * row) * col[k];
    } else {
      const float moment = rule.moment(bits_float(moments[k]), x * x);
      moments.set(k, float_bits(moment));
      update[k] = is_finite(stored_g) ? x * inverse_root(moment) : NAN;
    }
  }
}

// Second sweep: squares of the update. Tiles in reverse, because what the first sweep read last is
// in the cache still.
template <typename G, bool kFactored, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_norm_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table,
                    const __grid_constant__ AdaArgs args) {
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  const int item = table.find(block);
  const AdaItem& t = table.item[item];
  const int64_t tile = block - table.first_block[item];
  const TilePlace at(t, tile);
  auto* grad = static_cast<const typename G::Bits*>(t.grad);
  const AdaRule rule = rule_of(args, *t.step);
  __shared__ float row[kTileRows];
  float col[8] = {};
  if constexpr (kFactored) {
    const TileFactors factors(t, at, row);
#pragma unroll
    for (int k = 0; k < 8; ++k) col[k] = factors.col[k];
  }
  float lane[8] = {};
#pragma unroll 4
  for (int step = 0; step < kSteps; ++step) {
    const int r = row_of_thread(step);
    const Eight e(t, at, r);
    EightOf<G> g;
    e.load<false>(g, grad);
    float update[8];
    Vector<4, 8> moments;
    updates_of<G, kFactored>(e, g, t, rule, kFactored ? row[r] : 0.0f, col, update, moments);
#pragma unroll
    for (int k = 0; k < 8; ++k) lane[k] = lane[k] + update[k] * update[k];
  }
  const float sum = add_lanes(lane);
  if (threadIdx.x == 0) t.norms[tile] = sum;
}

template <typename P>
__global__ void __launch_bounds__(kThreads) ada_sums_kernel(const __grid_constant__ AdaItem t) {
  const TilePlace at(t, blockIdx.x);
  auto* param = static_cast<const typename P::Bits*>(t.param);
  float lane[8] = {};
#pragma unroll 4
  for (int step = 0; step < kSteps; ++step) {
    EightOf<P> p;
    Eight(t, at, row_of_thread(step)).load<false>(p, param);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float x = P::load(p[k]);
      lane[k] = lane[k] + x * x;
    }
  }
  const float sum = add_lanes(lane);
  if (threadIdx.x == 0) t.sums[blockIdx.x] = sum;
}

// One block a part: this rank's sums for the others, of squares and, after the first sweep, of the
// moments of rows.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_tell_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table) {
  const AdaItem& t = table.item[blockIdx.x];
  const float square = add_partials(t.norms, t.tiles);
  if (threadIdx.x == 0) t.told[0] = square;
  if (!t.told_cols) return;
  __syncthreads();  // the shared memory of the sum is used twice
  const float rows = row_sum(t, 0);
  if (threadIdx.x == 0) t.told[1] = rows;
}

// One block a tensor: whether and how far it moves.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_step_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table,
                    const __grid_constant__ AdaArgs args) {
  const AdaItem& t = table.item[blockIdx.x];
  const float update_square = add_partials(t.norms, t.tiles);
  __syncthreads();  // the shared memory of the sum is used twice
  const float param_square = add_partials(t.sums, t.tiles);
  const AdaStep step = step_of(args, update_square, param_square, t.numel);
  const bool made = step.size == step.size;
  // The columns of a part without rows, which has no tile to write them.
  if (t.rows == 0 && made)
    for (int64_t j = threadIdx.x; j < t.cols; j += kThreads) t.col[j] = t.new_col[j];
  if (threadIdx.x != 0) return;
  t.shrink_and_size[0] = step.shrink;
  t.shrink_and_size[1] = step.size;
  if (made)
    *t.step += 1;
  else if (args.found_inf)
    *args.found_inf = 1.0f;
}

// Third sweep: the update, the moments, and the squares of the new parameter.
template <typename P, typename G, Rounding R, bool kFactored, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    ada_update_kernel(const __grid_constant__ Table<AdaItem, kCapacity> table,
                      const __grid_constant__ AdaUpdate update) {
  const int item = table.find(blockIdx.x);
  const AdaItem& t = table.item[item];
  const int64_t tile = blockIdx.x - table.first_block[item];
  const AdaStep next = {t.shrink_and_size[0], t.shrink_and_size[1]};
  if (next.size != next.size) return;
  const TilePlace at(t, tile);
  const int32_t number = *t.step - 1;  // it counts this one already
  const AdaRule rule = rule_of(update.args, number);
  auto* grad = static_cast<const typename G::Bits*>(t.grad);
  auto* param = static_cast<typename P::Bits*>(t.param);
  __shared__ float row[kTileRows];
  float col[8] = {};
  if constexpr (kFactored) {
    const TileFactors factors(t, at, row);
#pragma unroll
    for (int k = 0; k < 8; ++k) col[k] = factors.col[k];
    const int64_t i = at.row + threadIdx.x, j = at.col + threadIdx.x;
    if (at.tj == 0 && threadIdx.x < kTileRows && i < t.rows)
      t.row[at.batch * t.rows + i] = t.new_row[at.batch * t.rows + i];
    if (at.ti == 0 && j < t.cols) t.col[at.batch * t.cols + j] = t.new_col[at.batch * t.cols + j];
  }
  float lane[8] = {};
  constexpr int kAtOnce = Launch::kAdaRows;
#pragma unroll 1
  for (int begin = 0; begin < kSteps; begin += kAtOnce) {
    EightOf<P> p[kAtOnce];
    EightOf<G> g[kAtOnce];
    Vector<2, 8> low[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Eight e(t, at, row_of_thread(begin + i));
      e.load<true>(p[i], param);
      e.load<true>(g[i], grad);
      if constexpr (R == Rounding::split) e.load<true>(low[i], static_cast<const uint16_t*>(t.low));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = row_of_thread(begin + i);
      const Eight e(t, at, r);
      float u[8];
      Vector<4, 8> moments;
      updates_of<G, kFactored>(e, g[i], t, rule, kFactored ? row[r] : 0.0f, col, u, moments);
      Philox random = {};
      const uint64_t element = uint64_t(t.offset) + uint64_t(e.first);
      const bool grouped = (element & 7) == 0;
      EightOf<P> new_p;
      Vector<2, 8> new_low = {};
      if constexpr (R == Rounding::stochastic) {
        if (grouped)
          random = random_group(update.key, uint32_t(number), uint32_t(t.param_id), element >> 3);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        uint32_t bits = random.word[k / 2] >> (16 * (k & 1));
        if constexpr (R == Rounding::stochastic) {
          if (!grouped)
            bits = random_element(update.key, uint32_t(number), uint32_t(t.param_id), element + k);
        }
        int16_t rest = int16_t(low[i][k]);
        const auto bits_of_p = stored<P, R>(next(master_of<P, R>(p[i][k], rest), u[k]), rest, bits);
        new_p.set(k, bits_of_p);
        if constexpr (R == Rounding::split) new_low.set(k, uint16_t(rest));
        const float x = P::load(bits_of_p);
        lane[k] = lane[k] + x * x;
      }
      e.store(new_p, param);
      if constexpr (R == Rounding::split) e.store(new_low, static_cast<uint16_t*>(t.low));
      if constexpr (!kFactored) e.store(moments, reinterpret_cast<uint32_t*>(t.row));
    }
  }
  const float sum = add_lanes(lane);
  if (threadIdx.x == 0) t.sums[tile] = sum;
}

}  // namespace lomo::cuda
