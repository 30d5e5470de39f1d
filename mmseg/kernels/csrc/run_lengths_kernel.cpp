// How long ground truth and prediction of every pixel have stayed the same, and how many pixels have for long enough.
//
// Run lengths are kept bit-sliced (Biham, FSE 1997): plane p holds bit p of the lengths of 8 WIDTH pixels, a vector, so
// that adding one, setting back to zero and comparing are a few bitwise steps for all of them, and any length fits
// without a wider type. Lengths stop at the largest number that the planes hold.
#include "kernels.h"
#include "simd.h"

namespace {

typedef uint8_t Bits __attribute__((vector_size(WIDTH)));
constexpr int64_t pixels = 8 * WIDTH;

// Bit j of byte i tells whether pixel j * WIDTH + i is the same in both frames.
INLINE Bits same(const uint8_t* now, const uint8_t* before) {
  Bits bits = {};
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const uint8_t bit = uint8_t(1 << j);
    bits |= (Bits)(read<Bits>(now + j * WIDTH) == read<Bits>(before + j * WIDTH)) & bit;
  }
  return bits;
}

// Runs where `grow` is set become longer by one, the others zero.
INLINE void extend(uint8_t* runs, int64_t planes, Bits grow) {
  Bits full = ~Bits{};
  for (int64_t p = 0; p < planes; ++p) full &= read<Bits>(runs + p * WIDTH);
  Bits carry = ~full;
  for (int64_t p = 0; p < planes; ++p) {
    const Bits bit = read<Bits>(runs + p * WIDTH), sum = (bit ^ carry) & grow;
    memcpy(runs + p * WIDTH, &sum, WIDTH);
    carry &= bit;
  }
}

INLINE int64_t count_at_least(const uint8_t* runs, int64_t planes, int64_t length) {
  Bits enough = ~Bits{};
  for (int64_t p = 0; p < planes; ++p) {
    const Bits bit = read<Bits>(runs + p * WIDTH);
    enough = length >> p & 1 ? enough & bit : enough | bit;
  }
  uint64_t words[WIDTH / 8];
  memcpy(words, &enough, WIDTH);
  int64_t count = 0;
#pragma GCC unroll 8
  for (int w = 0; w < WIDTH / 8; ++w) count += __builtin_popcountll(words[w]);
  return count;
}

INLINE void extend_frame(const uint8_t* const frames[4], int64_t size, uint8_t* runs, int64_t planes,
                         const int64_t* lengths, int64_t number, int64_t* counts) {
  uint8_t rest[4][pixels];
  for (int64_t at = 0; at < size; at += pixels, runs += 2 * planes * WIDTH) {
    const uint8_t* here[4];
    for (int i = 0; i < 4; ++i) {
      here[i] = frames[i] + at;
      if (at + pixels <= size) continue;
      memset(rest[i], i % 2, pixels);  // beyond the last pixel no two frames are the same
      memcpy(rest[i], here[i], size - at);
      here[i] = rest[i];
    }
    const Bits gt = same(here[0], here[1]), both = gt & same(here[2], here[3]);
    extend(runs, planes, gt);
    extend(runs + planes * WIDTH, planes, both);
    for (int64_t i = 0; i < number; ++i) {
      counts[2 * i] += count_at_least(runs + planes * WIDTH, planes, lengths[i]);
      counts[2 * i + 1] += count_at_least(runs, planes, lengths[i]);
    }
  }
}

}  // namespace

void themask::SET::extend_runs(const uint8_t* const frames[4], int64_t size, uint8_t* runs, int64_t planes,
                               const int64_t* lengths, int64_t number, int64_t* counts) {
  if (planes == 4) {  // windows up to 16 frames, as usual: the loops over planes unroll
    extend_frame(frames, size, runs, 4, lengths, number, counts);
  } else {
    extend_frame(frames, size, runs, planes, lengths, number, counts);
  }
}
