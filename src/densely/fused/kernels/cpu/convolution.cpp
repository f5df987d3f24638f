// Convolutions with their batch norms, tile by tile: what a tile of rows needs stays in the cache.
//
// Matrix products are PyTorch's own, called for a tile from within a thread. Float32 only.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "elementwise.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as it was called before PyTorch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace densely {

constexpr int32_t kFloat = 6;  // ScalarType::Float, as the C interface has it

inline Tensor view(float* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  AtenTensorHandle handle;
  int64_t sizes[2] = {rows, columns}, strides[2] = {row, column};
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, kFloat, 0, 0, &handle));
  return Tensor(handle);
}

// out = a @ b, or out += a @ b.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  AOTITorchError error =
      add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
          : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  STABLE_TORCH_ERROR_CODE_CHECK(error);
}

// Rows of a tile with so many values a row: they should stay in the second cache.
inline int64_t tile_rows(int64_t values) {
  return std::clamp<int64_t>((96 << 10) / values, 32, 512);
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
// With `relu` negative results become zero.
void pointwise(
    Tensor x, Tensor scale, Tensor shift, Tensor weight, std::optional<Tensor> bias, bool relu,
    Tensor out, std::optional<Tensor> mean, std::optional<Tensor> var) {
  auto in = matrix<float>(x), to = matrix<float>(out), w = matrix<float>(weight);
  int64_t tile = tile_rows(in.columns + to.columns), chunks = chunks_of(in.rows, in.columns);
  std::vector<Moments> parts(chunks, Moments(to.columns));
  in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> act(tile * in.columns);
    for (int64_t first = begin; first < end; first += tile) {
      int64_t last = std::min(end, first + tile), rows = last - first;
      for (int64_t r = first; r < last; r++)
        norm_relu_row(
            in.row(r), vector(scale), vector(shift), act.data() + (r - first) * in.columns,
            in.columns);
      multiply(
          view(to.row(first), rows, to.columns, to.stride, 1),
          view(act.data(), rows, in.columns, in.columns, 1),
          view(w.data, in.columns, to.columns, 1, w.stride), false);
      if (bias)
        for (int64_t r = first; r < last; r++)
          add_row(vector(bias), relu, to.row(r), to.columns);
      if (mean) parts[chunk].add(to, first, last);
    }
  });
  if (mean) Moments::finish(parts, vector(*mean), vector(*var));
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
  int64_t band = std::clamp<int64_t>(tile_rows(columns + width) / wide, 1, height);
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

// Back through conv(relu(x * scale + shift)).
//
// The gradient of the output is g [rows, O], or, with a, b and the rest, what form_row makes of it
// (of pointwise convolutions only). weight [taps * O, C] holds the taps one after the other, and so
// does grad_weight. For the others see norm_relu_backward.
void convolve_backward(
    Tensor g, std::optional<Tensor> g_input, std::optional<Tensor> g_scale,
    std::optional<Tensor> g_mean, std::optional<Tensor> g_a, std::optional<Tensor> g_b, Tensor x,
    Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor weight,
    std::vector<int64_t> geometry, std::optional<Tensor> base, Tensor out, bool accumulate,
    std::optional<Tensor> grad_weight, Tensor norm_weight, Tensor norm_bias) {
  Geometry space(geometry);
  auto grad = matrix<float>(g), in = matrix<float>(x), w = matrix<float>(weight),
       to = matrix<float>(out);
  auto before = g_input ? matrix<float>(*g_input) : grad;
  auto direct = base ? matrix<float>(*base) : in;
  int64_t columns = in.columns, width = w.rows;
  int64_t tile = tile_rows(columns + width), chunks = chunks_of(in.rows, columns + width);
  std::vector<NormSums> norms(chunks, NormSums(columns));
  std::vector<std::vector<float>> weights(chunks);
  in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> act(tile * columns), back(tile * columns), up(tile * width);
    std::vector<float>& part = weights[chunk];
    if (grad_weight) part.resize(width * columns);
    NormSums& norm = norms[chunk];
    for (int64_t first = begin; first < end; first += tile) {
      int64_t last = std::min(end, first + tile), rows = last - first;
      if (space.taps() > 1) {
        space.gather(grad, first, last, up.data());
      } else {
        for (int64_t r = first; r < last; r++)
          form_row(
              grad.row(r), before.row(r), vector(g_scale), vector(g_mean), vector(g_a),
              vector(g_b), up.data() + (r - first) * width, width);
      }
      for (int64_t r = first; r < last; r++)
        norm_relu_row(
            in.row(r), vector(scale), vector(shift), act.data() + (r - first) * columns, columns);
      if (grad_weight)
        multiply(
            view(part.data(), width, columns, columns, 1), view(up.data(), width, rows, 1, width),
            view(act.data(), rows, columns, columns, 1), first > begin);
      multiply(
          view(back.data(), rows, columns, columns, 1), view(up.data(), rows, width, width, 1),
          view(w.data, width, columns, w.stride, 1), false);
      for (int64_t r = first; r < last; r++) {
        int64_t at = (r - first) * columns;
        auto run = [&](auto into) {
          norm_relu_backward_row<into.value>(
              back.data() + at, act.data() + at, in.row(r), vector(scale), vector(mean),
              direct.row(r), to.row(r), norm.bias.data(), norm.weight.data(), columns);
        };
        if (!accumulate)
          run(std::integral_constant<Into, Into::masked>());
        else if (base)
          run(std::integral_constant<Into, Into::store>());
        else
          run(std::integral_constant<Into, Into::add>());
      }
      norm.flush();
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
