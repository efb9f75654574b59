// Norm and NormQuantize: residual add, layer or RMS norm, quantization, in one pass over rows.
#include "op.h"

namespace isofold {
namespace {

// The bits of `flags` in norm.py.
enum { RESIDUAL = 1, WEIGHT = 2, BIAS = 4, SUM = 8, RESULT = 16, QUANTIZE = 32, STATIC = 64, RMS = 128,
       SHIFT = 256, SCALE = 512 };

struct NormKernel : KernelBase {
  float eps;
  int32_t rms;
  int64_t align;  // 0: no quantization
  float levels;
  isofold_hadamard hadamard;
};

OrtStatus* create(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<NormKernel*>(memory);
  static const char* const kinds[] = {"layer", "rms", nullptr};
  ISOFOLD_TRY(a.get("eps", &kernel.eps));
  return a.choice("kind", kinds, &kernel.rms);
}

OrtStatus* create_quantize(void* memory, const Attributes& a) {
  ISOFOLD_TRY(create(memory, a));
  auto& kernel = *static_cast<NormKernel*>(memory);
  ISOFOLD_TRY(a.at_least("align", 1, &kernel.align));
  ISOFOLD_TRY(a.levels("bits", &kernel.levels));
  return hadamard_plan(a, "hadamard", false, &kernel.hadamard);
}

OrtStatus* compute(void* memory, Context& c) {
  const auto& kernel = *static_cast<const NormKernel*>(memory);
  bool quantize = kernel.align != 0;
  Tensor x, residual, weight, bias, pair, shift, scale;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &residual));
  ISOFOLD_TRY(c.input(2, &weight));
  ISOFOLD_TRY(c.input(3, &bias));
  if (quantize) {
    ISOFOLD_TRY(c.input(4, &pair));
    ISOFOLD_TRY(c.input(5, &shift));
    ISOFOLD_TRY(c.input(6, &scale));
  }
  if (x.shape.rank < 1) return c.bad_input(0, "expected at least one dimension, got a scalar");
  int64_t k = x.shape[-1], rows = x.shape.rows();
  ISOFOLD_TRY(c.expect(1, residual, ORT_FLOAT, x.shape));
  ISOFOLD_TRY(c.expect(2, weight, ORT_FLOAT, shape_of(k)));
  ISOFOLD_TRY(c.expect(3, bias, ORT_FLOAT, shape_of(k)));
  ISOFOLD_TRY(c.expect(4, pair, ORT_FLOAT, shape_of(2)));
  ISOFOLD_TRY(c.expect(5, shift, ORT_FLOAT, shape_of(k)));
  ISOFOLD_TRY(c.expect(6, scale, ORT_FLOAT, shape_of(k)));

  float *sum = nullptr, *y = nullptr, *params = nullptr;
  uint8_t* u = nullptr;
  int64_t kp = quantize ? ceil_to(k, kernel.align) : k;
  ISOFOLD_TRY(c.output(0, x.shape, &sum));
  ISOFOLD_TRY(c.output(1, x.shape, &y));
  if (quantize) {
    ISOFOLD_TRY(c.output(2, with_last(x.shape, kp), &u));
    ISOFOLD_TRY(c.output(3, pair.present ? shape_of(2) : with_last(x.shape, 2), &params));
    if (!u || !params) return c.bad("outputs 2 (u) and 3 (params) are required");
    if (pair.present) memcpy(params, pair.data, 2 * sizeof(float));
  }
  if (quantize) ISOFOLD_TRY(hadamard_expect(c, 0, x, kernel.hadamard));
  if (rows == 0 || k == 0) return nullptr;
  bool transforms = quantize && kernel.hadamard.size > 1;
  int64_t flags = (residual.present ? RESIDUAL : 0) | (weight.present ? WEIGHT : 0) | (bias.present ? BIAS : 0) |
                  (sum ? SUM : 0) | (y ? RESULT : 0) | (quantize && !transforms ? QUANTIZE : 0) |
                  (pair.present ? STATIC : 0) | (kernel.rms ? RMS : 0) | (shift.present ? SHIFT : 0) |
                  (scale.present ? SCALE : 0);
  bool failed = false;
  int64_t floats = k + (transforms ? hadamard_quantize_floats(kernel.hadamard, k) : 0);
  double nanoseconds = 0.15 * double(k);
  if (transforms) nanoseconds += hadamard_nanoseconds(kernel.hadamard) * double(k / kernel.hadamard.size);
  ISOFOLD_TRY(c.parallel(rows, nanoseconds, [&](int64_t begin, int64_t end) {
    auto* row = static_cast<float*>(thread_scratch(size_t(floats) * sizeof(float)));
    if (!row) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    auto normalize = [&](int64_t first, int64_t last) {
      kernels->norm_rows(x.f32(), residual.f32(), weight.f32(), bias.f32(), pair.f32(), shift.f32(), scale.f32(), sum,
                         y, u, params, row, k, kp, first, last, flags, kernel.eps, kernel.levels);
    };
    if (!transforms) return normalize(begin, end);
    for (int64_t r = begin; r < end; ++r) {
      normalize(r, r + 1);  // leaves the row shifted and scaled in `row`
      hadamard_quantize(kernel.hadamard, row, nullptr, nullptr, pair.f32(), u + r * kp, params + 2 * r, k, kp,
                        kernel.levels, row + k);
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, size_t(floats) * sizeof(float)) : nullptr;
}

OrtStatus* infer(Inference& f) {
  SymbolicShape shape = f.input(0);
  if (!shape.known) return nullptr;
  ISOFOLD_TRY(f.output(0, shape));
  return f.output(1, shape);
}

OrtStatus* infer_quantize(Inference& f) {
  SymbolicShape shape = f.input(0);
  if (!shape.known) return nullptr;
  ISOFOLD_TRY(f.output(0, shape));
  ISOFOLD_TRY(f.output(1, shape));
  int last = shape.rank - 1;
  int64_t align = f.integer("align", 0);
  SymbolicShape codes = shape, pairs = shape;
  if (align > 0 && shape.dims[last] >= 0) {
    codes.set(last, ceil_to(shape.dims[last], align));
    ISOFOLD_TRY(f.output(2, codes));
  }
  if (f.input(4).known) {
    pairs.rank = 1;
    pairs.set(0, 2);
  } else {
    pairs.set(last, 2);
  }
  return f.output(3, pairs);
}

}  // namespace

void define_norm(Op* op) {
  op->name = "Norm";
  op->input_count = 4;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[2] = {"weight", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[3] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 2;
  op->outputs[0] = {"sum", ORT_FLOAT, ORT_OPTIONAL};
  op->outputs[1] = {"y", ORT_FLOAT, ORT_OPTIONAL};
  op->kernel_size = sizeof(NormKernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

void define_norm_quantize(Op* op) {
  define_norm(op);
  op->name = "NormQuantize";
  op->input_count = 7;
  op->inputs[4] = {"params", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"shift", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[6] = {"scale", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 4;
  op->outputs[2] = {"u", ORT_UINT8};
  op->outputs[3] = {"params", ORT_FLOAT};
  op->create = create_quantize;
  op->infer = infer_quantize;
}

}  // namespace isofold
