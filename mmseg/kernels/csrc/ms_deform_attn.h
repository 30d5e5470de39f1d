// What the binding (cpu.cpp) asks of a kernel. One set of kernels is compiled for each instruction set.
#pragma once

#include <stdint.h>

namespace themask {

// What a tensor holds: numbers of the type that a kernel computes in, or bfloat16.
enum class Type { computed, bfloat16 };

// Contiguous tensors. Fused: `points` are offsets in pixels, `weights` are logits and `reference` is given; otherwise
// `points` are locations in 0..1, `weights` are used as they are, `reference` is null.
struct Attention {
  const void* value;      // [n, pixels, heads, width]
  const void* points;     // [n, queries, heads, levels, samples, 2]
  const void* weights;    // [n, queries, heads, levels, samples]
  const void* reference;  // [reference_n, queries, levels, 2]
  const int64_t* shapes;  // [levels, 2]: h, w
  int64_t n, pixels, heads, width, queries, levels, samples, reference_n;
  Type value_type, points_type, weights_type;  // of reference, gradients: computed; of forward's result: value's
};

// What a thread does. Forward: out [n, queries, heads * width], the parts begin..end of n * heads * queries.
// Backward: all queries of the (item, head) pairs begin..end of n * heads, so that each thread adds to rows of
// grad_value of its own, in the order of the queries: no race, and the same bits for any number of threads.
struct Kernels {
  void (*forward)(const Attention&, void* out, int64_t begin, int64_t end);
  void (*backward)(const Attention&, const void* grad_out, void* grad_value, void* grad_points, void* grad_weights,
                   int64_t begin, int64_t end);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;  // float32
extern const Kernels kernels_double;

}  // namespace themask
