// What the bindings of both libraries share: checks before a kernel touches memory, so that a wrong call is a Python
// error and not a crash; conversions; and the ops' names. A library defines `forward` and `backward` below, then says
// THEMASK_REGISTER(device).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "ms_deform_attn.h"

namespace themask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shapes = std::vector<int64_t>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of value, points, weights

constexpr int64_t max_pixels = (int64_t(1) << 31) - 3;  // the CUDA kernel counts them in int

inline std::string listed(const int64_t* sizes, size_t n) {
  std::string text = "[";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == expected.size();
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = sizes[i] == expected.begin()[i];
  STD_TORCH_CHECK(equal, "ms_deform_attn: ", name, " has shape ", listed(sizes.data(), sizes.size()), ", expected ",
                  listed(expected.begin(), expected.size()));
  STD_TORCH_CHECK(tensor.device() == like.device(), "ms_deform_attn: ", name, " is on another device than value");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "ms_deform_attn: ", name, " is not of a floating-point type");
}

// The sizes; the pointers are left null.
inline Attention checked(const Tensor& value, const Shapes& shapes,
                         const Tensor* reference, const Tensor& points,
                         const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value is not [N, S, M, D]");
  STD_TORCH_CHECK(points.dim() == 6, "ms_deform_attn: ", reference ? "sampling_offsets" : "sampling_locations",
                  " is not [N, Q, M, L, P, 2]");
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "ms_deform_attn: spatial_shapes is not a flat list of (h, w)");
  Attention a{};
  a.shapes = shapes.data();
  a.n = value.size(0), a.pixels = value.size(1), a.heads = value.size(2), a.width = value.size(3);
  a.queries = points.size(1), a.levels = shapes.size() / 2, a.samples = points.size(4);
  a.reference_n = reference && reference->dim() == 4 ? reference->size(0) : a.n;
  STD_TORCH_CHECK(a.pixels <= max_pixels, "ms_deform_attn: value has too many pixels");
  int64_t left = a.pixels;  // a comparison by division and subtraction cannot wrap, as products and sums of sizes do
  for (int64_t l = 0; l < a.levels; ++l) {
    const int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
    STD_TORCH_CHECK(h > 0 && w > 0, "ms_deform_attn: spatial_shapes holds a size below 1");
    STD_TORCH_CHECK(h <= left / w, "ms_deform_attn: spatial_shapes ", listed(shapes.data(), shapes.size()),
                    " hold more pixels than value, which has ", a.pixels);
    left -= h * w;
  }
  STD_TORCH_CHECK(left == 0, "ms_deform_attn: spatial_shapes ", listed(shapes.data(), shapes.size()), " hold ",
                  a.pixels - left, " pixels, value has ", a.pixels);
  check_tensor("value", value, value, {a.n, a.pixels, a.heads, a.width});
  check_tensor(reference ? "sampling_offsets" : "sampling_locations", points, value,
               {a.n, a.queries, a.heads, a.levels, a.samples, 2});
  if (reference) {
    check_tensor("attention_logits", weights, value, {a.n, a.queries, a.heads, a.levels * a.samples});
    STD_TORCH_CHECK(a.reference_n == 1 || a.reference_n == a.n,
                    "ms_deform_attn: reference_points has neither one item nor as many as value");
    check_tensor("reference_points", *reference, value, {a.reference_n, a.queries, a.levels, 2});
  } else {
    check_tensor("attention_weights", weights, value, {a.n, a.queries, a.heads, a.levels, a.samples});
  }
  return a;
}

inline void check_grad_out(const Tensor& grad_out, const Attention& a,
                           const Tensor& value) {
  check_tensor("grad_out", grad_out, value, {a.n, a.queries, a.heads * a.width});
}

// Half precision is computed in float32.
inline ScalarType arithmetic(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline Tensor prepared(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

inline Tensor restored(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

static Tensor forward(const Tensor& value, const Shapes& shapes, const Tensor* reference, const Tensor& points,
                      const Tensor& weights);
static Gradients backward(const Tensor& grad_out, const Tensor& value, const Shapes& shapes, const Tensor* reference,
                          const Tensor& points, const Tensor& weights, bool deterministic);

static Tensor plain(const Tensor& value, Shapes shapes, const Tensor& locations, const Tensor& weights) {
  return forward(value, shapes, nullptr, locations, weights);
}

static Gradients plain_backward(const Tensor& grad_out, const Tensor& value, Shapes shapes, const Tensor& locations,
                                const Tensor& weights, bool deterministic) {
  return backward(grad_out, value, shapes, nullptr, locations, weights, deterministic);
}

static Tensor fused(const Tensor& value, Shapes shapes, const Tensor& reference, const Tensor& offsets,
                    const Tensor& logits) {
  return forward(value, shapes, &reference, offsets, logits);
}

static Gradients fused_backward(const Tensor& grad_out, const Tensor& value, Shapes shapes, const Tensor& reference,
                                const Tensor& offsets, const Tensor& logits, bool deterministic) {
  return backward(grad_out, value, shapes, &reference, offsets, logits, deterministic);
}

}  // namespace themask

#define THEMASK_REGISTER(device)                                                    \
  STABLE_TORCH_LIBRARY_IMPL(themask, device, m) {                                   \
    m.impl("ms_deform_attn", TORCH_BOX(&themask::plain));                           \
    m.impl("ms_deform_attn_backward", TORCH_BOX(&themask::plain_backward));         \
    m.impl("ms_deform_attn_fused", TORCH_BOX(&themask::fused));                     \
    m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&themask::fused_backward));   \
  }                                                                                 \
  static_assert(true, "")

// A function for Python's ctypes.
#define THEMASK_EXPORT extern "C" __attribute__((visibility("default")))
