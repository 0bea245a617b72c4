// Packed matrices, and their products with few rows and with many.
//
// A matrix (rows, cols) is kept as panels of 32 rows; a panel as blocks of 32 columns; a block as
// two tiles of 16 rows. A tile is what the processor's products take as their right factor: for
// each pair of columns the 16 rows' pairs, 64 bytes of bfloat16. At 8 bits two such lines share 64
// bytes, line by line in turns of 8 bytes, which is the order in which they are widened.

#pragma once

#include <ATen/ops/empty.h>
#include <sys/syscall.h>
#include <torch/custom_class.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace moesaic {

using at::Tensor;

constexpr int64_t kPanel = 32;      // rows of a panel, columns of a block
constexpr int64_t kBlock = kPanel * kPanel; // numbers of a block: two tiles
constexpr int64_t kFew = 4;         // at most this many rows go without tiles
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

// ---- products with one panel --------------------------------------------------------------

constexpr int64_t kAhead = 4096; // bytes between what is read and what is fetched

inline void fetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + i), _MM_HINT_T0);
  }
}

inline __m512i pair_at(const bf16* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// out[M][32] = x[M][32 blocks] panel^T, each byte of the panel read once.
template <Kind kind, int M>
void few_rows(const uint8_t* w, int64_t blocks, const bf16* x, int64_t stride, float* out) {
  constexpr int64_t kItem = kind == Kind::bfloat16 ? 2 : 1;
  constexpr int64_t kTile = kBlock / 2 * kItem;
  [[maybe_unused]] const Widener<kind> widen;
  __m512 sum[M][4];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 4; ++i) {
      sum[m][i] = _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < blocks; ++k, w += 2 * kTile) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      __m512i left0, left1, right0, right1; // rows 0 to 15 and 16 to 31, two pairs of columns
      if constexpr (kind == Kind::bfloat16) {
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 256), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 256 + 64), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 256 + 128), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 256 + 192), _MM_HINT_T0);
        left0 = _mm512_load_si512(w + v * 128);
        left1 = _mm512_load_si512(w + v * 128 + 64);
        right0 = _mm512_load_si512(w + kTile + v * 128);
        right1 = _mm512_load_si512(w + kTile + v * 128 + 64);
      } else {
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 128), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + v * 128 + 64), _MM_HINT_T0);
        widen(_mm512_load_si512(w + v * 64), left0, left1);
        widen(_mm512_load_si512(w + kTile + v * 64), right0, right1);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const bf16* at = x + m * stride + k * kPanel + v * 4;
        const __m512i pair0 = pair_at(at), pair1 = pair_at(at + 2);
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

template <Kind kind>
void few_rows(
    const uint8_t* w, int64_t blocks, const bf16* x, int64_t stride, int64_t rows, float* out) {
  switch (rows) {
    case 1:
      return few_rows<kind, 1>(w, blocks, x, stride, out);
    case 2:
      return few_rows<kind, 2>(w, blocks, x, stride, out);
    case 3:
      return few_rows<kind, 3>(w, blocks, x, stride, out);
    default:
      return few_rows<kind, 4>(w, blocks, x, stride, out);
  }
}

// out[16][32] = x[16][32 blocks] panel^T for a panel of bfloat16 and an even number of blocks.
inline void tiles_16(const bf16* w, int64_t blocks, const bf16* x, int64_t stride, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // Even and odd blocks have sums of their own: one sum would wait for itself.
  for (int64_t k = 0; k < blocks; k += 2, w += 2048) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(w);
    fetch(bytes, 4096);
    _tile_loadd(4, x + k * kPanel, stride * 2);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + (k + 1) * kPanel, stride * 2);
    _tile_loadd(6, w + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, w + 1536, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float odd[16 * kPanel];
  _tile_stored(0, out, kPanel * 4);
  _tile_stored(1, out + 16, kPanel * 4);
  _tile_stored(2, odd, kPanel * 4);
  _tile_stored(3, odd + 16, kPanel * 4);
  for (int i = 0; i < 16 * kPanel; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_load_ps(odd + i)));
  }
}

// out[32][32] = x[32][32 blocks] panel^T for a panel of bfloat16.
inline void tiles_32(const bf16* w, int64_t blocks, const bf16* x, int64_t stride, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bf16* below = x + 16 * stride;
  for (int64_t k = 0; k < blocks; ++k, w += 1024) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x + k * kPanel, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below + k * kPanel, stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kPanel * 4);
  _tile_stored(1, out + 16, kPanel * 4);
  _tile_stored(2, out + 16 * kPanel, kPanel * 4);
  _tile_stored(3, out + 16 * kPanel + 16, kPanel * 4);
}

// A panel of 8 bits as one of bfloat16.
template <Kind kind>
void widen_panel(const uint8_t* w, int64_t blocks, bf16* out) {
  const Widener<kind> widen;
  for (int64_t i = 0; i < blocks * 16; ++i, w += 64, out += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
    __m512i first, second;
    widen(_mm512_load_si512(w), first, second);
    _mm512_store_si512(out, first);
    _mm512_store_si512(out + 32, second);
  }
}

// What a thread needs of its own while it multiplies.
struct Scratch {
  alignas(64) float sums[2][kPanel * kPanel];
  bf16* widened; // two panels, aligned
};

// ---- a packed matrix ----------------------------------------------------------------------

// Panels of one matrix.
struct Panels {
  const uint8_t* data;
  Kind kind;
  int64_t blocks;

  int64_t panel_bytes() const {
    return blocks * kBlock * (kind == Kind::bfloat16 ? 2 : 1);
  }
  const uint8_t* panel(int64_t index) const {
    return data + index * panel_bytes();
  }
};

// Products of `count` (1 or 2) panels, one behind the other, with `rows` rows of x:
// done(row, sums), sums being [count][32 numbers] at a distance of kPanel * kPanel.
template <typename Done>
void multiply(
    const Panels& weight, int64_t first, int count, const bf16* x, int64_t stride, int64_t rows,
    Scratch& scratch, const Done& done) {
  const auto finish = [&](int64_t row, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      done(row + i, scratch.sums[0] + i * kPanel);
    }
  };
  const uint8_t* w = weight.panel(first);
  const int64_t blocks = weight.blocks;
  const bool tiles = rows > kFew && has_tiles();
  if (!tiles && (rows <= kFew || weight.kind == Kind::bfloat16)) {
    for (int64_t row = 0; row < rows; row += kFew) {
      const int64_t size = std::min(kFew, rows - row);
      for (int part = 0; part < count; ++part) {
        const uint8_t* panel = w + part * weight.panel_bytes();
        const bf16* from = x + row * stride;
        switch (weight.kind) {
          case Kind::bfloat16:
            few_rows<Kind::bfloat16>(panel, blocks, from, stride, size, scratch.sums[part]);
            break;
          case Kind::float8:
            few_rows<Kind::float8>(panel, blocks, from, stride, size, scratch.sums[part]);
            break;
          case Kind::int8:
            few_rows<Kind::int8>(panel, blocks, from, stride, size, scratch.sums[part]);
            break;
        }
      }
      finish(row, size);
    }
    return;
  }
  const auto* wide = reinterpret_cast<const bf16*>(w);
  if (weight.kind != Kind::bfloat16) {
    if (weight.kind == Kind::float8) {
      widen_panel<Kind::float8>(w, count * blocks, scratch.widened);
    } else {
      widen_panel<Kind::int8>(w, count * blocks, scratch.widened);
    }
    wide = scratch.widened;
  }
  const int64_t most = tiles ? kPanel : kFew;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t size = std::min(most, rows - row);
    for (int part = 0; part < count; ++part) {
      const bf16* panel = wide + part * blocks * kBlock;
      const bf16* from = x + row * stride;
      float* out = scratch.sums[part];
      if (!tiles) {
        few_rows<Kind::bfloat16>(
            reinterpret_cast<const uint8_t*>(panel), blocks, from, stride, size, out);
      } else if (size <= 16) {
        tiles_16(panel, blocks, from, stride, out);
      } else {
        tiles_32(panel, blocks, from, stride, out);
      }
    }
    finish(row, size);
  }
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
    return {static_cast<const uint8_t*>(data.const_data_ptr()), kind, width() / kPanel};
  }

  // Columns `panel * 32` and on of x W^T + b.
  template <typename Out>
  void multiply_panel(
      int64_t panel, const bf16* x, int64_t stride, int64_t count, Scratch& scratch, Out* out,
      int64_t out_stride) const {
    const int64_t first = panel * kPanel;
    const __mmask16 masks[2] = {first16(rows - first), first16(std::max<int64_t>(0, rows - first - 16))};
    multiply(weight(), panel, 1, x, stride, count, scratch, [&](int64_t row, const float* sums) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t o = first + half * 16;
        __m512 v = _mm512_loadu_ps(sums + half * 16);
        if (scale != nullptr) {
          v = _mm512_mul_ps(v, _mm512_loadu_ps(scale + o));
        }
        if (bias != nullptr) {
          v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(masks[half], bias + o));
        }
        store16(out + row * out_stride + o, masks[half], v);
      }
    });
  }
};

// ---- packing ------------------------------------------------------------------------------

template <typename Item>
void pack_panel(const Item* in, int64_t rows, int64_t cols, int64_t panel, Item* out) {
  const int64_t blocks = round_up(cols, 2 * kPanel) / kPanel;
  for (int64_t k = 0; k < blocks; ++k) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      Item* to = out + (k * 2 + tile) * kBlock / 2;
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = panel * kPanel + tile * 16 + r;
        for (int64_t c = 0; c < kPanel; ++c) {
          const int64_t col = k * kPanel + c, pair = c / 2;
          const int64_t at = sizeof(Item) == 2
              ? pair * 32 + r * 2 + c % 2
              : pair / 2 * 64 + r / 4 * 16 + pair % 2 * 8 + r % 4 * 2 + c % 2;
          to[at] = row < rows && col < cols ? in[row * cols + col] : Item{0};
        }
      }
    }
  }
}

template <typename Item>
void pack_into(const Tensor& weight, Tensor& out) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  const int64_t size = kPanel * round_up(cols, 2 * kPanel);
  const auto* from = static_cast<const Item*>(weight.const_data_ptr());
  auto* to = static_cast<Item*>(out.data_ptr());
  at::parallel_for(0, (rows + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel(from, rows, cols, panel, to + panel * size);
    }
  });
}

// The packed form of a contiguous (O, I) of bfloat16, float8_e4m3fn or int8, flat.
inline Tensor pack(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a contiguous matrix is needed");
  const int64_t size =
      round_up(weight.size(0), kPanel) * round_up(weight.size(1), 2 * kPanel);
  Tensor out = at::empty({size}, weight.options());
  if (weight.element_size() == 2) {
    pack_into<uint16_t>(weight, out);
  } else {
    TORCH_CHECK(weight.element_size() == 1, "weights have 2 bytes or 1");
    pack_into<uint8_t>(weight, out);
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

inline Scratch* scratches(Arena& arena, int64_t most_blocks) {
  const int threads = std::min(at::get_num_threads(), kMostThreads);
  Scratch* all = arena.take<Scratch>(threads);
  const int64_t size = 2 * most_blocks * kBlock;
  bf16* widened = arena.take<bf16>(threads * size);
  for (int i = 0; i < threads; ++i) {
    all[i].widened = widened + i * size;
  }
  return all;
}

} // namespace moesaic
