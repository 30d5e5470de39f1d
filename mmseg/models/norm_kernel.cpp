// Rows of LayerNorm (Ba et al., arXiv 1607.06450), with what stands around it in a transformer's block: the residual
// sum before, and the cast for the next product behind. The three are one pass over memory.
//
// Compiled once for each instruction set, with NAME and WIDTH (bytes of a vector). Everything is summed in float32.
#include <math.h>

#include "cpu.h"
#include "decode_heads/mask2former/pixel_decoder/ops/src/simd.h"

namespace {

using V = Simd<float, WIDTH / 4>;
using One = Simd<float, 1>;

// Calls with_vector(i) for whole vectors of a row and with_one(i) for what is left.
template <class WithVector, class WithOne>
__attribute__((always_inline)) inline void along(int64_t channels, WithVector with_vector, WithOne with_one) {
  int64_t i = 0;
  for (; i + V::width <= channels; i += V::width) with_vector(i);
  for (; i < channels; ++i) with_one(i);
}

template <class Branch>
void add(const float* x, const Branch* branch, float* sum, int64_t channels) {
  along(channels, [=](int64_t i) { V::store(sum + i, V::load(x + i) + V::load(branch + i)); },
        [=](int64_t i) { One::store(sum + i, One::load(x + i) + One::load(branch + i)); });
}

void normalize(const norm::Job& job, const float* x, float* out, BFloat16* low) {
  const int64_t channels = job.channels;
  V::F wide = {};
  float sum = 0;
  along(channels, [&](int64_t i) { wide += V::load(x + i); }, [&](int64_t i) { sum += x[i]; });
  const float mean = (sum + V::sum(wide)) / channels;
  wide = V::F{}, sum = 0;
  along(channels,
        [&](int64_t i) {
          const V::F off = V::load(x + i) - mean;
          wide += off * off;
        },
        [&](int64_t i) { sum += (x[i] - mean) * (x[i] - mean); });
  const float scale = 1 / sqrtf((sum + V::sum(wide)) / channels + job.eps);
  along(channels,
        [&](int64_t i) {
          const V::F y = (V::load(x + i) - mean) * scale * V::load(job.weight + i) + V::load(job.bias + i);
          if (low) V::store(low + i, y);
          if (out) V::store(out + i, y);
        },
        [&](int64_t i) {
          const One::F y = One::set((x[i] - mean) * scale * job.weight[i] + job.bias[i]);
          if (low) One::store(low + i, y);
          if (out) One::store(out + i, y);
        });
}

}  // namespace

extern "C" void NAME(const norm::Job& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * job.channels;
    const float* x = job.x + start;
    float* out = job.out ? job.out + start : nullptr;
    if (job.branch) {
      float* sum = job.sum ? job.sum + start : out;
      if (job.bfloat16) {
        add(x, (const BFloat16*)job.branch + start, sum, job.channels);
      } else {
        add(x, (const float*)job.branch + start, sum, job.channels);
      }
      x = sum;
    }
    normalize(job, x, out, job.low ? (BFloat16*)job.low + start : nullptr);
  }
}
