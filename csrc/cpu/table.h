// What one launch is given; see lisa_ds/ops/segments.py, which numbers the columns alike.
#pragma once

#include <cstdint>

namespace lisa_ds {

constexpr int64_t kBlock = 2048;       // elements of a partial sum of squares
constexpr int64_t kQuantBlock = 256;   // elements of 8-bit moments that share a scale

enum Address { WEIGHT, GRAD, MASTER, EXP_AVG, EXP_AVG_SQ, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE, STEP, NUMEL, FIRST_BLOCK, ALIGNED, SEED };
constexpr int64_t kAddressColumns = 12;

enum HyperColumn { LR, WEIGHT_DECAY, BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, EPS, LOG_BETA1, LOG_BETA2 };
constexpr int64_t kHyperColumns = 12;

enum Type : int64_t { NONE = -1, FP32 = 0, BF16 = 1, FP16 = 2 };
enum Moments : int64_t { MOMENTS_FP32 = 0, MOMENTS_BF16 = 1, MOMENTS_INT8 = 2, MOMENTS_NONE = 3 };

struct Call {
  const int64_t* addresses;  // [num_segments][kAddressColumns]
  const float* hyper;        // [num_segments][kHyperColumns]
  int64_t num_segments;
  float factor;  // what gradients are multiplied by
  int64_t grad, weight, has_master, moments;
  int threads;
};

// One set of kernels for each instruction set; chosen when they run.
#define LISA_DS_DECLARE(level)               \
  namespace level {                          \
  void masked_adamw(const Call&);            \
  double sum_of_squares(const Call&);        \
  }
LISA_DS_DECLARE(base)
#ifdef LISA_DS_X86
LISA_DS_DECLARE(avx2)
LISA_DS_DECLARE(avx512)
#endif

}  // namespace lisa_ds
