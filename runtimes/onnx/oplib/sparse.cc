// SparseLinear and SparseLinearFloat: linears on a bitmask and packed non-zeros.
#include "op.h"

namespace isofold {
namespace {

alignas(64) int32_t table[ISOFOLD_SPARSE_TABLE];

struct SparseKernel : KernelBase {
  isofold_linear linear;
  int64_t k;
};

OrtStatus* create_sparse(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<SparseKernel*>(memory);
  isofold_linear& l = kernel.linear;
  bool gated = false;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &kernel.k));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  l.bits = 8;
  l.group_size = 0;
  l.scale_multiplier = 1;
  l.gated = gated;
  l.kp = ceil_to(kernel.k, 64);
  return nullptr;
}

// Checks mask, values and offsets, which are inputs `first` and the two behind it.
OrtStatus* read_sparse(const Context& c, size_t first, const isofold_linear& l, int64_t k, isofold_sparse* s) {
  Tensor mask, values, offsets;
  ISOFOLD_TRY(c.input(first, &mask));
  ISOFOLD_TRY(c.input(first + 1, &values));
  ISOFOLD_TRY(c.input(first + 2, &offsets));
  int64_t rows = 16 * isofold_linear_panels(&l);
  s->words = (k + 63) / 64;
  s->k = k;
  ISOFOLD_TRY(c.expect(first, mask, ORT_UINT8, shape_of(rows, s->words * 8)));
  ISOFOLD_TRY(c.expect(first + 2, offsets, ORT_INT32, shape_of(rows + 1)));
  if (values.type != (s->quantized ? ORT_INT8 : ORT_FLOAT) || values.shape.rank != 1)
    return c.bad_input(first + 1, "expected %s [V], got %s", s->quantized ? "int8" : "float32",
                       describe(values.type, values.shape).text);
  s->mask = mask.as<int64_t>();
  s->values = values.data;
  s->offsets = offsets.as<int32_t>();
  int64_t needed = int64_t(s->offsets[rows]) + 16;
  if (s->offsets[0] != 0 || needed < 16 || values.shape[0] < needed)
    return c.bad_input(first + 1, "expected at least %lld values (16 more than the last offset), got %lld",
                       (long long)needed, (long long)values.shape[0]);
  s->expands = expands;
  s->table = table;
  return nullptr;
}

OrtStatus* run_sparse(Context& c, const isofold_linear& l, const isofold_sparse& s, isofold_sparse_call* call) {
  if (call->m == 0) return nullptr;
  size_t bytes = size_t(isofold_sparse_scratch_bytes(&s, call->m));
  RunScratch scratch(bytes);
  if (!scratch.data) return out_of_memory(c.api, c.op->name, bytes);
  call->scratch = scratch.data;
  ISOFOLD_TRY(c.parallel(s.words, 0.03 * 64 * double(call->m) * (s.quantized ? 1 : 4), [&](int64_t begin, int64_t end) {
    isofold_sparse_prepare(kernels, &s, call, begin, end);
  }));
  int64_t tasks = isofold_sparse_tasks(&l);
  // A word takes about a nanosecond (float32: three) for one row of activations, a non-zero about a third of a
  // nanosecond for 16 of them (8 bits: a tenth).
  double words = double(32 * s.words), filled = double(s.offsets[16 * isofold_linear_panels(&l)]) / double(tasks);
  double few = words * (s.quantized ? 1.0 : 3.0), many = filled * double(call->m) / 16 * (s.quantized ? 0.1 : 0.35);
  return c.parallel(tasks, few > many ? few : many, [&](int64_t begin, int64_t end) {
    isofold_sparse_run(kernels, isa, &l, &s, call, begin, end);
  });
}

// Bias and residual, which are inputs `first` and the one behind it, and the output.
OrtStatus* read_rest(const Context& c, size_t first, const Tensor& x, isofold_linear* l, isofold_sparse_call* call) {
  Tensor bias, residual;
  ISOFOLD_TRY(c.input(first, &bias));
  ISOFOLD_TRY(c.input(first + 1, &residual));
  Shape shape = with_last(x.shape, l->n);
  ISOFOLD_TRY(c.expect(first, bias, ORT_FLOAT, shape_of(l->gated ? 16 * isofold_linear_panels(l) : l->n)));
  ISOFOLD_TRY(c.expect(first + 1, residual, ORT_FLOAT, shape));
  ISOFOLD_TRY(c.output(0, shape, &call->y));
  l->bias = bias.f32();
  call->residual = residual.f32();
  call->x = x.data;
  call->ldx = x.shape[-1];
  call->m = shape.rows();
  return nullptr;
}

OrtStatus* compute_sparse(void* memory, Context& c) {
  const auto& kernel = *static_cast<const SparseKernel*>(memory);
  isofold_linear l = kernel.linear;
  isofold_sparse s = {};
  isofold_sparse_call call = {};
  s.quantized = 1;
  ISOFOLD_TRY(read_sparse(c, 2, l, kernel.k, &s));
  Tensor u, params, scale, wsum;
  ISOFOLD_TRY(c.input(0, &u));
  ISOFOLD_TRY(c.input(1, &params));
  ISOFOLD_TRY(c.input(5, &scale));
  ISOFOLD_TRY(c.input(6, &wsum));
  int64_t panels = isofold_linear_panels(&l);
  if (u.type != ORT_UINT8 || u.shape.rank < 1 || u.shape[-1] < kernel.k)
    return c.bad_input(0, "expected uint8 [..., at least %lld], got %s", (long long)kernel.k,
                       describe(u.type, u.shape).text);
  call.static_params = params.shape == shape_of(2);
  if (!call.static_params) ISOFOLD_TRY(c.expect(1, params, ORT_FLOAT, with_last(u.shape, 2)));
  ISOFOLD_TRY(c.expect(5, scale, ORT_FLOAT, shape_of(panels, 1, 16)));
  ISOFOLD_TRY(c.expect(6, wsum, ORT_FLOAT, shape_of(16 * panels)));
  ISOFOLD_TRY(read_rest(c, 7, u, &l, &call));
  l.scale = scale.data;
  l.wsum = wsum.f32();
  call.params = params.f32();
  return run_sparse(c, l, s, &call);
}

OrtStatus* compute_sparse_float(void* memory, Context& c) {
  const auto& kernel = *static_cast<const SparseKernel*>(memory);
  isofold_linear l = kernel.linear;
  isofold_sparse s = {};
  isofold_sparse_call call = {};
  ISOFOLD_TRY(read_sparse(c, 1, l, kernel.k, &s));
  Tensor x;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.expect_last(0, x, kernel.k));
  ISOFOLD_TRY(read_rest(c, 4, x, &l, &call));
  return run_sparse(c, l, s, &call);
}

void define(Op* op, const char* name) {
  isofold_sparse_tables(table);
  op->name = name;
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(SparseKernel);
  op->create = create_sparse;
  op->infer = infer_linear;
}

}  // namespace

void define_sparse_linear(Op* op) {
  define(op, "SparseLinear");
  op->input_count = 9;
  op->inputs[0] = {"u", ORT_UINT8};
  op->inputs[1] = {"params", ORT_FLOAT};
  op->inputs[2] = {"mask", ORT_UINT8};
  op->inputs[3] = {"values", ORT_INT8};
  op->inputs[4] = {"offsets", ORT_INT32};
  op->inputs[5] = {"scale", ORT_FLOAT};
  op->inputs[6] = {"wsum", ORT_FLOAT};
  op->inputs[7] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[8] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->compute = compute_sparse;
}

void define_sparse_linear_float(Op* op) {
  define(op, "SparseLinearFloat");
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"mask", ORT_UINT8};
  op->inputs[2] = {"values", ORT_FLOAT};
  op->inputs[3] = {"offsets", ORT_INT32};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->compute = compute_sparse_float;
}

}  // namespace isofold
