// Packed matrices, and their products with few rows and with many.
//
// A matrix (rows, cols) is kept as panels of 32 rows; a panel as blocks of columns; a block as two
// tiles of 16 rows. A tile is what the processor's products take as their right factor, in lines of
// 64 bytes:
//
//     bfloat16   a line has a pair of columns of 16 rows; 16 lines, 32 columns a block
//     int8       a line has four columns of 16 rows; 16 lines, 64 columns a block
//     float8     becomes bfloat16 on its way: two lines of it share 64 bytes, in turns of 8 bytes
//
// int8 is multiplied as int8. The left factor's rows become 16-bit integers with a scale each,
// which lose less than bfloat16 does, as two planes of bytes: x = scale (256 high + low). What two
// products of bytes take is what one of bfloat16 would, and nothing has to be widened.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <torch/custom_class.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace moesaic {

using at::Tensor;

constexpr int64_t kPanel = 32;      // rows of a panel, columns of a block
constexpr int64_t kBlock = kPanel * kPanel; // numbers of a block: two tiles
constexpr int64_t kSlack = 32;      // rows that may be read beyond the last of a left factor

// ---- tiles --------------------------------------------------------------------------------

inline bool ask_for_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  // amx-bf16 and amx-tile are bits 22 and 24 of edx of leaf 7.
  uint32_t a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool has = (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
  return has && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

inline std::atomic<bool>& tiles_wanted() {
  static std::atomic<bool> wanted{true};
  return wanted;
}

inline bool has_tiles() {
  static const bool granted = ask_for_tiles();
  return granted && tiles_wanted().load(std::memory_order_relaxed);
}

// Eight tiles of 16 rows of 64 bytes, for as long as this lives.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (used_) {
      struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
  }
  ~Tiles() {
    if (used_) {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool used_;
};

// ---- left factors -------------------------------------------------------------------------

// Rows of activations, as products take them. Behind the last row as many as kSlack may be read.
struct Left {
  bf16* wide = nullptr;
  int64_t stride = 0; // numbers of a row, a multiple of 64; the padding is zero
  int64_t width = 0;  // how many of them a product takes
  // Where int8 weights are met:
  int8_t* high = nullptr;
  uint8_t* low = nullptr;
  float* scale = nullptr;

  Left from(int64_t row) const {
    Left part{wide + row * stride, stride, width};
    if (high != nullptr) {
      part.high = high + row * stride;
      part.low = low + row * stride;
      part.scale = scale + row;
    }
    return part;
  }

  // Once rows [begin, end) are there in bfloat16: their planes, where they are needed.
  void split(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end && high != nullptr; ++row) {
      split(row);
    }
  }

 private:
  void split(int64_t row) const {
    const bf16* x = wide + row * stride;
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < stride; i += 16) {
      most = _mm512_max_ps(most, _mm512_abs_ps(load16(x + i, 0xffff)));
    }
    const float largest = _mm512_reduce_max_ps(most);
    scale[row] = largest / 32767.0f;
    const __m512 factor = _mm512_set1_ps(largest > 0 ? 32767.0f / largest : 0.0f);
    for (int64_t i = 0; i < stride; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + i, 0xffff), factor));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(high + row * stride + i),
          _mm512_cvtepi32_epi8(_mm512_srai_epi32(v, 8)));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(low + row * stride + i), _mm512_cvtepi32_epi8(v));
    }
  }
};

// ---- products with one panel --------------------------------------------------------------

constexpr int64_t kAhead = 1024; // bytes between what is read and what is fetched

inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(static_cast<const char*>(p) + kAhead + i, _MM_HINT_T0);
  }
}

inline __m512i word_at(const void* p, int32_t flip = 0) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word ^ flip);
}

// out[M][32] = x[M] panel^T, each byte of the panel read once.
template <Kind kind, int M>
void few_rows(const uint8_t* w, const Left& x, float* out) {
  constexpr int64_t kTile = kBlock / 2 * (kind == Kind::bfloat16 ? 2 : 1);
  [[maybe_unused]] const Widener widen;
  __m512 sum[M][4];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 4; ++i) {
      sum[m][i] = _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < x.width; k += kPanel, w += 2 * kTile) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      __m512i left0, left1, right0, right1; // rows 0 to 15 and 16 to 31, two pairs of columns
      if constexpr (kind == Kind::bfloat16) {
        fetch(w + v * 256, 256);
        left0 = _mm512_load_si512(w + v * 128);
        left1 = _mm512_load_si512(w + v * 128 + 64);
        right0 = _mm512_load_si512(w + kTile + v * 128);
        right1 = _mm512_load_si512(w + kTile + v * 128 + 64);
      } else {
        fetch(w + v * 128, 128);
        widen(_mm512_load_si512(w + v * 64), left0, left1);
        widen(_mm512_load_si512(w + kTile + v * 64), right0, right1);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const bf16* at = x.wide + m * x.stride + k + v * 4;
        const __m512i pair0 = word_at(at), pair1 = word_at(at + 2);
        sum[m][0] = dot(sum[m][0], left0, pair0);
        sum[m][1] = dot(sum[m][1], right0, pair0);
        sum[m][2] = dot(sum[m][2], left1, pair1);
        sum[m][3] = dot(sum[m][3], right1, pair1);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(out + m * kPanel, _mm512_add_ps(sum[m][0], sum[m][2]));
    _mm512_storeu_ps(out + m * kPanel + 16, _mm512_add_ps(sum[m][1], sum[m][3]));
  }
}

// scale (256 high + low) of sums of bytes.
inline __m512 join_planes(__m512i high, __m512i low, float scale) {
  const __m512 sum =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
  return _mm512_mul_ps(sum, _mm512_set1_ps(scale));
}

template <int M>
void few_rows_int8(const uint8_t* w, const Left& x, float* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i weights[2], high[M][2], low[M][2];
  for (int half = 0; half < 2; ++half) {
    weights[half] = _mm512_setzero_si512();
    for (int m = 0; m < M; ++m) {
      high[m][half] = low[m][half] = _mm512_setzero_si512();
    }
  }
  for (int64_t k = 0; k < x.width; k += 2 * kPanel, w += 2 * kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < 16; ++v) {
      fetch(w + v * 128, 128);
      const __m512i line[2] = {
          _mm512_load_si512(w + v * 64), _mm512_load_si512(w + kBlock + v * 64)};
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        // Bytes of the left factor must be unsigned: 128 is added to them, and taken off below.
        weights[half] = _mm512_dpbusd_epi32(weights[half], ones, line[half]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const int64_t at = m * x.stride + k + v * 4;
          const int32_t flip = static_cast<int32_t>(0x80808080);
          high[m][half] = _mm512_dpbusd_epi32(high[m][half], word_at(x.high + at, flip), line[half]);
          low[m][half] = _mm512_dpbusd_epi32(low[m][half], word_at(x.low + at), line[half]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int half = 0; half < 2; ++half) {
      const __m512i added = _mm512_slli_epi32(weights[half], 7);
      _mm512_storeu_ps(
          out + m * kPanel + half * 16,
          join_planes(_mm512_sub_epi32(high[m][half], added), low[m][half], x.scale[m]));
    }
  }
}

template <Kind kind>
void few_rows(const uint8_t* w, const Left& x, int64_t rows, float* out) {
  const auto call = [&]<int M>() {
    if constexpr (kind == Kind::int8) {
      few_rows_int8<M>(w, x, out);
    } else {
      few_rows<kind, M>(w, x, out);
    }
  };
  switch (rows) {
    case 1:
      return call.template operator()<1>();
    case 2:
      return call.template operator()<2>();
    case 3:
      return call.template operator()<3>();
    default:
      return call.template operator()<4>();
  }
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <typename Number>
void store_tiles(Number* even, Number* odd) {
  _tile_stored(0, even, kPanel * 4);
  _tile_stored(1, even + 16, kPanel * 4);
  _tile_stored(2, odd, kPanel * 4);
  _tile_stored(3, odd + 16, kPanel * 4);
}

// out[16][32] = x[16] panel^T. Two blocks of columns at a time, with sums of their own: one sum
// would wait for itself. `blocks_at(k)` are the blocks of columns k and k + 32.
template <typename Blocks>
void tiles_16(const Left& x, float* out, const Blocks& blocks_at) {
  zero_tiles();
  for (int64_t k = 0; k < x.width; k += 2 * kPanel) {
    const bf16* w = blocks_at(k);
    _tile_loadd(4, x.wide + k, x.stride * 2);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x.wide + k + kPanel, x.stride * 2);
    _tile_loadd(6, w + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, w + 1536, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float odd[16 * kPanel];
  store_tiles(out, odd);
  for (int i = 0; i < 16 * kPanel; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_load_ps(odd + i)));
  }
}

// out[32][32] = x[32] panel^T; `block_at(k)` is the block of column k.
template <typename Block>
void tiles_32(const Left& x, float* out, const Block& block_at) {
  zero_tiles();
  const bf16* below = x.wide + 16 * x.stride;
  for (int64_t k = 0; k < x.width; k += kPanel) {
    const bf16* w = block_at(k);
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x.wide + k, x.stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below + k, x.stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles(out, out + 16 * kPanel);
}

// `vectors` times 64 numbers of e4m3 as bfloat16.
inline void widen_run(const uint8_t* w, int64_t vectors, bf16* out) {
  const Widener widen;
  for (int64_t i = 0; i < vectors; ++i, w += 64, out += 64) {
    fetch(w, 64);
    __m512i first, second;
    widen(_mm512_load_si512(w), first, second);
    _mm512_store_si512(out, first);
    _mm512_store_si512(out + 32, second);
  }
}

// out[rows][32] = x panel^T for at most 32 rows and a panel of bfloat16.
inline void tiles_bfloat16(const uint8_t* panel, const Left& x, int64_t rows, float* out) {
  const auto* w = reinterpret_cast<const bf16*>(panel);
  if (rows > 16) {
    return tiles_32(x, out, [&](int64_t k) { return w + k * kPanel; });
  }
  tiles_16(x, out, [&](int64_t k) {
    const bf16* blocks = w + k * kPanel;
    fetch(blocks, 4 * kBlock);
    return blocks;
  });
}

// The same for a panel of e4m3. It is widened block by block, so that this overlaps with the
// products of the blocks before.
inline void tiles_float8(const uint8_t* w, const Left& x, int64_t rows, float* out) {
  alignas(64) bf16 space[2][2 * kBlock];
  const auto widened = [&](int64_t k, int64_t columns) {
    bf16* blocks = space[k / columns % 2];
    widen_run(w + k * kPanel, columns * kPanel / 64, blocks);
    return blocks;
  };
  if (rows > 16) {
    return tiles_32(x, out, [&](int64_t k) { return widened(k, kPanel); });
  }
  tiles_16(x, out, [&](int64_t k) { return widened(k, 2 * kPanel); });
}

// out[16][32] = x[16] panel^T for a panel of int8.
inline void tiles_int8(const uint8_t* w, const Left& x, int64_t rows, float* out) {
  zero_tiles();
  for (int64_t k = 0; k < x.width; k += 2 * kPanel, w += 2 * kBlock) {
    fetch(w, 2 * kBlock);
    _tile_loadd(4, x.high + k, x.stride);
    _tile_loadd(6, w, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w + kBlock, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x.low + k, x.stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  alignas(64) int32_t high[16 * kPanel], low[16 * kPanel];
  store_tiles(high, low);
  for (int64_t i = 0; i < rows * kPanel; i += 16) {
    _mm512_storeu_ps(
        out + i,
        join_planes(_mm512_load_si512(high + i), _mm512_load_si512(low + i), x.scale[i / kPanel]));
  }
}

// What a thread needs of its own while it multiplies.
struct Scratch {
  alignas(64) float sums[2][kBlock];
  bf16* widened; // two panels, aligned
};

// ---- a packed matrix ----------------------------------------------------------------------

// Panels of one matrix.
struct Panels {
  const uint8_t* data;
  Kind kind;
  int64_t width; // columns with padding

  int64_t panel_bytes() const {
    return kPanel * width * (kind == Kind::bfloat16 ? 2 : 1);
  }
  const uint8_t* panel(int64_t index) const {
    return data + index * panel_bytes();
  }
};

// Rows up to which vectors are as fast as tiles.
inline int64_t few(Kind kind) {
  return kind == Kind::bfloat16 ? 2 : 1;
}

// Products of `count` (1 or 2) panels, one behind the other, with `rows` rows of x:
// done(row, sums), sums being 32 numbers of the first and, kBlock behind, those of the second.
template <typename Done>
void multiply(
    const Panels& weight, int64_t first, int count, const Left& x, int64_t rows, Scratch& scratch,
    const Done& done) {
  const uint8_t* w = weight.panel(first);
  const int64_t bytes = weight.panel_bytes();
  // Calls product(panel, left rows, how many, sums) for `most` rows at a time.
  const auto run = [&](int64_t most, const uint8_t* panels, int64_t distance, const auto& product) {
    for (int64_t row = 0; row < rows; row += most) {
      const int64_t size = std::min(most, rows - row);
      for (int part = 0; part < count; ++part) {
        Left left = x.from(row);
        left.width = weight.width;
        product(panels + part * distance, left, size, scratch.sums[part]);
      }
      for (int64_t i = 0; i < size; ++i) {
        done(row + i, scratch.sums[0] + i * kPanel);
      }
    }
  };
  const bool tiles = rows > few(weight.kind) && has_tiles();
  if (weight.kind == Kind::int8) {
    if (tiles) {
      return run(16, w, bytes, tiles_int8);
    }
    return run(4, w, bytes, few_rows<Kind::int8>);
  }
  if (weight.kind == Kind::float8) {
    if (tiles && rows <= 32) {
      return run(32, w, bytes, tiles_float8);
    }
    if (rows <= 4) {
      return run(4, w, bytes, few_rows<Kind::float8>);
    }
  }
  const uint8_t* wide = w;
  int64_t distance = bytes;
  if (weight.kind == Kind::float8) {
    widen_run(w, count * bytes / 64, scratch.widened);
    wide = reinterpret_cast<const uint8_t*>(scratch.widened);
    distance = 2 * bytes;
  }
  if (!tiles) {
    return run(4, wide, distance, few_rows<Kind::bfloat16>);
  }
  run(32, wide, distance, tiles_bfloat16);
}

inline int64_t item_bytes(Kind kind) {
  return kind == Kind::bfloat16 ? 2 : 1;
}

inline Kind kind_of(int64_t code) {
  TORCH_CHECK(code >= 0 && code <= 2, "there is no kind ", code);
  return static_cast<Kind>(code);
}

inline void check_data(const Tensor& data, int64_t bytes) {
  TORCH_CHECK(
      data.is_contiguous() && static_cast<int64_t>(data.nbytes()) == bytes, "weights have ",
      data.nbytes(), " bytes, ", bytes, " are needed");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(data.data_ptr()) % 64 == 0, "weights are not aligned");
}

inline const float* numbers(const std::optional<Tensor>& tensor, int64_t size) {
  if (!tensor.has_value()) {
    return nullptr;
  }
  TORCH_CHECK(
      tensor->scalar_type() == at::kFloat && tensor->is_contiguous() && tensor->numel() == size,
      "float32 numbers are needed, ", size, " of them");
  return tensor->const_data_ptr<float>();
}

struct Matrix : torch::CustomClassHolder {
  Tensor data;
  std::optional<Tensor> scale_tensor, bias_tensor;
  int64_t rows, cols;
  Kind kind;
  const float* scale;
  const float* bias;

  Matrix(
      Tensor data_, std::optional<Tensor> scale_, std::optional<Tensor> bias_, int64_t rows_,
      int64_t cols_, int64_t kind_)
      : data(std::move(data_)),
        scale_tensor(std::move(scale_)),
        bias_tensor(std::move(bias_)),
        rows(rows_),
        cols(cols_),
        kind(kind_of(kind_)),
        scale(numbers(scale_tensor, panels() * kPanel)),
        bias(numbers(bias_tensor, rows_)) {
    check_data(data, panels() * kPanel * width() * item_bytes(kind));
    TORCH_CHECK((scale != nullptr) == (kind != Kind::bfloat16), "scales go with 8 bits");
  }
  int64_t panels() const {
    return (rows + kPanel - 1) / kPanel;
  }
  // Columns with padding.
  int64_t width() const {
    return round_up(cols, 2 * kPanel);
  }
  Panels weight() const {
    return {static_cast<const uint8_t*>(data.const_data_ptr()), kind, width()};
  }

  // Columns `panel * 32` and on of x W^T + b, or what is in `out` and these.
  template <typename Out>
  void multiply_panel(
      int64_t panel, const Left& x, int64_t count, Scratch& scratch, Out* out,
      bool adds = false) const {
    const int64_t first = panel * kPanel;
    const __mmask16 masks[2] = {first16(rows - first), first16(std::max<int64_t>(0, rows - first - 16))};
    multiply(weight(), panel, 1, x, count, scratch, [&](int64_t row, const float* sums) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t o = first + half * 16;
        __m512 v = _mm512_loadu_ps(sums + half * 16);
        if (scale != nullptr) {
          v = _mm512_mul_ps(v, _mm512_loadu_ps(scale + o));
        }
        if (bias != nullptr) {
          v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(masks[half], bias + o));
        }
        Out* to = out + row * rows + o;
        if (adds) {
          v = _mm512_add_ps(v, load16(to, masks[half]));
        }
        store16(to, masks[half], v);
      }
    });
  }
};

// ---- packing ------------------------------------------------------------------------------

// Memory for weights, on pages of 2 MiB where the system has them: who streams through weights
// needs a new page every few hundred nanoseconds, and looking up small ones takes a sixth of the
// bandwidth. Small matrices share a chunk, which is freed with the last of them.
class Chunk {
 public:
  explicit Chunk(int64_t bytes) : bytes_(bytes) {
    reserved_ = bytes + kHuge;
    base_ = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(base_ != MAP_FAILED, "there is no memory for weights of ", bytes, " bytes");
    const int64_t address = reinterpret_cast<int64_t>(base_);
    start_ = static_cast<char*>(base_) + round_up(address, kHuge) - address;
    // The end keeps small pages: a large one would take memory that nobody asked for.
    madvise(start_, bytes / kHuge * kHuge, MADV_HUGEPAGE);
  }
  ~Chunk() {
    munmap(base_, reserved_);
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  // A part of it; null once it is full.
  void* take(int64_t bytes) {
    if (used_ + bytes > bytes_) {
      return nullptr;
    }
    void* part = start_ + used_;
    used_ += round_up(bytes, 64);
    return part;
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;
  const int64_t bytes_;
  int64_t reserved_ = 0, used_ = 0;
  void* base_ = nullptr;
  char* start_ = nullptr;
};

// An uninitialised tensor for packed weights, of the type of `like`.
inline Tensor empty_weights(at::IntArrayRef sizes, const Tensor& like) {
  constexpr int64_t kShared = 32 << 20, kSmall = 4 << 20;
  int64_t bytes = like.element_size();
  for (const int64_t size : sizes) {
    bytes *= size;
  }
  if (bytes == 0) {
    return at::empty(sizes, like.options());
  }
  static std::mutex mutex;
  static std::shared_ptr<Chunk> shared;
  std::shared_ptr<Chunk> chunk;
  void* data = nullptr;
  if (bytes > kSmall) {
    chunk = std::make_shared<Chunk>(bytes);
    data = chunk->take(bytes);
  } else {
    const std::lock_guard<std::mutex> guard(mutex);
    if (shared == nullptr || (data = shared->take(bytes)) == nullptr) {
      shared = std::make_shared<Chunk>(kShared);
      data = shared->take(bytes);
    }
    chunk = shared;
  }
  return at::from_blob(data, sizes, [chunk](void*) {}, like.options());
}

// Where column c of row r of a tile's block lies, in numbers.
inline int64_t place_in_tile(Kind kind, int64_t r, int64_t c) {
  switch (kind) {
    case Kind::bfloat16:
      return c / 2 * 32 + r * 2 + c % 2;
    case Kind::float8:
      return c / 4 * 64 + r / 4 * 16 + c / 2 % 2 * 8 + r % 4 * 2 + c % 2;
    default:
      return c / 4 * 64 + r * 4 + c % 4;
  }
}

template <typename Item>
void pack_panel(Kind kind, const Item* in, int64_t rows, int64_t cols, int64_t panel, Item* out) {
  const int64_t depth = kind == Kind::int8 ? 2 * kPanel : kPanel; // columns of a block
  const int64_t width = round_up(cols, 2 * kPanel);
  for (int64_t r = 0; r < kPanel; ++r) {
    const int64_t row = panel * kPanel + r;
    for (int64_t col = 0; col < width; ++col) {
      Item* tile = out + (col / depth * 2 + r / 16) * 16 * depth;
      tile[place_in_tile(kind, r % 16, col % depth)] =
          row < rows && col < cols ? in[row * cols + col] : Item{0};
    }
  }
}

template <typename Item>
void pack_into(Kind kind, const Tensor& weight, Tensor& out) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  const int64_t size = kPanel * round_up(cols, 2 * kPanel);
  const auto* from = static_cast<const Item*>(weight.const_data_ptr());
  auto* to = static_cast<Item*>(out.data_ptr());
  at::parallel_for(0, (rows + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel(kind, from, rows, cols, panel, to + panel * size);
    }
  });
}

// The packed form of a contiguous (O, I) of bfloat16, float8_e4m3fn or int8, flat.
inline Tensor pack(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a contiguous matrix is needed");
  const int64_t size =
      round_up(weight.size(0), kPanel) * round_up(weight.size(1), 2 * kPanel);
  Tensor out = empty_weights({size}, weight);
  switch (weight.scalar_type()) {
    case at::kBFloat16:
      pack_into<uint16_t>(Kind::bfloat16, weight, out);
      break;
    case at::kFloat8_e4m3fn:
      pack_into<uint8_t>(Kind::float8, weight, out);
      break;
    default:
      TORCH_CHECK(weight.scalar_type() == at::kChar, "there is no packing for these weights");
      pack_into<uint8_t>(Kind::int8, weight, out);
  }
  return out;
}

// ---- memory for one operation -------------------------------------------------------------

// Memory that the calling thread keeps from operation to operation, because fresh memory costs a
// page fault every four kilobytes.
class Arena {
 public:
  static Arena& mine() {
    static thread_local Arena arena;
    arena.parts_ = 0;
    return arena;
  }
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    // A part that has become too small is replaced when it is next asked for.
    if (parts_ == static_cast<int64_t>(memory_.size())) {
      memory_.emplace_back();
    }
    Part& part = memory_[parts_++];
    if (part.bytes < bytes) {
      std::free(part.data);
      part.bytes = bytes + bytes / 2;
      part.bytes = static_cast<size_t>(round_up(static_cast<int64_t>(part.bytes), 4096));
      part.data = std::aligned_alloc(4096, part.bytes);
      TORCH_CHECK(part.data != nullptr, "out of memory");
    }
    return static_cast<T*>(part.data);
  }
  ~Arena() {
    for (Part& part : memory_) {
      std::free(part.data);
    }
  }

 private:
  struct Part {
    void* data = nullptr;
    size_t bytes = 0;
  };
  std::vector<Part> memory_;
  int64_t parts_ = 0;
};

// Room for `rows` rows of a left factor that meets weights of `kind`.
inline Left left_factor(Arena& arena, int64_t rows, int64_t width, Kind kind) {
  Left left{arena.take<bf16>((rows + kSlack) * width), width, width};
  if (kind == Kind::int8) {
    left.high = arena.take<int8_t>((rows + kSlack) * width);
    left.low = arena.take<uint8_t>((rows + kSlack) * width);
    left.scale = arena.take<float>(rows + kSlack);
  }
  return left;
}

inline Scratch* scratches(Arena& arena, int64_t widest) {
  const int threads = std::min(at::get_num_threads(), kMostThreads);
  Scratch* all = arena.take<Scratch>(threads);
  const int64_t size = 2 * kPanel * widest;
  bf16* widened = arena.take<bf16>(threads * size);
  for (int i = 0; i < threads; ++i) {
    all[i].widened = widened + i * size;
  }
  return all;
}

} // namespace moesaic
