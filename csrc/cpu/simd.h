// Floats a register at a time, and how each storage type becomes floats and floats become it.
//
// This header is compiled once for each instruction set, inside a namespace of its own. It uses no inline functions of the
// standard library: the linker would keep one copy of each, perhaps one the machine cannot run.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lisa_ds {
namespace LEVEL {
namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};
struct Word { __m512i v; };

inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(fp16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec rough_quotient(Vec a, Vec b) { return {_mm512_mul_ps(a.v, _mm512_rcp14_ps(b.v))}; }
inline Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
// The larger magnitude of the two, in one instruction.
inline Vec larger_magnitude(Vec a, Vec b) { return {_mm512_range_ps(a.v, b.v, 0xb)}; }
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float total(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline Word lanes_from(uint32_t first) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first)))};
}
template <int n> inline Word fold(Word a) { return {_mm512_xor_si512(a.v, _mm512_srli_epi32(a.v, n))}; }
inline Word times(Word a, uint32_t b) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(static_cast<int>(b)))}; }
inline Word with(Word a, uint32_t key) { return {_mm512_xor_si512(a.v, _mm512_set1_epi32(static_cast<int>(key)))}; }

// Two registers. Split, they hold the elements at even and at odd places: 16-bit and 8-bit numbers come apart and go together
// that way by a shift and a mask.
struct Pair { Vec a, b; };
#define LISA_DS_SPLIT 1

inline __m512i kept_bits(Vec x) { return _mm512_castps_si512(x.v); }
inline __m512i nearest(Vec x) {
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(kept_bits(x), 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(kept_bits(x), _mm512_set1_epi32(0x7fff)), odd);
}
inline __m512i plus_low(Vec x, Word random) {
  return _mm512_add_epi32(kept_bits(x), _mm512_and_si512(random.v, _mm512_set1_epi32(0xffff)));
}
inline __m512i plus_high(Vec x, Word random) { return _mm512_add_epi32(kept_bits(x), _mm512_srli_epi32(random.v, 16)); }
inline __m512i quiet(__m512i bits, Vec x) {
  return _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
// The upper halves of two registers, in memory order.
template <bool split> inline __m512i upper_halves(__m512i a, __m512i b, Pair of) {
  if (__builtin_expect(_mm512_cmp_ps_mask(of.a.v, of.b.v, _CMP_UNORD_Q) != 0, 0)) a = quiet(a, of.a), b = quiet(b, of.b);
  if constexpr (split) return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
  const __m512i places = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                          21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, places, b);
}

template <bool split> inline Pair load_pair(const bf16* p) {
  if constexpr (!split) return {load(p), load(p + Vec::width)};
  const __m512i both = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}
inline __m512i evens() {
  return _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline Pair in_order(Pair split) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(split.a.v, low, split.b.v)}, {_mm512_permutex2var_ps(split.a.v, high, split.b.v)}};
}
template <bool split, class T> inline Pair load_pair(const T* p) {
  const Pair x = {load(p), load(p + Vec::width)};
  if constexpr (!split) return x;
  const __m512i odds = _mm512_add_epi32(evens(), _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(x.a.v, evens(), x.b.v)}, {_mm512_permutex2var_ps(x.a.v, odds, x.b.v)}};
}
// Codes times their magnitudes, and codes squared: they fit 16 bits, where one instruction does 32 of them.
constexpr float kSplitUnit = 65536.0f;  // of split signed ones
template <bool split> inline Pair load_signed_squares(const int8_t* p) {
  static_assert(split);
  const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i squares = _mm512_mullo_epi16(words, _mm512_abs_epi16(words));
  const __m512i odd = _mm512_and_si512(squares, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  return {{_mm512_cvtepi32_ps(_mm512_slli_epi32(squares, 16))}, {_mm512_cvtepi32_ps(odd)}};
}
template <bool split> inline Pair load_squares(const uint8_t* p) {
  static_assert(split);
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i squares = _mm512_mullo_epi16(words, words), even = _mm512_and_si512(squares, _mm512_set1_epi32(0xffff));
  return {{_mm512_cvtepi32_ps(even)}, {_mm512_cvtepi32_ps(_mm512_srli_epi32(squares, 16))}};
}
template <bool split, class T> inline void store_pair(T* p, Pair x) {
  if constexpr (split) x = in_order(x);
  store(p, x.a), store(p + Vec::width, x.b);
}
template <bool split> inline void store_pair(bf16* p, Pair x) {
  _mm512_storeu_si512(p, upper_halves<split>(nearest(x.a), nearest(x.b), x));
}
// Past the caches: a weight that is only written need not be read first. `p` is a multiple of 64 bytes.
template <bool split> inline void stream_pair(bf16* p, Pair x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), upper_halves<split>(nearest(x.a), nearest(x.b), x));
}
template <bool split> inline void stream_pair(fp16* p, Pair x) {
  if constexpr (split) x = in_order(x);
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(x.a.v, mode));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(low, _mm512_cvtps_ph(x.b.v, mode), 1));
}
template <bool split> inline void stream_pair(float* p, Pair x) {
  if constexpr (split) x = in_order(x);
  _mm512_stream_ps(p, x.a.v), _mm512_stream_ps(p + Vec::width, x.b.v);
}
inline void finish_streams() { _mm_sfence(); }
// Rounded stochastically, split: a word of random bits serves an even element and the odd one after it. second: the halves
// change places.
template <bool second> inline void store_pair_random(bf16* p, Pair x, Word random) {
  const __m512i a = second ? plus_high(x.a, random) : plus_low(x.a, random);
  const __m512i b = second ? plus_low(x.b, random) : plus_high(x.b, random);
  _mm512_storeu_si512(p, upper_halves<true>(a, b, x));
}
// Codes are made to 14 bits, of which they keep 8: exact roots would take most of the time. Adding 1.5 * 2^23 rounds to the
// integer that then stands in the low bits.
constexpr float kRound = 12582912.0f;
inline void store_codes(void* p, __m512 even, __m512 odd) {
  const __m512i high = _mm512_slli_epi32(_mm512_castps_si512(odd), 16);
  const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_castps_si512(even), high);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(words));
}
inline __m512 signed_root(Vec x, Vec inverse) {
  const __m512 share = _mm512_mul_ps(x.v, inverse.v);
  const __m512 positive = _mm512_range_ps(share, _mm512_set1_ps(1e-37f), 0xb);
  return _mm512_fmadd_ps(share, _mm512_rsqrt14_ps(positive), _mm512_set1_ps(kRound));
}
inline __m512 fourth_root(Vec x, Vec inverse) {
  const __m512 share = _mm512_max_ps(_mm512_mul_ps(x.v, inverse.v), _mm512_set1_ps(1.0f));
  return _mm512_add_ps(_mm512_rsqrt14_ps(_mm512_rsqrt14_ps(share)), _mm512_set1_ps(kRound));
}
template <bool split> inline void store_signed_roots(int8_t* p, Pair x, Vec inverse) {
  static_assert(split);
  store_codes(p, signed_root(x.a, inverse), signed_root(x.b, inverse));
}
template <bool split> inline void store_fourth_roots(uint8_t* p, Pair x, Vec inverse) {
  static_assert(split);
  store_codes(p, fourth_root(x.a, inverse), fourth_root(x.b, inverse));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};
struct Word { __m256i v; };

inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(fp16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline __m128i low_halves(__m256i words) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_castsi256_si128(packed);
}
inline void store_upper(bf16* p, Vec x, __m256i carry) {
  const __m256i sum = _mm256_add_epi32(_mm256_castps_si256(x.v), carry);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(kept));
}
inline void store(bf16* p, Vec x) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(x.v), 16), _mm256_set1_epi32(1));
  store_upper(p, x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline void store_codes(int8_t* p, Vec x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
inline void store_codes(uint8_t* p, Vec x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec rough_quotient(Vec a, Vec b) { return a / b; }
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec larger_magnitude(Vec a, Vec b) { return larger(magnitude(a), magnitude(b)); }
inline Vec with_sign_of(Vec a, Vec sign) { return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))}; }
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float total(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
// The words of the elements from `first` on, of which each shares one with its neighbour.
inline Word lanes_from(uint32_t first) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return {_mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first)))};
}
template <int n> inline Word fold(Word a) { return {_mm256_xor_si256(a.v, _mm256_srli_epi32(a.v, n))}; }
inline Word times(Word a, uint32_t b) { return {_mm256_mullo_epi32(a.v, _mm256_set1_epi32(static_cast<int>(b)))}; }
inline Word with(Word a, uint32_t key) { return {_mm256_xor_si256(a.v, _mm256_set1_epi32(static_cast<int>(key)))}; }
template <bool second> inline void store_random(bf16* p, Vec x, Word random) {
  constexpr int even = second ? 16 : 0, odd = 16 - even;
  const __m256i half = _mm256_srlv_epi32(random.v, _mm256_setr_epi32(even, odd, even, odd, even, odd, even, odd));
  store_upper(p, x, _mm256_and_si256(half, _mm256_set1_epi32(0xffff)));
}

#else

// Any processor: the compiler's own vectors of four, which are SSE2 on every x86-64 and NEON on every 64-bit ARM.
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));
typedef uint8_t Bytes __attribute__((vector_size(4)));
typedef int8_t SignedBytes __attribute__((vector_size(4)));

struct Vec {
  static constexpr int width = 4;
  Floats v;
};
struct Word { Bits v; };

template <class V> inline V read(const void* p) { V v; __builtin_memcpy(&v, p, sizeof(V)); return v; }
template <class V> inline void write(void* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }
inline Bits bits(Vec x) { return __builtin_bit_cast(Bits, x.v); }
inline Vec of_bits(Bits x) { return {__builtin_bit_cast(Floats, x)}; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Subnormal halves are normal floats: let the multiplication normalise them.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float x) {
  const uint32_t word = bits_of(x), sign = word >> 16 & 0x8000, rest = word & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}
inline Vec set(float x) { return {Floats{x, x, x, x}}; }
inline Vec load(const float* p) { return {read<Floats>(p)}; }
inline Vec load(const bf16* p) { return of_bits(__builtin_convertvector(read<Halves>(p), Bits) << 16); }
inline Vec load(const fp16* p) {
  return {Floats{half_to_float(p[0].bits), half_to_float(p[1].bits), half_to_float(p[2].bits), half_to_float(p[3].bits)}};
}
inline Vec load(const int8_t* p) { return {__builtin_convertvector(read<SignedBytes>(p), Floats)}; }
inline Vec load(const uint8_t* p) { return {__builtin_convertvector(read<Bytes>(p), Floats)}; }
inline void store(float* p, Vec x) { write(p, x.v); }
inline void store(fp16* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i].bits = float_to_half(x.v[i]);
}
inline void store_upper(bf16* p, Vec x, Bits carry) {
  const Bits kept = x.v == x.v ? (bits(x) + carry) >> 16 : Bits{0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0};
  write(p, __builtin_convertvector(kept, Halves));
}
inline void store(bf16* p, Vec x) { store_upper(p, x, (bits(x) >> 16 & 1) + 0x7fff); }
// Adding 1.5 * 2^23 rounds to the integer that then stands in the low bits.
inline void store_codes(int8_t* p, Vec x) { write(p, __builtin_convertvector(bits({x.v + 12582912.0f}) & 0xff, Bytes)); }
inline void store_codes(uint8_t* p, Vec x) { write(p, __builtin_convertvector(bits({x.v + 12582912.0f}) & 0xff, Bytes)); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }
inline Vec root(Vec a) {
#if defined(__SSE2__)
  return {__builtin_ia32_sqrtps(a.v)};
#else
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
#endif
}
inline Vec rough_quotient(Vec a, Vec b) { return a / b; }
inline Vec magnitude(Vec a) { return of_bits(bits(a) & 0x7fffffff); }
inline Vec larger(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec larger_magnitude(Vec a, Vec b) { return larger(magnitude(a), magnitude(b)); }
inline Vec with_sign_of(Vec a, Vec sign) { return of_bits(bits(a) | (bits(sign) & 0x80000000)); }
inline float largest(Vec a) {
  float most = a.v[0];
  for (int i = 1; i < 4; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
inline float total(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

// The words of the elements from `first` on, of which each shares one with its neighbour.
inline Word lanes_from(uint32_t first) { return {Bits{0, 0, 1, 1} + first}; }
template <int n> inline Word fold(Word a) { return {a.v ^ a.v >> n}; }
inline Word times(Word a, uint32_t b) { return {a.v * b}; }
inline Word with(Word a, uint32_t key) { return {a.v ^ key}; }
template <bool second> inline void store_random(bf16* p, Vec x, Word random) {
  constexpr uint32_t even = second ? 16 : 0, odd = 16 - even;
  store_upper(p, x, random.v >> Bits{even, odd, even, odd} & 0xffff);
}

#endif

#if !defined(LISA_DS_SPLIT)

// Two registers, one after the other. The wider instruction set above has a faster order for 16-bit and 8-bit numbers.
struct Pair { Vec a, b; };
#define LISA_DS_SPLIT 0
constexpr float kSplitUnit = 1.0f;

template <bool, class T> inline Pair load_pair(const T* p) { return {load(p), load(p + Vec::width)}; }
template <bool, class T> inline void store_pair(T* p, Pair x) { store(p, x.a), store(p + Vec::width, x.b); }
template <bool, class T> inline void stream_pair(T* p, Pair x) { store(p, x.a), store(p + Vec::width, x.b); }
inline void finish_streams() {}
template <bool> inline Pair load_signed_squares(const int8_t* p) {
  const Vec a = load(p), b = load(p + Vec::width);
  return {a * magnitude(a), b * magnitude(b)};
}
template <bool> inline Pair load_squares(const uint8_t* p) {
  const Vec a = load(p), b = load(p + Vec::width);
  return {a * a, b * b};
}
inline Vec signed_root(Vec x, Vec inverse) { return with_sign_of(root(magnitude(x) * inverse), x); }
inline Vec fourth_root(Vec x, Vec inverse) { return root(root(larger(x * inverse, set(1.0f)))); }
template <bool> inline void store_signed_roots(int8_t* p, Pair x, Vec inverse) {
  store_codes(p, signed_root(x.a, inverse)), store_codes(p + Vec::width, signed_root(x.b, inverse));
}
template <bool> inline void store_fourth_roots(uint8_t* p, Pair x, Vec inverse) {
  store_codes(p, fourth_root(x.a, inverse)), store_codes(p + Vec::width, fourth_root(x.b, inverse));
}

#endif

}  // namespace
}  // namespace LEVEL
}  // namespace lisa_ds
