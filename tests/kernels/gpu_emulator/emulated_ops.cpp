// The GPU kernels on the emulator, for ctypes; launches as in cuda.cu.
#include "emulator.h"  // first: the kernels are written in what it defines

#include "cuda_kernel.cuh"

using themask::FixedScale;
using themask::Problem;

namespace {

template <class T, class A, int N>
void run(Problem<T, A> p, const T* grad_out, bool deterministic, int64_t value_numel, T* out, A* grad_value,
         A* grad_points, A* grad_weights) {
  const themask::Launch launch = themask::plan(p, deterministic ? 1 : N);
  if (launch.shared > themask::max_shared) emulator::fail("too much shared memory");
  if (!grad_out) {
    emulator::launch(launch.blocks, launch.threads, launch.shared, [&] { themask::forward_kernel<N>(p, out); });
    return;
  }
  if (!deterministic) {
    emulator::launch(launch.blocks, launch.threads, launch.shared, [&] {
      themask::backward_kernel<N>(p, grad_out, themask::AtomicSum<A>{grad_value}, grad_points, grad_weights);
    });
    return;
  }
  std::vector<long long> sums(value_numel);
  unsigned bits[2] = {};
  const int64_t samples = int64_t(p.levels) * p.samples;
  const FixedScale scale{bits, double(p.queries) * samples, p.reference != nullptr};
  emulator::launch(2, 64, 0, [&] { themask::largest_kernel(grad_out, p.pairs * p.width, bits); });
  if (!p.reference) emulator::launch(2, 64, 0, [&] { themask::largest_kernel(p.weights, p.pairs * samples, bits + 1); });
  emulator::launch(launch.blocks, launch.threads, launch.shared, [&] {
    themask::backward_kernel<1>(p, grad_out, themask::FixedSum{sums.data(), scale}, grad_points, grad_weights);
  });
  emulator::launch(2, 64, 0, [&] { themask::unfix_kernel(sums.data(), value_numel, scale, grad_value); });
}

// sizes: n, pixels, heads, width, queries, levels, samples, reference_n, then h, w of each level.
template <class T, class A>
void emulate(const int64_t* sizes, const void* value, const void* points, const void* weights, const void* reference,
             const void* grad_out, bool deterministic, void* out, void* grad_value, void* grad_points,
             void* grad_weights) {
  Problem<T, A> p{};
  p.value = static_cast<const T*>(value), p.points = static_cast<const A*>(points);
  p.weights = static_cast<const A*>(weights), p.reference = static_cast<const A*>(reference);
  p.pixels = sizes[1], p.heads = sizes[2], p.width = sizes[3], p.queries = sizes[4];
  p.levels = sizes[5], p.samples = sizes[6];
  p.pairs = sizes[0] * p.queries * p.heads;
  p.reference_stride = sizes[7] == 1 ? 0 : p.queries * p.levels * 2;
  for (int l = 0, start = 0; l < p.levels; ++l) {
    p.level[l] = {int(sizes[8 + 2 * l]), int(sizes[9 + 2 * l]), start};
    start += p.level[l].height * p.level[l].width;
  }
  constexpr int forward_n = 16 / sizeof(T), backward_n = themask::backward_channels<T>;
  const auto forward = p.width % forward_n ? run<T, A, 1> : run<T, A, forward_n>;
  const auto backward = p.width % backward_n ? run<T, A, 1> : run<T, A, backward_n>;
  const auto function = grad_out ? backward : forward;
  function(p, static_cast<const T*>(grad_out), deterministic, sizes[0] * p.pixels * p.heads * p.width,
           static_cast<T*>(out), static_cast<A*>(grad_value), static_cast<A*>(grad_points),
           static_cast<A*>(grad_weights));
}

}  // namespace

#define ENTRY(name, T, A)                                                                                            \
  extern "C" void name(const int64_t* sizes, const void* value, const void* points, const void* weights,             \
                       const void* reference, const void* grad_out, bool deterministic, void* out, void* grad_value, \
                       void* grad_points, void* grad_weights) {                                                      \
    emulate<T, A>(sizes, value, points, weights, reference, grad_out, deterministic, out, grad_value, grad_points,   \
                  grad_weights);                                                                                     \
  }
ENTRY(emulate_float32, float, float)
ENTRY(emulate_float64, double, double)
ENTRY(emulate_float16, __half, float)
ENTRY(emulate_bfloat16, __nv_bfloat16, float)
