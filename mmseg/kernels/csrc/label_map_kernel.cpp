// The best class of every pixel of a tile, by vectors of WIDTH bytes: those of GCC and Clang, so that the same source
// makes SSE2, NEON, AVX2 and AVX-512 code. No templates of others: the linker might keep their wide form for all.
//
// Lanes are columns of the labels. A row of the scores is made as wide as the labels once and serves the next rows of
// the labels, which are sums of whole vectors; the best score so far and its class stay in registers.
#include "label_map.h"

#include <string.h>
#if WIDTH > 16
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline

namespace {

constexpr int64_t lanes = WIDTH / 4;
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(lanes)));

template <typename Vector, typename Number>
INLINE Vector load(const Number* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

// Scores as they lie in memory, and their bits as float32.

INLINE uint32_t bits(uint32_t score) { return score; }

struct BFloat16 {
  uint16_t bits;
};

INLINE uint32_t bits(BFloat16 score) { return uint32_t(score.bits) << 16; }

struct Float16 {
  uint16_t bits;
};

INLINE uint32_t bits(Float16 score) {
  const uint32_t sign = uint32_t(score.bits & 0x8000) << 16, magnitude = uint32_t(score.bits & 0x7fff) << 13;
  const float value = load<float>(&magnitude) * 0x1p112f;  // subnormal numbers too
  return sign | (magnitude < 0x7c00 << 13 ? load<uint32_t>(&value) : magnitude | 0x7f800000);
}

// The score between -1e38 and 1e38, so that no sum overflows; NaN becomes 1e38.
template <typename Score>
INLINE float finite(Score score) {
  const uint32_t magnitude = bits(score) & 0x7fffffff, most = 0x7e967699;
  const uint32_t sign = magnitude > 0x7f800000 ? 0 : bits(score) & 0x80000000;
  const uint32_t result = sign | (magnitude < most ? magnitude : most);
  return load<float>(&result);
}

// A row of the scores as floats: [classes, tile.columns].
template <typename Score>
void read_row(const Job& job, const Tile& tile, int64_t row, float* to) {
  const Score* from = (const Score*)tile.scores + row * job.row_stride + tile.left * job.column_stride;
  for (int64_t k = 0; k < job.classes; ++k, from += job.class_stride, to += tile.columns) {
    if (job.column_stride == 1) {
      if (k + 8 < job.classes) {  // short pieces, far from each other: the processor does not see what comes
        const char *ahead = (const char*)(from + 8 * job.class_stride), *end = ahead + tile.columns * sizeof(Score) + 63;
        for (; ahead < end; ahead += 64) __builtin_prefetch(ahead);
      }
      for (int64_t x = 0; x < tile.columns; ++x) to[x] = finite(from[x]);
    } else {
      for (int64_t x = 0; x < tile.columns; ++x) to[x] = finite(from[x * job.column_stride]);
    }
  }
}

void read_row(const Job& job, const Tile& tile, int64_t row, float* to) {
  if (job.type == Job::float32) read_row<uint32_t>(job, tile, row, to);
  if (job.type == Job::bfloat16) read_row<BFloat16>(job, tile, row, to);
  if (job.type == Job::float16) read_row<Float16>(job, tile, row, to);
}

INLINE Floats pick(const float* from, Ints offsets, [[maybe_unused]] bool near) {
#if WIDTH == 64
  if (near) return (Floats)_mm512_maskz_permutexvar_ps(-1, (__m512i)offsets, _mm512_loadu_ps(from));
#elif WIDTH == 32
  if (near) return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), (__m256i)offsets);
#endif
  Floats picked;
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) picked[l] = from[offsets[l]];
  return picked;
}

// A block of columns of a row, made of T near taps (0: of any): from [classes, tile.columns] to [classes, lanes].
template <int T>
void widen(const Job& job, const Tile& tile, int64_t block, const float* from, float* to) {
  const int64_t start = job.block_start[block], taps = T ? T : job.block_start[block + 1] - start;
  const int32_t *first = job.first + start, *offset = job.offset + start * lanes;
  const float* weight = job.weight + start * lanes;
  from -= tile.left;
  Ints offsets[T + 1];
  Floats weights[T + 1];
  for (int t = 0; t < T; ++t) {
    offsets[t] = load<Ints>(offset + t * lanes);
    weights[t] = load<Floats>(weight + t * lanes);
  }
  for (int64_t k = 0; k < job.classes; ++k, from += tile.columns, to += lanes) {
    Floats sum = {};
    for (int64_t t = 0; t < taps; ++t) {
      if (T) {
        sum += pick(from + first[t], offsets[t], true) * weights[t];
      } else {
        const Floats picked = pick(from + first[t], load<Ints>(offset + t * lanes), job.near[start + t]);
        sum += picked * load<Floats>(weight + t * lanes);
      }
    }
    memcpy(to, &sum, WIDTH);
  }
}

void widen(const Job& job, const Tile& tile, int64_t block, const float* from, float* to) {
  const int64_t start = job.block_start[block], taps = job.block_start[block + 1] - start;
  bool near = true;
  for (int64_t t = 0; t < taps; ++t) near &= job.near[start + t];
  if (near && taps == 2) {
    widen<2>(job, tile, block, from, to);
  } else if (near && taps == 3) {
    widen<3>(job, tile, block, from, to);
  } else {
    widen<0>(job, tile, block, from, to);
  }
}

// The first of the best classes in R rows of a block, each the sum of the same T vectors (0: of `sources` ones) with
// weights [R, T] of its own.
template <int R, int T>
INLINE void choose(int64_t sources, const Row* row, const float* weight, int64_t classes, Ints* best) {
  if (T) sources = T;
  Floats top[R], weights[R][T + 1];
  for (int r = 0; r < R; ++r) {
    top[r] = Floats{} - __builtin_inff();
    best[r] = Ints{};
    for (int s = 0; s < T; ++s) weights[r][s] = Floats{} + weight[r * T + s];
  }
  for (int64_t k = 0; k < classes; ++k) {
    Floats sum[R] = {};
    for (int64_t s = 0; s < sources; ++s) {
      const Floats scores = load<Floats>(row[s].wide + k * lanes);
      for (int r = 0; r < R; ++r) sum[r] += scores * (T ? weights[r][s] : Floats{} + weight[r * sources + s]);
    }
    for (int r = 0; r < R; ++r) {
      const Ints more = sum[r] > top[r];
      top[r] = more ? sum[r] : top[r];
      best[r] = more ? Ints{} + int32_t(k) : best[r];
    }
  }
}

// Labels of a block in the rows y .. y + R - 1.
template <int R>
void label(const Job& job, const Tile& tile, int64_t y, int64_t block, const Row* row) {
  const int64_t start = job.row_start[y], sources = job.row_start[y + 1] - start;
  const float* weight = job.row_weight + start;  // those of R rows follow each other
  Ints best[R];
  if (sources == 2) {
    choose<R, 2>(sources, row, weight, job.classes, best);
  } else if (sources == 3) {
    choose<R, 3>(sources, row, weight, job.classes, best);
  } else {
    choose<R, 0>(sources, row, weight, job.classes, best);
  }
  const int64_t x = block * lanes;
  for (int r = 0; r < R; ++r) {
    const Bytes labels = __builtin_convertvector(best[r], Bytes);
    uint8_t* to = tile.labels + (y + r) * job.width + x;
    if (job.width - x >= lanes) {
      memcpy(to, &labels, lanes);  // of a size that is known: no call
    } else {
      memcpy(to, &labels, job.width - x);
    }
  }
}

// How many rows from y on are made of the same rows of the scores: 1, 2 or 4.
int64_t equal_rows(const Job& job, int64_t y, int64_t end) {
  const int32_t* source = job.row_source + job.row_start[y];
  const int64_t sources = job.row_start[y + 1] - job.row_start[y];
  int64_t equal = 1;
  for (; equal < 4 && y + equal < end; ++equal) {
    const int32_t* start = job.row_start + y + equal;
    if (start[1] - start[0] != sources || memcmp(source, job.row_source + start[0], sources * sizeof *source)) break;
  }
  return equal == 3 ? 2 : equal;
}

}  // namespace

#define NAME_(width) themask_label_tile_##width
#define NAME(width) NAME_(width)

void NAME(WIDTH)(const Job& job, const Tile& tile, float* memory, Row* row) {
  const int64_t wide_size = (tile.end_block - tile.block) * job.classes * lanes;
  const int64_t narrow_size = job.classes * tile.columns;
  float* const narrow = memory + job.most_rows * wide_size;
  for (int64_t i = 0; i < job.most_rows; ++i) row[i].held = -1;
  for (int64_t y = tile.row, rows; y < tile.end_row; y += rows) {
    rows = equal_rows(job, y, tile.end_row);
    const int32_t* source = job.row_source + job.row_start[y];
    const int64_t sources = job.row_start[y + 1] - job.row_start[y];
    const auto needed = [&](int64_t held) {
      for (int64_t s = 0; s < sources; ++s) {
        if (source[s] == held) return true;
      }
      return false;
    };
    for (int64_t s = 0; s < sources; ++s) {
      int64_t at = 0;
      while (at < job.most_rows && row[at].held != source[s]) ++at;
      row[s].fresh = at == job.most_rows;
      if (row[s].fresh) {
        for (at = 0; needed(row[at].held);) ++at;
        row[at].held = source[s];
        read_row(job, tile, source[s], narrow + s * narrow_size);
      }
      row[s].wide = memory + at * wide_size;
    }
    for (int64_t block = tile.block; block < tile.end_block; ++block) {
      for (int64_t s = 0; s < sources; ++s) {
        if (row[s].fresh) widen(job, tile, block, narrow + s * narrow_size, row[s].wide);
      }
      auto* form = rows == 4 ? label<4> : rows == 2 ? label<2> : label<1>;
      form(job, tile, y, block, row);
      for (int64_t s = 0; s < sources; ++s) row[s].wide += job.classes * lanes;
    }
  }
}
