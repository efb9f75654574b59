// QuantizeActivation, PackedLinear, both in one (QuantizePackedLinear), PackedLinearFloat, and two of them with outliers.
#include "op.h"

namespace isofold {
namespace {

// ---- what quantizes rows of activations

// Constant for the life of a session.
struct Quantizer {
  float levels;
  isofold_hadamard hadamard;
};

OrtStatus* create_quantizer(const Attributes& a, const char* bits, Quantizer* quantizer) {
  ISOFOLD_TRY(a.levels(bits, &quantizer->levels));
  return hadamard_plan(a, "hadamard", false, &quantizer->hadamard);
}

// Inputs 0 to 3 of an operator that quantizes: the rows, and how.
struct Rows {
  Tensor x, pair, shift, scale;
};

// k: the last dimension that x must have; 0: any.
OrtStatus* read_rows(const Context& c, const Quantizer& quantizer, int64_t k, Rows* rows) {
  ISOFOLD_TRY(c.input(0, &rows->x));
  ISOFOLD_TRY(c.input(1, &rows->pair));
  ISOFOLD_TRY(c.input(2, &rows->shift));
  ISOFOLD_TRY(c.input(3, &rows->scale));
  const Shape& shape = rows->x.shape;
  if (k) ISOFOLD_TRY(c.expect_last(0, rows->x, k));
  if (shape.rank < 1) return c.bad_input(0, "expected at least one dimension, got a scalar");
  ISOFOLD_TRY(c.expect(1, rows->pair, ORT_FLOAT, shape_of(2)));
  ISOFOLD_TRY(c.expect(2, rows->shift, ORT_FLOAT, shape_of(shape[-1])));
  ISOFOLD_TRY(c.expect(3, rows->scale, ORT_FLOAT, shape_of(shape[-1])));
  return hadamard_expect(c, 0, rows->x, quantizer.hadamard);
}

// u [rows, kp]; params [rows, 2], not written where there is a static pair.
OrtStatus* quantize_rows(const Context& c, const Quantizer& quantizer, const Rows& rows, int64_t kp, uint8_t* u,
                         float* params) {
  const isofold_hadamard& hadamard = quantizer.hadamard;
  const float *x = rows.x.f32(), *pair = rows.pair.f32(), *shift = rows.shift.f32(), *scale = rows.scale.f32();
  int64_t k = rows.x.shape[-1], m = rows.x.shape.rows();
  if (hadamard.size > 1) {
    size_t bytes = size_t(hadamard_quantize_floats(hadamard, k)) * sizeof(float);
    double nanoseconds = 0.1 * double(k) + hadamard_nanoseconds(hadamard) * double(k / hadamard.size);
    bool failed = false;
    ISOFOLD_TRY(c.parallel(m, nanoseconds, [&](int64_t begin, int64_t end) {
      auto* scratch = static_cast<float*>(thread_scratch(bytes));
      if (!scratch) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t r = begin; r < end; ++r)
        hadamard_quantize(hadamard, x + r * k, shift, scale, pair, u + r * kp, params + 2 * r, k, kp,
                          quantizer.levels, scratch);
    }));
    return failed ? out_of_memory(c.api, c.op->name, bytes) : nullptr;
  }
  int64_t flags = (shift ? QUANTIZE_SHIFT : 0) | (scale ? QUANTIZE_SCALE : 0);
  return c.parallel(m, 0.06 * double(k), [&](int64_t begin, int64_t end) {
    const float* from = x + begin * k;
    uint8_t* to = u + begin * kp;
    if (pair)
      kernels->quantize_rows_static(from, shift, scale, to, pair, end - begin, k, kp, flags, quantizer.levels);
    else
      kernels->quantize_rows(from, shift, scale, to, params + 2 * begin, end - begin, k, kp, flags, quantizer.levels);
  });
}

// ---- QuantizeActivation

struct QuantizeKernel : KernelBase {
  int64_t align;
  Quantizer quantizer;
};

OrtStatus* create_quantize(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<QuantizeKernel*>(memory);
  ISOFOLD_TRY(a.at_least("align", 1, &kernel.align));
  return create_quantizer(a, "bits", &kernel.quantizer);
}

OrtStatus* compute_quantize(void* memory, Context& c) {
  const auto& kernel = *static_cast<const QuantizeKernel*>(memory);
  Rows rows;
  ISOFOLD_TRY(read_rows(c, kernel.quantizer, 0, &rows));
  const Shape& shape = rows.x.shape;
  int64_t kp = ceil_to(shape[-1], kernel.align);
  uint8_t* u = nullptr;
  float* params = nullptr;
  ISOFOLD_TRY(c.output(0, with_last(shape, kp), &u));
  ISOFOLD_TRY(c.output(1, rows.pair.present ? shape_of(2) : with_last(shape, 2), &params));
  if (rows.pair.present) memcpy(params, rows.pair.data, 2 * sizeof(float));
  return quantize_rows(c, kernel.quantizer, rows, kp, u, params);
}

OrtStatus* infer_quantize(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t align = f.integer("align", 0);
  if (!shape.known) return nullptr;
  int last = shape.rank - 1;
  SymbolicShape pairs = shape;
  if (align > 0 && shape.dims[last] >= 0) {
    shape.set(last, ceil_to(shape.dims[last], align));
    ISOFOLD_TRY(f.output(0, shape));
  }
  if (f.input(1).known) {
    pairs.rank = 1;
    pairs.set(0, 2);
  } else {
    pairs.set(last, 2);
  }
  return f.output(1, pairs);
}

// ---- QuantizeCache: the same codes with a pair for each row, packed

struct CacheKernel : KernelBase {
  int64_t bits, group;
  Quantizer quantizer;
};

OrtStatus* create_cache(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<CacheKernel*>(memory);
  ISOFOLD_TRY(a.at_least("bits", 1, &kernel.bits));
  ISOFOLD_TRY(a.at_least("group", 0, &kernel.group));
  ISOFOLD_TRY(create_quantizer(a, "bits", &kernel.quantizer));
  if (kernel.group && (kernel.group % 32 || kernel.quantizer.hadamard.size > 1))
    return fail(a.api, ORT_INVALID_ARGUMENT,
                "%s: attribute 'group' is %lld; expected a multiple of 32, and no Hadamard transform", a.op->name,
                (long long)kernel.group);
  return nullptr;
}

OrtStatus* compute_cache(void* memory, Context& c) {
  const auto& kernel = *static_cast<const CacheKernel*>(memory);
  Rows rows;
  ISOFOLD_TRY(c.input(0, &rows.x));
  ISOFOLD_TRY(c.input(1, &rows.shift));
  const Shape& shape = rows.x.shape;
  if (shape.rank < 1) return c.bad_input(0, "expected at least one dimension, got a scalar");
  ISOFOLD_TRY(c.expect(1, rows.shift, ORT_FLOAT, shape_of(shape[-1])));
  ISOFOLD_TRY(hadamard_expect(c, 0, rows.x, kernel.quantizer.hadamard));
  int64_t pairs = 1;
  if (kernel.group) {
    if (shape[-1] % kernel.group || rows.shift.present)
      return c.bad_input(0, "expected groups of %lld and no shift, got %s", (long long)kernel.group,
                         describe(ORT_FLOAT, shape).text);
    pairs = shape[-1] / kernel.group;
  }
  uint8_t* codes = nullptr;
  float* params = nullptr;
  ISOFOLD_TRY(c.output(0, with_last(shape, ceil_to(shape[-1], 32) * kernel.bits / 8), &codes));
  ISOFOLD_TRY(c.output(1, with_last(shape, 2 * pairs), &params));
  if (kernel.group) rows.x.shape = shape_of(shape.rows() * pairs, kernel.group);  // a group is a row of its own
  int64_t dp = ceil_to(rows.x.shape[-1], 32), bytes = dp * kernel.bits / 8, m = rows.x.shape.rows();
  if (kernel.bits == 8) return quantize_rows(c, kernel.quantizer, rows, dp, codes, params);
  RunScratch scratch(size_t(m * dp));
  if (m && !scratch.data) return out_of_memory(c.api, c.op->name, size_t(m * dp));
  auto* u = static_cast<uint8_t*>(scratch.data);
  ISOFOLD_TRY(quantize_rows(c, kernel.quantizer, rows, dp, u, params));
  return c.parallel(m, double(dp) / 40, [&](int64_t begin, int64_t end) {
    kernels->cache_pack(u + begin * dp, codes + begin * bytes, (end - begin) * (dp / 32));
  });
}

OrtStatus* infer_cache(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t bits = f.integer("bits", 0);
  if (!shape.known || bits <= 0) return nullptr;
  int last = shape.rank - 1;
  SymbolicShape pairs = shape;
  if (shape.dims[last] >= 0) {
    shape.set(last, ceil_to(shape.dims[last], 32) * bits / 8);
    ISOFOLD_TRY(f.output(0, shape));
  }
  int64_t group = f.integer("group", 0), size = f.input(0).dims[last];
  if (group > 0 && size < 0) return nullptr;
  pairs.set(last, group > 0 ? 2 * (size / group) : 2);
  return f.output(1, pairs);
}

// ---- what multiplies by packed weights

struct LinearKernel : KernelBase {
  isofold_linear linear;    // without its tensors
  int64_t k;
  isofold_linear resolved;  // with them, where they are initializers
  mutable int32_t state;    // of `resolved`: EMPTY, being written, or READY
};

enum { EMPTY, WRITING, READY };

OrtStatus* create_linear(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<LinearKernel*>(memory);
  isofold_linear& l = kernel.linear;
  bool gated = false;
  ISOFOLD_TRY(create_integers(a, &l, &kernel.k));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  l.gated = gated;
  return nullptr;
}

struct LinearInputs {
  size_t weight, scale, zero, wsum, bias;
};

// Check the weights and point `l` at them. wsum 0: there is none (float activations).
OrtStatus* check_weights(const Context& c, const LinearInputs& at, isofold_linear* l) {
  Tensor weight, scale, zero, wsum, bias;
  ISOFOLD_TRY(c.input(at.weight, &weight));
  ISOFOLD_TRY(c.input(at.scale, &scale));
  ISOFOLD_TRY(c.input(at.zero, &zero));
  ISOFOLD_TRY(c.input(at.bias, &bias));
  int64_t panels = isofold_linear_panels(l), groups = isofold_linear_groups(l);
  Shape packed = l->bits == 3 ? shape_of(panels, l->kp / 32, 3, 16, 4) : shape_of(panels, l->kp * l->bits / 32, 16, 4);
  ISOFOLD_TRY(c.expect(at.weight, weight, l->bits == 8 ? ORT_INT8 : ORT_UINT8, packed));
  ISOFOLD_TRY(c.expect(at.scale, scale, l->group_size ? ORT_FLOAT16 : ORT_FLOAT, shape_of(panels, groups, 16)));
  ISOFOLD_TRY(c.expect(at.zero, zero, ORT_INT8, shape_of(panels, groups, 16)));
  ISOFOLD_TRY(c.expect(at.bias, bias, ORT_FLOAT, shape_of(l->gated ? 16 * panels : l->n)));
  if (at.wsum) {
    ISOFOLD_TRY(c.input(at.wsum, &wsum));
    ISOFOLD_TRY(c.expect(at.wsum, wsum, ORT_FLOAT, shape_of(16 * panels)));
  }
  l->weight = weight.data;
  l->scale = scale.data;
  l->zero = zero.as<int8_t>();
  l->wsum = wsum.f32();
  l->bias = bias.f32();
  return nullptr;
}

// The kernel's linear with its weights. Initializers are looked at once: between two calls their descriptions leave the
// caches, and fetching those took half a microsecond of a call that takes 40.
OrtStatus* read_weights(const Context& c, const LinearKernel& kernel, const LinearInputs& at, isofold_linear* l) {
  if (__atomic_load_n(&kernel.state, __ATOMIC_ACQUIRE) == READY) {
    *l = kernel.resolved;
    return nullptr;
  }
  *l = kernel.linear;
  ISOFOLD_TRY(check_weights(c, at, l));
  if (!c.is_fixed(at.weight) || !c.is_fixed(at.scale) || !c.is_fixed(at.zero) || !c.is_fixed(at.bias) ||
      (at.wsum && !c.is_fixed(at.wsum)))
    return nullptr;
  int32_t expected = EMPTY;
  if (__atomic_compare_exchange_n(&kernel.state, &expected, WRITING, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    const_cast<LinearKernel&>(kernel).resolved = *l;
    __atomic_store_n(&kernel.state, READY, __ATOMIC_RELEASE);
  }
  return nullptr;
}

// The linear of codes and pairs, whose inputs are checked; `call` lacks scratch memory.
OrtStatus* run_linear(const Context& c, const isofold_linear& l, isofold_linear_call* call) {
  if (call->m == 0) return nullptr;
  size_t bytes = size_t(isofold_linear_scratch_bytes(&l, call->m));
  RunScratch scratch(bytes);
  if (bytes && !scratch.data) return out_of_memory(c.api, c.op->name, bytes);
  call->scratch = scratch.data;
  if (l.zero)
    ISOFOLD_TRY(c.parallel(call->m, 0.04 * double(l.kp), [&](int64_t begin, int64_t end) {
      isofold_linear_prepare(kernels, isa, &l, call, begin, end);
    }));
  if (int64_t blocks = l.outliers ? isofold_outlier_blocks(call->m) : 0) {
    void* behind = static_cast<char*>(scratch.data) + isofold_linear_outlier_scratch(&l, call->m);
    double each = 0.1 * double(l.kp) * ISOFOLD_OUTLIER_BLOCK;
    ISOFOLD_TRY(c.parallel(blocks, each, [&](int64_t begin, int64_t end) {
      isofold_outlier_prepare(kernels, call->u, l.kp, call->m, behind, begin, end);
    }));
  }
  int64_t tasks = isofold_linear_tasks(&l, call->m);
  double rows = double(isofold_linear_row_block(&l, call->m));
  rows = rows < double(call->m) ? rows : double(call->m);
  // A task reads 32 rows of weights (about 20 bytes a nanosecond) and does 64 operations a row and input (about 600).
  double read = 32.0 * double(l.kp) * l.bits / 8 / 20, work = rows * double(l.kp) * 64 / 600;
  return c.parallel(tasks, read > work ? read : work, [&](int64_t begin, int64_t end) {
    isofold_linear_run(kernels, isa, &l, call, begin, end);
  });
}

// ---- PackedLinear

OrtStatus* compute_packed(const LinearKernel& kernel, const isofold_outliers* outliers, Context& c) {
  isofold_linear l;
  ISOFOLD_TRY(read_weights(c, kernel, {2, 3, 4, 5, 6}, &l));
  l.outliers = outliers;
  Tensor u, params, residual;
  ISOFOLD_TRY(c.input(0, &u));
  ISOFOLD_TRY(c.input(1, &params));
  ISOFOLD_TRY(c.input(7, &residual));
  ISOFOLD_TRY(c.expect_last(0, u, l.kp));
  bool per_tensor = params.shape == shape_of(2);
  if (!per_tensor) ISOFOLD_TRY(c.expect(1, params, ORT_FLOAT, with_last(u.shape, 2)));
  Shape shape = with_last(u.shape, l.n);
  ISOFOLD_TRY(c.expect(7, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  // One row of u [1, kp] has params [1, 2], which is also a pair: the same numbers either way.
  isofold_linear_call call = {u.as<uint8_t>(), params.f32(), residual.f32(), y, shape.rows(), per_tensor, nullptr};
  return run_linear(c, l, &call);
}

OrtStatus* compute_linear(void* memory, Context& c) {
  return compute_packed(*static_cast<const LinearKernel*>(memory), nullptr, c);
}

// ---- QuantizePackedLinear

struct QuantizeLinearKernel : LinearKernel {
  Quantizer quantizer;
};

OrtStatus* create_quantize_linear(void* memory, const Attributes& a) {
  ISOFOLD_TRY(create_linear(memory, a));
  return create_quantizer(a, "input_bits", &static_cast<QuantizeLinearKernel*>(memory)->quantizer);
}

OrtStatus* compute_quantize_linear(void* memory, Context& c) {
  const auto& kernel = *static_cast<const QuantizeLinearKernel*>(memory);
  isofold_linear l;
  ISOFOLD_TRY(read_weights(c, kernel, {4, 5, 6, 7, 8}, &l));
  Rows rows;
  Tensor residual;
  ISOFOLD_TRY(read_rows(c, kernel.quantizer, kernel.k, &rows));
  ISOFOLD_TRY(c.input(9, &residual));
  Shape shape = with_last(rows.x.shape, l.n);
  ISOFOLD_TRY(c.expect(9, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  int64_t m = shape.rows();
  bool per_tensor = rows.pair.present;
  // kp is a multiple of 32, so that the pairs behind the codes are aligned.
  size_t codes = size_t(m * l.kp), bytes = codes + (per_tensor ? 0 : size_t(m) * 2 * sizeof(float));
  RunScratch scratch(bytes);
  if (bytes && !scratch.data) return out_of_memory(c.api, c.op->name, bytes);
  auto* u = static_cast<uint8_t*>(scratch.data);
  float* params = per_tensor ? nullptr : reinterpret_cast<float*>(u + codes);
  if (m == 1) isofold_linear_begin(&l);
  ISOFOLD_TRY(quantize_rows(c, kernel.quantizer, rows, l.kp, u, params));
  isofold_linear_call call = {u, per_tensor ? rows.pair.f32() : params, residual.f32(), y, m, per_tensor, nullptr};
  return run_linear(c, l, &call);
}

// ---- PackedLinearFloat

OrtStatus* compute_packed_float(const LinearKernel& kernel, const isofold_outliers* outliers, Context& c) {
  isofold_linear l;
  ISOFOLD_TRY(read_weights(c, kernel, {1, 2, 3, 0, 4}, &l));
  l.outliers = outliers;
  Tensor x, residual;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(5, &residual));
  ISOFOLD_TRY(c.expect_last(0, x, kernel.k));
  Shape shape = with_last(x.shape, l.n);
  ISOFOLD_TRY(c.expect(5, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  isofold_linear_float_call call = {x.f32(), residual.f32(), y, shape.rows(), kernel.k};
  if (call.m == 0) return nullptr;
  return parallel_float_linear(c, l, call.m, 4, [&](int64_t begin, int64_t end) {
    isofold_linear_float_run(kernels, &l, &call, begin, end);
  });
}

OrtStatus* compute_linear_float(void* memory, Context& c) {
  return compute_packed_float(*static_cast<const LinearKernel*>(memory), nullptr, c);
}

// ---- OutlierLinear and OutlierLinearFloat: the same two with outliers

struct OutlierKernel : LinearKernel {
  float multiplier;
  const void* checked;  // the places that a call has found to be in range
};

OrtStatus* create_outliers(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<OutlierKernel*>(memory);
  ISOFOLD_TRY(create_linear(memory, a));
  kernel.checked = nullptr;
  if (kernel.k > 65536)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'k' is %lld; places of outliers name at most 65536 inputs",
                a.op->name, (long long)kernel.k);
  return a.get("outlier_multiplier", &kernel.multiplier);
}

// Input `first` and the two behind it. Places address activations, so they are checked, once.
OrtStatus* read_outliers(const Context& c, size_t first, OutlierKernel* kernel, isofold_outliers* o) {
  Tensor places, values, offsets;
  ISOFOLD_TRY(c.input(first, &places));
  ISOFOLD_TRY(c.input(first + 1, &values));
  ISOFOLD_TRY(c.input(first + 2, &offsets));
  int64_t panels = isofold_linear_panels(&kernel->linear);
  ISOFOLD_TRY(c.expect(first + 2, offsets, ORT_INT32, shape_of(panels + 1)));
  const int32_t* ends = offsets.as<int32_t>();
  if (places.shape.rank != 2)
    return c.bad_input(first, "expected uint16 [J, 16], got %s", describe(places.type, places.shape).text);
  int64_t steps = places.shape[0];
  ISOFOLD_TRY(c.expect(first, places, ORT_UINT16, shape_of(steps, 16)));
  ISOFOLD_TRY(c.expect(first + 1, values, ORT_FLOAT16, shape_of(steps, 16)));
  *o = {places.as<uint16_t>(), values.as<uint16_t>(), ends, kernel->multiplier};
  if (__atomic_load_n(&kernel->checked, __ATOMIC_RELAXED) == places.data) return nullptr;
  if (ends[0] != 0 || ends[panels] != steps)
    return c.bad_input(first + 2, "expected offsets from 0 to %lld, got %d to %d", (long long)steps, ends[0],
                       ends[panels]);
  for (int64_t p = 0; p < panels; ++p)
    if (ends[p + 1] < ends[p])
      return c.bad_input(first + 2, "expected ascending offsets, got %d behind %d", ends[p + 1], ends[p]);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t i = ends[p] * 16; i < ends[p + 1] * 16; ++i) {
      bool descends = i >= (ends[p] + 1) * 16 && o->places[i] < o->places[i - 16];
      if (o->places[i] >= kernel->k || descends)
        return c.bad_input(first, "expected ascending places below %lld along each row, got %d in row %lld",
                           (long long)kernel->k, o->places[i], (long long)(p * 16 + i % 16));
    }
  }
  __atomic_store_n(&kernel->checked, places.data, __ATOMIC_RELAXED);
  return nullptr;
}

OrtStatus* compute_outliers(void* memory, Context& c) {
  auto& kernel = *static_cast<OutlierKernel*>(memory);
  isofold_outliers outliers;
  ISOFOLD_TRY(read_outliers(c, 8, &kernel, &outliers));
  return compute_packed(kernel, &outliers, c);
}

OrtStatus* compute_outliers_float(void* memory, Context& c) {
  auto& kernel = *static_cast<OutlierKernel*>(memory);
  isofold_outliers outliers;
  ISOFOLD_TRY(read_outliers(c, 6, &kernel, &outliers));
  return compute_packed_float(kernel, &outliers, c);
}

// What linears of codes have in common; the weight is input `first`.
void define_linear(Op* op, size_t first) {
  op->inputs[first] = {"weight", ORT_UNDEFINED};
  op->inputs[first + 1] = {"scale", ORT_UNDEFINED};
  op->inputs[first + 2] = {"zero", ORT_INT8, ORT_OPTIONAL};
  op->inputs[first + 3] = {"wsum", ORT_FLOAT};
  op->inputs[first + 4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[first + 5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->infer = infer_linear;
}

void define_outliers(Op* op, size_t first) {
  op->inputs[first] = {"places", ORT_UINT16};
  op->inputs[first + 1] = {"values", ORT_FLOAT16};
  op->inputs[first + 2] = {"offsets", ORT_INT32};
  op->kernel_size = sizeof(OutlierKernel);
  op->create = create_outliers;
}

}  // namespace

OrtStatus* create_integers(const Attributes& a, isofold_linear* linear, int64_t* k) {
  isofold_linear& l = *linear;
  int64_t bits = 0;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, k));
  ISOFOLD_TRY(a.get("bits", &bits));
  ISOFOLD_TRY(a.at_least("group_size", 0, &l.group_size));
  ISOFOLD_TRY(a.get("scale_multiplier", &l.scale_multiplier));
  l.bits = int32_t(bits);
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'bits' is %lld; expected 2, 3, 4 or 8", a.op->name,
                (long long)bits);
  if (l.group_size % 32 != 0)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'group_size' is %lld; expected 0 or a multiple of 32",
                a.op->name, (long long)l.group_size);
  if (bits < 4 && l.group_size == 0)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'group_size' is 0; weights of %lld bits have groups",
                a.op->name, (long long)bits);
  l.kp = ceil_to(*k, l.group_size > 32 ? l.group_size : 32);
  return nullptr;
}

void define_quantize_activation(Op* op) {
  op->name = "QuantizeActivation";
  op->input_count = 4;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"params", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[2] = {"shift", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[3] = {"scale", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 2;
  op->outputs[0] = {"u", ORT_UINT8};
  op->outputs[1] = {"params", ORT_FLOAT};
  op->kernel_size = sizeof(QuantizeKernel);
  op->create = create_quantize;
  op->compute = compute_quantize;
  op->infer = infer_quantize;
}

void define_quantize_cache(Op* op) {
  op->name = "QuantizeCache";
  op->input_count = 2;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"shift", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 2;
  op->outputs[0] = {"codes", ORT_UINT8};
  op->outputs[1] = {"params", ORT_FLOAT};
  op->kernel_size = sizeof(CacheKernel);
  op->create = create_cache;
  op->compute = compute_cache;
  op->infer = infer_cache;
}

void define_packed_linear(Op* op) {
  op->name = "PackedLinear";
  op->input_count = 8;
  op->inputs[0] = {"u", ORT_UINT8};
  op->inputs[1] = {"params", ORT_FLOAT};
  define_linear(op, 2);
  op->kernel_size = sizeof(LinearKernel);
  op->create = create_linear;
  op->compute = compute_linear;
}

void define_quantize_packed_linear(Op* op) {
  op->name = "QuantizePackedLinear";
  op->input_count = 10;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"params", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[2] = {"pre_shift", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[3] = {"pre_scale", ORT_FLOAT, ORT_OPTIONAL};
  define_linear(op, 4);
  op->kernel_size = sizeof(QuantizeLinearKernel);
  op->create = create_quantize_linear;
  op->compute = compute_quantize_linear;
}

void define_packed_linear_float(Op* op) {
  op->name = "PackedLinearFloat";
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"weight", ORT_UNDEFINED};
  op->inputs[2] = {"scale", ORT_UNDEFINED};
  op->inputs[3] = {"zero", ORT_INT8, ORT_OPTIONAL};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(LinearKernel);
  op->create = create_linear;
  op->compute = compute_linear_float;
  op->infer = infer_linear;
}

void define_outlier_linear(Op* op) {
  define_packed_linear(op);
  op->name = "OutlierLinear";
  op->input_count = 11;
  define_outliers(op, 8);
  op->compute = compute_outliers;
}

void define_outlier_linear_float(Op* op) {
  define_packed_linear_float(op);
  op->name = "OutlierLinearFloat";
  op->input_count = 9;
  define_outliers(op, 6);
  op->compute = compute_outliers_float;
}

}  // namespace isofold
