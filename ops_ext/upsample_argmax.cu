// upsample_argmax on CUDA.
#include "cuda.h"

namespace ops_ext {
namespace {

// Past this a product of bilinear weights could overflow; such scores, infinities and NaN take the slow path.
constexpr float ORDINARY = std::numeric_limits<float>::max() / 8;
constexpr uint16_t ODD = 1 << 15;

// For every low-resolution pixel its best class, marked ODD where not all scores are ordinary.
__global__ void label_corners(Scores s, uint16_t* corners) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w) return;
  const int64_t j = at % s.w, i = at / s.w % s.h, n = at / s.w / s.h;
  const float* score = s.data + n * s.image + i * s.row + j * s.column;
  float best = *score;
  uint16_t winner = 0;
  bool ordinary = true;
  for (int64_t k = 0; k < s.classes; ++k, score += s.layer) {
    if (*score > best) best = *score, winner = static_cast<uint16_t>(k);
    ordinary = ordinary && *score <= ORDINARY && *score >= -ORDINARY;
  }
  corners[at] = ordinary ? winner : ODD;
}

// A thread labels one output column of one row of cells. Where the corners of its cell agree on an ordinary label there
// is nothing to compute, and where all 32 columns of a warp do, nothing is read: bilinear interpolation is a convex
// combination.
__global__ void label_cells(Scores s, Axis rows, Axis columns, const uint16_t* corners, uint8_t* out) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * columns.out) return;
  const int64_t x = at % columns.out, i = at / columns.out % s.h, n = at / columns.out / s.h;
  const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
  if (y0 == y1) return;
  const int64_t j = columns.lower(x);
  const int64_t right = j + 1 < s.w ? j + 1 : j, below = i + 1 < s.h ? i + 1 : i;
  const uint16_t* top_row = corners + (n * s.h + i) * s.w;
  const uint16_t* bottom_row = corners + (n * s.h + below) * s.w;
  const uint16_t a = top_row[j], b = top_row[right], c = bottom_row[j], d = bottom_row[right];
  uint8_t* line = out + (n * rows.out + y0) * columns.out + x;
  if (a == b && a == c && a == d && a != ODD) {
    for (int64_t y = y0; y < y1; ++y, line += columns.out) *line = static_cast<uint8_t>(a);
    return;
  }
  const bool ordinary = a != ODD && b != ODD && c != ODD && d != ODD;
  const Cell cell(s, n, i, j);
  const float w1 = columns.upper(x), w0 = 1.0f - w1;
  for (int64_t y = y0; y < y1; y += STRIP) {
    float best[STRIP], h1[STRIP];
    int winner[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      h1[r] = y + r < y1 ? rows.upper(y + r) : 0.0f;
      best[r] = -INFINITE;
      winner[r] = ordinary ? 0 : -1;
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const float top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) {
        const float score = (1.0f - h1[r]) * top + h1[r] * bottom;
        bool better = score > best[r];
        if (!ordinary)  // the first NaN wins
          better = winner[r] < 0 || (best[r] == best[r] && (better || score != score));
        best[r] = better ? score : best[r];
        winner[r] = better ? static_cast<int>(k) : winner[r];
      }
    }
#pragma unroll
    for (int r = 0; r < STRIP; ++r, line += columns.out)
      if (y + r < y1) *line = static_cast<uint8_t>(winner[r]);
  }
}

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_logits(logits);
  const bool fits = logits.size(1) <= 256 && height >= 1 && width >= 1;
  STD_TORCH_CHECK(fits, "expected at most 256 classes, and a size from 1x1 on");
  const OnDeviceOf device(logits);
  const Scores scores(logits);
  const Axis rows(scores.h, height, align_corners), columns(scores.w, width, align_corners);
  const int64_t corner_count = scores.n * scores.h * scores.w;
  Tensor out = torch::stable::new_empty(logits, {scores.n, height, width}, ScalarType::Byte);
  Tensor corners = torch::stable::new_empty(logits, {corner_count}, ScalarType::Short);
  auto* corner = static_cast<uint16_t*>(corners.mutable_data_ptr());
  device.launch(label_corners, corner_count, scores, corner);
  device.launch(label_cells, scores.n * scores.h * width, scores, rows, columns, corner,
                static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CUDA, m) { m.impl("upsample_argmax", TORCH_BOX(&ops_ext::upsample_argmax)); }
