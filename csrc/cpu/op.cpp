// torch.ops.lisa_ds: registration through torch's stable ABI, and the choice of an instruction set when it runs.
#include <cstdlib>
#include <cstring>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "table.h"

namespace {

using lisa_ds::Call;

struct Level {
  const char* name;
  void (*masked_adamw)(const Call&);
  double (*sum_of_squares)(const Call&);
};

// The widest instruction set that this processor has, or a narrower one that LISA_DS_CPU_LEVEL names.
Level choose_level() {
  const Level base = {"base", lisa_ds::base::masked_adamw, lisa_ds::base::sum_of_squares};
#ifdef LISA_DS_X86
  const char* asked = std::getenv("LISA_DS_CPU_LEVEL");
  const Level avx2 = {"avx2", lisa_ds::avx2::masked_adamw, lisa_ds::avx2::sum_of_squares};
  const Level avx512 = {"avx512", lisa_ds::avx512::masked_adamw, lisa_ds::avx512::sum_of_squares};
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (asked && std::strcmp(asked, "base") == 0) return base;
  if (has_avx512 && !(asked && std::strcmp(asked, "avx2") == 0)) return avx512;
  if (has_avx2) return avx2;
#endif
  return base;
}

const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

// The ATen handles on the stack are owned by the callee.
void* take_pointer(StableIValue value) {
  AtenTensorHandle handle = torch::stable::detail::to<AtenTensorHandle>(value);
  void* pointer = nullptr;
  aoti_torch_get_data_ptr(handle, &pointer);
  aoti_torch_delete_tensor_object(handle);
  return pointer;
}

int64_t take_int(StableIValue value) { return torch::stable::detail::to<int64_t>(value); }

// (Tensor addresses, Tensor hyper, int num_segments, float factor, int grad, int weight, int has_master, int moments, int threads)
void masked_adamw(StableIValue* stack, uint64_t, uint64_t) {
  Call call{};
  call.addresses = static_cast<const int64_t*>(take_pointer(stack[0]));
  call.hyper = static_cast<const float*>(take_pointer(stack[1]));
  call.num_segments = take_int(stack[2]);
  call.factor = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  call.grad = take_int(stack[4]);
  call.weight = take_int(stack[5]);
  call.has_master = take_int(stack[6]);
  call.moments = take_int(stack[7]);
  call.threads = static_cast<int>(take_int(stack[8]));
  level().masked_adamw(call);
}

// (Tensor addresses, int num_segments, int grad, int threads) -> float
void sum_of_squares(StableIValue* stack, uint64_t, uint64_t) {
  Call call{};
  call.addresses = static_cast<const int64_t*>(take_pointer(stack[0]));
  call.num_segments = take_int(stack[1]);
  call.grad = take_int(stack[2]);
  call.threads = static_cast<int>(take_int(stack[3]));
  stack[0] = torch::stable::detail::from(level().sum_of_squares(call));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* lisa_ds_cpu_level() { return level().name; }

STABLE_TORCH_LIBRARY_FRAGMENT(lisa_ds, library) {
  library.def(
      "masked_adamw(Tensor addresses, Tensor hyper, int num_segments, float factor, int grad, int weight, int has_master, "
      "int moments, int threads) -> ()");
  library.def("sum_of_squares(Tensor addresses, int num_segments, int grad, int threads) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(lisa_ds, CPU, library) {
  library.impl("masked_adamw", &masked_adamw);
  library.impl("sum_of_squares", &sum_of_squares);
}
