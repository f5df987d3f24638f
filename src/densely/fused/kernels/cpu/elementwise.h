// The loops over one row that kernels are made of. Vectors are float, sums too.

#pragma once

#include <cmath>
#include <limits>

#include "common.h"
#include "panels.h"

namespace densely {

// relu(x * scale + shift). One rounding, here and wherever it is computed again.
template <class T>
inline T activate(T x, float scale, float shift) {
  float y = std::fma(float(x), scale, shift);
  return narrow<T>(y > 0 || y != y ? y : 0.0f);
}

template <class T>
inline void norm_relu_row(
    const T* __restrict x, const float* __restrict scale, const float* __restrict shift,
    T* __restrict out, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) out[c] = activate(x[c], scale[c], shift[c]);
}

// out += bias, and nothing below zero if `relu`.
inline void add_row(
    const float* __restrict bias, bool relu, float* __restrict out, int64_t columns) {
  float floor = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < columns; c++) {
    float y = out[c] + bias[c];
    out[c] = y < floor ? floor : y;
  }
}

// Mean and sum of squares of a column's rows so far; merged by Chan, Golub and LeVeque (1983).
struct Moments {
  std::vector<double> mean, squares;
  int64_t count = 0;

  explicit Moments(int64_t columns) : mean(columns), squares(columns) {}

  void merge(const double* other_mean, const double* other_squares, int64_t other_count) {
    int64_t total = count + other_count;
    double weight = double(other_count) / total, cross = double(count) * other_count / total;
    for (size_t c = 0; c < mean.size(); c++) {
      double delta = other_mean[c] - mean[c];
      mean[c] += delta * weight;
      squares[c] += other_squares[c] + delta * delta * cross;
    }
    count = total;
  }

  // Adds rows [begin, end) of x. Few at a time, so that they are still in the cache for the
  // second reading, which makes the squares exact.
  template <class T>
  void add(const Matrix<T>& x, int64_t begin, int64_t end) {
    constexpr int64_t few = 64;
    int64_t columns = x.columns;
    std::vector<float> about(columns), apart(columns), square(columns);
    std::vector<double> few_mean(columns), few_squares(columns);
    for (int64_t first = begin; first < end; first += few) {
      int64_t last = std::min(end, first + few), rows = last - first;
      add_few(x, first, last, about.data(), apart.data(), square.data());
      double share = 1.0 / rows;
      for (int64_t c = 0; c < columns; c++) {
        double off = about[c] - about[c] == 0 ? apart[c] * share : 0;  // of a mean that is finite
        few_mean[c] = about[c] + off;
        few_squares[c] = square[c] - off * apart[c];
      }
      merge(few_mean.data(), few_squares.data(), rows);
    }
  }

  // About the mean of rows [first, last), and sums of what they are apart from that and of its
  // squares. The first sum is left zero for 16 bits, in which no mean can be far beyond the spread.
  template <class T>
  static void add_few(
      Matrix<T> x, int64_t first, int64_t last, float* __restrict s, float* __restrict r,
      float* __restrict q) {
    int64_t columns = x.columns;
    float share = 1.0f / (last - first);
#ifdef DENSELY_PANELS
    if constexpr (sizeof(T) == 2) {
      in_panels(first, last, columns, [=](auto panel, int64_t, int64_t) {
        __m512 sum = sum_rows(first, last, [&](int64_t r) { return panel.load(x.row(r)); });
        __m512 mean = _mm512_mul_ps(sum, _mm512_set1_ps(share));
        panel.store(s, mean);
        panel.store(q, sum_rows(first, last, [&](int64_t r) {
          __m512 d = _mm512_sub_ps(panel.load(x.row(r)), mean);
          return _mm512_mul_ps(d, d);
        }));
      });
      return;
    }
#endif
    std::fill_n(s, columns, 0.0f);
    std::fill_n(r, columns, 0.0f);
    std::fill_n(q, columns, 0.0f);
    for (int64_t i = first; i < last; i++) {
      const T* __restrict row = x.row(i);
      for (int64_t c = 0; c < columns; c++) s[c] += float(row[c]);
    }
    for (int64_t c = 0; c < columns; c++) s[c] *= share;
    for (int64_t i = first; i < last; i++) {
      const T* __restrict row = x.row(i);
      for (int64_t c = 0; c < columns; c++) {
        float d = float(row[c]) - s[c];
        r[c] += d;
        q[c] += d * d;
      }
    }
  }

  // The moments of all chunks, in order: mean and biased variance.
  static void finish(const std::vector<Moments>& parts, float* mean, float* var) {
    Moments all(parts[0].mean.size());
    for (const auto& part : parts)
      if (part.count) all.merge(part.mean.data(), part.squares.data(), part.count);
    for (size_t c = 0; c < all.mean.size(); c++) {
      mean[c] = float(all.mean[c]);
      var[c] = float(all.squares[c] / all.count);
    }
  }
};

// Sums of g and of g * (x - mean), a column each: what the norm's bias and weight learn.
struct NormSums {
  std::vector<float> bias, weight;          // of a few rows
  std::vector<double> all_bias, all_weight;  // of all

  explicit NormSums(int64_t columns)
      : bias(columns), weight(columns), all_bias(columns), all_weight(columns) {}

  template <class T>
  void add(const float* __restrict g, const T* __restrict x, const float* __restrict mean) {
    float* __restrict b = bias.data();
    float* __restrict w = weight.data();
    for (size_t c = 0; c < bias.size(); c++) {
      b[c] += g[c];
      w[c] += g[c] * (float(x[c]) - mean[c]);
    }
  }

  void flush() {
    for (size_t c = 0; c < bias.size(); c++) {
      all_bias[c] += bias[c], all_weight[c] += weight[c];
      bias[c] = weight[c] = 0;
    }
  }

  // grad_bias = sum of g, grad_weight = sum of g * xhat.
  static void finish(
      const std::vector<NormSums>& parts, const float* rstd, float* grad_weight,
      float* grad_bias) {
    int64_t columns = parts[0].bias.size();
    for (int64_t c = 0; c < columns; c++) {
      double b = 0, w = 0;
      for (const auto& part : parts) b += part.all_bias[c], w += part.all_weight[c];
      grad_weight[c] = float(w * rstd[c]);
      grad_bias[c] = float(b);
    }
  }
};

// What a batch norm hands back (Pending in reference.py): g * scale - a - (x - mean) * b.
template <class G, class T>
inline void form_row(
    const G* __restrict g, const T* __restrict x, const float* __restrict scale,
    const float* __restrict mean, const float* __restrict a, const float* __restrict b,
    T* __restrict out, int64_t columns) {
  if (!a) {
    for (int64_t c = 0; c < columns; c++)
      out[c] = narrow<T>(scale ? float(g[c]) * scale[c] : float(g[c]));
  } else if (scale) {
    for (int64_t c = 0; c < columns; c++)
      out[c] = narrow<T>(float(g[c]) * scale[c] - a[c] - (float(x[c]) - mean[c]) * b[c]);
  } else {
    for (int64_t c = 0; c < columns; c++)
      out[c] = narrow<T>(float(g[c]) - a[c] - (float(x[c]) - mean[c]) * b[c]);
  }
}

// Masks g by act <= 0 (NaN lets it through, as in PyTorch), sums it up, and stores or adds it.
enum class Into { masked, add, store };  // g itself; total += scale g; total = base + scale g

template <Into into, class T, class Out>
inline void norm_relu_backward_row(
    const T* __restrict g, const T* __restrict act, const T* __restrict x,
    const float* __restrict scale, const float* __restrict mean, const T* __restrict base,
    Out* __restrict out, float* __restrict bias, float* __restrict weight, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) {
    float m = float(act[c]) <= 0 ? 0.0f : float(g[c]);
    bias[c] += m;
    weight[c] += m * (float(x[c]) - mean[c]);
    if constexpr (into == Into::masked)
      out[c] = narrow<Out>(m);
    else if constexpr (into == Into::add)
      out[c] = narrow<Out>(float(out[c]) + scale[c] * m);
    else
      out[c] = narrow<Out>(float(base[c]) + scale[c] * m);
  }
}

// The same for rows [begin, end) of matrices.

template <class T>
inline void norm_relu_rows(
    Matrix<T> x, const float* scale, const float* shift, Matrix<T> out,
    int64_t begin, int64_t end) {
#ifdef DENSELY_PANELS
  if constexpr (sizeof(T) == 2) {
    stream(begin, end, x.columns, [=](auto panel, int64_t first, int64_t last) {
      __m512 s = panel.load(scale), b = panel.load(shift);
      for (int64_t r = first; r < last; r++)
        panel.store(out.row(r), relu(_mm512_fmadd_ps(panel.load(x.row(r)), s, b)));
    });
    return;
  }
#endif
  for (int64_t r = begin; r < end; r++) norm_relu_row(x.row(r), scale, shift, out.row(r), x.columns);
}

template <class G, class T>
inline void form_rows(
    Matrix<G> g, Matrix<T> x, const float* scale, const float* mean, const float* a,
    const float* b, Matrix<T> out, int64_t begin, int64_t end) {
#ifdef DENSELY_PANELS
  if constexpr (sizeof(T) == 2) {
    if (!a) {
      stream(begin, end, out.columns, [=](auto panel, int64_t first, int64_t last) {
        __m512 s = scale ? panel.load(scale) : _mm512_set1_ps(1.0f);
        for (int64_t r = first; r < last; r++)
          panel.store(out.row(r), _mm512_mul_ps(panel.load(g.row(r)), s));
      });
      return;
    }
    auto run = [=](auto scaled) {
      stream(begin, end, out.columns, [=](auto panel, int64_t first, int64_t last) {
        __m512 s = scaled ? panel.load(scale) : _mm512_set1_ps(1.0f);
        __m512 m = panel.load(mean), f = panel.load(a), t = panel.load(b);
        for (int64_t r = first; r < last; r++) {
          __m512 direct = _mm512_fmsub_ps(panel.load(g.row(r)), s, f);
          __m512 centred = _mm512_sub_ps(panel.load(x.row(r)), m);
          panel.store(out.row(r), _mm512_fnmadd_ps(centred, t, direct));
        }
      });
    };
    scale ? run(std::true_type()) : run(std::false_type());
    return;
  }
#endif
  for (int64_t r = begin; r < end; r++)
    form_row(g.row(r), x.row(r), scale, mean, a, b, out.row(r), out.columns);
}

template <Into into, class T, class Out>
inline void norm_relu_backward_rows(
    Matrix<T> g, Matrix<T> act, Matrix<T> x, const float* scale,
    const float* mean, Matrix<T> base, Matrix<Out> out, NormSums& sums,
    int64_t begin, int64_t end) {
  constexpr int64_t few = 64;
  float *bias = sums.bias.data(), *weight = sums.weight.data();
  for (int64_t begun = begin; begun < end; begun += few) {
    int64_t stop = std::min(end, begun + few);
#ifdef DENSELY_PANELS
    if constexpr (sizeof(T) == 2) {
      stream(begun, stop, x.columns, [=](auto panel, int64_t first, int64_t last) {
        __m512 s = panel.load(scale), m = panel.load(mean);
        __m512 b = panel.load(bias), w = panel.load(weight);
        for (int64_t r = first; r < last; r++) {
          __m512 up = masked(panel.load(g.row(r)), panel.load(act.row(r)));
          b = _mm512_add_ps(b, up);
          w = _mm512_fmadd_ps(up, _mm512_sub_ps(panel.load(x.row(r)), m), w);
          if constexpr (into == Into::masked)
            panel.store(out.row(r), up);
          else if constexpr (into == Into::add)
            panel.store(out.row(r), _mm512_fmadd_ps(up, s, panel.load(out.row(r))));
          else
            panel.store(out.row(r), _mm512_fmadd_ps(up, s, panel.load(base.row(r))));
        }
        panel.store(bias, b), panel.store(weight, w);
      });
      sums.flush();
      continue;
    }
#endif
    for (int64_t r = begun; r < stop; r++)
      norm_relu_backward_row<into>(
          g.row(r), act.row(r), x.row(r), scale, mean, base.row(r), out.row(r), bias, weight,
          x.columns);
    sums.flush();
  }
}

}  // namespace densely
