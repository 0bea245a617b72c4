// Sixteen or thirty-two numbers at a time.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moesaic {

// The bits of a bfloat16: the upper half of a float32.
using bf16 = uint16_t;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline __mmask16 first16(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __mmask32 first32(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

inline __mmask64 first64(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// Numbers as float32, whatever they are stored in; those beyond `mask` are zero.
inline __m512 load16(const bf16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline __m512 load16(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}

inline __m256i narrow(__m512 v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
}

inline void store16(bf16* p, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(p, mask, narrow(v));
}

inline void store16(float* p, __mmask16 mask, __m512 v) {
  _mm512_mask_storeu_ps(p, mask, v);
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// e^x by 2^n e^r with |r| <= ln(2)/2 and seven terms of the series: an error of 3e-7.
inline __m512 exp16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, n);
}

inline __m512 silu(__m512 x) {
  // The exponent is bounded, so that x times a sum that overflowed is not asked for.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-80.0f), x);
  const __m512 sum =
      _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), bounded)));
  return _mm512_div_ps(x, sum);
}

// The sums of sixteen vectors, in their order.
inline __m512 sums(const __m512 (&a)[16]) {
  __m512 c[8], d[4];
  for (int i = 0; i < 8; ++i) {
    c[i] = _mm512_add_ps(
        _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(c[2 * i]), odd = _mm512_castps_pd(c[2 * i + 1]);
    d[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const __m512 e0 = _mm512_add_ps(
      _mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
  const __m512 e1 = _mm512_add_ps(
      _mm512_shuffle_f32x4(d[2], d[3], 0x88), _mm512_shuffle_f32x4(d[2], d[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(e0, e1, 0x88), _mm512_shuffle_f32x4(e0, e1, 0xdd));
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

// ---- eight bits ---------------------------------------------------------------------------

enum class Kind : int64_t { bfloat16 = 0, float8 = 1, int8 = 2 };

// Widens 64 numbers of e4m3 to bfloat16, exactly. Within each sixteen bytes the first eight go to
// `first` and the others to `second`.
//
// e4m3 has 4 bits of exponent with bias 7, and 3 of fraction. A normal number's bfloat16 has the
// exponent e + 120 = 2 (60 + e / 2) + e % 2, so that each bit of its two bytes is a bit of the code,
// or one inverted: two products of bits. Numbers below 2^-6 are rare, and looked up.
class Widener {
 public:
  Widener() {
    static const Table table;
    high0_ = _mm512_load_si512(table.high);
    high1_ = _mm512_load_si512(table.high + 64);
    low0_ = _mm512_load_si512(table.low);
    low1_ = _mm512_load_si512(table.low + 64);
  }

  void operator()(__m512i code, __m512i& first, __m512i& second) const {
    // Rows of the bit matrices, that of bit 7 in the lowest byte.
    const __m512i to_high = _mm512_set1_epi64(0x1020404040404080);
    const __m512i to_low = _mm512_set1_epi64(0x0000000001020408);
    __m512i high = _mm512_gf2p8affine_epi64_epi8(code, to_high, 0x3c);
    __m512i low = _mm512_gf2p8affine_epi64_epi8(code, to_low, 0);
    if (__builtin_expect(_mm512_testn_epi8_mask(code, _mm512_set1_epi8(0x78)) != 0, 0)) {
      // A table of 128 bytes is looked up by the lower seven bits of a byte.
      high = _mm512_permutex2var_epi8(high0_, code, high1_);
      low = _mm512_permutex2var_epi8(low0_, code, low1_);
      // high | (code & 0x80)
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      high = _mm512_ternarylogic_epi64(high, code, sign, 0xf8);
    }
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  // The upper and the lower byte of the bfloat16 of each magnitude.
  struct Table {
    alignas(64) uint8_t high[128];
    alignas(64) uint8_t low[128];

    Table() {
      for (int code = 0; code < 128; ++code) {
        const int exponent = code >> 3;
        const float fraction = static_cast<float>(code & 7) / 8.0f;
        const float value = exponent == 0 ? fraction / 64.0f
                                          : __builtin_ldexpf(1.0f + fraction, exponent - 7);
        uint32_t bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        high[code] = static_cast<uint8_t>(bits >> 24);
        low[code] = static_cast<uint8_t>(bits >> 16);
      }
    }
  };
  __m512i high0_, high1_, low0_, low1_;
};

// Sixteen float32 to e4m3, ties to even; what is too large becomes 448.
inline __m128i to_e4m3(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(448.0f));
  const __m512i magnitude = _mm512_castps_si512(size);
  // Three bits of fraction are kept; the exponent's bias goes from 127 to 7.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  __m512i code = _mm512_add_epi32(_mm512_add_epi32(magnitude, odd), _mm512_set1_epi32(0x7ffff));
  code = _mm512_sub_epi32(_mm512_srli_epi32(code, 20), _mm512_set1_epi32(120 << 3));
  // Below 2^-6 numbers are multiples of 2^-9.
  const __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
  code = _mm512_mask_mov_epi32(
      code, small, _mm512_cvtps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(512.0f))));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

} // namespace moesaic
