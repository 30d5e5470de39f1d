// The best class of every pixel of a tile.
//
// Lanes are columns of the labels. A row of the scores is made as wide as the labels once and serves the next rows of
// the labels, which are sums of whole vectors; the best score so far and its class stay in registers.
#include "kernels.h"
#include "simd.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using themask::LabelMap;
using themask::Row;
using themask::Tile;
using themask::Type;

constexpr int64_t lanes = WIDTH / 4;
constexpr float limit = 1e38f;  // that of label_map.py: no sum overflows
using V = Simd<float, lanes>;
typedef V::F Floats;
typedef V::I Ints;

// The score between -limit and limit; NaN becomes the limit.
template <class Score>
INLINE float finite(Score score) {
  float value = to_float(score);
  value = value <= limit ? value : limit;
  return value < -limit ? -limit : value;
}

// A row of the scores as floats: [classes, tile.columns].
template <class Score>
void read_row(const LabelMap& map, const Tile& tile, int64_t row, float* to) {
  const Score* from = (const Score*)tile.scores + row * map.row_stride + tile.left * map.column_stride;
  for (int64_t k = 0; k < map.classes; ++k, from += map.class_stride, to += tile.columns) {
    if (map.column_stride == 1) {
      if (k + 8 < map.classes) {  // short pieces, far from each other: the processor does not see what comes
        const char* ahead = (const char*)(from + 8 * map.class_stride);
        for (const char* end = ahead + tile.columns * sizeof(Score) + 63; ahead < end; ahead += 64)
          __builtin_prefetch(ahead);
      }
      for (int64_t x = 0; x < tile.columns; ++x) to[x] = finite(from[x]);
    } else {
      for (int64_t x = 0; x < tile.columns; ++x) to[x] = finite(from[x * map.column_stride]);
    }
  }
}

INLINE Floats pick(const float* from, Ints offsets, [[maybe_unused]] bool near) {
#ifdef __AVX512F__
  if (near) return (Floats)_mm512_maskz_permutexvar_ps(-1, (__m512i)offsets, _mm512_loadu_ps(from));
#elif defined(__AVX2__)
  if (near) return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), (__m256i)offsets);
#endif
  Floats picked;
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) picked[l] = from[offsets[l]];
  return picked;
}

// A block of columns of a row, made of T near taps (0: of any): from [classes, tile.columns] to [classes, lanes].
template <int T>
void widen(const LabelMap& map, const Tile& tile, int64_t block, const float* from, float* to) {
  const int64_t start = map.block_start[block], taps = T ? T : map.block_start[block + 1] - start;
  const int32_t *first = map.first + start, *offset = map.offset + start * lanes;
  const float* weight = map.weight + start * lanes;
  from -= tile.left;
  Ints offsets[T + 1];
  Floats weights[T + 1];
  for (int t = 0; t < T; ++t) {
    offsets[t] = V::load(offset + t * lanes);
    weights[t] = V::load(weight + t * lanes);
  }
  for (int64_t k = 0; k < map.classes; ++k, from += tile.columns, to += lanes) {
    Floats sum = {};
    for (int64_t t = 0; t < taps; ++t) {
      if (T) {
        sum += pick(from + first[t], offsets[t], true) * weights[t];
      } else {
        const Floats picked = pick(from + first[t], V::load(offset + t * lanes), map.near[start + t]);
        sum += picked * V::load(weight + t * lanes);
      }
    }
    V::store(to, sum);
  }
}

void widen(const LabelMap& map, const Tile& tile, int64_t block, const float* from, float* to) {
  const int64_t start = map.block_start[block], taps = map.block_start[block + 1] - start;
  bool near = true;
  for (int64_t t = 0; t < taps; ++t) near &= map.near[start + t];
  if (near && taps == 2) {
    widen<2>(map, tile, block, from, to);
  } else if (near && taps == 3) {
    widen<3>(map, tile, block, from, to);
  } else {
    widen<0>(map, tile, block, from, to);
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
      const Floats scores = V::load(row[s].wide + k * lanes);
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
void label(const LabelMap& map, const Tile& tile, int64_t y, int64_t block, const Row* row) {
  const int64_t start = map.row_start[y], sources = map.row_start[y + 1] - start;
  const float* weight = map.row_weight + start;  // those of R rows follow each other
  Ints best[R];
  if (sources == 2) {
    choose<R, 2>(sources, row, weight, map.classes, best);
  } else if (sources == 3) {
    choose<R, 3>(sources, row, weight, map.classes, best);
  } else {
    choose<R, 0>(sources, row, weight, map.classes, best);
  }
  const int64_t x = block * lanes;
  for (int r = 0; r < R; ++r) {
    V::store(tile.labels + (y + r) * map.width + x, best[r], map.width - x);
  }
}

// How many rows from y on are made of the same rows of the scores: 1, 2 or 4.
int64_t equal_rows(const LabelMap& map, int64_t y, int64_t end) {
  const int32_t* source = map.row_source + map.row_start[y];
  const int64_t sources = map.row_start[y + 1] - map.row_start[y];
  int64_t equal = 1;
  for (; equal < 4 && y + equal < end; ++equal) {
    const int32_t* start = map.row_start + y + equal;
    if (start[1] - start[0] != sources || memcmp(source, map.row_source + start[0], sources * sizeof *source)) break;
  }
  return equal == 3 ? 2 : equal;
}

}  // namespace

void themask::SET::label_tile(const LabelMap& map, const Tile& tile, float* memory, Row* row) {
  const int64_t wide_size = (tile.end_block - tile.block) * map.classes * lanes;
  const int64_t narrow_size = map.classes * tile.columns;
  float* const narrow = memory + map.most_rows * wide_size;
  for (int64_t i = 0; i < map.most_rows; ++i) row[i].held = -1;
  for (int64_t y = tile.row, rows; y < tile.end_row; y += rows) {
    rows = equal_rows(map, y, tile.end_row);
    const int32_t* source = map.row_source + map.row_start[y];
    const int64_t sources = map.row_start[y + 1] - map.row_start[y];
    const auto needed = [&](int64_t held) {
      for (int64_t s = 0; s < sources; ++s) {
        if (source[s] == held) return true;
      }
      return false;
    };
    for (int64_t s = 0; s < sources; ++s) {
      int64_t at = 0;
      while (at < map.most_rows && row[at].held != source[s]) ++at;
      row[s].fresh = at == map.most_rows;
      if (row[s].fresh) {
        for (at = 0; needed(row[at].held);) ++at;
        row[at].held = source[s];
        (map.type == Type::full ? read_row<float> : read_row<BFloat16>)(map, tile, source[s], narrow + s * narrow_size);
      }
      row[s].wide = memory + at * wide_size;
    }
    for (int64_t block = tile.block; block < tile.end_block; ++block) {
      for (int64_t s = 0; s < sources; ++s) {
        if (row[s].fresh) widen(map, tile, block, narrow + s * narrow_size, row[s].wide);
      }
      auto* form = rows == 4 ? label<4> : rows == 2 ? label<2> : label<1>;
      form(map, tile, y, block, row);
      for (int64_t s = 0; s < sources; ++s) row[s].wide += map.classes * lanes;
    }
  }
}
