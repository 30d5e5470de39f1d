// Binds the CPU kernels to torch's dispatcher through the stable ABI, and chooses the instruction set for all of them.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "binding.h"
#include "label_tiles.h"

namespace themask {

// bfloat16 as it is where sums are made in float32.
ScalarType readable(ScalarType given, ScalarType type, bool) {
  return given == ScalarType::BFloat16 && type == ScalarType::Float ? given : type;
}

namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  int64_t lanes;
  const DeformKernels& deform;
  Attend* attend;
  LabelTile* label_tile;
  ExtendRuns* extend_runs;
};

#ifdef THEMASK_AVX512_EMULATED  // tests: the wide code, compiled to narrower steps
#define HAS_AVX512 true
#else
#define HAS_AVX512                                                                  \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&       \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#endif
#define SET(name, lanes, supported) \
  {#name, supported, lanes, name::deform, name::attend, name::label_tile, name::extend_runs}

// The fastest first.
const InstructionSet instruction_sets[] = {
#ifdef __x86_64__
    SET(avx512, 16, HAS_AVX512),
    SET(avx2, 8, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    SET(portable, 4, true),
};

// The number `number` of those that this processor has; null behind the last.
const InstructionSet* supported_set(int64_t number) {
  for (const auto& set : instruction_sets)
    if (set.supported && number-- == 0) return &set;
  return nullptr;
}

const InstructionSet* chosen = supported_set(0);

// Calls work(begin, end) for parts of 0..count on torch's threads. No exception may leave one of them.
template <class Work>
void parallel(int64_t count, int64_t grain, const Work& work) {
  std::atomic<bool> no_memory{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  });
  if (no_memory) throw std::bad_alloc();
}

// Memory of this thread, aligned to 64 bytes; kept for the next call, so that the system need not clear it anew.
float* memory(int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local int64_t size = 0;
  floats += 16;
  if (size < floats) {
    size = 0, kept.reset();
    kept.reset(new float[floats]);
    size = floats;
  }
  return (float*)(((uintptr_t)kept.get() + 63) / 64 * 64);
}

const DeformKernels& kernels_of(const DeformInputs& in) {
  return in.type == ScalarType::Double ? portable::deform_double : chosen->deform;
}

Tensor ms_deform_attn(const Tensor& value, Sizes shapes, const Reference& reference, const Tensor& points,
                      const Tensor& weights) {
  const DeformInputs in(value, shapes, reference, points, weights);
  const DeformAttn& att = in.attention;
  Tensor out = torch::stable::new_empty(in.value, {att.n, att.queries, att.heads * att.width});
  void* to = out.mutable_data_ptr();
  parallel(att.n * att.heads * att.queries, 512, [&](int64_t begin, int64_t end) {
    kernels_of(in).forward(att, to, begin, end);
  });
  return cast(out, value.scalar_type());
}

// Always deterministic.
Gradients ms_deform_attn_backward(const Tensor& grad_out_, const Tensor& value, Sizes shapes,
                                  const Reference& reference, const Tensor& points, const Tensor& weights, bool) {
  const DeformInputs in(value, shapes, reference, points, weights);
  const DeformAttn& att = in.attention;
  check_tensor("grad_out", grad_out_, value, {att.n, att.queries, att.heads * att.width});
  const Tensor grad_out = prepared(grad_out_, in.type);
  Tensor grad_value = torch::stable::new_empty(in.value, in.value.sizes(), in.type),
         grad_points = torch::stable::new_empty(in.points, in.points.sizes(), in.type),
         grad_weights = torch::stable::new_empty(in.weights, in.weights.sizes(), in.type);
  const void* from = grad_out.const_data_ptr();
  void *to_value = grad_value.mutable_data_ptr(), *to_points = grad_points.mutable_data_ptr(),
       *to_weights = grad_weights.mutable_data_ptr();
  parallel(att.n * att.heads, 1, [&](int64_t begin, int64_t end) {
    kernels_of(in).backward(att, from, to_value, to_points, to_weights, begin, end);
  });
  return cast({grad_value, grad_points, grad_weights}, value, points, weights);
}

// The tensor [samples, heads, tokens, channels], copied where its channels do not lie side by side.
Heads heads_of(Tensor& tensor) {
  if (tensor.stride(3) != 1) tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "attention: query or key is not [N, heads, tokens, channels]");
  Attention job = {};
  job.samples = query.size(0), job.heads = query.size(1), job.queries = query.size(2), job.channels = query.size(3);
  job.keys = key.size(2);
  check_shape("attention", "key", key, query, {job.samples, job.heads, job.keys, job.channels});
  check_shape("attention", "value", value, query, {job.samples, job.heads, job.keys, job.channels});
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && key.scalar_type() == type &&
                      value.scalar_type() == type,
                  "attention: query, key and value are not all float32 or all bfloat16");
  job.query = heads_of(query), job.key = heads_of(key), job.value = heads_of(value), job.type = type_of(query);
  if (mask) {
    check_shape("attention", "mask", *mask, query, {job.samples, job.heads, job.queries, job.keys});
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "attention: mask is not of type bool");
    job.mask = heads_of(*mask);
  }
  Tensor out = torch::stable::new_empty(query, {job.samples, job.queries, job.heads, job.channels});
  job.out = out.mutable_data_ptr();
  job.scale = float(1 / std::sqrt(double(job.channels)));

  constexpr int64_t least = 64, most = 1024;  // queries of a part
  const int64_t pairs = job.samples * job.heads, threads = torch::stable::get_num_threads();
  const int64_t share = (pairs * job.queries + 4 * threads - 1) / (4 * threads);  // four parts for a thread
  const int64_t fit = std::min(std::max(share, least), most), parts = (job.queries + fit - 1) / fit;
  const int64_t rows = parts ? (job.queries + parts - 1) / parts : 0;
  parallel(out.numel() ? pairs * parts : 0, 1, [&](int64_t begin, int64_t end) {
    float* aligned = memory(job.memory(rows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / parts, first = i % parts * rows;
      chosen->attend(job, pair / job.heads, pair % job.heads, first, std::min(first + rows, job.queries), aligned);
    }
  });
  return torch::stable::transpose(out, 1, 2);
}

// A row of the matrix for each row (column) of the labels.
Sparse sparse(const char* name, const Tensor& matrix, const Tensor& scores, int64_t size) {
  STD_TORCH_CHECK(matrix.dim() == 2, "label_map: ", name, " is not a matrix");
  check_shape("label_map", name, matrix, scores, {size, matrix.size(1)});
  const Tensor rows = prepared(torch::stable::transpose(matrix, 0, 1), ScalarType::Float);
  return Sparse(static_cast<const float*>(rows.const_data_ptr()), matrix.size(1), size);
}

Tensor label_map(const Tensor& scores_, const Tensor& row_matrix, const Tensor& column_matrix) {
  STD_TORCH_CHECK(scores_.dim() == 4, "label_map: scores is not [N, K, h, w]");
  const Tensor scores = type_of(scores_) == Type::bfloat16 ? scores_ : cast(scores_, ScalarType::Float);
  const int64_t frames = scores.size(0), lanes = chosen->lanes;
  const Sparse rows = sparse("rows", row_matrix, scores, scores.size(2));
  const Sparse columns = sparse("columns", column_matrix, scores, scores.size(3));
  const Blocks blocks(columns, lanes);
  LabelMap map = {};
  map.type = type_of(scores);
  map.class_stride = scores.stride(1), map.row_stride = scores.stride(2), map.column_stride = scores.stride(3);
  map.classes = scores.size(1), map.width = columns.size();
  STD_TORCH_CHECK(0 < map.classes && map.classes < 256, "label_map: scores has not 1 to 255 classes");
  map.row_start = rows.start.data(), map.row_source = rows.source.data(), map.row_weight = rows.weight.data();
  map.most_rows = rows.most;
  map.block_start = blocks.start.data(), map.first = blocks.first.data(), map.offset = blocks.offset.data();
  map.weight = blocks.weight.data(), map.near = blocks.near.data();

  Tensor labels = torch::stable::new_empty(scores, {frames, rows.size(), columns.size()}, ScalarType::Byte);
  if (!labels.numel()) return labels;
  const int64_t parts = 8 * torch::stable::get_num_threads() / frames;
  const std::vector<Tile> tiles = tiles_of(map, blocks, rows.size(), lanes, parts);
  int64_t floats = 0;
  for (const Tile& tile : tiles) floats = std::max(floats, tile.memory(map, lanes));
  const char* from = static_cast<const char*>(scores.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(labels.mutable_data_ptr());
  const int64_t frame_bytes = scores.stride(0) * (map.type == Type::full ? 4 : 2);
  parallel(frames * tiles.size(), 1, [&](int64_t begin, int64_t end) {
    float* aligned = memory(floats);
    std::vector<Row> held(map.most_rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t frame = i / tiles.size();
      Tile tile = tiles[i % tiles.size()];
      tile.scores = from + frame * frame_bytes;
      tile.labels = to + frame * rows.size() * columns.size();
      chosen->label_tile(map, tile, aligned, held.data());
    }
  });
  return labels;
}

const uint8_t* bytes_of(const char* name, const Tensor& map, const Tensor& like) {
  const auto sizes = like.sizes();
  check_shape("extend_runs", name, map, like, Sizes(sizes.begin(), sizes.end()));
  STD_TORCH_CHECK(map.scalar_type() == ScalarType::Byte && map.is_contiguous(), "extend_runs: ", name,
                  " is not contiguous and uint8");
  return static_cast<const uint8_t*>(map.const_data_ptr());
}

Tensor extend_runs(const Tensor& gt, const Tensor& gt_before, const Tensor& pred, const Tensor& pred_before,
                   Tensor runs, Sizes lengths) {
  const uint8_t* const frames[] = {bytes_of("gt", gt, gt), bytes_of("gt_before", gt_before, gt),
                                   bytes_of("pred", pred, gt), bytes_of("pred_before", pred_before, gt)};
  const int64_t size = gt.numel(), blocks = (size + 511) / 512, number = lengths.size();
  STD_TORCH_CHECK(runs.dim() == 2 && runs.size(0) >= blocks && runs.size(1) % 128 == 0,
                  "extend_runs: runs is not [pixels / 512, 128 * planes]");
  bytes_of("runs", runs, runs);
  Tensor counts = torch::stable::new_zeros(gt, {number, 2}, ScalarType::Long);
  chosen->extend_runs(frames, size, static_cast<uint8_t*>(runs.mutable_data_ptr()), runs.size(1) / 128, lengths.data(),
                      number, static_cast<int64_t*>(counts.mutable_data_ptr()));
  return counts;
}

}  // namespace
}  // namespace themask

STABLE_TORCH_LIBRARY_IMPL(themask, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&themask::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&themask::ms_deform_attn_backward));
  m.impl("attention", TORCH_BOX(&themask::attention));
  m.impl("label_map", TORCH_BOX(&themask::label_map));
  m.impl("extend_runs", TORCH_BOX(&themask::extend_runs));
}

// The name of the instruction set `number` of those that this processor has, the fastest first; null behind the last.
// For -1 that of the chosen one.
THEMASK_EXPORT const char* themask_instruction_set(int64_t number) {
  const auto* set = number < 0 ? themask::chosen : themask::supported_set(number);
  return set ? set->name : nullptr;
}

// False where the processor lacks it.
THEMASK_EXPORT bool themask_choose_instruction_set(const char* name) {
  for (int64_t i = 0; const auto* set = themask::supported_set(i); ++i)
    if (!std::strcmp(set->name, name)) {
      themask::chosen = set;
      return true;
    }
  return false;
}
