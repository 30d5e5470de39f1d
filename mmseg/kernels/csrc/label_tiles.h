// Label maps of scores at a lower resolution: resizes as sparse matrices, tiles of the labels.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace themask {

constexpr int64_t tile_bytes = 1 << 18;  // of widened scores: they stay in a second-level cache

// The weights of each row of a matrix that are not zero, and their columns.
struct Sparse {
  std::vector<int32_t> start{0}, source;
  std::vector<float> weight;
  int64_t most = 1;  // of a row

  Sparse(const float* matrix, int64_t rows, int64_t columns) {
    for (int64_t y = 0; y < rows; ++y, matrix += columns) {
      for (int64_t x = 0; x < columns; ++x)
        if (matrix[x] != 0) source.push_back(x), weight.push_back(matrix[x]);
      start.push_back(source.size());
      most = std::max(most, count(y));
    }
  }

  int64_t size() const { return start.size() - 1; }
  int64_t count(int64_t row) const { return start[row + 1] - start[row]; }
};

// The taps of blocks of columns; see LabelMap.
struct Blocks {
  std::vector<int32_t> start{0}, first, last, offset;
  std::vector<float> weight;
  std::vector<uint8_t> near;

  Blocks(const Sparse& columns, int64_t lanes) {
    for (int64_t x = 0; x < columns.size(); x += lanes) {
      const int64_t end = std::min(x + lanes, columns.size());
      int64_t taps = 0;
      for (int64_t i = x; i < end; ++i) taps = std::max(taps, columns.count(i));
      for (int64_t t = 0; t < taps; ++t) add_tap(columns, x, t, lanes);
      start.push_back(first.size());
    }
  }

  int64_t size() const { return start.size() - 1; }

 private:
  void add_tap(const Sparse& columns, int64_t x, int64_t t, int64_t lanes) {
    const auto used = [&](int64_t i) { return i < columns.size() && t < columns.count(i); };
    int32_t least = INT32_MAX, most = 0;
    for (int64_t i = x; i < x + lanes; ++i) {
      if (!used(i)) continue;
      least = std::min(least, columns.source[columns.start[i] + t]);
      most = std::max(most, columns.source[columns.start[i] + t]);
    }
    for (int64_t i = x; i < x + lanes; ++i) {
      offset.push_back(used(i) ? columns.source[columns.start[i] + t] - least : 0);
      weight.push_back(used(i) ? columns.weight[columns.start[i] + t] : 0);
    }
    first.push_back(least);
    last.push_back(most);
    near.push_back(most - least < lanes);
  }
};

// The labels in tiles: as many blocks as fit into the cache, and enough bands of rows for the threads.
inline std::vector<Tile> tiles_of(const LabelMap& map, const Blocks& blocks, int64_t rows, int64_t lanes,
                                  int64_t parts) {
  const int64_t fit = std::max<int64_t>(tile_bytes / (map.most_rows * map.classes * lanes * 4), 1);
  const int64_t strips = (blocks.size() + fit - 1) / fit, wide = (blocks.size() + strips - 1) / strips;
  const int64_t bands = std::max<int64_t>(std::min((rows + 31) / 32, parts / strips), 1);
  const int64_t high = (rows + bands - 1) / bands;
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < rows; row += high) {
    for (int64_t block = 0; block < blocks.size(); block += wide) {
      Tile tile = {};
      tile.row = row, tile.end_row = std::min(row + high, rows);
      tile.block = block, tile.end_block = std::min(block + wide, blocks.size());
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

}  // namespace themask
