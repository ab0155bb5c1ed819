// Masked AdamW on the CPU, for the instruction set that LEVEL names. The arithmetic is that of lisa_ds/ops/reference.py.
#include "table.h"

#include <math.h>
#include <stdlib.h>

#include "simd.h"

namespace lisa_ds {
namespace LEVEL {
namespace {

struct None {};  // no weight to write back to, or no moments

// A segment's numbers, ready for use.
struct Coefficients {
  Vec factor, beta1, beta2;
  Vec new1, new2;                // 1 - beta, the second times the square of the factor
  Vec decay, inverse_root, eps;  // the last two over the rate, which saves a multiplication; without moments eps is not
  Vec rate;                      // without moments
  uint32_t begin, middle;        // keys of the random numbers
};

inline uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x7feb352dU;
  word ^= word >> 15;
  word *= 0x846ca68bU;
  return word ^ word >> 16;
}

Coefficients coefficients(const Call& call, int64_t segment) {
  const int64_t* row = call.addresses + segment * kAddressColumns;
  const float* hyper = call.hyper + segment * kHyperColumns;
  const double step = *reinterpret_cast<const float*>(row[STEP]);
  // 1 - beta^step. The logarithm is -inf where beta is 0.
  const double correction1 = -expm1(step * static_cast<double>(hyper[LOG_BETA1]));
  const double correction2 = -expm1(step * static_cast<double>(hyper[LOG_BETA2]));
  const uint64_t seed = static_cast<uint64_t>(row[SEED]);
  Coefficients c;
  c.factor = set(call.factor);
  c.beta1 = set(hyper[BETA1]);
  c.beta2 = set(hyper[BETA2]);
  c.new1 = set(hyper[ONE_MINUS_BETA1]);
  c.new2 = set(hyper[ONE_MINUS_BETA2] * call.factor * call.factor);
  c.decay = set(static_cast<float>(1.0 - static_cast<double>(hyper[LR]) * hyper[WEIGHT_DECAY]));
  const double rate = hyper[LR] / correction1;  // 0: an infinite denominator, and no step
  c.inverse_root = set(rate == 0 ? 0.0f : static_cast<float>(1.0 / (sqrt(correction2) * rate)));
  c.eps = set(rate == 0 ? INFINITY : static_cast<float>(hyper[EPS] / rate));
  c.rate = set(hyper[LR]);
  if (call.moments == MOMENTS_NONE) c.eps = set(hyper[EPS]);
  c.begin = mix(static_cast<uint32_t>(seed) + static_cast<uint32_t>(static_cast<int64_t>(step)) * 0x9e3779b9U);
  c.middle = mix(static_cast<uint32_t>(seed >> 32) ^ c.begin);
  return c;
}

// Random words from the one that element `index` has part in.
inline Word random_words(const Coefficients& c, int64_t index) {
  const uint64_t pair = static_cast<uint64_t>(index) / 2;
  const uint32_t key = c.middle + static_cast<uint32_t>(pair >> 32) * 0x85ebca6bU;
  const Word word = times(fold<16>(lanes_from(static_cast<uint32_t>(pair) + c.begin)), 0x7feb352dU);
  return fold<16>(times(fold<15>(with(word, key)), 0x846ca68bU));
}

struct Random {
#if LISA_DS_SPLIT
  Word both;
  Random(const Coefficients& c, int64_t index) : both(random_words(c, index)) {}
  template <bool second> void round(bf16* p, Pair x) const { store_pair_random<second>(p, x, both); }
#else
  Word a, b;
  Random(const Coefficients& c, int64_t index) : a(random_words(c, index)), b(random_words(c, index + Vec::width)) {}
  template <bool second> void round(bf16* p, Pair x) const {
    store_random<second>(p, x.a, a), store_random<second>(p + Vec::width, x.b, b);
  }
#endif
};
struct NotRandom {
  NotRandom(const Coefficients&, int64_t) {}
};

// decoding: the first moment comes as a code, which beta1 turns into the moment times its beta. exact: the quotient is; else it is
// good to 14 bits, where moments are kept in 8.
template <bool decoding, bool exact>
inline void adamw(const Coefficients& c, Vec gradient, Vec& weight, Vec& exp_avg, Vec& exp_avg_sq) {
  exp_avg = decoding ? fma(c.beta1, exp_avg, c.new1 * gradient) : fma(c.new1, fms(gradient, c.factor, exp_avg), exp_avg);
  exp_avg_sq = fma(c.beta2, exp_avg_sq, c.new2 * gradient * gradient);
  const Vec denominator = fma(root(exp_avg_sq), c.inverse_root, c.eps);
  weight = fms(weight, c.decay, exact ? exp_avg / denominator : rough_quotient(exp_avg, denominator));
}

template <bool decoding, bool exact>
inline void adamw(const Coefficients& c, Pair gradient, Pair& weight, Pair& exp_avg, Pair& exp_avg_sq) {
  adamw<decoding, exact>(c, gradient.a, weight.a, exp_avg.a, exp_avg_sq.a);
  adamw<decoding, exact>(c, gradient.b, weight.b, exp_avg.b, exp_avg_sq.b);
}

// Without moments: those of the first step, corrected, are the gradient and its square.
inline Vec first_step(const Coefficients& c, Vec gradient, Vec weight) {
  gradient = gradient * c.factor;
  return fms(weight, c.decay, c.rate * (gradient / (magnitude(gradient) + c.eps)));
}
inline Pair first_step(const Coefficients& c, Pair gradient, Pair weight) {
  return {first_step(c, gradient.a, weight.a), first_step(c, gradient.b, weight.b)};
}

template <class T> inline T* at(const int64_t* row, int column) { return reinterpret_cast<T*>(row[column]); }
template <class T> inline T* past(T* p, int64_t i) { return p + i; }
inline None* past(None* p, int64_t) { return p; }

// Where the elements of one segment lie.
template <class Grad, class Weight, class First, class Second>
struct Pointers {
  static constexpr bool has_moments = !__is_same(First, None);
  explicit Pointers(const int64_t* row)
      : weight(at<Weight>(row, WEIGHT)),
        grad(at<const Grad>(row, GRAD)),
        master(at<float>(row, MASTER)),
        exp_avg(at<First>(row, EXP_AVG)),
        exp_avg_sq(at<Second>(row, EXP_AVG_SQ)) {}
  Pointers from(int64_t i) const {
    Pointers moved = *this;
    moved.weight = past(weight, i), moved.grad += i, moved.master += i;
    moved.exp_avg = past(exp_avg, i), moved.exp_avg_sq = past(exp_avg_sq, i);
    return moved;
  }
  Weight* weight;
  const Grad* grad;
  float* master;
  First* exp_avg;
  Second* exp_avg_sq;
};

// What the template arguments of the functions below stand for:
// master: the update is made in an fp32 copy, and written back; without it the bf16 weight is rounded stochastically.
// split: pairs of registers hold even and odd elements. stream: weights are written past the caches.
constexpr int64_t kPair = 2 * Vec::width;

template <bool split, bool stream, class Weight> inline void write_back(Weight* weight, Pair value) {
  if constexpr (stream) stream_pair<split>(weight, value);
  else store_pair<split>(weight, value);
}
template <bool, bool> inline void write_back(None*, Pair) {}

template <bool master, bool split, class P> inline Pair source(const P& p) {
  if constexpr (master) return load_pair<split>(p.master);
  else return load_pair<split>(p.weight);
}

template <bool master> struct RandomFor { using type = Random; };
template <> struct RandomFor<true> { using type = NotRandom; };

template <bool master, bool split, bool stream, class P, class R>
inline void keep_weight(const P& p, Pair value, const R& random) {
  if constexpr (master) {
    store_pair<split>(p.master, value);
    write_back<split, stream>(p.weight, value);
  } else {
    random.template round<false>(p.weight, value);
  }
}

template <bool split, class R> inline void keep_second(float* p, Pair value, const R&) { store_pair<split>(p, value); }
template <bool split> inline void keep_second(bf16* p, Pair value, const Random& random) { random.round<true>(p, value); }

// kPair elements, of which the first is number `index` of the segment.
template <bool master, bool split, bool stream, class P> inline void step_pair(const Coefficients& c, const P& p, int64_t index) {
  using R = typename RandomFor<master>::type;
  if constexpr (P::has_moments) {
    Pair weight = source<master, split>(p), exp_avg = load_pair<split>(p.exp_avg), exp_avg_sq = load_pair<split>(p.exp_avg_sq);
    adamw<false, sizeof(*p.exp_avg) == sizeof(float)>(c, load_pair<split>(p.grad), weight, exp_avg, exp_avg_sq);
    const R random(c, index);
    keep_weight<master, split, stream>(p, weight, random);
    store_pair<split>(p.exp_avg, exp_avg);
    keep_second<split>(p.exp_avg_sq, exp_avg_sq, random);
  } else {
    const Pair weight = first_step(c, load_pair<split>(p.grad), source<master, split>(p));
    keep_weight<master, split, stream>(p, weight, R(c, index));
  }
}

template <class T> inline void copy(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void copy(None*, const None*, int64_t) {}
template <class T> inline T* writable(const T* p) { return const_cast<T*>(p); }

// Applies f to a copy of elements [0, n) that has room for `size`, so that the last ones take the same arithmetic as all.
template <bool master, int64_t size, class P, class F> void through_buffer(const P& p, int64_t n, F f) {
  alignas(64) unsigned char room[5][4 * size] = {};
  P q = p;
  q.weight = reinterpret_cast<decltype(q.weight)>(room[0]);
  q.grad = reinterpret_cast<decltype(q.grad)>(room[1]);
  q.master = reinterpret_cast<decltype(q.master)>(room[2]);
  q.exp_avg = reinterpret_cast<decltype(q.exp_avg)>(room[3]);
  q.exp_avg_sq = reinterpret_cast<decltype(q.exp_avg_sq)>(room[4]);
  copy(writable(q.grad), p.grad, n);
  if constexpr (master) copy(q.master, p.master, n);
  else copy(q.weight, p.weight, n);
  copy(q.exp_avg, p.exp_avg, n);
  copy(q.exp_avg_sq, p.exp_avg_sq, n);
  f(q);
  if constexpr (master) copy(p.master, q.master, n);
  copy(p.weight, q.weight, n);
  copy(p.exp_avg, q.exp_avg, n);
  copy(p.exp_avg_sq, q.exp_avg_sq, n);
}

// Whether a written-back weight may go past the caches: ranges begin at a multiple of a line if the segment does.
template <bool master, class Weight> inline bool can_stream(Weight* weight) {
  return master && !__is_same(Weight, None) && reinterpret_cast<uintptr_t>(weight) % 64 == 0;
}

// Moments of a byte or two leave so much to compute for each byte that the processor does not look far enough ahead itself.
// Asks for what comes some blocks after the kPair elements at `p`, into the second cache: the first would wait for it.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <bool master, class P> inline void prefetch_after(const P& p) {
  constexpr int64_t ahead = 8 * kQuantBlock, line = 64;
  const P next = p.from(ahead);
  for (int64_t i = 0; i < kPair; i += line / sizeof(*p.grad)) fetch(next.grad + i);
  if constexpr (master) {
    for (int64_t i = 0; i < kPair; i += line / sizeof(float)) fetch(next.master + i);
  } else {
    fetch(next.weight);
  }
  if constexpr (P::has_moments) fetch(next.exp_avg), fetch(next.exp_avg_sq);
}

// Elements [begin, end) of a segment whose moments are fp32 or bf16, or which has none.
template <bool master, class Grad, class Weight, class Moment>
void update_range(const Coefficients c, const int64_t* row, int64_t begin, int64_t end) {
  using P = Pointers<Grad, Weight, Moment, Moment>;
  constexpr bool split = LISA_DS_SPLIT && !master;
  const P p(row);
  int64_t i = begin;
  if (can_stream<master>(p.weight)) {
    for (; i + kPair <= end; i += kPair) step_pair<master, split, master && !__is_same(Weight, None)>(c, p.from(i), i);
    finish_streams();
  }
  for (; i + kPair <= end; i += kPair) {
    if constexpr (sizeof(Moment) == 2) prefetch_after<master>(p.from(i));
    step_pair<master, split, false>(c, p.from(i), i);
  }
  if (i < end) {
    through_buffer<master, kPair>(p.from(i), end - i, [&](const P& q) { step_pair<master, split, false>(c, q, i); });
  }
}

constexpr float kCode1 = 127.0f * 127.0f, kCode2 = 255.0f * 255.0f * 255.0f * 255.0f;  // of the largest value of a block
constexpr float kLeast = 1e-37f;  // a block with nothing larger is kept as zero
// No scale so small that what it is divided into would be infinite: tiny blocks have smaller codes instead.
inline float scale_of(float largest, float unit) {
  const float least = unit / 3e38f;
  return largest > kLeast ? (largest > least ? largest : least) : 0.0f;
}
inline Vec inverse_of(float scale, float unit) { return set(scale > 0.0f ? unit / scale : 0.0f); }

// New moments of a block, on their way to become codes.
struct Unquantised {
  alignas(64) float first[kQuantBlock];
  alignas(64) float second[kQuantBlock];
  float largest1, largest2;
};

// Updates the weights of one block of 8-bit moments. `index` is that of its first element.
template <bool master, bool split, bool stream, class P>
inline void update_block(const Coefficients& c, const P& p, float scale1, float scale2, int64_t index, Unquantised& out) {
  constexpr float unit = split ? kSplitUnit : 1.0f;
  // The moments come out of their codes multiplied by their beta.
  Coefficients decoding = c;
  decoding.new1 = c.new1 * c.factor;
  decoding.beta1 = c.beta1 * set(scale1 * (1.0f / kCode1) / unit);
  decoding.beta2 = c.beta2 * set(scale2 * (1.0f / kCode2));
  Vec most1 = set(0.0f), most2 = set(0.0f);
  for (int64_t i = 0; i < kQuantBlock; i += kPair) {
    const P q = p.from(i);
    prefetch_after<master>(q);
    Pair exp_avg = load_signed_squares<split>(q.exp_avg), exp_avg_sq = load_squares<split>(q.exp_avg_sq);
    exp_avg_sq = {exp_avg_sq.a * exp_avg_sq.a, exp_avg_sq.b * exp_avg_sq.b};
    Pair weight = source<master, split>(q);
    adamw<true, false>(decoding, load_pair<split>(q.grad), weight, exp_avg, exp_avg_sq);
    keep_weight<master, split, stream>(q, weight, typename RandomFor<master>::type(c, index + i));
    store_pair<false>(out.first + i, exp_avg);
    store_pair<false>(out.second + i, exp_avg_sq);
    most1 = larger_magnitude(most1, larger_magnitude(exp_avg.a, exp_avg.b));
    most2 = larger(most2, larger(exp_avg_sq.a, exp_avg_sq.b));
  }
  out.largest1 = largest(most1);
  out.largest2 = largest(most2);
}

template <bool split, class P> inline void quantise_block(const Unquantised& in, const P& p, float* scale1, float* scale2) {
  *scale1 = scale_of(in.largest1, kCode1);
  *scale2 = scale_of(in.largest2, kCode2);
  const Vec inverse1 = inverse_of(*scale1, kCode1), inverse2 = inverse_of(*scale2, kCode2);
  for (int64_t i = 0; i < kQuantBlock; i += kPair) {
    store_signed_roots<split>(p.exp_avg + i, load_pair<false>(in.first + i), inverse1);
    store_fourth_roots<split>(p.exp_avg_sq + i, load_pair<false>(in.second + i), inverse2);
  }
}

template <bool master, bool stream, class P>
void update_blocks(const Coefficients c, const P p, float* scale1, float* scale2, int64_t begin, int64_t end) {
  constexpr bool split = LISA_DS_SPLIT;
  Unquantised moments[2];
  // A block becomes codes after the next one is updated: by then its largest values are known, and nothing waits for them.
  for (int64_t k = begin; k <= end; ++k) {
    if (k < end) {
      update_block<master, split, stream>(c, p.from(k * kQuantBlock), scale1[k], scale2[k], k * kQuantBlock, moments[k & 1]);
    }
    if (k > begin) quantise_block<split>(moments[(k - 1) & 1], p.from((k - 1) * kQuantBlock), scale1 + k - 1, scale2 + k - 1);
  }
}

template <bool master, class Grad, class Weight>
void update_quantised(const Coefficients c, const int64_t* row, int64_t begin, int64_t end) {
  using P = Pointers<Grad, Weight, int8_t, uint8_t>;
  const P p(row);
  float* scale1 = at<float>(row, EXP_AVG_SCALE);
  float* scale2 = at<float>(row, EXP_AVG_SQ_SCALE);
  const int64_t first = begin / kQuantBlock, last = end / kQuantBlock, rest = last * kQuantBlock;
  if (can_stream<master>(p.weight)) {
    update_blocks<master, master && !__is_same(Weight, None)>(c, p, scale1, scale2, first, last);
    finish_streams();
  } else {
    update_blocks<master, false>(c, p, scale1, scale2, first, last);
  }
  if (rest < end) {
    through_buffer<master, kQuantBlock>(p.from(rest), end - rest, [&](const P& q) {
      update_blocks<master, false>(c, q.from(-rest), scale1, scale2, last, last + 1);
    });
  }
}

using Update = void (*)(const Coefficients, const int64_t* row, int64_t begin, int64_t end);

template <bool master, class Grad, class Weight> Update choose_moments(const Call& call) {
  if (call.moments == MOMENTS_INT8) return update_quantised<master, Grad, Weight>;
  if (call.moments == MOMENTS_NONE) return update_range<master, Grad, Weight, None>;
  if constexpr (!master) {
    if (call.moments == MOMENTS_BF16) return update_range<master, Grad, Weight, bf16>;
  }
  return update_range<master, Grad, Weight, float>;
}

template <class Grad> Update choose_weight(const Call& call) {
  if (!call.has_master) return choose_moments<false, Grad, bf16>(call);
  switch (call.weight) {
    case BF16: return choose_moments<true, Grad, bf16>(call);
    case FP16: return choose_moments<true, Grad, fp16>(call);
    case FP32: return choose_moments<true, Grad, float>(call);
    default: return choose_moments<true, Grad, None>(call);
  }
}

Update choose(const Call& call) {
  switch (call.grad) {
    case BF16: return choose_weight<bf16>(call);
    case FP16: return choose_weight<fp16>(call);
    default: return choose_weight<float>(call);
  }
}

inline int64_t pieces(const Call& call, int64_t segment, int64_t size) {
  return (call.addresses[segment * kAddressColumns + NUMEL] + size - 1) / size;
}

// Shares the pieces of `size` elements of all segments out among the threads, some at a time and to whoever is free: cores
// that others use as well are not equally fast. f(segment, first piece, last piece + 1, pieces before the segment).
template <class F> void share(const Call& call, int64_t size, F f) {
  constexpr int64_t elements = 1 << 16;  // of a task
  int64_t all = 0;
  for (int64_t s = 0; s < call.num_segments; ++s) all += pieces(call, s, size);
  const int64_t each = elements / size, tasks = (all + each - 1) / each;
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t begin = task * each, end = begin + each;
    int64_t before = 0;
    for (int64_t s = 0; s < call.num_segments && before < end; ++s) {
      const int64_t count = pieces(call, s, size);
      const int64_t from = begin > before ? begin - before : 0, to = end - before < count ? end - before : count;
      if (from < to) f(s, from, to, before);
      before += count;
    }
  }
}

template <class Grad> double sum_of_range(const Grad* grad, int64_t begin, int64_t end) {
  Vec sum1 = set(0.0f), sum2 = set(0.0f);
  int64_t i = begin;
  for (; i + 2 * Vec::width <= end; i += 2 * Vec::width) {
    const Vec a = load(grad + i), b = load(grad + i + Vec::width);
    sum1 = fma(a, a, sum1);
    sum2 = fma(b, b, sum2);
  }
  for (; i < end; i += Vec::width) {
    Grad rest[Vec::width] = {};
    copy(rest, grad + i, end - i < Vec::width ? end - i : static_cast<int64_t>(Vec::width));
    const Vec a = load(rest);
    sum1 = fma(a, a, sum1);
  }
  return static_cast<double>(total(sum1)) + static_cast<double>(total(sum2));
}

template <class Grad> double sum_of_all(const Call& call) {
  int64_t all = 0;
  for (int64_t s = 0; s < call.num_segments; ++s) all += pieces(call, s, kBlock);
  double* partial = static_cast<double*>(calloc(all ? all : 1, sizeof(double)));
  if (!partial) return NAN;
  share(call, kBlock, [&](int64_t s, int64_t from, int64_t to, int64_t before) {
    const int64_t* row = call.addresses + s * kAddressColumns;
    for (int64_t k = from; k < to; ++k) {
      const int64_t end = (k + 1) * kBlock < row[NUMEL] ? (k + 1) * kBlock : row[NUMEL];
      partial[before + k] = sum_of_range(at<const Grad>(row, GRAD), k * kBlock, end);
    }
  });
  double sum = 0;  // in the order of the table, so that the number of threads does not show in the last digits
  for (int64_t k = 0; k < all; ++k) sum += partial[k];
  free(partial);
  return sum;
}

}  // namespace

void masked_adamw(const Call& call) {
  const Update update = choose(call);
  share(call, kQuantBlock, [&](int64_t s, int64_t from, int64_t to, int64_t) {
    const int64_t* row = call.addresses + s * kAddressColumns;
    const int64_t end = to * kQuantBlock < row[NUMEL] ? to * kQuantBlock : row[NUMEL];
    update(coefficients(call, s), row, from * kQuantBlock, end);
  });
}

double sum_of_squares(const Call& call) {
  switch (call.grad) {
    case BF16: return sum_of_all<bf16>(call);
    case FP16: return sum_of_all<fp16>(call);
    default: return sum_of_all<float>(call);
  }
}

}  // namespace LEVEL
}  // namespace lisa_ds
