// upsample_cross_entropy on the CPU: loss and gradient, a row of cells at a time.
//
// The lanes of a vector are neighbouring cells, each at its q-th pixel ("phase"): their corner scores then lie side by
// side in memory, and the sum over a cell's pixels that the gradient needs is a sum of vectors.

#include <atomic>
#include <cstring>
#include <limits>

#include "scores.h"

namespace ops_ext {
namespace {

// e^x for x <= 0, at least e^-87; NaN for NaN. x = n ln 2 + r; 2^n is put together from its bits: adding 1.5 * 2^23
// rounds to an integer and leaves it in the low bits of the sum.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? (Floats{} - 87.0f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  // Fitted on [-ln 2 / 2, ln 2 / 2], where its relative error is 1.1e-8.
  Floats p = r * 1.393364823e-3f + 8.363181545e-3f;
  p = p * r + 4.166646496e-2f;
  p = p * r + 1.666657697e-1f;
  p = p * r + 5.000000013e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints bits = ((Ints)shifted - 0x4b400000 + 127) << 23;
  return p * (Floats)bits;
}

// Natural logarithm of x in [1, 2^100): x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)).
inline Floats logarithm(Floats x) {
  const Ints bits = (Ints)x;
  const Ints e = (bits - 0x3f3504f3) >> 23;
  const Floats m = (Floats)(bits - (e << 23));
  const Floats s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Floats series = s2 * (2.0f / 9) + 2.0f / 7;
  series = series * s2 + 2.0f / 5;
  series = series * s2 + 2.0f / 3;
  series = series * s2 + 2.0f;
  const Floats result = __builtin_convertvector(e, Floats) * 0.693147181f + series * s;
  return x == x ? result : x;
}

inline float lane_sum(const Floats& v) {
  float sum = v[0];
  for (int lane = 1; lane < LANES; ++lane) sum += v[lane];
  return sum;
}

class CrossEntropy {
  static constexpr int GROUP = 8;  // phases taken together: their scores stay in the first-level cache

 public:
  CrossEntropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& pixel_grad_, int64_t ignore_index_, bool align)
      : scores(logits), rows(scores.h, target.size(1), align), columns(scores.w, target.size(2), align),
        ignore_index(ignore_index_), labels(target.const_data_ptr()),
        wide_labels(target.scalar_type() == ScalarType::Long),
        label_strides{target.stride(0), target.stride(1), target.stride(2)},
        pixel_grad(pixel_grad_ ? static_cast<const float*>(pixel_grad_->const_data_ptr()) : nullptr),
        cells(round_up(scores.w, LANES)), block_phases(cells / LANES), class_weight(scores.classes, 1.0f) {
    for (int64_t j = 0; j < scores.w; ++j) {
      const int64_t count = columns.first(j + 1) - columns.first(j);
      phases = std::max(phases, count);
      block_phases[j / LANES] = std::max(block_phases[j / LANES], count);
    }
    pixel.assign(phases * cells, columns.out);
    upper.assign(phases * cells, 0.0f);
    for (int64_t x = 0; x < columns.out; ++x) {
      const int64_t j = columns.lower(x), at = (x - columns.first(j)) * cells + j;
      pixel[at] = static_cast<int32_t>(x);
      upper[at] = columns.upper(x);
    }
    const float* each = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
    for (int64_t k = 0; weight && k < scores.classes; ++k) class_weight[k] = each[k * weight->stride(0)];
  }

  // Losses go to `map` (N, H, W), zeroed, their derivatives to `grad` (N, C, h, w), zeroed; either may be null. Returns
  // the sums over all pixels of the losses and of the weights.
  std::tuple<double, double> run(float* map, float* grad, torch::headeronly::IntHeaderOnlyArrayRef grad_strides) {
    loss_map = map;
    std::vector<double> sums(2 * scores.n * scores.h, 0.0);
    // Neighbouring intervals share a row of the gradient: first the even ones, then the odd, so that every row receives
    // its two parts in the same order whatever the number of threads.
    for (int64_t parity = 0; parity < 2; ++parity) {
      const int64_t per_image = (scores.h + 1 - parity) / 2;
      torch::stable::parallel_for(0, scores.n * per_image, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(*this, grad != nullptr);
        for (int64_t at = begin; at < end; ++at) {
          const int64_t n = at / per_image, i = at % per_image * 2 + parity;
          interval(n, i, scratch, &sums[2 * (n * scores.h + i)]);
          if (grad) add_gradient(n, i, scratch, grad, grad_strides);
        }
      });
    }
    STD_TORCH_CHECK(bad_label == NONE, "target holds ", bad_label.load(), ", expected labels from 0 to ",
                    scores.classes - 1, " or ", ignore_index, " (ignore_index)");
    double loss = 0, total = 0;
    for (size_t at = 0; at < sums.size(); at += 2) loss += sums[at], total += sums[at + 1];
    return {loss, total};
  }

 private:
  const Scores scores;
  const Axis rows, columns;
  const int64_t ignore_index;
  const void* const labels;
  const bool wide_labels;
  const int64_t label_strides[3];
  const float* const pixel_grad;      // gradient of each pixel's loss (N, H, W), or null for 1
  const int64_t cells;                // per row, padded to whole vectors
  int64_t phases = 0;                 // the most output columns that a cell has
  std::vector<int64_t> block_phases;  // the most output columns of a cell, for each vector of cells
  std::vector<int32_t> pixel;         // [phase][cell]: the output column, or columns.out where the cell has fewer
  std::vector<float> upper;           // [phase][cell]: its share of the cell's right side
  std::vector<float> class_weight;
  float* loss_map = nullptr;

  static constexpr int64_t NONE = 0;  // a label that is never bad
  std::atomic<int64_t> bad_label{NONE};

  struct Scratch {
    std::vector<float> top, bottom, row;      // scores of the interval's sides, and of one output row: [class][stride]
    std::vector<float> sides[4];              // gradient at the cells' corners: [class][cells]
    std::vector<int32_t> label, label_phase;  // of an output row; by [phase][cell]; -1 where nothing counts
    std::vector<float> factor, factor_phase;  // of -log p of the label
    std::vector<Floats> exps;                 // [class][phase of the group]

    Scratch(const CrossEntropy& op, bool with_grad)
        : top(op.scores.classes * op.scores.row_stride), bottom(top.size()), row(top.size()), label(op.columns.out + 1),
          label_phase(op.phases * op.cells), factor(label.size()), factor_phase(label_phase.size()),
          exps(op.scores.classes * GROUP) {
      if (with_grad)
        for (auto& side : sides) side.resize(op.scores.classes * op.cells);
    }
  };

  // Labels and factors of an output row, then the same in the order of phases and cells. Returns the sum of the
  // weights.
  double prepare(int64_t n, int64_t y, Scratch& s) {
    const int64_t width = columns.out, offset = n * label_strides[0] + y * label_strides[1];
    const float* row_grad = pixel_grad ? pixel_grad + (n * rows.out + y) * width : nullptr;
    double sum = 0;
    for (int64_t x = 0; x < width; ++x) {
      const int64_t at = offset + x * label_strides[2];
      int64_t label = wide_labels ? static_cast<const int64_t*>(labels)[at] : static_cast<const uint8_t*>(labels)[at];
      float weight = 0;
      if (label == ignore_index) {
        label = -1;
      } else if (label < 0 || label >= scores.classes) {
        bad_label = label;
        label = -1;
      } else {
        weight = class_weight[label];
      }
      sum += weight;
      s.label[x] = static_cast<int32_t>(label);
      s.factor[x] = row_grad && label >= 0 ? weight * row_grad[x] : weight;
    }
    s.label[width] = -1;
    s.factor[width] = 0;
    for (int64_t at = 0; at < phases * cells; ++at) s.label_phase[at] = s.label[pixel[at]];
    for (int64_t at = 0; at < phases * cells; ++at) s.factor_phase[at] = s.factor[pixel[at]];
    return sum;
  }

  void interval(int64_t n, int64_t i, Scratch& s, double* sums) {
    for (auto& side : s.sides) std::fill(side.begin(), side.end(), 0.0f);
    const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
    if (y0 == y1) return;
    scores.read(n, i, s.top.data());
    scores.read(n, std::min(i + 1, scores.h - 1), s.bottom.data());
    for (int64_t y = y0; y < y1; ++y) {
      sums[1] += prepare(n, y, s);
      const float h1 = rows.upper(y);
      for (size_t at = 0; at < s.row.size(); at += LANES)
        store(&s.row[at], (1 - h1) * load(&s.top[at]) + h1 * load(&s.bottom[at]));
      sums[0] += output_row(h1, s, loss_map ? loss_map + (n * rows.out + y) * columns.out : nullptr);
    }
  }

  double output_row(float h1, Scratch& s, float* map) {
    double sum = 0;
    for (int64_t block = 0; block < cells / LANES; ++block) {
      int64_t live[GROUP], count = 0;
      for (int64_t q = 0; q < block_phases[block]; ++q) {
        const int32_t* label = &s.label_phase[q * cells + block * LANES];
        int32_t all = -1;
        for (int lane = 0; lane < LANES; ++lane) all &= label[lane];
        if (all >= 0) live[count++] = q;  // at least one label is not negative
        if (count == GROUP) {
          sum += phase_group<GROUP>(h1, block * LANES, live, s, map);
          count = 0;
        }
      }
      int64_t* rest = live;
      if (count >= 4) sum += phase_group<4>(h1, block * LANES, rest, s, map), rest += 4, count -= 4;
      for (; count > 0; --count) sum += phase_group<1>(h1, block * LANES, rest++, s, map);
    }
    return sum;
  }

  template <int Q>
  struct Phases {
    Floats w0[Q], w1[Q], factor[Q], most[Q], mine[Q], sum[Q];
    Ints label[Q];
  };

  // Q phases of the cells from j on: softmax and losses, gradient at the cells' sides.
  template <int Q>
  double phase_group(float h1, int64_t j, const int64_t* phase, Scratch& s, float* map) const {
    Phases<Q> p;
    for (int q = 0; q < Q; ++q) {
      const int64_t at = phase[q] * cells + j;
      p.w1[q] = load(&upper[at]);
      p.w0[q] = 1.0f - p.w1[q];
      p.label[q] = load(&s.label_phase[at]);
      p.factor[q] = load(&s.factor_phase[at]);
    }
    softmax(p, s.row.data() + j, s.exps.data());
    Floats losses = {};
    for (int q = 0; q < Q; ++q) {
      Floats loss = p.factor[q] * (logarithm(p.sum[q]) + p.most[q] - p.mine[q]);
      loss = p.label[q] >= 0 ? loss : Floats{};
      losses += loss;
      if (map)
        for (int lane = 0; lane < LANES; ++lane)
          if (p.label[q][lane] >= 0) map[pixel[phase[q] * cells + j + lane]] = loss[lane];
    }
    if (!s.sides[0].empty()) add_to_sides(p, h1, j, s);
    return lane_sum(losses);
  }

  // Fills exps[class][Q], and of `p` the highest score, the label's, and the sum of the exponentials.
  template <int Q>
  void softmax(Phases<Q>& p, const float* row, Floats* exps) const {
    for (int q = 0; q < Q; ++q) {
      p.most[q] = Floats{} - std::numeric_limits<float>::infinity();
      p.mine[q] = p.sum[q] = Floats{};
    }
    for (int64_t k = 0; k < scores.classes; ++k) {
      const Floats left = load(row + k * scores.row_stride), right = load(row + k * scores.row_stride + 1);
      for (int q = 0; q < Q; ++q) {
        const Floats score = p.w0[q] * left + p.w1[q] * right;
        exps[k * Q + q] = score;
        p.most[q] = score > p.most[q] ? score : p.most[q];
        p.mine[q] = p.label[q] == int32_t(k) ? score : p.mine[q];
      }
    }
    for (int64_t k = 0; k < scores.classes; ++k)
      for (int q = 0; q < Q; ++q) {
        exps[k * Q + q] = exponential(exps[k * Q + q] - p.most[q]);
        p.sum[q] += exps[k * Q + q];
      }
  }

  template <int Q>
  void add_to_sides(const Phases<Q>& p, float h1, int64_t j, Scratch& s) const {
    const float h0 = 1 - h1;
    Floats scale[Q];
    for (int q = 0; q < Q; ++q) scale[q] = p.factor[q] / p.sum[q];
    for (int64_t k = 0; k < scores.classes; ++k) {
      Floats left = {}, right = {};
      for (int q = 0; q < Q; ++q) {
        const Floats mine = p.label[q] == int32_t(k) ? p.factor[q] : Floats{};
        const Floats each = s.exps[k * Q + q] * scale[q] - mine;
        left += p.w0[q] * each;
        right += p.w1[q] * each;
      }
      const int64_t at = k * cells + j;
      store(&s.sides[0][at], load(&s.sides[0][at]) + h0 * left);
      store(&s.sides[1][at], load(&s.sides[1][at]) + h0 * right);
      store(&s.sides[2][at], load(&s.sides[2][at]) + h1 * left);
      store(&s.sides[3][at], load(&s.sides[3][at]) + h1 * right);
    }
  }

  void add_gradient(int64_t n, int64_t i, const Scratch& s, float* grad,
                    torch::headeronly::IntHeaderOnlyArrayRef strides) const {
    const int64_t w = scores.w;
    for (int64_t side = 0; side < 2; ++side) {
      float* to = grad + n * strides[0] + std::min(i + side, scores.h - 1) * strides[2];
      for (int64_t k = 0; k < scores.classes; ++k) {
        const float* left = &s.sides[2 * side][k * cells];
        const float* right = &s.sides[2 * side + 1][k * cells];
        float* line = to + k * strides[1];
        for (int64_t j = 0; j < w; ++j)
          line[j * strides[3]] += left[j] + (j > 0 ? right[j - 1] : 0.0f) + (j + 1 == w ? right[j] : 0.0f);
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& pixel_grad, int64_t ignore_index,
                                                          bool align_corners, bool per_pixel, bool with_grad) {
  check_cross_entropy(logits, target, weight, pixel_grad);
  CrossEntropy op(logits, target, weight, pixel_grad, ignore_index, align_corners);
  Tensor loss = per_pixel ? torch::stable::new_zeros(logits, target.sizes()) : torch::stable::new_empty(logits, {});
  Tensor total = torch::stable::new_empty(logits, {});
  Tensor grad = with_grad ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  if (with_grad) torch::stable::zero_(grad);
  auto* const losses = static_cast<float*>(loss.mutable_data_ptr());
  auto* const derivatives = static_cast<float*>(grad.mutable_data_ptr());
  const auto [loss_sum, weight_sum] =
      op.run(per_pixel ? losses : nullptr, with_grad ? derivatives : nullptr, grad.strides());
  if (!per_pixel) *losses = static_cast<float>(loss_sum);
  *static_cast<float*>(total.mutable_data_ptr()) = static_cast<float>(weight_sum);
  return {loss, total, grad};
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&ops_ext::upsample_cross_entropy));
}
