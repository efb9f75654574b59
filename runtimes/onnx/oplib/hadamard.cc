// Hadamard: rows times an orthogonal matrix, factor by factor; and the plan that QuantizeActivation shares.
#include <pthread.h>

#include "op.h"

namespace isofold {
namespace {

// Cores as floats, made once per process and kept: ONNX Runtime's threads may still read them when sessions end.
const float* matrices[2][ISOFOLD_HADAMARD_CORES];
pthread_mutex_t matrices_mutex = PTHREAD_MUTEX_INITIALIZER;

const float* matrix_of(int position, bool transpose) {
  pthread_mutex_lock(&matrices_mutex);
  const float*& kept = matrices[transpose][position];
  if (!kept) {
    int64_t order = isofold_hadamard_signs[position].order;
    size_t bytes = size_t(order * isofold_hadamard_padded(order)) * sizeof(float);
    auto* made = static_cast<float*>(aligned_alloc(64, bytes));
    if (made) isofold_hadamard_expand(position, transpose, made);
    kept = made;
  }
  const float* result = kept;
  pthread_mutex_unlock(&matrices_mutex);
  return result;
}

struct HadamardKernel : KernelBase {
  isofold_hadamard plan;
};

OrtStatus* create(void* memory, const Attributes& a) {
  bool transpose = false;
  ISOFOLD_TRY(a.get("transpose", &transpose));
  return hadamard_plan(a, "orders", transpose, &static_cast<HadamardKernel*>(memory)->plan);
}

OrtStatus* compute(void* memory, Context& c) {
  const isofold_hadamard& plan = static_cast<const HadamardKernel*>(memory)->plan;
  Tensor x;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(hadamard_expect(c, 0, x, plan));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, x.shape, &y));
  size_t bytes = hadamard_scratch_bytes(plan);
  bool failed = false;
  ISOFOLD_TRY(c.parallel(x.shape.count() / plan.size, hadamard_nanoseconds(plan), [&](int64_t begin, int64_t end) {
    auto* scratch = bytes ? static_cast<float*>(thread_scratch(bytes)) : nullptr;
    if (bytes && !scratch) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    isofold_hadamard_run(kernels, isa, &plan, x.f32() + begin * plan.size, y + begin * plan.size, end - begin, scratch);
  }));
  return failed ? out_of_memory(c.api, c.op->name, bytes) : nullptr;
}

OrtStatus* infer(Inference& f) { return f.output(0, f.input(0)); }

}  // namespace

OrtStatus* hadamard_plan(const Attributes& a, const char* name, bool transpose, isofold_hadamard* plan) {
  int64_t orders[ISOFOLD_HADAMARD_MAX_CORES + 1];
  int count = 0;
  ISOFOLD_TRY(a.list(name, orders, &count, ISOFOLD_HADAMARD_MAX_CORES + 1, 0));
  plan->size = plan->width = 1;
  plan->cores = 0;
  for (int i = 0; i < count; ++i) {
    int64_t order = orders[i];
    int position = isofold_hadamard_find(order);
    bool power = order > 0 && (order & (order - 1)) == 0;
    if ((position < 0 && !(power && i == count - 1)) || (position >= 0 && i == ISOFOLD_HADAMARD_MAX_CORES))
      return fail(a.api, ORT_INVALID_ARGUMENT,
                  "%s: attribute '%s' has %lld at position %d; expected orders of known Hadamard matrices (12, 20, 28, "
                  "...), a power of two only as the last",
                  a.op->name, name, (long long)order, i);
    if (order > (int64_t(1) << 30) / plan->size)
      return fail(a.api, ORT_INVALID_ARGUMENT, "%s: the product of attribute '%s' is larger than 2^30", a.op->name,
                  name);
    plan->size *= order;
    if (position < 0) {
      plan->width = order;
      continue;
    }
    const float* matrix = matrix_of(position, transpose);
    if (!matrix) return out_of_memory(a.api, a.op->name, size_t(order * order) * sizeof(float));
    plan->order[plan->cores] = order;
    plan->matrix[plan->cores++] = matrix;
  }
  plan->scale = 1.0f / __builtin_sqrtf(float(plan->size));
  return nullptr;
}

OrtStatus* hadamard_expect(const Context& c, size_t index, const Tensor& x, const isofold_hadamard& plan) {
  if (x.shape.rank >= 1 && x.shape[-1] % plan.size == 0) return nullptr;
  return c.bad_input(index, "expected a last dimension that is a multiple of %lld, got %s", (long long)plan.size,
                     describe(x.type, x.shape).text);
}

size_t hadamard_scratch_bytes(const isofold_hadamard& plan) {
  return plan.cores ? size_t(plan.size) * sizeof(float) : 0;
}

double hadamard_nanoseconds(const isofold_hadamard& plan) {
  double each = 0.2;
  for (int64_t i = 0; i < plan.cores; ++i) each += 0.018 * double(plan.order[i]);
  return each * double(plan.size);
}

int64_t hadamard_quantize_floats(const isofold_hadamard& plan, int64_t k) {
  return 2 * k + (plan.cores ? plan.size : 0);
}

void hadamard_quantize(const isofold_hadamard& plan, const float* x, const float* shift, const float* scale,
                       const float* pair, uint8_t* u, float* params, int64_t k, int64_t kp, float levels,
                       float* scratch) {
  float *row = scratch, *turned = scratch + k, *rest = scratch + 2 * k;
  if (shift || scale) {
    kernels->affine_row(x, shift, scale, row, k, (shift ? QUANTIZE_SHIFT : 0) | (scale ? QUANTIZE_SCALE : 0));
    x = row;
  }
  isofold_hadamard_run(kernels, isa, &plan, x, turned, k / plan.size, rest);
  if (pair)
    kernels->quantize_rows_static(turned, nullptr, nullptr, u, pair, 1, k, kp, 0, levels);
  else
    kernels->quantize_rows(turned, nullptr, nullptr, u, params, 1, k, kp, 0, levels);
}

void define_hadamard(Op* op) {
  op->name = "Hadamard";
  op->input_count = 1;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(HadamardKernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

}  // namespace isofold
