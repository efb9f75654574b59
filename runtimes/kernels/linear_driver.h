// Drives the kernels of linear.py over a range of tasks: which tile covers what, where scratch lies, what is prefetched.
// Included after the generated kernels.h; C99 and C++. No allocation, no locks, no state: a task may run on any thread.
//
// A linear is cut into tasks of 2 panels (32 output features; gated: 16) x up to 128 rows, numbered with the panels running
// fastest, so that a range of tasks streams through the weights once per block of rows while those rows stay in the
// second-level cache. Give each thread one range of consecutive tasks (the prefetches assume it):
//
//   int64_t tasks = isofold_linear_tasks(&linear, m);
//   scratch = isofold_linear_scratch_bytes(&linear, m) bytes (0 unless there are zero points), then
//   isofold_linear_prepare(...) once before the tasks;
//   isofold_linear_run(kernels, isa, &linear, &call, begin, end) for ranges that cover 0..tasks, in parallel.
#ifndef ISOFOLD_LINEAR_DRIVER_H
#define ISOFOLD_LINEAR_DRIVER_H

#include <stdint.h>
#include <string.h>

#include "outlier_driver.h"

#ifdef __cplusplus
#define ISOFOLD_ALIGNED alignas(64)
#else
#define ISOFOLD_ALIGNED _Alignas(64)
#endif

enum isofold_isa { ISOFOLD_V3 = 3, ISOFOLD_V4 = 4 };
// The order of ACTIVATIONS in math.py.
enum isofold_activation { ISOFOLD_NONE, ISOFOLD_RELU, ISOFOLD_GELU, ISOFOLD_GELU_TANH, ISOFOLD_SILU };

// A packed linear, as docs/dialect.md lays it out. Constant for the life of a session.
struct isofold_linear {
  const void* weight;      // [panels, 2 * bits * kp bytes] as docs/dialect.md lays out int8, int4, int3 and int2
  const void* scale;       // float32 [panels, 1, 16] (group_size 0) or float16 [panels, groups, 16]
  const int8_t* zero;      // [panels, groups, 16] or null
  const float* wsum;       // [16 * panels]
  const float* bias;       // [n], gated: [16 * panels]; or null
  int64_t n;               // output features; gated: panels = 2 * ceil(n / 16), else ceil(n / 16)
  int64_t kp;              // padded inputs, a multiple of 32 and of group_size
  int32_t bits;            // 8, 4, 3 or 2
  int64_t group_size;      // 0: per channel (8 and 4 bits); else a multiple of 32 (only 32, 64, 128 are specified)
  float scale_multiplier;  // power of two
  int32_t activation;      // enum isofold_activation
  int32_t gated;
  const struct isofold_outliers* outliers;  // what the codes cannot hold; or null
};

// One call of it.
struct isofold_linear_call {
  const uint8_t* u;       // [m, kp]
  const float* params;    // [m, 2], or [2] when static_params
  const float* residual;  // [m, n] or null; may not overlap y
  float* y;               // [m, n]
  int64_t m;
  int32_t static_params;
  void* scratch;          // isofold_linear_scratch_bytes bytes, 64-byte aligned
};

enum {
  ISOFOLD_ROW_BLOCK = 128,    // rows of a task: 16 tiles of 8
  ISOFOLD_UNPACK = 4096,      // most inputs unpacked at a time (knob unpack_inputs, knobs.py)
  ISOFOLD_BEGIN = 32768       // bytes of weights asked for at the start of a call on few rows
};

static inline void isofold_prefetch_read(const void* p) { __builtin_prefetch(p, 0, 3); }

// The compiler would fall back to a read at this level of instructions; every processor of x86-64-v3 decodes it.
static inline void isofold_prefetch_write(void* p) { __asm__ volatile("prefetchw %0" : : "m"(*(char*)p)); }

static inline int64_t isofold_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t isofold_ceildiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t isofold_linear_panels(const struct isofold_linear* l) {
  return (l->gated ? 2 : 1) * isofold_ceildiv(l->n, 16);
}

static inline int64_t isofold_linear_groups(const struct isofold_linear* l) {
  return l->group_size ? l->kp / l->group_size : 1;
}

// Rows of a task: fewer than ISOFOLD_ROW_BLOCK only where there would be too few tasks to share out.
static inline int64_t isofold_linear_row_block(const struct isofold_linear* l, int64_t m) {
  int64_t blocks = isofold_ceildiv(isofold_linear_panels(l), 2), rows = ISOFOLD_ROW_BLOCK;
  while (rows > 16 && blocks * isofold_ceildiv(m, rows) < 16) rows /= 2;
  return rows;
}

static inline int64_t isofold_linear_tasks(const struct isofold_linear* l, int64_t m) {
  int64_t blocks = isofold_ceildiv(isofold_linear_panels(l), 2);
  return m == 0 ? 0 : blocks * isofold_ceildiv(m, isofold_linear_row_block(l, m));
}

// Where the scratch memory of outliers begins: behind the sums of zero points.
static inline int64_t isofold_linear_outlier_scratch(const struct isofold_linear* l, int64_t m) {
  return l->zero ? isofold_ceildiv(m * isofold_linear_groups(l) * 8, 64) * 64 : 0;
}

static inline int64_t isofold_linear_scratch_bytes(const struct isofold_linear* l, int64_t m) {
  int64_t bytes = isofold_linear_outlier_scratch(l, m);
  bytes += l->outliers ? isofold_outlier_scratch_bytes(l->kp, m) : 0;
  return bytes ? bytes + 64 : 0;
}

// What kernels multiply codes of this width by (unit of codec.py).
static inline int32_t isofold_linear_unit(int32_t bits, enum isofold_isa isa) {
  return isa == ISOFOLD_V4 ? 1 << (8 - bits) : 1;
}

// Sums of the activations over each group, for rows begin..end; needed only where scratch_bytes is not 0. With outliers,
// isofold_outlier_prepare on the scratch memory behind it (isofold_linear_outlier_scratch) comes first too.
// Kernels subtract zero * sum in units of int4 codes; zero points of 2 and 3 bits are sixteenths: the factor is the rest.
static inline void isofold_linear_prepare(const struct isofold_kernels* k, enum isofold_isa isa,
                                          const struct isofold_linear* l, const struct isofold_linear_call* c,
                                          int64_t begin, int64_t end) {
  int64_t groups = isofold_linear_groups(l);
  float factor = l->bits >= 4 ? 1.0f : isofold_linear_unit(l->bits, isa) / (16.0f * isofold_linear_unit(4, isa));
  int32_t* sums = (int32_t*)c->scratch;
  float* floats = (float*)(sums + c->m * groups);
  if (l->zero)
    k->row_sums(c->u + begin * l->kp, l->kp, end - begin, groups, l->kp / groups, factor, sums + begin * groups,
                floats + begin * groups);
}

// The kernels' types, from kernels.h.
typedef void (*isofold_tile_pc)(const int32_t*, int64_t, const int8_t*, int64_t, int64_t, const int8_t*, int64_t,
                                int32_t, int32_t*, int64_t);
typedef void (*isofold_tile_g)(const int32_t*, int64_t, const int8_t*, int64_t, int64_t, int64_t, const uint16_t*,
                               int64_t, const int8_t*, int64_t, int32_t, float*, int64_t);
typedef void (*isofold_tile_gz)(const int32_t*, int64_t, const int8_t*, int64_t, int64_t, int64_t, const uint16_t*,
                                int64_t, const int8_t*, const float*, int64_t, const int8_t*, int64_t, int32_t, float*,
                                int64_t);
typedef void (*isofold_epilogue_pc)(const int32_t*, int64_t, const float*, const int8_t*, const int32_t*, int32_t,
                                    const float*, int64_t, const float*, const float*, const float*, float*, int64_t,
                                    int64_t, int64_t, float, int32_t);
typedef void (*isofold_epilogue_g)(const float*, int64_t, const float*, int64_t, const float*, const float*,
                                   const float*, float*, int64_t, int64_t, int64_t, float, int32_t);

// Bytes behind the panels they are at that kernels for few rows have asked for. Outliers go on exactly there: with 2 KiB
// less or more, int4 with 1 % of them is 3 to 5 % slower (Zen 5, one row).
static inline int64_t isofold_linear_streamed(const struct isofold_kernels* k, int32_t bits, int floating) {
  if (bits == 8) return 16384;
  if (floating)
    return bits == 4 ? k->streamed_linear_float4 : bits == 3 ? k->streamed_linear_float3 : k->streamed_linear_float2;
  return bits == 4 ? k->streamed_linear_gemv4 : bits == 3 ? k->streamed_linear_gemv3 : k->streamed_linear_gemv2;
}

// Everything one block of panels needs, resolved once.
struct isofold_linear_block {
  const struct isofold_kernels* k;
  const struct isofold_linear* l;
  const struct isofold_linear_call* c;
  int64_t panel, panels;  // first panel of the block, 1 or 2 panels
  int64_t groups;
  const float* usum;      // [m, groups] or null
  const int32_t* usum_int;
  const float* wsum;      // of the block's first panel
  int32_t unit;           // the kernels' codes are unit * w
  int64_t streamed;       // isofold_linear_streamed
  union {
    isofold_tile_pc pc[4][2];
    isofold_tile_g g[4][2];
    isofold_tile_gz gz[4][2];
  } tiles;                // [rows 8, 4, 2, 1][panels 1, 2]
  isofold_epilogue_pc epilogue_pc;
  isofold_epilogue_g epilogue_g;
};

static inline int isofold_row_index(int64_t rows) { return rows >= 8 ? 0 : rows >= 4 ? 1 : rows >= 2 ? 2 : 3; }

// One tile: rows m..m+rows (rows one of 8, 4, 2, 1), inputs k0..k0+inputs, int8 panels at w, sums into t [rows, 32].
static inline void isofold_linear_tile(const struct isofold_linear_block* b, int64_t m, int64_t rows, int64_t k0,
                                       int64_t inputs, const int8_t* w, int64_t ldw, const int8_t* ahead,
                                       int64_t stride, void* t) {
  const struct isofold_linear* l = b->l;
  const int32_t* u = (const int32_t*)(b->c->u + m * l->kp + k0);
  int r = isofold_row_index(rows), p = (int)b->panels - 1;
  int32_t accumulate = k0 != 0;
  if (l->group_size == 0) {
    b->tiles.pc[r][p](u, l->kp / 4, w, ldw, inputs, ahead, stride, accumulate, (int32_t*)t, 32);
    return;
  }
  int64_t lds = b->groups * 16, at = b->panel * lds + k0 / l->group_size * 16;
  const uint16_t* scale = (const uint16_t*)l->scale + at;
  if (!l->zero) {
    b->tiles.g[r][p](u, l->kp / 4, w, ldw, inputs, l->group_size, scale, lds, ahead, stride, accumulate, (float*)t, 32);
    return;
  }
  const float* usum = b->usum + m * b->groups + k0 / l->group_size;
  b->tiles.gz[r][p](u, l->kp / 4, w, ldw, inputs, l->group_size, scale, lds, l->zero + at, usum, b->groups, ahead,
                    stride, accumulate, (float*)t, 32);
}

// Kernels that do not change within a call, looked up once.
static inline void isofold_linear_select(struct isofold_linear_block* b) {
  const struct isofold_kernels* k = b->k;
  const struct isofold_linear* l = b->l;
#define ISOFOLD_TILE(M, T, R, I) b->tiles.M[I][0] = k->T##_##M##_##R##x1, b->tiles.M[I][1] = k->T##_##M##_##R##x2
#define ISOFOLD_TILES(M, T) \
  ISOFOLD_TILE(M, T, 8, 0), ISOFOLD_TILE(M, T, 4, 1), ISOFOLD_TILE(M, T, 2, 2), ISOFOLD_TILE(M, T, 1, 3)
#define ISOFOLD_TILES_OF(M) (l->bits < 8 ? (void)(ISOFOLD_TILES(M, tile4)) : (void)(ISOFOLD_TILES(M, tile8)))
  if (l->group_size == 0)
    ISOFOLD_TILES_OF(pc);
  else if (!l->zero)
    ISOFOLD_TILES_OF(g);
  else
    ISOFOLD_TILES_OF(gz);
#undef ISOFOLD_TILES_OF
#undef ISOFOLD_TILES
#undef ISOFOLD_TILE
#define ISOFOLD_EPILOGUES(M, G) \
  {k->epilogue_##M##_none##G, k->epilogue_##M##_relu##G, k->epilogue_##M##_gelu##G, k->epilogue_##M##_gelu_tanh##G, \
   k->epilogue_##M##_silu##G}
  isofold_epilogue_pc pc[2][5] = {ISOFOLD_EPILOGUES(pc, ), ISOFOLD_EPILOGUES(pc, _gated)};
  isofold_epilogue_g g[2][5] = {ISOFOLD_EPILOGUES(g, ), ISOFOLD_EPILOGUES(g, _gated)};
#undef ISOFOLD_EPILOGUES
  b->epilogue_pc = pc[l->gated != 0][l->activation];
  b->epilogue_g = g[l->gated != 0][l->activation];
}

// Asks for what a call on one row reads first, while its activations are still being quantized: then nothing else is
// on the way from memory.
static inline void isofold_linear_begin(const struct isofold_linear* l) {
  int64_t panels = isofold_linear_panels(l), bytes = isofold_min(ISOFOLD_BEGIN, panels * 2 * l->bits * l->kp);
  const char* w = (const char*)l->weight;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(w + at, 0, 2);
  int64_t scales = isofold_min(ISOFOLD_BEGIN / 8, panels * isofold_linear_groups(l) * (l->group_size ? 32 : 64));
  for (int64_t at = 0; at < scales; at += 64) isofold_prefetch_read((const char*)l->scale + at);
}

// Rows the kernels that unpack in registers take at once.
static inline int64_t isofold_gemv_rows(int64_t rows) { return rows >= 8 ? 8 : isofold_min(rows, 4); }

// The kernels that unpack in registers: rows (1..4 or 8) from m, one panel, sums into t [rows, 32].
static inline void isofold_linear_gemv(const struct isofold_linear_block* b, int64_t m, int64_t rows, int64_t panel,
                                       void* t) {
  const struct isofold_kernels* k = b->k;
  const struct isofold_linear* l = b->l;
  const int32_t* u = (const int32_t*)(b->c->u + m * l->kp);
  const uint8_t* w = (const uint8_t*)l->weight + panel * l->kp * 2 * l->bits;
  int64_t at = panel * b->groups * 16, ldu = l->kp / 4, r = rows == 8 ? 4 : rows - 1;
  const uint16_t* scale = (const uint16_t*)l->scale + at;
#define ISOFOLD_GEMVS(B, M) \
  {k->gemv##B##_##M##_1, k->gemv##B##_##M##_2, k->gemv##B##_##M##_3, k->gemv##B##_##M##_4, k->gemv##B##_##M##_8}
#define ISOFOLD_GEMVS_OF(M) {ISOFOLD_GEMVS(2, M), ISOFOLD_GEMVS(3, M), ISOFOLD_GEMVS(4, M)}
  if (l->group_size == 0) {
    void (*const f[5])(const int32_t*, int64_t, const uint8_t*, int64_t, int32_t*, int64_t) = ISOFOLD_GEMVS(4, pc);
    f[r](u, ldu, w, l->kp, (int32_t*)t, 32);
  } else if (!l->zero) {
    void (*const f[3][5])(const int32_t*, int64_t, const uint8_t*, int64_t, int64_t, const uint16_t*, float*, int64_t) =
        ISOFOLD_GEMVS_OF(g);
    f[l->bits - 2][r](u, ldu, w, l->kp, l->group_size, scale, (float*)t, 32);
  } else {
    void (*const f[3][5])(const int32_t*, int64_t, const uint8_t*, int64_t, int64_t, const uint16_t*, const int8_t*,
                          const float*, int64_t, float*, int64_t) = ISOFOLD_GEMVS_OF(gz);
    f[l->bits - 2][r](u, ldu, w, l->kp, l->group_size, scale, l->zero + at, b->usum + m * b->groups, b->groups,
                      (float*)t, 32);
  }
#undef ISOFOLD_GEMVS_OF
#undef ISOFOLD_GEMVS
}

// How many panels the kernels for one row take at once (knob gemv_panels, knobs.py).
static inline int64_t isofold_gemv_panels(const struct isofold_kernels* k, int32_t bits) {
  return bits == 4 ? k->gemv_panels_linear_gemv4 : bits == 3 ? k->gemv_panels_linear_gemv3 : k->gemv_panels_linear_gemv2;
}

// These kernels on row m and that many panels from the block's first: sums into t [panels / 2, 32].
static inline void isofold_linear_gemv_wide(const struct isofold_linear_block* b, int64_t m, void* t) {
  const struct isofold_kernels* k = b->k;
  const struct isofold_linear* l = b->l;
  const int32_t* u = (const int32_t*)(b->c->u + m * l->kp);
  int64_t bytes = l->kp * 2 * l->bits, lds = b->groups * 16, at = b->panel * lds;
  const uint8_t* w = (const uint8_t*)l->weight + b->panel * bytes;
  const uint16_t* scale = (const uint16_t*)l->scale + at;
  if (l->group_size == 0) {
    k->gemv4_pc_wide(u, w, bytes, l->kp, (int32_t*)t);
  } else if (!l->zero) {
    void (*const f[3])(const int32_t*, const uint8_t*, int64_t, int64_t, int64_t, const uint16_t*, int64_t, float*) = {
        k->gemv2_g_wide, k->gemv3_g_wide, k->gemv4_g_wide};
    f[l->bits - 2](u, w, bytes, l->kp, l->group_size, scale, lds, (float*)t);
  } else {
    void (*const f[3])(const int32_t*, const uint8_t*, int64_t, int64_t, int64_t, const uint16_t*, int64_t,
                       const int8_t*, const float*, float*) = {k->gemv2_gz_wide, k->gemv3_gz_wide, k->gemv4_gz_wide};
    f[l->bits - 2](u, w, bytes, l->kp, l->group_size, scale, lds, l->zero + at, b->usum + m * b->groups, (float*)t);
  }
}

// Scratch sums t [rows, 32] of rows m..m+rows to outputs.
static inline void isofold_linear_finish(const struct isofold_linear_block* b, int64_t m, int64_t rows, const void* t) {
  const struct isofold_linear* l = b->l;
  const struct isofold_linear_call* c = b->c;
  int64_t from = b->panel * 16, column = l->gated ? from / 2 : from, width = l->gated ? 16 : 16 * b->panels;
  int64_t columns = isofold_min(width, l->n - column), at = m * l->n + column;
  const float* params = c->static_params ? c->params : c->params + 2 * m;
  const float* bias = l->bias ? l->bias + (l->gated ? from : column) : b->wsum;
  const float* residual = c->residual ? c->residual + at : b->wsum;
  int64_t ldparams = c->static_params ? 0 : 2;
  int32_t flags = (l->bias ? 1 : 0) | (c->residual ? 2 : 0) | (l->zero ? 4 : 0);
  float multiplier = l->scale_multiplier / (float)b->unit;
  if (l->group_size == 0 && !l->outliers)
    b->epilogue_pc((const int32_t*)t, 32, (const float*)l->scale + from,
                   l->zero ? l->zero + from : (const int8_t*)b->wsum,
                   l->zero ? b->usum_int + m : (const int32_t*)b->wsum, b->unit, params, ldparams, b->wsum, bias,
                   residual, c->y + at, l->n, rows, columns, multiplier, flags);
  else
    b->epilogue_g((const float*)t, 32, params, ldparams, b->wsum, bias, residual, c->y + at, l->n, rows, columns,
                  multiplier, flags);
}

// What outliers of a panel fetch: from `weights` on, and the scales of the panels behind `panels` of them.
static inline struct isofold_outlier_ahead isofold_linear_ahead(const struct isofold_linear* l, int64_t panel,
                                                                int64_t panels, const void* weights) {
  int64_t bytes = isofold_linear_groups(l) * (l->group_size ? 32 : 64);
  struct isofold_outlier_ahead ahead = {weights, (const char*)l->scale + (panel + panels) * bytes, bytes};
  return ahead;
}

static inline void isofold_linear_further(const struct isofold_linear* l, int64_t panel,
                                          struct isofold_outlier_ahead* ahead) {
  ahead->weights = (const char*)ahead->weights + (l->outliers->offsets[panel + 1] - l->outliers->offsets[panel]) * 64;
  ahead->scales = (const char*)ahead->scales + ahead->scale_bytes;
}

// Adds the outliers of the block's panels to sums t [rows, 32] of rows m..m+rows; sums of formats with one scale a row
// become floats first. `next`: the dense weights behind these panels.
static inline void isofold_linear_outliers(const struct isofold_linear_block* b, int64_t m, int64_t rows,
                                           const int8_t* next, float* t) {
  const struct isofold_linear* l = b->l;
  const struct isofold_linear_call* c = b->c;
  if (!l->outliers) return;
  if (l->group_size == 0)
    b->k->outlier_rescale(t, 32, (const float*)l->scale + b->panel * 16,
                          l->zero ? l->zero + b->panel * 16 : (const int8_t*)b->wsum,
                          l->zero ? b->usum_int + m : (const int32_t*)b->wsum, b->unit, rows, b->panels, l->zero != 0);
  float factor = l->outliers->multiplier * (float)b->unit / l->scale_multiplier;
  if (isofold_outlier_blocks(c->m)) {
    const char* scratch = (const char*)c->scratch + isofold_linear_outlier_scratch(l, c->m);
    for (int64_t p = 0; p < b->panels; ++p)
      isofold_outlier_block(b->k, l->outliers, b->panel + p, factor, scratch, l->kp, m, rows, t + 16 * p);
    return;
  }
  struct isofold_outlier_ahead ahead = isofold_linear_ahead(l, b->panel, b->panels, next + b->streamed);
  for (int64_t p = 0; p < b->panels; ++p) {
    isofold_outlier_gemv(b->k, l->outliers, b->panel + p, factor, c->u + m * l->kp, 1, l->kp, rows, &ahead, t + 16 * p);
    isofold_linear_further(l, b->panel + p, &ahead);
  }
}

// Asks for the lines that the epilogue of rows m..m+rows will write (and add), while their tile is computed: stores
// that miss retire one after the other, and cost more than the epilogue itself.
static inline void isofold_linear_expect(const struct isofold_linear_block* b, int64_t m, int64_t rows) {
  const struct isofold_linear* l = b->l;
  int64_t column = l->gated ? b->panel * 8 : b->panel * 16, width = l->gated ? 16 : 16 * b->panels;
  int64_t last = isofold_min(column + width, l->n) - 1;
  for (int64_t r = m; r < m + rows; ++r) {
    isofold_prefetch_write(b->c->y + r * l->n + column);
    isofold_prefetch_write(b->c->y + r * l->n + last);
    if (b->c->residual) {
      isofold_prefetch_read(b->c->residual + r * l->n + column);
      isofold_prefetch_read(b->c->residual + r * l->n + last);
    }
  }
}

static inline int64_t isofold_tile_rows(int64_t rows) { return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

// Tasks begin..end.
static inline void isofold_linear_run(const struct isofold_kernels* k, enum isofold_isa isa,
                                      const struct isofold_linear* l, const struct isofold_linear_call* c,
                                      int64_t begin, int64_t end) {
  ISOFOLD_ALIGNED int8_t unpacked[2 * ISOFOLD_UNPACK * 16];
  ISOFOLD_ALIGNED float t[ISOFOLD_ROW_BLOCK * 32];
  int64_t all = isofold_linear_panels(l), blocks = isofold_ceildiv(all, 2), height = isofold_linear_row_block(l, c->m);
  int64_t bytes = 2 * l->bits * l->kp;  // of a panel
  struct isofold_linear_block b;
  b.k = k;
  b.l = l;
  b.c = c;
  b.groups = isofold_linear_groups(l);
  b.usum_int = (const int32_t*)c->scratch;
  b.usum = (const float*)(b.usum_int + (b.usum_int ? c->m * b.groups : 0));
  b.unit = isofold_linear_unit(l->bits, isa);
  b.streamed = isofold_linear_streamed(k, l->bits, 0);
  isofold_linear_select(&b);
  void (*unpack)(const uint8_t*, int64_t, int8_t*) =
      l->bits == 4 ? k->unpack_int4 : l->bits == 3 ? k->unpack_int3 : k->unpack_int2;
  int64_t wide = l->bits < 8 && c->m == 1 ? isofold_gemv_panels(k, l->bits) : 1;
  for (int64_t task = begin; task < end; ++task) {
    int64_t m0 = task / blocks * height, m1 = isofold_min(m0 + height, c->m);
    b.panel = task % blocks * 2;
    b.panels = isofold_min(2, all - b.panel);
    b.wsum = l->wsum + b.panel * 16;
    if (wide > 1 && b.panel + wide <= all && task + wide / 2 <= end) {
      isofold_linear_gemv_wide(&b, m0, t);
      for (int64_t p = 0; p < wide; p += 2) {
        b.wsum = l->wsum + b.panel * 16;
        isofold_linear_outliers(&b, m0, 1, (const int8_t*)l->weight + (b.panel + wide - p) * bytes, t + p * 16);
        isofold_linear_finish(&b, m0, 1, t + p * 16);
        b.panel += 2;
      }
      task += wide / 2 - 1;
      continue;
    }
    const int8_t* w = (const int8_t*)l->weight + b.panel * bytes;
    const int8_t* next = w + 2 * bytes;
    int64_t tiles = isofold_ceildiv(m1 - m0, 8);
    if (l->bits == 8) {
      // 2 panels are kp / 2 lines, fetched while `tiles` tiles of kp / 32 steps run: 16 / tiles lines a step, at most 2.
      int64_t stride = tiles >= 16 ? 64 : 128;
      for (int64_t m = m0; m < m1;) {
        int64_t rows = isofold_tile_rows(m1 - m);
        const int8_t* ahead = next + isofold_min((m - m0) / 8 * (l->kp / 32) * stride, 2 * bytes);
        float* sums = l->outliers ? t + (m - m0) * 32 : t;
        isofold_linear_expect(&b, m, rows);
        isofold_linear_tile(&b, m, rows, 0, l->kp, w, bytes, ahead, stride, sums);
        if (!l->outliers) isofold_linear_finish(&b, m, rows, t);
        m += rows;
      }
      if (l->outliers) {
        isofold_linear_outliers(&b, m0, m1 - m0, next, t);
        isofold_linear_finish(&b, m0, m1 - m0, t);
      }
    } else if (m1 - m0 <= k->gemv_rows) {
      int64_t first = b.panel, panels = b.panels;
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t m = m0; m < m1; m += isofold_gemv_rows(m1 - m))
          isofold_linear_gemv(&b, m, isofold_gemv_rows(m1 - m), first + p, t + (m - m0) * 32 + 16 * p);
        if (!l->outliers) continue;
        // One panel at a time: what is on the way from memory meanwhile lasts for the outliers of one.
        b.panel = first + p;
        b.panels = 1;
        b.wsum = l->wsum + b.panel * 16;
        isofold_linear_outliers(&b, m0, m1 - m0, w + (p + 1) * bytes, t + 16 * p);
      }
      b.panel = first;
      b.panels = panels;
      b.wsum = l->wsum + b.panel * 16;
      isofold_linear_finish(&b, m0, m1 - m0, t);
    } else {
      int64_t stride = tiles >= 8 ? 64 : 128;
      for (int64_t k0 = 0; k0 < l->kp; k0 += k->unpack_inputs) {
        int64_t inputs = isofold_min(k->unpack_inputs, l->kp - k0);
        for (int64_t p = 0; p < b.panels; ++p)
          unpack((const uint8_t*)w + p * bytes + k0 * 2 * l->bits, inputs / 32, unpacked + p * inputs * 16);
        for (int64_t m = m0; m < m1;) {
          int64_t rows = isofold_tile_rows(m1 - m);
          const int8_t* ahead = next + isofold_min(((m - m0) / 8 * (l->kp / 32) + k0 / 32) * stride, 2 * bytes);
          if (k0 + inputs == l->kp) isofold_linear_expect(&b, m, rows);
          isofold_linear_tile(&b, m, rows, k0, inputs, unpacked, inputs * 16, ahead, stride, t + (m - m0) * 32);
          m += rows;
        }
      }
      isofold_linear_outliers(&b, m0, m1 - m0, next, t);
      isofold_linear_finish(&b, m0, m1 - m0, t);
    }
  }
}

#endif  // ISOFOLD_LINEAR_DRIVER_H
