// Attention of one head without its matrix of scores: a few queries meet a chunk of keys at a time, with a running
// maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
//
// Everything is summed in float32. With AVX512_BF16 bfloat16 numbers are multiplied as they are, two at a time in each
// lane; else they are made float32 when they are packed.
#include "kernels.h"
#include "simd.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using themask::Attention;

constexpr int64_t lanes = WIDTH / 4, chunk = Attention::chunk, pad = Attention::pad;
constexpr int64_t rows_at_once = WIDTH == 64 ? 8 : 4;  // by two vectors: as many sums as there are registers for
constexpr float lowest = -3.4028234663852886e38f, start = -1e30f;
using V = Simd<float, lanes>;
using One = Simd<float, 1>;
typedef V::F Floats;
typedef V::I Ints;

// How numbers are packed. Step i of a product takes the numbers i * Steps::size.. of both sides.
struct Single {
  typedef float Packed;  // one number
  static constexpr int64_t size = 1;
  template <typename Number>
  static INLINE Packed pack(const Number* from) {
    return to_float(*from);
  }
  template <typename Number>
  static INLINE Packed pack(const Number* from, int64_t, int64_t) {
    return pack(from);
  }
  static INLINE Floats multiply_add(Floats sum, Packed number, const Packed* numbers) {
    return sum + number * V::load(numbers);
  }
  static INLINE void pack_weights(Floats weights, int64_t i, Packed* to) { V::store(to + i, weights); }
};

#ifdef __AVX512BF16__
struct Double {
  typedef uint32_t Packed;  // two numbers in bfloat16
  static constexpr int64_t size = 2;
  static INLINE Packed pack(const BFloat16* from) {
    Packed pair;
    memcpy(&pair, from, sizeof pair);
    return pair;
  }
  static INLINE Packed pack(const BFloat16* from, int64_t stride, int64_t count) {
    return from[0].bits | (count > 1 ? uint32_t(from[stride].bits) << 16 : 0);
  }
  static INLINE Floats multiply_add(Floats sum, Packed pair, const Packed* pairs) {
    __m512bh right;
    memcpy(&right, pairs, sizeof right);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), right);
  }
  static INLINE void pack_weights(Floats weights, int64_t i, Packed* to) {
    const __m256bh low = _mm512_cvtneps_pbh((__m512)weights);
    memcpy((BFloat16*)to + i, &low, sizeof low);
  }
};
#endif

// 2^x for x <= 0, from its Taylor series around the nearest integer (relative error 2e-7); 0 below -125, NaN for NaN.
INLINE Floats exp2(Floats x) {
  const Ints tiny = x < -125.f;
  x = tiny ? Floats{} : x;
  const Floats round = V::set(12582912.f);  // 1.5 * 2^23: a sum with it has no fraction
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

template <typename Number, typename Steps>
class Head {
  typedef typename Steps::Packed Packed;
  static constexpr int64_t n = rows_at_once;

 public:
  Head(const Attention& job, int64_t sample, int64_t head, int64_t rows, float* memory)
      : job_(job), wide_((job.channels + pad - 1) / pad * pad), steps_((job.channels + Steps::size - 1) / Steps::size) {
    query_ = job.query.at<Number>(sample, head);
    key_ = job.key.at<Number>(sample, head);
    value_ = job.value.at<Number>(sample, head);
    mask_ = job.mask.data ? job.mask.at<uint8_t>(sample, head) : nullptr;
    out_ = (Number*)job.out + (sample * job.queries * job.heads + head) * job.channels;
    const int64_t padded = (rows + n - 1) / n * n;
    scores_ = memory, memory += n * chunk;
    weights_ = (Packed*)memory, memory += n * chunk;
    keys_ = (Packed*)memory, memory += chunk * wide_;
    values_ = (Packed*)memory, memory += chunk * wide_;
    queries_ = (Packed*)memory, memory += padded * wide_;
    result_ = memory, memory += padded * wide_;
    most_ = memory, sum_ = memory + padded;
  }

  void attend(int64_t first, int64_t last) {
    const int64_t rows = last - first, padded = (rows + n - 1) / n * n;
    pack_queries(first, rows, padded);
    memset(result_, 0, padded * wide_ * sizeof(float));
    for (int64_t row = 0; row < padded; ++row) most_[row] = start, sum_[row] = 0;
    for (int64_t key = 0; key < job_.keys; key += chunk) {
      const int64_t count = job_.keys - key < chunk ? job_.keys - key : chunk;
      pack_keys(key, count);
      pack_values(key, count);
      for (int64_t row = 0; row < padded; row += n) {
        score(row, count);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t query = first + (row + i < rows ? row + i : rows - 1);
          weigh(row + i, i, mask_ ? mask_ + query * job_.mask.stride[2] + key : nullptr, count);
        }
        add_values(row, count);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      Number* to = out_ + (first + row) * job_.heads * job_.channels;
      const float scale = 1 / sum_[row], *from = result_ + row * wide_;
      for (int64_t c = 0; c < job_.channels; ++c) One::store(to + c, One::set(from[c] * scale));
    }
  }

 private:
  const Attention& job_;
  const int64_t wide_, steps_;  // channels of a packed row; steps of a product over channels
  const Number *query_, *key_, *value_;
  const uint8_t* mask_;
  Number* out_;
  float *scores_, *result_, *most_, *sum_;        // [n, chunk], [rows, wide], [rows], [rows]
  Packed *queries_, *keys_, *values_, *weights_;  // [rows, steps], [keys / pad, steps, pad], [keys, wide], [n, keys]

  void pack_channels(const Number* token, Packed* to, int64_t stride) const {
    const int64_t whole = job_.channels / Steps::size;
    for (int64_t step = 0; step < whole; ++step) to[step * stride] = Steps::pack(token + step * Steps::size);
    if (whole < steps_) to[whole * stride] = Steps::pack(token + whole * Steps::size, 1, 1);
  }

  void pack_queries(int64_t first, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < padded; ++row) {
      const Number* token = query_ + (first + (row < rows ? row : rows - 1)) * job_.query.stride[2];
      pack_channels(token, queries_ + row * steps_, 1);
    }
  }

  // Blocks of pad keys; in a block, step by step, the numbers of all its keys side by side.
  void pack_keys(int64_t first, int64_t count) {
    for (int64_t block = 0; block < count; block += pad) {
      Packed* to = keys_ + block * steps_;
      const int64_t here = count - block < pad ? count - block : pad;
      if (here < pad) memset((void*)to, 0, pad * steps_ * sizeof(Packed));
      for (int64_t i = 0; i < here; ++i)
        pack_channels(key_ + (first + block + i) * job_.key.stride[2], to + i, pad);
    }
  }

  // Rows of channels; a step holds Steps::size values.
  void pack_values(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += Steps::size) {
      const Number* token = value_ + (first + i) * job_.value.stride[2];
      Packed* to = values_ + i / Steps::size * wide_;
      for (int64_t c = 0; c < job_.channels; ++c) to[c] = Steps::pack(token + c, job_.value.stride[2], count - i);
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
      multiply(queries_ + row * steps_, steps_, keys_ + key / pad * pad * steps_ + key % pad, pad, steps_, sum);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) V::store(scores_ + i * chunk + key + v * lanes, sum[i][v]);
    }
  }

  // Scores to weights; what was summed before is scaled to the new maximum.
  void weigh(int64_t row, int64_t i, const uint8_t* mask, int64_t count) {
    float* scores = scores_ + i * chunk;
    Floats most = V::set(start);
    const int64_t end = (count + pad - 1) / pad * pad;
    for (int64_t key = count; key < end; ++key) scores[key] = lowest;
    for (int64_t key = 0; key < end; key += lanes) {
      Floats score = V::load(scores + key);
      if (mask) {
        const uint8_t* allowed = mask + key;
        uint8_t part[lanes];
        if (key + lanes > count) {  // nothing behind the last key is read
          memset(part, 0, lanes);
          if (key < count) memcpy(part, allowed, count - key);
          allowed = part;
        }
        score = V::load(allowed) != 0 ? score : V::set(lowest);
        V::store(scores + key, score);
      }
      most = score < most ? most : score;
    }
    const float before = most_[row], now = V::max(most), highest = now < before ? before : now;
    const float to_power = job_.scale * 1.4426950408889634f;  // log2(e)
    Floats sum = {};
    for (int64_t key = 0; key < end; key += lanes) {
      const Floats weight = exp2((V::load(scores + key) - highest) * to_power);
      sum += weight;
      Steps::pack_weights(weight, key, weights_ + i * chunk);
    }
    if (highest > before) {
      const float factor = exp2(Floats{} + (before - highest) * to_power)[0];
      sum_[row] *= factor;
      for (int64_t c = 0; c < wide_; c += lanes)
        V::store(result_ + row * wide_ + c, V::load(result_ + row * wide_ + c) * factor);
    }
    most_[row] = highest;
    sum_[row] += V::sum(sum);
  }

  void add_values(int64_t row, int64_t count) {
    const int64_t steps = (count + Steps::size - 1) / Steps::size;
    for (int64_t c = 0; c < wide_; c += 2 * lanes) {
      Floats sum[n][2];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) sum[i][v] = V::load(result_ + (row + i) * wide_ + c + v * lanes);
      multiply(weights_, chunk, values_ + c, wide_, steps, sum);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) V::store(result_ + (row + i) * wide_ + c + v * lanes, sum[i][v]);
    }
  }
};

}  // namespace

void themask::SET::attend(const Attention& job, int64_t sample, int64_t head, int64_t first, int64_t last,
                          float* memory) {
#ifdef __AVX512BF16__
  using Low = Double;
#else
  using Low = Single;
#endif
  if (job.type == Type::bfloat16) {
    Head<BFloat16, Low>(job, sample, head, last - first, memory).attend(first, last);
  } else {
    Head<float, Single>(job, sample, head, last - first, memory).attend(first, last);
  }
}
