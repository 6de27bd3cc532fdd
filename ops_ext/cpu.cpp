// The CPU kernels of the operators around the network.
//
// Vectors are GCC's and Clang's vector types, as wide as the machine's registers; threads are PyTorch's own. Work is shared out
// over the rows of cells between two low-resolution rows; scratch memory is allocated once per thread and call.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common.h"

namespace ops_ext {
namespace {

using torch::stable::parallel_for;

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // what a comparison of vectors of T gives
template <class T>
constexpr int LANES = REGISTER_BYTES / sizeof(T);
template <class T>
using Vec = typename VectorOf<T, REGISTER_BYTES>::type;
template <class T>
using IntVec = typename VectorOf<IntOf<T>, REGISTER_BYTES>::type;

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class V>
inline bool any(const V& mask) {
  uint64_t words[sizeof(V) / 8], all = 0;
  std::memcpy(words, &mask, sizeof(V));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ------------------------------------------------------------------------------------------------------- rows of class scores

// One low-resolution row as scores[class][stride]: w values, the last one once more (the right side of the last cell), zeros.
template <class Source, class T>
void load_row(const void* data, const int64_t* strides, int64_t classes, int64_t w, int64_t n, int64_t i, int64_t stride, T* row) {
  const Source* from = static_cast<const Source*>(data) + n * strides[0] + i * strides[2];
  const int64_t over_classes = strides[1], over_columns = strides[3];
  if (over_classes == 1) {  // channels_last
    for (int64_t j = 0; j < w; ++j)
      for (int64_t k = 0; k < classes; ++k) row[k * stride + j] = static_cast<T>(from[j * over_columns + k]);
  } else {
    for (int64_t k = 0; k < classes; ++k) {
      const Source* line = from + k * over_classes;
      if (over_columns == 1)
        for (int64_t j = 0; j < w; ++j) row[k * stride + j] = static_cast<T>(line[j]);
      else
        for (int64_t j = 0; j < w; ++j) row[k * stride + j] = static_cast<T>(line[j * over_columns]);
    }
  }
  for (int64_t k = 0; k < classes; ++k) {
    row[k * stride + w] = row[k * stride + w - 1];
    std::fill(row + k * stride + w + 1, row + (k + 1) * stride, T(0));
  }
}

template <class T>
using RowLoader = void (*)(const void*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);

template <class T>
RowLoader<T> row_loader(ScalarType type) {
  if constexpr (std::is_same_v<T, double>) return load_row<double, double>;
  if (type == ScalarType::BFloat16) return load_row<c10::BFloat16, T>;
  if (type == ScalarType::Half) return load_row<c10::Half, T>;
  return load_row<float, T>;
}

template <class T>
struct Scores {  // (N, C, h, w) logits of any strides and floating dtype, read row by row as T
  const void* data;
  int64_t strides[4];
  int64_t n, classes, h, w;
  int64_t row_stride;  // of a row as read: w + 1 columns, and room to load whole vectors from any of them
  RowLoader<T> loader;

  explicit Scores(const Tensor& logits)
      : data(logits.const_data_ptr()), n(logits.size(0)), classes(logits.size(1)), h(logits.size(2)), w(logits.size(3)),
        row_stride(round_up(w + 1, LANES<T>) + LANES<T>), loader(row_loader<T>(logits.scalar_type())) {
    for (int d = 0; d < 4; ++d) strides[d] = logits.stride(d);
  }
  void read(int64_t image, int64_t i, T* row) const { loader(data, strides, classes, w, image, i, row_stride, row); }
};

// ------------------------------------------------------------------------------------------------------------ upsample_argmax

// Past this a product of bilinear weights could overflow; such scores, infinities and NaN take the slow path.
template <class T>
constexpr T ORDINARY = std::numeric_limits<T>::max() / 8;

// The first class with the highest score in each column, and whether all scores of the column are ordinary.
template <class T>
void label_row(const T* row, int64_t classes, int64_t stride, int64_t w, uint8_t* label, uint8_t* ordinary) {
  using V = Vec<T>;
  using I = IntVec<T>;
  for (int64_t j = 0; j <= w; j += LANES<T>) {
    V best = load<V>(row + j);
    I winner = {};
    I fine = (best <= ORDINARY<T>) & (best >= -ORDINARY<T>);
    for (int64_t k = 1; k < classes; ++k) {
      const V score = load<V>(row + k * stride + j);
      const I better = score > best;
      best = better ? score : best;
      winner = better ? (I{} + IntOf<T>(k)) : winner;
      fine &= (score <= ORDINARY<T>) & (score >= -ORDINARY<T>);
    }
    for (int lane = 0; lane < LANES<T>; ++lane) {
      label[j + lane] = static_cast<uint8_t>(winner[lane]);
      ordinary[j + lane] = fine[lane] != 0;
    }
  }
}

template <class T>
struct ArgmaxRow {
  std::vector<T> scores;
  std::vector<uint8_t> label, ordinary;
  ArgmaxRow(int64_t classes, int64_t stride) : scores(classes * stride), label(stride), ordinary(stride) {}
};

// As PyTorch computes it, term by term, and with its argmax, for which a NaN is higher than any number.
template <class T>
uint8_t argmax_at(const T* top, const T* bottom, int64_t classes, int64_t stride, T h1, T w1) {
  const T h0 = 1 - h1, w0 = 1 - w1;
  T best = 0;
  int64_t winner = -1;
  for (int64_t k = 0; k < classes; ++k, top += stride, bottom += stride) {
    const T score = h0 * (w0 * top[0] + w1 * top[1]) + h1 * (w0 * bottom[0] + w1 * bottom[1]);
    if (std::isnan(score)) return static_cast<uint8_t>(k);
    if (winner < 0 || score > best) best = score, winner = k;
  }
  return static_cast<uint8_t>(winner);
}

constexpr int STRIP = 8;  // output pixels side by side that are evaluated at once: a cell at the network's own scale

template <class T>
class Argmax {
  using V = typename VectorOf<T, STRIP * sizeof(T)>::type;
  using I = typename VectorOf<IntOf<T>, STRIP * sizeof(T)>::type;
  using Labels = typename VectorOf<uint8_t, STRIP>::type;

 public:
  Argmax(const Tensor& logits, const Tensor& out, bool align)
      : scores(logits), rows(scores.h, out.size(1), align), columns(scores.w, out.size(2), align),
        out(static_cast<uint8_t*>(out.mutable_data_ptr())), first_column(scores.w + 1), upper(columns.out + STRIP) {
    for (int64_t j = 0; j <= scores.w; ++j) first_column[j] = columns.first(j);
    for (int64_t x = 0; x < columns.out; ++x) upper[x] = columns.upper(x);
  }

  void run() {
    parallel_for(0, scores.n * scores.h, 1, [this](int64_t begin, int64_t end) { intervals(begin, end); });
  }

 private:
  const Scores<T> scores;
  const Axis<T> rows, columns;
  uint8_t* const out;
  std::vector<int64_t> first_column;  // of each cell
  std::vector<T> upper;               // share of the right side, for each output column

  struct Candidate {
    T corner[4];
    IntOf<T> label;
  };

  void intervals(int64_t begin, int64_t end) const {
    ArgmaxRow<T> top(scores.classes, scores.row_stride), bottom(scores.classes, scores.row_stride);
    std::vector<uint8_t> fill(columns.out);
    std::vector<int64_t> mixed(scores.w);
    std::vector<Candidate> candidates(scores.classes);
    std::vector<V> strip(2 * scores.classes);
    int64_t in_bottom = -1;  // which row of which image `bottom` holds
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / scores.h, i = at % scores.h;
      const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
      if (y0 == y1) continue;
      if (in_bottom == at)
        std::swap(top, bottom);
      else
        read(n, i, top);
      const bool last = i + 1 == scores.h;
      if (!last) {
        read(n, i + 1, bottom);
        in_bottom = at + 1;
      } else {
        in_bottom = -1;
      }
      const ArgmaxRow<T>& below = last ? top : bottom;
      const int64_t count = split(top, below, fill.data(), mixed.data());
      for (int64_t y = y0; y < y1; ++y) std::memcpy(line(n, y), fill.data(), columns.out);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t j = mixed[c];
        const bool ordinary = top.ordinary[j] & top.ordinary[j + 1] & below.ordinary[j] & below.ordinary[j + 1];
        if (ordinary)
          cell(top, below, n, j, y0, y1, candidates.data(), strip.data());
        else
          odd_cell(top, below, n, j, y0, y1);
      }
    }
  }

  void read(int64_t n, int64_t i, ArgmaxRow<T>& row) const {
    scores.read(n, i, row.scores.data());
    label_row(row.scores.data(), scores.classes, scores.row_stride, scores.w, row.label.data(), row.ordinary.data());
  }

  uint8_t* line(int64_t n, int64_t y) const { return out + (n * rows.out + y) * columns.out; }

  // Cells whose four corners share their argmax have it throughout, since bilinear interpolation is a convex combination:
  // their labels go to `fill`, which serves all rows of the interval. Returns how many cells are left, listed in `mixed`.
  int64_t split(const ArgmaxRow<T>& top, const ArgmaxRow<T>& below, uint8_t* fill, int64_t* mixed) const {
    int64_t count = 0;
    for (int64_t j = 0; j < scores.w; ++j) {
      const int64_t x0 = first_column[j], x1 = first_column[j + 1];
      if (x0 == x1) continue;
      const uint8_t label = top.label[j];
      const bool same = (top.label[j + 1] == label) & (below.label[j] == label) & (below.label[j + 1] == label) &
                        top.ordinary[j] & top.ordinary[j + 1] & below.ordinary[j] & below.ordinary[j + 1];
      if (!same) mixed[count++] = j;
      for (int64_t x = x0; x < x1; ++x) fill[x] = label;
    }
    return count;
  }

  // The classes that can win somewhere in the cell: a class that is lower at all four corners than the winner of one of them
  // is lower everywhere between. The lanes are the four winners.
  int64_t select(const T* top, const T* below, const uint8_t (&winner)[4], Candidate* candidates) const {
    using Four = typename VectorOf<T, 4 * sizeof(T)>::type;
    using Mask = typename VectorOf<IntOf<T>, 4 * sizeof(T)>::type;
    Four a_bar, b_bar, c_bar, d_bar;
    for (int v = 0; v < 4; ++v) {
      const int64_t at = winner[v] * scores.row_stride;
      a_bar[v] = top[at], b_bar[v] = top[at + 1], c_bar[v] = below[at], d_bar[v] = below[at + 1];
    }
    int64_t count = 0;
    for (int64_t k = 0; k < scores.classes; ++k, top += scores.row_stride, below += scores.row_stride) {
      const T a = top[0], b = top[1], c = below[0], d = below[1];
      const Mask lower = (Four{} + a < a_bar) & (Four{} + b < b_bar) & (Four{} + c < c_bar) & (Four{} + d < d_bar);
      candidates[count] = {{a, b, c, d}, IntOf<T>(k)};
      count += !any(lower);  // without a branch: on noise it would be taken at random
    }
    return count;
  }

  void cell(const ArgmaxRow<T>& top, const ArgmaxRow<T>& below, int64_t n, int64_t j, int64_t y0, int64_t y1,
            Candidate* candidates, V* strip) const {
    const uint8_t winner[4] = {top.label[j], top.label[j + 1], below.label[j], below.label[j + 1]};
    const int64_t count = select(top.scores.data() + j, below.scores.data() + j, winner, candidates);
    for (int64_t x = first_column[j]; x < first_column[j + 1]; x += STRIP) {
      const V w1 = load<V>(&upper[x]), w0 = T(1) - w1;
      for (int64_t c = 0; c < count; ++c) {
        const T* corner = candidates[c].corner;
        strip[2 * c] = w0 * corner[0] + w1 * corner[1];
        strip[2 * c + 1] = w0 * corner[2] + w1 * corner[3];
      }
      const size_t wide = std::min<int64_t>(STRIP, first_column[j + 1] - x);
      for (int64_t y = y0; y < y1; ++y) {
        const T h1 = rows.upper(y), h0 = 1 - h1;
        V best = h0 * strip[0] + h1 * strip[1];
        I label = I{} + candidates[0].label;
        for (int64_t c = 1; c < count; ++c) {
          const V score = h0 * strip[2 * c] + h1 * strip[2 * c + 1];
          const I better = score > best;
          best = better ? score : best;
          label = better ? (I{} + candidates[c].label) : label;
        }
        const Labels bytes = __builtin_convertvector(label, Labels);
        std::memcpy(line(n, y) + x, &bytes, wide);
      }
    }
  }

  void odd_cell(const ArgmaxRow<T>& top, const ArgmaxRow<T>& below, int64_t n, int64_t j, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = first_column[j]; x < first_column[j + 1]; ++x)
        line(n, y)[x] = argmax_at(&top.scores[j], &below.scores[j], scores.classes, scores.row_stride, rows.upper(y), upper[x]);
  }
};

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_argmax(logits, height, width);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  if (logits.scalar_type() == ScalarType::Double)
    Argmax<double>(logits, out, align_corners).run();
  else
    Argmax<float>(logits, out, align_corners).run();
  return out;
}

// ----------------------------------------------------------------------------------------------------- upsample_cross_entropy

// e^x for x <= 0, at least e^-87; NaN for NaN. x = n ln 2 + r; 2^n is put together from its bits: adding 1.5 * 2^23 rounds to
// an integer and leaves it in the low bits of the sum.
inline Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  using I = IntVec<float>;
  x = x < -87.0f ? (V{} - 87.0f) : x;
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  V p = r * 1.393364823e-3f + 8.363181545e-3f;  // fitted on [-ln 2 / 2, ln 2 / 2], where its relative error is 1.1e-8
  p = p * r + 4.166646496e-2f;
  p = p * r + 1.666657697e-1f;
  p = p * r + 5.000000013e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Natural logarithm of x in [1, 2^100): x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)).
inline Vec<float> logarithm(Vec<float> x) {
  using V = Vec<float>;
  using I = IntVec<float>;
  I bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const I e = (bits - 0x3f3504f3) >> 23;
  const I mantissa = bits - (e << 23);
  V m;
  std::memcpy(&m, &mantissa, sizeof(m));
  const V s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  V series = s2 * (2.0f / 9) + 2.0f / 7;
  series = series * s2 + 2.0f / 5;
  series = series * s2 + 2.0f / 3;
  series = series * s2 + 2.0f;
  const V result = __builtin_convertvector(e, V) * 0.693147181f + series * s;
  return x == x ? result : x;
}

inline Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < LANES<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

inline Vec<double> logarithm(Vec<double> x) {
  for (int lane = 0; lane < LANES<double>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

template <class V>
inline auto lane_sum(const V& v) {
  auto sum = v[0];
  for (size_t lane = 1; lane < sizeof(V) / sizeof(sum); ++lane) sum += v[lane];
  return sum;
}

// What the loss is made of, beside logits and labels.
template <class T>
struct LossTerms {
  int64_t ignore_index;
  const T* weight;        // per class, or null for 1
  int64_t weight_stride;
  T smoothing;            // label smoothing over the number of classes
  T hard;                 // 1 - label smoothing
  const T* pixel_grad;    // gradient of each pixel's loss (N, H, W), or null for 1
};

// Loss and gradient, a row of cells at a time. The lanes of a vector are neighbouring cells, each at its q-th pixel ("phase"):
// their corner scores then lie side by side in memory, and the sum over a cell's pixels that the gradient needs is a sum of
// vectors. The gradient of the sum of losses is taken with the loss, so that the softmax is computed once.
template <class T>
class CrossEntropy {
  using V = Vec<T>;
  using I = IntVec<T>;
  using Int = IntOf<T>;
  static constexpr int L = LANES<T>;
  static constexpr int GROUP = 8;  // phases taken together: their scores stay in the first-level cache

 public:
  CrossEntropy(const Tensor& logits, const Tensor& target, const LossTerms<T>& terms, bool align)
      : scores(logits), rows(scores.h, target.size(1), align), columns(scores.w, target.size(2), align), terms(terms),
        labels(target.const_data_ptr()), wide_labels(target.scalar_type() == ScalarType::Long),
        cells(round_up(scores.w, L)) {
    for (int d = 0; d < 3; ++d) label_strides[d] = target.stride(d);
    for (int64_t j = 0; j < scores.w; ++j) phases = std::max(phases, columns.first(j + 1) - columns.first(j));
    pixel.assign(phases * cells, columns.out);
    upper.assign(phases * cells, T(0));
    block_phases.assign(cells / L, 0);
    for (int64_t j = 0; j < scores.w; ++j) {
      const int64_t x0 = columns.first(j), count = columns.first(j + 1) - x0;
      block_phases[j / L] = std::max(block_phases[j / L], count);
      for (int64_t q = 0; q < count; ++q) {
        pixel[q * cells + j] = static_cast<int32_t>(x0 + q);
        upper[q * cells + j] = columns.upper(x0 + q);
      }
    }
    class_weight.assign(scores.classes, T(1));
    for (int64_t k = 0; terms.weight && k < scores.classes; ++k) class_weight[k] = terms.weight[k * terms.weight_stride];
    for (T each : class_weight) weight_sum += each;
  }

  T* loss_map = nullptr;  // (N, H, W) contiguous, if wanted
  T* grad = nullptr;      // (N, C, h, w) with grad_strides, zeroed, if wanted
  int64_t grad_strides[4] = {};
  double loss = 0, total = 0;  // sums over all pixels: losses, weights

  void run() {
    std::vector<double> sums(2 * scores.n * scores.h, 0.0);
    // Neighbouring intervals share a row of the gradient: first the even ones, then the odd, so that every row receives its
    // two parts in the same order whatever the number of threads.
    for (int64_t parity = 0; parity < 2; ++parity) {
      const int64_t per_image = (scores.h + 1 - parity) / 2;
      parallel_for(0, scores.n * per_image, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(*this);
        for (int64_t at = begin; at < end; ++at) {
          const int64_t n = at / per_image, i = at % per_image * 2 + parity;
          interval(n, i, scratch, &sums[2 * (n * scores.h + i)]);
        }
      });
    }
    check(bad_label == NONE, "target holds ", bad_label.load(), ", expected labels from 0 to ", scores.classes - 1, " or ",
          terms.ignore_index, " (ignore_index)");
    for (size_t at = 0; at < sums.size(); at += 2) loss += sums[at], total += sums[at + 1];
  }

 private:
  const Scores<T> scores;
  const Axis<T> rows, columns;
  const LossTerms<T> terms;
  const void* const labels;
  const bool wide_labels;
  int64_t label_strides[3];
  const int64_t cells;                 // per row, padded to whole vectors
  int64_t phases = 0;                  // the most output columns that a cell has
  std::vector<int32_t> pixel;          // [phase][cell]: the output column, or columns.out where the cell has fewer
  std::vector<T> upper;                // [phase][cell]: its share of the cell's right side
  std::vector<int64_t> block_phases;   // the most output columns of a cell, for each vector of cells
  std::vector<T> class_weight;
  T weight_sum = 0;

  static constexpr int64_t NONE = 0;  // a label that is never bad
  std::atomic<int64_t> bad_label{NONE};

  struct Scratch {
    std::vector<T> top, bottom, row;        // scores of the interval's sides, and of one output row: [class][stride]
    std::vector<T> sides[4];                // gradient at the cells' corners: [class][cells]
    std::vector<Int> label, label_phase;    // of an output row; by [phase][cell]; -1 where nothing counts
    std::vector<T> hard, hard_phase;        // factor of -log p of the label
    std::vector<T> soft, soft_phase;        // factor of the sum of -log p of all classes
    std::vector<V> exps;                    // [class][phase of the group]
    explicit Scratch(const CrossEntropy& op)
        : top(op.scores.classes * op.scores.row_stride), bottom(top.size()), row(top.size()), label(op.columns.out + 1),
          label_phase(op.phases * op.cells), hard(label.size()), hard_phase(label_phase.size()), soft(label.size()),
          soft_phase(label_phase.size()), exps(op.scores.classes * GROUP) {
      if (op.grad)
        for (auto& side : sides) side.resize(op.scores.classes * op.cells);
    }
  };

  int64_t label_at(int64_t offset) const {
    return wide_labels ? static_cast<const int64_t*>(labels)[offset] : static_cast<const uint8_t*>(labels)[offset];
  }

  // Labels and factors of an output row, then the same in the order of phases and cells. Returns the sum of the weights.
  double prepare(int64_t n, int64_t y, Scratch& s) {
    const int64_t width = columns.out, offset = n * label_strides[0] + y * label_strides[1];
    const T* pixel_grad = terms.pixel_grad ? terms.pixel_grad + (n * rows.out + y) * width : nullptr;
    double sum = 0;
    for (int64_t x = 0; x < width; ++x) {
      int64_t label = label_at(offset + x * label_strides[2]);
      T weight = 0, factor = 0;
      if (label == terms.ignore_index) {
        label = -1;
      } else if (label < 0 || label >= scores.classes) {
        bad_label = label;
        label = -1;
      } else {
        weight = class_weight[label];
        factor = pixel_grad ? pixel_grad[x] : T(1);
      }
      sum += weight;
      s.label[x] = static_cast<Int>(label);
      s.hard[x] = terms.hard * weight * factor;
      s.soft[x] = terms.smoothing * factor;
    }
    s.label[width] = -1;
    s.hard[width] = s.soft[width] = 0;
    for (int64_t at = 0; at < phases * cells; ++at) s.label_phase[at] = s.label[pixel[at]];
    for (int64_t at = 0; at < phases * cells; ++at) s.hard_phase[at] = s.hard[pixel[at]];
    if (terms.smoothing != 0)
      for (int64_t at = 0; at < phases * cells; ++at) s.soft_phase[at] = s.soft[pixel[at]];
    return sum;
  }

  void interval(int64_t n, int64_t i, Scratch& s, double* sums) {
    const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
    if (y0 == y1) return;
    scores.read(n, i, s.top.data());
    scores.read(n, std::min(i + 1, scores.h - 1), s.bottom.data());
    if (grad)
      for (auto& side : s.sides) std::fill(side.begin(), side.end(), T(0));
    for (int64_t y = y0; y < y1; ++y) {
      sums[1] += prepare(n, y, s);
      const T h1 = rows.upper(y), h0 = 1 - h1;
      for (size_t at = 0; at < s.row.size(); at += L)
        store(&s.row[at], h0 * load<V>(&s.top[at]) + h1 * load<V>(&s.bottom[at]));
      T* map = loss_map ? loss_map + (n * rows.out + y) * columns.out : nullptr;
      if (map) std::fill(map, map + columns.out, T(0));
      sums[0] += terms.smoothing != 0 ? output_row<true>(h0, h1, s, map) : output_row<false>(h0, h1, s, map);
    }
    if (grad) add_gradient(n, i, s);
  }

  template <bool SMOOTH>
  double output_row(T h0, T h1, Scratch& s, T* map) {
    double sum = 0;
    for (int64_t block = 0; block < cells / L; ++block) {
      int64_t live[GROUP], count = 0;
      for (int64_t q = 0; q < block_phases[block]; ++q) {
        const Int* label = &s.label_phase[q * cells + block * L];
        Int all = -1;
        for (int lane = 0; lane < L; ++lane) all &= label[lane];
        if (all >= 0) live[count++] = q;  // at least one label is not negative
        if (count == GROUP) {
          sum += phase_group<SMOOTH, GROUP>(h0, h1, block * L, live, s, map);
          count = 0;
        }
      }
      int64_t* rest = live;
      if (count >= 4) sum += phase_group<SMOOTH, 4>(h0, h1, block * L, rest, s, map), rest += 4, count -= 4;
      for (; count > 0; --count) sum += phase_group<SMOOTH, 1>(h0, h1, block * L, rest++, s, map);
    }
    return sum;
  }

  // Q phases of the cells from j on: scores and their maximum, softmax and loss, gradient at the cells' sides.
  template <bool SMOOTH, int Q>
  double phase_group(T h0, T h1, int64_t j, const int64_t* phase, Scratch& s, T* map) {
    V w0[Q], w1[Q], most[Q], mine[Q], spread[Q], scale[Q], hard[Q], soft[Q];
    I label[Q];
    for (int q = 0; q < Q; ++q) {
      const int64_t at = phase[q] * cells + j;
      w1[q] = load<V>(&upper[at]);
      w0[q] = T(1) - w1[q];
      label[q] = load<I>(&s.label_phase[at]);
      most[q] = V{} - std::numeric_limits<T>::infinity();
      mine[q] = spread[q] = V{};
    }
    V* exps = s.exps.data();
    const T* row = s.row.data() + j;
    for (int64_t k = 0; k < scores.classes; ++k, row += scores.row_stride, exps += Q) {
      const V left = load<V>(row), right = load<V>(row + 1);
      for (int q = 0; q < Q; ++q) {
        const V score = w0[q] * left + w1[q] * right;
        exps[q] = score;
        most[q] = score > most[q] ? score : most[q];
        mine[q] = label[q] == Int(k) ? score : mine[q];
        if constexpr (SMOOTH) spread[q] += class_weight[k] * score;
      }
    }
    V sum[Q];
    for (int q = 0; q < Q; ++q) sum[q] = V{};
    exps = s.exps.data();
    for (int64_t k = 0; k < scores.classes; ++k, exps += Q)
      for (int q = 0; q < Q; ++q) {
        exps[q] = exponential(exps[q] - most[q]);
        sum[q] += exps[q];
      }
    V losses = {};
    for (int q = 0; q < Q; ++q) {
      const int64_t at = phase[q] * cells + j;
      hard[q] = load<V>(&s.hard_phase[at]);
      const V log_sum = logarithm(sum[q]) + most[q];
      V loss = hard[q] * (log_sum - mine[q]);
      scale[q] = hard[q];
      if constexpr (SMOOTH) {
        soft[q] = load<V>(&s.soft_phase[at]);
        loss += soft[q] * (weight_sum * log_sum - spread[q]);
        scale[q] += soft[q] * weight_sum;
      }
      scale[q] /= sum[q];
      loss = label[q] >= 0 ? loss : V{};
      losses += loss;
      if (map)
        for (int lane = 0; lane < L; ++lane)
          if (label[q][lane] >= 0) map[pixel[at + lane]] = loss[lane];
    }
    if (grad) {
      exps = s.exps.data();
      for (int64_t k = 0; k < scores.classes; ++k, exps += Q) {
        V left = {}, right = {};
        for (int q = 0; q < Q; ++q) {
          V each = exps[q] * scale[q] - (label[q] == Int(k) ? hard[q] : V{});
          if constexpr (SMOOTH) each -= soft[q] * class_weight[k];
          left += w0[q] * each;
          right += w1[q] * each;
        }
        const int64_t at = k * cells + j;
        store(&s.sides[0][at], load<V>(&s.sides[0][at]) + h0 * left);
        store(&s.sides[1][at], load<V>(&s.sides[1][at]) + h0 * right);
        store(&s.sides[2][at], load<V>(&s.sides[2][at]) + h1 * left);
        store(&s.sides[3][at], load<V>(&s.sides[3][at]) + h1 * right);
      }
    }
    return lane_sum(losses);
  }

  void add_gradient(int64_t n, int64_t i, const Scratch& s) {
    const int64_t w = scores.w;
    for (int64_t side = 0; side < 2; ++side) {
      T* to = grad + n * grad_strides[0] + std::min(i + side, scores.h - 1) * grad_strides[2];
      for (int64_t k = 0; k < scores.classes; ++k) {
        const T* left = &s.sides[2 * side][k * cells];
        const T* right = &s.sides[2 * side + 1][k * cells];
        T* line = to + k * grad_strides[1];
        for (int64_t j = 0; j < w; ++j)
          line[j * grad_strides[3]] += left[j] + (j > 0 ? right[j - 1] : T(0)) + (j + 1 == w ? right[j] : T(0));
      }
    }
  }
};

template <class T>
LossTerms<T> loss_terms(const Tensor& logits, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing) {
  return {ignore_index,
          weight ? static_cast<const T*>(weight->const_data_ptr()) : nullptr,
          weight ? weight->stride(0) : 0,
          T(smoothing / double(logits.size(1))),
          T(1 - smoothing),
          nullptr};
}

template <class T>
void want_gradient(CrossEntropy<T>& op, Tensor& grad) {
  torch::stable::zero_(grad);
  op.grad = static_cast<T*>(grad.mutable_data_ptr());
  for (int d = 0; d < 4; ++d) op.grad_strides[d] = grad.stride(d);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                                 int64_t ignore_index, double smoothing, bool align_corners, bool per_pixel,
                                                 bool with_grad) {
  CrossEntropy<T> op(logits, target, loss_terms<T>(logits, weight, ignore_index, smoothing), align_corners);
  const auto type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  Tensor grad = with_grad ? empty_gradient(logits) : torch::stable::new_empty(logits, {0}, type);
  if (with_grad) want_gradient(op, grad);
  Tensor loss = per_pixel ? torch::stable::new_empty(logits, target.sizes(), type) : torch::stable::new_empty(logits, {}, type);
  if (per_pixel) {
    op.loss_map = static_cast<T*>(loss.mutable_data_ptr());
  }
  op.run();
  if (!per_pixel) *static_cast<T*>(loss.mutable_data_ptr()) = T(op.loss);
  Tensor total = torch::stable::new_empty(logits, {}, type);
  *static_cast<T*>(total.mutable_data_ptr()) = T(op.total);
  return {loss, total, grad};
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                          const std::optional<Tensor>& weight, int64_t ignore_index,
                                                          double label_smoothing, bool align_corners, bool per_pixel,
                                                          bool with_grad) {
  check_cross_entropy(logits, target, weight, std::nullopt);
  const auto run = logits.scalar_type() == ScalarType::Double ? cross_entropy<double> : cross_entropy<float>;
  return run(logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel, with_grad);
}

template <class T>
Tensor cross_entropy_backward(const Tensor& pixel_grad, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, bool align_corners) {
  LossTerms<T> terms = loss_terms<T>(logits, weight, ignore_index, smoothing);
  const Tensor factors = torch::stable::contiguous(pixel_grad);
  terms.pixel_grad = static_cast<const T*>(factors.const_data_ptr());
  CrossEntropy<T> op(logits, target, terms, align_corners);
  Tensor grad = empty_gradient(logits);
  want_gradient(op, grad);
  op.run();
  return grad;
}

Tensor upsample_cross_entropy_backward(const Tensor& pixel_grad, const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                                       bool align_corners) {
  check_cross_entropy(logits, target, weight, pixel_grad);
  const auto run = logits.scalar_type() == ScalarType::Double ? cross_entropy_backward<double> : cross_entropy_backward<float>;
  return run(pixel_grad, logits, target, weight, ignore_index, label_smoothing, align_corners);
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY(ops_ext, m) { ops_ext::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&ops_ext::upsample_argmax));
  m.impl("upsample_cross_entropy", TORCH_BOX(&ops_ext::upsample_cross_entropy));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&ops_ext::upsample_cross_entropy_backward));
}
