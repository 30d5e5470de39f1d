// What the driver of the label maps and its kernels, one for each width of vectors, have in common.
#pragma once
#include <stdint.h>

// One call. The labels are [rows of the labels, width]; a block is as many of their columns as a vector has lanes.
struct Job {
  enum Type : int32_t { float32, bfloat16, float16 } type;
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
  int64_t memory(const Job& job, int64_t lanes) const {
    return job.most_rows * job.classes * ((end_block - block) * lanes + columns) + lanes;
  }
};

// What a kernel keeps about rows of the scores, [job.most_rows].
struct Row {
  int64_t held;  // the row that part i of the memory holds in wide form, -1 none
  float* wide;   // the wide form of the i-th row that the present labels are made of
  bool fresh;    // whether that is still to be made
};

// `memory` is aligned to the vectors.
typedef void LabelTile(const Job& job, const Tile& tile, float* memory, Row* rows);
extern "C" LabelTile themask_label_tile_16, themask_label_tile_32, themask_label_tile_64;
