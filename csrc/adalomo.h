// AdaLomo's update: the maths of one element and the order of every sum, for host and device alike.
#pragma once
#include "lomo_update.h"

namespace lomo {

// Note [Tiles]
// A tensor [..., rows, cols] is cut into tiles of 64 x 256 elements, row by row of tiles, matrix by
// matrix; what is missing in a tile at the border counts as 0. A tensor of less than two dimensions
// is seen as a matrix of 256 columns, so that its tiles are 16384 consecutive elements. Orders of
// additions, the same in every backend, all in fp32:
//   row       the squares of a tile's row are added in pairs of neighbours until one is left; then
//             the sums of the tiles along the row in eight lanes (lane l adds the l-th, the (l +
//             8)-th, ..., first one first; then neighbouring lanes in pairs);
//   column    the squares of a tile's column in eight lanes; then the sums of the tiles along the
//             column in eight lanes;
//   mean row  the moments of 256 rows in pairs of neighbours; then these sums in 256 lanes (lane l
//             adds the l-th, the (l + 256)-th, ...; then neighbouring lanes in pairs);
//   tensor    a tile, row after row, like a chunk in kernels.h, Note [Summation order], and the
//             tiles' sums like its chunks'.
// Three sweeps over the gradient: its squares by rows and columns; the squares of the update; the
// update itself, which also leaves the sum of squares of each tile of the new parameter, from which
// the next update has rms(param). Nothing is written before the third. No flags: where the gradient
// is not finite, the sweep that meets it first makes a sum a NaN (an infinity that is clipped by
// value would be lost), and so is all that follows; the step is made if the sum of squares of the
// update is finite.
constexpr int kTileRows = 64, kTileCols = 256, kAdaLanes = 8;
static_assert(kTileRows * kTileCols == kNormChunk);
static_assert(kAdaLanes * kTileCols == kNormLanes, "rows of a tile in eight lanes");

LOMO_HD int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Note [Parts]
// Several ranks may share one tensor: each has consecutive rows of a matrix, some of many matrices,
// or a piece of a vector. Tiles, and with them the orders of additions, begin anew in every part.
// The sums that need the whole tensor are those of the squares of the parameter and of the update,
// and for rows of a matrix those of each column and of the rows' moments. Every rank writes its own
// into a message between two sweeps, [square, (rows' moments, columns...)] for each part after the
// first sweep and [square] after the second; the caller has them added up over the ranks, and a sum
// of all ranks takes the place of a sum of tiles. So the sweeps below serve parts and whole tensors
// alike, and a rank that has the whole of a tensor gets the bits of adalomo_update.

// A tensor with its tiles and its scratch memory, as the sweeps see it.
struct AdaItem : AdaRef {
  int64_t down, across, tiles;       // tiles of a matrix in each direction; of the tensor
  int64_t row_groups, col_groups;    // of kTileCols rows or columns of a matrix
  float *shrink_and_size, *norms;    // [2]; squares of the update [tiles]
  float *new_row, *new_col, *means;  // [batch, rows]; [batch, cols]; [batch, row_groups]
  float *row_parts, *col_parts;      // [batch, across, rows]; [batch, down, cols]
  int64_t offset, whole_rows;        // as in AdaPart
  float *told, *told_cols;           // where sums for the other ranks go; null: nowhere
};

// `passing`: of memory of its own; null: it follows what is kept.
inline AdaItem item_of(const AdaRef& ref, int64_t whole_rows, int64_t offset, float* kept,
                       float* passing, AdaSizes* sizes = nullptr) {
  AdaItem t{};
  static_cast<AdaRef&>(t) = ref;
  t.whole_rows = whole_rows, t.offset = offset;
  if (t.batch * whole_rows * t.cols == 0) t.rows = t.cols = 0;
  t.down = parts_of(t.rows, kTileRows), t.across = parts_of(t.cols, kTileCols);
  t.tiles = t.batch * t.down * t.across;
  if (t.tiles == 0) t.tiles = 1;  // an empty tensor has a sum, too
  t.row_groups = parts_of(t.rows, kTileCols), t.col_groups = parts_of(t.cols, kTileCols);
  float* next = kept;
  int64_t size = 0;
  const auto take = [&](float*& place, int64_t count) {
    if (next) place = next + size;
    size += count;
  };
  take(t.shrink_and_size, 2);
  take(t.norms, t.tiles);
  if (t.factored) {
    take(t.new_row, t.batch * t.rows);
    take(t.new_col, t.batch * t.cols);
    take(t.means, t.batch * t.row_groups);
  }
  const int64_t stays = size;
  if (passing) next = passing, size = 0;
  const int64_t before = size;
  if (t.factored) {
    take(t.row_parts, t.batch * t.across * t.rows);
    take(t.col_parts, t.batch * t.down * t.cols);
  }
  if (sizes) *sizes = {stays, size - before};
  return t;
}

// A part in the first call, whose sums go into the message.
inline AdaItem telling(const AdaPart& part, const AdaMessages& messages) {
  AdaItem t = item_of(part, part.whole_rows, part.offset, part.kept, part.passing);
  t.told = messages.statistics + part.slot;
  if (part.joined) t.told_cols = t.told + 2;
  return t;
}

// Its columns afterwards: the sums over the ranks are one part of each column.
inline AdaItem columns_of(const AdaPart& part, const AdaMessages& messages) {
  AdaItem t = item_of(part, part.whole_rows, part.offset, part.kept, nullptr);
  t.col_parts = messages.statistics + part.slot + 2;
  t.down = 1, t.row_groups = 0;
  return t;
}

// It in the second and third sweep: the sum over the ranks is the one group of rows.
inline AdaItem told(const AdaPart& part, const AdaMessages& messages) {
  AdaItem t = item_of(part, part.whole_rows, part.offset, part.kept, nullptr);
  if (part.joined) t.means = messages.statistics + part.slot + 1, t.row_groups = 1;
  t.told = messages.squares + part.number;
  return t;
}

// Where a tile is: its matrix, its place in it, its first row and column.
struct TilePlace {
  int64_t batch, row, col;
  uint32_t ti, tj;

  LOMO_HD TilePlace(const AdaItem& t, uint32_t tile) {  // 64-bit division is slow on a GPU
    const uint32_t across = t.across ? uint32_t(t.across) : 1, down = t.down ? uint32_t(t.down) : 1;
    const uint32_t line = tile / across;
    batch = line / down, ti = line % down, tj = tile % across;
    row = int64_t(ti) * kTileRows, col = int64_t(tj) * kTileCols;
  }
};

// What changes from update to update, but not from element to element.
struct AdaRule {
  Clipping clip;
  float weight, old, eps_square;

  LOMO_HD float moment(float before, float square) const {
    return before * old + weight * (square + eps_square);
  }
};

LOMO_HD AdaRule rule_of(const AdaArgs& args, int32_t step) {
  const int64_t at = step < args.weights_count ? step : args.weights_count - 1;
  const float weight = args.weights[at];
  return {clipping_of(args.inv_scale, args.clip_value, args.clip_coef), weight, 1.0f - weight,
          args.eps_square};
}

// An infinite moment must not pass for a small factor.
LOMO_HD float inverse_root(float moment) { return is_finite(moment) ? 1.0f / sqrtf(moment) : NAN; }

// From the sums of squares of the update and of the parameter to {shrink, size}; size is a NaN
// where the update is not to be made.
struct AdaStep {
  float shrink, size;

  LOMO_HD float operator()(float p, float u) const { return p - (shrink * p + size * u); }
};

LOMO_HD AdaStep step_of(const AdaArgs& args, float update_square, float param_square,
                        int64_t numel) {
  const float n = float(numel > 0 ? numel : 1);
  const float divisor = greater(sqrtf(update_square / n) / args.clip_threshold, 1.0f);
  const float lr = args.lr * greater(sqrtf(param_square / n), args.eps_rms);
  const bool made = is_finite(update_square) && is_finite(lr) && !(args.skip && *args.skip != 0.0f);
  return {lr * args.weight_decay, made ? lr / divisor : NAN};
}

}  // namespace lomo
