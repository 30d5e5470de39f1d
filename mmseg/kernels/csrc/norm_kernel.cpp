// Rows of LayerNorm (Ba et al., arXiv 1607.06450), with what stands around it in a transformer's block: the residual
// sum before, and the cast for the next product behind. The three are one pass over memory.
//
// Compiled once for each instruction set, with NAME and WIDTH (bytes of a vector). Sums over channels are made in
// float32.
#include <math.h>

#include "layers.h"
#include "simd.h"

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

// R rows at once, so that a sum need not wait for the one before it.
template <int R, class X, class Branch>
void add(const X* x, const Branch* branch, X* sum, int64_t channels) {
  along(R * channels, [=](int64_t i) { V::store(sum + i, V::load(x + i) + V::load(branch + i)); },
        [=](int64_t i) { One::store(sum + i, One::load(x + i) + One::load(branch + i)); });
}

template <int R, class X>
void normalize(const norm::Job& job, const X* x, X* out, BFloat16* low) {
  const int64_t channels = job.channels;
  const auto many = [=](int r, int64_t i) { return V::load(x + r * channels + i); };
  const auto one = [=](int r, int64_t i) { return One::load(x + r * channels + i)[0]; };
  V::F wide[R] = {};
  float mean[R] = {}, scale[R] = {};
  along(channels,
        [&](int64_t i) {
          for (int r = 0; r < R; ++r) wide[r] += many(r, i);
        },
        [&](int64_t i) {
          for (int r = 0; r < R; ++r) mean[r] += one(r, i);
        });
  for (int r = 0; r < R; ++r) mean[r] = (mean[r] + V::sum(wide[r])) / channels, wide[r] = V::F{};
  along(channels,
        [&](int64_t i) {
          for (int r = 0; r < R; ++r) wide[r] += (many(r, i) - mean[r]) * (many(r, i) - mean[r]);
        },
        [&](int64_t i) {
          for (int r = 0; r < R; ++r) scale[r] += (one(r, i) - mean[r]) * (one(r, i) - mean[r]);
        });
  for (int r = 0; r < R; ++r) scale[r] = 1 / sqrtf((scale[r] + V::sum(wide[r])) / channels + job.eps);
  along(channels,
        [&](int64_t i) {
          const V::F weight = V::load(job.weight + i), bias = V::load(job.bias + i);
          for (int r = 0; r < R; ++r) {
            const V::F y = (many(r, i) - mean[r]) * scale[r] * weight + bias;
            if (low) V::store(low + r * channels + i, y);
            if (out) V::store(out + r * channels + i, y);
          }
        },
        [&](int64_t i) {
          for (int r = 0; r < R; ++r) {
            const One::F y = One::set((one(r, i) - mean[r]) * scale[r] * job.weight[i] + job.bias[i]);
            if (low) One::store(low + r * channels + i, y);
            if (out) One::store(out + r * channels + i, y);
          }
        });
}

template <int R, class X, class Branch>
void rows_at(const norm::Job& job, int64_t row) {
  const int64_t start = row * job.channels;
  const X* x = (const X*)job.x + start;
  X* out = job.out ? (X*)job.out + start : nullptr;
  if (job.branch) {
    X* sum = job.sum ? (X*)job.sum + start : out;
    add<R>(x, (const Branch*)job.branch + start, sum, job.channels);
    x = sum;
  }
  normalize<R>(job, x, out, job.low ? (BFloat16*)job.low + start : nullptr);
}

template <class X, class Branch>
void rows(const norm::Job& job, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) rows_at<4, X, Branch>(job, row);
  for (; row < last; ++row) rows_at<1, X, Branch>(job, row);
}

}  // namespace

extern "C" void NAME(const norm::Job& job, int64_t first, int64_t last) {
  const auto own = job.x_bfloat16        ? rows<BFloat16, BFloat16>
                   : job.branch_bfloat16 ? rows<float, BFloat16>
                                         : rows<float, float>;
  own(job, first, last);
}
