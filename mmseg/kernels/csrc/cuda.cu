// Binds the GPU kernels to torch's dispatcher through the stable ABI. Compiles beside a CPU-only torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "binding.h"

namespace themask {
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
}  // namespace themask

#include "cuda_kernel.cuh"

namespace themask {

ScalarType readable(ScalarType given, ScalarType type, bool is_value) { return is_value ? given : type; }

namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn: ", cudaGetErrorString(error));
}

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

template <class T, class A>
Problem<T, A> problem_of(const DeformAttn& a) {
  STD_TORCH_CHECK(a.levels <= max_levels, "ms_deform_attn: spatial_shapes holds more than ", max_levels, " levels");
  Problem<T, A> p{};
  p.value = static_cast<const T*>(a.value), p.points = static_cast<const A*>(a.points);
  p.weights = static_cast<const A*>(a.weights), p.reference = static_cast<const A*>(a.reference);
  p.pairs = a.n * a.queries * a.heads;
  p.queries = a.queries, p.pixels = a.pixels;
  p.reference_stride = a.reference_n == 1 ? 0 : a.queries * a.levels * 2;
  p.heads = a.heads, p.width = a.width, p.levels = a.levels, p.samples = a.samples;
  int start = 0;
  for (int l = 0; l < a.levels; ++l) {
    const int h = a.shapes[2 * l], w = a.shapes[2 * l + 1];
    p.level[l] = {h, w, start};
    start += h * w;
  }
  return p;
}

template <class T, class A>
Launch checked_plan(Problem<T, A>& p, int channels_a_lane) {
  const Launch launch = plan(p, channels_a_lane);
  STD_TORCH_CHECK(launch.shared <= max_shared, "ms_deform_attn: ", p.levels * p.samples,
                  " samples a query are too many for the GPU kernel; set THEMASK_OPS_BACKEND=pytorch");
  STD_TORCH_CHECK(launch.blocks < (int64_t(1) << 31), "ms_deform_attn: too many queries for one launch");
  return launch;
}

// Calls f(T(), A()) with the types of value and of arithmetic.
template <class F>
void with_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double(), double());
    case ScalarType::Half:
      return f(__half(), float());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16(), float());
    default:
      return f(float(), float());
  }
}

Tensor ms_deform_attn(const Tensor& value, Sizes shapes, const Reference& reference, const Tensor& points,
                      const Tensor& weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const DeformInputs in(value, shapes, reference, points, weights);
  const DeformAttn& a = in.attention;
  Tensor out = torch::stable::new_empty(in.value, {a.n, a.queries, a.heads * a.width});
  if (out.numel() == 0) return out;
  with_types(value.scalar_type(), [&](auto t, auto arithmetic_type) {
    using T = decltype(t);
    using A = decltype(arithmetic_type);
    constexpr int N = 16 / sizeof(T);
    auto p = problem_of<T, A>(in.attention);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const bool wide = p.width % N == 0 && aligned(in.value);
    const Launch launch = checked_plan(p, wide ? N : 1);
    const auto kernel = wide ? forward_kernel<N, T, A> : forward_kernel<1, T, A>;
    kernel<<<launch.blocks, launch.threads, launch.shared, current_stream(value)>>>(p, to);
  });
  check_launch();
  return out;
}

Gradients ms_deform_attn_backward(const Tensor& grad_out_, const Tensor& value, Sizes shapes,
                                  const Reference& reference, const Tensor& points, const Tensor& weights,
                                  bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const DeformInputs in(value, shapes, reference, points, weights);
  const DeformAttn& a = in.attention;
  check_tensor("grad_out", grad_out_, value, {a.n, a.queries, a.heads * a.width});
  const Tensor grad_out = prepared(grad_out_, value.scalar_type());
  Tensor grad_value = torch::stable::new_zeros(in.value, in.value.sizes(), in.type);
  Tensor grad_points = torch::stable::empty_like(in.points), grad_weights = torch::stable::empty_like(in.weights);
  if (grad_out.numel()) {
    const cudaStream_t stream = current_stream(value);
    with_types(value.scalar_type(), [&](auto t, auto arithmetic_type) {
      using T = decltype(t);
      using A = decltype(arithmetic_type);
      constexpr int N = backward_channels<T>;
      auto p = problem_of<T, A>(in.attention);
      const T* from = static_cast<const T*>(grad_out.const_data_ptr());
      A* to_value = static_cast<A*>(grad_value.mutable_data_ptr());
      A* to_points = static_cast<A*>(grad_points.mutable_data_ptr());
      A* to_weights = static_cast<A*>(grad_weights.mutable_data_ptr());
      const bool wide = p.width % N == 0 && aligned(in.value) && aligned(grad_out);
      if (!deterministic) {
        using Sum = AtomicSum<A>;
        const Launch launch = checked_plan(p, wide ? N : 1);
        const auto kernel = wide ? backward_kernel<N, T, A, Sum> : backward_kernel<1, T, A, Sum>;
        kernel<<<launch.blocks, launch.threads, launch.shared, stream>>>(p, from, Sum{to_value}, to_points, to_weights);
        return;
      }
      Tensor sums = torch::stable::new_zeros(in.value, in.value.sizes(), ScalarType::Long);
      Tensor largest = torch::stable::new_zeros(in.value, {2}, ScalarType::Int);
      auto* sum = static_cast<long long*>(sums.mutable_data_ptr());
      auto* bits = static_cast<unsigned*>(largest.mutable_data_ptr());
      const double terms = static_cast<double>(p.queries) * p.levels * p.samples;
      largest_kernel<<<256, max_threads, 0, stream>>>(from, grad_out.numel(), bits);
      // After the softmax no weight is above 1.
      if (!reference) largest_kernel<<<256, max_threads, 0, stream>>>(p.weights, in.weights.numel(), bits + 1);
      const FixedScale scale{bits, terms, reference.has_value()};
      const Launch launch = checked_plan(p, 1);
      backward_kernel<1><<<launch.blocks, launch.threads, launch.shared, stream>>>(p, from, FixedSum{sum, scale},
                                                                                   to_points, to_weights);
      unfix_kernel<<<1024, max_threads, 0, stream>>>(sum, grad_value.numel(), scale, to_value);
    });
    check_launch();
  }
  return cast({grad_value, grad_points, grad_weights}, value, points, weights);
}

}  // namespace
}  // namespace themask

STABLE_TORCH_LIBRARY_IMPL(themask, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&themask::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&themask::ms_deform_attn_backward));
}

// Why the kernels cannot run on the current GPU; empty if they can.
THEMASK_EXPORT const char* themask_cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, themask::forward_kernel<4, float, float>);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
