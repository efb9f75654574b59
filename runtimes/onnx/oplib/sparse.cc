// SparseLinear and SparseLinearFloat: linears on weights with zeros, in all layouts of sparse_packing.py.
#include "op.h"

namespace isofold {
namespace {

alignas(64) int32_t table[ISOFOLD_SPARSE_TABLE];

struct SparseKernel : KernelBase {
  isofold_linear linear;
  isofold_sparse sparse;
  mutable int checked;  // constant offsets and columns were looked through once
};

OrtStatus* create_sparse(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<SparseKernel*>(memory);
  isofold_linear& l = kernel.linear;
  isofold_sparse& s = kernel.sparse;
  static const char* const layouts[] = {"bitmask", "panels", "windows", "1:4", "2:4", "4:8", "1x4", "16x1", "16x4", nullptr};
  bool gated = false;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &s.k));
  ISOFOLD_TRY(a.choice("layout", layouts, &s.layout));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  l.group_size = 0;
  l.scale_multiplier = 1;
  l.gated = gated;
  s.rows = 16 * isofold_linear_panels(&l);
  s.expands = expands;
  s.table = table;
  return nullptr;
}

OrtStatus* create_sparse_float(void* memory, const Attributes& a) {
  ISOFOLD_TRY(create_sparse(memory, a));
  int32_t layout = static_cast<SparseKernel*>(memory)->sparse.layout;
  if (layout != ISOFOLD_BITMASK && layout != ISOFOLD_16X1)
    return fail(a.api, ORT_INVALID_ARGUMENT, "ai.isofold::SparseLinearFloat: attribute layout: expected bitmask or 16x1");
  return nullptr;
}

OrtStatus* create_sparse_codes(void* memory, const Attributes& a) {
  ISOFOLD_TRY(create_sparse(memory, a));
  auto& kernel = *static_cast<SparseKernel*>(memory);
  int64_t bits, group;
  ISOFOLD_TRY(a.at_least("bits", 4, &bits));
  ISOFOLD_TRY(a.at_least("group_size", 0, &group));
  ISOFOLD_TRY(a.get("scale_multiplier", &kernel.linear.scale_multiplier));
  int32_t layout = kernel.sparse.layout;
  bool known = bits == 8 ? group == 0 && layout != ISOFOLD_16X1 && layout != ISOFOLD_PANELS
                         : bits == 4 && (layout == ISOFOLD_BITMASK || layout == ISOFOLD_PANELS) &&
                               (group == 0 || group == 32 || group == 64 || group == 128);
  if (!known)
    return fail(a.api, ORT_INVALID_ARGUMENT,
                "ai.isofold::SparseLinear: expected 8 bits and group_size 0, or 4 bits as a bitmask or panels in groups of "
                "0, 32, 64 or 128, got %lld bits and group_size %lld",
                (long long)bits, (long long)group);
  kernel.sparse.value = bits == 4 ? ISOFOLD_INT4 : ISOFOLD_INT8;
  kernel.linear.group_size = group;
  return nullptr;
}

// Offsets of `lists` lists do not fall, and the columns of blocks are some; looked through once where they are constant.
OrtStatus* check_places(const Context& c, size_t first, const isofold_sparse& s, int64_t lists) {
  const auto& kernel = *static_cast<const SparseKernel*>(c.kernel);
  if (__atomic_load_n(&kernel.checked, __ATOMIC_RELAXED)) return nullptr;
  bool rises = s.offsets[0] == 0;
  for (int64_t i = 0; i < lists; ++i) rises = rises && s.offsets[i] <= s.offsets[i + 1];
  if (!rises) return c.bad_input(first + 2, "expected offsets that begin with 0 and do not fall");
  const auto* columns = static_cast<const uint16_t*>(s.places);
  for (int64_t b = 0; s.layout >= ISOFOLD_16X1 && b < s.offsets[lists]; ++b)
    if (columns[b] >= s.cells)
      return c.bad_input(first, "expected columns below %lld, got %d", (long long)s.cells, int(columns[b]));
  int constant = kernel.constants[first].present && kernel.constants[first + 2].present;
  __atomic_store_n(&kernel.checked, constant, __ATOMIC_RELAXED);
  return nullptr;
}

// Checks places, values and offsets, which are inputs `first` and the two behind it.
OrtStatus* read_sparse(const Context& c, size_t first, isofold_sparse* s) {
  enum { MARGIN = 64, AHEAD = 8 };  // as compiler/dialect/sparse_packing.py and sparse_blocks.py pad
  Tensor places, values, offsets;
  ISOFOLD_TRY(c.input(first, &places));
  ISOFOLD_TRY(c.input(first + 1, &values));
  ISOFOLD_TRY(c.input(first + 2, &offsets));
  static const OrtElementType types[] = {ORT_FLOAT, ORT_UINT16, ORT_INT8, ORT_UINT8};
  if (s->value < ISOFOLD_INT8) s->value = values.type == ORT_UINT16 ? ISOFOLD_BFLOAT16 : ISOFOLD_FLOAT32;
  isofold_sparse_shape(s);
  s->places = places.data;
  s->values = values.data;
  s->offsets = offsets.as<int32_t>();
  bool by_panels = s->layout == ISOFOLD_WINDOWS || s->layout >= ISOFOLD_16X1, pairs = s->layout == ISOFOLD_PANELS;
  int64_t lists = pairs ? (s->rows + 31) / 32 : by_panels ? s->rows / 16 : s->rows;
  if (isofold_sparse_is_group(s)) {
    int64_t blocks = s->words * 64 / isofold_sparse_block_inputs(s), width = s->layout == ISOFOLD_4_OF_8 ? 3 : 2;
    ISOFOLD_TRY(c.expect(first, places, ORT_UINT8, shape_of(s->rows, blocks, 8 * width)));
    return c.expect(first + 1, values, ORT_INT8, shape_of(s->rows, blocks, 64));
  }
  ISOFOLD_TRY(c.expect(first + 2, offsets, ORT_INT32, shape_of(lists + 1)));
  int64_t last = s->offsets[lists], unit = s->layout == ISOFOLD_1X4 ? 4 : 1;
  if (s->layout >= ISOFOLD_16X1) {
    int64_t columns = last + AHEAD, width = s->quantized ? 4 : 1;
    if (places.type != ORT_UINT16 || places.shape.rank != 1 || places.shape[0] < columns)
      return c.bad_input(first, "expected uint16 [at least %lld], got %s", (long long)columns,
                         describe(places.type, places.shape).text);
    ISOFOLD_TRY(c.expect(first + 1, values, types[s->value], shape_of(places.shape[0], 16, width)));
    return check_places(c, first, *s, lists);
  }
  if (values.type != types[s->value] || values.shape.rank != 1)
    return c.bad_input(first + 1, "expected %s, got %s",
                       s->value == ISOFOLD_INT8   ? "int8 [V]"
                       : s->value == ISOFOLD_INT4 ? "uint8 [V]"
                                                  : "float32 or uint16 [V]",
                       describe(values.type, values.shape).text);
  int64_t needed = last * unit + MARGIN;
  if (values.shape[0] < needed)
    return c.bad_input(first + 1, "expected at least %lld values (%d more than the last offset), got %lld",
                       (long long)needed, MARGIN, (long long)values.shape[0]);
  if (s->layout == ISOFOLD_WINDOWS) {
    if (places.type != ORT_UINT8 || places.shape.rank != 1 || places.shape[0] < s->heads + needed)
      return c.bad_input(first, "expected uint8 [at least %lld], got %s", (long long)(s->heads + needed),
                         describe(places.type, places.shape).text);
  } else {
    ISOFOLD_TRY(c.expect(first, places, ORT_UINT8, shape_of(lists, s->words * (pairs ? 16 : 8))));
  }
  return check_places(c, first, *s, lists);
}

// What a task takes, in nanoseconds (compiler's sparse_speed.py has better numbers; this only cuts work into pieces).
double task_time(const isofold_linear& l, const isofold_sparse& s, int64_t m, int64_t tasks) {
  double words = double(32 * s.words), rows = double(m);
  if (s.layout == ISOFOLD_PANELS) return double(2 * s.words) * (0.5 + rows * 0.15);
  if (s.value == ISOFOLD_INT4) return words * (1.0 + rows * (m <= ISOFOLD_SPARSE_GEMV4_ROWS ? 0.5 : 0.1));
  double lists = s.layout == ISOFOLD_WINDOWS || s.layout >= ISOFOLD_16X1 ? 1 : 16;
  double filled = isofold_sparse_is_group(&s) ? 16 * words : double(s.offsets[int64_t(lists) * isofold_linear_panels(&l)]);
  filled = (s.layout >= ISOFOLD_16X1 ? 16 * filled : filled) / (isofold_sparse_is_group(&s) ? 1 : double(tasks));
  double few = words * (s.quantized ? 0.7 : 3.0), many = filled * rows / 16 * (s.quantized ? 0.1 : 0.35);
  return few > many ? few : many;
}

OrtStatus* run_sparse(Context& c, const isofold_linear& l, const isofold_sparse& s, isofold_sparse_call* call) {
  if (call->m == 0) return nullptr;
  size_t bytes = size_t(isofold_sparse_scratch_bytes(&s, call->m));
  RunScratch scratch(bytes);
  if (!scratch.data) return out_of_memory(c.api, c.op->name, bytes);
  call->scratch = scratch.data;
  double word = 0.03 * 64 * double(call->m) * double(s.size);
  ISOFOLD_TRY(c.parallel(s.padded / 64, word, [&](int64_t begin, int64_t end) {
    isofold_sparse_prepare(kernels, &s, call, begin, end);
  }));
  int64_t tasks = isofold_sparse_tasks(&l);
  return c.parallel(tasks, task_time(l, s, call->m, tasks), [&](int64_t begin, int64_t end) {
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
  isofold_sparse s = kernel.sparse;
  isofold_sparse_call call = {};
  ISOFOLD_TRY(read_sparse(c, 2, &s));
  Tensor u, params, scale, wsum;
  ISOFOLD_TRY(c.input(0, &u));
  ISOFOLD_TRY(c.input(1, &params));
  ISOFOLD_TRY(c.input(5, &scale));
  ISOFOLD_TRY(c.input(6, &wsum));
  int64_t panels = isofold_linear_panels(&l), group = l.group_size;
  int64_t inputs = s.size == 4 ? 4 * s.cells : s.k;  // cells of four are read whole
  if (u.type != ORT_UINT8 || u.shape.rank < 1 || u.shape[-1] < inputs || u.shape[-1] % s.size)
    return c.bad_input(0, "expected uint8 [..., at least %lld%s], got %s", (long long)inputs,
                       s.size == 4 ? " and a multiple of 4" : "", describe(u.type, u.shape).text);
  call.static_params = params.shape == shape_of(2);
  if (!call.static_params) ISOFOLD_TRY(c.expect(1, params, ORT_FLOAT, with_last(u.shape, 2)));
  Shape scales = shape_of(panels, group ? (s.k + group - 1) / group : 1, 16);
  ISOFOLD_TRY(c.expect(5, scale, group ? ORT_FLOAT16 : ORT_FLOAT, scales));
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
  isofold_sparse s = kernel.sparse;
  isofold_sparse_call call = {};
  ISOFOLD_TRY(read_sparse(c, 1, &s));
  Tensor x;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.expect_last(0, x, s.k));
  ISOFOLD_TRY(read_rest(c, 4, x, &l, &call));
  return run_sparse(c, l, s, &call);
}

void define(Op* op, const char* name, OrtStatus* (*create)(void*, const Attributes&)) {
  isofold_sparse_tables(table);
  op->name = name;
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(SparseKernel);
  op->create = create;
  op->infer = infer_linear;
}

}  // namespace

void define_sparse_linear(Op* op) {
  define(op, "SparseLinear", create_sparse_codes);
  op->input_count = 9;
  op->inputs[0] = {"u", ORT_UINT8};
  op->inputs[1] = {"params", ORT_FLOAT};
  op->inputs[2] = {"places", ORT_UNDEFINED};
  op->inputs[3] = {"values", ORT_UNDEFINED};
  op->inputs[4] = {"offsets", ORT_INT32};
  op->inputs[5] = {"scale", ORT_UNDEFINED};
  op->inputs[6] = {"wsum", ORT_FLOAT};
  op->inputs[7] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[8] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->compute = compute_sparse;
}

void define_sparse_linear_float(Op* op) {
  define(op, "SparseLinearFloat", create_sparse_float);
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"places", ORT_UNDEFINED};
  op->inputs[2] = {"values", ORT_UNDEFINED};
  op->inputs[3] = {"offsets", ORT_INT32};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->compute = compute_sparse_float;
}

}  // namespace isofold
