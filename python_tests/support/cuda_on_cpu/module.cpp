// The extension module as it is built with CUDA, but with the kernels running on the CPU
// (cuda_runtime.h in this folder): a backend for the tests, with the functions and arguments of the
// real one. Besides it, the maths of csrc/ for whole arrays, called through ctypes.

// clang-format off: the order matters
#include "cuda_runtime.h"
#include "../../../csrc/cuda.cu"
#include "../../../csrc/cpu.cpp"
#include "../../../csrc/cpu_loops.cpp"
#include "../../../csrc/bindings.cpp"
// clang-format on

namespace {

template <typename F>
void each(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace

extern "C" {

void test_only_blocks(uint32_t first, uint32_t last) {
  shim::machine().first_block = first;
  shim::machine().last_block = last;
}

unsigned test_launches() { return shim::machine().launches; }

int test_current_device() { return shim::current_device; }

int test_divergent_barrier() {  // 1: the shim noticed
  shim::Machine& m = shim::machine();
  m.body = [] {
    if (threadIdx.x < 32) __syncthreads();
  };
  try {
    shim::run_block(shim::kFibers);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

void test_philox(const uint32_t* counter, uint64_t key, uint32_t* out) {
  const Philox r = philox4x32_10(counter[0], counter[1], counter[2], counter[3], PhiloxKey(key));
  std::memcpy(out, r.word, sizeof r.word);
}

void test_load(int dtype, int64_t n, const uint16_t* bits, float* out) {
  each(n, [&](int64_t i) {
    out[i] = DType(dtype) == DType::bfloat16 ? BFloat16::load(bits[i]) : Float16::load(bits[i]);
  });
}

void test_nearest(int dtype, int64_t n, const float* x, uint16_t* out) {
  each(n, [&](int64_t i) {
    out[i] = DType(dtype) == DType::bfloat16 ? BFloat16::nearest(x[i]) : Float16::nearest(x[i]);
  });
}

void test_stochastic(int dtype, int64_t n, const float* x, const uint32_t* random, uint16_t* out) {
  each(n, [&](int64_t i) {
    out[i] = DType(dtype) == DType::bfloat16 ? BFloat16::stochastic(x[i], random[i])
                                             : Float16::stochastic(x[i], random[i]);
  });
}

void test_split(int64_t n, const float* x, uint16_t* high, int16_t* low) {
  each(n, [&](int64_t i) {
    high[i] = split_high(x[i]);
    low[i] = split_low(x[i]);
  });
}

void test_merge(int64_t n, const uint16_t* high, const int16_t* low, float* out) {
  each(n, [&](int64_t i) { out[i] = merge(high[i], low[i]); });
}

}  // extern "C"
