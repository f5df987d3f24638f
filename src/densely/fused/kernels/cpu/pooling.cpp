// relu(x * scale + shift), pooled, and the way back; for averages and for maxima.
//
// Rows are [batch, depth, height, width]. Each row of the result reads a window of rows; on the way
// back each row asks the windows that it is in, so that nobody adds to what another thread writes.

#include <limits>

#include "elementwise.h"

namespace densely {

struct Windows {
  int64_t size[3], step[3], out[3], reach;  // reach: a window's places before and behind its step

  Windows(const std::vector<int64_t>& numbers, bool max) : reach(max ? 1 : 0) {
    for (int i = 0; i < 3; i++) {
      size[i] = numbers[i], step[i] = numbers[3 + i];
      out[i] = max ? (size[i] - 1) / step[i] + 1 : size[i] / step[i];
    }
  }

  void place(int64_t row, const int64_t* sizes, int64_t* at) const {
    at[2] = row % sizes[2], row /= sizes[2];
    at[1] = row % sizes[1], row /= sizes[1];
    at[0] = row % sizes[0], at[3] = row / sizes[0];
  }

  static int64_t row(const int64_t* at, const int64_t* sizes) {
    return ((at[3] * sizes[0] + at[0]) * sizes[1] + at[1]) * sizes[2] + at[2];
  }

  // First and last place that the window of output place o has along an axis.
  void span(int64_t o, int axis, int64_t* first, int64_t* last) const {
    *first = std::max<int64_t>(0, o * step[axis] - reach);
    *last = std::min(size[axis], reach ? o * step[axis] + 2 : (o + 1) * step[axis]) - 1;
  }

  // Calls f(input row, number of the place in the window) for each place of an output row's window.
  template <class F>
  void inputs(int64_t output, const F& f) const {
    int64_t o[4], first[3], last[3];
    place(output, out, o);
    for (int i = 0; i < 3; i++) span(o[i], i, &first[i], &last[i]);
    int64_t at[4] = {0, 0, 0, o[3]};
    for (at[0] = first[0]; at[0] <= last[0]; at[0]++)
      for (at[1] = first[1]; at[1] <= last[1]; at[1]++)
        for (at[2] = first[2]; at[2] <= last[2]; at[2]++) f(row(at, size), number(at, o));
  }

  // Calls f(output row, number of this place in its window) for each window that holds a row.
  template <class F>
  void outputs(int64_t input, const F& f) const {
    int64_t at[4], first[3], last[3];
    place(input, size, at);
    for (int i = 0; i < 3; i++) {
      first[i] = reach ? std::max<int64_t>(0, (at[i] + step[i] - 2) / step[i]) : at[i] / step[i];
      last[i] = std::min(out[i] - 1, (at[i] + reach) / step[i]);
    }
    int64_t o[4] = {0, 0, 0, at[3]};
    for (o[0] = first[0]; o[0] <= last[0]; o[0]++)
      for (o[1] = first[1]; o[1] <= last[1]; o[1]++)
        for (o[2] = first[2]; o[2] <= last[2]; o[2]++) f(row(o, out), number(at, o));
  }

  // Of a maximum's 3 x 3 x 3 places, in the order in which PyTorch looks at them.
  uint8_t number(const int64_t* at, const int64_t* o) const {
    if (!reach) return 0;
    int64_t n = 0;
    for (int i = 0; i < 3; i++) n = n * 3 + (at[i] - o[i] * step[i] + 1);
    return uint8_t(n);
  }
};

// The loops over one row. A place wins if it is larger than those before it, or not a number.
template <class T>
void max_row(
    const T* __restrict x, const float* __restrict scale, const float* __restrict shift,
    float number, float* __restrict best, float* __restrict place, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) {
    float value = float(activate(x[c], scale[c], shift[c]));
    bool wins = value > best[c] || value != value;
    best[c] = wins ? value : best[c];
    place[c] = wins ? number : place[c];
  }
}

template <class T>
void sum_row(
    const T* __restrict x, const float* __restrict scale, const float* __restrict shift,
    float* __restrict sum, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) sum[c] += float(activate(x[c], scale[c], shift[c]));
}

// Empties a part of a sum into the whole, in float64: in float32 a sum of thousands drifts.
inline void drain_row(float* __restrict part, double* __restrict sum, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) sum[c] += part[c], part[c] = 0.0f;
}

template <class From, class To>
void scale_row(const From* __restrict from, float factor, To* __restrict to, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) to[c] = narrow<To>(float(from[c]) * factor);
}

inline void number_row(
    const float* __restrict place, uint8_t* __restrict choice, int64_t columns) {
  for (int64_t c = 0; c < columns; c++) choice[c] = uint8_t(int(place[c]));
}

template <class T>
void add_chosen_row(
    const T* __restrict from, const uint8_t* __restrict choice, int number, float* __restrict sum,
    int64_t columns) {
  for (int64_t c = 0; c < columns; c++) sum[c] += choice[c] == number ? float(from[c]) : 0.0f;
}

template <class T>
void mask_row(
    const T* __restrict x, const float* __restrict scale, const float* __restrict shift,
    float* __restrict g, int64_t columns) {
  for (int64_t c = 0; c < columns; c++)
    g[c] = float(activate(x[c], scale[c], shift[c])) <= 0 ? 0.0f : g[c];
}

struct Place {
  int64_t row;
  uint8_t number;
};

#ifdef DENSELY_PANELS

// What `pool` does for a row of the result, of 16-bit numbers.
template <bool max, class T>
void pool_panels(
    Matrix<T> x, const float* scale, const float* shift, const std::vector<Place>& window, T* out,
    uint8_t* choice) {
  in_panels(0, 1, x.columns, [=, &window](auto panel, int64_t, int64_t) {
    __m512 s = panel.load(scale), b = panel.load(shift);
    __m512 sum = _mm512_set1_ps(max ? -std::numeric_limits<float>::infinity() : 0.0f);
    __m512i chosen = _mm512_setzero_si512();
    for (const Place& place : window) {
      __m512 value = rounded<T>(relu(_mm512_fmadd_ps(panel.load(x.row(place.row)), s, b)));
      if constexpr (max) {
        __mmask16 wins = _mm512_cmp_ps_mask(value, sum, _CMP_GT_OQ) |
                         _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        sum = _mm512_mask_mov_ps(sum, wins, value);
        chosen = _mm512_mask_mov_epi32(chosen, wins, _mm512_set1_epi32(place.number));
      } else {
        sum = _mm512_add_ps(sum, value);
      }
    }
    if constexpr (max)
      panel.store(choice, chosen);
    else
      sum = _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / window.size()));
    panel.store(out, sum);
  });
}

// What `pool_backward` does for a row of x, up to the sums.
template <bool max, class T>
void unpool_panels(
    Matrix<T> g, Matrix<uint8_t> choice, const std::vector<Place>& windows, float share, const T* x,
    const float* scale, const float* shift, const float* mean, T* out, NormSums& sums) {
  float *bias = sums.bias.data(), *weight = sums.weight.data();
  in_panels(0, 1, g.columns, [=, &windows](auto panel, int64_t, int64_t) {
    __m512 up = _mm512_setzero_ps();
    for (const Place& place : windows) {
      __m512 more = panel.load(g.row(place.row));
      if constexpr (max) {
        __mmask16 was = _mm_cmpeq_epi8_mask(
            panel.load(choice.row(place.row)), _mm_set1_epi8(char(place.number)));
        up = _mm512_mask_add_ps(up, was, up, more);
      } else {
        up = _mm512_mul_ps(more, _mm512_set1_ps(share));
      }
    }
    __m512 in = panel.load(x);
    up = masked(up, rounded<T>(_mm512_fmadd_ps(in, panel.load(scale), panel.load(shift))));
    __m512 centred = _mm512_sub_ps(in, panel.load(mean));
    panel.store(bias, _mm512_add_ps(panel.load(bias), up));
    panel.store(weight, _mm512_fmadd_ps(up, centred, panel.load(weight)));
    panel.store(out, up);
  });
}

#endif

// geometry: sizes of three axes, steps along them. `choice` [pooled rows, C] says for a maximum
// which place of its window it was.
void pool(
    Tensor x, Tensor scale, Tensor shift, std::vector<int64_t> geometry, bool max, Tensor out,
    Tensor choice) {
  Windows windows(geometry, max);
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto in = matrix<T>(x), to = matrix<T>(out);
    auto s = vector(scale), b = vector(shift);
    auto which = max ? matrix<uint8_t>(choice) : Matrix<uint8_t>{};
    int64_t columns = in.columns;
    in_chunks(to.rows, chunks_of(to.rows, columns), [&](int64_t, int64_t begin, int64_t end) {
#ifdef DENSELY_PANELS
      if constexpr (sizeof(T) == 2) {
        std::vector<Place> window;
        for (int64_t r = begin; r < end; r++) {
          window.clear();
          windows.inputs(
              r, [&](int64_t row, uint8_t number) { window.push_back({row, number}); });
          if (max)
            pool_panels<true>(in, s, b, window, to.row(r), which.row(r));
          else
            pool_panels<false>(in, s, b, window, to.row(r), nullptr);
        }
        return;
      }
#endif
      constexpr int64_t few = 16;  // places, whose sum in float32 is as good
      std::vector<float> best(columns), place(columns);
      std::vector<double> sum(columns);
      for (int64_t r = begin; r < end; r++) {
        std::fill(best.begin(), best.end(), max ? -std::numeric_limits<float>::infinity() : 0.0f);
        int64_t places = 0;
        windows.inputs(r, [&](int64_t row, uint8_t number) {
          places++;
          if (max)
            max_row(in.row(row), s, b, number, best.data(), place.data(), columns);
          else
            sum_row(in.row(row), s, b, best.data(), columns);
          if (!max && places % few == 0) drain_row(best.data(), sum.data(), columns);
        });
        if (!max && places >= few) {
          drain_row(best.data(), sum.data(), columns);
          std::copy(sum.begin(), sum.end(), best.begin());
          std::fill(sum.begin(), sum.end(), 0.0);
        }
        scale_row(best.data(), max ? 1.0f : 1.0f / places, to.row(r), columns);
        if (max) number_row(place.data(), which.row(r), columns);
      }
    });
  });
}

// Gradient of x, with all that batch norm adds to it, and of the norm's parameters.
void pool_backward(
    Tensor grad, Tensor choice, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor rstd,
    bool training, std::vector<int64_t> geometry, bool max, Tensor out, Tensor norm_weight,
    Tensor norm_bias) {
  Windows windows(geometry, max);
  for_dtype(x, [&](auto type) {
    using T = element<decltype(type)>;
    auto g = matrix<T>(grad), in = matrix<T>(x), to = matrix<T>(out);
    auto which = max ? matrix<uint8_t>(choice) : Matrix<uint8_t>{};
    int64_t columns = in.columns, chunks = chunks_of(in.rows, columns);
    float share = max ? 1.0f : 1.0f / (windows.step[0] * windows.step[1] * windows.step[2]);

    // The gradient of x * scale + shift at a row, before the mask.
    auto gather = [&](int64_t row, float* sum) {
      std::fill_n(sum, columns, 0.0f);
      windows.outputs(row, [&](int64_t output, uint8_t number) {
        if (max)
          add_chosen_row(g.row(output), which.row(output), number, sum, columns);
        else
          scale_row(g.row(output), share, sum, columns);
      });
    };

    // Masked, and summed up for the norm; what the norm adds to it is known only then.
    std::vector<NormSums> parts(chunks, NormSums(columns));
    in_chunks(in.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      NormSums& part = parts[chunk];
#ifdef DENSELY_PANELS
      if constexpr (sizeof(T) == 2) {
        std::vector<Place> asked;
        for (int64_t r = begin; r < end; r++) {
          asked.clear();
          windows.outputs(r, [&](int64_t row, uint8_t number) { asked.push_back({row, number}); });
          auto run = [&](auto of_max) {
            unpool_panels<of_max.value>(
                g, which, asked, share, in.row(r), vector(scale), vector(shift), vector(mean),
                to.row(r), part);
          };
          max ? run(std::true_type()) : run(std::false_type());
          if ((r - begin) % 64 == 63) part.flush();
        }
        part.flush();
        return;
      }
#endif
      std::vector<float> up(columns);
      for (int64_t r = begin; r < end; r++) {
        gather(r, up.data());
        mask_row(in.row(r), vector(scale), vector(shift), up.data(), columns);
        part.add(up.data(), in.row(r), vector(mean));
        if ((r - begin) % 64 == 63) part.flush();
        scale_row(up.data(), 1.0f, to.row(r), columns);
      }
      part.flush();
    });
    NormSums::finish(parts, vector(rstd), vector(norm_weight), vector(norm_bias));

    std::vector<float> a(columns), b(columns);
    for (int64_t c = 0; c < columns; c++) {
      float over_rows = training ? vector(scale)[c] / in.rows : 0.0f;
      a[c] = over_rows * vector(norm_bias)[c];
      b[c] = over_rows * vector(rstd)[c] * vector(norm_weight)[c];
    }
    in_chunks(in.rows, chunks, [&](int64_t, int64_t begin, int64_t end) {
      constexpr int64_t few = 64;
      std::vector<T> memory(few * columns);
      Matrix<T> masked{memory.data(), few, columns, columns};
      for (int64_t first = begin; first < end; first += few) {
        int64_t rows = std::min(end - first, few);
        for (int64_t r = 0; r < rows; r++) std::copy_n(to.row(first + r), columns, masked.row(r));
        form_rows(
            masked, in.from(first), vector(scale), vector(mean), training ? a.data() : nullptr,
            b.data(), to.from(first), 0, rows);
      }
    });
  });
}

}  // namespace densely

STABLE_TORCH_LIBRARY_FRAGMENT(densely_cpu, m) {
  m.def(
      "pool(Tensor x, Tensor scale, Tensor shift, int[] geometry, bool max, Tensor(a!) out, "
      "Tensor(b!) choice) -> ()");
  m.def(
      "pool_backward(Tensor grad, Tensor choice, Tensor x, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, bool training, int[] geometry, bool max, Tensor(a!) out, "
      "Tensor(b!) norm_weight, Tensor(c!) norm_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(densely_cpu, CPU, m) {
  m.impl("pool", TORCH_BOX(&densely::pool));
  m.impl("pool_backward", TORCH_BOX(&densely::pool_backward));
}
