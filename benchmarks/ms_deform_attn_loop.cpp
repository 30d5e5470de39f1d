// MSDeformAttn as a plain C++ loop: what one gets by writing the formula down, the yardstick for the kernels. Softmax and
// location arithmetic inside, as in the fused op; items and heads in parallel. sizes: n, pixels, heads, width, queries,
// levels, points, then h, w of each level. grad_out null: forward only.
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void plain_loop(const int64_t* sizes, const float* value, const float* reference, const float* offsets,
                           const float* logits, float* out, const float* grad_out, float* grad_value,
                           float* grad_offsets, float* grad_logits) {
  const int64_t n = sizes[0], pixels = sizes[1], heads = sizes[2], width = sizes[3], queries = sizes[4];
  const int64_t levels = sizes[5], points = sizes[6], count = levels * points;
#pragma omp parallel for collapse(2)
  for (int64_t item = 0; item < n; ++item)
    for (int64_t m = 0; m < heads; ++m)
      for (int64_t q = 0; q < queries; ++q) {
        const int64_t pair = (item * queries + q) * heads + m;
        float largest = -INFINITY, sum = 0, mean = 0;
        for (int64_t k = 0; k < count; ++k) largest = std::fmax(largest, logits[pair * count + k]);
        for (int64_t k = 0; k < count; ++k) sum += std::exp(logits[pair * count + k] - largest);
        for (int64_t d = 0; d < width && !grad_out; ++d) out[pair * width + d] = 0;
        std::vector<float> grad_weight(count);
        for (int64_t l = 0, start = 0; l < levels; ++l) {
          const int64_t h = sizes[7 + 2 * l], w = sizes[8 + 2 * l];
          for (int64_t p = 0; p < points; ++p) {
            const int64_t k = l * points + p, at = pair * count + k;
            const float weight = std::exp(logits[at] - largest) / sum;
            const float x = reference[(q * levels + l) * 2] * w - 0.5f + offsets[2 * at];
            const float y = reference[(q * levels + l) * 2 + 1] * h - 0.5f + offsets[2 * at + 1];
            if (grad_out) grad_offsets[2 * at] = grad_offsets[2 * at + 1] = 0;
            if (!(x > -1 && x < w && y > -1 && y < h)) continue;
            const int64_t x0 = std::floor(x), y0 = std::floor(y);
            for (int64_t corner = 0; corner < 4; ++corner) {
              const int64_t cx = x0 + corner % 2, cy = y0 + corner / 2;
              if (cx < 0 || cx >= w || cy < 0 || cy >= h) continue;
              const float wx = corner % 2 ? x - x0 : 1 - (x - x0), wy = corner / 2 ? y - y0 : 1 - (y - y0);
              const int64_t row = ((item * pixels + start + cy * w + cx) * heads + m) * width;
              if (!grad_out) {
                for (int64_t d = 0; d < width; ++d) out[pair * width + d] += weight * wx * wy * value[row + d];
                continue;
              }
              float dot = 0;
              for (int64_t d = 0; d < width; ++d) {
                dot += value[row + d] * grad_out[pair * width + d];
                grad_value[row + d] += weight * wx * wy * grad_out[pair * width + d];
              }
              grad_weight[k] += wx * wy * dot;
              grad_offsets[2 * at] += weight * (corner % 2 ? wy : -wy) * dot;
              grad_offsets[2 * at + 1] += weight * (corner / 2 ? wx : -wx) * dot;
            }
            mean += weight * grad_weight[k];
          }
          start += h * w;
        }
        for (int64_t k = 0; k < count && grad_out; ++k) {
          const int64_t at = pair * count + k;
          grad_logits[at] = std::exp(logits[at] - largest) / sum * (grad_weight[k] - mean);
        }
      }
}
