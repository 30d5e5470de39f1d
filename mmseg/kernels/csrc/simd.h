// A vector of W numbers, from the compiler's own vector types (GCC and Clang): the same source makes SSE2, NEON, AVX2
// or AVX-512 code by the flags it is compiled with, and a width the machine lacks is made of narrower steps.
//
// Everything is in an unnamed namespace, and nothing here uses the C++ library's templates: a function that two
// translation units of different flags share by name could be linked in its AVX-512 form into the portable code.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>  // of both only types

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define THEMASK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef THEMASK_SHUFFLE  // GCC before 12
#define THEMASK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

#define INLINE __attribute__((always_inline)) inline

namespace {

template <class V>
INLINE V read(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;  // the upper half of a float's
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return read<float>(&bits);
}

template <class T, int W>
struct Simd {
  static constexpr int width = W;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T F __attribute__((vector_size(W * sizeof(T))));
  typedef Int I __attribute__((vector_size(W * sizeof(T))));
  struct Pair {
    F a, b;
  };
  using Half = Simd<T, (W > 1 ? W / 2 : 1)>;

  static F load(const T* p) { return read<F>(p); }
  static I load(const Int* p) { return read<I>(p); }
  static F load(const BFloat16* p) {
    return __builtin_convertvector((Floats)(__builtin_convertvector(read<Shorts>(p), Words) << 16), F);
  }
  // In two steps: GCC makes one by one what is four times as wide at once.
  static I load(const uint8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(read<Bytes>(p), Shorts), I);
  }
  static void store(T* p, F v) { memcpy(p, &v, sizeof v); }
  static void store(Int* p, I v) { memcpy(p, &v, sizeof v); }
  // Rounds to nearest, ties to even. NaN stays NaN, where rounding might carry its bits into another number.
  static void store(BFloat16* p, F v) {
    const Floats f = __builtin_convertvector(v, Floats);
    const Words word = (Words)f, rounded = word + 0x7fff + ((word >> 16) & 1), nan = word | 0x400000;
    const Shorts s = __builtin_convertvector((f == f ? rounded : nan) >> 16, Shorts);
    memcpy(p, &s, sizeof s);
  }
  // The first n lanes only.
  static void store(T* p, F v, int64_t n) {
    if (n >= W) return store(p, v);
    if constexpr (W > 1) {
      if (n <= 0) return;
      const auto [low, high] = halves(v);
      Half::store(p, low, n);
      Half::store(p + W / 2, high, n - W / 2);
    }
  }
  static void store(uint8_t* p, I v, int64_t n) {
    const Bytes s = __builtin_convertvector(v, Bytes);
    if (n >= W) {
      memcpy(p, &s, W);  // of a size that is known: no call
    } else {
      memcpy(p, &s, n);
    }
  }
  static F set(T x) { return F{} + x; }
  static F to_float(I v) { return __builtin_convertvector(v, F); }

  // Only for values that fit.
  static I floor(F x) {
    I i = __builtin_convertvector(x, I);
    return i + (I)(to_float(i) > x);  // a true comparison is -1
  }

  // (x0 y0 x1 ..), (.. yn) -> (x0 x1 ..), (y0 y1 ..), and back.
  static Pair deinterleave(F a, F b) { return deinterleave(a, b, std::make_integer_sequence<int, W>()); }
  static Pair interleave(F a, F b) { return interleave(a, b, std::make_integer_sequence<int, W>()); }

  static T max(F v) {
    if constexpr (W == 1) {
      return v[0];
    } else {
      const auto [low, high] = halves(v);
      return Half::max(low > high ? low : high);
    }
  }
  // The sums of four vectors, one store of four numbers: to[i] += sum of the i-th.
  static void add_sums(T* to, F a, F b, F c, F d) {
    if constexpr (W > 4) {
      Half::add_sums(to, folded(a), folded(b), folded(c), folded(d));
    } else if constexpr (W == 4) {
      F ab = THEMASK_SHUFFLE(a, b, 0, 4, 1, 5) + THEMASK_SHUFFLE(a, b, 2, 6, 3, 7);
      F cd = THEMASK_SHUFFLE(c, d, 0, 4, 1, 5) + THEMASK_SHUFFLE(c, d, 2, 6, 3, 7);
      store(to, load(to) + THEMASK_SHUFFLE(ab, cd, 0, 1, 4, 5) + THEMASK_SHUFFLE(ab, cd, 2, 3, 6, 7));
    } else {
      to[0] += sum(a), to[1] += sum(b), to[2] += sum(c), to[3] += sum(d);
    }
  }
  static T sum(F v) {
    if constexpr (W == 1)
      return v[0];
    else
      return Half::sum(folded(v));
  }

  // e^x for x <= 0 (0 below float's normal range); NaN stays NaN.
  static F exp(F x) {
    if constexpr (sizeof(T) == 8) {
      F r;
      for (int i = 0; i < W; ++i) r[i] = ::exp(x[i]);
      return r;
    } else {
      // x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer that stands in the low bits, which
      // needs no conversion (undefined for NaN). Taylor to r^7 leaves 6e-9.
      const F magic = set(12582912.0f);
      F clamped = x < -87.0f ? set(-87.0f) : x;
      F t = clamped * 1.44269504088896341f + magic;
      F n = t - magic;
      F r = clamped - n * 0.693359375f;
      r = r - n * -2.12194440e-4f;
      F p = set(1.0f / 5040);
      p = p * r + 1.0f / 720;
      p = p * r + 1.0f / 120;
      p = p * r + 1.0f / 24;
      p = p * r + 1.0f / 6;
      p = p * r + 0.5f;
      p = p * r + 1.0f;
      p = p * r + 1.0f;
      I bits = (I)t - (I)magic;
      F scale = (F)((bits + 127) << 23);
      return x < -87.0f ? F{} : p * scale;
    }
  }

 private:
  template <class N>
  struct Vector {
    typedef N type __attribute__((vector_size(W * sizeof(N))));
  };
  using Floats = typename Vector<float>::type;
  using Words = typename Vector<uint32_t>::type;
  using Shorts = typename Vector<uint16_t>::type;
  using Bytes = typename Vector<uint8_t>::type;

  struct Halves {
    typename Half::F low, high;
  };
  static Halves halves(F v) { return read<Halves>(&v); }
  static typename Half::F folded(F v) {
    const auto [low, high] = halves(v);
    return low + high;
  }

  template <int... K>
  static Pair deinterleave(F a, F b, std::integer_sequence<int, K...>) {
    return {THEMASK_SHUFFLE(a, b, (2 * K)...), THEMASK_SHUFFLE(a, b, (2 * K + 1)...)};
  }
  template <int... K>
  static Pair interleave(F a, F b, std::integer_sequence<int, K...>) {
    return {THEMASK_SHUFFLE(a, b, (K / 2 + K % 2 * W)...), THEMASK_SHUFFLE(a, b, (W / 2 + K / 2 + K % 2 * W)...)};
  }
};

}  // namespace
