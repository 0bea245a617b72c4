// SwiGLU of rows sorted by expert, on CPUs with bfloat16 matrix products.
//
//     h1 = x w1^T    h3 = x w3^T    a = silu(h1) * h3    y = a w2^T
//
// Why it exists: torch computes this as some forty separate operations an expert, casts and
// writes every weight twice, and lets oneDNN build a new kernel for each row count it meets. Here
// everything is a few products of *fixed* shape on blocks that stay in a core's cache: a panel of
// weights is cast and packed while it is read, meets all rows of its expert, and is forgotten. Weight
// gradients are accumulated in float32 where they belong.
//
// Shapes. N rows, n of one expert; D model width; F inner width. Weights are (E, F, D), (E, F, D)
// and (E, D, F), float32 or bfloat16; everything else is bfloat16, sums are float32.
//
// "Paired" is the layout in which the processor wants the right factor: rows 2i and 2i+1
// interleaved, so that one 32-bit word holds two consecutive terms of a sum (VNNI).

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t kRows = 64;   // rows of a block
constexpr int64_t kCols = 128;  // columns of a panel of weights
constexpr int64_t kDepth = 256; // tokens summed by one product in weight gradients

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- rows of 16 numbers -------------------------------------------------------------------

inline __m512 load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i narrow(__m512 v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
}

inline void store(BFloat16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}

inline __m512 rounded(__m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v)), 16));
}

inline __m256i load_narrow(const BFloat16* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

inline __m256i load_narrow(const float* p) {
  return narrow(_mm512_loadu_ps(p));
}

inline __m512i load_words(const BFloat16* p) {
  return _mm512_loadu_si512(p);
}

inline __m512i load_words(const float* p) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p)));
}

// Words of which `even` is the lower half.
inline __m512i pair(__m256i even, __m256i odd) {
  return _mm512_or_si512(
      _mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// e^x by 2^n e^r with |r| <= ln(2)/2 and eight terms of the series: an error of 1e-8.
inline __m512 exp16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, n);
}

inline __m512 sigmoid(__m512 x) {
  // An estimate of 1 / (1 + e^-x) to 14 bits and one step of Newton's: a division takes longer.
  // The exponent is bounded because the step would turn infinity into no number at all.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-80.0f), x);
  const __m512 sum =
      _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), bounded)));
  const __m512 guess = _mm512_rcp14_ps(sum);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2.0f)));
}

// A 16 x 16 matrix of words, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// ---- packing ------------------------------------------------------------------------------

// The transpose of `rows` rows of `depth` numbers, paired: out[depth / 2][out_stride] words.
template <typename Weight>
void pack_transposed(
    const Weight* in, int64_t stride, int64_t rows, int64_t depth, BFloat16* out,
    int64_t out_stride) {
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t c = 0; c < rows; c += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = load_words(in + (c + i) * stride + k);
      }
      transpose(block);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(words + (k / 2 + i) * out_stride + c, block[i]);
      }
    }
  }
}

// `depth` rows of `cols` numbers, paired: out[depth / 2][kCols] words.
template <typename Weight>
void pack_paired(const Weight* in, int64_t stride, int64_t depth, int64_t cols, BFloat16* out) {
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t c = 0; c < cols; c += 16) {
      const __m512i both =
          pair(load_narrow(in + k * stride + c), load_narrow(in + (k + 1) * stride + c));
      _mm512_storeu_si512(words + k / 2 * kCols + c, both);
    }
  }
}

// ---- where rows are -----------------------------------------------------------------------

struct Expert {
  int64_t index;
  int64_t start;        // first row
  int64_t rows;         // at least 1
  int64_t paired_start; // first row where each expert is padded to kRows
  int64_t depth_start;  // first of its blocks of kDepth tokens
};

struct Rows {
  std::vector<Expert> experts; // those with rows
  std::vector<int64_t> idle;
  int64_t padded = 0;
  int64_t depth_blocks = 0;

  Rows(at::IntArrayRef counts, int64_t total) {
    int64_t start = 0;
    for (size_t e = 0; e < counts.size(); ++e) {
      const int64_t rows = counts[e];
      TORCH_CHECK(rows >= 0, "an expert has ", rows, " rows");
      if (rows == 0) {
        idle.push_back(static_cast<int64_t>(e));
        continue;
      }
      experts.push_back({static_cast<int64_t>(e), start, rows, padded, depth_blocks});
      start += rows;
      padded += round_up(rows, kRows);
      depth_blocks += (rows + kDepth - 1) / kDepth;
    }
    TORCH_CHECK(start == total, "counts sum to ", start, ", but there are ", total, " rows");
  }
};

// Rows of a matrix, of which kRows may be read from any row on: a block may reach beyond
// its expert (those results are dropped), but not beyond the matrix.
class Readable {
 public:
  explicit Readable(const Tensor& matrix)
      : data_(matrix.const_data_ptr<BFloat16>()), total_(matrix.size(0)), width_(matrix.size(1)) {
    first_ = std::max<int64_t>(0, total_ - kRows);
    // A tensor, because it is aligned: a tile that straddles cache lines loads three times slower.
    tail_ = at::zeros({total_ - first_ + kRows, width_}, matrix.options());
    std::copy(data_ + first_ * width_, data_ + total_ * width_, tail_.data_ptr<BFloat16>());
  }
  const BFloat16* from(int64_t row) const {
    return row + kRows <= total_ ? data_ + row * width_ : tail_.const_data_ptr<BFloat16>() + (row - first_) * width_;
  }

 private:
  const BFloat16* data_;
  int64_t total_, width_, first_;
  Tensor tail_;
};

// ---- running ------------------------------------------------------------------------------

// Calls `work(item, scratch)` for every item, whichever thread is free taking the next.
// Items write to different places, so the result does not depend on who took what.
template <typename Work>
void for_each_item(int64_t items, size_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  at::parallel_for(0, threads, 1, [&](int64_t /*begin*/, int64_t /*end*/) {
    // Kept from call to call: fresh memory costs a page fault every four kilobytes.
    static thread_local std::vector<char> memory;
    memory.resize(std::max(memory.size(), scratch_bytes + 64));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    char* aligned = memory.data() + (64 - address % 64);
    for (int64_t item = next++; item < items; item = next++) {
      work(item, aligned);
    }
    at::native::cpublas::brgemm_release();
  });
}

Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, at::TensorOptions().dtype(dtype));
}

template <typename Weight>
const Weight* data(const Tensor& weight) {
  return weight.const_data_ptr<Weight>();
}

void check(const Tensor& x, const Tensor& w1, const Tensor& w3, const Tensor& w2) {
  TORCH_CHECK(x.dim() == 2 && w1.dim() == 3, "x must be (N, D) and w1 (E, F, D)");
  const int64_t experts = w1.size(0), inner = w1.size(1), width = w1.size(2);
  TORCH_CHECK(x.size(1) == width, "x has ", x.size(1), " columns, w1 ", width);
  TORCH_CHECK(w3.sizes() == w1.sizes(), "w1 and w3 differ in shape");
  TORCH_CHECK(
      w2.sizes() == at::IntArrayRef({experts, width, inner}), "w2 must be (E, D, F)");
  TORCH_CHECK(width % 32 == 0 && inner % 32 == 0, "D and F must be multiples of 32");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x must be bfloat16");
  TORCH_CHECK(
      w1.scalar_type() == w3.scalar_type() && w1.scalar_type() == w2.scalar_type(),
      "weights differ in dtype");
  for (const Tensor* tensor : {&x, &w1, &w3, &w2}) {
    TORCH_CHECK(tensor->is_contiguous() && tensor->is_cpu(), "tensors must be contiguous, on CPU");
  }
}

// ---- forward ------------------------------------------------------------------------------

template <typename Weight>
void forward(
    const Tensor& x, const Rows& rows, const Tensor& w1, const Tensor& w3, const Tensor& w2,
    BFloat16* h, BFloat16* y) {
  const int64_t D = w1.size(2), F = w1.size(1), N = x.size(0);
  const Readable x_rows(x);
  const Tensor a_tensor = empty({N + kRows, F}, at::kBFloat16);
  BFloat16* a = a_tensor.data_ptr<BFloat16>();

  const int64_t inner_panels = (F + kCols - 1) / kCols;
  const size_t inner_bytes = 2 * kCols * (D * sizeof(BFloat16) + kRows * sizeof(float));
  const int64_t experts = static_cast<int64_t>(rows.experts.size());
  for_each_item(experts * inner_panels, inner_bytes, [&](int64_t item, char* scratch) {
    const Expert& expert = rows.experts[item / inner_panels];
    const int64_t panel = item % inner_panels;
    const int64_t f = panel * kCols, cols = std::min(kCols, F - f);
    // Columns of w1 and of w3 side by side, so that each row of x is read once.
    constexpr int64_t kBoth = 2 * kCols;
    auto* c = reinterpret_cast<float*>(scratch);
    auto* right = reinterpret_cast<BFloat16*>(c + kRows * kBoth);
    const int64_t offset = (expert.index * F + f) * D;
    pack_transposed(data<Weight>(w1) + offset, D, cols, D, right, kBoth);
    pack_transposed(data<Weight>(w3) + offset, D, cols, D, right + 2 * cols, kBoth);
    for (int64_t r = 0; r < expert.rows; r += kRows) {
      const int64_t row = expert.start + r, count = std::min(kRows, expert.rows - r);
      brgemm(kRows, 2 * cols, D, D, kBoth, kBoth, false, x_rows.from(row), right, c);
      for (int64_t i = 0; i < count; ++i) {
        BFloat16* kept = h == nullptr ? nullptr : h + (panel * N + row + i) * kBoth;
        for (int64_t k = 0; k < cols; k += 16) {
          // Rounded first, so that the backward pass recomputes the very same activation.
          const __m512 v1 = rounded(_mm512_loadu_ps(c + i * kBoth + k));
          const __m512 v3 = rounded(_mm512_loadu_ps(c + i * kBoth + cols + k));
          if (kept != nullptr) {
            store(kept + k, v1);
            store(kept + kCols + k, v3);
          }
          store(a + (row + i) * F + f + k, _mm512_mul_ps(_mm512_mul_ps(v1, sigmoid(v1)), v3));
        }
      }
    }
  });

  const int64_t outer_panels = (D + kCols - 1) / kCols;
  const size_t outer_bytes = F * kCols * sizeof(BFloat16) + kRows * kCols * sizeof(float);
  for_each_item(experts * outer_panels, outer_bytes, [&](int64_t item, char* scratch) {
    const Expert& expert = rows.experts[item / outer_panels];
    const int64_t d = item % outer_panels * kCols, cols = std::min(kCols, D - d);
    auto* c = reinterpret_cast<float*>(scratch);
    auto* panel = reinterpret_cast<BFloat16*>(c + kRows * kCols);
    pack_transposed(data<Weight>(w2) + (expert.index * D + d) * F, F, cols, F, panel, kCols);
    for (int64_t r = 0; r < expert.rows; r += kRows) {
      const int64_t row = expert.start + r, count = std::min(kRows, expert.rows - r);
      brgemm(kRows, cols, F, F, kCols, kCols, false, a + row * F, panel, c);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < cols; k += 16) {
          store(y + (row + i) * D + d + k, _mm512_loadu_ps(c + i * kCols + k));
        }
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------

// Each expert's rows paired, padded with zeros to kRows: out[padded / 2][D] words.
void pair_rows(const BFloat16* in, int64_t D, const Expert& expert, BFloat16* out) {
  auto* words = reinterpret_cast<uint32_t*>(out + expert.paired_start * D);
  const BFloat16* from = in + expert.start * D;
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t r = 0; r < round_up(expert.rows, kRows); r += 2) {
    for (int64_t d = 0; d < D; d += 16) {
      const __m256i even = r < expert.rows ? load_narrow(from + r * D + d) : zero;
      const __m256i odd = r + 1 < expert.rows ? load_narrow(from + (r + 1) * D + d) : zero;
      _mm512_storeu_si512(words + r / 2 * D + d, pair(even, odd));
    }
  }
}

// Each expert's rows transposed, in blocks of kDepth tokens: out[block][D][kDepth].
void transpose_rows(const BFloat16* in, int64_t D, const Expert& expert, BFloat16* out) {
  const BFloat16* from = in + expert.start * D;
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t r = 0; r < round_up(expert.rows, kRows); r += 32) {
    BFloat16* block = out + (expert.depth_start + r / kDepth) * D * kDepth + r % kDepth;
    for (int64_t d = 0; d < D; d += 16) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t even = r + 2 * i;
        words[i] = pair(
            even < expert.rows ? load_narrow(from + even * D + d) : zero,
            even + 1 < expert.rows ? load_narrow(from + (even + 1) * D + d) : zero);
      }
      transpose(words);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(block + (d + i) * kDepth, words[i]);
      }
    }
  }
}

// A weight gradient's block: written where it belongs when that is float32, else by way of `spare`.
class GradientBlock {
 public:
  GradientBlock(Tensor& gradient, int64_t offset, int64_t stride, float* spare)
      : wide_(gradient.scalar_type() == at::kFloat),
        stride_(stride),
        spare_(spare),
        offset_(offset),
        gradient_(gradient) {}
  float* out(int64_t spare_stride) {
    spare_stride_ = spare_stride;
    return wide_ ? gradient_.data_ptr<float>() + offset_ : spare_;
  }
  int64_t stride() const {
    return wide_ ? stride_ : spare_stride_;
  }
  void finish(int64_t rows, int64_t cols) {
    if (wide_) {
      return;
    }
    BFloat16* to = gradient_.data_ptr<BFloat16>() + offset_;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; c += 16) {
        store(to + r * stride_ + c, _mm512_loadu_ps(spare_ + r * spare_stride_ + c));
      }
    }
  }

 private:
  bool wide_;
  int64_t stride_, spare_stride_ = 0;
  float* spare_;
  int64_t offset_;
  Tensor& gradient_;
};

struct Gradients {
  Tensor dx, dw1, dw3, dw2; // undefined where nobody asked
};

template <typename Weight>
void backward(
    const Tensor& dy, const Tensor& x, const Rows& rows, const Tensor& h_tensor, const Tensor& w1,
    const Tensor& w3, const Tensor& w2, Gradients& out) {
  const int64_t D = w1.size(2), F = w1.size(1), N = x.size(0);
  const int64_t experts = static_cast<int64_t>(rows.experts.size());
  const BFloat16* h = h_tensor.const_data_ptr<BFloat16>();
  const bool needs_w13 = out.dw1.defined() || out.dw3.defined();

  Tensor x_paired, dy_transposed;
  if (needs_w13) {
    x_paired = empty({rows.padded, D}, at::kBFloat16);
  }
  if (out.dw2.defined()) {
    dy_transposed = empty({rows.depth_blocks, D, kDepth}, at::kBFloat16);
  }
  for_each_item(experts, 0, [&](int64_t item, char*) {
    const Expert& expert = rows.experts[item];
    if (needs_w13) {
      pair_rows(x.const_data_ptr<BFloat16>(), D, expert, x_paired.data_ptr<BFloat16>());
    }
    if (out.dw2.defined()) {
      transpose_rows(dy.const_data_ptr<BFloat16>(), D, expert, dy_transposed.data_ptr<BFloat16>());
    }
  });

  const Readable dy_rows(dy);
  Tensor dh1_tensor, dh3_tensor;
  if (out.dx.defined()) {
    dh1_tensor = empty({N + kRows, F}, at::kBFloat16);
    dh3_tensor = empty({N + kRows, F}, at::kBFloat16);
  }
  BFloat16* dh1 = out.dx.defined() ? dh1_tensor.data_ptr<BFloat16>() : nullptr;
  BFloat16* dh3 = out.dx.defined() ? dh3_tensor.data_ptr<BFloat16>() : nullptr;

  int64_t most = 0; // rows of the busiest expert, padded to kDepth
  for (const Expert& expert : rows.experts) {
    most = std::max(most, round_up(expert.rows, kDepth));
  }
  const int64_t inner_panels = (F + kCols - 1) / kCols;
  const size_t spare_floats = kCols * D;
  const size_t inner_bytes = (kRows * kCols + spare_floats) * sizeof(float) +
      (D * kCols + 3 * most * kCols) * sizeof(BFloat16);
  for_each_item(experts * inner_panels, inner_bytes, [&](int64_t item, char* scratch) {
    const Expert& expert = rows.experts[item / inner_panels];
    const int64_t f = item % inner_panels * kCols, cols = std::min(kCols, F - f);
    auto* c = reinterpret_cast<float*>(scratch);
    float* spare = c + kRows * kCols;
    auto* panel = reinterpret_cast<BFloat16*>(spare + spare_floats);
    BFloat16* a_paired = panel + D * kCols;              // [padded / 2][kCols] words
    BFloat16* dh1_transposed = a_paired + most * kCols;  // [block][kCols][kDepth]
    BFloat16* dh3_transposed = dh1_transposed + most * kCols;
    pack_paired(data<Weight>(w2) + expert.index * D * F + f, F, D, cols, panel);

    for (int64_t r = 0; r < expert.rows; r += kRows) {
      const int64_t row = expert.start + r, count = std::min(kRows, expert.rows - r);
      brgemm(kRows, cols, D, D, kCols, kCols, false, dy_rows.from(row), panel, c);
      BFloat16* t1 = dh1_transposed + r / kDepth * kCols * kDepth + r % kDepth;
      BFloat16* t3 = dh3_transposed + r / kDepth * kCols * kDepth + r % kDepth;
      for (int64_t k = 0; k < cols; k += 16) {
        for (int64_t half = 0; half < kRows; half += 32) {
          __m512i words1[16], words3[16];
          for (int64_t p = 0; p < 16; ++p) {
            __m256i act[2], d1[2], d3[2];
            for (int64_t odd = 0; odd < 2; ++odd) {
              const int64_t i = half + 2 * p + odd;
              if (i >= count) {
                act[odd] = d1[odd] = d3[odd] = _mm256_setzero_si256();
                continue;
              }
              const int64_t at = (row + i) * F + f + k;
              const BFloat16* kept = h + ((f / kCols) * N + row + i) * 2 * kCols + k;
              const __m512 v1 = load(kept), v3 = load(kept + kCols);
              const __m512 dh = _mm512_loadu_ps(c + i * kCols + k);
              const __m512 s = sigmoid(v1), silu = _mm512_mul_ps(v1, s);
              // d silu(h) / dh = s (1 + h (1 - s)) = s + silu (1 - s)
              const __m512 slope =
                  _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
              act[odd] = narrow(_mm512_mul_ps(silu, v3));
              d3[odd] = narrow(_mm512_mul_ps(dh, silu));
              d1[odd] = narrow(_mm512_mul_ps(_mm512_mul_ps(dh, v3), slope));
              if (dh1 != nullptr) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(dh1 + at), d1[odd]);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(dh3 + at), d3[odd]);
              }
            }
            auto* pairs = reinterpret_cast<uint32_t*>(a_paired) + ((r + half) / 2 + p) * kCols + k;
            _mm512_storeu_si512(pairs, pair(act[0], act[1]));
            words1[p] = pair(d1[0], d1[1]);
            words3[p] = pair(d3[0], d3[1]);
          }
          transpose(words1);
          transpose(words3);
          for (int64_t i = 0; i < 16; ++i) {
            _mm512_storeu_si512(t1 + (k + i) * kDepth + half, words1[i]);
            _mm512_storeu_si512(t3 + (k + i) * kDepth + half, words3[i]);
          }
        }
      }
    }

    const int64_t padded = round_up(expert.rows, kRows);
    const auto from_transposed = [&](Tensor& gradient, const BFloat16* transposed) {
      if (!gradient.defined()) {
        return;
      }
      GradientBlock block(gradient, (expert.index * F + f) * D, D, spare);
      float* to = block.out(D);
      const BFloat16* right = x_paired.const_data_ptr<BFloat16>() + expert.paired_start * D;
      for (int64_t k = 0; k < padded; k += kDepth) {
        const int64_t depth = std::min(kDepth, padded - k);
        brgemm(
            cols, D, depth, kDepth, D, block.stride(), k > 0, transposed + k * kCols,
            right + k * D, to);
      }
      block.finish(cols, D);
    };
    from_transposed(out.dw1, dh1_transposed);
    from_transposed(out.dw3, dh3_transposed);
    if (out.dw2.defined()) {
      GradientBlock block(out.dw2, expert.index * D * F + f, F, spare);
      float* to = block.out(kCols);
      const BFloat16* left =
          dy_transposed.const_data_ptr<BFloat16>() + expert.depth_start * D * kDepth;
      for (int64_t k = 0; k < padded; k += kDepth) {
        const int64_t depth = std::min(kDepth, padded - k);
        brgemm(
            D, cols, depth, kDepth, kCols, block.stride(), k > 0, left + k * D,
            a_paired + k * kCols, to);
      }
      block.finish(D, cols);
    }
  });

  if (!out.dx.defined()) {
    return;
  }
  BFloat16* dx = out.dx.data_ptr<BFloat16>();
  const int64_t outer_panels = (D + kCols - 1) / kCols;
  const size_t outer_bytes = 2 * F * kCols * sizeof(BFloat16) + kRows * kCols * sizeof(float);
  for_each_item(experts * outer_panels, outer_bytes, [&](int64_t item, char* scratch) {
    const Expert& expert = rows.experts[item / outer_panels];
    const int64_t d = item % outer_panels * kCols, cols = std::min(kCols, D - d);
    auto* c = reinterpret_cast<float*>(scratch);
    auto* panel1 = reinterpret_cast<BFloat16*>(c + kRows * kCols);
    BFloat16* panel3 = panel1 + F * kCols;
    pack_paired(data<Weight>(w1) + expert.index * F * D + d, D, F, cols, panel1);
    pack_paired(data<Weight>(w3) + expert.index * F * D + d, D, F, cols, panel3);
    for (int64_t r = 0; r < expert.rows; r += kRows) {
      const int64_t row = expert.start + r, count = std::min(kRows, expert.rows - r);
      brgemm(kRows, cols, F, F, kCols, kCols, false, dh1 + row * F, panel1, c);
      brgemm(kRows, cols, F, F, kCols, kCols, true, dh3 + row * F, panel3, c);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < cols; k += 16) {
          store(dx + (row + i) * D + d + k, _mm512_loadu_ps(c + i * kCols + k));
        }
      }
    }
  });
}

// ---- what torch calls ---------------------------------------------------------------------

std::tuple<Tensor, Tensor> swiglu_forward(
    const Tensor& x, at::IntArrayRef counts, const Tensor& w1, const Tensor& w3, const Tensor& w2,
    bool keep) {
  check(x, w1, w3, w2);
  TORCH_CHECK(static_cast<int64_t>(counts.size()) == w1.size(0), "one count an expert");
  const Rows rows(counts, x.size(0));
  const int64_t F = w1.size(1);
  Tensor y = at::empty(x.sizes(), x.options());
  // Panel by panel, a row's part of h1 beside that of h3: as the backward pass reads it.
  const int64_t panels = (F + kCols - 1) / kCols;
  Tensor h = keep ? empty({panels, x.size(0), 2 * kCols}, at::kBFloat16)
                  : at::empty({0}, x.options());
  BFloat16* kept = keep ? h.data_ptr<BFloat16>() : nullptr;
  if (w1.scalar_type() == at::kFloat) {
    forward<float>(x, rows, w1, w3, w2, kept, y.data_ptr<BFloat16>());
  } else {
    forward<BFloat16>(x, rows, w1, w3, w2, kept, y.data_ptr<BFloat16>());
  }
  return {y, h};
}

std::vector<Tensor> swiglu_backward(
    const Tensor& dy, const Tensor& x, at::IntArrayRef counts, const Tensor& h, const Tensor& w1,
    const Tensor& w3, const Tensor& w2, at::IntArrayRef needs) {
  check(x, w1, w3, w2);
  TORCH_CHECK(needs.size() == 4, "four gradients can be asked for");
  TORCH_CHECK(
      dy.sizes() == x.sizes() && dy.is_contiguous() && dy.scalar_type() == at::kBFloat16,
      "dy must be contiguous bfloat16 in the shape of x");
  const Rows rows(counts, x.size(0));
  Gradients out;
  if (needs[0]) {
    out.dx = at::empty(x.sizes(), x.options());
  }
  Tensor* gradients[] = {&out.dw1, &out.dw3, &out.dw2};
  const Tensor* weights[] = {&w1, &w3, &w2};
  for (int i = 0; i < 3; ++i) {
    if (needs[i + 1]) {
      *gradients[i] = empty(weights[i]->sizes(), weights[i]->scalar_type());
      for (const int64_t expert : rows.idle) {
        gradients[i]->select(0, expert).zero_();
      }
    }
  }
  if (w1.scalar_type() == at::kFloat) {
    backward<float>(dy, x, rows, h, w1, w3, w2, out);
  } else {
    backward<BFloat16>(dy, x, rows, h, w1, w3, w2, out);
  }
  std::vector<Tensor> result;
  for (const Tensor* gradient : {&out.dx, &out.dw1, &out.dw3, &out.dw2}) {
    result.push_back(gradient->defined() ? *gradient : at::empty({0}, x.options()));
  }
  return result;
}

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512bf16") && at::native::cpublas::could_pack(at::kBFloat16);
}

} // namespace

TORCH_LIBRARY(moesaic, m) {
  m.def("swiglu_is_supported() -> bool", is_supported);
  m.def(
      "swiglu_forward(Tensor x, int[] counts, Tensor w1, Tensor w3, Tensor w2, bool keep) -> "
      "(Tensor, Tensor)");
  m.def(
      "swiglu_backward(Tensor dy, Tensor x, int[] counts, Tensor h, Tensor w1, "
      "Tensor w3, Tensor w2, int[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moesaic, CPU, m) {
  m.impl("swiglu_forward", swiglu_forward);
  m.impl("swiglu_backward", swiglu_backward);
}
