// PackedConv: one- and two-dimensional convolutions as packed int8 linears over patches.
//
// The sample is quantized once into a copy with its padding filled in (the zero point, a real zero), so that gathering
// a patch needs no bounds checks. Blocks of output positions are gathered into rows of a linear's input, multiplied,
// and transposed into [n, position].
#include "op.h"

namespace isofold {
namespace {

struct ConvKernel : KernelBase {
  int spatial;  // 1 or 2
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // one dimension: height 1 first
  int64_t n;
  int32_t activation;
};

OrtStatus* spatial_list(const Attributes& a, const char* name, int64_t fill, int64_t low, int spatial, int64_t* values) {
  int64_t read[2];
  int count = 0;
  ISOFOLD_TRY(a.list(name, read, &count, 2));
  if (count != spatial)
    return fail(a.api, ORT_INVALID_ARGUMENT, "PackedConv: attribute '%s' has %d values, 'kernel' has %d", name, count,
                spatial);
  values[0] = fill;
  for (int i = 0; i < count; ++i) {
    if (read[i] < low)
      return fail(a.api, ORT_INVALID_ARGUMENT, "PackedConv: attribute '%s' holds %lld; expected at least %lld", name,
                  (long long)read[i], (long long)low);
    values[2 - count + i] = read[i];
  }
  return nullptr;
}

OrtStatus* create(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<ConvKernel*>(memory);
  int64_t sizes[2];
  ISOFOLD_TRY(a.list("kernel", sizes, &kernel.spatial, 2));
  ISOFOLD_TRY(spatial_list(a, "kernel", 1, 1, kernel.spatial, kernel.kernel));
  ISOFOLD_TRY(spatial_list(a, "stride", 1, 1, kernel.spatial, kernel.stride));
  ISOFOLD_TRY(spatial_list(a, "padding", 0, 0, kernel.spatial, kernel.padding));
  ISOFOLD_TRY(spatial_list(a, "dilation", 1, 1, kernel.spatial, kernel.dilation));
  ISOFOLD_TRY(a.at_least("n", 1, &kernel.n));
  return a.activation(&kernel.activation);
}

struct Geometry {
  int64_t channels, in[2], padded[2], out[2];
  int64_t plane() const { return padded[0] * padded[1]; }
  int64_t positions() const { return out[0] * out[1]; }
};

enum { SLACK = 32 };  // bytes behind the samples that the gather kernels may read

// Rows of the linear's input for positions first .. first + count, one after the other in output order.
void gather(const ConvKernel& kernel, const Geometry& g, const uint8_t* sample, const int64_t* offsets, int64_t k,
            int64_t kp, int64_t first, int64_t count, uint8_t* rows) {
  int64_t step = kernel.stride[1], words = k / 4, run = kernel.dilation[1] == 1 ? kernel.kernel[1] : 1;
  for (int64_t p = 0; p < count;) {
    int64_t y = (first + p) / g.out[1], x = (first + p) % g.out[1];
    int64_t base = y * kernel.stride[0] * g.padded[1] + x * step;
    int64_t together = g.out[1] - x < count - p ? g.out[1] - x : count - p;
    uint8_t* out = rows + p * kp;
    if (step <= 2) {
      together = together < 16 ? together : 16;
      auto kernel_of = step == 1 ? kernels->gather_patches_1 : kernels->gather_patches_2;
      kernel_of(sample, offsets, reinterpret_cast<int32_t*>(out), base, together, words, kp / 4);
      for (int64_t i = 0; i < together; ++i)
        for (int64_t j = words * 4; j < k; ++j) out[i * kp + j] = sample[base + i * step + offsets[j]];
    } else if (run >= 4) {
      for (int64_t i = 0; i < together; ++i)
        for (int64_t j = 0; j < k; j += run)
          memcpy(out + i * kp + j, sample + base + i * step + offsets[j], size_t(run));
    } else {
      for (int64_t i = 0; i < together; ++i)
        for (int64_t j = 0; j < k; ++j) out[i * kp + j] = sample[base + i * step + offsets[j]];
    }
    p += together;
  }
  if (kp > k)
    for (int64_t p = 0; p < count; ++p) memset(rows + p * kp + k, 0, size_t(kp - k));
}

OrtStatus* compute(void* memory, Context& c) {
  const auto& kernel = *static_cast<const ConvKernel*>(memory);
  Tensor x, pair, weight, scale, wsum, bias;
  ISOFOLD_TRY(c.input(0, &x));
  ISOFOLD_TRY(c.input(1, &pair));
  ISOFOLD_TRY(c.input(2, &weight));
  ISOFOLD_TRY(c.input(3, &scale));
  ISOFOLD_TRY(c.input(4, &wsum));
  ISOFOLD_TRY(c.input(5, &bias));
  if (x.shape.rank != kernel.spatial + 2)
    return c.bad_input(0, "expected %d dimensions (batch, channels, %d spatial), got %s", kernel.spatial + 2,
                       kernel.spatial, describe(x.type, x.shape).text);
  Geometry g;
  g.channels = x.shape[1];
  for (int i = 0; i < 2; ++i) {
    bool is_there = i >= 2 - kernel.spatial;
    g.in[i] = is_there ? x.shape[2 + i - (2 - kernel.spatial)] : 1;
    g.padded[i] = g.in[i] + 2 * kernel.padding[i];
    int64_t extent = kernel.dilation[i] * (kernel.kernel[i] - 1) + 1;
    if (g.padded[i] < extent)
      return c.bad_input(0, "padded to %lld along a spatial dimension, it is smaller than the dilated kernel (%lld): %s",
                         (long long)g.padded[i], (long long)extent, describe(x.type, x.shape).text);
    g.out[i] = (g.padded[i] - extent) / kernel.stride[i] + 1;
  }
  int64_t k = g.channels * kernel.kernel[0] * kernel.kernel[1], kp = ceil_to(k, 32), batch = x.shape[0];
  isofold_linear l = {};
  l.n = kernel.n;
  l.kp = kp;
  l.bits = 8;
  l.scale_multiplier = 1;
  l.activation = kernel.activation;
  int64_t panels = isofold_linear_panels(&l);
  ISOFOLD_TRY(c.expect(1, pair, ORT_FLOAT, shape_of(2)));
  ISOFOLD_TRY(c.expect(2, weight, ORT_INT8, shape_of(panels, kp / 4, 16, 4)));
  ISOFOLD_TRY(c.expect(3, scale, ORT_FLOAT, shape_of(panels, 1, 16)));
  ISOFOLD_TRY(c.expect(4, wsum, ORT_FLOAT, shape_of(16 * panels)));
  ISOFOLD_TRY(c.expect(5, bias, ORT_FLOAT, shape_of(kernel.n)));
  l.weight = weight.data;
  l.scale = scale.data;
  l.wsum = wsum.f32();
  l.bias = bias.f32();

  Shape shape = x.shape;
  shape[1] = kernel.n;
  for (int i = 0; i < kernel.spatial; ++i) shape[2 + i] = g.out[2 - kernel.spatial + i];
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape, &y));
  if (shape.count() == 0 || k == 0) return nullptr;

  int64_t elements = g.channels * g.in[0] * g.in[1], chunks = (elements + 16383) / 16384;
  size_t sample_bytes = size_t(ceil_to(g.channels * g.plane() + SLACK, 64));
  size_t params_at = size_t(batch) * sample_bytes, ranges_at = params_at + size_t(ceil_to(batch * 8, 64));
  size_t offsets_at = ranges_at + size_t(ceil_to(batch * chunks * 8, 64));
  size_t bytes = offsets_at + size_t(k) * sizeof(int64_t);
  RunScratch run(bytes);
  if (!run.data) return out_of_memory(c.api, c.op->name, bytes);
  auto* samples = static_cast<uint8_t*>(run.data);
  auto* params = reinterpret_cast<float*>(samples + params_at);
  auto* ranges = reinterpret_cast<float*>(samples + ranges_at);
  auto* offsets = reinterpret_cast<int64_t*>(samples + offsets_at);
  for (int64_t channel = 0, j = 0; channel < g.channels; ++channel)
    for (int64_t row = 0; row < kernel.kernel[0]; ++row)
      for (int64_t column = 0; column < kernel.kernel[1]; ++column, ++j)
        offsets[j] = channel * g.plane() + row * kernel.dilation[0] * g.padded[1] + column * kernel.dilation[1];

  if (pair.present) {
    for (int64_t b = 0; b < batch; ++b) memcpy(params + 2 * b, pair.data, 2 * sizeof(float));
  } else {
    ISOFOLD_TRY(c.parallel(batch * chunks, elements < 16384 ? 0.05 * double(elements) : 800.0,
                           [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin; i < end; ++i) {
                               int64_t at = i % chunks * 16384, left = elements - at;
                               kernels->row_range(x.f32() + i / chunks * elements + at, left < 16384 ? left : 16384,
                                                  ranges + 2 * i);
                             }
                           }));
    for (int64_t b = 0; b < batch; ++b) {
      float* first = ranges + 2 * b * chunks;
      for (int64_t i = 1; i < chunks; ++i) {
        first[0] = first[2 * i] < first[0] ? first[2 * i] : first[0];
        first[1] = first[2 * i + 1] > first[1] ? first[2 * i + 1] : first[1];
      }
      kernels->range_to_params(first, params + 2 * b);
    }
  }

  bool bordered = kernel.padding[0] || kernel.padding[1];
  ISOFOLD_TRY(c.parallel(batch * g.channels, 0.06 * double(g.plane()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / g.channels, channel = i % g.channels;
      const float* from = x.f32() + i * g.in[0] * g.in[1];
      uint8_t* to = samples + size_t(b) * sample_bytes + channel * g.plane();
      if (!bordered) {
        kernels->quantize_rows_static(from, nullptr, nullptr, to, params + 2 * b, 1, g.plane(), g.plane(), 0, 255);
        continue;
      }
      memset(to, int(params[2 * b + 1]), size_t(g.plane()));
      for (int64_t row = 0; row < g.in[0]; ++row)
        kernels->quantize_rows_static(from + row * g.in[1], nullptr, nullptr,
                                      to + (row + kernel.padding[0]) * g.padded[1] + kernel.padding[1],
                                      params + 2 * b, 1, g.in[1], g.in[1], 0, 255);
    }
  }));

  int64_t positions = g.positions();
  int64_t block = ceil_to((batch * positions + 31) / 32, 16);
  block = block < 16 ? 16 : block > 128 ? 128 : block;
  int64_t blocks = (positions + block - 1) / block;
  size_t rows_bytes = size_t(ceil_to(block * kp, 64));
  size_t thread_bytes = rows_bytes + size_t(block * kernel.n) * sizeof(float);
  bool failed = false;
  double nanoseconds = 0.2 * double(block * k) + double(block * kernel.n) * double(k) * 2 / 500;
  ISOFOLD_TRY(c.parallel(batch * blocks, nanoseconds, [&](int64_t begin, int64_t end) {
    auto* rows = static_cast<uint8_t*>(thread_scratch(thread_bytes));
    if (!rows) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    auto* result = reinterpret_cast<float*>(rows + rows_bytes);
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / blocks, first = i % blocks * block;
      int64_t count = positions - first < block ? positions - first : block;
      gather(kernel, g, samples + size_t(b) * sample_bytes, offsets, k, kp, first, count, rows);
      isofold_linear_call call = {};
      call.u = rows;
      call.params = params + 2 * b;
      call.static_params = 1;
      call.y = result;
      call.m = count;
      isofold_linear_run(kernels, isa, &l, &call, 0, isofold_linear_tasks(&l, count));
      kernels->transpose(result, y + b * kernel.n * positions + first, count, kernel.n, kernel.n, positions);
    }
  }));
  return failed ? out_of_memory(c.api, c.op->name, thread_bytes) : nullptr;
}

OrtStatus* infer(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t n = f.integer("n", 0), lists[4][2];
  const char* const names[] = {"kernel", "stride", "padding", "dilation"};
  if (!shape.known || n <= 0 || shape.rank < 3 || shape.rank > 4) return nullptr;
  int spatial = shape.rank - 2;
  for (int i = 0; i < 4; ++i)
    if (f.integers(names[i], lists[i], 2) != spatial) return nullptr;
  shape.set(1, n);
  for (int i = 0; i < spatial; ++i) {
    if (shape.dims[2 + i] < 0) return nullptr;  // a function of a symbol: only value_info can name it
    int64_t free = shape.dims[2 + i] + 2 * lists[2][i] - lists[3][i] * (lists[0][i] - 1) - 1;
    if (free < 0 || lists[1][i] < 1) return nullptr;
    shape.set(2 + i, free / lists[1][i] + 1);
  }
  return f.output(0, shape);
}

}  // namespace

void define_packed_conv(Op* op) {
  op->name = "PackedConv";
  op->input_count = 6;
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[1] = {"params", ORT_FLOAT, ORT_OPTIONAL};
  op->inputs[2] = {"weight", ORT_INT8};
  op->inputs[3] = {"scale", ORT_FLOAT};
  op->inputs[4] = {"wsum", ORT_FLOAT};
  op->inputs[5] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(ConvKernel);
  op->create = create;
  op->compute = compute;
  op->infer = infer;
}

}  // namespace isofold
