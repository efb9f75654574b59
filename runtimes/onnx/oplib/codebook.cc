// CodebookLinear: weights as sums of codebook vectors (compiler/dialect/packing_codebook.py).
#include "op.h"

namespace isofold {
namespace {

struct CodebookKernel : KernelBase {
  isofold_codebook codebook;
  int64_t k;
};

OrtStatus* create_codebook(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<CodebookKernel*>(memory);
  isofold_linear& l = kernel.codebook.linear;
  static const char* const layouts[] = {"1x8", "2x8", "3x8", "4x8",  "5x8",  "6x8",
                                        "7x8", "8x8", "1x16", "2x16", nullptr};
  int32_t layout = 0;
  bool gated = false;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &kernel.k));
  ISOFOLD_TRY(a.choice("format", static_cast<const char* const*>(layouts), &layout));
  ISOFOLD_TRY(a.activation(&l.activation));
  ISOFOLD_TRY(a.get("gated", &gated));
  l.gated = gated;
  l.kp = ceil_to(kernel.k, 32);
  l.scale_multiplier = 1.0f;
  kernel.codebook.code_bits = layout < 8 ? 8 : 16;
  kernel.codebook.total = layout < 8 ? layout + 1 : layout - 7;
  return nullptr;
}

// Few rows: products are looked up. *done: whether they could be for every row.
OrtStatus* look_up(Context& c, const isofold_codebook& codebook, const uint16_t* books, const isofold_linear_float_call& call,
                   bool* done) {
  size_t bytes = size_t(isofold_lookup_bytes(&codebook));
  // Kept for the next call: the pages of a fresh megabyte cost more than the tables in it. No task below asks for it.
  void* scratch = thread_scratch(bytes);
  if (!scratch) return out_of_memory(c.api, c.op->name, bytes);
  isofold_lookup lookup = isofold_lookup_start(kernels, &codebook, books, scratch);
  // Every range of tasks fetches all tables: no more of them than processors.
  int64_t tasks = isofold_lookup_tasks(&codebook), bundle = isofold_ceildiv(tasks * 4, most_pieces());
  double table = 15.0 * double(codebook.total), look = 1.6 * double(codebook.total);  // nanoseconds for a group
  *done = true;
  for (int64_t m = 0; m < call.m && *done; ++m) {
    *done = isofold_lookup_row(&codebook, &lookup, call.x + m * call.k, call.k);
    for (int64_t chunk = 0; *done && chunk < isofold_lookup_chunks(&codebook); ++chunk) {
      int64_t units = isofold_lookup_units(&codebook, chunk);
      ISOFOLD_TRY(c.parallel(units, table * ISOFOLD_LOOKUP_UNIT, [&](int64_t begin, int64_t end) {
        isofold_lookup_tables(kernels, &codebook, &lookup, chunk, begin, end);
      }));
      double nanoseconds = 2 * look * double(units * ISOFOLD_LOOKUP_UNIT * bundle);
      ISOFOLD_TRY(c.parallel(isofold_ceildiv(tasks, bundle), nanoseconds, [&](int64_t begin, int64_t end) {
        isofold_lookup_run(kernels, &codebook, &lookup, &call, m, chunk, begin * bundle, isofold_min(end * bundle, tasks));
      }));
    }
  }
  return nullptr;
}

OrtStatus* compute_codebook(void* memory, Context& c) {
  const auto& kernel = *static_cast<const CodebookKernel*>(memory);
  isofold_codebook codebook = kernel.codebook;
  isofold_linear& l = codebook.linear;
  Tensor x, weight, books, scale, bias, residual;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &weight));
  ISOFOLD_TRY(c.input(2, &books));
  ISOFOLD_TRY(c.input(3, &scale));
  ISOFOLD_TRY(c.input(4, &bias));
  ISOFOLD_TRY(c.input(5, &residual));
  int64_t panels = isofold_linear_panels(&l), total = codebook.total;
  bool narrow = codebook.code_bits == 8;
  ISOFOLD_TRY(c.expect(1, weight, narrow ? ORT_UINT8 : ORT_UINT16, shape_of(panels, l.kp / 8, 16, total)));
  ISOFOLD_TRY(c.expect(2, books, ORT_FLOAT16, shape_of(total, narrow ? 256 : 65536, 8)));
  ISOFOLD_TRY(c.expect(3, scale, ORT_FLOAT, shape_of(panels, 1, 16)));
  ISOFOLD_TRY(c.expect(4, bias, ORT_FLOAT, shape_of(l.gated ? 16 * panels : l.n)));
  ISOFOLD_TRY(c.expect_last(0, x, kernel.k));
  Shape shape = with_last(x.shape, l.n);
  ISOFOLD_TRY(c.expect(5, residual, ORT_FLOAT, shape));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  isofold_linear_float_call call = {x.f32(), residual.f32(), y, shape.rows(), kernel.k};
  if (call.m == 0) return nullptr;
  l.weight = weight.data;
  l.scale = scale.data;
  l.bias = bias.f32();
  bool done = false;
  if (expands && isofold_codebook_looks_up(&codebook, call.m))
    ISOFOLD_TRY(look_up(c, codebook, books.as<uint16_t>(), call, &done));
  if (done) return nullptr;
  size_t bytes = size_t(isofold_codebook_scratch_bytes(&codebook));
  RunScratch scratch(bytes);
  if (bytes && !scratch.data) return out_of_memory(c.api, c.op->name, bytes);
  codebook.books = books.data;
  if (bytes) {
    isofold_codebook_expand(kernels, &codebook, books.as<uint16_t>(), static_cast<float*>(scratch.data));
    codebook.books = scratch.data;
  }
  return parallel_float_linear(c, l, call.m, 15.0 / double(total), [&](int64_t begin, int64_t end) {
    isofold_codebook_run(kernels, &codebook, &call, begin, end);
  });
}

}  // namespace

void define_codebook_linear(Op* op) {
  op->name = "CodebookLinear";
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"weight", ORT_UNDEFINED};
  op->inputs[2] = {"codebooks", ORT_FLOAT16};
  op->inputs[3] = {"scale", ORT_FLOAT};
  op->inputs[4] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[5] = {"residual", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(CodebookKernel);
  op->create = create_codebook;
  op->compute = compute_codebook;
  op->infer = infer_linear;
}

}  // namespace isofold
