// What a tuning candidate is linked with: it fills memory with a workload, runs it and takes the time.
//
// The functions follow TVM FFI's calling convention (tvm/ffi/c_api.h), so that one file is called by a local worker and by
// TVM's RPC server alike. Memory comes from the caller as byte tensors, once for all candidates of a comparison: where memory
// lies changes its speed. The linear's structures are filled by name; a new member of theirs is zero here.
#include <dlpack/dlpack.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "kernels.h"
#include "dense_driver.h"
#include "linear_driver.h"
#include "linear_float_driver.h"

extern "C" const struct isofold_kernels isofold_candidate;

namespace {

// The order of Workload.spec() in workloads.py; floats: 1 packed weights, 2 float32 ones, 3
// attention (k: width of a head, n: keys, m: queries).
struct Spec {
  int64_t isa, floats, bits, group, zero, gated, k, n, m, threads, layers, heads;
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

enum { ATTENTION_BLOCK = 32, ATTENTION_FEW = 4, ATTENTION_MOST_KEYS = 256 };  // as in attention.cc; the knob's largest

// Bytes of a thread's scratch: the same for all candidates, as the arena is.
int64_t attention_scratch(const Spec& s) {
  int64_t keys = ATTENTION_MOST_KEYS;
  return 4 * round_up(ATTENTION_BLOCK * (2 * s.k + keys + 18) + keys * round_up(s.k, 16) + s.n + 32, 16);
}

// Where the parts of a workload lie, in bytes from the start: what all layers share, then the layers.
struct Plan {
  int64_t kp, panels, groups;
  int64_t input, params, scratch, layers;
  int64_t scale, zero, wsum, layer;  // from a layer's start, which is its weight; and its size

  explicit Plan(const Spec& s) {
    kp = round_up(s.k, s.group > 32 ? s.group : 32);
    panels = (s.gated ? 2 : 1) * ((s.n + 15) / 16);
    if (s.floats == 2) panels = round_up(panels, 2);
    if (s.floats == 3) {  // queries, a scratch for each thread, then keys and values
      kp = panels = groups = input = params = zero = wsum = 0;
      scratch = round_up(s.m * s.heads * s.k * 4, 64);
      layers = round_up(scratch + attention_scratch(s) * s.threads, 4096);
      scale = s.n * s.heads * s.k * 8;
      layer = round_up(scale, 4096);
      return;
    }
    groups = s.group ? kp / s.group : 1;
    input = 0;
    params = round_up(s.m * (s.floats ? s.k * 4 : kp), 64);
    scratch = params + round_up(s.m * 8, 64);
    layers = round_up(scratch + s.m * groups * 8 + 128, 4096);
    scale = round_up(panels * kp * 2 * s.bits, 64);
    zero = scale + round_up(panels * groups * 16 * (s.group ? 2 : 4), 64);
    wsum = zero + round_up(panels * groups * 16, 64);
    layer = round_up(wsum + panels * 64, 4096);
  }
  int64_t bytes(const Spec& s) const { return layers + s.layers * layer + 8192; }  // prefetches may run past the end
};

DLTensor* tensor(const TVMFFIAny& any) {
  if (any.type_index == kTVMFFIDLTensorPtr) return static_cast<DLTensor*>(any.v_ptr);
  return any.type_index == kTVMFFITensor ? TVMFFITensorGetDLTensorPtr(any.v_obj) : nullptr;
}

template <class Type>
Type* data(const TVMFFIAny& any) {
  DLTensor* t = tensor(any);
  return t ? reinterpret_cast<Type*>(static_cast<char*>(t->data) + t->byte_offset) : nullptr;
}

char* aligned(const TVMFFIAny& any) {
  return reinterpret_cast<char*>(round_up(int64_t(data<char>(any)), 4096));
}

int64_t integer(const TVMFFIAny& any) { return any.v_int64; }

int answer(TVMFFIAny* result, int64_t value) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = value;
  return 0;
}

uint64_t next(uint64_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

void fill(const Spec& s, char* base) {
  Plan p(s);
  uint64_t state = 0x9e3779b97f4a7c15u;
  if (s.floats) {
    auto* x = reinterpret_cast<float*>(base + p.input);
    for (int64_t i = 0; i < s.m * s.k * (s.floats == 3 ? s.heads : 1); ++i) x[i] = float(int64_t(next(&state) >> 40)) / (1 << 23) - 1;
  } else {
    for (int64_t i = 0; i < s.m * p.kp; ++i) base[p.input + i] = char(next(&state) >> 32);
  }
  auto* params = reinterpret_cast<float*>(base + p.params);
  for (int64_t i = 0; i < (s.floats == 3 ? 0 : s.m); ++i) params[2 * i] = 0.01f + 0.001f * float(i % 7), params[2 * i + 1] = float(i % 200);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    char* at = base + p.layers + layer * p.layer;
    auto* words = reinterpret_cast<uint64_t*>(at);
    for (int64_t i = 0; i < p.layer / 8; ++i) words[i] = next(&state);
    if (s.floats >= 2)
      for (int64_t i = 0; i < p.scale / 4; ++i)
        reinterpret_cast<float*>(at)[i] = float(int64_t(next(&state) >> 40)) / (1 << 23) - 1;
    int64_t scales = p.panels * p.groups * 16;
    if (s.group)
      for (int64_t i = 0; i < scales; ++i)  // float16 from 2^-5 to 2^-4
        reinterpret_cast<uint16_t*>(at + p.scale)[i] = uint16_t(0x2800 | (next(&state) >> 54));
    else
      for (int64_t i = 0; i < scales; ++i)
        reinterpret_cast<float*>(at + p.scale)[i] = 0.03125f + float(next(&state) >> 59) / 1024;
    for (int64_t i = 0; i < scales; ++i) at[p.zero + i] = char(int64_t(next(&state) >> 60) - 8);
    for (int64_t i = 0; i < p.panels * 16; ++i)
      reinterpret_cast<float*>(at + p.wsum)[i] = float(int64_t(next(&state) >> 56)) / 256;
  }
}

// One run over layers first .. first + count (modulo all), shared out over threads that meet after every layer.
struct Run {
  const Spec* s;
  Plan p;
  char* base;
  float* y;
  int64_t first, count;
  int arrived, phase;
};

struct Part {
  Run* run;
  int64_t index;
};

void meet(Run* r) {
  int phase = __atomic_load_n(&r->phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&r->arrived, 1, __ATOMIC_ACQ_REL) == r->s->threads) {
    __atomic_store_n(&r->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&r->phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int64_t spins = 0; __atomic_load_n(&r->phase, __ATOMIC_ACQUIRE) == phase; ++spins)
    if (spins > 20000) sched_yield();  // more threads than free cores
}

// Heads one after another, 32 queries at a time (few queries: one).
void attention(Run* r, const float* keys, int64_t index) {
  const Spec& s = *r->s;
  const float *values = keys + s.n * s.heads * s.k, *q = reinterpret_cast<float*>(r->base + r->p.input);
  auto* scratch = reinterpret_cast<float*>(r->base + r->p.scratch + attention_scratch(s) * index);
  const struct isofold_kernels* k = &isofold_candidate;
  int64_t row = s.heads * s.k, block = s.m < ATTENTION_FEW ? 1 : ATTENTION_BLOCK;
  int64_t blocks = (s.m + block - 1) / block, tasks = s.heads * blocks;
  for (int64_t task = tasks * index / s.threads; task < tasks * (index + 1) / s.threads; ++task) {
    int64_t head = task / blocks * s.k, first = task % blocks * block;
    int64_t count = s.m - first < block ? s.m - first : block;
    const float* q_at = q + first * row + head;
    float* y_at = r->y + first * row + head;
    if (block == 1) {
      k->attention_row(q_at, keys + head, values + head, nullptr, nullptr, y_at, scratch, row, row, s.n, s.k, s.k, 0, 0,
                       0.1f, 0);
      continue;
    }
    auto run = count <= 16 ? k->attention_block16 : k->attention_block32;
    run(q_at, keys + head, values + head, nullptr, nullptr, y_at, scratch, count, row, row, row, row, s.n, s.k, s.k, first,
        0, 0, 0, 0, 0.1f, 0);
  }
}

void layer(Run* r, int64_t which, int64_t index) {
  const Spec& s = *r->s;
  const Plan& p = r->p;
  char* at = r->base + p.layers + which % s.layers * p.layer;
  if (s.floats == 3) return attention(r, reinterpret_cast<float*>(at), index);
  struct isofold_linear l = {};
  l.weight = at;
  l.scale = at + p.scale;
  l.zero = s.zero ? reinterpret_cast<int8_t*>(at + p.zero) : nullptr;
  l.wsum = reinterpret_cast<float*>(at + p.wsum);
  l.n = s.n;
  l.kp = p.kp;
  l.bits = int32_t(s.bits);
  l.group_size = s.group;
  l.scale_multiplier = 1;
  l.gated = int32_t(s.gated);
  const struct isofold_kernels* k = &isofold_candidate;
  if (s.floats) {
    struct isofold_linear_float_call c = {};
    c.x = reinterpret_cast<float*>(r->base + p.input);
    c.y = r->y;
    c.m = s.m;
    c.k = s.k;
    if (s.floats == 2) {
      int64_t tasks = isofold_dense_tasks(&l, s.m);
      isofold_dense_run(k, &l, &c, tasks * index / s.threads, tasks * (index + 1) / s.threads);
      return;
    }
    int64_t tasks = isofold_linear_float_tasks(&l, s.m);
    isofold_linear_float_run(k, &l, &c, tasks * index / s.threads, tasks * (index + 1) / s.threads);
    return;
  }
  struct isofold_linear_call c = {};
  c.u = reinterpret_cast<uint8_t*>(r->base + p.input);
  c.params = reinterpret_cast<float*>(r->base + p.params);
  c.y = r->y;
  c.m = s.m;
  c.scratch = isofold_linear_scratch_bytes(&l, s.m) ? r->base + p.scratch : nullptr;
  auto isa = s.isa == 3 ? ISOFOLD_V3 : ISOFOLD_V4;
  if (c.scratch) {
    isofold_linear_prepare(k, isa, &l, &c, s.m * index / s.threads, s.m * (index + 1) / s.threads);
    meet(r);
  }
  int64_t tasks = isofold_linear_tasks(&l, s.m);
  isofold_linear_run(k, isa, &l, &c, tasks * index / s.threads, tasks * (index + 1) / s.threads);
}

void* part(void* argument) {
  auto* mine = static_cast<Part*>(argument);
  Run* r = mine->run;
  meet(r);
  for (int64_t i = 0; i < r->count; ++i) {
    layer(r, r->first + i, mine->index);
    meet(r);
  }
  return nullptr;
}

double now() {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

enum { MOST_THREADS = 256 };

// Seconds of a layer, or a negative number: threads could not be started.
double run(const Spec& s, char* base, float* y, int64_t first, int64_t count) {
  Run r = {&s, Plan(s), base, y, first, count, 0, 0};
  Part parts[MOST_THREADS];
  pthread_t others[MOST_THREADS];
  if (s.threads > MOST_THREADS || isofold_candidate.attention_keys_attention > ATTENTION_MOST_KEYS) return -1;
  for (int64_t i = 1; i < s.threads; ++i) {
    parts[i] = {&r, i};
    if (pthread_create(&others[i], nullptr, part, &parts[i])) return -1;
  }
  meet(&r);
  double start = now();
  for (int64_t i = 0; i < count; ++i) {
    layer(&r, first + i, 0);
    meet(&r);
  }
  double seconds = now() - start;
  for (int64_t i = 1; i < s.threads; ++i) pthread_join(others[i], nullptr);
  return seconds / double(count);
}

// The value of a line "NAME<tab>: VALUE" of /proc/cpuinfo, the first one.
void cpu_fact(const char* name, char* out, size_t size) {
  snprintf(out, size, "?");
  FILE* file = fopen("/proc/cpuinfo", "r");
  char line[512];
  while (file && fgets(line, sizeof line, file)) {
    size_t length = strlen(name);
    if (strncmp(line, name, length) || (line[length] != '\t' && line[length] != ' ' && line[length] != ':')) continue;
    const char* value = strchr(line, ':');
    if (!value) continue;
    snprintf(out, size, "%s", value + (value[1] == ' ' ? 2 : 1));
    out[strcspn(out, "\n")] = 0;
    break;
  }
  if (file) fclose(file);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// (text uint8[]) -> length: what this machine is, lines of "name value".
EXPORTED int __tvm_ffi_isofold_machine(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  char model[256], family[32], number[32], host[128] = "";
  cpu_fact("model name", model, sizeof model);
  cpu_fact("cpu family", family, sizeof family);
  cpu_fact("model", number, sizeof number);
  gethostname(host, sizeof host - 1);
  cpu_set_t cores;
  int usable = sched_getaffinity(0, sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
  long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  int v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
  DLTensor* t = tensor(args[0]);
  int length = snprintf(data<char>(args[0]), size_t(t->shape[0]), "processor %s (%s/%s)\nhost %s\ncores %d\ncache %ld\nisa %s\n",
                        model, family, number, host, usable, cache > 0 ? cache : 0, v4 ? "v4" : "v3");
  return answer(result, length);
}

// (spec int64[]) -> bytes of the arena.
EXPORTED int __tvm_ffi_isofold_bytes(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  const Spec& s = *data<Spec>(args[0]);
  return answer(result, Plan(s).bytes(s) + 4096);
}

// (spec, arena uint8[]): weights, scales and inputs, the same from every candidate.
EXPORTED int __tvm_ffi_isofold_fill(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  fill(*data<Spec>(args[0]), aligned(args[1]));
  return answer(result, 0);
}

// (spec, arena, y float32[m n], first layer, count) -> picoseconds of a layer, or -1.
EXPORTED int __tvm_ffi_isofold_run(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  double seconds = run(*data<Spec>(args[0]), aligned(args[1]), data<float>(args[2]), integer(args[3]), integer(args[4]));
  return answer(result, seconds < 0 ? -1 : int64_t(seconds * 1e12));
}
