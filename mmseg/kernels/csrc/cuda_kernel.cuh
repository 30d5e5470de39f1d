// The GPU kernels. tests/gpu_emulator.h stands in for the CUDA language, so that tests run their logic without a GPU.
//
// A group of G lanes of one warp works on one (item, query, head). First its lanes share out the samples: softmax,
// position, corners go to shared memory. Then every lane owns 16 bytes of channels and passes over all corners once.
#pragma once

#ifndef THEMASK_GPU_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

namespace themask {

constexpr int max_levels = 16;

struct Level {
  int height, width, start;
};

// As Attention in kernel.h, by value; points, weights and reference are in the arithmetic type A.
template <class T, class A>
struct Problem {
  const T* value;
  const A *points, *weights, *reference;  // reference null: locations and weights as they are
  int64_t pairs, queries, pixels, reference_stride;
  int heads, width, levels, samples, group;
  Level level[max_levels];
};

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// A sample in shared memory, read with 16-byte loads. Forward: the corners' weights. Backward: weight, position in the
// pixel; later gradients.
template <class A>
struct alignas(16) Sample {
  union {
    A corner_weight[4];
    struct {
      A weight, fx, fy, grad_weight;
    };
  };
  int row[4];  // of `value` within the item, or -1 outside the map
};

template <class A>
__device__ A group_max(A x, int group) {
  for (int o = group / 2; o; o /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, o);
    x = other > x ? other : x;
  }
  return x;
}

template <class A>
__device__ A group_sum(A x, int group) {
  for (int o = group / 2; o; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// Which item, query and head a pair is.
struct Place {
  int64_t item, query;
  int head;
};

// A division of 64-bit integers is a long sequence of instructions, so it is left to huge problems.
template <class T, class A>
__device__ Place place_of(const Problem<T, A>& p, int64_t pair) {
  if (p.pairs <= UINT32_MAX) {
    const uint32_t i = pair, heads = p.heads, queries = p.queries, q = i / heads, item = q / queries;
    return {item, q - item * queries, static_cast<int>(i - q * heads)};
  }
  const int64_t q = pair / p.heads, item = q / p.queries;
  return {item, q - item * p.queries, static_cast<int>(pair - q * p.heads)};
}

// All lanes of the warp call this, those past the last pair with the last pair.
template <bool Backward, class T, class A>
__device__ void prepare(const Problem<T, A>& p, int64_t pair, const Place& place, int lane, Sample<A>* samples) {
  const int count = p.levels * p.samples;
  const A* weights = p.weights + pair * count;
  A largest = 0, scale = 1;
  if (p.reference) {
    largest = -INFINITY;
    for (int k = lane; k < count; k += p.group) largest = weights[k] > largest ? weights[k] : largest;
    largest = group_max(largest, p.group);
    A sum = 0;
    for (int k = lane; k < count; k += p.group) sum += exp(weights[k] - largest);
    scale = 1 / group_sum(sum, p.group);
  }
  for (int k = lane; k < count; k += p.group) {
    const int l = k / p.samples;
    const Level level = p.level[l];
    const A* point = p.points + (pair * count + k) * 2;
    A x, y, weight = weights[k];
    if (p.reference) {
      const A* reference = p.reference + place.item * p.reference_stride + (place.query * p.levels + l) * 2;
      x = reference[0] * level.width - A(0.5) + point[0];
      y = reference[1] * level.height - A(0.5) + point[1];
      weight = exp(weight - largest) * scale;
    } else {
      x = point[0] * level.width - A(0.5);
      y = point[1] * level.height - A(0.5);
    }
    const bool inside = x > -1 && x < level.width && y > -1 && y < level.height;  // false for NaN
    if (!inside) x = y = 0;
    const A x_floor = floor(x), y_floor = floor(y), fx = x - x_floor, fy = y - y_floor;
    const int x0 = static_cast<int>(x_floor), y0 = static_cast<int>(y_floor);
    const bool left = inside && x0 >= 0, right = inside && x0 + 1 < level.width;
    const bool top = y0 >= 0, bottom = y0 + 1 < level.height;
    const int row = level.start + y0 * level.width + x0;
    Sample<A>& s = samples[k];
    s.row[0] = left && top ? row : -1;
    s.row[1] = right && top ? row + 1 : -1;
    s.row[2] = left && bottom ? row + level.width : -1;
    s.row[3] = right && bottom ? row + level.width + 1 : -1;
    if (Backward) {
      s.weight = weight, s.fx = fx, s.fy = fy;
    } else {
      const A lower = weight * fy, upper = weight - lower;
      s.corner_weight[0] = upper - upper * fx;
      s.corner_weight[1] = upper * fx;
      s.corner_weight[2] = lower - lower * fx;
      s.corner_weight[3] = lower * fx;
    }
  }
  __syncwarp();
}

// The first channel of a head in the first pixel of an item; `heads * width` further on begins the next pixel.
template <class T, class A>
__device__ int64_t origin_of(const Problem<T, A>& p, const Place& place) {
  return (place.item * p.pixels * p.heads + place.head) * p.width;
}

template <int N, class T, class A>
__global__ void forward_kernel(const Problem<T, A> p, T* out) {
  const int lane = threadIdx.x % p.group, groups = blockDim.x / p.group;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / p.group;
  const int64_t pair = wanted < p.pairs ? wanted : p.pairs - 1;
  const int count = p.levels * p.samples;
  Sample<A>* samples = static_cast<Sample<A>*>(shared_memory()) + threadIdx.x / p.group * count;
  const Place place = place_of(p, pair);
  prepare<false>(p, pair, place, lane, samples);
  if (wanted >= p.pairs) return;

  const int stride = p.heads * p.width;
  for (int c = lane * N; c < p.width; c += p.group * N) {
    const T* value = p.value + origin_of(p, place) + c;
    A sum[N] = {};
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      const Sample<A> s = samples[k];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (s.row[i] < 0) continue;
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(value + static_cast<int64_t>(s.row[i]) * stride);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += s.corner_weight[i] * widen(pack.v[n]);
      }
    }
    Pack<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) narrow(sum[n], result.v[n]);
    *reinterpret_cast<Pack<T, N>*>(out + pair * p.width + c) = result;
  }
}

// How contributions to grad_value meet. Atomic: in any order. Fixed: as scaled integers, whose sum does not depend on
// the order.
template <class A>
struct AtomicSum {
  A* sum;
  template <int N>
  __device__ void add(int64_t at, const A (&x)[N]) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (sizeof(A) == 4 && N % 4 == 0) {
#pragma unroll
      for (int n = 0; n < N; n += 4)
        atomicAdd(reinterpret_cast<float4*>(sum + at + n), make_float4(x[n], x[n + 1], x[n + 2], x[n + 3]));
    } else
#endif
    {
#pragma unroll
      for (int n = 0; n < N; ++n) atomicAdd(sum + at + n, x[n]);
    }
  }
};

// The power of two by which sums of grad_value are scaled so that none exceeds 2^60, from the bits of the largest
// |grad_out| and, where no softmax bounds it, |weight|.
struct FixedScale {
  const unsigned* largest;
  double terms;
  bool fused;
  __device__ double operator()() const {
    const double bound = terms * __uint_as_float(largest[0]) * (fused ? 1.0f : __uint_as_float(largest[1]));
    return bound == 0 ? 1.0 : exp2(60.0 - ceil(log2(bound)));
  }
};

struct FixedSum {
  long long* sum;
  FixedScale scale;
  template <int N, class A>
  __device__ void add(int64_t at, const A (&x)[N]) const {
    const double factor = scale();
    for (int n = 0; n < N; ++n)
      atomicAdd(reinterpret_cast<unsigned long long*>(sum + at + n),
                static_cast<unsigned long long>(llrint(x[n] * factor)));
  }
};

// The bits of the largest |x|: those of floats >= 0 are ordered as integers are, NaN above all.
template <class T>
__global__ void largest_kernel(const T* x, int64_t n, unsigned* largest) {
  unsigned mine = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const unsigned bits = __float_as_uint(static_cast<float>(widen(x[i]))) & 0x7fffffffu;
    mine = bits > mine ? bits : mine;
  }
  if (mine) atomicMax(largest, mine);
}

template <class A>
__global__ void unfix_kernel(const long long* sum, int64_t n, FixedScale scale, A* out) {
  const double factor = scale();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    out[i] = factor > 0 && factor < INFINITY ? static_cast<A>(sum[i] / factor) : static_cast<A>(NAN);
}

template <int N, class T, class A, class Sum>
__global__ void backward_kernel(const Problem<T, A> p, const T* grad_out, Sum grad_value, A* grad_points,
                                A* grad_weights) {
  const int lane = threadIdx.x % p.group, groups = blockDim.x / p.group;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / p.group;
  const bool active = wanted < p.pairs;
  const int64_t pair = active ? wanted : p.pairs - 1;
  const int count = p.levels * p.samples;
  Sample<A>* samples = static_cast<Sample<A>*>(shared_memory()) + threadIdx.x / p.group * count;
  const Place place = place_of(p, pair);
  prepare<true>(p, pair, place, lane, samples);

  const int stride = p.heads * p.width;
  const int64_t origin = origin_of(p, place);
  const bool many = p.width > p.group * N;  // channels for the lanes of a group
  Pack<T, N> grads{};
  if (lane * N < p.width) grads = *reinterpret_cast<const Pack<T, N>*>(grad_out + pair * p.width + lane * N);
  for (int k = 0; k < count; ++k) {
    const Sample<A> s = samples[k];
    const A corner_x[4] = {1 - s.fx, s.fx, 1 - s.fx, s.fx}, corner_y[4] = {1 - s.fy, 1 - s.fy, s.fy, s.fy};
    A dot[4] = {};
    for (int c = lane * N; c < p.width; c += p.group * N) {
      if (many) grads = *reinterpret_cast<const Pack<T, N>*>(grad_out + pair * p.width + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (s.row[i] < 0) continue;
        const int64_t at = origin + static_cast<int64_t>(s.row[i]) * stride + c;
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(p.value + at);
        A share[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          dot[i] += widen(pack.v[n]) * widen(grads.v[n]);
          share[n] = s.weight * corner_x[i] * corner_y[i] * widen(grads.v[n]);
        }
        if (active) grad_value.add(at, share);
      }
    }
    const A across_top = dot[1] - dot[0], across_bottom = dot[3] - dot[2];
    const A top = dot[0] + s.fx * across_top, bottom = dot[2] + s.fx * across_bottom;
    const A grad_x = group_sum(across_top + s.fy * (across_bottom - across_top), p.group);
    const A grad_y = group_sum(bottom - top, p.group);
    const A grad_weight = group_sum(top + s.fy * (bottom - top), p.group);
    __syncwarp();  // every lane has read the sample
    if (lane == 0) samples[k].fx = grad_x, samples[k].fy = grad_y, samples[k].grad_weight = grad_weight;
  }
  __syncwarp();

  A mean = 0;
  if (p.reference) {
    for (int k = lane; k < count; k += p.group) mean += samples[k].weight * samples[k].grad_weight;
    mean = group_sum(mean, p.group);
  }
  if (!active) return;
  for (int k = lane; k < count; k += p.group) {
    const Sample<A>& s = samples[k];
    const Level level = p.level[k / p.samples];
    const int64_t at = pair * count + k;
    grad_points[2 * at] = s.weight * s.fx * (p.reference ? 1 : level.width);
    grad_points[2 * at + 1] = s.weight * s.fy * (p.reference ? 1 : level.height);
    grad_weights[at] = p.reference ? s.weight * (s.grad_weight - mean) : s.grad_weight;
  }
}

struct Launch {
  int64_t blocks, shared;
  int threads;
};

// Channels of a lane in the backward pass: with more, the lanes of a group would not add to neighbouring 16 bytes of the
// float32 gradient.
template <class T>
constexpr int backward_channels = 16 / sizeof(T) < 4 ? 16 / sizeof(T) : 4;

constexpr int max_threads = 256, warp = 32;
constexpr int64_t max_shared = 48 * 1024;  // what every GPU gives without asking

// Lanes for a pair: enough for its channels. Threads of a block: as many as its shared memory allows; with too many
// samples a query, `shared` of the smallest block is above `max_shared`.
template <class T, class A>
Launch plan(Problem<T, A>& p, int channels_a_lane) {
  const int64_t bytes = static_cast<int64_t>(p.levels) * p.samples * sizeof(Sample<A>);
  p.group = 4;
  while (p.group < warp && p.group * channels_a_lane < p.width) p.group *= 2;
  while (p.group < warp && warp / p.group * bytes > max_shared) p.group *= 2;
  int threads = max_threads;
  while (threads > warp && threads / p.group * bytes > max_shared) threads /= 2;
  return {(p.pairs * p.group + threads - 1) / threads, threads / p.group * bytes, threads};
}

}  // namespace themask
