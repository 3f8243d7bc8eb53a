// Compiled once per instruction set, with LOMO_LOOPS naming the table to define. The compiler
// vectorises the plain loops; nothing here may be instantiated outside this file (see float16.h).
#include "cpu_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dispatch.h"

namespace lomo::cpu {
namespace {

constexpr int kBlock = 1024;  // elements; the random bits of a block stay in the first-level cache

// A vector of 64-bit lanes, whose upper halves may hold anything where a word of Philox is meant:
// what multiplies reads the lower ones. So no word has to change its place between rounds.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef uint64_t Lanes64 __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes64 = kVectorBytes / 8;

// Lower half times lower half. Compilers make three products of the plain expression.
LOMO_HD Lanes64 wide_products(Lanes64 a, Lanes64 b) {
#if defined(__AVX512F__)
  return (Lanes64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Lanes64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// A round waits for the one before it: four vectors of groups at a time keep the processor busy.
constexpr int kTogether = 4, kGroupsTogether = kTogether * kLanes64;

// The random bits of up to kCount elements, from the beginning of the group that holds the first;
// philox.h, random_group and random_element, for many groups at a time.
template <int kCount>
struct RandomBits {
  // Whole vectors are written, from up to seven elements before the first.
  uint16_t element[8 * ((kCount + 7) / 8 + kGroupsTogether)];

  void draw(const PhiloxKey& key, uint32_t step, uint32_t param_id, uint64_t first, int count) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's low half comes first");
    const Lanes64 zero = {}, low = zero + 0xffffffff;
    Lanes64 lane = {};
    for (int i = 0; i < kLanes64; ++i) lane[i] = uint64_t(i);
    for (int begin = 0; 8 * begin < count; begin += kGroupsTogether) {
      Lanes64 c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
      for (int v = 0; v < kTogether; ++v) {
        c0[v] = lane + ((first >> 3) + uint64_t(begin + v * kLanes64));
        c1[v] = c0[v] >> 32;
        c2[v] = zero + step;
        c3[v] = zero + param_id;
      }
#pragma GCC unroll 10
      for (int i = 0; i < 10; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTogether; ++v) {
          const Lanes64 a = wide_products(zero + 0xD2511F53, c0[v]);
          const Lanes64 b = wide_products(zero + 0xCD9E8D57, c2[v]);
          c0[v] = (b >> 32) ^ c1[v] ^ key.round[i][0];
          c1[v] = b;
          c2[v] = (a >> 32) ^ c3[v] ^ key.round[i][1];
          c3[v] = a;
        }
      }
      uint64_t pairs[2 * kGroupsTogether];
#pragma GCC unroll 4
      for (int v = 0; v < kTogether; ++v) {
        const Lanes64 words01 = (c0[v] & low) | (c1[v] << 32);
        const Lanes64 words23 = (c2[v] & low) | (c3[v] << 32);
        for (int i = 0; i < kLanes64; ++i) {
          pairs[2 * (v * kLanes64 + i)] = words01[i];
          pairs[2 * (v * kLanes64 + i) + 1] = words23[i];
        }
      }
      std::memcpy(element + 8 * begin, pairs, sizeof pairs);
    }
  }
};

template <typename P, typename G, Rounding R>
bool update_range(const TensorRef& tensor, int64_t begin, int64_t end, const UpdateRule& rule,
                  uint32_t step, const PhiloxKey& key) {
  auto* p = static_cast<typename P::Bits*>(tensor.param);
  auto* g = static_cast<const typename G::Bits*>(tensor.grad);
  auto* low = static_cast<int16_t*>(tensor.low);
  RandomBits<R == Rounding::stochastic ? kBlock : 0> random;
  bool all_finite = true;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = int(end - block < kBlock ? end - block : kBlock);
    const uint64_t first = uint64_t(tensor.offset) + uint64_t(block);
    const int shift = int(first & 7);
    if constexpr (R == Rounding::stochastic)
      random.draw(key, step, uint32_t(tensor.param_id), first, shift + count);
    const uint16_t* const rb = random.element + shift;
    typename P::Bits* const pb = p + block;
    const typename G::Bits* const gb = g + block;
    int16_t* const lb = R == Rounding::split ? low + block : nullptr;
    uint32_t bad = 0;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = R == Rounding::stochastic ? rb[i] : 0;
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
  const int64_t size = rows ? t.rows : t.cols, other = rows ? t.cols : t.whole_rows;
  const int64_t parts = rows ? t.across : t.down;
  const int count = int(size - begin < kTileCols ? size - begin : kTileCols);
  float sums[kTileCols], next[kTileCols] = {};
  add_parts((rows ? t.row_parts : t.col_parts) + batch * parts * size + begin, parts, size, count,
            sums);
  if (!rows && t.told_cols) {
    std::memcpy(t.told_cols + begin, sums, count * sizeof *sums);
    return;
  }
  const float* const before = (rows ? t.row : t.col) + batch * size + begin;
  float* const out = (rows ? t.new_row : t.new_col) + batch * size + begin;
  for (int j = 0; j < count; ++j) out[j] = next[j] = rule.moment(before[j], sums[j] / float(other));
  if (rows) t.means[batch * t.row_groups + place] = add_neighbours(next);
}

float ada_row_sum(const AdaItem& t, int64_t batch) {
  float lanes[kTileCols] = {};
  for (int64_t k = 0; k < t.row_groups; ++k)
    lanes[k % kTileCols] = lanes[k % kTileCols] + t.means[batch * t.row_groups + k];
  return add_neighbours(lanes);
}

// One over the roots of a tile's moments: the rows' over their mean, and the columns'.
struct Factors {
  float row[kTileRows], col[kTileCols];

  Factors(const AdaItem& t, const TilePlace& at) {
    const float mean = ada_row_sum(t, at.batch) / float(t.whole_rows);
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
  RandomBits<kTileCols> random;
  Lanes lanes = {};
  for_updates<G>(t, at, rule,
                 [&](int r, int64_t first, int count, const float* update, const float* moments) {
                   auto* p = static_cast<typename P::Bits*>(t.param) + first;
                   auto* low = static_cast<int16_t*>(t.low) + (R == Rounding::split ? first : 0);
                   const uint64_t element = uint64_t(t.offset) + uint64_t(first);
                   const int shift = int(element & 7);
                   if constexpr (R == Rounding::stochastic)
                     random.draw(key, number, uint32_t(t.param_id), element, shift + count);
                   const uint16_t* const rb = random.element + shift;
                   float* const lane = lanes[r % kAdaLanes];
#pragma GCC ivdep
                   for (int j = 0; j < count; ++j) {
                     const uint32_t bits = R == Rounding::stochastic ? rb[j] : 0;
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

const Loops LOMO_LOOPS = {update,      sumsq_chunk, sum_partials, ada_stats, ada_moments,
                          ada_row_sum, ada_norm,    ada_sums,     ada_update};

}  // namespace lomo::cpu
