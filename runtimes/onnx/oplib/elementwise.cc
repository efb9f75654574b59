// Gated and Rotary.
#include "op.h"

namespace isofold {
namespace {

// ---- Gated: activation(gate) * up

struct GatedKernel : KernelBase {
  int32_t activation;
};

OrtStatus* create_gated(void* memory, const Attributes& a) {
  return a.activation(&static_cast<GatedKernel*>(memory)->activation);
}

OrtStatus* compute_gated(void* memory, Context& c) {
  const auto& kernel = *static_cast<const GatedKernel*>(memory);
  Tensor gate, up;
  ISOFOLD_TRY(c.input(0, &gate));
  ISOFOLD_TRY(c.input(1, &up));
  ISOFOLD_TRY(c.expect(1, up, ORT_FLOAT, gate.shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, gate.shape, &y));
  const isofold_kernels& k = *kernels;
  void (*const by_activation[])(const float*, const float*, float*, int64_t, int64_t) = {
      k.gated_none, k.gated_relu, k.gated_gelu, k.gated_gelu_tanh, k.gated_silu};
  auto run = by_activation[kernel.activation];
  // Cut at multiples of 16 elements, so that only the end is handled one by one.
  int64_t count = gate.shape.count();
  return c.parallel((count + 15) / 16, 12, [&](int64_t begin, int64_t end) {
    run(gate.f32(), up.f32(), y, begin * 16, end * 16 < count ? end * 16 : count);
  });
}

OrtStatus* infer_like_first(Inference& f) { return f.output(0, f.input(0)); }

// ---- Rotary

struct RotaryKernel : KernelBase {
  int64_t heads_dimension, heads;
  bool interleaved;
};

OrtStatus* create_rotary(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<RotaryKernel*>(memory);
  ISOFOLD_TRY(a.get("head_dim_index", &kernel.heads_dimension));
  ISOFOLD_TRY(a.get("heads", &kernel.heads));
  ISOFOLD_TRY(a.get("interleaved", &kernel.interleaved));
  if (kernel.heads_dimension != 1 && kernel.heads_dimension != 2)
    return fail(a.api, ORT_INVALID_ARGUMENT, "Rotary: attribute 'head_dim_index' is %lld; expected 1 or 2",
                (long long)kernel.heads_dimension);
  return nullptr;
}

// Strides of a table of cosines or sines for dimensions 0, 1, 2 of x: 0 where it is broadcast.
OrtStatus* table_strides(const Context& c, size_t index, const Tensor& table, const Shape& x, int64_t heads_dimension,
                         int64_t width, int64_t* strides) {
  int64_t step = width;
  bool fits = table.shape.rank >= 1 && table.shape.rank <= 4 && table.shape[-1] == width;
  for (int i = 2; fits && i >= 0; --i) {
    int own = table.shape.rank - 4 + i;
    int64_t size = own >= 0 ? table.shape.dims[own] : 1;
    fits = size == 1 || (size == x[i] && i != heads_dimension);
    strides[i] = size == 1 ? 0 : step;
    step *= size;
  }
  if (fits) return nullptr;
  return c.bad_input(index, "expected float32 that broadcasts to %s with one head and the width %lld of cos, got %s",
                     describe(ORT_FLOAT, x).text, (long long)width, describe(table.type, table.shape).text);
}

OrtStatus* compute_rotary(void* memory, Context& c) {
  const auto& kernel = *static_cast<const RotaryKernel*>(memory);
  Tensor x, cos, sin;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &cos));
  ISOFOLD_TRY(c.input(2, &sin));
  if (x.shape.rank != 4)
    return c.bad_input(0, "expected 4 dimensions, got %s", describe(x.type, x.shape).text);
  int64_t d = x.shape[3], width = cos.shape.rank ? cos.shape[-1] : 0;
  if (width < 2 || width % 2 != 0 || width > d)
    return c.bad_input(1, "expected an even last dimension of 2 to %lld, got %s", (long long)d,
                       describe(cos.type, cos.shape).text);
  int64_t cos_strides[3], sin_strides[3];
  ISOFOLD_TRY(table_strides(c, 1, cos, x.shape, kernel.heads_dimension, width, cos_strides));
  ISOFOLD_TRY(table_strides(c, 2, sin, x.shape, kernel.heads_dimension, width, sin_strides));
  int64_t all_heads = x.shape[int(kernel.heads_dimension)];
  int64_t heads = kernel.heads < 0 ? all_heads : kernel.heads;
  if (heads > all_heads)
    return c.bad_input(0, "expected at least %lld heads (attribute 'heads') in dimension %lld, got %s",
                       (long long)heads, (long long)kernel.heads_dimension, describe(x.type, x.shape).text);
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, x.shape, &y));
  if (x.shape.count() == 0) return nullptr;
  // One unit of work is the last two dimensions at fixed (i, j) of the first two.
  auto run = kernel.interleaved ? kernels->rotary_interleaved : kernels->rotary_half;
  bool heads_inside = kernel.heads_dimension == 2;
  int64_t outer = x.shape[1], inner = x.shape[2];
  return c.parallel(x.shape[0] * outer, 0.3 * double(inner * d), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t i = unit / outer, j = unit % outer, at = unit * inner * d;
      int64_t turned = heads_inside ? heads : (j < heads ? inner : 0);
      const float* cos_row = cos.f32() + i * cos_strides[0] + j * cos_strides[1];
      const float* sin_row = sin.f32() + i * sin_strides[0] + j * sin_strides[1];
      if (cos_strides[2] == sin_strides[2]) {
        run(x.f32() + at, cos_row, sin_row, y + at, turned, d, cos_strides[2], width, d);
      } else {
        for (int64_t r = 0; r < turned; ++r)
          run(x.f32() + at + r * d, cos_row + r * cos_strides[2], sin_row + r * sin_strides[2], y + at + r * d, 1, d,
              0, width, d);
      }
      if (turned < inner)
        memcpy(y + at + turned * d, x.f32() + at + turned * d, size_t((inner - turned) * d) * sizeof(float));
    }
  });
}

}  // namespace

void define_gated(Op* op) {
  op->name = "Gated";
  op->input_count = 2;
  op->inputs[0] = {"gate", ORT_FLOAT};
  op->inputs[1] = {"up", ORT_FLOAT};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(GatedKernel);
  op->create = create_gated;
  op->compute = compute_gated;
  op->infer = infer_like_first;
}

void define_rotary(Op* op) {
  op->name = "Rotary";
  op->input_count = 3;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"cos", ORT_FLOAT};
  op->inputs[2] = {"sin", ORT_FLOAT};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(RotaryKernel);
  op->create = create_rotary;
  op->compute = compute_rotary;
  op->infer = infer_like_first;
}

}  // namespace isofold
