// Convolutions with their batch norms, tile by tile: what a tile of rows needs stays in the cache.
//
// Matrix products are PyTorch's own, called for a tile from within a thread. Float32, and bfloat16
// for what sees one place only.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <memory>

#include "elementwise.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as it was called before PyTorch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace densely {

template <class T>
inline Tensor view(T* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  AtenTensorHandle handle;
  int64_t sizes[2] = {rows, columns}, strides[2] = {row, column};
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(
          data, 2, sizes, strides, 0, int32_t(scalar_type_of<T>), 0, 0, &handle));
  return Tensor(handle);
}

// out = a @ b, or out += a @ b.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  AOTITorchError error =
      add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
          : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  STABLE_TORCH_ERROR_CODE_CHECK(error);
}

// Rows of a tile with so many values a row: they should stay in the second cache. In bfloat16, where
// products are done sooner, calling one costs as much as 100 rows: tiles are for the third cache.
template <class T>
inline int64_t tile_rows(int64_t values) {
  if constexpr (sizeof(T) == 2) return std::clamp<int64_t>((768 << 10) / values, 32, 8192);
  return std::clamp<int64_t>((96 << 10) / values, 32, 512);
}

template <class T>
struct Tile {
  std::unique_ptr<T[]> memory;
  Matrix<T> matrix;

  Tile(int64_t rows, int64_t columns)
      : memory(std::make_unique_for_overwrite<T[]>(rows * columns)),
        matrix{memory.get(), rows, columns, columns} {}

  Tensor few(int64_t rows) const { return view(memory.get(), rows, matrix.columns, matrix.columns, 1); }
  Tensor transposed(int64_t rows) const {
    return view(memory.get(), matrix.columns, rows, 1, matrix.columns);
  }
};

// Calls f(type) with a null pointer of the type of t: float or bfloat16.
template <class F>
inline void for_tiled(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::BFloat16)
    f(static_cast<bfloat16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

// Which row another place of the same image has: rows are [batch, depth, height, width].
struct Geometry {
  int64_t size[3], kernel[3], dilation;

  explicit Geometry(const std::vector<int64_t>& numbers)
      : size{numbers[0], numbers[1], numbers[2]},
        kernel{numbers[3], numbers[4], numbers[5]},
        dilation(numbers[6]) {}

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }

  // out [rows of the tile, taps * columns]: for each tap the row from which the tap looks at this
  // one, so that a convolution's backward is a product with the gathered rows.
  void gather(const Matrix<float>& from, int64_t begin, int64_t end, float* out) const {
    int64_t width = taps() * from.columns;
    size_t bytes = from.columns * sizeof(float);
    for (int64_t r = begin; r < end; r++) {
      int64_t at[3] = {r / (size[2] * size[1]) % size[0], r / size[2] % size[1], r % size[2]};
      float* to = out + (r - begin) * width;
      for (int64_t d = 0; d < kernel[0]; d++) {
        int64_t dd = dilation * (kernel[0] / 2 - d);
        bool inside_d = at[0] + dd >= 0 && at[0] + dd < size[0];
        for (int64_t h = 0; h < kernel[1]; h++) {
          int64_t dh = dilation * (kernel[1] / 2 - h);
          bool inside_h = inside_d && at[1] + dh >= 0 && at[1] + dh < size[1];
          for (int64_t w = 0; w < kernel[2]; w++, to += from.columns) {
            int64_t dw = dilation * (kernel[2] / 2 - w);
            if (inside_h && at[2] + dw >= 0 && at[2] + dw < size[2])
              std::memcpy(to, from.row(r + (dd * size[1] + dh) * size[2] + dw), bytes);
            else
              std::memset(to, 0, bytes);
          }
        }
      }
    }
  }
};

// out = relu(x * scale + shift) @ weight^T + bias, and the moments of its columns, if asked for.
// With `relu` negative results become zero. Bias and relu are for float32 only.
void pointwise(
    Tensor x, Tensor scale, Tensor shift, Tensor weight, std::optional<Tensor> bias, bool relu,
    Tensor out, std::optional<Tensor> mean, std::optional<Tensor> var) {
  for_tiled(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto in = matrix<T>(x), to = matrix<T>(out), w = matrix<T>(weight);
    int64_t tile = tile_rows<T>(in.columns + to.columns), chunks = chunks_of(in.rows, in.columns);
    std::vector<Moments> parts(chunks, Moments(to.columns));
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      Tile<T> act(std::min(tile, end - begin), in.columns);
      for (int64_t first = begin; first < end; first += tile) {
        int64_t last = std::min(end, first + tile), rows = last - first;
        norm_relu_rows(in.from(first), vector(scale), vector(shift), act.matrix, 0, rows);
        multiply(
            view(to.row(first), rows, to.columns, to.stride, 1), act.few(rows),
            view(w.data, in.columns, to.columns, 1, w.stride), false);
        if constexpr (std::is_same_v<T, float>)
          if (bias)
            for (int64_t r = first; r < last; r++)
              add_row(vector(bias), relu, to.row(r), to.columns);
        if (mean) parts[chunk].add(to, first, last);
      }
    });
    if (mean) Moments::finish(parts, vector(*mean), vector(*var));
  });
}

// out = conv(relu(x * scale + shift)) + bias over two axes, and the moments of its columns.
//
// Each place is multiplied once with all taps, [C] by [C, taps * O]; a row of the result adds up what
// its neighbours hold for it. A band of rows at a time; the last ones of a band serve the next.
void spatial(
    Tensor x, Tensor scale, Tensor shift, Tensor weight, std::optional<Tensor> bias,
    std::vector<int64_t> geometry, Tensor out, std::optional<Tensor> mean,
    std::optional<Tensor> var) {
  Geometry space(geometry);
  auto in = matrix<float>(x), to = matrix<float>(out), w = matrix<float>(weight);
  int64_t height = space.size[1], wide = space.size[2], columns = in.columns, width = w.rows;
  int64_t halo = space.dilation * (space.kernel[1] / 2), side = space.dilation * (space.kernel[2] / 2);
  int64_t lines = in.rows / wide;  // of all images
  int64_t band = std::clamp<int64_t>(tile_rows<float>(columns + width) / wide, 1, height);
  int64_t chunks = chunks_of(lines, wide * (columns + width));
  std::vector<Moments> parts(chunks, Moments(to.columns));
  in_chunks(lines, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> act(band * wide * columns);
    std::vector<float> products((band + 2 * halo) * wide * width);
    // Products of lines [first, last) of an image that begins at `image`, to `at`.
    auto multiply_lines = [&](int64_t image, int64_t first, int64_t last, float* at) {
      for (int64_t line = first; line < last;) {
        int64_t few = std::min(last - line, band), rows = few * wide;
        if (line < 0 || line >= height) {
          few = line < 0 ? std::min(last, int64_t(0)) - line : last - line;
          std::fill_n(at, few * wide * width, 0.0f);
          line += few, at += few * wide * width;
          continue;
        }
        few = std::min(few, height - line), rows = few * wide;
        for (int64_t r = 0; r < rows; r++)
          norm_relu_row(
              in.row((image + line) * wide + r), vector(scale), vector(shift),
              act.data() + r * columns, columns);
        multiply(
            view(at, rows, width, width, 1), view(act.data(), rows, columns, columns, 1),
            view(w.data, columns, width, 1, w.stride), false);
        line += few, at += rows * width;
      }
    };
    for (int64_t line = begin; line < end;) {
      int64_t image = line / height * height, stop = std::min(end, image + height) - image;
      int64_t line_size = wide * width;
      multiply_lines(image, line - image - halo, line - image + halo, products.data());
      for (int64_t first = line - image; first < stop; first += band) {
        int64_t last = std::min(stop, first + band);
        multiply_lines(image, first + halo, last + halo, products.data() + 2 * halo * line_size);
        for (int64_t h = first; h < last; h++) {
          for (int64_t c = 0; c < wide; c++) {
            float* __restrict sum = to.row((image + h) * wide + c);
            for (int64_t o = 0; o < to.columns; o++) sum[o] = bias ? vector(*bias)[o] : 0.0f;
            for (int64_t i = 0; i < space.kernel[1]; i++) {
              for (int64_t j = 0; j < space.kernel[2]; j++) {
                int64_t place = c + j * space.dilation - side;
                if (place < 0 || place >= wide) continue;
                const float* __restrict from =
                    products.data() + (h - first + i * space.dilation) * line_size +
                    place * width + (i * space.kernel[2] + j) * to.columns;
                for (int64_t o = 0; o < to.columns; o++) sum[o] += from[o];
              }
            }
          }
        }
        if (mean) parts[chunk].add(to, (image + first) * wide, (image + last) * wide);
        std::copy_n(
            products.data() + (last - first) * line_size, 2 * halo * line_size, products.data());
      }
      line = image + stop;
    }
  });
  if (mean) Moments::finish(parts, vector(*mean), vector(*var));
}

// Sum of up^T @ act over tiles, in float32: products of tiles may be rounded to bfloat16.
template <class T>
struct WeightSum {
  std::vector<float>& sum;
  Tile<T> product;

  WeightSum(std::vector<float>& sum, int64_t width, int64_t columns)
      : sum(sum), product(std::is_same_v<T, float> ? 0 : width, columns) {
    sum.resize(width * columns);
  }

  void add(const Tensor& up, const Tensor& act, bool again) {
    int64_t width = up.size(0), columns = act.size(1);
    if constexpr (std::is_same_v<T, float>) {
      multiply(view(sum.data(), width, columns, columns, 1), up, act, again);
    } else {
      multiply(product.few(width), up, act, false);
      const T* __restrict from = product.matrix.data;
      float* __restrict to = sum.data();
      for (int64_t i = 0; i < width * columns; i++) to[i] += float(from[i]);
    }
  }
};

// Back through conv(relu(x * scale + shift)).
//
// The gradient of the output is g [rows, O], or, with a, b and the rest, what form_row makes of it
// (of pointwise convolutions only). weight [taps * O, C] holds the taps one after the other, and so
// does grad_weight, always of float32. For the others see norm_relu_backward.
void convolve_backward(
    Tensor g, std::optional<Tensor> g_input, std::optional<Tensor> g_scale,
    std::optional<Tensor> g_mean, std::optional<Tensor> g_a, std::optional<Tensor> g_b, Tensor x,
    Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor weight,
    std::vector<int64_t> geometry, std::optional<Tensor> base, Tensor out, bool accumulate,
    std::optional<Tensor> grad_weight, Tensor norm_weight, Tensor norm_bias) {
  Geometry space(geometry);
  auto run = [&](auto type, auto wide) {
    using T = element<decltype(type)>;
    using G = element<decltype(wide)>;
    auto grad = matrix<G>(g);
    auto in = matrix<T>(x), w = matrix<T>(weight);
    auto before = g_input ? matrix<T>(*g_input) : in;
    auto direct = base ? matrix<T>(*base) : in;
    int64_t columns = in.columns, width = w.rows;
    int64_t tile = tile_rows<T>(columns + width), chunks = chunks_of(in.rows, columns + width);
    std::vector<NormSums> norms(chunks, NormSums(columns));
    std::vector<std::vector<float>> weights(chunks);
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      int64_t most = std::min(tile, end - begin);
      Tile<T> act(most, columns), back(most, columns), up(most, width);
      WeightSum<T> sum(weights[chunk], grad_weight ? width : 0, columns);
      for (int64_t first = begin; first < end; first += tile) {
        int64_t rows = std::min(end, first + tile) - first;
        if constexpr (std::is_same_v<T, float>)
          if (space.taps() > 1) space.gather(grad, first, first + rows, up.matrix.data);
        if (space.taps() == 1)
          form_rows(
              grad.from(first), before.from(first), vector(g_scale), vector(g_mean), vector(g_a),
              vector(g_b), up.matrix, 0, rows);
        norm_relu_rows(in.from(first), vector(scale), vector(shift), act.matrix, 0, rows);
        if (grad_weight) sum.add(up.transposed(rows), act.few(rows), first > begin);
        multiply(
            back.few(rows), up.few(rows), view(w.data, width, columns, w.stride, 1), false);
        auto store = [&](auto into, auto to) {
          norm_relu_backward_rows<into.value>(
              back.matrix, act.matrix, in.from(first), vector(scale), vector(mean),
              direct.from(first), to.from(first), norms[chunk], 0, rows);
        };
        if (!accumulate)
          store(std::integral_constant<Into, Into::masked>(), matrix<T>(out));
        else if (base)
          store(std::integral_constant<Into, Into::store>(), matrix<T>(out));
        else
          store(std::integral_constant<Into, Into::add>(), matrix<T>(out));
      }
    });
    NormSums::finish(norms, vector(rstd), vector(norm_weight), vector(norm_bias));
    if (grad_weight) {
      float* total = vector(*grad_weight);
      in_chunks(width * columns, chunks, [&](int64_t, int64_t begin, int64_t end) {
        std::copy(weights[0].begin() + begin, weights[0].begin() + end, total + begin);
        for (int64_t part = 1; part < chunks; part++)
          for (int64_t i = begin; i < end; i++) total[i] += weights[part][i];
      });
    }
  };
  for_tiled(x, [&](auto type) {
    if (g.scalar_type() == ScalarType::Float)
      run(type, static_cast<float*>(nullptr));
    else
      run(type, type);
  });
}

}  // namespace densely

STABLE_TORCH_LIBRARY_FRAGMENT(densely_cpu, m) {
  m.def(
      "pointwise(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, bool relu, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def(
      "spatial(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, int[] geometry, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def(
      "convolve_backward(Tensor g, Tensor? g_input, Tensor? g_scale, Tensor? g_mean, Tensor? g_a, "
      "Tensor? g_b, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor weight, "
      "int[] geometry, Tensor? base, Tensor(a!) out, bool accumulate, Tensor(b!)? grad_weight, "
      "Tensor(c!) norm_weight, Tensor(d!) norm_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(densely_cpu, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&densely::pointwise));
  m.impl("spatial", TORCH_BOX(&densely::spatial));
  m.impl("convolve_backward", TORCH_BOX(&densely::convolve_backward));
}
