// Masked AdamW on a GPU: one launch over the blocks of every segment of a table.
// lisa_ds/ops/segments.py says what the table holds, lisa_ds/ops/reference.py what is computed, lisa_ds/ops/cuda.py calls it.
// No header of torch is needed: pointers come in through a C interface, so one library serves every torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

constexpr int kBlock = 2048;      // elements of a block of the grid
constexpr int kQuantBlock = 256;  // elements of 8-bit moments that share a scale
constexpr int kWarp = 32;

enum Address { WEIGHT, GRAD, MASTER, EXP_AVG, EXP_AVG_SQ, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE, STEP, NUMEL, FIRST_BLOCK, ALIGNED, SEED };
constexpr int64_t kAddressColumns = 12;

enum HyperColumn { LR, WEIGHT_DECAY, BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, EPS, LOG_BETA1, LOG_BETA2 };
constexpr int64_t kHyperColumns = 12;

enum Type { NONE = -1, FP32 = 0, BF16 = 1, FP16 = 2 };
enum Moments { MOMENTS_FP32 = 0, MOMENTS_BF16 = 1, MOMENTS_INT8 = 2, MOMENTS_NONE = 3 };

using bf16 = __nv_bfloat16;
using fp16 = __half;
struct None {};  // no weight to write back to, or no moments

struct Launch {
  const int64_t* addresses;      // [segments][kAddressColumns]
  const float* hyper;            // [segments][kHyperColumns]; of the update alone, as the next two
  const int32_t* block_segment;  // [blocks]
  const float* factor;
  const float* found_inf;
  double* partials;  // [blocks]; of the sum of squares alone
};

// The elements of a block of the grid. 64 bits throughout: a segment may have more than 2^31 elements.
struct Span {
  const int64_t* row;  // its segment's
  int64_t segment, start;
  int n;        // elements, kBlock at most
  bool vector;  // all of them, and every tensor at a multiple of 16 bytes
};

__device__ Span span_of(const Launch& launch) {
  Span span;
  span.segment = launch.block_segment[blockIdx.x];
  span.row = launch.addresses + span.segment * kAddressColumns;
  span.start = (static_cast<int64_t>(blockIdx.x) - span.row[FIRST_BLOCK]) * kBlock;
  const int64_t left = span.row[NUMEL] - span.start;
  span.n = left < kBlock ? static_cast<int>(left) : kBlock;
  span.vector = span.n == kBlock && span.row[ALIGNED];
  return span;
}

// ---- types in memory and in registers -----------------------------------------------------------------------------

// What a column of the table points to. The cast tells the compiler that it is global memory.
template <class T> __device__ T* at(const int64_t* row, int column, int64_t offset) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(row[column]))) + offset;
}

template <class T> __device__ float to_float(T value) {
  if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(value);
  else if constexpr (std::is_same_v<T, fp16>) return __half2float(value);
  else return static_cast<float>(value);
}

template <class T> __device__ T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(value);
  else if constexpr (std::is_same_v<T, float>) return value;
  else return static_cast<T>(__float2int_rn(value));  // a code; halves go to even, as torch.round has it
}

// N neighbours as they lie in memory, in 32-bit registers. They stay packed while others are waited for: taken apart at once,
// elements of 8 and 16 bits would fill a register each.
template <class T, int N> struct Pack {
  static constexpr int words = N * sizeof(T) / 4, per_word = 4 / sizeof(T);
  using Wide = std::conditional_t<words % 4 == 0, uint4, uint2>;
  static constexpr int wides = N * sizeof(T) / sizeof(Wide);
  alignas(Wide) uint32_t word[words];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < wides; ++i) reinterpret_cast<Wide*>(word)[i] = reinterpret_cast<const Wide*>(from)[i];
  }
  // As what is not read again in this step (evict first). A plain store of a vector is taken apart for some architectures.
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < wides; ++i) __stcs(reinterpret_cast<Wide*>(to) + i, reinterpret_cast<const Wide*>(word)[i]);
  }
  __device__ void unpack(float (&values)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t bits = word[j / per_word] >> (j % per_word * 8 * sizeof(T));
      if constexpr (std::is_same_v<T, float>) values[j] = __uint_as_float(bits);
      else if constexpr (std::is_same_v<T, bf16>) values[j] = __uint_as_float(bits << 16);
      else if constexpr (std::is_same_v<T, fp16>) values[j] = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
      else values[j] = static_cast<T>(bits);
    }
  }
  __device__ static void pack_to(T* to, const float (&values)[N]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const float* v = values + i * per_word;
      if constexpr (std::is_same_v<T, float>) {
        pack.word[i] = __float_as_uint(v[0]);
      } else if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
        pack.word[i] = reinterpret_cast<const uint32_t&>(pair);
      } else if constexpr (std::is_same_v<T, fp16>) {
        const __half2 pair = __floats2half2_rn(v[0], v[1]);
        pack.word[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        pack.word[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) pack.word[i] |= (static_cast<uint32_t>(__float2int_rn(v[j])) & 0xffU) << (8 * j);
      }
    }
    pack.store(to);
  }
};

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// What all elements of a block share.
struct Coefficients {
  float factor, beta2, one_minus_beta1, one_minus_beta2, decay, rate, inverse_root, eps;
  uint32_t begin, key;  // of the random numbers
};

__device__ uint32_t mix(uint32_t word, uint32_t key = 0) {
  word ^= word >> 16;
  word *= 0x7feb352dU;
  word ^= key;
  word ^= word >> 15;
  word *= 0x846ca68bU;
  return word ^ word >> 16;
}

template <class Moment> constexpr bool is_kept = !std::is_same_v<Moment, None>;

template <bool has_moments> __device__ Coefficients coefficients(const Launch& launch, const Span& span) {
  const float* hyper = launch.hyper + span.segment * kHyperColumns;
  const float step = *at<const float>(span.row, STEP, 0);
  const uint64_t seed = static_cast<uint64_t>(span.row[SEED]);
  Coefficients c;
  c.factor = *launch.factor;
  c.beta2 = hyper[BETA2];
  c.one_minus_beta1 = hyper[ONE_MINUS_BETA1];
  c.one_minus_beta2 = hyper[ONE_MINUS_BETA2];
  c.decay = fmaf(-hyper[LR], hyper[WEIGHT_DECAY], 1.0f);
  if constexpr (has_moments) {
    // 1 - beta^step: of the logarithm, because the power of a beta near 1 would have lost its digits. It is -inf for beta 0.
    const float correction1 = -expm1f(step * hyper[LOG_BETA1]), correction2 = -expm1f(step * hyper[LOG_BETA2]);
    c.rate = hyper[LR] / correction1;
    c.inverse_root = 1.0f / sqrtf(correction2);
  } else {
    c.rate = hyper[LR];
  }
  c.eps = hyper[EPS];
  c.begin = mix(static_cast<uint32_t>(seed) + static_cast<uint32_t>(static_cast<int64_t>(step)) * 0x9e3779b9U);
  const int64_t pair = span.start / 2;  // a block does not hold both sides of a multiple of 2^32
  c.key = mix(static_cast<uint32_t>(seed >> 32) ^ c.begin) + static_cast<uint32_t>(pair >> 32) * 0x85ebca6bU;
  c.begin += static_cast<uint32_t>(pair);
  return c;
}

__device__ float rough_root(float value) {
#ifdef __CUDA_ARCH__
  asm("sqrt.approx.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return sqrtf(value);
#endif
}

// IEEE roots and quotients where moments are fp32 or not there: memory sets the pace then. 8-bit moments are rounded far more coarsely
// than the last place or two by which the fast instructions are off, and on a quarter of the traffic they would pay for IEEE: a quarter
// more instructions, and registers that spill. 16-bit moments lie between, and are treated likewise.
template <class Moment>
__device__ void adamw(const Coefficients& c, float gradient, float& weight, float& first, float& second) {
  gradient *= c.factor;
  float quotient;
  if constexpr (is_kept<Moment>) {
    constexpr bool exact = std::is_same_v<Moment, float>;
    first = first + c.one_minus_beta1 * (gradient - first);
    second = c.beta2 * second + c.one_minus_beta2 * gradient * gradient;
    const float denominator = (exact ? sqrtf(second) : rough_root(second)) * c.inverse_root + c.eps;
    quotient = exact ? first / denominator : __fdividef(first, denominator);
  } else {
    // Those of the first step, corrected, are the gradient and its square.
    quotient = gradient / (fabsf(gradient) + c.eps);
  }
  weight = weight * c.decay - c.rate * quotient;
}

// Random bits of element i of the block: the low half is for its weight, the high one for its second moment. Two neighbours share
// a word, and swap its halves.
__device__ uint32_t random_bits(const Coefficients& c, int i) {
  const uint32_t word = mix(c.begin + i / 2U, c.key);
  return i % 2 ? word >> 16 | word << 16 : word;
}

// A bfloat16, as a float whose low half is zero.
__device__ float round_stochastically(float value, uint32_t bits) {
  return isnan(value) ? value : __uint_as_float((__float_as_uint(value) + bits) & 0xffff0000U);
}

// ---- 8-bit moments ------------------------------------------------------------------------------------------------

template <class Moment> constexpr bool is_quantised = std::is_same_v<Moment, int8_t>;

constexpr float kLeast = 1e-37f;  // a quantisation block with nothing larger is kept as zero

__device__ float decode_signed(float code, float scale) { return code * fabsf(code) * (scale * (1.0f / (127.0f * 127.0f))); }

__device__ float decode_unsigned(float code, float scale) {
  const float square = code * code;
  return square * square * (scale * static_cast<float>(1.0 / (255.0 * 255.0 * 255.0 * 255.0)));
}

// Turns the values of a warp, which are those of a quantisation block, into codes, and returns their scale: the largest of all
// magnitudes. They are compared as integers, which order as they do and put NaN above all.
template <bool is_signed, int N> __device__ float encode(float (&values)[N]) {
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) word = max(word, __float_as_uint(values[j]) & 0x7fffffffU);
  const float largest = __uint_as_float(__reduce_max_sync(0xffffffffU, word));
  const float inverse = largest > kLeast ? 1.0f / largest : 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float share = fabsf(values[j]) * inverse;
    // No code stands for a second moment of zero: one that became it would leave its update to be divided by eps alone.
    const float code = is_signed ? rough_root(share) * 127.0f : rough_root(rough_root(share)) * 255.0f;
    values[j] = is_signed ? copysignf(code, values[j]) : (code < 1.0f ? 1.0f : code);
  }
  return largest > kLeast ? largest : 0.0f;
}

// ---- the update ---------------------------------------------------------------------------------------------------

// How the elements of a block are dealt out: a thread takes `width` neighbours in each round. With 8-bit moments a warp's share
// of a round is a quantisation block. Two rounds put twice the bytes on their way, where there are registers for them.
template <class Grad, class Source, class Moment> struct Deal {
  using Widest = std::conditional_t<is_kept<Moment>, Moment, Source>;  // of what is read and written
  static constexpr int width = std::is_same_v<Widest, float> ? 4 : 8;
  static constexpr int bytes = width * (sizeof(Grad) + sizeof(Source) + (is_kept<Moment> ? 2 * sizeof(Moment) : 0));
  static constexpr int rounds = width == 8 && bytes >= 64 ? 1 : 2;
  static constexpr int threads = kBlock / width / rounds;
  static_assert(!is_quantised<Moment> || kWarp * width == kQuantBlock);
};

// With a master copy the update is made there, and rounded to `Weight`; without, `Weight` is bf16 and rounded stochastically.
template <class Grad, class Weight, class Moment, bool master, int threads>
__global__ void __launch_bounds__(threads, 1024 / threads) masked_adamw(const Launch launch) {
  using Source = std::conditional_t<master, float, Weight>;
  using First = std::conditional_t<is_kept<Moment>, Moment, float>;  // where there are none, none are read or written
  using Second = std::conditional_t<is_quantised<Moment>, uint8_t, First>;
  using D = Deal<Grad, Source, Moment>;
  constexpr int W = D::width;
  constexpr bool quantised = is_quantised<Moment>, kept = is_kept<Moment>;
  constexpr bool copies = master && !std::is_same_v<Weight, None>;

  const float skip = *launch.found_inf;
  const Span span = span_of(launch);
  if (skip != 0.0f) return;
  Source* const source = at<Source>(span.row, master ? MASTER : WEIGHT, span.start);
  const Grad* const grad = at<Grad>(span.row, GRAD, span.start);
  First* const exp_avg = at<First>(span.row, EXP_AVG, span.start);
  Second* const exp_avg_sq = at<Second>(span.row, EXP_AVG_SQ, span.start);
  const auto thread_begin = [](int round) { return (round * threads + static_cast<int>(threadIdx.x)) * W; };

  // Of the quantisation block that element i lies in.
  const auto scale1 = [&](int i) { return at<float>(span.row, EXP_AVG_SCALE, (span.start + i) / kQuantBlock); };
  const auto scale2 = [&](int i) { return at<float>(span.row, EXP_AVG_SQ_SCALE, (span.start + i) / kQuantBlock); };

  // All that a thread reads is asked for before anything is waited for, the coefficients included.
  Pack<Source, W> sources[D::rounds];
  Pack<Grad, W> grads[D::rounds];
  [[maybe_unused]] Pack<First, W> firsts[D::rounds];
  [[maybe_unused]] Pack<Second, W> seconds[D::rounds];
  [[maybe_unused]] float scales1[D::rounds], scales2[D::rounds];
  if (span.vector) {
#pragma unroll
    for (int round = 0; round < D::rounds; ++round) {
      sources[round].load(source + thread_begin(round));
      grads[round].load(grad + thread_begin(round));
      if constexpr (kept) {
        firsts[round].load(exp_avg + thread_begin(round));
        seconds[round].load(exp_avg_sq + thread_begin(round));
      }
      if constexpr (quantised) scales1[round] = *scale1(thread_begin(round)), scales2[round] = *scale2(thread_begin(round));
    }
  }
  __shared__ Coefficients shared;
  if (threadIdx.x == 0) shared = coefficients<kept>(launch, span);
  __syncthreads();
  const Coefficients& c = shared;

  const auto step = [&](int i, float gradient, float& weight, float& first, float& second) {
    adamw<Moment>(c, gradient, weight, first, second);
    if constexpr (!master) {
      const uint32_t bits = random_bits(c, i);
      weight = round_stochastically(weight, bits & 0xffffU);
      if constexpr (std::is_same_v<Moment, bf16>) second = round_stochastically(second, bits >> 16);
    }
  };

  float first[W] = {}, second[W] = {};
  if (span.vector) {
    float weight[W], gradient[W];
#pragma unroll
    for (int round = 0; round < D::rounds; ++round) {
      const int i = thread_begin(round);
      sources[round].unpack(weight);
      grads[round].unpack(gradient);
      if constexpr (kept) firsts[round].unpack(first), seconds[round].unpack(second);
      if constexpr (quantised) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          first[j] = decode_signed(first[j], scales1[round]);
          second[j] = decode_unsigned(second[j], scales2[round]);
        }
      }
#pragma unroll
      for (int j = 0; j < W; ++j) step(i + j, gradient[j], weight[j], first[j], second[j]);
      Pack<Source, W>::pack_to(source + i, weight);
      if constexpr (copies) Pack<Weight, W>::pack_to(at<Weight>(span.row, WEIGHT, span.start) + i, weight);
      if constexpr (quantised) {
        const float largest1 = encode<true>(first), largest2 = encode<false>(second);
        if (threadIdx.x % kWarp == 0) *scale1(i) = largest1, *scale2(i) = largest2;
      }
      if constexpr (kept) {
        Pack<First, W>::pack_to(exp_avg + i, first);
        Pack<Second, W>::pack_to(exp_avg_sq + i, second);
      }
    }
    return;
  }
  // Element by element: the end of a segment, or one that is not aligned.
  const auto step_at = [&](int i, float& first, float& second) {
    float weight = to_float(source[i]);
    step(i, to_float(grad[i]), weight, first, second);
    source[i] = from_float<Source>(weight);
    if constexpr (copies) at<Weight>(span.row, WEIGHT, span.start)[i] = from_float<Weight>(weight);
  };
  const auto store_at = [&](int i, float first, float second) {
    exp_avg[i] = from_float<First>(first);
    exp_avg_sq[i] = from_float<Second>(second);
  };
  if constexpr (quantised) {
    // A quantisation block stays with the warp that has it above: the largest magnitude is found within a warp.
#pragma unroll 1
    for (int round = 0; round < D::rounds; ++round) {
      const int block = thread_begin(round) / kQuantBlock * kQuantBlock, begin = block + threadIdx.x % kWarp;
      if (block >= span.n) return;
      const float unit1 = *scale1(block), unit2 = *scale2(block);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const int i = begin + kWarp * j;
        first[j] = second[j] = 0.0f;
        if (i >= span.n) continue;
        first[j] = decode_signed(to_float(exp_avg[i]), unit1), second[j] = decode_unsigned(to_float(exp_avg_sq[i]), unit2);
        step_at(i, first[j], second[j]);
      }
      const float largest1 = encode<true>(first), largest2 = encode<false>(second);
      if (threadIdx.x % kWarp == 0) *scale1(block) = largest1, *scale2(block) = largest2;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (begin + kWarp * j < span.n) store_at(begin + kWarp * j, first[j], second[j]);
      }
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < span.n; i += threads) {
      if constexpr (kept) {
        float first = to_float(exp_avg[i]), second = to_float(exp_avg_sq[i]);
        step_at(i, first, second);
        store_at(i, first, second);
      } else {
        step_at(i, first[0], second[0]);
      }
    }
  }
}

// ---- the sum of squares -------------------------------------------------------------------------------------------

constexpr int kSumThreads = 128;

// Of a block's gradients: squares in fp32, their sums in double precision, always in the same order.
template <class Grad> __global__ void __launch_bounds__(kSumThreads) sum_of_squares(const Launch launch) {
  constexpr int W = 16 / sizeof(Grad), kRounds = kBlock / W / kSumThreads;
  const Span span = span_of(launch);
  const Grad* const grad = at<const Grad>(span.row, GRAD, span.start);
  float sum = 0.0f;
  if (span.vector) {
    Pack<Grad, W> grads[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) grads[round].load(grad + (round * kSumThreads + threadIdx.x) * W);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float values[W];
      grads[round].unpack(values);
#pragma unroll
      for (int j = 0; j < W; ++j) sum += values[j] * values[j];
    }
  } else {
    for (int i = threadIdx.x; i < span.n; i += kSumThreads) {
      const float value = to_float(grad[i]);
      sum += value * value;
    }
  }
  double total = sum;
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) total += __shfl_xor_sync(0xffffffffU, total, distance);
  __shared__ double totals[kSumThreads / kWarp];
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSumThreads / kWarp; ++warp) total += totals[warp];
    launch.partials[blockIdx.x] = total;
  }
}

// ---- which kernel -------------------------------------------------------------------------------------------------

using Kernel = void (*)(Launch);
struct Choice {
  Kernel kernel;
  int threads;
};

template <class Grad, class Weight, class Moment, bool master> Choice chosen() {
  constexpr int threads = Deal<Grad, std::conditional_t<master, float, Weight>, Moment>::threads;
  return {masked_adamw<Grad, Weight, Moment, master, threads>, threads};
}

template <class Grad, class Weight> Choice choose_with_master(int moments) {
  if (moments == MOMENTS_FP32) return chosen<Grad, Weight, float, true>();
  if (moments == MOMENTS_INT8) return chosen<Grad, Weight, int8_t, true>();
  if (moments == MOMENTS_NONE) return chosen<Grad, Weight, None, true>();
  return {};
}

template <class Grad> Choice choose_update(int weight_type, bool has_master, int moments) {
  if (!has_master) {
    if (weight_type != BF16) return {};
    if (moments == MOMENTS_FP32) return chosen<Grad, bf16, float, false>();
    if (moments == MOMENTS_BF16) return chosen<Grad, bf16, bf16, false>();
    if (moments == MOMENTS_INT8) return chosen<Grad, bf16, int8_t, false>();
    if (moments == MOMENTS_NONE) return chosen<Grad, bf16, None, false>();
    return {};
  }
  switch (weight_type) {
    case NONE: return choose_with_master<Grad, None>(moments);
    case FP32: return choose_with_master<Grad, float>(moments);
    case BF16: return choose_with_master<Grad, bf16>(moments);
    case FP16: return choose_with_master<Grad, fp16>(moments);
    default: return {};
  }
}

int start(Choice choice, int64_t num_blocks, Launch launch, void* stream) {
  if (num_blocks == 0) return cudaSuccess;
  if (choice.kernel == nullptr || num_blocks < 0 || num_blocks > INT32_MAX) return cudaErrorInvalidValue;
  void* arguments[] = {&launch};
  return cudaLaunchKernel(reinterpret_cast<const void*>(choice.kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(static_cast<unsigned>(choice.threads)), arguments, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace

// ---- the C interface; types and moments are numbered as in the enums above -----------------------------------------

// Whether the current device can run the kernels: 0, or an error.
extern "C" int lisa_ds_cuda_status() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(sum_of_squares<float>));
}

extern "C" const char* lisa_ds_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int lisa_ds_masked_adamw(const int64_t* addresses, const float* hyper, const int32_t* block_segment, int64_t num_blocks,
                                    const float* factor, const float* found_inf, int grad_type, int weight_type, int has_master,
                                    int moments, void* stream) {
  Choice choice{};
  if (grad_type == FP32) choice = choose_update<float>(weight_type, has_master, moments);
  if (grad_type == BF16) choice = choose_update<bf16>(weight_type, has_master, moments);
  if (grad_type == FP16) choice = choose_update<fp16>(weight_type, has_master, moments);
  return start(choice, num_blocks, {addresses, hyper, block_segment, factor, found_inf, nullptr}, stream);
}

extern "C" int lisa_ds_sum_of_squares(const int64_t* addresses, const int32_t* block_segment, int64_t num_blocks, double* partials,
                                      int grad_type, void* stream) {
  Choice choice{nullptr, kSumThreads};
  if (grad_type == FP32) choice.kernel = sum_of_squares<float>;
  if (grad_type == BF16) choice.kernel = sum_of_squares<bf16>;
  if (grad_type == FP16) choice.kernel = sum_of_squares<fp16>;
  return start(choice, num_blocks, {addresses, nullptr, block_segment, nullptr, nullptr, partials}, stream);
}
