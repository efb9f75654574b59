// The part of ONNX Runtime's C interface that the op library uses, declared here from its stable binary layout.
//
// ONNX Runtime hands out a table of function pointers whose order never changes: a version only appends. So a slot
// number and a signature are all that is needed, and no header of ONNX Runtime has to be installed to build. The
// slots below are those of API version 17 (ONNX Runtime 1.17), and one that a table may lack; tests/runtimes/onnx/oplib
// runs them all.
#ifndef ISOFOLD_ORT_ABI_H
#define ISOFOLD_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

extern "C" {

enum { ORT_ABI_VERSION = 17, ORT_ABI_BORROWED_SHAPES = 24 };

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtOpAttr;

// OrtApi is an array of function pointers.
typedef void (*OrtFunction)(void);
typedef const OrtFunction* OrtApi;

struct OrtApiBase {
  OrtApi (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
};

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };

enum OrtElementType {
  ORT_UNDEFINED = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_INT8 = 3,
  ORT_UINT16 = 4,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_BOOL = 9,
  ORT_FLOAT16 = 10,
};

enum OrtOpAttrType { ORT_ATTR_INT = 1, ORT_ATTR_INTS = 2, ORT_ATTR_FLOAT = 3, ORT_ATTR_STRING = 5 };

enum OrtPresence { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

// A custom operator: members in the order of API version 17. Unused members stay null.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElementType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  OrtPresence (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtPresence (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, OrtApi, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

// Slot number, name, signature.
#define ORT_FUNCTIONS(F)                                                                                        \
  F(0, CreateStatus, OrtStatus*, (OrtErrorCode, const char*))                                                   \
  F(26, CreateCustomOpDomain, OrtStatus*, (const char*, OrtCustomOpDomain**))                                   \
  F(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain*, const OrtCustomOp*))                               \
  F(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                                \
  F(51, GetTensorMutableData, OrtStatus*, (OrtValue*, void**))                                                  \
  F(57, CreateTensorTypeAndShapeInfo, OrtStatus*, (OrtTensorTypeAndShapeInfo**))                                \
  F(58, SetTensorElementType, OrtStatus*, (OrtTensorTypeAndShapeInfo*, OrtElementType))                         \
  F(59, SetDimensions, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t))                        \
  F(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, OrtElementType*))                  \
  F(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                            \
  F(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))                        \
  F(63, GetSymbolicDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, const char**, size_t))            \
  F(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))                      \
  F(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo*, const char*, float*))                  \
  F(86, KernelInfoGetAttribute_int64, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*))                \
  F(87, KernelInfoGetAttribute_string, OrtStatus*, (const OrtKernelInfo*, const char*, char*, size_t*))         \
  F(88, KernelContext_GetInputCount, OrtStatus*, (const OrtKernelContext*, size_t*))                            \
  F(89, KernelContext_GetOutputCount, OrtStatus*, (const OrtKernelContext*, size_t*))                           \
  F(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext*, size_t, const OrtValue**))                \
  F(91, KernelContext_GetOutput, OrtStatus*, (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))   \
  F(93, ReleaseStatus, void, (OrtStatus*))                                                                      \
  F(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo*))                                      \
  F(163, KernelInfoGetAttributeArray_int64, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*, size_t*)) \
  F(249, KernelInfoGetConstantInput_tensor, OrtStatus*, (const OrtKernelInfo*, size_t, int*, const OrtValue**)) \
  F(267, ShapeInferContext_GetInputCount, OrtStatus*, (const OrtShapeInferContext*, size_t*))                   \
  F(268, ShapeInferContext_GetInputTypeShape, OrtStatus*,                                                       \
    (const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**))                                         \
  F(269, ShapeInferContext_GetAttribute, OrtStatus*, (const OrtShapeInferContext*, const char*, const OrtOpAttr**)) \
  F(270, ShapeInferContext_SetOutputTypeShape, OrtStatus*,                                                      \
    (const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*))                                    \
  F(271, SetSymbolicDimensions, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const char**, size_t))                 \
  F(272, ReadOpAttr, OrtStatus*, (const OrtOpAttr*, OrtOpAttrType, void*, size_t, size_t*))                     \
  F(274, KernelContext_ParallelFor, OrtStatus*,                                                                 \
    (const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*))

// The last slot of API version 24 (ORT_ABI_BORROWED_SHAPES): type, dimensions (the value's own) and rank of a tensor.
#define ORT_LATER_FUNCTIONS(F) \
  F(414, GetTensorElementTypeAndShapeDataReference, OrtStatus*, \
    (const OrtValue*, OrtElementType*, const int64_t**, size_t*))

#define ORT_DECLARE(slot, name, result, arguments)                     \
  template <class... A>                                                \
  static inline result Ort##name(OrtApi api, A... a) {                 \
    return reinterpret_cast<result(*) arguments>(api[slot])(a...);     \
  }
ORT_FUNCTIONS(ORT_DECLARE)
ORT_LATER_FUNCTIONS(ORT_DECLARE)
#undef ORT_DECLARE

#endif  // ISOFOLD_ORT_ABI_H
