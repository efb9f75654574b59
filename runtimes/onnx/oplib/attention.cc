// Attention: scores, scale, softcap, mask, softmax and values of all heads; CachedAttention: the same on packed codes.
#include "op.h"

namespace isofold {
namespace {

enum { LANES = 32, FEW_QUERIES = 4, MOST_GROUPS = 4, CACHE_TOKENS = 128 };  // as in attention.py; TOKENS of attention_cache.py

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

OrtStatus* read_mask(const Context& c, const Tensor& mask, const Shape& full, Mask* result, size_t input = 3) {
  if (!mask.present) return nullptr;
  if (mask.type != ORT_FLOAT && mask.type != ORT_BOOL)
    return c.bad_input(input, "expected float32 or bool, got %s", describe(mask.type, mask.shape).text);
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
  return c.bad_input(input, "expected a shape that broadcasts to %s, got %s", describe(mask.type, full).text,
                     describe(mask.type, mask.shape).text);
}

struct Sizes {
  int64_t batch, queries, keys, d, dv;
};

// What a kernel is called with for one task: queries of one head, or one query of heads that share their keys.
struct Task {
  int64_t batch, kv_head;  // whose keys and values
  const float* q;
  float* out;
  int64_t count, q_row, out_row, keys, first, causal;
  const float* mask_f;
  const uint8_t* mask_b;
  int64_t mask_kind, mask_s, mask_t;
  bool single;  // one query of one head
};

// Cuts attention into tasks and calls attend(task, scratch) for each; floats(groups) says how much scratch memory
// `groups` times 32 queries take, and with 0 a single one.
template <class Floats, class Attend>
OrtStatus* run(Context& c, const AttentionKernel& a, const Sizes& n, const float* q, int64_t q_row,
               const Tensor& mask_tensor, const Mask& mask, float* out, const Floats& floats, const Attend& attend) {
  int64_t batch = n.batch, queries = n.queries, keys = n.keys, d = n.d, dv = n.dv, out_row = a.heads * dv;
  if (batch * queries * dv == 0) return nullptr;
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
  size_t bytes = size_t(floats(single_rows ? 0 : groups)) * sizeof(float);
  double flops = 2.0 * double((rows < block ? rows : block) * keys * (d + dv));
  bool failed = false;
  ISOFOLD_TRY(c.parallel(tasks, flops / 60 + 100, [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(thread_scratch(bytes));
    if (!scratch) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / (columns * blocks), column = task / blocks % columns, first = task % blocks * block;
      int64_t count = rows - first < block ? rows - first : block;
      int64_t h = heads_as_rows ? column * group + first : column, s = heads_as_rows ? 0 : first;
      int64_t visible = keys;
      if (a.causal) {
        int64_t last = heads_as_rows ? 1 : s + count;
        visible = visible < last ? visible : last;
      }
      int64_t mask_at = b * mask.strides[0] + h * mask.strides[1] + s * mask.strides[2];
      Task t = {};
      t.batch = b;
      t.kv_head = h / group;
      t.q = q + (b * queries + s) * q_row + (a.q_start + h) * d;
      t.out = out + (b * queries + s) * out_row + h * dv;
      t.count = count;
      t.q_row = heads_as_rows ? d : q_row;
      t.out_row = heads_as_rows ? dv : out_row;
      t.keys = visible;
      t.first = s;
      t.causal = a.causal && !heads_as_rows;
      t.mask_f = mask.kind == 1 ? mask_tensor.f32() + mask_at : nullptr;
      t.mask_b = mask.kind == 2 ? mask_tensor.as<uint8_t>() + mask_at : nullptr;
      t.mask_kind = mask.kind;
      t.mask_s = mask.strides[heads_as_rows ? 1 : 2];
      t.mask_t = mask.strides[3];
      t.single = single_rows;
      attend(t, scratch);
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, bytes) : nullptr;
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
  int64_t k_row = k.shape[2] * d, v_row = v.shape[2] * dv;
  const float *keys_at = k.f32() + a.k_start * d, *values_at = v.f32() + a.v_start * dv;
  int64_t together = kernels->attention_keys_attention;
  auto floats = [&](int64_t groups) {
    return groups ? LANES * (groups * (d + dv + 10) + together + 8) + together * ceil_to(dv, 16) : keys + 32;
  };
  auto attend = [&](const Task& t, float* scratch) {
    const float *k_at = keys_at + t.batch * keys * k_row + t.kv_head * d, *v_at = values_at + t.batch * keys * v_row + t.kv_head * dv;
    if (t.single) {
      kernels->attention_row(t.q, k_at, v_at, t.mask_f, t.mask_b, t.out, scratch, k_row, v_row, t.keys, d, dv, t.mask_kind,
                             t.mask_t, a.scale, a.softcap);
      return;
    }
    auto run_block = t.count <= 16 ? kernels->attention_block16 : kernels->attention_block32;
    run_block(t.q, k_at, v_at, t.mask_f, t.mask_b, t.out, scratch, t.count, t.q_row, k_row, v_row, t.out_row, t.keys, d, dv,
              t.first, t.causal, t.mask_kind, t.mask_s, t.mask_t, a.scale, a.softcap);
  };
  return run(c, a, {batch, queries, keys, d, dv}, q.f32(), q.shape[2] * d, mask_tensor, mask, out, floats, attend);
}

// ---- CachedAttention

struct CachedKernel : AttentionKernel {
  int64_t depth, value_depth, bits, group;
};

OrtStatus* create_cached(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<CachedKernel*>(memory);
  ISOFOLD_TRY(a.at_least("heads", 1, &kernel.heads));
  ISOFOLD_TRY(a.at_least("kv_heads", 1, &kernel.kv_heads));
  ISOFOLD_TRY(a.at_least("depth", 1, &kernel.depth));
  ISOFOLD_TRY(a.at_least("value_depth", 1, &kernel.value_depth));
  ISOFOLD_TRY(a.at_least("bits", 1, &kernel.bits));
  ISOFOLD_TRY(a.at_least("group", 0, &kernel.group));
  ISOFOLD_TRY(a.at_least("q_start", 0, &kernel.q_start));
  ISOFOLD_TRY(a.get("scale", &kernel.scale));
  ISOFOLD_TRY(a.get("softcap", &kernel.softcap));
  ISOFOLD_TRY(a.get("causal", &kernel.causal));
  kernel.k_start = kernel.v_start = 0;
  if (kernel.bits != 4 && kernel.bits != 8)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'bits' is %lld; expected 4 or 8", a.op->name,
                (long long)kernel.bits);
  if (kernel.group && (kernel.group % 32 || kernel.depth % kernel.group || kernel.value_depth % kernel.group))
    return fail(a.api, ORT_INVALID_ARGUMENT,
                "%s: attribute 'group' (%lld) is not a multiple of 32 that divides the sizes of heads (%lld, %lld)",
                a.op->name, (long long)kernel.group, (long long)kernel.depth, (long long)kernel.value_depth);
  if (kernel.heads % kernel.kv_heads != 0)
    return fail(a.api, ORT_INVALID_ARGUMENT,
                "%s: attribute 'heads' (%lld) is not a multiple of attribute 'kv_heads' (%lld)", a.op->name,
                (long long)kernel.heads, (long long)kernel.kv_heads);
  return nullptr;
}

// Few queries read the codes: a task is a query and up to four heads that share their keys.
OrtStatus* run_on_codes(Context& c, const CachedKernel& a, const Sizes& n, const Tensor* t, const Mask& mask, float* out) {
  int64_t group = a.heads / a.kv_heads, some = group >= 4 ? 4 : group >= 2 ? 2 : 1, parts = (group + some - 1) / some;
  int64_t dp = ceil_to(n.d, 32), dvp = ceil_to(n.dv, 32), k_row = dp * a.bits / 8, v_row = dvp * a.bits / 8;
  int64_t q_row = t[0].shape[2] * n.d, tasks = n.batch * n.queries * a.kv_heads * parts;
  int64_t k_group = a.group ? a.group : dp, v_group = a.group ? a.group : dvp, k_pairs = dp / k_group, v_pairs = dvp / v_group;
  size_t floats = size_t(some * (ceil_to(n.keys, 16) + dp + dvp + 256 + 128 + 16 * v_pairs + k_pairs));
  double nanoseconds = double(n.keys) * double(n.d + n.dv) * (1 + double(some)) / 60 + 100;
  bool failed = false;
  ISOFOLD_TRY(c.parallel(tasks, nanoseconds, [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(thread_scratch(floats * sizeof(float)));
    if (!scratch) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      int64_t g = task / parts % a.kv_heads, row = task / parts / a.kv_heads, b = row / n.queries, s = row % n.queries;
      int64_t first = task % parts * some, left = group - first < some ? group - first : some;
      int64_t keys = a.causal && s + 1 < n.keys ? s + 1 : n.keys, stream = b * a.kv_heads + g;
      for (int64_t i = first; i < first + left;) {
        int64_t rows = first + left - i >= 4 ? 4 : first + left - i >= 2 ? 2 : 1, h = g * group + i;
        const float* q = t[0].f32() + row * q_row + (a.q_start + h) * n.d;
        int64_t mask_at = b * mask.strides[0] + h * mask.strides[1] + s * mask.strides[2];
        const float* mask_f = mask.kind == 1 ? t[5].f32() + mask_at : nullptr;
        const uint8_t* mask_b = mask.kind == 2 ? t[5].as<uint8_t>() + mask_at : nullptr;
        auto run = a.bits == 8 ? (rows == 4 ? kernels->attention_cache8_4 : rows == 2 ? kernels->attention_cache8_2
                                                                                  : kernels->attention_cache8_1)
                               : (rows == 4 ? kernels->attention_cache4_4 : rows == 2 ? kernels->attention_cache4_2
                                                                                  : kernels->attention_cache4_1);
        run(q, t[1].as<uint8_t>() + stream * n.keys * k_row, t[2].f32() + stream * n.keys * 2 * k_pairs,
            t[3].as<uint8_t>() + stream * n.keys * v_row, t[4].f32() + stream * n.keys * 2 * v_pairs, mask_f, mask_b,
            out + (row * a.heads + h) * n.dv, scratch, n.d, n.dv, keys, n.d, n.dv, k_group, v_group, mask.kind, mask.strides[1],
            mask.strides[3], a.scale, a.softcap);
        i += rows;
      }
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, floats * sizeof(float)) : nullptr;
}

OrtStatus* compute_cached(void* memory, Context& c) {
  const auto& a = *static_cast<const CachedKernel*>(memory);
  Tensor t[6];
  for (size_t i = 0; i < 6; ++i) ISOFOLD_TRY(c.input(i, &t[i]));
  const Shape& q = t[0].shape;
  if (q.rank != 4 || q[3] != a.depth || q[2] < a.q_start + a.heads)
    return c.bad_input(0, "expected [batch, sequence, at least %lld heads, %lld], got %s",
                       (long long)(a.q_start + a.heads), (long long)a.depth, describe(ORT_FLOAT, q).text);
  if (t[1].shape.rank != 4)
    return c.bad_input(1, "expected [batch, heads, tokens, bytes], got %s", describe(t[1].type, t[1].shape).text);
  Sizes n = {q[0], q[1], t[1].shape[2], a.depth, a.value_depth};
  int64_t dp = ceil_to(n.d, 32), dvp = ceil_to(n.dv, 32);
  int64_t k_pairs = a.group ? n.d / a.group : 1, v_pairs = a.group ? n.dv / a.group : 1;
  ISOFOLD_TRY(c.expect(1, t[1], ORT_UINT8, shape_of(n.batch, a.kv_heads, n.keys, dp * a.bits / 8)));
  ISOFOLD_TRY(c.expect(2, t[2], ORT_FLOAT, shape_of(n.batch, a.kv_heads, n.keys, 2 * k_pairs)));
  ISOFOLD_TRY(c.expect(3, t[3], ORT_UINT8, shape_of(n.batch, a.kv_heads, n.keys, dvp * a.bits / 8)));
  ISOFOLD_TRY(c.expect(4, t[4], ORT_FLOAT, shape_of(n.batch, a.kv_heads, n.keys, 2 * v_pairs)));
  Mask mask;
  ISOFOLD_TRY(read_mask(c, t[5], shape_of(n.batch, a.heads, n.queries, n.keys), &mask, 5));
  float* out = nullptr;
  ISOFOLD_TRY(c.output(0, shape_of(n.batch, n.queries, a.heads, n.dv), &out));
  if (n.batch * n.queries == 0) return nullptr;
  if (n.queries < FEW_QUERIES) return run_on_codes(c, a, n, t, mask, out);
  int64_t k_bytes = n.keys * dp * a.bits / 8, v_bytes = n.keys * dvp * a.bits / 8;
  auto floats = [&](int64_t groups) { return LANES * (groups * (n.d + n.dv + 10) + CACHE_TOKENS + 8) + CACHE_TOKENS * (dp + dvp); };
  auto attend = [&](const Task& task, float* scratch) {
    int64_t stream = task.batch * a.kv_heads + task.kv_head;
    bool few = task.count <= 16;
    auto run_block = a.bits == 8 ? (few ? kernels->attention_block16_cache8 : kernels->attention_block32_cache8)
                                 : (few ? kernels->attention_block16_cache4 : kernels->attention_block32_cache4);
    run_block(task.q, t[1].as<uint8_t>() + stream * k_bytes, t[2].f32() + stream * n.keys * 2 * k_pairs,
              t[3].as<uint8_t>() + stream * v_bytes, t[4].f32() + stream * n.keys * 2 * v_pairs, task.mask_f, task.mask_b,
              task.out, scratch, dp / k_pairs, dvp / v_pairs, task.count, task.q_row, task.out_row, task.keys, n.d, n.dv,
              task.first, task.causal, task.mask_kind, task.mask_s, task.mask_t, a.scale, a.softcap);
  };
  return run(c, a, n, t[0].f32(), q[2] * n.d, t[5], mask, out, floats, attend);
}

OrtStatus* infer_cached(Inference& f) {
  SymbolicShape q = f.input(0);
  int64_t heads = f.integer("heads", 0), width = f.integer("value_depth", 0);
  if (!q.known || q.rank != 4 || heads <= 0 || width <= 0) return nullptr;
  q.set(2, heads);
  q.set(3, width);
  return f.output(0, q);
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

void define_cached_attention(Op* op) {
  op->name = "CachedAttention";
  op->input_count = 6;
  op->inputs[0] = {"q", ORT_FLOAT};
  op->inputs[1] = {"k", ORT_UINT8};
  op->inputs[2] = {"k_params", ORT_FLOAT};
  op->inputs[3] = {"v", ORT_UINT8};
  op->inputs[4] = {"v_params", ORT_FLOAT};
  op->inputs[5] = {"mask", ORT_UNDEFINED, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(CachedKernel);
  op->create = create_cached;
  op->compute = compute_cached;
  op->infer = infer_cached;
}

}  // namespace isofold
