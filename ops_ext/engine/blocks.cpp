// The network's blocks on the CPU: rows of features -> 3x3 depthwise -> 1x1 projection, where the rows are a 1x1
// expansion of the input, the first convolution of an RGB image, a smaller map resized, or the rows of another such
// block.
//
// A layer at a time, PyTorch writes such rows to memory and reads them back, and that is most of its time. Here a
// thread takes a tile of columns down its rows, and of each layer only the few rows that the next depthwise kernel
// needs exist, in the second-level cache. Maps between blocks are float32.

#include "../common.h"
#include "layers.h"

namespace ops_ext {
namespace {

using torch::stable::parallel_for;

// (N, C, H, W) float32 in channels_last.
struct Map {
  float* data;
  int64_t n, channels, h, w;
  explicit Map(const Tensor& x)
      : data(static_cast<float*>(x.mutable_data_ptr())), n(x.size(0)), channels(x.size(1)), h(x.size(2)),
        w(x.size(3)) {}
  float* at(int64_t image, int64_t i, int64_t j) const { return data + ((image * h + i) * w + j) * channels; }
};

// ----------------------------------------------------------------------------------------------------- sources of rows

// A source gives the rows of a map of h() x w() pixels, of T. begin() says which columns [from, to) will be asked for,
// make() writes them for one row, and State is a thread's own memory.

template <class Type>
struct Expanded {  // a 1x1 convolution
  using T = Type;
  Map x;
  Product<T> product;
  struct State {
    int64_t from, to;
    Rows<T> row;
  };
  int64_t h() const { return x.h; }
  int64_t w() const { return x.w; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to;
    state.row.resize((to - from + TILE) * x.channels);
  }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const int64_t count = state.to - state.from;
    const float* from = x.at(image, i, state.from);
    if constexpr (std::is_same_v<T, float>) return product.run(from, count, row);
    copy(from, count * x.channels, state.row.data());
    product.run(state.row.data(), count, row);
  }
};

// The first 3x3 convolution, of stride 2, over uint8 images (N, H, W, 3). Around them are `padding` rows and columns, 1
// or 0, of the value that counts as none.
template <class Type>
struct Stem {
  using T = Type;
  const uint8_t* images;
  int64_t height, width, padding;
  T outside[3];
  Product<T, 3> product;
  struct State {
    int64_t from, to, size;
    Rows<T> pixels;  // three rows of the image, and what is read beyond the last pixel
    int64_t held[3];
  };
  int64_t h() const { return (height + 2 * padding - 3) / 2 + 1; }
  int64_t w() const { return (width + 2 * padding - 3) / 2 + 1; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to, state.size = round_up(3 * (2 * (to - from + TILE) + 1) + DEPTH, 64 / sizeof(T));
    state.pixels.resize(3 * state.size);
    std::fill_n(state.held, 3, -2);
  }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const T* rows[3];
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = 2 * i + ky - padding, slot = (y + 3) % 3;
      T* pixels = state.pixels.data() + slot * state.size;
      rows[ky] = pixels;
      if (state.held[slot] != y) read(image, y, 2 * state.from - padding, 2 * (state.to - state.from) + 1, pixels);
      state.held[slot] = y;
    }
    product.run(rows, 6, state.to - state.from, row);
  }

  static T value(float of) {  // bfloat16 holds whole numbers up to 256
    if constexpr (std::is_same_v<T, float>) return of;
    uint32_t bits;
    std::memcpy(&bits, &of, sizeof(bits));
    return static_cast<T>(bits >> 16);
  }

 private:
  // `count` pixels of image row y from column x on.
  void read(int64_t image, int64_t y, int64_t x, int64_t count, T* to) const {
    const bool inside = y >= 0 && y < height;
    const int64_t end = x + count;
    const int64_t first = inside ? std::max<int64_t>(x, 0) : end, last = inside ? std::min(end, width) : end;
    for (int64_t at = x; at < first; ++at) std::copy_n(outside, 3, to + 3 * (at - x));
    for (int64_t at = last; at < end; ++at) std::copy_n(outside, 3, to + 3 * (at - x));
    const uint8_t* from = images + ((image * height + y) * width + first) * 3;
    to += 3 * (first - x);
    for (int64_t at = 0; at < 3 * (last - first); ++at) to[at] = value(from[at]);
  }
};

template <class Type>
struct Resized {  // bilinear, to the size of another map
  using T = Type;
  Map x;
  Axis rows, columns;
  struct State {
    int64_t from, to;
  };
  int64_t h() const { return rows.out; }
  int64_t w() const { return columns.out; }
  void begin(int64_t from, int64_t to, State& state) const { state.from = from, state.to = to; }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const int64_t top = rows.lower(i), bottom = std::min(top + 1, x.h - 1);
    const float h1 = rows.upper(i), h0 = 1 - h1;
    for (int64_t j = state.from; j < state.to; ++j, row += x.channels) {
      const int64_t left = columns.lower(j), right = std::min(left + 1, x.w - 1);
      const float w1 = columns.upper(j), w0 = 1 - w1;
      const float *a = x.at(image, top, left), *b = x.at(image, top, right);
      const float *c = x.at(image, bottom, left), *d = x.at(image, bottom, right);
      for (int64_t k = 0; k < x.channels; k += LANES)
        store(row + k, h0 * (w0 * load(a + k) + w1 * load(b + k)) + h1 * (w0 * load(c + k) + w1 * load(d + k)));
    }
  }
};

// A block is itself a source of rows.
template <class Source>
struct Block {
  using T = typename Source::T;
  Source source;
  Depthwise<T> depthwise;
  Product<T> project;
  const Map* beside = nullptr;       // more channels for `project`, after the depthwise convolution's
  const Map* added = nullptr;        // of the results' shape
  const Product<T>* then = nullptr;  // one more 1x1 convolution, of the results

  struct State {
    typename Source::State source;
    int64_t from, to, first, last;  // columns of the results; columns of the source, of which some may lie outside
    Rows<T> ring, line, before;
    std::vector<int64_t> held;  // which row of the source each slot of the ring holds
  };
  int64_t h() const { return (source.h() - 1) / depthwise.stride + 1; }
  int64_t w() const { return (source.w() - 1) / depthwise.stride + 1; }
  int64_t channels() const { return then ? then->out : project.out; }

  void begin(int64_t from, int64_t to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, slots = 2 * d + 1;
    state.from = from, state.to = to;
    state.first = from * s - d;
    state.last = (to - 1) * s + d + 1;
    state.held.assign(slots, -1);
    state.ring.assign((slots + 1) * (state.last - state.first) * depthwise.channels, T{});  // the last is of zeros
    state.line.resize((to - from + TILE) * project.in);
    state.before.resize(then ? (to - from + TILE) * then->in : 0);
    source.begin(std::max<int64_t>(state.first, 0), std::min(state.last, source.w()), state.source);
  }

  template <class To>
  void make(int64_t image, int64_t y, To* to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, slots = 2 * d + 1, count = state.to - state.from;
    const int64_t size = (state.last - state.first) * depthwise.channels;
    const T* rows[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t i = y * s + (ky - 1) * d, slot = i < 0 || i >= source.h() ? slots : i % slots;
      T* row = state.ring.data() + slot * size;
      rows[ky] = row;
      if (slot == slots || state.held[slot] == i) continue;
      source.make(image, i, row + std::max<int64_t>(-state.first, 0) * depthwise.channels, state.source);
      state.held[slot] = i;
    }
    T* line = state.line.data();
    depthwise.run(rows, count, line, project.in);
    for (int64_t p = 0; beside && p < count; ++p)
      copy(beside->at(image, y, state.from + p), beside->channels, line + p * project.in + depthwise.channels);
    const float* add = added ? added->at(image, y, state.from) : nullptr;
    if (!then) return project.run(line, count, to, add);
    project.run(line, count, state.before.data(), add);
    then->run(state.before.data(), count, to);
  }
};

// All rows of a block to `out`, in tiles of at most `widest` columns.
template <class Source>
void run(const Block<Source>& block, int64_t widest, const Map& out) {
  const bool fits = out.h == block.h() && out.w == block.w() && out.channels == block.channels();
  STD_TORCH_CHECK(fits, "out has another shape");
  const int64_t threads = torch::stable::get_num_threads(), tiles = (out.w + widest - 1) / widest;
  const int64_t tile = (out.w + tiles - 1) / tiles, columns = out.n * tiles;
  const int64_t chunks = std::clamp<int64_t>((threads + columns - 1) / columns, 1, std::max<int64_t>(1, out.h / 4));
  parallel_for(0, out.n * chunks * tiles, 1, [&](int64_t begin, int64_t end) {
    const TileState tile_state;
    typename Block<Source>::State state;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t chunk = at / tiles % chunks, image = at / tiles / chunks;
      const int64_t from = at % tiles * tile, to = std::min(from + tile, out.w);
      if (from >= to) continue;
      block.begin(from, to, state);
      for (int64_t y = out.h * chunk / chunks; y < out.h * (chunk + 1) / chunks; ++y)
        block.make(image, y, out.at(image, y, from), state);
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- operators

// A kernel and a bias for each layer, in the order of the network. Each has to fit what the layer before it gives.
template <class T>
class Weights {
 public:
  explicit Weights(const std::vector<Tensor>& each) : tensors(each) {}

  template <int PARTS = 1>
  Product<T, PARTS> product(int64_t in, bool relu, float ceiling = NO_CEILING) {
    const auto& [kernel, bias] = next();
    const int64_t out = bias.numel(), multiple = DEPTH * sizeof(float) / sizeof(T) / 2;
    STD_TORCH_CHECK(kernel.numel() == PARTS * in * out && in % multiple == 0 && out % multiple == 0,
                    "a 1x1 convolution has ", kernel.numel(), " weights and ", out, " biases, expected multiples of ",
                    multiple, " for ", in, " channels");
    return {static_cast<const T*>(kernel.const_data_ptr()), floats(bias), in, out, relu, ceiling};
  }

  Depthwise<T> depthwise(int64_t channels, int64_t stride, int64_t dilation, bool relu, float ceiling = NO_CEILING) {
    const auto& [kernel, bias] = next();
    STD_TORCH_CHECK(kernel.numel() == 9 * channels && bias.numel() == channels, "a depthwise convolution has ",
                    kernel.numel(), " weights, expected 9 for each of ", channels, " channels");
    STD_TORCH_CHECK(stride == 1 || (stride == 2 && dilation == 1), "stride is ", stride, " and dilation ", dilation,
                    ", expected at most 2, and 1 beside a stride of 2");
    return {floats(kernel), floats(bias), channels, stride, dilation, relu, ceiling};
  }

 private:
  const std::vector<Tensor>& tensors;
  size_t used = 0;

  std::pair<const Tensor&, const Tensor&> next() {
    STD_TORCH_CHECK(used + 1 < tensors.size(), "expected more weights than ", tensors.size());
    used += 2;
    return {tensors[used - 2], tensors[used - 1]};
  }
  static const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
};

// Blocks are written for both types of rows; that of the last layer's weights, a 1x1 convolution, says which is meant.
template <class Operator>
void of_type(const std::vector<Tensor>& weights, const Operator& operation) {
  if (weights.at(weights.size() - 2).scalar_type() != ScalarType::BFloat16) return operation(float{});
  STD_TORCH_CHECK(HAS_BFLOAT16, "this CPU has no AVX512-BF16");
  if constexpr (HAS_BFLOAT16) operation(Half{});
}

// Results go to maps that the caller keeps: fresh ones of this size cost the operating system more than the
// computation.

// Learning to downsample: the first convolution and two depthwise separable ones, all of stride 2.
void stem_block(const Tensor& images, std::vector<double> outside, std::vector<Tensor> weights, int64_t padding,
                bool depthwise_relu, Tensor out) {
  of_type(weights, [&](auto value) {
    using T = decltype(value);
    constexpr int64_t USED = std::is_same_v<T, float> ? 9 : 10;  // of a row of the kernel, and a pair's other half
    Weights<T> layers(weights);
    Stem<T> stem{static_cast<const uint8_t*>(images.const_data_ptr()), images.size(1), images.size(2), padding, {},
                 layers.template product<3>(DEPTH, true)};
    stem.product.used = USED;
    for (int c = 0; c < 3; ++c) stem.outside[c] = stem.value(static_cast<float>(outside.at(c)));
    const auto middle1 = layers.depthwise(stem.product.out, 2, 1, depthwise_relu);
    const auto first = layers.product(middle1.channels, true);
    const auto middle2 = layers.depthwise(first.out, 2, 1, depthwise_relu);
    const Block<Block<Stem<T>>> block{{stem, middle1, first}, middle2, layers.product(first.out, true)};
    run(block, 128, Map(out));
  });
}

void bottleneck_block(const Tensor& input, std::vector<Tensor> weights, int64_t stride, bool residual, bool relu6,
                      Tensor out) {
  constexpr int64_t CACHE_BYTES = 640 << 10;  // for the expanded rows of a tile: second-level caches have 1 MiB or more
  of_type(weights, [&](auto value) {
    using T = decltype(value);
    const float ceiling = relu6 ? 6.0f : NO_CEILING;
    const Map x(input), result(out);
    Weights<T> layers(weights);
    const auto expand = layers.product(x.channels, true, ceiling);
    const auto middle = layers.depthwise(expand.out, stride, 1, true, ceiling);
    const auto project = layers.product(expand.out, false);
    const Block<Expanded<T>> block{{x, expand}, middle, project, nullptr, residual ? &x : nullptr};
    const int64_t widest = CACHE_BYTES / (3 * expand.out * int64_t(sizeof(T)) * stride);
    run(block, std::max<int64_t>(16, widest), result);
  });
}

// The last convolution of pyramid pooling: 1x1, of x, plus what the averages add to it.
void pointwise_block(const Tensor& input, std::vector<Tensor> weights, const Tensor& added, Tensor out) {
  of_type(weights, [&](auto value) {
    using T = decltype(value);
    const Map x(input), to(out);
    const auto* plus = static_cast<const float*>(added.const_data_ptr());
    const auto product = Weights<T>(weights).product(x.channels, true);
    const int64_t size = x.w * product.out;  // of a row of results
    STD_TORCH_CHECK(added.numel() == x.n * x.h * size && to.h == x.h && to.w == x.w && to.channels == product.out,
                    "out or added has another shape");
    parallel_for(0, x.n * x.h, 1, [&](int64_t begin, int64_t end) {
      const TileState tile_state;
      Rows<T> row((x.w + TILE) * x.channels);
      for (int64_t at = begin; at < end; ++at) {
        copy(x.at(0, at, 0), x.w * x.channels, row.data());
        product.run(row.data(), x.w, to.data + at * size, plus + at * size);
      }
    });
  });
}

// Feature fusion, whose two 1x1 convolutions are one of both inputs side by side, the context's channels first, then
// the classifier's two depthwise separable convolutions and its last 1x1 one.
void head_block(const Tensor& detail, const Tensor& context, std::vector<Tensor> weights, int64_t dilation,
                bool depthwise_relu, bool align_corners, Tensor out) {
  of_type(weights, [&](auto value) {
    using T = decltype(value);
    const Map fine(detail), coarse(context);
    Weights<T> layers(weights);
    const Resized<T> resized{coarse, Axis(coarse.h, fine.h, align_corners), Axis(coarse.w, fine.w, align_corners)};
    const auto spread = layers.depthwise(coarse.channels, 1, dilation, true);
    const Block<Resized<T>> fusion{resized, spread, layers.product(coarse.channels + fine.channels, true), &fine};
    const auto middle1 = layers.depthwise(fusion.project.out, 1, 1, depthwise_relu);
    const Block<Block<Resized<T>>> first{fusion, middle1, layers.product(middle1.channels, true)};
    const auto middle2 = layers.depthwise(first.project.out, 1, 1, depthwise_relu);
    const auto second = layers.product(middle2.channels, true);
    const auto scores = layers.product(second.out, false);
    run(Block<Block<Block<Resized<T>>>>{first, middle2, second, nullptr, nullptr, &scores}, 64, Map(out));
  });
}

// Whether bfloat16 is faster than float32. Intel's CPUs multiply pairs of it at half the rate of float32 outside their
// tiles.
bool has_fast_bfloat16() {
#ifdef __AVX512BF16__
  return TileState::usable() || !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) {
  m.impl("stem_block", TORCH_BOX(&ops_ext::stem_block));
  m.impl("bottleneck_block", TORCH_BOX(&ops_ext::bottleneck_block));
  m.impl("pointwise_block", TORCH_BOX(&ops_ext::pointwise_block));
  m.impl("head_block", TORCH_BOX(&ops_ext::head_block));
}

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CompositeExplicitAutograd, m) {
  m.impl("has_fast_bfloat16", TORCH_BOX(&ops_ext::has_fast_bfloat16));
}
