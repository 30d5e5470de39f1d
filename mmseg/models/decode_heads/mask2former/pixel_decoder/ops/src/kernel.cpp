// The CPU kernels. Compiled once for each instruction set, with KERNELS = the name of the set and WIDTH = the number
// of floats in a register; WITH_DOUBLE adds the kernels for float64, which serve checks and need not be the fastest.
//
// A query's samples of one head are prepared together, a lane each: softmax, pixel position, the four corners' rows and
// weights. Then the corners' rows (contiguous numbers of one head) are added up with the channels in the lanes, so
// nothing is gathered. A corner outside its map reads a row of zeros, and its gradient goes to a row nobody reads.
#include "kernel.h"

#include <stdlib.h>

#include "simd.h"

namespace {

using themask::Attention;

// The samples of one query and head, W to a block. The last block is filled up by samples outside the map.
template <class T, int W>
class Samples {
  using V = Simd<T, W>;
  using F = typename V::F;
  using I = typename V::I;
  using Int = typename V::Int;

 public:
  struct Block {
    int64_t filled;
    // Of the levels: set once.
    T width[W], height[W], scale_x[W], scale_y[W];
    Int columns[W], rows[W], start[W];
    // Of the query.
    T base_x[W], base_y[W];
    // Of the query and head. Corners: top left, top right, bottom left, bottom right; a row of `value`, or -1 outside.
    T weight[W], frac_x[W], frac_y[W], corner_weight[4][W];
    Int corner_row[4][W];
    // Backward: <corner, grad_out>, then what comes of it.
    T dot[4 * W], grad_weight[W];
  };

  explicit Samples(const Attention& att)
      : att_(att), fused_(att.reference), count_(att.levels * att.samples), blocks_((count_ + W - 1) / W) {
    const size_t bytes = blocks_ * sizeof(Block) + 2 * att.width * sizeof(T);
    if (posix_memalign(reinterpret_cast<void**>(&block_), 64, bytes)) abort();
    memset(static_cast<void*>(block_), 0, bytes);
    zeros_ = reinterpret_cast<T*>(block_ + blocks_), discarded_ = zeros_ + att.width;

    for (int64_t l = 0, k = 0, start = 0; l < att.levels; ++l) {
      const int64_t h = att.shapes[2 * l], w = att.shapes[2 * l + 1];
      for (int64_t p = 0; p < att.samples; ++p, ++k) {
        Block& b = block_[k / W];
        const int64_t i = k % W;
        b.filled = i + 1;
        b.width[i] = b.columns[i] = w;
        b.height[i] = b.rows[i] = h;
        b.scale_x[i] = fused_ ? 1 : w;
        b.scale_y[i] = fused_ ? 1 : h;
        b.start[i] = start;
        b.base_x[i] = b.base_y[i] = T(-0.5);
      }
      start += h * w;
    }
  }
  ~Samples() { free(block_); }
  Samples(const Samples&) = delete;

  Block* begin() { return block_; }
  Block* end() { return block_ + blocks_; }

  // A row of numbers of `value`, and where its gradient goes.
  const T* source(const T* value, int64_t offset, Int row) const { return row < 0 ? zeros_ : value + offset; }
  T* target(T* grad_value, int64_t offset, Int row) const { return row < 0 ? discarded_ : grad_value + offset; }

  // Pixel position of the reference point on each level.
  void set_query(int64_t item, int64_t query) {
    if (fused_) {
      const int64_t index = (att_.reference_n == 1 ? 0 : item) * att_.queries + query;
      const T* reference = static_cast<const T*>(att_.reference) + index * att_.levels * 2;
      for (int64_t l = 0, k = 0; l < att_.levels; ++l)
        for (int64_t p = 0; p < att_.samples; ++p, ++k) {
          Block& b = block_[k / W];
          b.base_x[k % W] = reference[2 * l] * b.width[k % W] - T(0.5);
          b.base_y[k % W] = reference[2 * l + 1] * b.height[k % W] - T(0.5);
        }
    }
  }

  // Corners and their weights; `index` counts items, queries and heads.
  void set_head(int64_t index) {
    const T* point = static_cast<const T*>(att_.points) + index * count_ * 2;
    const T* weight = static_cast<const T*>(att_.weights) + index * count_;
    for (Block& b : *this) {
      V::store(b.weight, b.filled == W ? V::load(weight) : partial(weight, b.filled, -INFINITY));
      weight += W;
    }
    if (fused_) softmax();
    for (Block& b : *this) {
      set_corners(b, point);
      point += 2 * W;
    }
  }

  // From `dot`: the gradients of points and weights (through the softmax).
  void write_gradients(int64_t index, T* grad_points, T* grad_weights) {
    T* grad_point = grad_points + index * count_ * 2;
    T* grad_weight = grad_weights + index * count_;
    F inner{};
    for (Block& b : *this) {
      // Four rows of corners by samples, from samples by corners.
      const auto first = V::deinterleave(V::load(b.dot), V::load(b.dot + W));
      const auto second = V::deinterleave(V::load(b.dot + 2 * W), V::load(b.dot + 3 * W));
      const auto [top_left, bottom_left] = V::deinterleave(first.a, second.a);
      const auto [top_right, bottom_right] = V::deinterleave(first.b, second.b);
      const F fx = V::load(b.frac_x), fy = V::load(b.frac_y), weight = V::load(b.weight);
      const F across_top = top_right - top_left, across_bottom = bottom_right - bottom_left;
      const F top = top_left + fx * across_top, bottom = bottom_left + fx * across_bottom, down = bottom - top;
      const F grad_x = weight * (across_top + fy * (across_bottom - across_top)) * V::load(b.scale_x);
      const F grad_y = weight * down * V::load(b.scale_y);
      V::store(b.grad_weight, top + fy * down);
      inner += weight * (top + fy * down);

      const auto grad = V::interleave(grad_x, grad_y);
      copy<2>(grad_point, reinterpret_cast<const T*>(&grad), b.filled);
      grad_point += 2 * W;
    }
    const F mean = V::set(V::sum(inner));
    for (Block& b : *this) {
      if (fused_) V::store(b.grad_weight, V::load(b.weight) * (V::load(b.grad_weight) - mean));
      copy<1>(grad_weight, b.grad_weight, b.filled);
      grad_weight += W;
    }
  }

 private:
  const Attention& att_;
  const bool fused_;
  const int64_t count_, blocks_;
  Block* block_;
  T *zeros_, *discarded_;

  static F partial(const T* from, int64_t n, T rest) {
    F v = V::set(rest);
    for (int64_t i = 0; i < n; ++i) v[i] = from[i];
    return v;
  }

  // n lanes of Each numbers; the usual full block without a call.
  template <int Each>
  static void copy(T* to, const T* from, int64_t n) {
    if (n == W)
      memcpy(to, from, W * Each * sizeof(T));
    else
      for (int64_t i = 0; i < n * Each; ++i) to[i] = from[i];
  }

  void softmax() {
    F largest = V::set(-INFINITY), sum{};
    for (Block& b : *this) {
      const F logit = V::load(b.weight);
      largest = logit > largest ? logit : largest;
    }
    const F shift = V::set(V::max(largest));
    for (Block& b : *this) {
      const F e = V::exp(V::load(b.weight) - shift);
      V::store(b.weight, e);
      sum += e;
    }
    const F scale = V::set(1 / V::sum(sum));
    for (Block& b : *this) V::store(b.weight, V::load(b.weight) * scale);
  }

  static void set_corners(Block& b, const T* point) {
    T padded[2 * W];
    if (b.filled < W) {
      for (int i = 0; i < 2 * W; ++i) padded[i] = i < 2 * b.filled ? point[i] : T(NAN);
      point = padded;
    }
    auto [x, y] = V::deinterleave(V::load(point), V::load(point + W));
    x = x * V::load(b.scale_x) + V::load(b.base_x);
    y = y * V::load(b.scale_y) + V::load(b.base_y);
    const I inside = (x > T(-1)) & (x < V::load(b.width)) & (y > T(-1)) & (y < V::load(b.height));
    x = inside ? x : F{};  // NaN and far positions: no conversion to an integer is defined for them
    y = inside ? y : F{};
    const I x0 = V::floor(x), y0 = V::floor(y), columns = V::load(b.columns), none = I{} - 1;
    const I left = inside & (x0 >= 0), right = inside & (x0 + 1 < columns);
    const I top = y0 >= 0, bottom = y0 + 1 < V::load(b.rows);
    const I row = V::load(b.start) + y0 * columns + x0;
    V::store(b.corner_row[0], (left & top) ? row : none);
    V::store(b.corner_row[1], (right & top) ? row + 1 : none);
    V::store(b.corner_row[2], (left & bottom) ? row + columns : none);
    V::store(b.corner_row[3], (right & bottom) ? row + columns + 1 : none);

    const F fx = x - V::to_float(x0), fy = y - V::to_float(y0), weight = V::load(b.weight);
    const F lower = weight * fy, upper = weight - lower;
    V::store(b.corner_weight[0], upper - upper * fx);
    V::store(b.corner_weight[1], upper * fx);
    V::store(b.corner_weight[2], lower - lower * fx);
    V::store(b.corner_weight[3], lower * fx);
    V::store(b.frac_x, fx);
    V::store(b.frac_y, fy);
  }
};

template <class T, int W>
class Kernel {
  using Set = Samples<T, W>;
  using Block = typename Set::Block;

  // Both work on `Vectors` vectors of channels, from channel `c` on; `stride` leads to the next row.
  template <class V, int Vectors>
  static void gather(Set& set, const T* value, int64_t stride, int64_t c, T* out) {
    using F = typename V::F;
    F sum[Vectors] = {};
    for (const Block& b : set)
      for (int64_t k = 0; k < b.filled; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t row = b.corner_row[i][k];
          const T* from = set.source(value, row * stride, row) + c;
          const F weight = V::set(b.corner_weight[i][k]);
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[v] += weight * V::load(from + v * V::width);
        }
      }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) V::store(out + c + v * V::width, sum[v]);
  }

  template <class V, int Vectors>
  static void scatter(Set& set, const T* value, T* grad_value, int64_t stride, int64_t c, const T* grad_out) {
    using F = typename V::F;
    F grad[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) grad[v] = V::load(grad_out + c + v * V::width);
    for (Block& b : set)
      for (int64_t k = 0; k < b.filled; ++k) {
        F dot[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t row = b.corner_row[i][k];
          const T* from = set.source(value, row * stride, row) + c;
          T* to = set.target(grad_value, row * stride, row) + c;
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
      }
  }

 public:
  static void forward(const Attention& att, void* out_, int64_t begin, int64_t end) {
    Set set(att);
    const int64_t stride = att.heads * att.width;
    for (int64_t q = begin; q < end; ++q) {
      const int64_t item = q / att.queries;
      set.set_query(item, q % att.queries);
      for (int64_t m = 0; m < att.heads; ++m) {
        set.set_head(q * att.heads + m);
        const T* value = static_cast<const T*>(att.value) + item * att.pixels * stride + m * att.width;
        T* out = static_cast<T*>(out_) + q * stride + m * att.width;
        int64_t c = 0;
        for (; c + 32 <= att.width; c += 32) gather<Simd<T, W>, 32 / W>(set, value, stride, c, out);
        for (; c + W <= att.width; c += W) gather<Simd<T, W>, 1>(set, value, stride, c, out);
        for (; c < att.width; ++c) gather<Simd<T, 1>, 1>(set, value, stride, c, out);
      }
    }
  }

  static void backward(const Attention& att, const void* grad_out_, void* grad_value_, void* grad_points,
                       void* grad_weights, int64_t begin, int64_t end) {
    Set set(att);
    const int64_t stride = att.heads * att.width;
    for (int64_t item = begin / att.heads; item * att.heads < end; ++item) {
      const int64_t first = begin > item * att.heads ? begin - item * att.heads : 0;
      const int64_t last = end < (item + 1) * att.heads ? end - item * att.heads : att.heads;
      const T* value = static_cast<const T*>(att.value) + item * att.pixels * stride;
      T* grad_value = static_cast<T*>(grad_value_) + item * att.pixels * stride;
      for (int64_t s = 0; s < att.pixels; ++s)
        memset(grad_value + s * stride + first * att.width, 0, (last - first) * att.width * sizeof(T));
      for (int64_t query = 0; query < att.queries; ++query) {
        set.set_query(item, query);
        for (int64_t m = first; m < last; ++m) {
          const int64_t q = item * att.queries + query, index = q * att.heads + m, head = m * att.width;
          const T* grad_out = static_cast<const T*>(grad_out_) + q * stride + head;
          set.set_head(index);
          for (Block& b : set) memset(b.dot, 0, sizeof b.dot);
          int64_t c = 0;
          for (; c + 32 <= att.width; c += 32)
            scatter<Simd<T, W>, 32 / W>(set, value + head, grad_value + head, stride, c, grad_out);
          for (; c + W <= att.width; c += W)
            scatter<Simd<T, W>, 1>(set, value + head, grad_value + head, stride, c, grad_out);
          for (; c < att.width; ++c)
            scatter<Simd<T, 1>, 1>(set, value + head, grad_value + head, stride, c, grad_out);
          set.write_gradients(index, static_cast<T*>(grad_points), static_cast<T*>(grad_weights));
        }
      }
    }
  }
};

}  // namespace

namespace themask {
extern const Kernels KERNELS = {Kernel<float, WIDTH>::forward, Kernel<float, WIDTH>::backward};
#ifdef WITH_DOUBLE
extern const Kernels kernels_double = {Kernel<double, WIDTH>::forward, Kernel<double, WIDTH>::backward};
#endif
}  // namespace themask
