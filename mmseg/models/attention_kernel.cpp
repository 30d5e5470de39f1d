// Attention of one head without its matrix of scores: a few queries meet a chunk of keys at a time, with a running
// maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
//
// Compiled once for each instruction set, with NAME and WIDTH (bytes of a vector); vectors are those of GCC and Clang.
// No templates of others: the linker might keep their wide form for all. Everything is summed in float32. With
// WITH_BF16_PRODUCTS bfloat16 numbers are multiplied as they are, two at a time in each lane; else they are made float32
// when they are packed.
#include "cpu.h"

#include <string.h>
#ifdef WITH_BF16_PRODUCTS
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline

namespace {

using namespace attention;

constexpr int64_t lanes = WIDTH / 4;
constexpr int64_t rows_at_once = WIDTH == 64 ? 8 : 4;  // by two vectors: as many sums as there are registers for
constexpr float lowest = -3.4028234663852886e38f, start = -1e30f;
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(lanes)));

template <typename Vector, typename Number>
INLINE Vector load(const Number* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector, typename Number>
INLINE void store(Number* to, Vector vector) {
  memcpy(to, &vector, sizeof vector);
}

struct BFloat16 {
  uint16_t bits;
};

INLINE float to_float(float number) { return number; }
INLINE float to_float(BFloat16 number) {
  const uint32_t bits = uint32_t(number.bits) << 16;
  return load<float>(&bits);
}

INLINE void from_float(float number, float* to) { *to = number; }
INLINE void from_float(float number, BFloat16* to) {  // to the nearest, to even; NaN stays NaN
  const uint32_t bits = load<uint32_t>(&number);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

// How numbers are packed. Step i of a product takes the numbers i * Steps::size.. of both sides.
struct Single {
  typedef float Packed;  // one number
  static constexpr int64_t size = 1;
  template <typename Number>
  static INLINE Packed pack(const Number* from, int64_t, int64_t) {
    return to_float(*from);
  }
  static INLINE Floats multiply_add(Floats sum, Packed number, const Packed* numbers) {
    return sum + number * load<Floats>(numbers);
  }
  static INLINE void pack_weights(Floats weights, int64_t i, Packed* to) { store(to + i, weights); }
};

#ifdef WITH_BF16_PRODUCTS
struct Double {
  typedef uint32_t Packed;  // two numbers in bfloat16
  static constexpr int64_t size = 2;
  static INLINE Packed pack(const BFloat16* from, int64_t stride, int64_t count) {
    return from[0].bits | (count > 1 ? uint32_t(from[stride].bits) << 16 : 0);
  }
  static INLINE Floats multiply_add(Floats sum, Packed pair, const Packed* pairs) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), load<__m512bh>(pairs));
  }
  static INLINE void pack_weights(Floats weights, int64_t i, Packed* to) {
    store((BFloat16*)to + i, _mm512_cvtneps_pbh((__m512)weights));
  }
};
#endif

// 2^x for x <= 0, from its Taylor series around the nearest integer (relative error 2e-7); 0 below -125, NaN for NaN.
INLINE Floats exp2(Floats x) {
  const Ints tiny = x < -125.f;
  x = tiny ? Floats{} : x;
  const Floats round = Floats{} + 12582912.f;  // 1.5 * 2^23: a sum with it has no fraction
  const Floats shifted = x + round, f = x - (shifted - round);
  Floats p = f * 1.5403530393381609e-4f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910071e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.f;
  const Ints power = ((Ints)shifted - (Ints)round) << 23;
  return tiny ? Floats{} : (Floats)((Ints)p + power);
}

INLINE float largest(Floats vector) {
  float most = vector[0];
  for (int64_t i = 1; i < lanes; ++i) most = vector[i] > most ? vector[i] : most;
  return most;
}

INLINE float total(Floats vector) {
  float sum = vector[0];
  for (int64_t i = 1; i < lanes; ++i) sum += vector[i];
  return sum;
}

template <typename Number, typename Steps>
class Head {
  typedef typename Steps::Packed Packed;
  static constexpr int64_t n = rows_at_once;

 public:
  Head(const Job& job, int64_t sample, int64_t head, int64_t rows, float* memory)
      : job_(job), wide_((job.channels + PAD - 1) / PAD * PAD), steps_((job.channels + Steps::size - 1) / Steps::size) {
    const int64_t stride[4] = {at(job.query_stride, sample, head), at(job.key_stride, sample, head),
                               at(job.value_stride, sample, head), at(job.mask_stride, sample, head)};
    query_ = (const Number*)job.query + stride[0];
    key_ = (const Number*)job.key + stride[1];
    value_ = (const Number*)job.value + stride[2];
    mask_ = job.mask ? job.mask + stride[3] : nullptr;
    out_ = (Number*)job.out + (sample * job.queries * job.heads + head) * job.channels;
    const int64_t padded = (rows + n - 1) / n * n;
    scores_ = memory, memory += n * CHUNK;
    weights_ = (Packed*)memory, memory += n * CHUNK;
    keys_ = (Packed*)memory, memory += CHUNK * wide_;
    values_ = (Packed*)memory, memory += CHUNK * wide_;
    queries_ = (Packed*)memory, memory += padded * wide_;
    result_ = memory, memory += padded * wide_;
    most_ = memory, sum_ = memory + padded;
  }

  void attend(int64_t first, int64_t last) {
    const int64_t rows = last - first, padded = (rows + n - 1) / n * n;
    pack_queries(first, rows, padded);
    memset(result_, 0, padded * wide_ * sizeof(float));
    for (int64_t row = 0; row < padded; ++row) most_[row] = start, sum_[row] = 0;
    for (int64_t key = 0; key < job_.keys; key += CHUNK) {
      const int64_t count = job_.keys - key < CHUNK ? job_.keys - key : CHUNK;
      pack_keys(key, count);
      pack_values(key, count);
      for (int64_t row = 0; row < padded; row += n) {
        score(row, count);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t query = first + (row + i < rows ? row + i : rows - 1);
          weigh(row + i, i, mask_ ? mask_ + query * job_.mask_stride[2] + key : nullptr, count);
        }
        add_values(row, count);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      Number* to = out_ + (first + row) * job_.heads * job_.channels;
      const float scale = 1 / sum_[row], *from = result_ + row * wide_;
      for (int64_t c = 0; c < job_.channels; ++c) from_float(from[c] * scale, to + c);
    }
  }

 private:
  const Job& job_;
  const int64_t wide_, steps_;  // channels of a packed row; steps of a product over channels
  const Number *query_, *key_, *value_;
  const uint8_t* mask_;
  Number* out_;
  float *scores_, *result_, *most_, *sum_;        // [n, CHUNK], [rows, wide], [rows], [rows]
  Packed *queries_, *keys_, *values_, *weights_;  // [rows, steps], [keys / PAD, steps, PAD], [keys, wide], [n, keys]

  static int64_t at(const int64_t* stride, int64_t sample, int64_t head) { return sample * stride[0] + head * stride[1]; }

  Packed pack_channels(const Number* token, int64_t step) const {
    return Steps::pack(token + step * Steps::size, 1, job_.channels - step * Steps::size);
  }

  void pack_queries(int64_t first, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < padded; ++row) {
      const Number* token = query_ + (first + (row < rows ? row : rows - 1)) * job_.query_stride[2];
      for (int64_t step = 0; step < steps_; ++step) queries_[row * steps_ + step] = pack_channels(token, step);
    }
  }

  // Blocks of PAD keys; in a block, step by step, the numbers of all its keys side by side.
  void pack_keys(int64_t first, int64_t count) {
    for (int64_t block = 0; block < count; block += PAD) {
      Packed* to = keys_ + block * steps_;
      const int64_t here = count - block < PAD ? count - block : PAD;
      if (here < PAD) memset((void*)to, 0, PAD * steps_ * sizeof(Packed));
      for (int64_t i = 0; i < here; ++i) {
        const Number* token = key_ + (first + block + i) * job_.key_stride[2];
        for (int64_t step = 0; step < steps_; ++step) to[step * PAD + i] = pack_channels(token, step);
      }
    }
  }

  // Rows of channels; a step holds Steps::size values.
  void pack_values(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += Steps::size) {
      const Number* token = value_ + (first + i) * job_.value_stride[2];
      Packed* to = values_ + i / Steps::size * wide_;
      for (int64_t c = 0; c < job_.channels; ++c) to[c] = Steps::pack(token + c, job_.value_stride[2], count - i);
      for (int64_t c = job_.channels; c < wide_; ++c) to[c] = 0;
    }
  }

  // n rows by two vectors of sums over `steps` steps.
  static INLINE void multiply(const Packed* left, int64_t left_stride, const Packed* right, int64_t right_stride,
                              int64_t steps, Floats (&sum)[n][2]) {
    for (int64_t step = 0; step < steps; ++step, right += right_stride) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < n; ++i) {
        sum[i][0] = Steps::multiply_add(sum[i][0], left[i * left_stride + step], right);
        sum[i][1] = Steps::multiply_add(sum[i][1], left[i * left_stride + step], right + lanes);
      }
    }
  }

  void score(int64_t row, int64_t count) {
    for (int64_t key = 0; key < count; key += 2 * lanes) {
      Floats sum[n][2] = {};
      multiply(queries_ + row * steps_, steps_, keys_ + key / PAD * PAD * steps_ + key % PAD, PAD, steps_, sum);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) store(scores_ + i * CHUNK + key + v * lanes, sum[i][v]);
    }
  }

  // Scores to weights; what was summed before is scaled to the new maximum.
  void weigh(int64_t row, int64_t i, const uint8_t* mask, int64_t count) {
    float* scores = scores_ + i * CHUNK;
    Floats most = Floats{} + start;
    const int64_t end = (count + PAD - 1) / PAD * PAD;
    for (int64_t key = count; key < end; ++key) scores[key] = lowest;
    for (int64_t key = 0; key < end; key += lanes) {
      Floats score = load<Floats>(scores + key);
      if (mask) {
        uint8_t part[lanes] = {};
        const bool whole = key + lanes <= count;
        if (!whole && key < count) memcpy(part, mask + key, count - key);
        const Bytes allowed = load<Bytes>(whole ? mask + key : part);
        score = __builtin_convertvector(allowed, Ints) != 0 ? score : Floats{} + lowest;
        store(scores + key, score);
      }
      most = score < most ? most : score;  // NaN stays
    }
    const float before = most_[row], now = largest(most), highest = now < before ? before : now;
    const float to_power = job_.scale * 1.4426950408889634f;  // log2(e)
    Floats sum = {};
    for (int64_t key = 0; key < end; key += lanes) {
      const Floats weight = exp2((load<Floats>(scores + key) - highest) * to_power);
      sum += weight;
      Steps::pack_weights(weight, key, weights_ + i * CHUNK);
    }
    if (highest > before) {
      const float factor = exp2(Floats{} + (before - highest) * to_power)[0];
      sum_[row] *= factor;
      for (int64_t c = 0; c < wide_; c += lanes)
        store(result_ + row * wide_ + c, load<Floats>(result_ + row * wide_ + c) * factor);
    }
    most_[row] = highest;
    sum_[row] += total(sum);
  }

  void add_values(int64_t row, int64_t count) {
    const int64_t steps = (count + Steps::size - 1) / Steps::size;
    for (int64_t c = 0; c < wide_; c += 2 * lanes) {
      Floats sum[n][2];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) sum[i][v] = load<Floats>(result_ + (row + i) * wide_ + c + v * lanes);
      multiply(weights_, CHUNK, values_ + c, wide_, steps, sum);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) store(result_ + (row + i) * wide_ + c + v * lanes, sum[i][v]);
    }
  }
};

}  // namespace

extern "C" void NAME(const Job& job, int64_t sample, int64_t head, int64_t first, int64_t last, float* memory) {
  if (!job.bfloat16) return Head<float, Single>(job, sample, head, last - first, memory).attend(first, last);
#ifdef WITH_BF16_PRODUCTS
  Head<BFloat16, Double>(job, sample, head, last - first, memory).attend(first, last);
#else
  Head<BFloat16, Single>(job, sample, head, last - first, memory).attend(first, last);
#endif
}
