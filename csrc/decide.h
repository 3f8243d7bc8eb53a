// What a step decides from the norm and the overflow flags, for host and device alike.
#pragma once
#include "float16.h"
#include "kernels.h"

namespace lomo {

// The norm's lanes: lane l adds elements l, l + kDecideLanes, ... in float64, first one first; then
// neighbouring lanes are added in pairs until one is left (kernels.h, Note [Summation order]).
constexpr int kDecideLanes = 256;

// `sum`: of all squares. `found`: whether any flag was set.
LOMO_HD void decide(const DecideArgs& args, double sum, bool found) {
  float* d = args.decisions;
  if (args.sumsq) {
    const float norm = sqrtf(float(sum));
    d[kTotalNorm] = norm;
    if (args.max_norm > 0.0f) {
      const float coef = args.max_norm / (norm + 1e-6f);
      d[kClipCoef] = coef > 1.0f ? 1.0f : coef;  // a NaN stays
    }
  }
  d[kFoundInf] = d[kSkip] = found ? 1.0f : 0.0f;
  if (!args.out) return;

  float scale = d[kGradScale], tracker = d[kGrowthTracker], stuck = d[kStuck];
  if (args.growth_interval > 0 && found) {
    tracker = 0.0f;
    stuck = scale > args.min_scale ? 0.0f : stuck + 1.0f;
    if (scale > args.min_scale) {
      const float lower = float(double(scale) * args.backoff_factor);
      scale = lower > args.min_scale ? lower : args.min_scale;
    }
  } else if (args.growth_interval > 0) {
    tracker = tracker + 1.0f;
    stuck = 0.0f;
    if (tracker >= float(args.growth_interval)) {
      const float higher = float(double(scale) * args.growth_factor);
      scale = is_finite(higher) ? higher : scale;
      tracker = 0.0f;
    }
  }
  args.out[kInvScale] = 1.0f / scale;
  args.out[kClipCoef] = 1.0f;
  args.out[kFoundInf] = args.out[kSkip] = args.out[kTotalNorm] = 0.0f;
  args.out[kGradScale] = scale;
  args.out[kGrowthTracker] = tracker;
  args.out[kStuck] = stuck;
}

}  // namespace lomo
