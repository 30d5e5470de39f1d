// Binds the CPU kernels to torch's dispatcher through the stable ABI, and picks the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "check.h"
#include "kernel.h"

namespace {

using themask::Attention;
using themask::Kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

const InstructionSet instruction_sets[] = {
#if defined(__x86_64__)
#ifdef THEMASK_AVX512_EMULATED  // tests: the 16-wide code, made of narrower steps
    {"avx512", &themask::kernels_avx512, [] { return true; }},
#else
    {"avx512", &themask::kernels_avx512, [] { return bool(__builtin_cpu_supports("avx512f")); }},
#endif
    {"avx2", &themask::kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &themask::kernels_portable, [] { return true; }},
};

const InstructionSet* best() {
  for (const auto& set : instruction_sets)
    if (set.supported()) return &set;
  return nullptr;
}

const InstructionSet* chosen = best();

// Half precision is computed in float32.
ScalarType arithmetic(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

Tensor prepared(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

Tensor restored(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

struct Inputs {
  Tensor value, points, weights, reference;
  Attention attention;

  Inputs(const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor* reference_, const Tensor& points_,
         const Tensor& weights_) {
    attention = themask::checked(value_, shapes, reference_, points_, weights_);
    const ScalarType type = arithmetic(value_.scalar_type());
    value = prepared(value_, type), points = prepared(points_, type), weights = prepared(weights_, type);
    attention.value = value.const_data_ptr();
    attention.points = points.const_data_ptr();
    attention.weights = weights.const_data_ptr();
    if (reference_) {
      reference = prepared(*reference_, type);
      attention.reference = reference.const_data_ptr();
    }
  }

  const Kernels& kernels() const {
    return value.scalar_type() == ScalarType::Double ? themask::kernels_double : *chosen->kernels;
  }
};

Tensor forward(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor* reference, const Tensor& points,
               const Tensor& weights) {
  const Inputs in(value, shapes, reference, points, weights);
  const Attention& att = in.attention;
  Tensor out = torch::stable::new_empty(in.value, {att.n, att.queries, att.heads * att.width});
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, att.n * att.queries, 64, [&](int64_t begin, int64_t end) {
    in.kernels().forward(att, to, begin, end);
  });
  return restored(out, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out_, const Tensor& value,
                                            const std::vector<int64_t>& shapes, const Tensor* reference,
                                            const Tensor& points, const Tensor& weights) {
  const Inputs in(value, shapes, reference, points, weights);
  const Attention& att = in.attention;
  themask::check_grad_out(grad_out_, att, value);
  const Tensor grad_out = prepared(grad_out_, in.value.scalar_type());
  Tensor grad_value = torch::stable::empty_like(in.value), grad_points = torch::stable::empty_like(in.points),
         grad_weights = torch::stable::empty_like(in.weights);
  const void* from = grad_out.const_data_ptr();
  void *to_value = grad_value.mutable_data_ptr(), *to_points = grad_points.mutable_data_ptr(),
       *to_weights = grad_weights.mutable_data_ptr();
  torch::stable::parallel_for(0, att.n * att.heads, 1, [&](int64_t begin, int64_t end) {
    in.kernels().backward(att, from, to_value, to_points, to_weights, begin, end);
  });
  return {restored(grad_value, value.scalar_type()), restored(grad_points, points.scalar_type()),
          restored(grad_weights, weights.scalar_type())};
}

// The ops. Their last argument of backward asks for a deterministic result, which this one always is.
Tensor plain_forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  return forward(value, shapes, nullptr, locations, weights);
}

Tensor fused_forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
  return forward(value, shapes, &reference, offsets, logits);
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad_out, const Tensor& value,
                                                  std::vector<int64_t> shapes, const Tensor& locations,
                                                  const Tensor& weights, bool) {
  return backward(grad_out, value, shapes, nullptr, locations, weights);
}

std::tuple<Tensor, Tensor, Tensor> fused_backward(const Tensor& grad_out, const Tensor& value,
                                                  std::vector<int64_t> shapes, const Tensor& reference,
                                                  const Tensor& offsets, const Tensor& logits, bool) {
  return backward(grad_out, value, shapes, &reference, offsets, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(themask, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&plain_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&plain_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward));
}

// For Python (ctypes): the instruction set in use, and one chosen by name; false where the machine lacks it.
extern "C" __attribute__((visibility("default"))) const char* themask_instruction_set() { return chosen->name; }

extern "C" __attribute__((visibility("default"))) bool themask_choose_instruction_set(const char* name) {
  for (const auto& set : instruction_sets)
    if (!std::strcmp(set.name, name) && set.supported()) {
      chosen = &set;
      return true;
    }
  return false;
}
