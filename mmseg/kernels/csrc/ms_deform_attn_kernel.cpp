// The CPU kernels of multi-scale deformable attention.
//
// The work goes head by head. The numbers of one head lie far apart in `value`; they are packed first, so that the rows
// around a query, which its neighbours need too, stay in the first caches. One row of zeros more stands for every corner
// outside a map, so the inner loop has no branch.
//
// A query's samples are prepared together, a lane each: softmax, pixel position, the four corners' rows and weights.
// Then the corners' rows are added up with the channels in the lanes, so nothing is gathered. Some queries are prepared
// before their rows are added up: what one of them waits for (the softmax is a long chain) others fill.
//
// The forward pass reads and writes bfloat16 as it is, since a conversion of whole tensors before and after costs as much
// as all of this. Sums are made in T all the same.
#include <stddef.h>

#include <new>

#include "kernels.h"
#include "simd.h"

namespace {

using themask::DeformAttn;
using themask::Type;

constexpr int64_t kBatch = 8;   // queries prepared together
constexpr int64_t kAhead = 32;  // queries, or rows of value, from asking for memory to using it

// Memory of one thread, aligned to the widest register; throws std::bad_alloc like any other.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(static_cast<void*>(data_), std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A head's numbers lie further apart than a processor foresees. An address behind the end does no harm.
template <int Write>
void ask_for(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (const char* end = line + bytes; line < end; line += 64) __builtin_prefetch(line, Write);
}

// From T or bfloat16 to T or bfloat16.
template <class T, int W, class From, class To>
void copy(const From* from, To* to, int64_t count) {
  using V = Simd<T, W>;
  using One = Simd<T, 1>;
  if (count == 32) {  // known steps: no loop
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += W) V::store(to + i, V::load(from + i));
    return;
  }
  int64_t i = 0;
  for (; i + W <= count; i += W) V::store(to + i, V::load(from + i));
  for (; i < count; ++i) One::store(to + i, One::load(from + i));
}

// The samples of kBatch queries and one head, W to a block. The last block of a query is filled up by samples outside
// the map.
template <class T, int W>
class Samples {
  using V = Simd<T, W>;
  using F = typename V::F;
  using I = typename V::I;
  using Int = typename V::Int;

 public:
  // What a block of any query has: the levels of its lanes (-1: no sample).
  struct alignas(64) Lanes {
    T level[W], width[W], height[W], scale_x[W], scale_y[W];  // scale: of points to pixels
    Int start[W];
    int64_t filled, first_level, last_level;
  };
  // Corners: top left, top right, bottom left, bottom right; a row of the head.
  struct alignas(64) Block {
    T weight[W], frac_x[W], frac_y[W], corner_weight[4][W];
    Int corner_row[4][W];
    T dot[4 * W];  // backward: <corner, grad_out>
  };

  explicit Samples(const DeformAttn& att)
      : att_(att), fused_(att.reference), count_(att.levels * att.samples), blocks_((count_ + W - 1) / W),
        total_(att.n * att.queries * att.heads * count_), lanes_(blocks_), block_(kBatch * blocks_),
        padded_(3 * blocks_ * W) {
    memset(static_cast<void*>(lanes_), 0, blocks_ * sizeof(Lanes));
    memset(static_cast<void*>(padded_), 0, 3 * blocks_ * W * sizeof(T));
    for (int64_t b = 0; b < blocks_; ++b) V::store(lanes_[b].level, V::set(-1));
    for (int64_t l = 0, k = 0, start = 0; l < att.levels; ++l) {
      const int64_t h = att.shapes[2 * l], w = att.shapes[2 * l + 1];
      for (int64_t p = 0; p < att.samples; ++p, ++k) {
        Lanes& lanes = lanes_[k / W];
        const int64_t i = k % W;
        if (i == 0) lanes.first_level = l;
        lanes.last_level = l;
        lanes.filled = i + 1;
        lanes.level[i] = l;
        lanes.width[i] = w;
        lanes.height[i] = h;
        lanes.scale_x[i] = fused_ ? 1 : w;
        lanes.scale_y[i] = fused_ ? 1 : h;
        lanes.start[i] = start;
      }
      start += h * w;
    }
  }

  // Corners and their weights of a head of a query, as number `i` of the batch; `index` counts items, queries and heads.
  void prepare(int64_t i, int64_t item, int64_t query, int64_t index) {
    const T* point = numbers(att_.points, att_.points_type, index, 2, padded_ + blocks_ * W);
    const T* weight = numbers(att_.weights, att_.weights_type, index, 1, padded_);
    const T* reference = static_cast<const T*>(att_.reference);
    if (fused_) reference += ((att_.reference_n == 1 ? 0 : item) * att_.queries + query) * att_.levels * 2;
    Block* block = block_ + i * blocks_;
    const F unused = V::set(fused_ ? -INFINITY : 0);
    for (int64_t b = 0; b < blocks_; ++b)
      V::store(block[b].weight, V::load(lanes_[b].level) >= 0 ? V::load(weight + b * W) : unused);
    if (fused_) softmax(block);
    for (int64_t b = 0; b < blocks_; ++b) set_corners(lanes_[b], block[b], point + 2 * b * W, reference);
  }

  // Calls work(block, k) for each sample k of number `i` of the batch.
  template <class Work>
  void each(int64_t i, Work work) {
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t k = 0; k < lanes_[b].filled; ++k) work(block_[i * blocks_ + b], k);
  }

  void clear_dots(int64_t i) {
    for (int64_t b = 0; b < blocks_; ++b) memset(block_[i * blocks_ + b].dot, 0, sizeof(Block::dot));
  }

  // From `dot`: the gradients of points and weights (through the softmax).
  void write_gradients(int64_t i, int64_t index, T* grad_points, T* grad_weights) {
    Block* block = block_ + i * blocks_;
    T* grad_point = grad_points + index * count_ * 2;
    T* grad_weight = grad_weights + index * count_;
    F inner{};
    for (int64_t b = 0; b < blocks_; ++b) {
      Block& from = block[b];
      const Lanes& lanes = lanes_[b];
      // Four rows of corners by samples, from samples by corners.
      const auto first = V::deinterleave(V::load(from.dot), V::load(from.dot + W));
      const auto second = V::deinterleave(V::load(from.dot + 2 * W), V::load(from.dot + 3 * W));
      const auto [top_left, bottom_left] = V::deinterleave(first.a, second.a);
      const auto [top_right, bottom_right] = V::deinterleave(first.b, second.b);
      const F fx = V::load(from.frac_x), fy = V::load(from.frac_y), weight = V::load(from.weight);
      const F across_top = top_right - top_left, across_bottom = bottom_right - bottom_left;
      const F top = top_left + fx * across_top, bottom = bottom_left + fx * across_bottom, down = bottom - top;
      const F sample = top + fy * down;
      const F grad_x = weight * (across_top + fy * (across_bottom - across_top)) * V::load(lanes.scale_x);
      const F grad_y = weight * down * V::load(lanes.scale_y);
      V::store(from.dot, sample);
      inner += weight * sample;

      const auto grad = V::interleave(grad_x, grad_y);
      V::store(grad_point + 2 * b * W, grad.a, 2 * lanes.filled);
      V::store(grad_point + (2 * b + 1) * W, grad.b, 2 * lanes.filled - W);
    }
    const F mean = V::set(V::sum(inner));
    for (int64_t b = 0; b < blocks_; ++b) {
      const F grad = V::load(block[b].dot);
      V::store(grad_weight + b * W, fused_ ? V::load(block[b].weight) * (grad - mean) : grad, lanes_[b].filled);
    }
  }

 private:
  const DeformAttn& att_;
  const bool fused_;
  const int64_t count_, blocks_, total_;
  const Scratch<Lanes> lanes_;
  const Scratch<Block> block_;
  const Scratch<T> padded_;

  // A query's numbers, `each` for a sample, in whole blocks: in the tensor, or in `buffer` where they are bfloat16 or the
  // last block reaches beyond the tensor, which is not read there.
  const T* numbers(const void* tensor, Type type, int64_t index, int64_t each, T* buffer) const {
    const bool within = index * count_ + blocks_ * W <= total_;
    const int64_t count = each * count_, ahead = kAhead * att_.heads * count;
    const int64_t readable = within ? each * blocks_ * W : count;
    if (type == Type::bfloat16) {
      const BFloat16* from = static_cast<const BFloat16*>(tensor) + index * count;
      ask_for<0>(from + ahead, count * sizeof(BFloat16));
      copy<T, W>(from, buffer, readable);
      return buffer;
    }
    const T* from = static_cast<const T*>(tensor) + index * count;
    ask_for<0>(from + ahead, count * sizeof(T));
    if (within) return from;
    copy<T, W>(from, buffer, readable);
    return buffer;
  }

  void softmax(Block* block) const {
    F largest = V::set(-INFINITY), sum{};
    for (int64_t b = 0; b < blocks_; ++b) {
      const F logit = V::load(block[b].weight);
      largest = logit > largest ? logit : largest;
    }
    const F shift = V::set(V::max(largest));
    for (int64_t b = 0; b < blocks_; ++b) {
      const F e = V::exp(V::load(block[b].weight) - shift);
      V::store(block[b].weight, e);
      sum += e;
    }
    const F scale = V::set(1 / V::sum(sum));
    for (int64_t b = 0; b < blocks_; ++b) V::store(block[b].weight, V::load(block[b].weight) * scale);
  }

  void set_corners(const Lanes& lanes, Block& to, const T* point, const T* reference) const {
    auto [x, y] = V::deinterleave(V::load(point), V::load(point + W));
    const F level = V::load(lanes.level), width = V::load(lanes.width), height = V::load(lanes.height);
    F base_x{}, base_y{};  // the reference point of each lane's level
    if (fused_)
      for (int64_t l = lanes.first_level; l <= lanes.last_level; ++l) {
        const I here = level == V::set(T(l));
        base_x = here ? V::set(reference[2 * l]) : base_x;
        base_y = here ? V::set(reference[2 * l + 1]) : base_y;
      }
    x = x * V::load(lanes.scale_x) + (base_x * width - T(0.5));
    y = y * V::load(lanes.scale_y) + (base_y * height - T(0.5));
    const I inside = (level >= 0) & (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height);
    x = inside ? x : F{};  // NaN and far positions: no conversion to an integer is defined for them
    y = inside ? y : F{};
    const I x0 = V::floor(x), y0 = V::floor(y), columns = __builtin_convertvector(width, I);
    const I zeros = I{} + Int(att_.pixels);
    const I left = inside & (x0 >= 0), right = inside & (x0 + 1 < columns);
    const I top = y0 >= 0, bottom = y0 + 1 < __builtin_convertvector(height, I);
    const I row = V::load(lanes.start) + y0 * columns + x0;
    V::store(to.corner_row[0], (left & top) ? row : zeros);
    V::store(to.corner_row[1], (right & top) ? row + 1 : zeros);
    V::store(to.corner_row[2], (left & bottom) ? row + columns : zeros);
    V::store(to.corner_row[3], (right & bottom) ? row + columns + 1 : zeros);

    const F fx = x - V::to_float(x0), fy = y - V::to_float(y0), weight = V::load(to.weight);
    const F lower = weight * fy, upper = weight - lower;
    V::store(to.corner_weight[0], upper - upper * fx);
    V::store(to.corner_weight[1], upper * fx);
    V::store(to.corner_weight[2], lower - lower * fx);
    V::store(to.corner_weight[3], lower * fx);
    V::store(to.frac_x, fx);
    V::store(to.frac_y, fy);
  }
};

template <class T, int W>
class Kernel {
  using Set = Samples<T, W>;
  using Block = typename Set::Block;

  // The numbers of a head: from number `first` on and far apart in a tensor, one after the other in `rows`, and a row of
  // zeros.
  static void pack(const DeformAttn& att, int64_t first, T* rows) {
    const int64_t stride = att.heads * att.width;
    if (att.value_type == Type::bfloat16)
      copy_rows(static_cast<const BFloat16*>(att.value) + first, stride, rows, att.width, att);
    else
      copy_rows(static_cast<const T*>(att.value) + first, stride, rows, att.width, att);
    memset(rows + att.pixels * att.width, 0, att.width * sizeof(T));
  }
  template <class From, class To>
  static void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, const DeformAttn& att) {
    for (int64_t s = 0; s < att.pixels; ++s, from += from_stride, to += to_stride) {
      ask_for<0>(from + kAhead * from_stride, att.width * sizeof(From));
      copy<T, W>(from, to, att.width);
    }
  }

  // Calls work(i, item, query) for the queries first..last, prepared as number i of a batch.
  template <class Work>
  static void batches(const DeformAttn& att, Set& set, int64_t item, int64_t head, int64_t first, int64_t last, Work work) {
    for (int64_t from = first; from < last; from += kBatch) {
      const int64_t count = last - from < kBatch ? last - from : kBatch;
      for (int64_t i = 0; i < count; ++i)
        set.prepare(i, item, from + i, (item * att.queries + from + i) * att.heads + head);
      for (int64_t i = 0; i < count; ++i) work(i, (item * att.queries + from + i) * att.heads + head);
    }
  }

  // Both work on `Vectors` vectors of channels, from channel `c` on.
  template <class V, int Vectors>
  static void gather(Set& set, int64_t i, const T* rows, int64_t width, int64_t c, T* out) {
    using F = typename V::F;
    constexpr int chains = Vectors >= 8 ? 1 : Vectors >= 4 ? 2 : 4;  // sums that do not wait for each other
    F sum[chains][Vectors] = {};
    set.each(i, [&](const Block& b, int64_t k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const T* from = rows + b.corner_row[i][k] * width + c;
        const F weight = V::set(b.corner_weight[i][k]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[i % chains][v] += weight * V::load(from + v * V::width);
      }
    });
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      F total = sum[0][v];
#pragma GCC unroll 4
      for (int i = 1; i < chains; ++i) total += sum[i][v];
      V::store(out + c + v * V::width, total);
    }
  }

  template <class V, int Vectors>
  static void scatter(Set& set, int64_t i, const T* rows, T* grad_rows, int64_t width, int64_t c, const T* grad_out) {
    using F = typename V::F;
    F grad[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) grad[v] = V::load(grad_out + c + v * V::width);
    set.each(i, [&](Block& b, int64_t k) {
      F dot[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t row = b.corner_row[i][k] * width + c;
        const T* from = rows + row;
        T* to = grad_rows + row;
        const F weight = V::set(b.corner_weight[i][k]);
        dot[i] = grad[0] * V::load(from);
        V::store(to, V::load(to) + weight * grad[0]);
#pragma GCC unroll 8
        for (int v = 1; v < Vectors; ++v) {
          dot[i] += grad[v] * V::load(from + v * V::width);
          V::store(to + v * V::width, V::load(to + v * V::width) + weight * grad[v]);
        }
      }
      V::add_sums(b.dot + 4 * k, dot[0], dot[1], dot[2], dot[3]);
    });
  }

 public:
  static void forward(const DeformAttn& att, void* out_, int64_t begin, int64_t end) {
    Set set(att);
    const int64_t stride = att.heads * att.width, width = att.width;
    const bool narrow = att.value_type == Type::bfloat16;
    const int64_t size = narrow ? sizeof(BFloat16) : sizeof(T);
    const Scratch<T> rows((att.pixels + 1) * width), sums(width);
    for (int64_t pair = begin / att.queries; pair * att.queries < end; ++pair) {
      const int64_t item = pair / att.heads, head = pair % att.heads;
      const int64_t first = begin > pair * att.queries ? begin - pair * att.queries : 0;
      const int64_t last = end < (pair + 1) * att.queries ? end - pair * att.queries : att.queries;
      pack(att, item * att.pixels * stride + head * width, rows);
      batches(att, set, item, head, first, last, [&](int64_t i, int64_t index) {
        char* to = static_cast<char*>(out_) + index * width * size;
        T* out = narrow ? sums : reinterpret_cast<T*>(to);
        ask_for<1>(to + kAhead * stride * size, width * size);
        int64_t c = 0;
        for (; c + 32 <= width; c += 32) gather<Simd<T, W>, 32 / W>(set, i, rows, width, c, out);
        for (; c + W <= width; c += W) gather<Simd<T, W>, 1>(set, i, rows, width, c, out);
        for (; c < width; ++c) gather<Simd<T, 1>, 1>(set, i, rows, width, c, out);
        if (narrow) copy<T, W>(out, reinterpret_cast<BFloat16*>(to), width);
      });
    }
  }

  static void backward(const DeformAttn& att, const void* grad_out_, void* grad_value_, void* grad_points,
                       void* grad_weights, int64_t begin, int64_t end) {
    Set set(att);
    const int64_t stride = att.heads * att.width, width = att.width;
    const Scratch<T> rows((att.pixels + 1) * width), grad_rows((att.pixels + 1) * width);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t item = pair / att.heads, head = pair % att.heads;
      const int64_t offset = item * att.pixels * stride + head * width;
      pack(att, offset, rows);
      memset(grad_rows, 0, (att.pixels + 1) * width * sizeof(T));
      batches(att, set, item, head, 0, att.queries, [&](int64_t i, int64_t index) {
        const T* grad_out = static_cast<const T*>(grad_out_) + index * width;
        ask_for<0>(grad_out + kAhead * stride, width * sizeof(T));
        set.clear_dots(i);
        int64_t c = 0;
        for (; c + 32 <= width; c += 32)
          scatter<Simd<T, W>, 32 / W>(set, i, rows, grad_rows, width, c, grad_out);
        for (; c + W <= width; c += W) scatter<Simd<T, W>, 1>(set, i, rows, grad_rows, width, c, grad_out);
        for (; c < width; ++c) scatter<Simd<T, 1>, 1>(set, i, rows, grad_rows, width, c, grad_out);
        set.write_gradients(i, index, static_cast<T*>(grad_points), static_cast<T*>(grad_weights));
      });
      copy_rows(static_cast<const T*>(grad_rows), width, static_cast<T*>(grad_value_) + offset, stride, att);
    }
  }
};

}  // namespace

namespace themask {
const DeformKernels SET::deform = {Kernel<float, WIDTH / 4>::forward, Kernel<float, WIDTH / 4>::backward};
#if WIDTH == 16  // float64 serves checks and need not be the fastest
const DeformKernels SET::deform_double = {Kernel<double, WIDTH / 4>::forward, Kernel<double, WIDTH / 4>::backward};
#endif
}  // namespace themask
