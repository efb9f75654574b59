// Attention: scores, scale, softcap, mask, softmax and values of all heads.
#include "op.h"

namespace isofold {
namespace {

enum { KEY_BLOCK = 128, LANES = 32, FEW_QUERIES = 4, MOST_GROUPS = 4 };  // the first two as in attention.py

struct AttentionKernel : KernelBase {
  int64_t heads, kv_heads, q_start, k_start, v_start;
  float scale, softcap;
  bool causal;
};

OrtStatus* create(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<AttentionKernel*>(memory);
  ISOFOLD_TRY(a.at_least("heads", 1, &kernel.heads));
  ISOFOLD_TRY(a.at_least("kv_heads", 1, &kernel.kv_heads));
  ISOFOLD_TRY(a.at_least("q_start", 0, &kernel.q_start));
  ISOFOLD_TRY(a.at_least("k_start", 0, &kernel.k_start));
  ISOFOLD_TRY(a.at_least("v_start", 0, &kernel.v_start));
  ISOFOLD_TRY(a.get("scale", &kernel.scale));
  ISOFOLD_TRY(a.get("softcap", &kernel.softcap));
  ISOFOLD_TRY(a.get("causal", &kernel.causal));
  if (kernel.heads % kernel.kv_heads != 0)
    return fail(a.api, ORT_INVALID_ARGUMENT,
                "Attention: attribute 'heads' (%lld) is not a multiple of attribute 'kv_heads' (%lld)",
                (long long)kernel.heads, (long long)kernel.kv_heads);
  return nullptr;
}

struct Mask {
  int64_t kind = 0;  // 0 none, 1 float, 2 bool
  int64_t strides[4] = {};
};

OrtStatus* read_mask(const Context& c, const Tensor& mask, const Shape& full, Mask* result) {
  if (!mask.present) return nullptr;
  if (mask.type != ORT_FLOAT && mask.type != ORT_BOOL)
    return c.bad_input(3, "expected float32 or bool, got %s", describe(mask.type, mask.shape).text);
  result->kind = mask.type == ORT_FLOAT ? 1 : 2;
  int64_t step = 1;
  bool fits = mask.shape.rank <= 4;
  for (int i = 3; fits && i >= 0; --i) {
    int own = mask.shape.rank - 4 + i;
    int64_t size = own >= 0 ? mask.shape.dims[own] : 1;
    fits = size == 1 || size == full[i];
    result->strides[i] = size == 1 ? 0 : step;
    step *= size;
  }
  if (fits) return nullptr;
  return c.bad_input(3, "expected a shape that broadcasts to %s, got %s", describe(mask.type, full).text,
                     describe(mask.type, mask.shape).text);
}

OrtStatus* compute(void* memory, Context& c) {
  const auto& a = *static_cast<const AttentionKernel*>(memory);
  Tensor q, k, v, mask_tensor;
  ISOFOLD_TRY(c.input(0, &q));
  ISOFOLD_TRY(c.input(1, &k));
  ISOFOLD_TRY(c.input(2, &v));
  ISOFOLD_TRY(c.input(3, &mask_tensor));
  const Tensor* const all[] = {&q, &k, &v};
  const int64_t last_head[] = {a.q_start + a.heads, a.k_start + a.kv_heads, a.v_start + a.kv_heads};
  for (size_t i = 0; i < 3; ++i) {
    const Shape& s = all[i]->shape;
    if (s.rank != 4)
      return c.bad_input(i, "expected [batch, sequence, heads, width], got %s", describe(ORT_FLOAT, s).text);
    if (s[2] < last_head[i])
      return c.bad_input(i, "expected at least %lld heads in dimension 2, got %s", (long long)last_head[i],
                         describe(ORT_FLOAT, s).text);
  }
  int64_t batch = q.shape[0], queries = q.shape[1], keys = k.shape[1], d = q.shape[3], dv = v.shape[3];
  ISOFOLD_TRY(c.expect(1, k, ORT_FLOAT, shape_of(batch, keys, k.shape[2], d)));
  ISOFOLD_TRY(c.expect(2, v, ORT_FLOAT, shape_of(batch, keys, v.shape[2], dv)));
  Mask mask;
  ISOFOLD_TRY(read_mask(c, mask_tensor, shape_of(batch, a.heads, queries, keys), &mask));
  float* out = nullptr;
  ISOFOLD_TRY(c.output(0, shape_of(batch, queries, a.heads, dv), &out));
  if (batch * queries * dv == 0) return nullptr;

  int64_t q_row = q.shape[2] * d, k_row = k.shape[2] * d, v_row = v.shape[2] * dv, out_row = a.heads * dv;
  int64_t group = a.heads / a.kv_heads;
  // One query of several heads that share their keys is a block whose rows are the heads.
  bool heads_as_rows = queries == 1 && group >= FEW_QUERIES;
  bool single_rows = !heads_as_rows && queries < FEW_QUERIES;
  int64_t rows = heads_as_rows ? group : queries, columns = heads_as_rows ? a.kv_heads : a.heads;
  // Larger blocks read keys and values less often, smaller ones make enough tasks for all threads.
  int64_t groups = 1, wanted = most_pieces();
  while (groups < MOST_GROUPS && groups * LANES < rows && batch * columns * (rows / (2 * groups * LANES)) >= wanted)
    groups *= 2;
  int64_t block = single_rows ? 1 : LANES * groups;
  int64_t blocks = (rows + block - 1) / block, tasks = batch * columns * blocks;
  size_t floats = single_rows ? size_t(keys + 32)
                              : size_t(LANES * (groups * (d + dv + 10) + KEY_BLOCK + 8) + KEY_BLOCK * ceil_to(dv, 16));
  double flops = 2.0 * double((rows < block ? rows : block) * keys * (d + dv));
  bool failed = false;
  ISOFOLD_TRY(c.parallel(tasks, flops / 60 + 100, [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(thread_scratch(floats * sizeof(float)));
    if (!scratch) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / (columns * blocks), column = task / blocks % columns, first = task % blocks * block;
      int64_t count = rows - first < block ? rows - first : block;
      int64_t h = heads_as_rows ? column * group + first : column, g = h / group, s = heads_as_rows ? 0 : first;
      int64_t visible = keys;
      if (a.causal) {
        int64_t last = heads_as_rows ? 1 : s + count;
        visible = visible < last ? visible : last;
      }
      const float* q_at = q.f32() + (b * queries + s) * q_row + (a.q_start + h) * d;
      const float* k_at = k.f32() + b * keys * k_row + (a.k_start + g) * d;
      const float* v_at = v.f32() + b * keys * v_row + (a.v_start + g) * dv;
      float* out_at = out + (b * queries + s) * out_row + h * dv;
      int64_t mask_at = b * mask.strides[0] + h * mask.strides[1] + s * mask.strides[2];
      const float* mask_f = mask.kind == 1 ? mask_tensor.f32() + mask_at : nullptr;
      const uint8_t* mask_b = mask.kind == 2 ? mask_tensor.as<uint8_t>() + mask_at : nullptr;
      if (single_rows) {
        kernels->attention_row(q_at, k_at, v_at, mask_f, mask_b, out_at, scratch, k_row, v_row, visible, d, dv,
                               mask.kind, mask.strides[3], a.scale, a.softcap);
        continue;
      }
      auto run = count <= 16 ? kernels->attention_block16 : kernels->attention_block32;
      run(q_at, k_at, v_at, mask_f, mask_b, out_at, scratch, count, heads_as_rows ? d : q_row, k_row, v_row,
          heads_as_rows ? dv : out_row, visible, d, dv, s, a.causal && !heads_as_rows, mask.kind,
          mask.strides[heads_as_rows ? 1 : 2], mask.strides[3], a.scale, a.softcap);
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, floats * sizeof(float)) : nullptr;
}

OrtStatus* infer(Inference& f) {
  SymbolicShape q = f.input(0), v = f.input(2);
  int64_t heads = f.integer("heads", 0);
  if (!q.known || !v.known || q.rank != 4 || v.rank != 4 || heads <= 0) return nullptr;
  q.set(2, heads);
  q.dims[3] = v.dims[3];
  q.names[3] = v.names[3];
  return f.output(0, q);
}

}  // namespace

void define_attention(Op* op) {
  op->name = "Attention";
  op->input_count = 4;
  op->inputs[0] = {"q", ORT_FLOAT};
  op->inputs[1] = {"k", ORT_FLOAT};
  op->inputs[2] = {"v", ORT_FLOAT};
  op->inputs[3] = {"mask", ORT_UNDEFINED, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(AttentionKernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

}  // namespace isofold
