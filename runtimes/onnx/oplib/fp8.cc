// QuantizeActivationFp8: rows of activations to E4M3 codes and their scales (compiler/dialect/quantization_fp8.py).
#include "op.h"

namespace isofold {
namespace {

struct Fp8Kernel : KernelBase {
  int64_t align;
  isofold_hadamard hadamard;
};

OrtStatus* create(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<Fp8Kernel*>(memory);
  ISOFOLD_TRY(a.at_least("align", 1, &kernel.align));
  return hadamard_plan(a, "hadamard", false, &kernel.hadamard);
}

// What quantizes rows: `pair` is the static scale, or null, and then `params` gets one for each row.
struct Quantizer {
  const float *shift, *scale, *pair;
  int64_t k, kp;

  void operator()(const float* x, bool vectors, uint8_t* u, float* params, int64_t rows) const {
    const float *b = vectors ? shift : nullptr, *a = vectors ? scale : nullptr;
    int64_t flags = (b ? QUANTIZE_SHIFT : 0) | (a ? QUANTIZE_SCALE : 0);
    if (pair)
      kernels->fp8_quantize_rows_static(x, b, a, u, pair, rows, k, kp, flags);
    else
      kernels->fp8_quantize_rows(x, b, a, u, params, rows, k, kp, flags);
  }
};

OrtStatus* compute(void* memory, Context& c) {
  const auto& kernel = *static_cast<const Fp8Kernel*>(memory);
  const isofold_hadamard& hadamard = kernel.hadamard;
  Tensor x, pair, shift, scale;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &pair));
  ISOFOLD_TRY(c.input(2, &shift));
  ISOFOLD_TRY(c.input(3, &scale));
  if (x.shape.rank < 1) return c.bad_input(0, "expected at least one dimension, got a scalar");
  ISOFOLD_TRY(c.expect(1, pair, ORT_FLOAT, shape_of(1)));
  ISOFOLD_TRY(c.expect(2, shift, ORT_FLOAT, shape_of(x.shape[-1])));
  ISOFOLD_TRY(c.expect(3, scale, ORT_FLOAT, shape_of(x.shape[-1])));
  ISOFOLD_TRY(hadamard_expect(c, 0, x, hadamard));
  int64_t k = x.shape[-1], kp = ceil_to(k, kernel.align), rows = x.shape.rows();
  uint8_t* u = nullptr;
  float* params = nullptr;
  ISOFOLD_TRY(c.output(0, with_last(x.shape, kp), &u));
  ISOFOLD_TRY(c.output(1, pair.present ? shape_of(1) : with_last(x.shape, 1), &params));
  if (pair.present) *params = *pair.f32();
  Quantizer quantize{shift.f32(), scale.f32(), pair.f32(), k, kp};
  const float* from = x.f32();
  if (hadamard.size <= 1)
    return c.parallel(rows, 0.1 * double(k), [&](int64_t begin, int64_t end) {
      quantize(from + begin * k, true, u + begin * kp, params + begin, end - begin);
    });
  size_t bytes = size_t(hadamard_quantize_floats(hadamard, k)) * sizeof(float);
  double nanoseconds = 0.15 * double(k) + hadamard_nanoseconds(hadamard) * double(k / hadamard.size);
  bool failed = false;
  ISOFOLD_TRY(c.parallel(rows, nanoseconds, [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(thread_scratch(bytes));
    if (!scratch) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    float *row = scratch, *turned = scratch + k, *rest = scratch + 2 * k;
    int64_t flags = (quantize.shift ? QUANTIZE_SHIFT : 0) | (quantize.scale ? QUANTIZE_SCALE : 0);
    for (int64_t r = begin; r < end; ++r) {
      const float* source = from + r * k;
      if (flags) {
        kernels->affine_row(source, quantize.shift, quantize.scale, row, k, flags);
        source = row;
      }
      isofold_hadamard_run(kernels, isa, &hadamard, source, turned, k / hadamard.size, rest);
      quantize(turned, false, u + r * kp, params + r, 1);
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, bytes) : nullptr;
}

OrtStatus* infer(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t align = f.integer("align", 0);
  if (!shape.known) return nullptr;
  int last = shape.rank - 1;
  SymbolicShape scales = shape;
  if (align > 0 && shape.dims[last] >= 0) {
    shape.set(last, ceil_to(shape.dims[last], align));
    ISOFOLD_TRY(f.output(0, shape));
  }
  if (f.input(1).known) scales.rank = 1;
  scales.set(scales.rank - 1, 1);
  return f.output(1, scales);
}

}  // namespace

void define_quantize_activation_fp8(Op* op) {
  op->name = "QuantizeActivationFp8";
  op->input_count = 4;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"params", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[2] = {"shift", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[3] = {"scale", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 2;
  op->outputs[0] = {"u", ORT_UINT8};
  op->outputs[1] = {"params", ORT_FLOAT};
  op->kernel_size = sizeof(Fp8Kernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

}  // namespace isofold
