// upsample_argmax on the CPU. Where the four corners of a cell have the same best class, so has all of the cell, since
// bilinear interpolation is a convex combination; elsewhere only the classes that can win are computed.

#include <cstring>
#include <limits>
#include <utility>

#include "scores.h"

namespace ops_ext {
namespace {

// Past this a product of bilinear weights could overflow; such scores, infinities and NaN take the slow path.
constexpr float ORDINARY = std::numeric_limits<float>::max() / 8;
constexpr int STRIP = 8;  // output pixels side by side that are evaluated at once: a cell at the network's own scale

// One low-resolution row: its scores, and of each column the first class with the highest one, and whether all are
// ordinary.
struct LabelledRow {
  std::vector<float> scores;
  std::vector<uint8_t> label, ordinary;

  explicit LabelledRow(const Scores& s)
      : scores(s.classes * s.row_stride), label(s.row_stride), ordinary(s.row_stride) {}

  void read(const Scores& s, int64_t n, int64_t i) {
    s.read(n, i, scores.data());
    for (int64_t j = 0; j <= s.w; j += LANES) {
      Floats best = load(&scores[j]);
      Ints winner = {}, fine = (best <= ORDINARY) & (best >= -ORDINARY);
      for (int64_t k = 1; k < s.classes; ++k) {
        const Floats score = load(&scores[k * s.row_stride + j]);
        const Ints better = score > best;
        best = better ? score : best;
        winner = better ? (Ints{} + int32_t(k)) : winner;
        fine &= (score <= ORDINARY) & (score >= -ORDINARY);
      }
      for (int lane = 0; lane < LANES; ++lane) {
        label[j + lane] = static_cast<uint8_t>(winner[lane]);
        ordinary[j + lane] = fine[lane] != 0;
      }
    }
  }
};

// The cell between the columns j and j + 1 of two rows.
struct Cell {
  const LabelledRow &top, &below;
  int64_t j;

  bool ordinary() const {
    return top.ordinary[j] & top.ordinary[j + 1] & below.ordinary[j] & below.ordinary[j + 1];
  }
  bool uniform() const {
    const uint8_t label = top.label[j];
    return (top.label[j + 1] == label) & (below.label[j] == label) & (below.label[j + 1] == label) & ordinary();
  }
};

class Argmax {
  using Strip = Vector<float, STRIP>;

 public:
  Argmax(const Tensor& logits, const Tensor& result, bool align)
      : scores(logits), rows(scores.h, result.size(1), align), columns(scores.w, result.size(2), align),
        out(static_cast<uint8_t*>(result.mutable_data_ptr())), first_column(scores.w + 1), upper(columns.out + STRIP) {
    for (int64_t j = 0; j <= scores.w; ++j) first_column[j] = columns.first(j);
    for (int64_t x = 0; x < columns.out; ++x) upper[x] = columns.upper(x);
  }

  void run() {
    torch::stable::parallel_for(0, scores.n * scores.h, 1, [this](int64_t begin, int64_t end) { run(begin, end); });
  }

 private:
  const Scores scores;
  const Axis rows, columns;
  uint8_t* const out;
  std::vector<int64_t> first_column;  // of each cell
  std::vector<float> upper;           // share of the right side, for each output column

  struct Candidate {
    float corner[4];
    int32_t label;
  };
  struct Scratch {
    std::vector<uint8_t> fill;
    std::vector<int64_t> mixed;
    std::vector<Candidate> candidates;
    std::vector<Strip> strip;
  };

  // Rows of cells, counted over all images.
  void run(int64_t begin, int64_t end) const {
    LabelledRow top(scores), bottom(scores);
    Scratch scratch{std::vector<uint8_t>(columns.out), std::vector<int64_t>(scores.w),
                    std::vector<Candidate>(scores.classes), std::vector<Strip>(2 * scores.classes)};
    int64_t in_bottom = -1;  // which row `bottom` holds
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / scores.h, i = at % scores.h;
      const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
      if (y0 == y1) continue;
      if (in_bottom == at)
        std::swap(top, bottom);
      else
        top.read(scores, n, i);
      const bool last = i + 1 == scores.h;
      in_bottom = last ? -1 : at + 1;
      if (!last) bottom.read(scores, n, i + 1);
      cells(top, last ? top : bottom, n, y0, y1, scratch);
    }
  }

  // A row of cells, of the output lines from y0 to y1 - 1.
  void cells(const LabelledRow& top, const LabelledRow& below, int64_t n, int64_t y0, int64_t y1,
             Scratch& scratch) const {
    int64_t count = 0;
    for (int64_t j = 0; j < scores.w; ++j) {
      const int64_t x0 = first_column[j], x1 = first_column[j + 1];
      if (x0 == x1) continue;
      if (!Cell{top, below, j}.uniform()) scratch.mixed[count++] = j;
      for (int64_t x = x0; x < x1; ++x) scratch.fill[x] = top.label[j];
    }
    for (int64_t y = y0; y < y1; ++y) std::memcpy(line(n, y), scratch.fill.data(), columns.out);
    for (int64_t c = 0; c < count; ++c) {
      const Cell cell{top, below, scratch.mixed[c]};
      if (cell.ordinary())
        mixed_cell(cell, n, y0, y1, scratch);
      else
        odd_cell(cell, n, y0, y1);
    }
  }

  uint8_t* line(int64_t n, int64_t y) const { return out + (n * rows.out + y) * columns.out; }

  // The classes that can win somewhere in the cell: a class that is lower at all four corners than the winner of one of
  // them is lower everywhere between. The lanes are the four winners.
  int64_t select(const Cell& cell, std::vector<Candidate>& candidates) const {
    using Four = Vector<float, 4>;
    const float *top = &cell.top.scores[cell.j], *below = &cell.below.scores[cell.j];
    const uint8_t winner[4] = {cell.top.label[cell.j], cell.top.label[cell.j + 1], cell.below.label[cell.j],
                               cell.below.label[cell.j + 1]};
    Four a_bar, b_bar, c_bar, d_bar;
    for (int v = 0; v < 4; ++v) {
      const int64_t at = winner[v] * scores.row_stride;
      a_bar[v] = top[at], b_bar[v] = top[at + 1], c_bar[v] = below[at], d_bar[v] = below[at + 1];
    }
    int64_t count = 0;
    for (int64_t k = 0; k < scores.classes; ++k, top += scores.row_stride, below += scores.row_stride) {
      const float a = top[0], b = top[1], c = below[0], d = below[1];
      const auto lower = (Four{} + a < a_bar) & (Four{} + b < b_bar) & (Four{} + c < c_bar) & (Four{} + d < d_bar);
      const auto halves = (Vector<int64_t, 2>)lower;
      candidates[count] = {{a, b, c, d}, int32_t(k)};
      count += !(halves[0] | halves[1]);  // without a branch: on noise it would be taken at random
    }
    return count;
  }

  void mixed_cell(const Cell& cell, int64_t n, int64_t y0, int64_t y1, Scratch& scratch) const {
    const int64_t count = select(cell, scratch.candidates), x1 = first_column[cell.j + 1];
    const Candidate* candidates = scratch.candidates.data();
    Strip* strip = scratch.strip.data();
    for (int64_t x = first_column[cell.j]; x < x1; x += STRIP) {
      const Strip w1 = load<STRIP>(&upper[x]), w0 = 1.0f - w1;
      for (int64_t c = 0; c < count; ++c) {
        const float* corner = candidates[c].corner;
        strip[2 * c] = w0 * corner[0] + w1 * corner[1];
        strip[2 * c + 1] = w0 * corner[2] + w1 * corner[3];
      }
      for (int64_t y = y0; y < y1; ++y) {
        const float h1 = rows.upper(y), h0 = 1 - h1;
        Strip best = h0 * strip[0] + h1 * strip[1];
        Vector<int32_t, STRIP> label = Vector<int32_t, STRIP>{} + candidates[0].label;
        for (int64_t c = 1; c < count; ++c) {
          const Strip score = h0 * strip[2 * c] + h1 * strip[2 * c + 1];
          const auto better = score > best;
          best = better ? score : best;
          label = better ? (Vector<int32_t, STRIP>{} + candidates[c].label) : label;
        }
        const auto bytes = __builtin_convertvector(label, Vector<uint8_t, STRIP>);
        std::memcpy(line(n, y) + x, &bytes, std::min<int64_t>(STRIP, x1 - x));
      }
    }
  }

  // As PyTorch computes it, term by term, and with its argmax, for which a NaN is higher than any number.
  void odd_cell(const Cell& cell, int64_t n, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = first_column[cell.j]; x < first_column[cell.j + 1]; ++x) {
        const float *top = &cell.top.scores[cell.j], *below = &cell.below.scores[cell.j];
        const float h1 = rows.upper(y), h0 = 1 - h1, w1 = upper[x], w0 = 1 - w1;
        float best = 0;
        int64_t winner = -1;
        for (int64_t k = 0; k < scores.classes; ++k, top += scores.row_stride, below += scores.row_stride) {
          const float score = h0 * (w0 * top[0] + w1 * top[1]) + h1 * (w0 * below[0] + w1 * below[1]);
          if (winner < 0 || score > best || std::isnan(score)) best = score, winner = k;
          if (std::isnan(score)) break;
        }
        line(n, y)[x] = static_cast<uint8_t>(winner);
      }
  }
};

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_logits(logits);
  const bool fits = logits.size(1) <= 256 && height >= 1 && width >= 1;
  STD_TORCH_CHECK(fits, "expected at most 256 classes, and a size from 1x1 on");
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  Argmax(logits, out, align_corners).run();
  return out;
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&ops_ext::upsample_argmax)); }
