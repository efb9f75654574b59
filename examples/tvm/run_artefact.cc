// Runs an artefact of `isofold.compile(..., target="tvm-cpu")` without Python.
//
//     run_artefact FOLDER INPUTS.safetensors
//
// INPUTS holds one tensor for each input of the model, by name. Every result is printed as one line, "name shape: values".
// Nothing of the weights is copied: the file is mapped, and tensors point into it.
//
//     g++ -std=c++17 -O2 run_artefact.cc -I$FFI/include -L$FFI/lib -L$TVM/lib -ltvm_ffi -Wl,--no-as-needed -ltvm_runtime
//
// with FFI and TVM the folders of the Python packages tvm_ffi and tvm (their wheels carry headers and libraries).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace ffi = tvm::ffi;
using Tensors = std::map<std::string, ffi::Tensor>;

// A tensor over memory that outlives it.
struct Borrowed {
  DLManagedTensor managed;
  std::vector<int64_t> shape;
};

ffi::Tensor borrow(void* data, DLDataType type, std::vector<int64_t> shape) {
  auto* held = new Borrowed{{}, std::move(shape)};
  held->managed.dl_tensor = {data, {kDLCPU, 0}, int32_t(held->shape.size()), type, held->shape.data(), nullptr, 0};
  held->managed.manager_ctx = held;
  held->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Borrowed*>(self->manager_ctx); };
  return ffi::Tensor::FromDLPack(&held->managed);
}

DLDataType type_of(const std::string& code) {
  static const std::map<std::string, DLDataType> types = {
      {"F64", {kDLFloat, 64, 1}}, {"F32", {kDLFloat, 32, 1}}, {"F16", {kDLFloat, 16, 1}}, {"BF16", {kDLBfloat, 16, 1}},
      {"I64", {kDLInt, 64, 1}},   {"I32", {kDLInt, 32, 1}},   {"I16", {kDLInt, 16, 1}},   {"I8", {kDLInt, 8, 1}},
      {"U16", {kDLUInt, 16, 1}},  {"U8", {kDLUInt, 8, 1}},    {"BOOL", {kDLBool, 8, 1}}};
  auto found = types.find(code);
  if (found == types.end()) throw std::runtime_error("unknown type " + code);
  return found->second;
}

// The part of JSON that a safetensors header is made of: objects, strings, lists of whole numbers.
class Header {
 public:
  Header(const char* begin, const char* end, char* data) : at_(begin), end_(end), data_(data) {}

  Tensors read() {
    Tensors found;
    each([&](const std::string& name) {
      std::string type;
      std::vector<int64_t> shape, place;
      bool is_tensor = name != "__metadata__";
      each([&](const std::string& key) {
        if (!is_tensor || key == "dtype") {
          type = text();
        } else {
          (key == "shape" ? shape : place) = numbers();
        }
      });
      if (is_tensor) found.emplace(name, borrow(data_ + place.at(0), type_of(type), shape));
    });
    return found;
  }

 private:
  template <class F>
  void each(const F& member) {
    expect('{');
    while (next() != '}') {
      std::string key = text();
      expect(':');
      member(key);
      if (next() == ',') ++at_;
    }
    expect('}');
  }

  std::string text() {
    expect('"');
    std::string made;
    while (at_ < end_ && *at_ != '"') made += *at_ == '\\' ? *(at_ += 1)++ : *at_++;
    expect('"');
    return made;
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> made;
    expect('[');
    while (next() != ']') {
      char* after = nullptr;
      made.push_back(strtoll(at_, &after, 10));
      at_ = after;
      if (next() == ',') ++at_;
    }
    expect(']');
    return made;
  }

  char next() {
    while (at_ < end_ && strchr(" \n\t", *at_)) ++at_;
    if (at_ >= end_) throw std::runtime_error("the header ends too early");
    return *at_;
  }

  void expect(char wanted) {
    if (next() != wanted) throw std::runtime_error(std::string("the header has no ") + wanted + " where it should");
    ++at_;
  }

  const char *at_, *end_;
  char* data_;
};

// The tensors of a safetensors file, mapped; they start at multiples of 64 bytes, which kernels need.
Tensors read_tensors(const std::string& path) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat facts;
  if (file < 0 || fstat(file, &facts) != 0) throw std::runtime_error("cannot open " + path);
  void* mapped = mmap(nullptr, size_t(facts.st_size), PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  char* bytes = static_cast<char*>(mapped);
  uint64_t length;
  memcpy(&length, bytes, sizeof length);
  return Header(bytes + 8, bytes + 8 + length, bytes + 8 + length).read();
}

// Calls a function of the virtual machine with any number of arguments.
ffi::Any call(const ffi::Module& vm, const char* name, const std::vector<ffi::AnyView>& arguments) {
  auto function = vm->GetFunction(name);
  if (!function.has_value()) throw std::runtime_error(std::string("the executable has no function ") + name);
  ffi::Any result;
  function.value().CallPacked(arguments.data(), int32_t(arguments.size()), &result);
  return result;
}

std::vector<std::string> parameters(const ffi::Module& vm, const char* function) {
  std::vector<std::string> names;
  int count = call(vm, "get_function_arity", {function}).cast<int>();
  for (int i = 0; i < count; ++i)
    names.push_back(std::string(call(vm, "get_function_param_name", {function, i}).cast<ffi::String>()));
  return names;
}

bool has_function(const ffi::Module& vm, const char* name) {
  try {
    return call(vm, "get_function_arity", {name}).cast<int>() >= 0;
  } catch (const std::exception&) {
    return false;
  }
}

void print(int position, const ffi::Tensor& t) {
  printf("%d [", position);
  int64_t count = 1;
  for (int i = 0; i < t.ndim(); ++i) {
    printf("%s%lld", i ? ", " : "", (long long)t.size(i));
    count *= t.size(i);
  }
  printf("]:");
  for (int64_t i = 0; i < count; ++i) {
    if (t.dtype().code == kDLFloat && t.dtype().bits == 32)
      printf(" %.9g", double(static_cast<const float*>(t.data_ptr())[i]));
    else if (t.dtype().bits == 64)
      printf(" %lld", (long long)static_cast<const int64_t*>(t.data_ptr())[i]);
    else
      printf(" %d", int(static_cast<const uint8_t*>(t.data_ptr())[i]));
  }
  printf("\n");
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: run_artefact FOLDER INPUTS.safetensors\n");
    return 2;
  }
  try {
    std::string folder = argv[1];
    ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
    ffi::Module vm = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    const int cpu = 1, device = 0, pooled = 2;
    call(vm, "vm_initialization", {cpu, device, pooled});

    // Weights are the arguments behind the inputs, by name; what `prepare` makes of them comes last.
    Tensors weights = read_tensors(folder + "/weights.safetensors"), inputs = read_tensors(argv[2]);
    std::vector<ffi::AnyView> bound = {"main", "run", 1}, given;
    for (const std::string& name : parameters(vm, "main"))
      if (weights.count(name)) bound.push_back(weights.at(name));
    ffi::Array<ffi::Tensor> prepared;
    if (has_function(vm, "prepare")) {
      std::vector<ffi::AnyView> needed;
      for (const std::string& name : parameters(vm, "prepare")) needed.push_back(weights.at(name));
      prepared = call(vm, "prepare", needed).cast<ffi::Array<ffi::Tensor>>();
      for (const ffi::Tensor& made : prepared) bound.push_back(made);
    }
    call(vm, "save_function", bound);

    for (const std::string& name : parameters(vm, "main"))
      if (inputs.count(name)) given.push_back(inputs.at(name));
    auto results = call(vm, "run", given).cast<ffi::Array<ffi::Tensor>>();
    for (size_t i = 0; i < results.size(); ++i) print(int(i), results[i]);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
