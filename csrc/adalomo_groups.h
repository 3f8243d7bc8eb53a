// Which tensors of a list AdaLomo's sweeps take together, and their scratch memory.
#pragma once
#include <vector>

#include "adalomo.h"

namespace lomo {

// Matrices share launches as long as they have so many tiles together. That is some waves of blocks
// on the largest GPU, and 32 MB of a gradient in 16 bits, which the second sweep finds in the
// cache; more would be no faster, and take more scratch memory at one time.
constexpr int64_t kAdaTogether = 1024;

struct AdaGroups {
  std::vector<AdaItem> vectors, matrices;  // of less than two dimensions; the others
  std::vector<int64_t> ends;               // of the groups of matrices

  AdaGroups() = default;

  // With scratch memory for each: matrices share that of one group, because groups run one after
  // the other. `floats`: how much that is in all. `scratch` may be null.
  AdaGroups(const AdaRef* tensors, int64_t count, float* scratch, int64_t* floats = nullptr) {
    int64_t own = 0;
    const auto take = [&](const AdaRef& ref, int64_t place) {
      AdaSizes sizes;
      add(item_of(ref, ref.rows, 0, scratch ? scratch + place : nullptr, nullptr, &sizes));
      return sizes.kept + sizes.passing;
    };
    for (int64_t k = 0; k < count; ++k)
      if (!tensors[k].factored) own += take(tensors[k], own);
    int64_t used = 0, most = 0;
    for (int64_t k = 0; k < count; ++k) {
      if (!tensors[k].factored) continue;
      if (begins_group(tiles_of(tensors[k]))) used = 0;
      used += take(tensors[k], own + used);
      most = used > most ? used : most;
    }
    if (floats) *floats = own + most;
  }

  void add(const AdaItem& t) {
    if (!t.factored) {
      vectors.push_back(t);
      return;
    }
    if (begins_group(t.tiles)) {
      ends.push_back(0);
      tiles_ = 0;
    }
    matrices.push_back(t);
    ends.back() = int64_t(matrices.size());
    tiles_ += t.tiles;
  }

 private:
  static int64_t tiles_of(const AdaRef& ref) {
    return item_of(ref, ref.rows, 0, nullptr, nullptr).tiles;
  }
  bool begins_group(int64_t tiles) const { return ends.empty() || tiles_ + tiles > kAdaTogether; }

  int64_t tiles_ = 0;  // of the last group
};

}  // namespace lomo
