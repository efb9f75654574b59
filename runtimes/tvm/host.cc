// The op library inside a TVM executable: ONNX Runtime's interface to it, presented by TVM's runtime.
//
// The operators (runtimes/onnx/oplib) see their host as a table of functions, opaque values and an opaque context. Here
// a value is a DLTensor, the context is the list of tensors of one call, and work is spread over TVM's threads. So the
// same objects with the same kernels and the same packed bytes run under both runtimes.
//
// Relax calls `isofold_op(description, inputs..., outputs...)`. The description is one line,
//
//     PackedLinear in=11101100 out=1 n=i:768 activation=s:gelu scale_multiplier=f:0x1p-4 hadamard=l:2,3
//
// with one digit for each input and output of the operator: whether it is among the tensors. It is constant for a
// place in the program, so that its kernel object is made at the first call and found by the string's address later.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tvm/ffi/c_api.h>

#include "ort_abi.h"

struct OrtApiBase;
struct OrtSessionOptions;
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);
extern "C" const char* isofold_ops_info(void);

#define EXPORT extern "C" __attribute__((visibility("default")))

// TVM's runtime puts its own functions here when it loads the library; generated code has the same weak variable.
typedef int (*ParallelTask)(int task, void* environment, void* data);
extern "C" {
__attribute__((visibility("default"), weak)) int (*__TVMBackendParallelLaunch)(ParallelTask, void*, int) = nullptr;
}

struct OrtStatus {
  char text[1024];
};

struct OrtCustomOpDomain {
  enum { CAPACITY = 64 };
  const OrtCustomOp* ops[CAPACITY];
  size_t count;
};

namespace {

enum { MOST_INPUTS = 16, MOST_OUTPUTS = 4, MOST_ATTRIBUTES = 32, VERSION = ORT_ABI_BORROWED_SHAPES };

struct Attribute {
  const char* name;
  char kind;  // i, f, s, l
  const char* text;
};

// The attributes of a description, cut in place.
struct Attributes {
  Attribute all[MOST_ATTRIBUTES];
  int count;

  const char* find(const char* name, char kind) const {
    for (int i = 0; i < count; ++i)
      if (all[i].kind == kind && strcmp(all[i].name, name) == 0) return all[i].text;
    return nullptr;
  }
};

// A kernel object and which of its inputs and outputs come with a call.
struct Kernel {
  const OrtCustomOp* op;
  void* object;
  int input_count, output_count;          // of the operator
  int inputs[MOST_INPUTS], given_inputs;  // slots of those that come with a call
  int outputs[MOST_OUTPUTS], given_outputs;
  char* description;
  size_t length;
  Kernel* next;
};

struct Call {
  const Kernel* kernel;
  DLTensor* inputs[MOST_INPUTS];
  DLTensor* outputs[MOST_OUTPUTS];
};

OrtStatus* status(const char* text) {
  auto* made = static_cast<OrtStatus*>(malloc(sizeof(OrtStatus)));
  if (!made) abort();
  snprintf(made->text, sizeof made->text, "%s", text);
  return made;
}

const DLTensor* tensor(const OrtValue* value) { return reinterpret_cast<const DLTensor*>(value); }
const Attributes& attributes(const OrtKernelInfo* info) { return *reinterpret_cast<const Attributes*>(info); }
const Call& call(const OrtKernelContext* context) { return *reinterpret_cast<const Call*>(context); }

OrtElementType element_type(DLDataType type) {
  if (type.lanes != 1) return ORT_UNDEFINED;
  switch (type.code * 256 + type.bits) {
    case kDLFloat * 256 + 32: return ORT_FLOAT;
    case kDLFloat * 256 + 16: return ORT_FLOAT16;
    case kDLUInt * 256 + 8: return ORT_UINT8;
    case kDLUInt * 256 + 16: return ORT_UINT16;
    case kDLInt * 256 + 8: return ORT_INT8;
    case kDLInt * 256 + 32: return ORT_INT32;
    case kDLInt * 256 + 64: return ORT_INT64;
    case kDLBool * 256 + 8:
    case kDLUInt * 256 + 1: return ORT_BOOL;
    case kDLFloat * 256 + 64: return OrtElementType(11);
    case kDLBfloat * 256 + 16: return OrtElementType(16);
    default: return ORT_UNDEFINED;
  }
}

// ---- the functions of the table, named as in ORT_FUNCTIONS

OrtStatus* CreateStatus(OrtErrorCode, const char* text) { return status(text); }
void ReleaseStatus(OrtStatus* made) { free(made); }

OrtStatus* CreateCustomOpDomain(const char*, OrtCustomOpDomain** domain) {
  *domain = static_cast<OrtCustomOpDomain*>(calloc(1, sizeof(OrtCustomOpDomain)));
  return *domain ? nullptr : status("out of memory");
}

OrtStatus* CustomOpDomain_Add(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  if (domain->count == OrtCustomOpDomain::CAPACITY) return status("the op library has more operators than host.cc takes");
  domain->ops[domain->count++] = op;
  return nullptr;
}

OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  *reinterpret_cast<OrtCustomOpDomain**>(options) = domain;
  return nullptr;
}

OrtStatus* GetTensorMutableData(OrtValue* value, void** data) {
  const DLTensor* t = tensor(value);
  *data = static_cast<char*>(t->data) + t->byte_offset;
  return nullptr;
}

OrtStatus* GetTensorElementTypeAndShapeDataReference(const OrtValue* value, OrtElementType* type,
                                                     const int64_t** dims, size_t* rank) {
  const DLTensor* t = tensor(value);
  *type = element_type(t->dtype);
  *dims = t->shape;
  *rank = size_t(t->ndim);
  return nullptr;
}

OrtStatus* KernelInfoGetAttribute_float(const OrtKernelInfo* info, const char* name, float* value) {
  const char* text = attributes(info).find(name, 'f');
  if (!text) return status("no such attribute");
  *value = strtof(text, nullptr);
  return nullptr;
}

OrtStatus* KernelInfoGetAttribute_int64(const OrtKernelInfo* info, const char* name, int64_t* value) {
  const char* text = attributes(info).find(name, 'i');
  if (!text) return status("no such attribute");
  *value = strtoll(text, nullptr, 10);
  return nullptr;
}

OrtStatus* KernelInfoGetAttribute_string(const OrtKernelInfo* info, const char* name, char* out, size_t* size) {
  const char* text = attributes(info).find(name, 's');
  size_t needed = text ? strlen(text) + 1 : 0;
  if (!text || needed > *size) return status("no such attribute, or too long");
  memcpy(out, text, needed);
  *size = needed;
  return nullptr;
}

OrtStatus* KernelInfoGetAttributeArray_int64(const OrtKernelInfo* info, const char* name, int64_t* out, size_t* size) {
  const char* text = attributes(info).find(name, 'l');
  if (!text) return status("no such attribute");
  size_t count = 0;
  while (*text) {
    char* end = nullptr;
    int64_t value = strtoll(text, &end, 10);
    if (out) {
      if (count == *size) return status("more values than asked for");
      out[count] = value;
    }
    ++count;
    text = *end == ',' ? end + 1 : end;
    if (end == text && *text) return status("not a list of integers");
  }
  *size = count;
  return nullptr;
}

// Weights are arguments of the executable, so no input is known when a kernel is made.
OrtStatus* KernelInfoGetConstantInput_tensor(const OrtKernelInfo*, size_t, int* constant, const OrtValue** value) {
  *constant = 0;
  *value = nullptr;
  return nullptr;
}

OrtStatus* KernelContext_GetInputCount(const OrtKernelContext* context, size_t* count) {
  *count = size_t(call(context).kernel->input_count);
  return nullptr;
}

OrtStatus* KernelContext_GetOutputCount(const OrtKernelContext* context, size_t* count) {
  *count = size_t(call(context).kernel->output_count);
  return nullptr;
}

OrtStatus* KernelContext_GetInput(const OrtKernelContext* context, size_t index, const OrtValue** value) {
  *value = reinterpret_cast<const OrtValue*>(call(context).inputs[index]);
  return nullptr;
}

// Relax allocates results by the shapes that the compiler derived; another shape is a defect of one of the two.
OrtStatus* KernelContext_GetOutput(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                                   OrtValue** value) {
  DLTensor* t = call(context).outputs[index];
  *value = reinterpret_cast<OrtValue*>(t);
  if (!t || (size_t(t->ndim) == rank && memcmp(t->shape, dims, rank * sizeof(int64_t)) == 0)) return nullptr;
  char text[512];
  int at = snprintf(text, sizeof text, "%s: result %zu has the shape [", call(context).kernel->op->GetName(
                        call(context).kernel->op), index);
  for (size_t i = 0; i < rank && at < 200; ++i)
    at += snprintf(text + at, sizeof text - at, "%s%lld", i ? ", " : "", (long long)dims[i]);
  at += snprintf(text + at, sizeof text - at, "], the executable expects [");
  for (int i = 0; i < t->ndim && at < 450; ++i)
    at += snprintf(text + at, sizeof text - at, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
  snprintf(text + at, sizeof text - at, "]");
  return status(text);
}

// Pieces are handed out in order to whichever thread is free, as ONNX Runtime does.
struct Loop {
  void (*run)(void*, size_t);
  void* data;
  size_t total, next;
};

int run_pieces(int, void*, void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (size_t i; (i = __atomic_fetch_add(&loop.next, 1, __ATOMIC_RELAXED)) < loop.total;) loop.run(loop.data, i);
  return 0;
}

OrtStatus* KernelContext_ParallelFor(const OrtKernelContext*, void (*run)(void*, size_t), size_t total, size_t,
                                     void* data) {
  Loop loop{run, data, total, 0};
  if (total <= 1 || !__TVMBackendParallelLaunch) {
    run_pieces(0, nullptr, &loop);
    return nullptr;
  }
  return __TVMBackendParallelLaunch(run_pieces, &loop, 0) == 0 ? nullptr : status("TVM's thread pool failed");
}

OrtStatus* missing() { return status("the op library asked for a function that TVM's host does not provide"); }

// ---- the table

enum { SLOTS = 415 };
OrtFunction table[SLOTS];

OrtApi api_of(uint32_t version) { return version <= VERSION ? table : nullptr; }
const char* version_string() { return "1.24.0"; }

OrtCustomOpDomain* domain = nullptr;
char load_error[1024];
pthread_once_t once = PTHREAD_ONCE_INIT;

void initialize() {
  for (OrtFunction& slot : table) slot = reinterpret_cast<OrtFunction>(missing);
#define SLOT(number, name) table[number] = reinterpret_cast<OrtFunction>(name)
  SLOT(0, CreateStatus);
  SLOT(26, CreateCustomOpDomain);
  SLOT(27, CustomOpDomain_Add);
  SLOT(28, AddCustomOpDomain);
  SLOT(51, GetTensorMutableData);
  SLOT(85, KernelInfoGetAttribute_float);
  SLOT(86, KernelInfoGetAttribute_int64);
  SLOT(87, KernelInfoGetAttribute_string);
  SLOT(88, KernelContext_GetInputCount);
  SLOT(89, KernelContext_GetOutputCount);
  SLOT(90, KernelContext_GetInput);
  SLOT(91, KernelContext_GetOutput);
  SLOT(93, ReleaseStatus);
  SLOT(163, KernelInfoGetAttributeArray_int64);
  SLOT(249, KernelInfoGetConstantInput_tensor);
  SLOT(274, KernelContext_ParallelFor);
  SLOT(414, GetTensorElementTypeAndShapeDataReference);
#undef SLOT
  static const OrtApiBase base{api_of, version_string};
  OrtStatus* failed = RegisterCustomOps(reinterpret_cast<OrtSessionOptions*>(&domain), &base);
  if (!failed && domain) return;
  snprintf(load_error, sizeof load_error, "%s", failed ? failed->text : "the op library registered nothing");
  free(failed);
}

// ---- kernels by description

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
Kernel* kernels = nullptr;  // all of them, newest first; they live as long as the process

enum { TABLE = 4096 };
Kernel* by_address[TABLE];  // the last one whose description was at an address with this hash

bool describes(const Kernel* kernel, const TVMFFIByteArray& text) {
  return kernel->length == text.size && memcmp(kernel->description, text.data, text.size) == 0;
}

int slots(const char* flags, int most, int* given, int* count) {
  int found = 0;
  *count = int(strlen(flags));
  if (*count > most) return -1;
  for (int i = 0; i < *count; ++i)
    if (flags[i] == '1') given[found++] = i;
  return found;
}

OrtStatus* create(const TVMFFIByteArray& text, Kernel** made) {
  auto* kernel = static_cast<Kernel*>(calloc(1, sizeof(Kernel)));
  char* cut = static_cast<char*>(malloc(text.size + 1));
  char* kept = static_cast<char*>(malloc(text.size + 1));
  if (!kernel || !cut || !kept) abort();
  memcpy(cut, text.data, text.size);
  memcpy(kept, text.data, text.size);
  cut[text.size] = kept[text.size] = 0;
  kernel->description = kept;
  kernel->length = text.size;
  kernel->given_inputs = kernel->given_outputs = -1;
  Attributes attributes{};
  char* save = nullptr;
  const char* name = strtok_r(cut, " ", &save);
  bool sound = name != nullptr;
  while (char* word = sound ? strtok_r(nullptr, " ", &save) : nullptr) {
    char* value = strchr(word, '=');
    if (!value || attributes.count == MOST_ATTRIBUTES) sound = false;
    if (!sound) break;
    *value++ = 0;
    if (strcmp(word, "in") == 0)
      kernel->given_inputs = slots(value, MOST_INPUTS, kernel->inputs, &kernel->input_count);
    else if (strcmp(word, "out") == 0)
      kernel->given_outputs = slots(value, MOST_OUTPUTS, kernel->outputs, &kernel->output_count);
    else if (value[0] && value[1] == ':')
      attributes.all[attributes.count++] = {word, value[0], value + 2};
    else
      sound = false;
  }
  OrtStatus* failed = nullptr;
  if (!sound || kernel->given_inputs < 0 || kernel->given_outputs < 0) {
    failed = status("isofold_op: the description of an operator is malformed");
  } else {
    for (size_t i = 0; i < domain->count && !kernel->op; ++i)
      if (strcmp(domain->ops[i]->GetName(domain->ops[i]), name) == 0) kernel->op = domain->ops[i];
    if (kernel->op)
      failed = kernel->op->CreateKernelV2(kernel->op, table, reinterpret_cast<const OrtKernelInfo*>(&attributes),
                                          &kernel->object);
    else
      failed = status("isofold_op: the op library in this file has no operator of this name");
  }
  free(cut);
  if (failed) {
    free(kept);
    free(kernel);
    return failed;
  }
  *made = kernel;
  return nullptr;
}

OrtStatus* kernel_of(const TVMFFIByteArray& text, Kernel** found) {
  size_t hash = (reinterpret_cast<uintptr_t>(text.data) >> 4) * 0x9E3779B97F4A7C15u >> 52;
  Kernel** slot = &by_address[hash % TABLE];
  Kernel* last = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
  if (last && describes(last, text)) {
    *found = last;
    return nullptr;
  }
  pthread_mutex_lock(&mutex);
  Kernel* kernel = kernels;
  while (kernel && !describes(kernel, text)) kernel = kernel->next;
  OrtStatus* failed = nullptr;
  if (!kernel && !(failed = create(text, &kernel))) {
    kernel->next = kernels;
    kernels = kernel;
  }
  pthread_mutex_unlock(&mutex);
  if (failed) return failed;
  __atomic_store_n(slot, kernel, __ATOMIC_RELEASE);
  *found = kernel;
  return nullptr;
}

bool as_text(const TVMFFIAny& value, TVMFFIByteArray* text) {
  if (value.type_index == kTVMFFIStr) {
    *text = *reinterpret_cast<const TVMFFIByteArray*>(reinterpret_cast<const char*>(value.v_obj) + sizeof(TVMFFIObject));
  } else if (value.type_index == kTVMFFIRawStr) {
    *text = {value.v_c_str, strlen(value.v_c_str)};
  } else {
    return false;
  }
  return true;
}

DLTensor* as_tensor(const TVMFFIAny& value) {
  if (value.type_index == kTVMFFITensor)
    return reinterpret_cast<DLTensor*>(reinterpret_cast<char*>(value.v_obj) + sizeof(TVMFFIObject));
  return value.type_index == kTVMFFIDLTensorPtr ? static_cast<DLTensor*>(value.v_ptr) : nullptr;
}

int raise(const char* text) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
  return -1;
}

bool contiguous(const DLTensor& t) {
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] == 0) return true;  // strides of nothing mean nothing
  if (!t.strides) return true;
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; step *= t.shape[i--])
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
  return true;
}

}  // namespace

// Symbols that begin so are what TVM's loader takes for functions of the library.
EXPORT int __tvm_ffi_isofold_op(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  pthread_once(&once, initialize);
  if (load_error[0]) return raise(load_error);
  TVMFFIByteArray text;
  if (count < 1 || !as_text(args[0], &text)) return raise("isofold_op: the first argument must be a description");
  Kernel* kernel = nullptr;
  OrtStatus* failed = kernel_of(text, &kernel);
  if (!failed) {
    if (count != 1 + kernel->given_inputs + kernel->given_outputs)
      return raise("isofold_op: the number of tensors is not what the description says");
    Call now{};
    now.kernel = kernel;
    const TVMFFIAny* next = args + 1;
    for (int i = 0; i < kernel->given_inputs + kernel->given_outputs; ++i) {
      DLTensor* t = as_tensor(*next++);
      if (!t) return raise("isofold_op: an argument is not a tensor");
      if (!contiguous(*t)) return raise("isofold_op: an argument is not contiguous");
      if (i < kernel->given_inputs)
        now.inputs[kernel->inputs[i]] = t;
      else
        now.outputs[kernel->outputs[i - kernel->given_inputs]] = t;
    }
    failed = kernel->op->KernelComputeV2(kernel->object, reinterpret_cast<OrtKernelContext*>(&now));
  }
  if (failed) {
    raise(failed->text);
    free(failed);
    return -1;
  }
  result->type_index = kTVMFFINone;
  result->v_int64 = 0;
  return 0;
}

// What the library is and which instruction set it chose.
EXPORT int __tvm_ffi_isofold_info(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) {
  const char* text = isofold_ops_info();
  TVMFFIByteArray bytes{text, strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}
