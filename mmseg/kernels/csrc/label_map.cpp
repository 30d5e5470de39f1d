// Label maps of scores at a lower resolution: resizes as sparse matrices, tiles of the labels, threads.
#include "label_map.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int64_t TILE_BYTES = 1 << 18;  // of widened scores: they stay in a second-level cache
constexpr int64_t CHUNK = 32;

bool all_zero(const float* chunk) {
  int32_t any = 0;
  for (int64_t i = 0; i < CHUNK; ++i) any |= chunk[i] != 0;  // in vectors: no branch, and the length is known
  return !any;
}

// Calls visit(row, column, value) for all values that are not zero, row by row; most are zero.
template <typename Visit>
void each_nonzero(const float* matrix, int64_t height, int64_t width, Visit visit) {
  for (int64_t y = 0; y < height; ++y, matrix += width) {
    for (int64_t x = 0; x < width; x += CHUNK) {
      const int64_t end = std::min(x + CHUNK, width);
      if (end == x + CHUNK && all_zero(matrix + x)) continue;
      for (int64_t i = x; i < end; ++i) {
        if (matrix[i] != 0) visit(y, i, matrix[i]);
      }
    }
  }
}

// The weights of each column of a matrix that are not zero, and their rows.
struct Columns {
  std::vector<int32_t> start, source;
  std::vector<float> weight;

  Columns(const float* matrix, int64_t height, int64_t width) : start(width + 1) {
    each_nonzero(matrix, height, width, [&](int64_t, int64_t x, float) { ++start[x + 1]; });
    for (int64_t x = 0; x < width; ++x) start[x + 1] += start[x];
    source.resize(start[width]);
    weight.resize(start[width]);
    std::vector<int32_t> next(start);
    each_nonzero(matrix, height, width, [&](int64_t y, int64_t x, float value) {
      source[next[x]] = y;
      weight[next[x]++] = value;
    });
  }

  int64_t size() const { return start.size() - 1; }
  int64_t count(int64_t x) const { return start[x + 1] - start[x]; }
};

// The taps of blocks of columns; see Job.
struct Blocks {
  std::vector<int32_t> start{0}, first, last, offset;
  std::vector<float> weight;
  std::vector<uint8_t> near;

  Blocks(const Columns& columns, int64_t lanes) {
    for (int64_t x = 0; x < columns.size(); x += lanes) {
      const int64_t width = std::min(lanes, columns.size() - x);
      int64_t taps = 0;
      for (int64_t l = 0; l < width; ++l) taps = std::max(taps, columns.count(x + l));
      for (int64_t t = 0; t < taps; ++t) add_tap(columns, x, width, t, lanes);
      start.push_back(first.size());
    }
  }

  int64_t size() const { return start.size() - 1; }

 private:
  void add_tap(const Columns& columns, int64_t x, int64_t width, int64_t t, int64_t lanes) {
    int32_t least = INT32_MAX, most = 0;
    for (int64_t l = 0; l < width; ++l) {
      if (t >= columns.count(x + l)) continue;
      const int32_t source = columns.source[columns.start[x + l] + t];
      least = std::min(least, source);
      most = std::max(most, source);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      const bool used = l < width && t < columns.count(x + l);
      offset.push_back(used ? columns.source[columns.start[x + l] + t] - least : 0);
      weight.push_back(used ? columns.weight[columns.start[x + l] + t] : 0);
    }
    first.push_back(least);
    last.push_back(most);
    near.push_back(most - least < lanes);
  }
};

// The labels in tiles: as many blocks as fit into the cache, and enough bands of rows for the threads.
std::vector<Tile> tiles_of(const Job& job, const Blocks& blocks, int64_t rows, int64_t lanes, int64_t parts) {
  const int64_t fit = std::max<int64_t>(TILE_BYTES / (job.most_rows * job.classes * lanes * 4), 1);
  const int64_t strips = (blocks.size() + fit - 1) / fit, wide = (blocks.size() + strips - 1) / strips;
  const int64_t bands = std::max<int64_t>(std::min((rows + 31) / 32, parts / strips), 1);
  const int64_t high = (rows + bands - 1) / bands;
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < rows; row += high) {
    for (int64_t block = 0; block < blocks.size(); block += wide) {
      Tile tile = {};
      tile.row = row;
      tile.end_row = std::min(row + high, rows);
      tile.block = block;
      tile.end_block = std::min(block + wide, blocks.size());
      const int32_t begin = blocks.start[block], end = blocks.start[tile.end_block];
      if (begin < end) {
        tile.left = *std::min_element(&blocks.first[begin], blocks.first.data() + end);
        tile.columns = *std::max_element(&blocks.last[begin], blocks.last.data() + end) + 1 - tile.left;
      }
      tiles.push_back(tile);
    }
  }
  return tiles;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bytes of the widest vector that this processor works on here: 16, 32 or 64.
EXPORT int themask_widest_vector() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return 64;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

// Labels uint8 [frames, rows, columns], contiguous, of scores [frames, classes, height, width] with any strides.
//   vector         width of vectors in bytes, at most the widest
//   type           of the scores: 0 float32, 1 bfloat16, 2 float16
//   strides        [4], in scores
//   row_matrix     [height, rows]: weight of each row of the scores in each row of the labels
//   column_matrix  [width, columns], likewise
// All sizes are at least 1. Returns false where the system gives no memory.
EXPORT bool themask_label_map(int64_t vector, const char* scores, int type, int64_t frames, int64_t classes,
                              int64_t height, int64_t width, const int64_t* strides, const float* row_matrix,
                              int64_t rows, const float* column_matrix, int64_t columns, uint8_t* labels,
                              int64_t threads) try {
  LabelTile* label_tile = themask_label_tile_16;
#ifdef __x86_64__
  if (vector == 32) label_tile = themask_label_tile_32;
  if (vector == 64) label_tile = themask_label_tile_64;
#endif
  const int64_t lanes = vector / 4;
  const Columns row_weights(row_matrix, height, rows);
  const Blocks blocks(Columns(column_matrix, width, columns), lanes);
  Job job = {};
  job.type = Job::Type(type);
  job.class_stride = strides[1], job.row_stride = strides[2], job.column_stride = strides[3];
  job.classes = classes, job.width = columns;
  job.row_start = row_weights.start.data(), job.row_source = row_weights.source.data();
  job.row_weight = row_weights.weight.data();
  job.most_rows = 1;
  for (int64_t y = 0; y < rows; ++y) job.most_rows = std::max(job.most_rows, row_weights.count(y));
  job.block_start = blocks.start.data(), job.first = blocks.first.data(), job.offset = blocks.offset.data();
  job.weight = blocks.weight.data(), job.near = blocks.near.data();

  const std::vector<Tile> tiles = tiles_of(job, blocks, rows, lanes, 8 * threads / frames);
  int64_t size = 0;
  for (const Tile& tile : tiles) size = std::max(size, tile.memory(job, lanes));
  size = (size + 15) / 16 * 16;
  const int64_t tasks = frames * tiles.size();
  threads = std::min(threads, tasks);
  std::unique_ptr<float[]> memory(new float[size * threads + 16]);
  std::vector<Row> held(job.most_rows * threads);
  float* aligned = (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    for (int64_t i; (i = next++) < tasks;) {
      const int64_t frame = i / tiles.size();
      Tile tile = tiles[i % tiles.size()];
      tile.scores = scores + frame * strides[0] * (job.type == Job::float32 ? 4 : 2);
      tile.labels = labels + frame * rows * columns;
      label_tile(job, tile, aligned + thread * size, &held[thread * job.most_rows]);
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  } catch (const std::exception&) {  // the system gives no more threads: fewer do the work
  }
  work(0);
  for (std::thread& other : others) other.join();
  return true;
} catch (const std::exception&) {
  return false;
}
