// Rows of class scores, as the CPU's operators read them.
#pragma once

#include <algorithm>

#include "common.h"
#include "simd.h"

namespace ops_ext {

struct Scores {  // (N, C, h, w) logits of any strides
  const float* data;
  int64_t n, classes, h, w;
  int64_t image, layer, line, column;  // strides
  int64_t row_stride;  // of a row as read: w + 1 columns, and room to load a vector from any of them

  explicit Scores(const Tensor& logits)
      : data(static_cast<const float*>(logits.const_data_ptr())), n(logits.size(0)), classes(logits.size(1)),
        h(logits.size(2)), w(logits.size(3)), image(logits.stride(0)), layer(logits.stride(1)), line(logits.stride(2)),
        column(logits.stride(3)), row_stride(round_up(w + 1, LANES) + LANES) {}

  // Row i as row[class][row_stride]: w values, the last one once more (the right side of the last cell), zeros.
  void read(int64_t n_, int64_t i, float* row) const {
    const float* from = data + n_ * image + i * line;
    if (column == 1) {
      for (int64_t k = 0; k < classes; ++k) std::copy_n(from + k * layer, w, row + k * row_stride);
    } else {
      for (int64_t j = 0; j < w; ++j)
        for (int64_t k = 0; k < classes; ++k) row[k * row_stride + j] = from[k * layer + j * column];
    }
    for (int64_t k = 0; k < classes; ++k, row += row_stride) {
      row[w] = row[w - 1];
      std::fill(row + w + 1, row + row_stride, 0.0f);
    }
  }
};

}  // namespace ops_ext
