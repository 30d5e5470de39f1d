// How long ground truth and prediction of every pixel have stayed the same, and how many pixels have for long enough.
//
// Run lengths are kept bit-sliced (Biham, FSE 1997): plane p holds bit p of the lengths of 8 W pixels, a vector of W
// bytes, so that adding one, setting back to zero and comparing are a few bitwise steps for all of them, and any length
// fits without a wider type. Lengths stop at the largest number that the planes hold. Vectors are those of GCC and
// Clang: the same source makes SSE2, NEON, AVX2 and AVX-512 code.
#include <stdint.h>
#include <string.h>

namespace {

#define INLINE __attribute__((always_inline)) inline  // else the code of one instruction set is shared with another

template <int W>
struct Runs {
  typedef uint8_t Bits __attribute__((vector_size(W)));
  static constexpr int pixels = 8 * W;

  static INLINE Bits load(const uint8_t* from) {
    Bits bits;
    memcpy(&bits, from, W);
    return bits;
  }

  // Bit j of byte i tells whether pixel j * W + i is the same in both frames.
  static INLINE Bits same(const uint8_t* now, const uint8_t* before) {
    Bits bits = {};
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const uint8_t bit = uint8_t(1 << j);
      bits |= (Bits)(load(now + j * W) == load(before + j * W)) & bit;
    }
    return bits;
  }

  // Runs where `grow` is set become longer by one, the others zero.
  static INLINE void extend(uint8_t* runs, int planes, Bits grow) {
    Bits full = ~Bits{};
    for (int p = 0; p < planes; ++p) full &= load(runs + p * W);
    Bits carry = ~full;
    for (int p = 0; p < planes; ++p) {
      const Bits bit = load(runs + p * W), sum = (bit ^ carry) & grow;
      memcpy(runs + p * W, &sum, W);
      carry &= bit;
    }
  }

  static INLINE int64_t count_at_least(const uint8_t* runs, int planes, int64_t length) {
    Bits enough = ~Bits{};
    for (int p = 0; p < planes; ++p) {
      const Bits bit = load(runs + p * W);
      enough = length >> p & 1 ? enough & bit : enough | bit;
    }
    uint64_t words[W / 8];
    memcpy(words, &enough, W);
    int64_t count = 0;
#pragma GCC unroll 8
    for (int w = 0; w < W / 8; ++w) count += __builtin_popcountll(words[w]);
    return count;
  }

  static INLINE void block(const uint8_t* const frames[4], uint8_t* runs, int planes, const int64_t* lengths,
                           int number, int64_t* counts) {
    const Bits gt = same(frames[0], frames[1]);
    const Bits both = gt & same(frames[2], frames[3]);
    extend(runs, planes, gt);
    extend(runs + planes * W, planes, both);
    for (int i = 0; i < number; ++i) {
      counts[2 * i] += count_at_least(runs + planes * W, planes, lengths[i]);
      counts[2 * i + 1] += count_at_least(runs, planes, lengths[i]);
    }
  }

  static INLINE void frame(const uint8_t* const frames[4], int64_t size, uint8_t* runs, int planes,
                           const int64_t* lengths, int number, int64_t* counts) {
    int64_t at = 0;
    for (; at + pixels <= size; at += pixels, runs += 2 * planes * W) {
      const uint8_t* const here[4] = {frames[0] + at, frames[1] + at, frames[2] + at, frames[3] + at};
      block(here, runs, planes, lengths, number, counts);
    }
    if (at == size) return;
    uint8_t rest[4][pixels];
    for (int i = 0; i < 4; ++i) {
      memset(rest[i], i % 2, pixels);  // beyond the last pixel no two frames are the same
      memcpy(rest[i], frames[i] + at, size - at);
    }
    const uint8_t* const here[4] = {rest[0], rest[1], rest[2], rest[3]};
    block(here, runs, planes, lengths, number, counts);
  }
};

#define FRAME(name, width)                                                                                   \
  void name(const uint8_t* const frames[4], int64_t size, uint8_t* runs, int planes, const int64_t* lengths, \
            int number, int64_t* counts) {                                                                   \
    if (planes == 4) { /* windows up to 16 frames, as usual: the loops over planes unroll */                 \
      Runs<width>::frame(frames, size, runs, 4, lengths, number, counts);                                    \
    } else {                                                                                                 \
      Runs<width>::frame(frames, size, runs, planes, lengths, number, counts);                               \
    }                                                                                                        \
  }

FRAME(frame_16, 16)
#ifdef __x86_64__
__attribute__((target("avx2,popcnt"))) FRAME(frame_32, 32)
__attribute__((target("avx512f,avx512bw,popcnt"))) FRAME(frame_64, 64)
#endif

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bytes of the widest vector that this processor works on here: 16, 32 or 64.
EXPORT int themask_widest_vector() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return 32;
#endif
  return 16;
}

// Takes one more frame.
//   width       vector width in bytes, at most the widest, the same for all frames of a video
//   size        pixels of a frame
//   runs        2 * planes * 64 bytes for every 512 pixels begun; zeros before the second frame
//   planes      bits of the largest of `lengths`
//   lengths     [number] run lengths to count, at least 1: frames of a window minus 1
//   counts      [number, 2], added to: pixels whose run is long enough in both maps, and in the ground truth
EXPORT void themask_extend_runs([[maybe_unused]] int width, const uint8_t* gt, const uint8_t* gt_before,
                                const uint8_t* pred, const uint8_t* pred_before, int64_t size, uint8_t* runs,
                                int planes, const int64_t* lengths, int number, int64_t* counts) {
  const uint8_t* const frames[4] = {gt, gt_before, pred, pred_before};
  auto* frame = frame_16;
#ifdef __x86_64__
  if (width == 32) frame = frame_32;
  if (width == 64) frame = frame_64;
#endif
  frame(frames, size, runs, planes, lengths, number, counts);
}
