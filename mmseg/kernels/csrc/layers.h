// What the driver and the kernels, each compiled once for each instruction set, have in common.
#pragma once
#include <stdint.h>

namespace attention {

constexpr int64_t CHUNK = 512;  // keys and values of a head that are packed together: they stay in the cache
constexpr int64_t PAD = 32;     // keys and channels of packed rows are a multiple of this

// One call: out = softmax(query key^T * scale) value, for each sample and head. Strides are in numbers, those of samples,
// heads and tokens; the channels of a token lie side by side. `out` is [samples, queries, heads, channels].
struct Job {
  const void *query, *key, *value;
  void* out;
  const uint8_t* mask;  // not 0 where a query may attend; null: everywhere
  int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[3];
  int64_t samples, heads, queries, keys, channels;
  float scale;
  bool bfloat16;  // the type of all four; else float32

  // Floats of memory for `rows` queries: packed queries and results, keys, values, scores, maxima and sums.
  int64_t memory(int64_t rows) const {
    const int64_t wide = (channels + PAD - 1) / PAD * PAD;
    return 2 * (rows + PAD) * (wide + 1) + 2 * CHUNK * wide + 2 * PAD * CHUNK;
  }
};

// The queries first..last of one sample and head. `memory` is aligned to 64 bytes.
typedef void Attend(const Job&, int64_t sample, int64_t head, int64_t first, int64_t last, float* memory);

}  // namespace attention

namespace norm {

// One call: y = LayerNorm(x + branch) over rows of `channels` numbers that lie side by side, all rows one after the
// other. The sum is rounded to the type of `x`, and its LayerNorm is made of that.
struct Job {
  const void *x, *branch;  // no branch: null
  const float *weight, *bias;
  void* sum;  // takes x + branch in the type of x; null: nowhere, and then `out` is not null if there is a branch
  void* out;  // takes y in the type of x; null: nowhere
  void* low;  // takes y in bfloat16; null: nowhere
  int64_t channels;
  float eps;
  bool x_bfloat16;       // then `branch` is, too; else float32
  bool branch_bfloat16;  // else float32
};

// The rows first..last.
typedef void Normalize(const Job&, int64_t first, int64_t last);

}  // namespace norm

extern "C" attention::Attend themask_attend_portable, themask_attend_avx2, themask_attend_avx512,
    themask_attend_avx512_bf16;
extern "C" norm::Normalize themask_normalize_portable, themask_normalize_avx2, themask_normalize_avx512;
