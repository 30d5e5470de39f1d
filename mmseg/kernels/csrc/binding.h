// What the bindings of both libraries share: checks before a kernel touches memory, so that a wrong call is a Python
// error and not a crash; conversions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace themask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Reference = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of value, points, weights

constexpr int64_t max_pixels = (int64_t(1) << 31) - 3;  // the CUDA kernel counts them in int

inline std::string listed(const int64_t* sizes, size_t n) {
  std::string text = "[";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        const Sizes& expected) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(Sizes(sizes.begin(), sizes.end()) == expected, op, ": ", name, " has shape ",
                  listed(sizes.data(), sizes.size()), ", expected ", listed(expected.data(), expected.size()));
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " is on another device than the first tensor");
}

inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& value, const Sizes& expected) {
  check_shape("ms_deform_attn", name, tensor, value, expected);
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "ms_deform_attn: ", name, " is not of a floating-point type");
}

// The sizes; the pointers are left null.
inline DeformAttn checked(const Tensor& value, const Sizes& shapes, const Reference& reference, const Tensor& points,
                          const Tensor& weights) {
  const char* points_name = reference ? "sampling_offsets" : "sampling_locations";
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value is not [N, S, M, D]");
  STD_TORCH_CHECK(points.dim() == 6, "ms_deform_attn: ", points_name, " is not [N, Q, M, L, P, 2]");
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "ms_deform_attn: spatial_shapes is not a flat list of (h, w)");
  DeformAttn a{};
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
  check_tensor(points_name, points, value, {a.n, a.queries, a.heads, a.levels, a.samples, 2});
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

// Half precision is computed in float32.
inline ScalarType arithmetic(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline Tensor cast(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline Tensor prepared(const Tensor& tensor, ScalarType type) { return torch::stable::contiguous(cast(tensor, type)); }

// The type that the library's kernels read a tensor in; `type` is that of arithmetic.
static ScalarType readable(ScalarType given, ScalarType type, bool is_value);

inline Type type_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 ? Type::bfloat16 : Type::full;
}

// The tensors of a call as kernels read them.
struct DeformInputs {
  DeformAttn attention;
  ScalarType type;  // of arithmetic and of gradients
  Tensor value, points, weights, reference;

  DeformInputs(const Tensor& value_, const Sizes& shapes, const Reference& reference_, const Tensor& points_,
               const Tensor& weights_)
      : attention(checked(value_, shapes, reference_, points_, weights_)), type(arithmetic(value_.scalar_type())),
        value(prepared(value_, readable(value_.scalar_type(), type, true))),
        points(prepared(points_, readable(points_.scalar_type(), type, false))),
        weights(prepared(weights_, readable(weights_.scalar_type(), type, false))) {
    if (reference_) reference = prepared(*reference_, type);
    attention.value = value.const_data_ptr(), attention.points = points.const_data_ptr();
    attention.weights = weights.const_data_ptr();
    attention.reference = reference_ ? reference.const_data_ptr() : nullptr;
    attention.value_type = type_of(value), attention.points_type = type_of(points);
    attention.weights_type = type_of(weights);
  }
};

inline Gradients cast(const Gradients& gradients, const Tensor& value, const Tensor& points, const Tensor& weights) {
  const auto& [of_value, of_points, of_weights] = gradients;
  return {cast(of_value, value.scalar_type()), cast(of_points, points.scalar_type()),
          cast(of_weights, weights.scalar_type())};
}

}  // namespace themask

// A function for Python's ctypes.
#define THEMASK_EXPORT extern "C" __attribute__((visibility("default")))
