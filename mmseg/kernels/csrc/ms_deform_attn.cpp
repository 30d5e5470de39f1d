// Binds the CPU kernels to torch's dispatcher through the stable ABI, and picks the instruction set.
#include <cstring>

#include "binding.h"
#include "ms_deform_attn.h"

namespace themask {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

const InstructionSet instruction_sets[] = {
#if defined(__x86_64__)
#ifdef THEMASK_AVX512_EMULATED  // tests: the 16-wide code, made of narrower steps
    {"avx512", &kernels_avx512, [] { return true; }},
#else
    {"avx512", &kernels_avx512, [] { return bool(__builtin_cpu_supports("avx512f")); }},
#endif
    {"avx2", &kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &kernels_portable, [] { return true; }},
};

const InstructionSet* best() {
  for (const auto& set : instruction_sets)
    if (set.supported()) return &set;
  return nullptr;
}

const InstructionSet* chosen = best();

// What a kernel reads: bfloat16 as it is where sums are made in float32.
Tensor readable(const Tensor& tensor, ScalarType arithmetic_type) {
  const bool direct = tensor.scalar_type() == ScalarType::BFloat16 && arithmetic_type == ScalarType::Float;
  return prepared(tensor, direct ? ScalarType::BFloat16 : arithmetic_type);
}

Type type_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 ? Type::bfloat16 : Type::computed;
}

struct Inputs {
  Tensor value, points, weights, reference;
  Attention attention;
  ScalarType type;  // of arithmetic and of gradients

  Inputs(const Tensor& value_, const Shapes& shapes, const Tensor* reference_, const Tensor& points_,
         const Tensor& weights_) {
    attention = checked(value_, shapes, reference_, points_, weights_);
    type = arithmetic(value_.scalar_type());
    value = readable(value_, type), points = readable(points_, type), weights = readable(weights_, type);
    attention.value = value.const_data_ptr();
    attention.points = points.const_data_ptr();
    attention.weights = weights.const_data_ptr();
    attention.value_type = type_of(value), attention.points_type = type_of(points);
    attention.weights_type = type_of(weights);
    if (reference_) {
      reference = prepared(*reference_, type);
      attention.reference = reference.const_data_ptr();
    }
  }

  const Kernels& kernels() const { return type == ScalarType::Double ? kernels_double : *chosen->kernels; }
};

}  // namespace

Tensor forward(const Tensor& value, const Shapes& shapes, const Tensor* reference, const Tensor& points,
               const Tensor& weights) {
  const Inputs in(value, shapes, reference, points, weights);
  const Attention& att = in.attention;
  Tensor out = torch::stable::new_empty(in.value, {att.n, att.queries, att.heads * att.width});
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, att.n * att.heads * att.queries, 512, [&](int64_t begin, int64_t end) {
    in.kernels().forward(att, to, begin, end);
  });
  return restored(out, value.scalar_type());
}

// Always deterministic.
Gradients backward(const Tensor& grad_out_, const Tensor& value, const Shapes& shapes, const Tensor* reference,
                   const Tensor& points, const Tensor& weights, bool) {
  const Inputs in(value, shapes, reference, points, weights);
  const Attention& att = in.attention;
  check_grad_out(grad_out_, att, value);
  const Tensor grad_out = prepared(grad_out_, in.type);
  Tensor grad_value = torch::stable::new_empty(in.value, in.value.sizes(), in.type),
         grad_points = torch::stable::new_empty(in.points, in.points.sizes(), in.type),
         grad_weights = torch::stable::new_empty(in.weights, in.weights.sizes(), in.type);
  const void* from = grad_out.const_data_ptr();
  void *to_value = grad_value.mutable_data_ptr(), *to_points = grad_points.mutable_data_ptr(),
       *to_weights = grad_weights.mutable_data_ptr();
  torch::stable::parallel_for(0, att.n * att.heads, 1, [&](int64_t begin, int64_t end) {
    in.kernels().backward(att, from, to_value, to_points, to_weights, begin, end);
  });
  return {restored(grad_value, value.scalar_type()), restored(grad_points, points.scalar_type()),
          restored(grad_weights, weights.scalar_type())};
}

}  // namespace themask

THEMASK_REGISTER(CPU);

THEMASK_EXPORT const char* themask_instruction_set() { return themask::chosen->name; }

// False where the machine lacks it.
THEMASK_EXPORT bool themask_choose_instruction_set(const char* name) {
  for (const auto& set : themask::instruction_sets)
    if (!std::strcmp(set.name, name) && set.supported()) {
      themask::chosen = &set;
      return true;
    }
  return false;
}
