// PackedEmbedding: rows of an int8 or int4 table, decoded.
#include "op.h"

namespace isofold {
namespace {

struct EmbeddingKernel : KernelBase {
  int64_t dim, bits, group_size;
};

OrtStatus* create(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<EmbeddingKernel*>(memory);
  ISOFOLD_TRY(a.at_least("dim", 1, &kernel.dim));
  ISOFOLD_TRY(a.get("bits", &kernel.bits));
  ISOFOLD_TRY(a.at_least("group_size", 0, &kernel.group_size));
  if (kernel.bits != 4 && kernel.bits != 8)
    return fail(a.api, ORT_INVALID_ARGUMENT, "PackedEmbedding: attribute 'bits' is %lld; expected 4 or 8",
                (long long)kernel.bits);
  return nullptr;
}

OrtStatus* compute(void* memory, Context& c) {
  const auto& kernel = *static_cast<const EmbeddingKernel*>(memory);
  Tensor ids, weight, scale, zero;
  ISOFOLD_TRY(c.input(0, &ids));
  ISOFOLD_TRY(c.input(1, &weight));
  ISOFOLD_TRY(c.input(2, &scale));
  ISOFOLD_TRY(c.input(3, &zero));
  if (ids.type != ORT_INT64 && ids.type != ORT_INT32)
    return c.bad_input(0, "expected int64 or int32, got %s", describe(ids.type, ids.shape).text);
  if (ids.shape.rank >= MAX_RANK) return c.bad_input(0, "has %d dimensions; at most 7 work", ids.shape.rank);
  int64_t d = kernel.dim, group = kernel.group_size ? kernel.group_size : d, groups = (d + group - 1) / group;
  int64_t bytes = kernel.bits == 8 ? d : (d + 1) / 2, rows = weight.shape.rank ? weight.shape[0] : 0;
  ISOFOLD_TRY(c.expect(1, weight, kernel.bits == 8 ? ORT_INT8 : ORT_UINT8, shape_of(rows, bytes)));
  ISOFOLD_TRY(c.expect(2, scale, ORT_FLOAT, shape_of(rows, groups)));
  ISOFOLD_TRY(c.expect(3, zero, ORT_INT8, shape_of(rows, groups)));
  int64_t count = ids.shape.count();
  auto id = [&](int64_t i) {
    int64_t value = ids.type == ORT_INT64 ? ids.as<int64_t>()[i] : ids.as<int32_t>()[i];
    return value < 0 ? value + rows : value;
  };
  for (int64_t i = 0; i < count; ++i)
    if (int64_t row = id(i); row < 0 || row >= rows)
      return c.bad_input(0, "the id at flat position %lld is %lld; the table has rows %lld..%lld", (long long)i,
                         (long long)(row < 0 ? row - rows : row), (long long)-rows, (long long)(rows - 1));
  Shape shape = ids.shape;
  shape.dims[shape.rank++] = d;
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  return c.parallel(count, 30 + 0.08 * double(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = id(i);
      const float* factors = scale.f32() + row * groups;
      const int8_t* shift = zero.present ? zero.as<int8_t>() + row * groups : nullptr;
      if (kernel.bits == 8)
        kernels->embedding_row_int8(weight.as<int8_t>() + row * bytes, factors, shift, y + i * d, d, group,
                                    zero.present);
      else
        kernels->embedding_row_int4(weight.as<uint8_t>() + row * bytes, factors, shift, y + i * d, d, group,
                                    zero.present);
    }
  });
}

OrtStatus* infer(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t dim = f.integer("dim", 0);
  if (!shape.known || shape.rank >= MAX_RANK || dim <= 0) return nullptr;
  shape.set(shape.rank++, dim);
  return f.output(0, shape);
}

}  // namespace

void define_packed_embedding(Op* op) {
  op->name = "PackedEmbedding";
  op->input_count = 4;
  op->inputs[0] = {"ids", ORT_UNDEFINED};
  op->inputs[1] = {"weight", ORT_UNDEFINED};
  op->inputs[2] = {"scale", ORT_FLOAT};
  op->inputs[3] = {"zero", ORT_INT8, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(EmbeddingKernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

}  // namespace isofold
