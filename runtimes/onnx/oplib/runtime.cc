// The library's entry point, and what op.h declares.
#include "op.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#ifndef ISOFOLD_OPS_VERSION
#define ISOFOLD_OPS_VERSION "unversioned"
#endif

namespace isofold {

const isofold_kernels* kernels = nullptr;
isofold_isa isa = ISOFOLD_V3;
bool expands = false;

namespace {

// ---- errors

const char* type_name(OrtElementType type) {
  switch (int(type)) {
    case ORT_FLOAT: return "float32";
    case ORT_UINT8: return "uint8";
    case ORT_UINT16: return "uint16";
    case ORT_INT8: return "int8";
    case ORT_INT32: return "int32";
    case ORT_INT64: return "int64";
    case ORT_BOOL: return "bool";
    case ORT_FLOAT16: return "float16";
    case 8: return "string";
    case 11: return "float64";
    case 16: return "bfloat16";
    default: return "another type";
  }
}

OrtStatus* fail_v(OrtApi api, OrtErrorCode code, const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return OrtCreateStatus(api, code, text);
}

// ---- scratch memory of a thread

struct Scratch {
  void* data;
  size_t bytes;
};

thread_local Scratch scratch;
pthread_key_t scratch_key;

void release_scratch(void* data) { free(data); }

// ---- processors this process may use

int64_t usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  int count = CPU_COUNT(&set);
  return count > 0 ? count : 1;
}

int64_t processors = 1;

// ---- instruction set

bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("movbe");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

bool has_vbmi2() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
}

// Null, or why no kernels can run here.
const char* choose_isa() {
  static char text[256];
  __builtin_cpu_init();
  const char* forced = getenv("ISOFOLD_ISA");
  if (forced && !forced[0]) forced = nullptr;
  if (forced && strcmp(forced, "v3") != 0 && strcmp(forced, "v4") != 0) {
    snprintf(text, sizeof text, "ISOFOLD_ISA=%s is not known; expected v3 (AVX2) or v4 (AVX-512 with VNNI), or unset.",
             forced);
    return text;
  }
  if (!has_v3())
    return "isofold's op library needs an x86-64-v3 processor (AVX2, FMA, F16C, BMI2), which this one is not. The "
           "model also runs without the library: do not register it.";
  if (forced && strcmp(forced, "v4") == 0 && !has_v4())
    return "ISOFOLD_ISA=v4 needs AVX-512 (F, BW, CD, DQ, VL) with VNNI, which this processor lacks; use "
           "ISOFOLD_ISA=v3 or leave it unset.";
  isa = forced ? (forced[1] == '4' ? ISOFOLD_V4 : ISOFOLD_V3) : (has_v4() ? ISOFOLD_V4 : ISOFOLD_V3);
  expands = isa == ISOFOLD_V4 && has_vbmi2();
  kernels = isa == ISOFOLD_V4 ? &isofold_kernels_v4 : &isofold_kernels_v3;
  return nullptr;
}

// ---- what ONNX Runtime calls

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

size_t element_bytes(OrtElementType type) {
  switch (int(type)) {
    case ORT_FLOAT: case ORT_INT32: return 4;
    case ORT_UINT16: case ORT_FLOAT16: case 16: return 2;
    case ORT_INT64: return 8;
    default: return 1;
  }
}

// Weights lie in a mapped file: what is not in memory yet then comes in physically contiguous pages of 2 MiB, where
// the file system has them (compiler/whole_pages.py says what that is worth). Refused: they stay as they are.
void ask_for_large_pages(const Tensor& weights) {
  const uintptr_t page = 4096;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(weights.data) + page - 1) / page * page;
  uintptr_t end = reinterpret_cast<uintptr_t>(weights.data) + size_t(weights.shape.count()) * element_bytes(weights.type);
  if (end >= begin + 16 * page) madvise(reinterpret_cast<void*>(begin), (end - begin) / page * page, MADV_HUGEPAGE);
}

OrtStatus* create_kernel(const OrtCustomOp* custom, OrtApi api, const OrtKernelInfo* info, void** kernel) {
  const Op& op = self(custom);
  *kernel = nullptr;
  void* memory = calloc(1, op.kernel_size);
  if (!memory) return out_of_memory(api, op.name, op.kernel_size);
  KernelBase& base = *static_cast<KernelBase*>(memory);
  base.op = &op;
  base.api = api;
  Attributes attributes{api, &op, info};
  OrtStatus* status = op.create(memory, attributes);
  Context context{api, &op, &base, nullptr, 0, 0};
  for (size_t i = 0; !status && i < op.input_count; ++i) {
    int constant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* missing = OrtKernelInfoGetConstantInput_tensor(api, info, i, &constant, &value);
    if (missing) {
      OrtReleaseStatus(api, missing);
    } else if (constant && value) {
      status = read_tensor(context, i, value, &base.constants[i]);
      if (status) break;
      base.constant |= uint32_t(1) << i;
      ask_for_large_pages(base.constants[i]);
    }
  }
  if (status) {
    free(memory);
    return status;
  }
  *kernel = memory;
  return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* ort) {
  const KernelBase& base = *static_cast<const KernelBase*>(kernel);
  Context context{base.api, base.op, &base, ort, 0, 0};
  uint32_t counts = __atomic_load_n(&base.counts, __ATOMIC_RELAXED);
  if (counts == 0) {
    ISOFOLD_TRY(OrtKernelContext_GetInputCount(base.api, ort, &context.input_count));
    ISOFOLD_TRY(OrtKernelContext_GetOutputCount(base.api, ort, &context.output_count));
    counts = uint32_t(context.input_count * 256 + context.output_count);
    __atomic_store_n(&base.counts, counts, __ATOMIC_RELAXED);
  }
  context.input_count = counts / 256;
  context.output_count = counts % 256;
  return base.op->compute(kernel, context);
}

// Set by RegisterCustomOps: shape inference gets no OrtApi of its own.
OrtApi global_api = nullptr;

OrtStatus* infer(const OrtCustomOp* custom, OrtShapeInferContext* context) {
  Inference inference{global_api, &self(custom), context};
  return self(custom).infer(inference);
}

// The table that also has what came with ORT_ABI_BORROWED_SHAPES; null where ONNX Runtime is older. Kernels compare
// theirs with it, as a process may have several copies of ONNX Runtime.
OrtApi borrowing_api = nullptr;

// ONNX Runtime's minor version, 0 while unknown.
int ort_minor = 0;

// Before 1.24, ONNX Runtime dereferences null when it prepares shape inference for a node that leaves out an optional
// input before its last one. There, the shapes written in the model have to do.
bool infers_safely(const Op& op) {
  if (!op.infer) return false;
  for (size_t i = 0; i < op.input_count; ++i)
    if (op.inputs[i].presence == ORT_OPTIONAL && ort_minor < 24) return false;
  return true;
}

void fill(Op* op) {
  op->version = ORT_ABI_VERSION;
  op->GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op->GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op->GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).input_count; };
  op->GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i].type; };
  op->GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i].presence; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op->GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).output_count; };
  op->GetOutputType = [](const OrtCustomOp* op, size_t i) { return self(op).outputs[i].type; };
  op->GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) { return self(op).outputs[i].presence; };
  op->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->CreateKernelV2 = create_kernel;
  op->KernelComputeV2 = compute;
  op->KernelDestroy = [](void* kernel) { free(kernel); };
  op->InferOutputShape = infers_safely(*op) ? infer : nullptr;
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return 1; };
}

void (*const definitions[])(Op*) = {
    define_quantize_activation, define_packed_linear, define_packed_linear_float, define_packed_embedding,
    define_packed_conv,         define_norm,          define_norm_quantize,       define_attention,
    define_rotary,              define_gated,         define_hadamard,            define_coded_linear,
    define_sparse_linear,       define_sparse_linear_float, define_quantize_packed_linear,
    define_codebook_linear,     define_dense_linear,  define_outlier_linear,      define_outlier_linear_float,
    define_cached_attention,    define_quantize_cache, define_quantize_activation_fp8, define_fp8_linear,
    define_grouped_packed_linear, define_grouped_packed_linear_float, define_grouped_dense_linear,
};
constexpr size_t op_count = sizeof definitions / sizeof definitions[0];

// ONNX Runtime keeps pointers to the operators and the domain for as long as any session lives, so neither is released.
Op ops[op_count];
OrtCustomOpDomain* domain = nullptr;
const char* load_error = nullptr;
pthread_once_t once = PTHREAD_ONCE_INIT;

void initialize() {
  load_error = choose_isa();
  processors = usable_processors();
  pthread_key_create(&scratch_key, release_scratch);
}

pthread_mutex_t domain_mutex = PTHREAD_MUTEX_INITIALIZER;

// "1.23.2" -> 23; everything from 2.0 on is newer than any minor version asked for.
int minor_version(const char* text) {
  if (strncmp(text, "1.", 2) != 0) return 1000;
  int minor = 0;
  for (const char* digit = text + 2; *digit >= '0' && *digit <= '9'; ++digit) minor = 10 * minor + (*digit - '0');
  return minor;
}

OrtStatus* shared_domain(OrtApi api, const char* version) {
  if (domain) return nullptr;
  ort_minor = minor_version(version);
  for (size_t i = 0; i < op_count; ++i) {
    ops[i] = Op();
    definitions[i](&ops[i]);
    fill(&ops[i]);
  }
  OrtCustomOpDomain* created = nullptr;
  ISOFOLD_TRY(OrtCreateCustomOpDomain(api, "ai.isofold", &created));
  for (Op& op : ops) ISOFOLD_TRY(OrtCustomOpDomain_Add(api, created, &op));
  domain = created;
  return nullptr;
}

}  // namespace

// ---- op.h

OrtStatus* fail(OrtApi api, OrtErrorCode code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  OrtStatus* status = fail_v(api, code, format, arguments);
  va_end(arguments);
  return status;
}

OrtStatus* out_of_memory(OrtApi api, const char* op, size_t bytes) {
  return fail(api, ORT_FAIL, "%s: out of memory (%zu bytes of scratch memory)", op, bytes);
}

Text describe(OrtElementType type, const Shape& shape) {
  Text result;
  int at = snprintf(result.text, sizeof result.text, "%s [", type_name(type));
  for (int i = 0; i < shape.rank && at < int(sizeof result.text) - 32; ++i)
    at += snprintf(result.text + at, sizeof result.text - at, "%s%lld", i ? ", " : "", (long long)shape.dims[i]);
  snprintf(result.text + at, sizeof result.text - at, "]");
  return result;
}

void* thread_scratch(size_t bytes) {
  if (scratch.bytes >= bytes) return scratch.data;
  free(scratch.data);
  size_t rounded = (bytes + 4095) / 4096 * 4096;
  scratch.data = aligned_alloc(64, rounded);
  scratch.bytes = scratch.data ? rounded : 0;
  pthread_setspecific(scratch_key, scratch.data);
  return scratch.data;
}

int64_t most_pieces() {
  // Four pieces a processor even out threads that start late; a session with fewer threads loses nothing by it.
  return processors == 1 ? 1 : 4 * processors;
}

int64_t pieces(int64_t total, double nanoseconds) {
  // Waking the other threads costs two microseconds, a piece more a tenth of one.
  double work = nanoseconds * double(total);
  if (work < 6000) return 1;
  int64_t count = most_pieces();
  if (work < 1500.0 * double(count)) count = int64_t(work / 1500.0);
  return count < total ? count : total;
}

OrtStatus* Attributes::get(const char* name, int64_t* value) const {
  OrtStatus* status = OrtKernelInfoGetAttribute_int64(api, info, name, value);
  if (!status) return nullptr;
  OrtReleaseStatus(api, status);
  return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' (integer) is missing", op->name, name);
}

OrtStatus* Attributes::get(const char* name, float* value) const {
  OrtStatus* status = OrtKernelInfoGetAttribute_float(api, info, name, value);
  if (!status) return nullptr;
  OrtReleaseStatus(api, status);
  return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' (float) is missing", op->name, name);
}

OrtStatus* Attributes::get(const char* name, bool* value) const {
  int64_t integer = 0;
  ISOFOLD_TRY(get(name, &integer));
  *value = integer != 0;
  return nullptr;
}

OrtStatus* Attributes::choice(const char* name, const char* const* choices, int32_t* value) const {
  char text[64] = {};
  size_t size = sizeof text;
  OrtStatus* status = OrtKernelInfoGetAttribute_string(api, info, name, static_cast<char*>(text), &size);
  if (status) {
    OrtReleaseStatus(api, status);
    return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' (string) is missing or longer than %zu characters",
                op->name, name, sizeof text);
  }
  char expected[128] = {};
  for (int32_t i = 0; choices[i]; ++i) {
    if (strcmp(choices[i], text) == 0) {
      *value = i;
      return nullptr;
    }
    size_t used = strlen(expected);
    snprintf(expected + used, sizeof expected - used, "%s%s", i ? ", " : "", choices[i]);
  }
  return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' is '%s'; expected one of %s", op->name, name, text,
              expected);
}

OrtStatus* Attributes::activation(int32_t* value) const {
  static const char* const names[] = {"none", "relu", "gelu", "gelu_tanh", "silu", nullptr};
  return choice("activation", names, value);
}

OrtStatus* Attributes::levels(const char* name, float* value) const {
  int64_t bits = 0;
  ISOFOLD_TRY(get(name, &bits));
  if (bits != 4 && bits != 8)
    return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' is %lld; expected 4 or 8", op->name, name,
                (long long)bits);
  *value = float((1 << bits) - 1);
  return nullptr;
}

OrtStatus* Attributes::list(const char* name, int64_t* values, int* count, int capacity, int least) const {
  size_t size = 0;
  OrtStatus* status =
      OrtKernelInfoGetAttributeArray_int64(api, info, name, static_cast<int64_t*>(nullptr), &size);
  if (!status && size <= size_t(capacity) && size > 0)
    status = OrtKernelInfoGetAttributeArray_int64(api, info, name, values, &size);
  if (status) {
    OrtReleaseStatus(api, status);
    return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' (list of integers) is missing", op->name, name);
  }
  if (size > size_t(capacity) || size < size_t(least))
    return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' has %zu values; expected %d to %d", op->name, name, size,
                least, capacity);
  *count = int(size);
  return nullptr;
}

OrtStatus* Attributes::at_least(const char* name, int64_t low, int64_t* value) const {
  ISOFOLD_TRY(get(name, value));
  if (*value >= low) return nullptr;
  return fail(api, ORT_INVALID_ARGUMENT, "%s: attribute '%s' is %lld; expected at least %lld", op->name, name,
              (long long)*value, (long long)low);
}

OrtStatus* Context::bad_input(size_t index, const char* format, ...) const {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return fail(api, ORT_INVALID_ARGUMENT, "%s: input %zu (%s): %s", op->name, index, op->inputs[index].name, text);
}

OrtStatus* Context::bad(const char* format, ...) const {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return fail(api, ORT_INVALID_ARGUMENT, "%s: %s", op->name, text);
}

namespace {

OrtStatus* too_many_dimensions(const Context& context, size_t index, size_t rank) {
  return context.bad_input(index, "has %zu dimensions; at most 8 work", rank);
}

// Type and shape through an object that ONNX Runtime allocates and frees for it.
OrtStatus* copy_shape(const Context& context, size_t index, const OrtValue* value, Tensor* tensor) {
  OrtApi api = context.api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ISOFOLD_TRY(OrtGetTensorTypeAndShape(api, value, &info));
  size_t rank = 0;
  OrtStatus* status = OrtGetTensorElementType(api, info, &tensor->type);
  if (!status) status = OrtGetDimensionsCount(api, info, &rank);
  if (!status && rank > MAX_RANK) status = too_many_dimensions(context, index, rank);
  if (!status) status = OrtGetDimensions(api, info, static_cast<int64_t*>(tensor->shape.dims), rank);
  OrtReleaseTensorTypeAndShapeInfo(api, info);
  tensor->shape.rank = int(rank);
  return status;
}

OrtStatus* borrow_shape(const Context& context, size_t index, const OrtValue* value, Tensor* tensor) {
  const int64_t* dims = nullptr;
  size_t rank = 0;
  ISOFOLD_TRY(OrtGetTensorElementTypeAndShapeDataReference(context.api, value, &tensor->type, &dims, &rank));
  if (rank > MAX_RANK) return too_many_dimensions(context, index, rank);
  for (size_t i = 0; i < rank; ++i) tensor->shape.dims[i] = dims[i];
  tensor->shape.rank = int(rank);
  return nullptr;
}

}  // namespace

OrtStatus* read_tensor(const Context& context, size_t index, const OrtValue* value, Tensor* tensor) {
  bool borrows = context.api == borrowing_api;
  ISOFOLD_TRY((borrows ? borrow_shape : copy_shape)(context, index, value, tensor));
  ISOFOLD_TRY(OrtGetTensorMutableData(context.api, const_cast<OrtValue*>(value), &tensor->data));
  tensor->present = true;
  return nullptr;
}

OrtStatus* Context::input(size_t index, Tensor* tensor) const {
  const uint32_t bit = uint32_t(1) << index;
  if (kernel->constant & bit) {
    *tensor = kernel->constants[index];
    return nullptr;
  }
  *tensor = Tensor();
  if (index < input_count && !(__atomic_load_n(&kernel->absent, __ATOMIC_RELAXED) & bit)) {
    const OrtValue* value = nullptr;
    ISOFOLD_TRY(OrtKernelContext_GetInput(api, static_cast<const OrtKernelContext*>(context), index, &value));
    if (value) return read_tensor(*this, index, value, tensor);
    __atomic_fetch_or(&kernel->absent, bit, __ATOMIC_RELAXED);
  }
  if (op->inputs[index].presence == ORT_REQUIRED) return bad_input(index, "is missing, but required");
  return nullptr;
}

bool Context::is_fixed(size_t index) const {
  uint32_t absent = __atomic_load_n(&kernel->absent, __ATOMIC_RELAXED);
  return index >= input_count || ((kernel->constant | absent) >> index & 1);
}

OrtStatus* Context::output(size_t index, const Shape& shape, void** data) const {
  *data = nullptr;
  if (index >= output_count) return nullptr;
  OrtValue* value = nullptr;
  ISOFOLD_TRY(OrtKernelContext_GetOutput(api, context, index, static_cast<const int64_t*>(shape.dims),
                                         size_t(shape.rank), &value));
  return value ? OrtGetTensorMutableData(api, value, data) : nullptr;
}

OrtStatus* Context::expect(size_t index, const Tensor& tensor, OrtElementType type, const Shape& shape) const {
  if (!tensor.present || (tensor.type == type && tensor.shape == shape)) return nullptr;
  return bad_input(index, "expected %s, got %s", describe(type, shape).text,
                   describe(tensor.type, tensor.shape).text);
}

OrtStatus* Context::expect_last(size_t index, const Tensor& tensor, int64_t last) const {
  if (tensor.shape.rank >= 1 && tensor.shape[-1] == last) return nullptr;
  return bad_input(index, "expected a last dimension of %lld, got %s", (long long)last,
                   describe(tensor.type, tensor.shape).text);
}

bool Inference::has_input(size_t index) const {
  size_t count = 0;
  if (OrtStatus* status = OrtShapeInferContext_GetInputCount(api, static_cast<const OrtShapeInferContext*>(context),
                                                             &count)) {
    OrtReleaseStatus(api, status);
    return false;
  }
  return index < count;
}

OrtStatus* infer_linear(Inference& f) {
  SymbolicShape shape = f.input(0);
  int64_t n = f.integer("n", 0);
  if (!shape.known || n <= 0) return nullptr;
  shape.set(shape.rank - 1, n);
  return f.output(0, shape);
}

SymbolicShape Inference::input(size_t index) const {
  SymbolicShape result;
  if (!has_input(index)) return result;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  OrtStatus* status = OrtShapeInferContext_GetInputTypeShape(
      api, static_cast<const OrtShapeInferContext*>(context), index, &info);
  size_t rank = 0;
  if (!status && info) status = OrtGetDimensionsCount(api, info, &rank);
  // ONNX Runtime reports an unknown rank as 0, and no operator here takes scalars as its first input.
  if (!status && rank > 0 && rank <= MAX_RANK) {
    status = OrtGetDimensions(api, info, static_cast<int64_t*>(result.dims), rank);
    if (!status)
      status = OrtGetSymbolicDimensions(api, info, static_cast<const char**>(result.names), rank);
    result.rank = int(rank);
    result.known = !status;
  }
  if (status) OrtReleaseStatus(api, status);
  // The strings belong to the context's inputs, which outlive this call; `info` is a view of them.
  return result;
}

OrtStatus* Inference::output(size_t index, const SymbolicShape& shape) const {
  if (!shape.known) return nullptr;
  const char* names[MAX_RANK];
  for (int i = 0; i < shape.rank; ++i) {
    if (shape.is_unknown(i)) return nullptr;
    names[i] = shape.names[i] ? shape.names[i] : "";
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ISOFOLD_TRY(OrtCreateTensorTypeAndShapeInfo(api, &info));
  OrtStatus* status = OrtSetTensorElementType(api, info, op->outputs[index].type);
  if (!status)
    status = OrtSetDimensions(api, info, static_cast<const int64_t*>(shape.dims), size_t(shape.rank));
  if (!status) status = OrtSetSymbolicDimensions(api, info, static_cast<const char**>(names), size_t(shape.rank));
  if (!status)
    status = OrtShapeInferContext_SetOutputTypeShape(api, static_cast<const OrtShapeInferContext*>(context), index,
                                                     static_cast<const OrtTensorTypeAndShapeInfo*>(info));
  OrtReleaseTensorTypeAndShapeInfo(api, info);
  return status;
}

int Inference::integers(const char* name, int64_t* values, int capacity) const {
  const OrtOpAttr* attribute = nullptr;
  OrtStatus* status = OrtShapeInferContext_GetAttribute(api, static_cast<const OrtShapeInferContext*>(context), name,
                                                        &attribute);
  size_t bytes = 0;
  if (!status && attribute)
    status = OrtReadOpAttr(api, attribute, capacity == 1 ? ORT_ATTR_INT : ORT_ATTR_INTS, static_cast<void*>(values),
                           sizeof(int64_t) * size_t(capacity), &bytes);
  if (status) {
    OrtReleaseStatus(api, status);
    return 0;
  }
  return int(bytes / sizeof(int64_t));
}

int64_t Inference::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  return integers(name, &value, 1) == 1 ? value : otherwise;
}

}  // namespace isofold

#define ISOFOLD_EXPORT extern "C" __attribute__((visibility("default")))

// ONNX Runtime calls this when the library is registered with session options.
ISOFOLD_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace isofold;
  OrtApi api = base->GetApi(ORT_ABI_VERSION);
  // Before 1.17 there is no such interface, and no status can be made without one: register nothing, and models run
  // through the bodies of their functions.
  if (!api) return nullptr;
  pthread_once(&once, initialize);
  if (load_error) return fail(api, ORT_NOT_IMPLEMENTED, "%s", load_error);
  pthread_mutex_lock(&domain_mutex);
  global_api = api;
  // A version that it lacks makes ONNX Runtime complain on stderr, so that it is asked only where it is there.
  if (minor_version(base->GetVersionString()) >= ORT_ABI_BORROWED_SHAPES)
    borrowing_api = base->GetApi(ORT_ABI_BORROWED_SHAPES);
  OrtStatus* status = shared_domain(api, base->GetVersionString());
  pthread_mutex_unlock(&domain_mutex);
  return status ? status : OrtAddCustomOpDomain(api, options, domain);
}

// "isofold_ops version=... isa=... ort_abi=17", or why the library cannot run on this machine. Needs no ONNX Runtime.
ISOFOLD_EXPORT const char* isofold_ops_info(void) {
  using namespace isofold;
  static char text[320];
  pthread_once(&once, initialize);
  if (load_error)
    snprintf(text, sizeof text, "isofold_ops version=%s error=%s", ISOFOLD_OPS_VERSION, load_error);
  else
    snprintf(text, sizeof text, "isofold_ops version=%s isa=%s ort_abi=%d", ISOFOLD_OPS_VERSION,
             isa == ISOFOLD_V4 ? "v4" : "v3", int(ORT_ABI_VERSION));
  return text;
}
