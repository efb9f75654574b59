// What the operators share: tensors, statuses, attributes, shape inference, threads and scratch memory.
//
// Everything here is plain data and functions: no exceptions, no virtual functions and nothing of the C++ standard
// library, so that the shared library depends on libc alone.
#ifndef ISOFOLD_OP_H
#define ISOFOLD_OP_H

#include <stdlib.h>
#include <string.h>

#include "ort_abi.h"

#include "kernels.h"

#include "linear_driver.h"

#include "linear_float_driver.h"

#include "coded_driver.h"

#include "codebook_driver.h"

#include "dense_driver.h"

#include "hadamard_driver.h"

#include "sparse_driver.h"

namespace isofold {

enum { MAX_RANK = 8, MAX_INPUTS = 12, MAX_OUTPUTS = 4 };

struct Shape {
  int rank = 0;
  int64_t dims[MAX_RANK] = {};

  int64_t operator[](int i) const { return dims[i < 0 ? rank + i : i]; }
  int64_t& operator[](int i) { return dims[i < 0 ? rank + i : i]; }
  int64_t count(int begin, int end) const {
    int64_t n = 1;
    for (int i = begin; i < end; ++i) n *= dims[i];
    return n;
  }
  int64_t count() const { return count(0, rank); }
  // All dimensions but the last.
  int64_t rows() const { return count(0, rank - 1); }
  bool operator==(const Shape& other) const {
    return rank == other.rank && memcmp(dims, other.dims, sizeof(int64_t) * rank) == 0;
  }
};

template <class... D>
Shape shape_of(D... dims) {
  return Shape{int(sizeof...(dims)), {int64_t(dims)...}};
}

// The same shape with another last dimension.
inline Shape with_last(Shape shape, int64_t last) {
  shape[-1] = last;
  return shape;
}

struct Tensor {
  bool present = false;
  OrtElementType type = ORT_UNDEFINED;
  Shape shape;
  void* data = nullptr;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  const float* f32() const { return as<float>(); }
};

struct Input {
  const char* name;
  OrtElementType type;  // ORT_UNDEFINED: checked by the operator
  OrtPresence presence = ORT_REQUIRED;
};

struct Output {
  const char* name;
  OrtElementType type;
  OrtPresence presence = ORT_REQUIRED;
};

struct Context;
struct Attributes;
struct Inference;

// One operator: what ONNX Runtime calls, then our own description of it.
struct Op : OrtCustomOp {
  const char* name = nullptr;
  size_t input_count = 0, output_count = 0;
  Input inputs[MAX_INPUTS] = {};
  Output outputs[MAX_OUTPUTS] = {};
  size_t kernel_size = 0;
  OrtStatus* (*create)(void* kernel, const Attributes&) = nullptr;
  OrtStatus* (*compute)(void* kernel, Context&) = nullptr;
  OrtStatus* (*infer)(Inference&) = nullptr;
};

// First member of every kernel object.
struct KernelBase {
  const Op* op;
  OrtApi api;
  // What the graph says of the node. Later runs ask ONNX Runtime for less, and read this line instead of many.
  uint32_t constant;             // bit i: input i is an initializer
  mutable uint32_t absent;       // bit i: input i is left out; learnt in the first run, as is
  mutable uint32_t counts;       // inputs * 256 + outputs; 0: not known yet
  Tensor constants[MAX_INPUTS];  // initializers, looked up once; they live as long as the session
};

// Name in error messages: "float32 [2, 3]".
struct Text {
  char text[160];
};
Text describe(OrtElementType type, const Shape& shape);

__attribute__((format(printf, 3, 4))) OrtStatus* fail(OrtApi api, OrtErrorCode code, const char* format, ...);

#define ISOFOLD_TRY(expression)                          \
  do {                                                   \
    if (OrtStatus* status_ = (expression)) return status_; \
  } while (0)

// Attributes when a kernel is created; errors name operator and attribute.
struct Attributes {
  OrtApi api;
  const Op* op;
  const OrtKernelInfo* info;

  OrtStatus* get(const char* name, int64_t* value) const;
  OrtStatus* get(const char* name, float* value) const;
  OrtStatus* get(const char* name, bool* value) const;
  // One of `choices`, a null-terminated list; the value is its index.
  OrtStatus* choice(const char* name, const char* const* choices, int32_t* value) const;
  // `least` to `capacity` integers.
  OrtStatus* list(const char* name, int64_t* values, int* count, int capacity, int least = 1) const;
  // An integer that must be one of the null-terminated allowed values or satisfy low <= value.
  OrtStatus* at_least(const char* name, int64_t low, int64_t* value) const;
  OrtStatus* activation(int32_t* value) const;
  // The largest activation code, from an attribute that is 4 or 8.
  OrtStatus* levels(const char* name, float* value) const;
};

// One run of a kernel.
struct Context {
  OrtApi api;
  const Op* op;
  const KernelBase* kernel;
  OrtKernelContext* context;
  size_t input_count, output_count;

  // An absent optional input is not `present`.
  OrtStatus* input(size_t index, Tensor* tensor) const;
  // Whether every run gets the same input: an initializer, or none. Known once `input` was called.
  bool is_fixed(size_t index) const;
  // Null where an optional output is absent.
  OrtStatus* output(size_t index, const Shape& shape, void** data) const;
  template <class T>
  OrtStatus* output(size_t index, const Shape& shape, T** data) const {
    return output(index, shape, reinterpret_cast<void**>(data));
  }

  // Type and shape of an input must be these; absent optional inputs pass.
  OrtStatus* expect(size_t index, const Tensor& tensor, OrtElementType type, const Shape& shape) const;
  OrtStatus* expect_last(size_t index, const Tensor& tensor, int64_t last) const;
  __attribute__((format(printf, 3, 4))) OrtStatus* bad_input(size_t index, const char* format, ...) const;
  __attribute__((format(printf, 2, 3))) OrtStatus* bad(const char* format, ...) const;

  // f(begin, end) over 0..total in pieces, on ONNX Runtime's threads; a unit takes about `nanoseconds` alone.
  template <class F>
  OrtStatus* parallel(int64_t total, double nanoseconds, const F& f) const;
};

// Symbolic shapes while a model is loaded. A dimension is a number, a name, or unknown.
struct SymbolicShape {
  bool known = false;
  int rank = 0;
  int64_t dims[MAX_RANK] = {};
  const char* names[MAX_RANK] = {};

  bool is_unknown(int i) const { return dims[i] < 0 && !(names[i] && names[i][0]); }
  void set(int i, int64_t value) {
    dims[i] = value;
    names[i] = "";
  }
};

struct Inference {
  OrtApi api;
  const Op* op;
  OrtShapeInferContext* context;

  SymbolicShape input(size_t index) const;
  bool has_input(size_t index) const;
  // Does nothing when a dimension is unknown: value_info of the model then stands.
  OrtStatus* output(size_t index, const SymbolicShape& shape) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  int integers(const char* name, int64_t* values, int capacity) const;
};

// The shape of input 0 with the attribute n as its last dimension: every linear's.
OrtStatus* infer_linear(Inference& f);

// Bits of `flags` of the quantizers, as in quantize.py.
enum { QUANTIZE_SHIFT = 1, QUANTIZE_SCALE = 2 };

// The kernels of the chosen instruction set.
extern const isofold_kernels* kernels;
extern isofold_isa isa;
// Kernels with features beyond v4 may run too: AVX512-VBMI, VBMI2, BITALG and VPOPCNTDQ, with v4 chosen.
extern bool expands;

// Memory of this thread, 64-byte aligned, kept for its next call; contents are lost at every call. Null: out of memory.
void* thread_scratch(size_t bytes);

// Memory of one run, shared by its threads.
struct RunScratch {
  void* data = nullptr;
  explicit RunScratch(size_t bytes) : data(bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
  ~RunScratch() { free(data); }
  RunScratch(const RunScratch&) = delete;
  RunScratch& operator=(const RunScratch&) = delete;
};

OrtStatus* out_of_memory(OrtApi api, const char* op, size_t bytes);

// Type, shape and data of a value; `index` is named in errors.
OrtStatus* read_tensor(const Context& context, size_t index, const OrtValue* value, Tensor* tensor);

// Most pieces that any work is cut into.
int64_t most_pieces();

// How many pieces work of `total` units is cut into, when one takes `nanoseconds`.
int64_t pieces(int64_t total, double nanoseconds);

// What operators with a Hadamard transform share (hadamard.cc): the plan that an attribute means, whether it fits the
// last dimension of an input, and what one block of it takes.
OrtStatus* hadamard_plan(const Attributes& a, const char* name, bool transpose, isofold_hadamard* plan);
OrtStatus* hadamard_expect(const Context& c, size_t index, const Tensor& x, const isofold_hadamard& plan);
size_t hadamard_scratch_bytes(const isofold_hadamard& plan);
double hadamard_nanoseconds(const isofold_hadamard& plan);

// One row: (x - shift) * scale, transformed, quantized; `pair` null: dynamic, else static. The floats of scratch memory.
int64_t hadamard_quantize_floats(const isofold_hadamard& plan, int64_t k);
void hadamard_quantize(const isofold_hadamard& plan, const float* x, const float* shift, const float* scale,
                       const float* pair, uint8_t* u, float* params, int64_t k, int64_t kp, float levels,
                       float* scratch);

inline int64_t ceil_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class F>
OrtStatus* Context::parallel(int64_t total, double nanoseconds, const F& f) const {
  if (total <= 0) return nullptr;
  struct Job {
    const F* f;
    int64_t total, count;
  } job{&f, total, pieces(total, nanoseconds)};
  if (job.count <= 1) {
    f(int64_t(0), total);
    return nullptr;
  }
  auto run = [](void* data, size_t i) {
    const Job& job = *static_cast<const Job*>(data);
    (*job.f)(int64_t(i) * job.total / job.count, int64_t(i + 1) * job.total / job.count);
  };
  return OrtKernelContext_ParallelFor(api, context, static_cast<void (*)(void*, size_t)>(run), size_t(job.count),
                                      size_t(0), static_cast<void*>(&job));
}

// f(begin, end) over the tasks of a linear on m rows of float activations. A task decodes 32 rows of weights
// (`decoded` of them a nanosecond) and does 64 operations a row and input (about 60 a nanosecond).
template <class F>
OrtStatus* parallel_float_linear(const Context& c, const isofold_linear& l, int64_t m, double decoded, const F& f) {
  double rows = double(isofold_linear_row_block(&l, m));
  rows = rows < double(m) ? rows : double(m);
  double decode = 32.0 * double(l.kp) / decoded, work = rows * double(l.kp) * 64 / 60;
  return c.parallel(isofold_linear_float_tasks(&l, m), decode > work ? decode : work, f);
}

// The attributes of a linear on integer codes: n, k, bits, group_size, scale_multiplier (linear.cc).
OrtStatus* create_integers(const Attributes& a, isofold_linear* linear, int64_t* k);

// The operators, one function per file.
void define_quantize_activation(Op*);
void define_packed_linear(Op*);
void define_quantize_packed_linear(Op*);
void define_packed_linear_float(Op*);
void define_outlier_linear(Op*);
void define_outlier_linear_float(Op*);
void define_coded_linear(Op*);
void define_fp8_linear(Op*);
void define_quantize_activation_fp8(Op*);
void define_dense_linear(Op*);
void define_grouped_packed_linear(Op*);
void define_grouped_packed_linear_float(Op*);
void define_grouped_dense_linear(Op*);
void define_sparse_linear(Op*);
void define_sparse_linear_float(Op*);
void define_codebook_linear(Op*);
void define_packed_embedding(Op*);
void define_packed_conv(Op*);
void define_cached_attention(Op*);
void define_quantize_cache(Op*);
void define_norm(Op*);
void define_norm_quantize(Op*);
void define_attention(Op*);
void define_rotary(Op*);
void define_gated(Op*);
void define_hadamard(Op*);

}  // namespace isofold

#endif  // ISOFOLD_OP_H
