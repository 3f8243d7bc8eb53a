// Compiled once per instruction set, with LOMO_LOOPS naming the table to define. The compiler
// vectorises the plain loops; nothing here may be instantiated outside this file (see float16.h).
#include "cpu_loops.h"

#include "dispatch.h"

namespace lomo::cpu {
namespace {

constexpr int kBlock = 1024;  // elements; the random bits of a block stay in the first-level cache

// The words of the group that holds element `first`, and of those after it, for `count` elements.
void random_words(uint32_t* words, const PhiloxKey& key, uint32_t step, uint32_t param_id,
                  uint64_t first, int count) {
  for (int i = 0; 8 * i < count; ++i) {
    const Philox r = random_group(key, step, param_id, (first >> 3) + uint64_t(i));
    for (int k = 0; k < 4; ++k) words[4 * i + k] = r.word[k];
  }
}

template <typename P, typename G, Rounding R>
bool update_range(const TensorRef& tensor, int64_t begin, int64_t end, const UpdateRule& rule,
                  uint32_t step, const PhiloxKey& key) {
  auto* p = static_cast<typename P::Bits*>(tensor.param);
  auto* g = static_cast<const typename G::Bits*>(tensor.grad);
  auto* low = static_cast<int16_t*>(tensor.low);
  uint32_t words[kBlock / 2 + 4] = {};
  bool all_finite = true;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = int(end - block < kBlock ? end - block : kBlock);
    const uint64_t first = uint64_t(tensor.offset) + uint64_t(block);
    const int shift = int(first & 7);
    if constexpr (R == Rounding::stochastic)
      random_words(words, key, step, uint32_t(tensor.param_id), first, shift + count);
    typename P::Bits* const pb = p + block;
    const typename G::Bits* const gb = g + block;
    int16_t* const lb = R == Rounding::split ? low + block : nullptr;
    uint32_t bad = 0;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const uint32_t at = uint32_t(i + shift);
      const uint32_t bits = R == Rounding::stochastic ? words[at >> 1] >> (16 * (at & 1)) : 0;
      int16_t unused = 0;
      bad |=
          !update_element<P, G, R>(pb[i], gb[i], R == Rounding::split ? lb[i] : unused, bits, rule);
    }
    all_finite &= bad == 0;
  }
  return all_finite;
}

bool update(DType param, DType grad, Rounding rounding, const TensorRef& t, int64_t begin,
            int64_t end, const UpdateRule& rule, uint32_t step, const PhiloxKey& key) {
  return dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    return update_range<decltype(p), decltype(g), decltype(r)::value>(t, begin, end, rule, step,
                                                                      key);
  });
}

template <int kLanes>
float add_neighbours(float (&sums)[kLanes]) {
  float halved[kLanes / 2];
  float *from = sums, *to = halved;
  for (int width = kLanes / 2; width >= 1; width /= 2) {
#pragma GCC ivdep
    for (int i = 0; i < width; ++i) to[i] = from[2 * i] + from[2 * i + 1];
    float* swap = from;
    from = to;
    to = swap;
  }
  return from[0];
}

template <typename G>
float sumsq_chunk_of(const void* chunk, int64_t numel, float inv_scale, bool* finite) {
  auto* g = static_cast<const typename G::Bits*>(chunk);
  float lanes[kNormLanes] = {};
  uint32_t bad = 0;
  for (int64_t row = 0; row < numel; row += kNormLanes) {
    const int count = int(numel - row < kNormLanes ? numel - row : kNormLanes);
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const float stored = G::load(g[row + i]);
      const float x = stored * inv_scale;
      bad |= !is_finite(stored);
      lanes[i] = lanes[i] + x * x;
    }
  }
  if (bad) *finite = false;
  return add_neighbours(lanes);
}

float sumsq_chunk(DType grad, const void* chunk, int64_t numel, float inv_scale, bool* finite) {
  return dispatch(
      grad, [&](auto g) { return sumsq_chunk_of<decltype(g)>(chunk, numel, inv_scale, finite); });
}

float sum_partials(const float* partials, int64_t numel) {
  float lanes[kNormLanes] = {};
  for (int64_t row = 0; row < numel; row += kNormLanes) {
    const int count = int(numel - row < kNormLanes ? numel - row : kNormLanes);
    for (int i = 0; i < count; ++i) lanes[i] = lanes[i] + partials[row + i];
  }
  return add_neighbours(lanes);
}

// -- AdaLomo ------------------------------------------------------------------------------------

// Calls f(row of the tile, index of its first element in the tensor, elements) for its rows.
template <typename F>
void for_rows(const AdaItem& t, const TilePlace& at, const F& f) {
  for (int r = 0; r < kTileRows && at.row + r < t.rows; ++r) {
    const int64_t first = (at.batch * t.rows + at.row + r) * t.cols + at.col;
    int64_t count = t.cols - at.col < kTileCols ? t.cols - at.col : kTileCols;
    if (first + count > t.numel) count = t.numel - first;  // the end of one that is not factored
    if (count > 0) f(r, first, int(count));
  }
}

using Lanes = float[kAdaLanes][kTileCols];

float add_eight(const Lanes& lane, int j) {
  return ((lane[0][j] + lane[1][j]) + (lane[2][j] + lane[3][j])) +
         ((lane[4][j] + lane[5][j]) + (lane[6][j] + lane[7][j]));
}

template <typename G>
void ada_stats_of(const AdaItem& t, int64_t tile, const AdaRule& rule) {
  const TilePlace at(t, tile);
  auto* grad = static_cast<const typename G::Bits*>(t.grad);
  float* const row_parts = t.row_parts + (at.batch * t.across + at.tj) * t.rows + at.row;
  float* const col_parts = t.col_parts + (at.batch * t.down + at.ti) * t.cols + at.col;
  Lanes lanes = {};
  int width = 0;
  uint32_t bad = 0;
  for_rows(t, at, [&](int r, int64_t first, int count) {
    const auto* g = grad + first;
    float square[kTileCols] = {};
    float* const lane = lanes[r % kAdaLanes];
#pragma GCC ivdep
    for (int j = 0; j < count; ++j) {
      const float stored_g = G::load(g[j]);
      const float x = rule.clip(stored_g);
      bad |= !is_finite(stored_g);
      square[j] = x * x;
      lane[j] = lane[j] + square[j];
    }
    row_parts[r] = add_neighbours(square);
    width = count;
  });
  for (int j = 0; j < width; ++j) col_parts[j] = bad ? NAN : add_eight(lanes, j);
}

void ada_stats(DType grad, const AdaItem& t, int64_t tile, const AdaRule& rule) {
  dispatch(grad, [&](auto g) { ada_stats_of<decltype(g)>(t, tile, rule); });
}

// Sums of `parts` parts [parts, size] at places [begin, begin + count), count <= kTileCols.
void add_parts(const float* part, int64_t parts, int64_t size, int count,
               float (&sums)[kTileCols]) {
  Lanes lanes = {};
  for (int64_t k = 0; k < parts; ++k) {
    float* const lane = lanes[k % kAdaLanes];
    const float* const from = part + k * size;
    for (int j = 0; j < count; ++j) lane[j] = lane[j] + from[j];
  }
  for (int j = 0; j < kTileCols; ++j) sums[j] = add_eight(lanes, j);
}

void ada_moments(const AdaItem& t, int64_t group, const AdaRule& rule) {
  const int64_t groups = t.row_groups + t.col_groups, batch = group / groups;
  const int64_t place = group % groups;
  const bool rows = place < t.row_groups;
  const int64_t begin = (rows ? place : place - t.row_groups) * kTileCols;
  const int64_t size = rows ? t.rows : t.cols, other = rows ? t.cols : t.rows;
  const int64_t parts = rows ? t.across : t.down;
  const int count = int(size - begin < kTileCols ? size - begin : kTileCols);
  float sums[kTileCols], next[kTileCols] = {};
  add_parts((rows ? t.row_parts : t.col_parts) + batch * parts * size + begin, parts, size, count,
            sums);
  const float* const before = (rows ? t.row : t.col) + batch * size + begin;
  float* const out = (rows ? t.new_row : t.new_col) + batch * size + begin;
  for (int j = 0; j < count; ++j) out[j] = next[j] = rule.moment(before[j], sums[j] / float(other));
  if (rows) t.means[batch * t.row_groups + place] = add_neighbours(next);
}

// One over the roots of a tile's moments: the rows' over their mean, and the columns'.
struct Factors {
  float row[kTileRows], col[kTileCols];

  Factors(const AdaItem& t, const TilePlace& at) {
    float lanes[kTileCols] = {};
    for (int64_t k = 0; k < t.row_groups; ++k)
      lanes[k % kTileCols] = lanes[k % kTileCols] + t.means[at.batch * t.row_groups + k];
    const float mean = add_neighbours(lanes) / float(t.rows);
    for (int r = 0; r < kTileRows && at.row + r < t.rows; ++r)
      row[r] = inverse_root(t.new_row[at.batch * t.rows + at.row + r] / mean);
    for (int j = 0; j < kTileCols && at.col + j < t.cols; ++j)
      col[j] = inverse_root(t.new_col[at.batch * t.cols + at.col + j]);
  }
};

// Calls f(tile's row, index of the first element, elements, the update of each of them); the
// moments of one that is not factored come as `moments`.
template <typename G, typename F>
void for_updates(const AdaItem& t, const TilePlace& at, const AdaRule& rule, const F& f) {
  auto* grad = static_cast<const typename G::Bits*>(t.grad);
  float update[kTileCols], moments[kTileCols] = {};
  if (t.factored) {
    const Factors factors(t, at);
    for_rows(t, at, [&](int r, int64_t first, int count) {
      const auto* g = grad + first;
      const float own = factors.row[r];
#pragma GCC ivdep
      for (int j = 0; j < count; ++j) update[j] = (rule.clip(G::load(g[j])) * own) * factors.col[j];
      f(r, first, count, update, moments);
    });
  } else {
    for_rows(t, at, [&](int r, int64_t first, int count) {
      const auto* g = grad + first;
      const float* const before = t.row + first;
#pragma GCC ivdep
      for (int j = 0; j < count; ++j) {
        const float stored_g = G::load(g[j]);
        const float x = rule.clip(stored_g);
        moments[j] = rule.moment(before[j], x * x);
        update[j] = is_finite(stored_g) ? x * inverse_root(moments[j]) : NAN;
      }
      f(r, first, count, update, moments);
    });
  }
}

float tile_sum(Lanes& lanes) {
  return add_neighbours(reinterpret_cast<float (&)[kNormLanes]>(lanes));
}

void ada_norm(DType grad, const AdaItem& t, int64_t tile, const AdaRule& rule) {
  const TilePlace at(t, tile);
  Lanes lanes = {};
  dispatch(grad, [&](auto g) {
    for_updates<decltype(g)>(t, at, rule,
                             [&](int r, int64_t, int count, const float* update, const float*) {
                               float* const lane = lanes[r % kAdaLanes];
                               for (int j = 0; j < count; ++j)
                                 lane[j] = lane[j] + update[j] * update[j];
                             });
  });
  t.norms[tile] = tile_sum(lanes);
}

void ada_sums(DType param, const AdaItem& t, int64_t tile) {
  const TilePlace at(t, tile);
  Lanes lanes = {};
  dispatch(param, [&](auto format) {
    using P = decltype(format);
    for_rows(t, at, [&](int r, int64_t first, int count) {
      const auto* p = static_cast<const typename P::Bits*>(t.param) + first;
      float* const lane = lanes[r % kAdaLanes];
#pragma GCC ivdep
      for (int j = 0; j < count; ++j) {
        const float x = P::load(p[j]);
        lane[j] = lane[j] + x * x;
      }
    });
  });
  t.sums[tile] = tile_sum(lanes);
}

template <typename P, typename G, Rounding R>
void ada_update_of(const AdaItem& t, int64_t tile, const AdaRule& rule, const AdaStep& step,
                   const PhiloxKey& key) {
  const TilePlace at(t, tile);
  const uint32_t number = uint32_t(*t.step);
  uint32_t words[kTileCols / 2 + 4] = {};
  Lanes lanes = {};
  for_updates<G>(
      t, at, rule, [&](int r, int64_t first, int count, const float* update, const float* moments) {
        auto* p = static_cast<typename P::Bits*>(t.param) + first;
        auto* low = static_cast<int16_t*>(t.low) + (R == Rounding::split ? first : 0);
        const int shift = int(first & 7);
        if constexpr (R == Rounding::stochastic)
          random_words(words, key, number, uint32_t(t.param_id), uint64_t(first), shift + count);
        float* const lane = lanes[r % kAdaLanes];
#pragma GCC ivdep
        for (int j = 0; j < count; ++j) {
          const uint32_t k = uint32_t(j + shift);
          const uint32_t bits = R == Rounding::stochastic ? words[k >> 1] >> (16 * (k & 1)) : 0;
          int16_t unused = 0;
          int16_t& rest = R == Rounding::split ? low[j] : unused;
          p[j] = stored<P, R>(step(master_of<P, R>(p[j], rest), update[j]), rest, bits);
          const float x = P::load(p[j]);
          lane[j] = lane[j] + x * x;
        }
        if (!t.factored)
          for (int j = 0; j < count; ++j) t.row[first + j] = moments[j];
      });
  t.sums[tile] = tile_sum(lanes);
}

void ada_update(DType param, DType grad, Rounding rounding, const AdaItem& t, int64_t tile,
                const AdaRule& rule, const AdaStep& step, const PhiloxKey& key) {
  dispatch_rounded(param, grad, rounding, [&](auto p, auto g, auto r) {
    ada_update_of<decltype(p), decltype(g), decltype(r)::value>(t, tile, rule, step, key);
  });
}

}  // namespace

const Loops LOMO_LOOPS = {update,      sumsq_chunk, sum_partials, ada_stats,
                          ada_moments, ada_norm,    ada_sums,     ada_update};

}  // namespace lomo::cpu
