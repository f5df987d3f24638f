// What all CPU kernels share: matrices as pointers, chunks of rows, sums in a fixed order.
//
// A matrix is [rows, columns]; its columns stand side by side, its rows `stride` values apart.
// Rows are cut into one chunk a thread, by the number of threads alone, and partial sums are added
// chunk after chunk: the same bits in every run with as many threads.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace densely {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// bfloat16 with a rounding that compilers turn into vector code.
struct bfloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  static bfloat16 from(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {uint16_t(value == value ? rounded : 0x7fc0)};
  }
};

template <class T>
inline T narrow(float value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return bfloat16::from(value);
  else
    return static_cast<T>(value);
}

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;
  T* row(int64_t r) const { return data + r * stride; }
  Matrix from(int64_t r) const { return {row(r), rows - r, columns, stride}; }
};

template <class T>
constexpr ScalarType scalar_type_of = std::is_same_v<T, bfloat16>   ? ScalarType::BFloat16
                                      : std::is_same_v<T, _Float16> ? ScalarType::Half
                                      : std::is_same_v<T, uint8_t>  ? ScalarType::Byte
                                                                    : ScalarType::Float;

template <class T>
inline Matrix<T> matrix(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == scalar_type_of<T>,
                  "densely's CPU kernels were given maps of several dtypes");
  return {static_cast<T*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0)};
}

inline float* vector(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline float* vector(const std::optional<Tensor>& t) { return t ? vector(*t) : nullptr; }

// Calls f(type) with a null pointer of the element type of t.
template <class F>
inline void for_dtype(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<_Float16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "densely's CPU kernels take float32, bfloat16 and float16");
  }
}

template <class Pointer>
using element = std::remove_pointer_t<Pointer>;

// Number of chunks for `items` pieces of work, each of about `values` values.
inline int64_t chunks_of(int64_t items, int64_t values) {
  constexpr int64_t least = 1 << 14;  // values worth a thread
  int64_t worth = std::max<int64_t>(1, items * values / least);
  return std::min({int64_t(torch::stable::get_num_threads()), worth, std::max<int64_t>(1, items)});
}

// Calls f(chunk, begin, end) for each chunk of `items`, in parallel.
template <class F>
inline void in_chunks(int64_t items, int64_t chunks, const F& f) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; chunk++)
      f(chunk, items * chunk / chunks, items * (chunk + 1) / chunks);
  });
}

}  // namespace densely
