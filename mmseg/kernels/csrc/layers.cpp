// Attention and LayerNorm: parts for the threads of the caller's pool, and the choice of the instruction set.
#include "layers.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace {

typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

ParallelFor* parallel_for;
constexpr int64_t LEAST = 64, MOST = 1024;  // queries of a part
constexpr int64_t NUMBERS = 1 << 14;        // for a thread to normalise: fewer are not worth waking it

struct Set {
  const char* name;
  attention::Attend* attend;
  norm::Normalize* normalize;
  bool supported;
};

const Set* sets() {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const Set all[] = {{"avx512_bf16", themask_attend_avx512_bf16, themask_normalize_avx512, bf16},
                            {"avx512", themask_attend_avx512, themask_normalize_avx512, avx512},
                            {"avx2", themask_attend_avx2, themask_normalize_avx2, avx2},
                            {"portable", themask_attend_portable, themask_normalize_portable, true},
                            {}};
#else
  static const Set all[] = {{"portable", themask_attend_portable, themask_normalize_portable, true}, {}};
#endif
  return all;
}

const Set* number_of(int64_t number) {
  const Set* set = sets();
  for (; set->name; ++set)
    if (set->supported && number-- == 0) break;
  return set;
}

// Memory of this thread, aligned to 64 bytes; kept for the next call, so that the system need not clear it anew.
float* memory(int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local int64_t size = 0;
  floats += 16;
  if (size < floats) {
    kept.reset();
    kept.reset(new (std::nothrow) float[floats]);
    size = kept ? floats : 0;
  }
  return (float*)(((uintptr_t)kept.get() + 63) / 64 * 64);
}

struct Work {
  const attention::Job& job;
  attention::Attend* attend;
  int64_t rows, parts;  // queries of a part; parts of a head
  std::atomic<bool> no_memory{false};

  void run(int64_t begin, int64_t end) {
    float* aligned = memory(job.memory(rows));
    if (!aligned) {
      no_memory = true;
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / parts, first = i % parts * rows;
      attend(job, pair / job.heads, pair % job.heads, first, std::min(first + rows, job.queries), aligned);
    }
  }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of the instruction set `number` that this processor has, the fastest first; null behind the last.
EXPORT const char* themask_cpu_set(int64_t number) { return number_of(number)->name; }

// torch_parallel_for of torch's stable ABI; before the first call of the functions below.
EXPORT void themask_cpu_pool(ParallelFor* loop) { parallel_for = loop; }

// Softmax attention; see Job.
//   tensors    query, key, value, mask (or null), out
//   strides    of the first four, three each: samples, heads, tokens
//   sizes      samples, heads, queries, keys, channels; all at least 1
//   set        number of the instruction set
// Returns false where the system gives no memory.
EXPORT bool themask_attention(void* const* tensors, const int64_t* strides, const int64_t* sizes, double scale,
                              bool bfloat16, int64_t set, int64_t threads) {
  attention::Job job = {};
  job.query = tensors[0], job.key = tensors[1], job.value = tensors[2];
  job.mask = (const uint8_t*)tensors[3], job.out = tensors[4];
  int64_t* const own[] = {job.query_stride, job.key_stride, job.value_stride, job.mask_stride};
  for (int64_t i = 0; i < 4; ++i) std::copy(strides + 3 * i, strides + 3 * i + 3, own[i]);
  job.samples = sizes[0], job.heads = sizes[1], job.queries = sizes[2], job.keys = sizes[3], job.channels = sizes[4];
  job.scale = float(scale), job.bfloat16 = bfloat16;

  const int64_t pairs = job.samples * job.heads;
  const int64_t share = (pairs * job.queries + 4 * threads - 1) / (4 * threads);  // four parts for a thread
  const int64_t rows = std::min(std::max(share, LEAST), MOST), parts = (job.queries + rows - 1) / rows;
  Work work{job, number_of(set)->attend, (job.queries + parts - 1) / parts, parts, {}};
  const int32_t failed = parallel_for(0, pairs * parts, 1, [](int64_t begin, int64_t end, void* what) {
    ((Work*)what)->run(begin, end);
  }, &work);
  return !failed && !work.no_memory;
}

// LayerNorm behind a residual sum; see Job.
//   tensors    x, branch (or null), weight, bias, sum (or null), out (or null), low (or null)
//   set        number of the instruction set
EXPORT bool themask_norm(void* const* tensors, int64_t rows, int64_t channels, double eps, bool x_bfloat16,
                         bool branch_bfloat16, int64_t set) {
  const norm::Job job = {tensors[0], tensors[1], (const float*)tensors[2], (const float*)tensors[3], tensors[4],
                         tensors[5], tensors[6], channels, float(eps), x_bfloat16, branch_bfloat16};
  struct Rows {
    const norm::Job& job;
    norm::Normalize* normalize;
  } work{job, number_of(set)->normalize};
  const int64_t grain = NUMBERS / channels + 1;
  return !parallel_for(0, rows, grain, [](int64_t begin, int64_t end, void* what) {
    const Rows* work = (const Rows*)what;
    work->normalize(work->job, begin, end);
  }, &work);
}
