// What the bindings ask of the kernels. The CPU kernels are compiled once for each instruction set, with WIDTH = the
// bytes of a vector, and SET = its name, which is their namespace.
#pragma once

#include <stdint.h>

namespace themask {

// What a tensor holds: numbers of the type that a kernel computes in, or bfloat16.
enum class Type { full, bfloat16 };

// Multi-scale deformable attention of contiguous tensors. Fused: `points` are offsets in pixels, `weights` are logits
// and `reference` is given; otherwise `points` are locations in 0..1, `weights` are used as they are, `reference` is null.
struct DeformAttn {
  const void* value;      // [n, pixels, heads, width]
  const void* points;     // [n, queries, heads, levels, samples, 2]
  const void* weights;    // [n, queries, heads, levels, samples]
  const void* reference;  // [reference_n, queries, levels, 2]
  const int64_t* shapes;  // [levels, 2]: h, w
  int64_t n, pixels, heads, width, queries, levels, samples, reference_n;
  Type value_type, points_type, weights_type;  // of reference, gradients: full; of forward's result: value's
};

struct DeformKernels {
  // out [n, queries, heads * width]: the parts begin..end of n * heads * queries.
  void (*forward)(const DeformAttn&, void* out, int64_t begin, int64_t end);
  // All queries of the (item, head) pairs begin..end of n * heads, so that each thread adds to its own rows of
  // grad_value, in the order of the queries: no race, and the same bits for any number of threads.
  void (*backward)(const DeformAttn&, const void* grad_out, void* grad_value, void* grad_points, void* grad_weights,
                   int64_t begin, int64_t end);
};

// A tensor of heads: its strides of samples, heads and tokens in numbers; the channels of a token lie side by side.
struct Heads {
  const void* data;
  int64_t stride[3];

  template <class Number>
  const Number* at(int64_t sample, int64_t head) const {
    return static_cast<const Number*>(data) + sample * stride[0] + head * stride[1];
  }
};

// out = softmax(query key^T * scale) value, for each sample and head.
struct Attention {
  static constexpr int64_t chunk = 512;  // keys and values of a head that are packed together: they stay in the cache
  static constexpr int64_t pad = 32;     // keys and channels of packed rows are a multiple of this

  Heads query, key, value, mask;  // mask: not 0 where a query may attend; null: everywhere
  void* out;                      // [samples, queries, heads, channels]
  int64_t samples, heads, queries, keys, channels;
  float scale;
  Type type;  // of all but the mask

  // Floats of memory for `rows` queries: packed queries and results, keys, values, scores, maxima and sums.
  int64_t memory(int64_t rows) const {
    const int64_t wide = (channels + pad - 1) / pad * pad;
    return 2 * (rows + pad) * (wide + 1) + 2 * chunk * wide + 2 * pad * chunk;
  }
};

// The queries first..last of one sample and head. `memory` is aligned to 64 bytes.
typedef void Attend(const Attention&, int64_t sample, int64_t head, int64_t first, int64_t last, float* memory);

// Label maps [rows of the labels, width]; a block is as many of their columns as a vector has lanes.
struct LabelMap {
  Type type;                                        // of the scores
  int64_t class_stride, row_stride, column_stride;  // of the scores, in scores
  int64_t classes, width;

  // Row y of the labels is made of the rows source[i] of the scores, row_start[y] <= i < row_start[y + 1].
  const int32_t *row_start, *row_source;
  const float* row_weight;
  int64_t most_rows;  // of the scores in a row of the labels

  // Block b is made of the taps block_start[b] <= t < block_start[b + 1]. A tap gives each lane one column of the
  // scores, first[t] + offset[t][lane], times weight[t][lane]. Where offsets are less than the number of lanes it is
  // near: one vector holds all of its columns.
  const int32_t *block_start, *first, *offset;
  const float* weight;
  const uint8_t* near;
};

// A part of a frame.
struct Tile {
  const void* scores;  // of the frame
  uint8_t* labels;     // of the frame
  int64_t row, end_row, block, end_block;
  int64_t left, columns;  // the columns of the scores that the blocks are made of, and perhaps more

  // Floats of memory that the kernel needs beside.
  int64_t memory(const LabelMap& map, int64_t lanes) const {
    return map.most_rows * map.classes * ((end_block - block) * lanes + columns) + lanes;
  }
};

// What a kernel keeps about rows of the scores, [map.most_rows].
struct Row {
  int64_t held;  // the row that part i of the memory holds in wide form, -1 none
  float* wide;   // the wide form of the i-th row that the present labels are made of
  bool fresh;    // whether that is still to be made
};

// `memory` is aligned to 64 bytes.
typedef void LabelTile(const LabelMap&, const Tile&, float* memory, Row* rows);

// Takes one more frame. How long the pixels of both maps have stayed the same is kept in `runs`.
//   frames   ground truth, that before, prediction, that before
//   size     pixels of a frame
//   runs     2 * planes * 64 bytes for every 512 pixels begun; zeros before the second frame
//   planes   bits of the largest of `lengths`
//   lengths  [number] run lengths to count, at least 1: frames of a window minus 1
//   counts   [number, 2], added to: pixels whose run is long enough in both maps, and in the ground truth
typedef void ExtendRuns(const uint8_t* const frames[4], int64_t size, uint8_t* runs, int64_t planes,
                        const int64_t* lengths, int64_t number, int64_t* counts);

// `deform_double`, for checks, is there in portable code alone.
#define THEMASK_KERNELS(set)                        \
  namespace set {                                   \
  extern const DeformKernels deform, deform_double; \
  Attend attend;                                    \
  LabelTile label_tile;                             \
  ExtendRuns extend_runs;                           \
  }
THEMASK_KERNELS(portable)
THEMASK_KERNELS(avx2)
THEMASK_KERNELS(avx512)

}  // namespace themask
