// The part of the CUDA language that cuda_kernel.cuh uses, on a CPU: every thread of a block is a fiber, the lanes of a
// warp run in turn from one meeting point (shuffle, __syncwarp) to the next. A lane that misses a meeting point of its
// warp, which hangs or misreads on a GPU, is reported.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define THEMASK_GPU_EMULATOR
#define __global__
#define __device__

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct __half {
  _Float16 v;
};
inline float __half2float(__half x) { return static_cast<float>(x.v); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <class T>
T atomicAdd(T* at, T x) {
  const T before = *at;
  *at += x;
  return before;
}
inline unsigned atomicMax(unsigned* at, unsigned x) {
  const unsigned before = *at;
  if (x > before) *at = x;
  return before;
}
using std::ceil;
using std::exp;
using std::exp2;
using std::floor;
using std::llrint;
using std::log2;

namespace emulator {

constexpr int lanes = 32;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool finished = false;
  int meetings = 0;
};

inline std::vector<char> shared;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline double slots[2][1024];  // of two meetings in a row, so that a fast lane does not overwrite what a slow one reads

inline Fiber& current() { return *fibers[threadIdx.x]; }

inline void meet() {
  ++current().meetings;
  swapcontext(&current().context, &scheduler);
}

inline void run_fiber() {
  kernel();
  current().finished = true;
  swapcontext(&current().context, &scheduler);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// kernel<<<blocks, threads, shared_bytes>>>(), one block after the other.
inline void launch(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> body) {
  kernel = std::move(body);
  gridDim.x = blocks, blockDim.x = threads;
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    shared.assign(shared_bytes, static_cast<char>(0xff));  // NaN, so that reading before writing shows
    fibers.clear();
    for (int t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (int first = 0; first < threads; first += lanes) {
      for (bool running = true; running;) {
        int met = 0, ended = 0;
        for (int t = first; t < first + lanes; ++t) {
          threadIdx.x = t;
          if (fibers[t]->finished) fail("a lane ended before a meeting point of its warp");
          swapcontext(&scheduler, &fibers[t]->context);
          fibers[t]->finished ? ++ended : ++met;
        }
        if (met && ended) fail("the lanes of a warp did not all meet");
        running = met;
      }
    }
  }
}

}  // namespace emulator

inline void __syncwarp() { emulator::meet(); }

template <class A>
A __shfl_xor_sync(unsigned mask, A x, int distance) {
  if (mask != 0xffffffffu) emulator::fail("a shuffle of a part of the warp");
  double* slots = emulator::slots[emulator::current().meetings % 2];
  slots[threadIdx.x] = x;
  emulator::meet();
  return static_cast<A>(slots[threadIdx.x ^ distance]);
}

namespace themask {
inline void* shared_memory() { return emulator::shared.data(); }
}  // namespace themask
