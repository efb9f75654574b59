// DenseLinear: a linear on float32 weights in panels of 32 features.
#include "op.h"

namespace isofold {
namespace {

struct DenseKernel : KernelBase {
  isofold_linear linear;
};

OrtStatus* create_dense(void* memory, const Attributes& a) {
  isofold_linear& l = static_cast<DenseKernel*>(memory)->linear;
  bool gated = false;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &l.kp));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  l.bits = 32;
  l.group_size = 0;
  l.scale_multiplier = 1;
  l.gated = gated;
  return nullptr;
}

OrtStatus* compute_dense(void* memory, Context& c) {
  isofold_linear l = static_cast<const DenseKernel*>(memory)->linear;
  Tensor x, weight, bias, residual;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &weight));
  ISOFOLD_TRY(c.input(2, &bias));
  ISOFOLD_TRY(c.input(3, &residual));
  Shape packed = shape_of(isofold_dense_blocks(&l), l.kp, ISOFOLD_DENSE_PANEL);
  ISOFOLD_TRY(c.expect_last(0, x, l.kp));
  ISOFOLD_TRY(c.expect(1, weight, ORT_FLOAT, packed));
  ISOFOLD_TRY(c.expect(2, bias, ORT_FLOAT, shape_of(l.gated ? 16 * isofold_linear_panels(&l) : l.n)));
  Shape shape = with_last(x.shape, l.n);
  ISOFOLD_TRY(c.expect(3, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  l.weight = weight.data;
  l.bias = bias.f32();
  isofold_linear_float_call call = {x.f32(), residual.f32(), y, shape.rows(), l.kp};
  if (call.m == 0) return nullptr;
  // 128 bytes of weights for every input of a task, about 20 of them a nanosecond.
  return parallel_float_linear(c, l, call.m, 5, [&](int64_t begin, int64_t end) {
    isofold_dense_run(kernels, &l, &call, begin, end);
  });
}

}  // namespace

void define_dense_linear(Op* op) {
  op->name = "DenseLinear";
  op->input_count = 4;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"weight", ORT_FLOAT};
  op->inputs[2] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[3] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(DenseKernel);
  op->create = create_dense;
  op->compute = compute_dense;
  op->infer = infer_linear;
}

}  // namespace isofold
