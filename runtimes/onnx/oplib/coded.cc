// CodedLinear: weights as codes of a table or of small floats (compiler/dialect/element_formats.py); Fp8Linear: 8-bit
// floats on activations of E4M3, which become floats in scratch memory (they are few beside the weights).
#include "op.h"

namespace isofold {
namespace {

struct Format {
  const char* name;
  int32_t element;
  int32_t scale;       // of a group; a row's own are float32
  int64_t group_size;  // the only one, 0: any of 32, 64, 128
  bool per_channel;    // group_size 0 is allowed too
};

const Format formats[] = {
    {"nf4", ISOFOLD_CODED_TABLE, ISOFOLD_SCALE_FLOAT16, 0, false},
    {"table4", ISOFOLD_CODED_TABLE, ISOFOLD_SCALE_FLOAT16, 0, false},
    {"e4m3", ISOFOLD_CODED_E4M3, ISOFOLD_SCALE_FLOAT16, 0, true},
    {"e5m2", ISOFOLD_CODED_E5M2, ISOFOLD_SCALE_FLOAT16, 0, true},
    {"mxfp4", ISOFOLD_CODED_TABLE, ISOFOLD_SCALE_E8M0, 32, false},
    {"mxfp6_e3m2", ISOFOLD_CODED_E3M2, ISOFOLD_SCALE_E8M0, 32, false},
    {"mxfp6_e2m3", ISOFOLD_CODED_E2M3, ISOFOLD_SCALE_E8M0, 32, false},
    {"mxfp8_e4m3", ISOFOLD_CODED_E4M3, ISOFOLD_SCALE_E8M0, 32, false},
    {"mxfp8_e5m2", ISOFOLD_CODED_E5M2, ISOFOLD_SCALE_E8M0, 32, false},
    {"nvfp4", ISOFOLD_CODED_TABLE, ISOFOLD_SCALE_E4M3, 16, false},
};
constexpr int format_count = int(sizeof formats / sizeof formats[0]);
enum { TABLE4 = 1 };

// The 16 values that codes of 4 bits stand for, by format; zeros where a tensor or shifts give them.
alignas(64) const float nf4[16] = {
    -1.0f,                -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f,  0.7229568362236023f,  1.0f};
alignas(64) const float e2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

struct CodedKernel : KernelBase {
  isofold_coded coded;
  int32_t format;
  int64_t k;
};

OrtStatus* create_coded(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<CodedKernel*>(memory);
  isofold_linear& l = kernel.coded.linear;
  const char* names[format_count + 1] = {};
  for (int i = 0; i < format_count; ++i) names[i] = formats[i].name;
  bool gated = false;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &kernel.k));
  ISOFOLD_TRY(a.choice("format", static_cast<const char* const*>(names), &kernel.format));
  ISOFOLD_TRY(a.at_least("group_size", 0, &l.group_size));
  ISOFOLD_TRY(a.get("scale_multiplier", &l.scale_multiplier));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  const Format& format = formats[kernel.format];
  int64_t g = l.group_size;
  bool usual = g == 32 || g == 64 || g == 128;
  if (!(format.group_size ? g == format.group_size : usual || (g == 0 && format.per_channel)))
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'group_size' is %lld; expected %s for format %s", a.op->name,
                (long long)g,
                format.group_size == 16   ? "16"
                : format.group_size == 32 ? "32"
                : format.per_channel      ? "0, 32, 64 or 128"
                                          : "32, 64 or 128",
                format.name);
  l.gated = gated;
  l.kp = ceil_to(kernel.k, g > 32 ? g : 32);
  kernel.coded.element = format.element;
  kernel.coded.scale = g ? format.scale : int32_t(ISOFOLD_SCALE_CHANNEL);
  kernel.coded.table = kernel.format == 0 ? static_cast<const float*>(nf4) : static_cast<const float*>(e2m1);
  return nullptr;
}

struct CodedInputs {
  size_t weight, scale, bias;
};

// Check the weights and point the linear at them.
OrtStatus* read_coded(const Context& c, const CodedInputs& at, isofold_coded* coded) {
  isofold_linear& l = coded->linear;
  Tensor weight, scale, bias;
  ISOFOLD_TRY(c.input(at.weight, &weight));
  ISOFOLD_TRY(c.input(at.scale, &scale));
  ISOFOLD_TRY(c.input(at.bias, &bias));
  int64_t panels = isofold_linear_panels(&l), bits = isofold_coded_bits(coded);
  Shape packed = bits == 4   ? shape_of(panels, l.kp / 8, 16, 4)
                 : bits == 8 ? shape_of(panels, l.kp / 2, 16, 2)
                             : shape_of(panels, 3 * l.kp / 8, 16, 2);
  OrtElementType scale_type = coded->scale == ISOFOLD_SCALE_CHANNEL   ? ORT_FLOAT
                              : coded->scale == ISOFOLD_SCALE_FLOAT16 ? ORT_FLOAT16
                                                                      : ORT_UINT8;
  ISOFOLD_TRY(c.expect(at.weight, weight, ORT_UINT8, packed));
  ISOFOLD_TRY(c.expect(at.scale, scale, scale_type, shape_of(panels, isofold_linear_groups(&l), 16)));
  ISOFOLD_TRY(c.expect(at.bias, bias, ORT_FLOAT, shape_of(l.gated ? 16 * panels : l.n)));
  l.weight = weight.data;
  l.scale = scale.data;
  l.bias = bias.f32();
  return nullptr;
}

OrtStatus* compute_coded(void* memory, Context& c) {
  const auto& kernel = *static_cast<const CodedKernel*>(memory);
  isofold_coded coded = kernel.coded;
  isofold_linear& l = coded.linear;
  ISOFOLD_TRY(read_coded(c, {1, 2, 4}, &coded));
  Tensor x, table, residual;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(3, &table));
  ISOFOLD_TRY(c.input(5, &residual));
  ISOFOLD_TRY(c.expect(3, table, ORT_FLOAT, shape_of(16)));
  if (table.present != (kernel.format == TABLE4))
    return c.bad_input(3, table.present ? "only the format table4 takes one" : "the format table4 needs one");
  ISOFOLD_TRY(c.expect_last(0, x, kernel.k));
  Shape shape = with_last(x.shape, l.n);
  ISOFOLD_TRY(c.expect(5, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  if (table.present) coded.table = table.f32();
  isofold_linear_float_call call = {x.f32(), residual.f32(), y, shape.rows(), kernel.k};
  if (call.m == 0) return nullptr;
  return parallel_float_linear(c, l, call.m, 20, [&](int64_t begin, int64_t end) {
    isofold_coded_run(kernels, &coded, &call, begin, end);
  });
}

// ---- Fp8Linear

OrtStatus* create_fp8(void* memory, const Attributes& a) {
  ISOFOLD_TRY(create_coded(memory, a));
  const auto& kernel = *static_cast<const CodedKernel*>(memory);
  if (kernel.coded.element != ISOFOLD_CODED_E4M3 && kernel.coded.element != ISOFOLD_CODED_E5M2)
    return fail(a.api, ORT_INVALID_ARGUMENT, "%s: attribute 'format' is %s; expected e4m3, e5m2, mxfp8_e4m3 or mxfp8_e5m2",
                a.op->name, formats[kernel.format].name);
  return nullptr;
}

OrtStatus* compute_fp8(void* memory, Context& c) {
  const auto& kernel = *static_cast<const CodedKernel*>(memory);
  isofold_coded coded = kernel.coded;
  isofold_linear& l = coded.linear;
  ISOFOLD_TRY(read_coded(c, {2, 3, 4}, &coded));
  Tensor u, params, residual;
  ISOFOLD_TRY(c.input(0, &u));
  ISOFOLD_TRY(c.input(1, &params));
  ISOFOLD_TRY(c.input(5, &residual));
  if (u.shape.rank < 1 || u.shape[-1] < kernel.k)
    return c.bad_input(0, "expected at least %lld codes in the last dimension, got %s", (long long)kernel.k,
                       describe(u.type, u.shape).text);
  bool fixed = params.shape.rank == 1 && params.shape[0] == 1;
  if (!fixed) ISOFOLD_TRY(c.expect(1, params, ORT_FLOAT, with_last(u.shape, 1)));
  Shape shape = with_last(u.shape, l.n);
  ISOFOLD_TRY(c.expect(5, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  int64_t m = shape.rows(), k = kernel.k, width = u.shape[-1];
  if (m == 0) return nullptr;
  RunScratch scratch(size_t(m * k) * sizeof(float));
  if (!scratch.data) return out_of_memory(c.api, c.op->name, size_t(m * k) * sizeof(float));
  auto* x = static_cast<float*>(scratch.data);
  ISOFOLD_TRY(c.parallel(m, 0.1 * double(k), [&](int64_t begin, int64_t end) {
    kernels->fp8_decode_rows(u.as<uint8_t>() + begin * width, params.f32() + (fixed ? 0 : begin), fixed ? 0 : 1,
                             x + begin * k, end - begin, k, width);
  }));
  isofold_linear_float_call call = {x, residual.f32(), y, m, k};
  return parallel_float_linear(c, l, m, 20, [&](int64_t begin, int64_t end) {
    isofold_coded_run(kernels, &coded, &call, begin, end);
  });
}

}  // namespace

void define_fp8_linear(Op* op) {
  op->name = "Fp8Linear";
  op->input_count = 6;
  op->inputs[0] = {"u", ORT_UINT8};
  op->inputs[1] = {"params", ORT_FLOAT};
  op->inputs[2] = {"weight", ORT_UINT8};
  op->inputs[3] = {"scale", ORT_UNDEFINED};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(CodedKernel);
  op->create = create_fp8;
  op->compute = compute_fp8;
  op->infer = infer_linear;
}

void define_coded_linear(Op* op) {
  op->name = "CodedLinear";
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"weight", ORT_UINT8};
  op->inputs[2] = {"scale", ORT_UNDEFINED};
  op->inputs[3] = {"table", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(CodedKernel);
  op->create = create_coded;
  op->compute = compute_coded;
  op->infer = infer_linear;
}

}  // namespace isofold
