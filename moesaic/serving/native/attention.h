// Attention over a paged cache.
//
// Few new tokens of a sequence: scores and values are products with the cache's own rows, read
// once for all query heads that share them. A long context is cut into pieces, so that one sequence
// still occupies every thread; pieces are joined at the end.
//
// Many new tokens: keys and values of the sequence are packed once, as the right factors of tiles,
// for all of its queries and heads; blocks of 32 queries then meet 1024 positions at a time.

#pragma once

#include <limits>

#include "matrix.h"

namespace moesaic {

constexpr int64_t kFewQueries = 4; // a sequence with more new tokens than these is packed
constexpr int64_t kPiece = 256;    // positions of a piece
constexpr int64_t kSpan = 1024;    // positions that a block of queries meets at a time
constexpr int64_t kSoon = 48;      // rows of a cache between what is read and what is fetched
constexpr float kNone = -1e30f;

// Keys or values of one layer: (blocks, G, P, C).
struct Pool {
  char* data;
  at::ScalarType type;
  int64_t heads, size, dim, bytes; // G, P, C, of a number

  explicit Pool(const Tensor& pool)
      : data(static_cast<char*>(pool.data_ptr())),
        type(pool.scalar_type()),
        heads(pool.size(1)),
        size(pool.size(2)),
        dim(pool.size(3)),
        bytes(pool.element_size()) {}

  char* row(const int32_t* table, int64_t head, int64_t position) const {
    const int64_t block = table[position / size];
    return data + ((block * heads + head) * size + position % size) * dim * bytes;
  }
  // Whether a row can be used where it lies, by whole vectors.
  bool is_direct() const {
    return type == at::kBFloat16 && dim % 32 == 0;
  }
  void write(const int32_t* table, int64_t head, int64_t position, const float* x) const {
    char* to = row(table, head, position);
    for (int64_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = first16(dim - c);
      const __m512 v = _mm512_maskz_loadu_ps(mask, x + c);
      // Rounded to bfloat16 whatever the cache keeps: products take nothing wider.
      const __m256i half = narrow(v);
      const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      if (type == at::kBFloat16) {
        _mm256_mask_storeu_epi16(to + c * 2, mask, half);
      } else if (type == at::kFloat) {
        _mm512_mask_storeu_ps(to + c * 4, mask, wide);
      } else {
        _mm_mask_storeu_epi8(to + c, mask, to_e4m3(wide));
      }
    }
  }
  // A row as bfloat16, padded with zeros to a multiple of 32.
  void read(const char* from, bf16* to, const Widener& widen) const {
    for (int64_t c = 0; c < dim; c += 32) {
      const __mmask32 mask = first32(dim - c);
      __m512i v;
      if (type == at::kBFloat16) {
        v = _mm512_maskz_loadu_epi16(mask, from + c * 2);
      } else if (type == at::kFloat) {
        const auto* numbers = reinterpret_cast<const float*>(from) + c;
        const __m512 low = load16(numbers, first16(dim - c));
        const __m512 high = load16(numbers + 16, dim - c > 16 ? first16(dim - c - 16) : 0);
        v = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      } else {
        // Each eight numbers go to the first half of a lane.
        const __m256i code = _mm256_maskz_loadu_epi8(mask, from + c);
        const __m512i spread = _mm512_permutexvar_epi64(
            _mm512_setr_epi64(0, 7, 1, 7, 2, 7, 3, 7), _mm512_castsi256_si512(code));
        __m512i unused;
        widen(spread, v, unused);
      }
      _mm512_storeu_si512(to + c, v);
    }
  }
};

// One sequence of a step.
struct Sequence {
  int64_t token; // its first
  int64_t start, count;
  const int32_t* table;
  int64_t first; // earliest position that any of its queries sees

  int64_t length() const {
    return start + count;
  }
  bool is_few() const {
    return count <= kFewQueries;
  }
};

// What a query head finds in one piece of a context: a maximum, a sum, and C values.
struct Attention {
  std::vector<Sequence> sequences;
  std::vector<int64_t> first_head; // query head at which each key-value head begins, and the end
  int64_t dim, width;              // C, and rounded up to 32
  int64_t window;                  // 0 for none
  Pool keys, values;
  const bf16* queries; // (T + slack, H, width)
  bf16* out;           // (T, stride)
  int64_t out_stride;
  float scale;

  int64_t kv_heads() const {
    return static_cast<int64_t>(first_head.size()) - 1;
  }
  int64_t heads() const {
    return first_head.back();
  }

  // Pieces: few queries.
  struct Piece {
    const Sequence* sequence;
    int64_t head, begin, end, partial; // partial: where its results begin
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece; // of each sequence
  int64_t partials = 0;
  float* partial = nullptr; // (partials, 2 + width)

  // Blocks: many queries.
  struct Block {
    const Sequence* sequence;
    int64_t query_head, kv_head, query, packed; // packed: where keys and values begin
  };
  struct Packing {
    const Sequence* sequence;
    int64_t head, position, packed;
  };
  std::vector<Block> blocks;
  std::vector<Packing> packings;
  int64_t packed = 0;
  bf16* packed_keys = nullptr;   // 32 positions a panel, blocks of 32 channels
  bf16* packed_values = nullptr; // 32 positions, panels of 32 channels

  Attention(const Tensor& k_pool, const Tensor& v_pool) : keys(k_pool), values(v_pool) {}

  void plan(bool tiles) {
    for (const Sequence& sequence : sequences) {
      first_piece.push_back(static_cast<int64_t>(pieces.size()));
      for (int64_t g = 0; g < kv_heads(); ++g) {
        const int64_t group = first_head[g + 1] - first_head[g];
        if (sequence.is_few() || !tiles) {
          for (int64_t p = sequence.first; p < sequence.length(); p += kPiece) {
            const int64_t end = std::min(p + kPiece, sequence.length());
            pieces.push_back({&sequence, g, p, end, partials});
            partials += group * sequence.count;
          }
          continue;
        }
        const int64_t from = sequence.first / kPanel * kPanel;
        for (int64_t p = from; p < sequence.length(); p += kPanel) {
          packings.push_back({&sequence, g, p, packed + (p - from) * width});
        }
        // Later queries see more, and are begun first.
        for (int64_t q = (sequence.count - 1) / kPanel * kPanel; q >= 0; q -= kPanel) {
          for (int64_t h = first_head[g]; h < first_head[g + 1]; ++h) {
            blocks.push_back({&sequence, h, g, q, packed});
          }
        }
        packed += round_up(sequence.length() - from, kPanel) * width;
      }
    }
    first_piece.push_back(static_cast<int64_t>(pieces.size()));
  }

  const bf16* query(int64_t token, int64_t head) const {
    return queries + (token * heads() + head) * width;
  }

  // ---- few queries ----

  // Where a piece's rows lie in a pool; found block by block, because divisions take long.
  static void find_rows(const Pool& pool, const Piece& piece, const char** rows) {
    for (int64_t p = piece.begin; p < piece.end;) {
      const int64_t inside = p % pool.size;
      const int64_t end = std::min(piece.end, p - inside + pool.size);
      const char* row = pool.row(piece.sequence->table, piece.head, p);
      for (; p < end; ++p, row += pool.dim * pool.bytes) {
        rows[p - piece.begin] = row;
      }
    }
  }

  // The same rows as pointers to bfloat16, up to a multiple of 16.
  void widen_rows(
      const Pool& pool, const char* const* from, int64_t positions, const bf16** rows, bf16* space,
      const Widener& widen) const {
    for (int64_t i = 0; i < positions; ++i) {
      if (pool.is_direct()) {
        rows[i] = reinterpret_cast<const bf16*>(from[i]);
      } else {
        pool.read(from[i], space + i * width, widen);
        rows[i] = space + i * width;
      }
    }
    std::fill(rows + positions, rows + round_up(positions, 16), rows[positions - 1]);
  }

  // Sixteen rows from `i` on. Rows of 128 bytes, here and there, are nothing that the processor
  // foresees by itself.
  template <_mm_hint hint>
  static void fetch_rows(const Pool& pool, const char* const* rows, int64_t i, int64_t end) {
    for (const int64_t last = std::min(i + 16, end); i < last; ++i) {
      for (int64_t byte = 0; byte < pool.dim * pool.bytes; byte += 64) {
        _mm_prefetch(rows[i] + byte, hint);
      }
    }
  }

  void attend_piece(const Piece& piece, bf16* space, uint32_t* chances) const {
    const Widener widen;
    const char *key_rows[kPiece], *value_rows[kPiece];
    const bf16* rows[kPiece];
    find_rows(keys, piece, key_rows);
    find_rows(values, piece, value_rows);
    const int64_t positions = piece.end - piece.begin;
    const int64_t padded = round_up(positions, 16);
    const int64_t group = first_head[piece.head + 1] - first_head[piece.head];
    const int64_t queries_here = group * piece.sequence->count;
    for (int64_t i = 0; i < kSoon; i += 16) {
      fetch_rows<_MM_HINT_T0>(keys, key_rows, i, positions);
    }
    widen_rows(keys, key_rows, positions, rows, space, widen);
    alignas(64) float scores[kPiece];
    for (int64_t r = 0; r < queries_here; ++r) {
      const int64_t query_index = r / group;
      const bf16* q = query(piece.sequence->token + query_index, first_head[piece.head] + r % group);
      const int64_t position = piece.sequence->start + query_index;
      const int64_t last = std::min(piece.end, position + 1);
      const int64_t begin = window == 0 ? piece.begin : std::max(piece.begin, position + 1 - window);
      float* result = partial + (piece.partial + r) * (2 + width);
      uint32_t* chance = chances + r * (kPiece / 2);
      if (begin >= last) {
        result[0] = kNone;
        result[1] = 0;
        std::memset(chance, 0, static_cast<size_t>(padded) * 2);
        continue;
      }
      __m512 most = _mm512_set1_ps(kNone);
      for (int64_t i = 0; i < padded; i += 16) {
        if (r == 0) {
          // Values into the second cache: their turn comes after all keys'.
          fetch_rows<_MM_HINT_T0>(keys, key_rows, i + kSoon, positions);
          fetch_rows<_MM_HINT_T1>(values, value_rows, i, positions);
        }
        __m512 sum[16];
        for (int k = 0; k < 16; ++k) {
          sum[k] = _mm512_setzero_ps();
        }
        for (int64_t c = 0; c < width; c += 32) {
          const __m512i part = _mm512_load_si512(q + c);
#pragma GCC unroll 16
          for (int k = 0; k < 16; ++k) {
            sum[k] = dot(sum[k], _mm512_loadu_si512(rows[i + k] + c), part);
          }
        }
        const __mmask16 seen = first16(last - piece.begin - i > 0 ? last - piece.begin - i : 0) &
            static_cast<__mmask16>(~first16(begin - piece.begin - i > 0 ? begin - piece.begin - i : 0));
        const __m512 score = _mm512_mask_mul_ps(
            _mm512_set1_ps(kNone), seen, sums(sum), _mm512_set1_ps(scale));
        _mm512_store_ps(scores + i, score);
        most = _mm512_max_ps(most, score);
      }
      const float maximum = _mm512_reduce_max_ps(most);
      __m512 total = _mm512_setzero_ps();
      for (int64_t i = 0; i < padded; i += 16) {
        const __m512 score = _mm512_load_ps(scores + i);
        const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(kNone), _CMP_GT_OQ);
        const __m512 e = _mm512_maskz_mov_ps(
            seen,
            exp16(_mm512_max_ps(
                _mm512_sub_ps(score, _mm512_set1_ps(maximum)), _mm512_set1_ps(-87.0f))));
        total = _mm512_add_ps(total, e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(chance + i / 2), narrow(e));
      }
      result[0] = maximum;
      result[1] = _mm512_reduce_add_ps(total);
    }
    widen_rows(values, value_rows, positions, rows, space, widen);
    for (int64_t r = 0; r < queries_here; r += 4) {
      for (int64_t c = 0; c < width; c += 32) {
        float* result = partial + (piece.partial + r) * (2 + width) + 2 + c;
        const uint32_t* chance = chances + r * (kPiece / 2);
        switch (queries_here - r) {
          case 1:
            sum_values<1>(rows, padded, c, chance, result);
            break;
          case 2:
            sum_values<2>(rows, padded, c, chance, result);
            break;
          case 3:
            sum_values<3>(rows, padded, c, chance, result);
            break;
          default:
            sum_values<4>(rows, padded, c, chance, result);
        }
      }
    }
  }

  template <int R>
  void sum_values(
      const bf16* const* rows, int64_t positions, int64_t c, const uint32_t* chance,
      float* result) const {
    __m512 low[R], high[R];
    for (int r = 0; r < R; ++r) {
      low[r] = high[r] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < positions; i += 2) {
      const __m512i even = _mm512_loadu_si512(rows[i] + c);
      const __m512i odd = _mm512_loadu_si512(rows[i + 1] + c);
      const __m512i first = _mm512_unpacklo_epi16(even, odd);
      const __m512i second = _mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i weight =
            _mm512_set1_epi32(static_cast<int32_t>(chance[r * (kPiece / 2) + i / 2]));
        low[r] = dot(low[r], first, weight);
        high[r] = dot(high[r], second, weight);
      }
    }
    // Each lane of `low` has four channels, and that of `high` the next four.
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int r = 0; r < R; ++r) {
      float* to = result + r * (2 + width);
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(low[r], lower, high[r]));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low[r], upper, high[r]));
    }
  }

  // Joins what the pieces found for one token and query head.
  void join(const Sequence& sequence, int64_t index, int64_t token, int64_t head, int64_t kv_head)
      const {
    const int64_t group = first_head[kv_head + 1] - first_head[kv_head];
    const int64_t row = (token - sequence.token) * group + head - first_head[kv_head];
    const int64_t per_head = (first_piece[index + 1] - first_piece[index]) / kv_heads();
    const Piece* piece = pieces.data() + first_piece[index] + kv_head * per_head;
    float most = kNone;
    for (int64_t i = 0; i < per_head; ++i) {
      most = std::max(most, partial[(piece[i].partial + row) * (2 + width)]);
    }
    float total = 0;
    for (int64_t i = 0; i < per_head; ++i) {
      const float* found = partial + (piece[i].partial + row) * (2 + width);
      total += found[1] * std::exp(found[0] - most);
    }
    for (int64_t c = 0; c < dim; c += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < per_head; ++i) {
        const float* found = partial + (piece[i].partial + row) * (2 + width);
        if (found[1] > 0) {
          sum = _mm512_fmadd_ps(
              _mm512_loadu_ps(found + 2 + c), _mm512_set1_ps(std::exp(found[0] - most) / total), sum);
        }
      }
      store16(out + token * out_stride + head * dim + c, first16(dim - c), sum);
    }
  }

  // ---- many queries ----

  // 32 positions: keys as a panel of which they are the rows, values as a block of columns.
  void pack(const Packing& packing, bf16* space) const {
    const Widener widen;
    bf16* to_keys = packed_keys + packing.packed;
    bf16* to_values = packed_values + packing.packed;
    const int64_t count = std::min(kPanel, packing.sequence->length() - packing.position);
    // What lies before the first position that is seen may never have been written.
    const int64_t skipped = std::max<int64_t>(0, packing.sequence->first - packing.position);
    const auto load = [&](const Pool& pool) {
      for (int64_t i = 0; i < kPanel; ++i) {
        if (i < skipped || i >= count) {
          std::memset(space + i * width, 0, static_cast<size_t>(width) * 2);
        } else {
          pool.read(
              pool.row(packing.sequence->table, packing.head, packing.position + i),
              space + i * width, widen);
        }
      }
    };
    load(keys);
    for (int64_t c = 0; c < width; c += 32) {
      for (int64_t half = 0; half < 2; ++half) {
        __m512i words[16];
        for (int64_t i = 0; i < 16; ++i) {
          words[i] = _mm512_loadu_si512(space + (half * 16 + i) * width + c);
        }
        transpose(words);
        for (int64_t i = 0; i < 16; ++i) {
          _mm512_store_si512(to_keys + c * 32 + half * 512 + i * 32, words[i]);
        }
      }
    }
    load(values);
    const __m512i first =
        _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t c = 0; c < width; c += 32) {
      for (int64_t i = 0; i < 16; ++i) {
        const __m512i even = _mm512_loadu_si512(space + 2 * i * width + c);
        const __m512i odd = _mm512_loadu_si512(space + (2 * i + 1) * width + c);
        const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
        _mm512_store_si512(
            to_values + c * 32 + i * 32, _mm512_permutex2var_epi64(low, first, high));
        _mm512_store_si512(
            to_values + c * 32 + 512 + i * 32, _mm512_permutex2var_epi64(low, second, high));
      }
    }
  }

  struct BlockScratch {
    float* scores; // (32, kSpan)
    bf16* chances; // (32, kSpan)
    float* sums;   // (32, width)
  };

  void attend_block(const Block& block, const BlockScratch& space) const {
    const Sequence& sequence = *block.sequence;
    const int64_t rows = std::min(kPanel, sequence.count - block.query);
    const int64_t position = sequence.start + block.query; // of the first row
    const int64_t origin = sequence.first / kPanel * kPanel;
    const int64_t stride = heads() * width;
    const bf16* q = query(sequence.token + block.query, block.query_head);
    const int64_t earliest =
        window == 0 ? sequence.first : std::max(sequence.first, position + 1 - window);
    const int64_t from = earliest / kPanel * kPanel, to = position + rows;
    float most[kPanel], total[kPanel];
    std::fill(most, most + kPanel, kNone);
    std::fill(total, total + kPanel, 0.0f);
    std::memset(space.sums, 0, static_cast<size_t>(kPanel * width) * 4);
    for (int64_t p = from; p < to; p += kSpan) {
      const int64_t size = round_up(std::min(kSpan, to - p), kPanel);
      const bf16* k = packed_keys + block.packed + (p - origin) * width;
      const bf16* v = packed_values + block.packed + (p - origin) * width;
      for (int64_t i = 0; i < size; i += kPanel, k += kPanel * width) {
        score_tiles(k, q, stride, space.scores + i, rows > 16);
      }
      for (int64_t r = 0; r < rows; ++r) {
        soften(r, position + r, p, size, most[r], total[r], space);
      }
      for (int64_t r = rows; r < round_up(rows, 16); ++r) {
        std::memset(space.chances + r * kSpan, 0, static_cast<size_t>(size) * 2);
      }
      value_tiles(v, size, space, rows > 16);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 share = _mm512_set1_ps(1.0f / total[r]);
      bf16* y = out + (sequence.token + block.query + r) * out_stride + block.query_head * dim;
      for (int64_t c = 0; c < dim; c += 16) {
        store16(
            y + c, first16(dim - c),
            _mm512_mul_ps(_mm512_loadu_ps(space.sums + r * width + c), share));
      }
    }
  }

  void score_tiles(const bf16* k, const bf16* q, int64_t stride, float* scores, bool both) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < width; c += 32, k += kBlock) {
      _tile_loadd(6, k, 64);
      _tile_loadd(7, k + 512, 64);
      _tile_loadd(4, q + c, stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, q + 16 * stride + c, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scores, kSpan * 4);
    _tile_stored(1, scores + 16, kSpan * 4);
    if (both) {
      _tile_stored(2, scores + 16 * kSpan, kSpan * 4);
      _tile_stored(3, scores + 16 * kSpan + 16, kSpan * 4);
    }
  }

  // Scores of one query at `position` to numbers that sum to its new total, and its sums to match.
  void soften(
      int64_t row, int64_t position, int64_t first, int64_t size, float& most, float& total,
      const BlockScratch& space) const {
    float* scores = space.scores + row * kSpan;
    bf16* chances = space.chances + row * kSpan;
    const int64_t last = std::min(size, position + 1 - first);
    const int64_t begin = window == 0 ? 0 : std::max<int64_t>(0, position + 1 - window - first);
    const auto seen = [&](int64_t i) {
      const __mmask16 before = last > i ? first16(last - i) : 0;
      return static_cast<__mmask16>(before & ~(begin > i ? first16(begin - i) : 0));
    };
    __m512 largest = _mm512_set1_ps(most);
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale));
      _mm512_storeu_ps(scores + i, score);
      largest = _mm512_mask_max_ps(largest, seen(i), largest, score);
    }
    const float maximum = _mm512_reduce_max_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 shifted =
          _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(maximum));
      const __m512 e =
          _mm512_maskz_mov_ps(seen(i), exp16(_mm512_max_ps(shifted, _mm512_set1_ps(-87.0f))));
      sum = _mm512_add_ps(sum, e);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(chances + i), narrow(e));
    }
    const float factor = most == kNone ? 0.0f : std::exp(most - maximum);
    total = total * factor + _mm512_reduce_add_ps(sum);
    most = maximum;
    float* sums_here = space.sums + row * width;
    for (int64_t c = 0; c < width; c += 16) {
      _mm512_storeu_ps(
          sums_here + c, _mm512_mul_ps(_mm512_loadu_ps(sums_here + c), _mm512_set1_ps(factor)));
    }
  }

  void value_tiles(const bf16* v, int64_t size, const BlockScratch& space, bool both) const {
    for (int64_t c = 0; c < width; c += 32) {
      float* to = space.sums + c;
      _tile_loadd(0, to, width * 4);
      _tile_loadd(1, to + 16, width * 4);
      _tile_loadd(2, to + 16 * width, width * 4);
      _tile_loadd(3, to + 16 * width + 16, width * 4);
      for (int64_t i = 0; i < size; i += kPanel) {
        const bf16* block = v + i * width + c * 32;
        _tile_loadd(6, block, 64);
        _tile_loadd(7, block + 512, 64);
        _tile_loadd(4, space.chances + i, kSpan * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
          _tile_loadd(5, space.chances + 16 * kSpan + i, kSpan * 2);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, width * 4);
      _tile_stored(1, to + 16, width * 4);
      _tile_stored(2, to + 16 * width, width * 4);
      _tile_stored(3, to + 16 * width + 16, width * 4);
    }
  }
};

} // namespace moesaic
