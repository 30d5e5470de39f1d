// Attention of one head without its matrix of scores: a few queries meet a chunk of keys at a time, with a running
// maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
//
// Everything is summed in float32: bfloat16 numbers are made float32 when they are packed.
#include "kernels.h"
#include "simd.h"

namespace {

using themask::Attention;

constexpr int64_t lanes = WIDTH / 4, chunk = Attention::chunk, pad = Attention::pad;
constexpr int64_t rows_at_once = WIDTH == 64 ? 8 : 4;  // by two vectors: as many sums as there are registers for
constexpr float lowest = -3.4028234663852886e38f, start = -1e30f;
using V = Simd<float, lanes>;
using One = Simd<float, 1>;
typedef V::F Floats;
typedef V::I Ints;

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

template <typename Number>
class Head {
  static constexpr int64_t n = rows_at_once;

 public:
  Head(const Attention& job, int64_t sample, int64_t head, int64_t rows, float* memory)
      : job_(job), wide_((job.channels + pad - 1) / pad * pad) {
    query_ = job.query.at<Number>(sample, head);
    key_ = job.key.at<Number>(sample, head);
    value_ = job.value.at<Number>(sample, head);
    mask_ = job.mask.data ? job.mask.at<uint8_t>(sample, head) : nullptr;
    out_ = (Number*)job.out + (sample * job.queries * job.heads + head) * job.channels;
    const int64_t padded = (rows + n - 1) / n * n;
    scores_ = memory, memory += n * chunk;
    weights_ = memory, memory += n * chunk;
    keys_ = memory, memory += chunk * wide_;
    values_ = memory, memory += chunk * wide_;
    queries_ = memory, memory += padded * wide_;
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
  const int64_t wide_;  // channels of a packed row
  const Number *query_, *key_, *value_;
  const uint8_t* mask_;
  Number* out_;
  float *scores_, *result_, *most_, *sum_;       // [n, chunk], [rows, wide], [rows], [rows]
  float *queries_, *keys_;                       // [rows, channels], [keys / pad, channels, pad]
  float *values_, *weights_;                     // [keys, wide], [n, chunk]

  INLINE void pack_channels(const Number* token, float* to, int64_t stride) const {
    for (int64_t c = 0; c < job_.channels; ++c) to[c * stride] = to_float(token[c]);
  }

  void pack_queries(int64_t first, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < padded; ++row) {
      const Number* token = query_ + (first + (row < rows ? row : rows - 1)) * job_.query.stride[2];
      pack_channels(token, queries_ + row * job_.channels, 1);
    }
  }

  // Blocks of pad keys; in a block, channel by channel, the numbers of all its keys side by side.
  void pack_keys(int64_t first, int64_t count) {
    for (int64_t block = 0; block < count; block += pad) {
      float* to = keys_ + block * job_.channels;
      const int64_t here = count - block < pad ? count - block : pad;
      if (here < pad) memset(to, 0, pad * job_.channels * sizeof(float));
      for (int64_t i = 0; i < here; ++i) pack_channels(key_ + (first + block + i) * job_.key.stride[2], to + i, pad);
    }
  }

  void pack_values(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float* to = values_ + i * wide_;
      pack_channels(value_ + (first + i) * job_.value.stride[2], to, 1);
      for (int64_t c = job_.channels; c < wide_; ++c) to[c] = 0;
    }
  }

  // n rows by two vectors of sums over `steps` steps.
  static INLINE void multiply(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                              int64_t steps, Floats (&sum)[n][2]) {
    for (int64_t step = 0; step < steps; ++step, right += right_stride) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < n; ++i) {
        sum[i][0] += left[i * left_stride + step] * V::load(right);
        sum[i][1] += left[i * left_stride + step] * V::load(right + lanes);
      }
    }
  }

  void score(int64_t row, int64_t count) {
    const int64_t channels = job_.channels;
    for (int64_t key = 0; key < count; key += 2 * lanes) {
      Floats sum[n][2] = {};
      multiply(queries_ + row * channels, channels, keys_ + key / pad * pad * channels + key % pad, pad, channels, sum);
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
      V::store(weights_ + i * chunk + key, weight);
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
    for (int64_t c = 0; c < wide_; c += 2 * lanes) {
      Floats sum[n][2];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) sum[i][v] = V::load(result_ + (row + i) * wide_ + c + v * lanes);
      multiply(weights_, chunk, values_ + c, wide_, count, sum);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < 2; ++v) V::store(result_ + (row + i) * wide_ + c + v * lanes, sum[i][v]);
    }
  }
};

}  // namespace

void themask::SET::attend(const Attention& job, int64_t sample, int64_t head, int64_t first, int64_t last,
                          float* memory) {
  if (job.type == Type::bfloat16) {
    Head<BFloat16>(job, sample, head, last - first, memory).attend(first, last);
  } else {
    Head<float>(job, sample, head, last - first, memory).attend(first, last);
  }
}
