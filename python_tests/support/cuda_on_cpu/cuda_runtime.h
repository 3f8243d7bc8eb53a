// Stands in for the CUDA toolkit's header of this name, so that g++ compiles csrc/cuda.cu and the
// kernels run on the CPU: one fiber per CUDA thread, one block after another. It covers what those
// kernels use: one-dimensional grids, static __shared__, __syncthreads, shuffles over a full warp,
// atomicInc.
//
// What it shows: every address and every arithmetic operation of the real kernel bodies and
// launchers, under AddressSanitizer too, and a barrier that some threads do not reach. What it
// cannot show: races between threads, which here never run at the same time, and speed.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <typename T>
T __ldcs(const T* address) {
  return *address;
}

namespace shim {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Dim {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  State state;
};

// Fibers and their stacks are made once: a launch here has at most kFibers threads a block.
constexpr int kFibers = 256, kWarp = 32;
constexpr size_t kStack = 1 << 16;

struct Machine {
  Fiber fiber[kFibers];
  ucontext_t scheduler;
  std::function<void()> body;
  Dim thread, block, grid;
  uint32_t exchanged[kFibers];
  char* stacks = static_cast<char*>(
      mmap(nullptr, kFibers* kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

  unsigned launches = 0;  // until now

  // Tests of index arithmetic run a few far blocks of a grid too large to run whole.
  unsigned first_block = 0, last_block = 0xffffffffu;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void enter() {
  Machine& m = machine();
  m.body();
  m.fiber[m.thread.x].state = State::done;
  swapcontext(&m.fiber[m.thread.x].context, &m.scheduler);
}

inline void wait(State state) {
  Machine& m = machine();
  const unsigned me = m.thread.x;
  m.fiber[me].state = state;
  swapcontext(&m.fiber[me].context, &m.scheduler);
}

inline void run_block(unsigned threads) {
  Machine& m = machine();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = m.fiber[i];
    f.state = State::ready;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = m.stacks + i * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  const auto all = [&](unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i)
      if (m.fiber[i].state != state) return false;
    return true;
  };
  while (!all(0, threads, State::done)) {
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (m.fiber[i].state != State::ready) continue;
      m.thread.x = i;
      swapcontext(&m.scheduler, &m.fiber[i].context);
      progress = true;
    }
    for (unsigned w = 0; w < threads; w += kWarp) {
      if (!all(w, w + kWarp, State::at_warp_barrier)) continue;
      for (unsigned i = w; i < w + kWarp; ++i) m.fiber[i].state = State::ready;
      progress = true;
    }
    if (all(0, threads, State::at_block_barrier)) {
      for (unsigned i = 0; i < threads; ++i) m.fiber[i].state = State::ready;
      progress = true;
    }
    if (!progress)
      throw std::runtime_error("a barrier that some threads of the block do not reach");
  }
}

}  // namespace shim

#define threadIdx (shim::machine().thread)
#define blockIdx (shim::machine().block)
#define gridDim (shim::machine().grid)

inline void __syncthreads() { shim::wait(shim::State::at_block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) == 4);
  shim::Machine& m = shim::machine();
  const unsigned me = m.thread.x;
  std::memcpy(&m.exchanged[me], &value, 4);
  shim::wait(shim::State::at_warp_barrier);
  std::memcpy(&value, &m.exchanged[me ^ unsigned(distance)], 4);
  shim::wait(shim::State::at_warp_barrier);
  return value;
}

// Blocks run one after the other, so that nothing is to be ordered.
inline void __threadfence() {}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned before = *address;
  *address = before >= limit ? 0 : before + 1;
  return before;
}

// -- the runtime ----------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorNoKernelImageForDevice };
struct cudaFuncAttributes {};

namespace shim {
inline int current_device = 0, devices = 2, device_without_code = 1;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice
             ? "invalid device ordinal"
             : "no kernel image is available for execution on the device";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::devices) return cudaErrorInvalidDevice;
  shim::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = shim::devices;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t count, cudaStream_t) {
  std::memset(memory, byte, count);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return shim::current_device == shim::device_without_code ? cudaErrorNoKernelImageForDevice
                                                           : cudaSuccess;
}

namespace lomo::cuda {
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, cudaStream_t, const Args&... args) {
  shim::Machine& m = shim::machine();
  m.body = [&] { kernel(args...); };
  m.grid.x = unsigned(blocks);
  ++m.launches;
  for (unsigned b = m.first_block; b < m.grid.x && b <= m.last_block; ++b) {
    m.block.x = b;
    shim::run_block(shim::kFibers);
  }
}
}  // namespace lomo::cuda
