// Rows of 16-bit numbers, sixteen columns at a time, with AVX-512.
//
// A panel is sixteen columns of some rows: what belongs to a column stays in registers while the
// rows go by, and a mask takes the columns that are left over, of which narrow maps have many.
// Compilers make scalar code of those. Elsewhere the loops over a row in elementwise.h do the same.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DENSELY_PANELS 1

#include <immintrin.h>

#include "common.h"

namespace densely {

// As bfloat16::from: to the nearest, ties to even. The instruction for it takes denormals for zero.
inline __m512i upper_half(__m512 value) {
  __m512i wide = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}

// What is left of a value that is stored as T.
template <class T>
inline __m512 rounded(__m512 value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return _mm512_castsi512_ps(_mm512_slli_epi32(upper_half(value), 16));
  else
    return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <bool full>
struct Panel {
  int64_t column;
  __mmask16 mask;

  explicit Panel(int64_t at, int64_t columns = 16)
      : column(at), mask(full ? 0xffff : (1 << columns) - 1) {}

  __m512 load(const float* row) const { return _mm512_maskz_loadu_ps(mask, row + column); }

  __m512 load(const bfloat16* row) const {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(row)), 16));
  }

  __m512 load(const _Float16* row) const { return _mm512_cvtph_ps(bits(row)); }

  __m128i load(const uint8_t* row) const { return _mm_maskz_loadu_epi8(mask, row + column); }

  void store(uint8_t* row, __m512i value) const {
    _mm512_mask_cvtepi32_storeu_epi8(row + column, mask, value);
  }

  void store(float* row, __m512 value) const { _mm512_mask_storeu_ps(row + column, mask, value); }

  void store(bfloat16* row, __m512 value) const { put(row, _mm512_cvtepi32_epi16(upper_half(value))); }

  void store(_Float16* row, __m512 value) const {
    put(row, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

 private:
  __m256i bits(const void* row) const {
    return _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + column);
  }

  void put(void* row, __m256i value) const {
    uint16_t* at = static_cast<uint16_t*>(row) + column;
    if constexpr (full)  // masked stores are slower
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
    else
      _mm256_mask_storeu_epi16(at, mask, value);
  }
};

// g where relu lets x through, which are numbers above zero and NaN; zero elsewhere.
inline __m512 masked(__m512 g, __m512 x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), g);
}

inline __m512 relu(__m512 x) { return masked(x, x); }

// Sum of f(row); four at a time, so that no addition waits for the one before.
template <class F>
inline __m512 sum_rows(int64_t first, int64_t last, const F& f) {
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  int64_t r = first;
  for (; r + 4 <= last; r += 4) {
    a = _mm512_add_ps(a, f(r)), b = _mm512_add_ps(b, f(r + 1));
    c = _mm512_add_ps(c, f(r + 2)), d = _mm512_add_ps(d, f(r + 3));
  }
  for (; r < last; r++) a = _mm512_add_ps(a, f(r));
  return _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
}

// Calls f(panel, first row, last row) for all panels of rows [begin, end).
template <class F>
inline void in_panels(int64_t begin, int64_t end, int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + 16 <= columns; column += 16) f(Panel<true>(column), begin, end);
  if (column < columns) f(Panel<false>(column, columns - column), begin, end);
}

// The same in the order that is fastest for rows from memory: wide ones one after the other.
template <class F>
inline void stream(int64_t begin, int64_t end, int64_t columns, const F& f) {
  int64_t few = columns <= 64 ? 64 : 1;
  for (int64_t first = begin; first < end; first += few)
    in_panels(first, few == 1 ? first + 1 : std::min(end, first + few), columns, f);
}

}  // namespace densely

#endif
