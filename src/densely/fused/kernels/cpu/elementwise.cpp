// Kernels that read each value once or twice and compute little.

#include "elementwise.h"

namespace densely {

// To the rows of `out`: scale, shift and 1 / sqrt(var + eps) of a batch norm.
void affine(Tensor weight, Tensor bias, Tensor mean, Tensor var, double eps, Tensor out) {
  int64_t columns = out.size(1);
  float* __restrict scale = vector(out);
  float* __restrict shift = scale + out.stride(0);
  float* __restrict rstd = shift + out.stride(0);
  for (int64_t c = 0; c < columns; c++) {
    rstd[c] = 1.0f / std::sqrt(vector(var)[c] + float(eps));
    scale[c] = vector(weight)[c] * rstd[c];
    shift[c] = vector(bias)[c] - vector(mean)[c] * scale[c];
  }
}

void moments(Tensor x, Tensor mean, Tensor var) {
  for_dtype(x, [&](auto type) {
    auto in = matrix<element<decltype(type)>>(x);
    int64_t chunks = chunks_of(in.rows, in.columns);
    std::vector<Moments> parts(chunks, Moments(in.columns));
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      parts[chunk].add(in, begin, end);
    });
    Moments::finish(parts, vector(mean), vector(var));
  });
}

// Copies x to `out`, few rows at a time, and takes their moments while they are in the cache.
void place(Tensor x, Tensor out, Tensor mean, Tensor var) {
  constexpr int64_t few = 64;
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto in = matrix<T>(x), to = matrix<T>(out);
    int64_t chunks = chunks_of(in.rows, in.columns);
    std::vector<Moments> parts(chunks, Moments(in.columns));
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += few) {
        int64_t last = std::min(end, first + few);
        for (int64_t r = first; r < last; r++) std::copy_n(in.row(r), in.columns, to.row(r));
        parts[chunk].add(to, first, last);
      }
    });
    Moments::finish(parts, vector(mean), vector(var));
  });
}

void norm_relu(Tensor x, Tensor scale, Tensor shift, Tensor out) {
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto in = matrix<T>(x), to = matrix<T>(out);
    auto s = vector(scale), b = vector(shift);
    in_chunks(in.rows, chunks_of(in.rows, in.columns), [&](int64_t, int64_t begin, int64_t end) {
      norm_relu_rows(in, s, b, to, begin, end);
    });
  });
}

void form(
    Tensor g, Tensor x, std::optional<Tensor> scale, std::optional<Tensor> mean,
    std::optional<Tensor> a, std::optional<Tensor> b, Tensor out) {
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto run = [&](auto wide) {
      using G = element<decltype(wide)>;
      auto from = matrix<G>(g);
      auto at = matrix<T>(x), to = matrix<T>(out);
      in_chunks(to.rows, chunks_of(to.rows, to.columns), [&](int64_t, int64_t begin, int64_t end) {
        form_rows(
            from, at, vector(scale), vector(mean), vector(a), vector(b), to, begin, end);
      });
    };
    if (g.scalar_type() == ScalarType::Float)
      run(static_cast<float*>(nullptr));
    else
      run(type);
  });
}

// Masks g, and adds scale * g to `out` (float), or stores base + scale * g there; without
// `accumulate` the masked g itself, in the dtype of x. What the norm learns goes to the last two.
void norm_relu_backward(
    Tensor g, Tensor act, Tensor x, Tensor scale, Tensor mean, Tensor rstd,
    std::optional<Tensor> base, Tensor out, bool accumulate,
    Tensor norm_weight, Tensor norm_bias) {
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto grad = matrix<T>(g), relu = matrix<T>(act), in = matrix<T>(x);
    auto direct = base ? matrix<T>(*base) : in;
    int64_t columns = in.columns, chunks = chunks_of(in.rows, columns);
    std::vector<NormSums> parts(chunks, NormSums(columns));
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      NormSums& part = parts[chunk];
      auto run = [&](auto into, auto to) {
        norm_relu_backward_rows<into.value>(
            grad, relu, in, vector(scale), vector(mean), direct, to, part, begin, end);
      };
      if (!accumulate)
        run(std::integral_constant<Into, Into::masked>(), matrix<T>(out));
      else if (base)
        run(std::integral_constant<Into, Into::store>(), matrix<T>(out));
      else
        run(std::integral_constant<Into, Into::add>(), matrix<T>(out));
    });
    NormSums::finish(parts, vector(rstd), vector(norm_weight), vector(norm_bias));
  });
}

}  // namespace densely

STABLE_TORCH_LIBRARY_FRAGMENT(densely_cpu, m) {
  m.def(
      "affine(Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, Tensor(a!) out) "
      "-> ()");
  m.def("moments(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def("place(Tensor x, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var) -> ()");
  m.def("norm_relu(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
  m.def(
      "form(Tensor g, Tensor x, Tensor? scale, Tensor? mean, Tensor? a, Tensor? b, "
      "Tensor(a!) out) -> ()");
  m.def(
      "norm_relu_backward(Tensor g, Tensor act, Tensor x, Tensor scale, Tensor mean, Tensor rstd, "
      "Tensor? base, Tensor(a!) out, bool accumulate, Tensor(b!) norm_weight, "
      "Tensor(c!) norm_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(densely_cpu, CPU, m) {
  m.impl("affine", TORCH_BOX(&densely::affine));
  m.impl("moments", TORCH_BOX(&densely::moments));
  m.impl("place", TORCH_BOX(&densely::place));
  m.impl("norm_relu", TORCH_BOX(&densely::norm_relu));
  m.impl("form", TORCH_BOX(&densely::form));
  m.impl("norm_relu_backward", TORCH_BOX(&densely::norm_relu_backward));
}
