// Drives the kernels of sparse.py over a range of tasks; the counterpart of linear_driver.h for sparse weights, with its
// epilogues. No allocation, no locks, no state: a task may run on any thread.
//
// A task is 2 panels (32 rows of weights; gated: 16 output features) with all rows of activations:
//
//   int64_t tasks = isofold_sparse_tasks(&linear);
//   scratch = isofold_sparse_scratch_bytes(&sparse, m) bytes, 64-byte aligned; then
//   isofold_sparse_prepare(...) for ranges of words that cover 0..words, in parallel, all before the first task;
//   isofold_sparse_run(kernels, isa, &linear, &sparse, &call, begin, end) for ranges that cover 0..tasks, in parallel.
#ifndef ISOFOLD_SPARSE_DRIVER_H
#define ISOFOLD_SPARSE_DRIVER_H

#include "linear_driver.h"

// The weights (compiler/dialect/sparse_packing.py), and what else kernels need to read them.
struct isofold_sparse {
  const int64_t* mask;     // [16 panels, words]
  const void* values;      // float32, or int8 where `quantized`
  const int32_t* offsets;  // [16 panels + 1]
  int64_t words;           // ceil(k / 64)
  int64_t k;
  int32_t quantized;
  int32_t expands;         // the processor has AVX512-VBMI2 (and VBMI, BITALG, VPOPCNTDQ), and the kernels are v4's
  const int32_t* table;    // isofold_sparse_tables
};

// One call. Quantized: x is u [m, ldx] and params as in linear_driver.h; else x is float32 [m, ldx].
struct isofold_sparse_call {
  const void* x;
  int64_t ldx;            // at least k
  const float* params;    // quantized: [m, 2], or [2] when static_params
  const float* residual;  // [m, n] or null; may not overlap y
  float* y;               // [m, n]
  int64_t m;
  int32_t static_params;
  void* scratch;
};

enum {
  ISOFOLD_SPARSE_GEMV_ROWS = 4,    // up to here float weights are expanded; 8-bit ones:
  ISOFOLD_SPARSE_GEMV8_ROWS = 16,
  ISOFOLD_SPARSE_HALF = 22,        // non-zeros of an average word of 8 bits that hardly ever has more than 32
  ISOFOLD_SPARSE_LOW = 14,         // non-zeros of an average word up to which places are looked up instead
  ISOFOLD_SPARSE_CHUNK = 2,        // words of a chunk of K: its transposed activations stay in the first-level cache
  ISOFOLD_SPARSE_CHUNK8 = 8,
  ISOFOLD_SPARSE_WIDE8 = 4,        // the same for 128 rows of activations at once
  ISOFOLD_SPARSE_WHOLE8 = 12,      // words up to which there is one chunk (fewer loads and stores of sums)
  ISOFOLD_SPARSE_TABLE = 256 * 8 + 2 * 256 * 4  // int32 of isofold_sparse_tables
};

// Where 8 lanes find their packed values, for each of 256 masks: int32 [256, 8], negative where a lane has none; then
// bytes [2, 256, 16] for pshufb (lanes 0..7 and 8..15 of 16).
static inline void isofold_sparse_tables(int32_t* table) {
  uint8_t* bytes = (uint8_t*)(table + 256 * 8);
  memset(bytes, 0x80, 2 * 256 * 16);
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, next = 0; lane < 8; ++lane) {
      int there = mask >> lane & 1;
      table[mask * 8 + lane] = there ? next : INT32_MIN;
      if (there) bytes[mask * 16 + lane] = bytes[(256 + mask) * 16 + 8 + lane] = (uint8_t)next;
      next += there;
    }
}

static inline int64_t isofold_sparse_tasks(const struct isofold_linear* l) {
  return isofold_ceildiv(isofold_linear_panels(l), 2);
}

static inline int isofold_sparse_is_few(const struct isofold_sparse* s, int64_t m) {
  return m <= (s->quantized ? ISOFOLD_SPARSE_GEMV8_ROWS : ISOFOLD_SPARSE_GEMV_ROWS);
}

// Rows of activations of the block from m on, as its kernels take them.
static inline int64_t isofold_sparse_width(const struct isofold_sparse* s, int64_t left) {
  if (s->quantized) return left > 64 ? 128 : 64;
  return left > 32 ? 64 : left > 16 ? 32 : 16;
}

// Few rows: copies [m, 64 words] with zeros behind each row. Many: blocks of that width transposed, [64 words, width].
static inline int64_t isofold_sparse_scratch_bytes(const struct isofold_sparse* s, int64_t m) {
  int64_t size = s->quantized ? 1 : 4, rows = isofold_sparse_is_few(s, m) ? m : isofold_ceildiv(m, 128) * 128;
  return rows * s->words * 64 * size + 64;
}

// Words begin..end of the activations.
static inline void isofold_sparse_prepare(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                          const struct isofold_sparse_call* c, int64_t begin, int64_t end) {
  int64_t from = begin * 64, to = isofold_min(end * 64, s->k), padded = s->words * 64, size = s->quantized ? 1 : 4;
  const char* x = (const char*)c->x;
  char* out = (char*)c->scratch;
  if (isofold_sparse_is_few(s, c->m)) {
    for (int64_t m = 0; m < c->m; ++m) {
      char* row = out + m * padded * size;
      memcpy(row + from * size, x + (m * c->ldx + from) * size, (size_t)((to - from) * size));
      memset(row + to * size, 0, (size_t)((end * 64 - to) * size));
    }
    return;
  }
  for (int64_t m = 0, width; m < c->m; m += width) {
    width = isofold_sparse_width(s, c->m - m);
    int64_t rows = isofold_min(c->m - m, width);
    if (s->quantized)
      k->sparse8_transpose((const uint8_t*)c->x + m * c->ldx, c->ldx, rows, width, from, to,
                           (uint8_t*)out + m * padded);
    else
      k->sparse_transpose((const float*)c->x + m * c->ldx, c->ldx, rows, width, from, to, (float*)out + m * padded);
  }
}

// Rows of weights begin..end against few rows of activations: sums t [m, 32].
static inline void isofold_sparse_few(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                      const struct isofold_sparse_call* c, int64_t begin, int64_t end, void* t) {
  int64_t padded = s->words * 64;
  const uint8_t* bytes = (const uint8_t*)(s->table + 256 * 8);
  int64_t filled = s->offsets[end] - s->offsets[begin];
  int low = filled <= ISOFOLD_SPARSE_LOW * s->words * (end - begin);
  int half = filled <= ISOFOLD_SPARSE_HALF * s->words * (end - begin);
  for (int64_t m = 0; m < c->m;) {
    int64_t left = c->m - m, rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (s->quantized) {
      const uint8_t* x = (const uint8_t*)c->scratch + m * padded;
      const int8_t* values = (const int8_t*)s->values;
      void (*f)(const uint8_t*, int64_t, const int64_t*, int64_t, const int8_t*, const int32_t*, int64_t, int64_t,
                int32_t*, int64_t, const uint8_t*, int32_t);
      if (s->expands && rows == 1) {
        (half ? k->sparse8_gemv_low : k->sparse8_gemv_1)(x, padded, s->mask, s->words, values, s->offsets, begin, end,
                                                         (int32_t*)t + m * 32, 32, bytes, 0, s->mask);
        m += 1;
        continue;
      }
      if (s->expands)
        f = rows == 4 ? k->sparse8_gemv_4 : k->sparse8_gemv_2;
      else
        f = rows == 4 ? k->sparse8_gemv_plain_4 : rows == 2 ? k->sparse8_gemv_plain_2 : k->sparse8_gemv_plain_1;
      f(x, padded, s->mask, s->words, values, s->offsets, begin, end, (int32_t*)t + m * 32, 32, bytes, 0);
    } else {
      const float* x = (const float*)c->scratch + m * padded;
      const float* values = (const float*)s->values;
      void (*f)(const float*, int64_t, const int64_t*, int64_t, const float*, const int32_t*, int64_t, int64_t, float*,
                int64_t, const int32_t*, int32_t);
      f = rows == 4 ? k->sparse_gemv_4 : rows == 2 ? k->sparse_gemv_2 : k->sparse_gemv_1;
      if (rows == 1 && s->expands && low) f = k->sparse_gemv_low;
      f(x, padded, s->mask, s->words, values, s->offsets, begin, end, (float*)t + m * 32, 32, s->table, 0);
    }
    m += rows;
  }
}

// Asks for the first chunk of rows begin..end of weights.
static inline void isofold_sparse_expect(const struct isofold_sparse* s, int64_t begin, int64_t end) {
  int64_t size = s->quantized ? 1 : 4;
  for (int64_t r = begin; r < end; ++r) {
    const char* values = (const char*)s->values + s->offsets[r] * size;
    isofold_prefetch_read(s->mask + r * s->words);
    isofold_prefetch_read(values);
    isofold_prefetch_read(values + 64);
  }
}

// Of a list: most rows of weights, inputs (with what pads them) and rows of activations that it serves.
enum {
  ISOFOLD_SPARSE_ROWS = 64,
  ISOFOLD_SPARSE_LIST = ISOFOLD_SPARSE_WHOLE8 * 64 + 64,
  ISOFOLD_SPARSE_LIST_FLOAT = ISOFOLD_SPARSE_CHUNK * 64 + 64,
  ISOFOLD_SPARSE_BLOCK = 256
};

// Where the non-zeros of a chunk of K stand, and what they are (sparse_many.py): int8 and float32.
struct isofold_sparse_list {
  ISOFOLD_ALIGNED char copy[ISOFOLD_SPARSE_ROWS * ISOFOLD_SPARSE_LIST];
  ISOFOLD_ALIGNED uint16_t places[ISOFOLD_SPARSE_ROWS * ISOFOLD_SPARSE_LIST];
  int64_t counts[ISOFOLD_SPARSE_ROWS], at[ISOFOLD_SPARSE_ROWS];
};

// Words w..w+words of `rows` rows of weights from `first`.
static inline void isofold_sparse_write_list(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                             int64_t first, int64_t rows, int64_t w, int64_t words,
                                             struct isofold_sparse_list* l) {
  const int64_t* mask = s->mask + first * s->words + w;
  if (s->quantized)
    (s->expands ? k->sparse8_list : k->sparse8_list_plain)(mask, s->words, words, rows, (const int8_t*)s->values, l->at,
                                                          l->places, (int8_t*)l->copy, ISOFOLD_SPARSE_LIST, l->counts);
  else
    (s->expands ? k->sparse_list : k->sparse_list_plain)(mask, s->words, words, rows, (const float*)s->values, l->at,
                                                        l->places, (float*)l->copy, ISOFOLD_SPARSE_LIST_FLOAT, l->counts);
}

// `panels` panels of weights (up to 4) from the block's first against many rows of activations: lists are written once
// for ISOFOLD_SPARSE_BLOCK of these.
static inline void isofold_sparse_many(struct isofold_linear_block* b, const struct isofold_sparse* s,
                                       const struct isofold_sparse_call* c, int64_t panels) {
  ISOFOLD_ALIGNED float acc[ISOFOLD_SPARSE_BLOCK * ISOFOLD_SPARSE_ROWS];  // int32 where quantized, like t
  ISOFOLD_ALIGNED float t[128 * 32];
  struct isofold_sparse_list l;
  const struct isofold_kernels* k = b->k;
  const float* wsum = b->wsum;
  int64_t first = b->panel * 16, rows = panels * 16, panel = b->panel;
  int64_t padded = s->words * 64, chunk = s->quantized ? ISOFOLD_SPARSE_CHUNK8 : ISOFOLD_SPARSE_CHUNK;
  if (s->quantized && c->m > 64)
    chunk = ISOFOLD_SPARSE_WIDE8;
  else if (s->quantized && s->words <= ISOFOLD_SPARSE_WHOLE8)
    chunk = s->words;
  for (int64_t m0 = 0; m0 < c->m; m0 += ISOFOLD_SPARSE_BLOCK) {
    int64_t m1 = isofold_min(m0 + ISOFOLD_SPARSE_BLOCK, c->m);
    for (int64_t r = 0; r < rows; ++r) l.at[r] = s->offsets[first + r];
    memset(acc, 0, (size_t)(isofold_ceildiv(m1 - m0, 128) * 128 * rows) * sizeof(float));
    for (int64_t w = 0; w < s->words; w += chunk) {
      isofold_sparse_write_list(k, s, first, rows, w, isofold_min(chunk, s->words - w), &l);
      for (int64_t m = m0, width; m < m1; m += width) {
        width = isofold_sparse_width(s, m1 - m);
        float* sums = acc + (m - m0) * rows;
        if (s->quantized)
          (width == 128 ? k->sparse8_gemm_8 : k->sparse8_gemm_4)(
              (const uint8_t*)c->scratch + m * padded + w * 64 * width, l.places, (const int8_t*)l.copy,
              ISOFOLD_SPARSE_LIST, l.counts, rows, (int32_t*)sums);
        else
          (width == 64 ? k->sparse_gemm_4 : width == 32 ? k->sparse_gemm_2 : k->sparse_gemm_1)(
              (const float*)c->scratch + m * padded + w * 64 * width, l.places, (const float*)l.copy,
              ISOFOLD_SPARSE_LIST_FLOAT, l.counts, rows, sums);
      }
    }
    for (int64_t m = m0, width; m < m1; m += width) {
      width = isofold_sparse_width(s, m1 - m);
      for (int64_t p = 0; p < panels; p += 2) {
        const float* sums = acc + (m - m0) * rows + p * 16 * width;
        if (s->quantized)
          (width == 128 ? k->sparse8_turn_8 : k->sparse8_turn_4)((const int32_t*)sums, (int32_t*)t);
        else
          (width == 64 ? k->sparse_turn_4 : width == 32 ? k->sparse_turn_2 : k->sparse_turn_1)(sums, t);
        b->panel = panel + p;
        b->panels = isofold_min(2, panels - p);
        b->wsum = s->quantized ? wsum + p * 16 : wsum;
        isofold_linear_finish(b, m, isofold_min(width, m1 - m), t);
      }
    }
  }
}

// Tasks begin..end.
static inline void isofold_sparse_run(const struct isofold_kernels* k, enum isofold_isa isa,
                                      const struct isofold_linear* l, const struct isofold_sparse* s,
                                      const struct isofold_sparse_call* c, int64_t begin, int64_t end) {
  ISOFOLD_ALIGNED float t[ISOFOLD_SPARSE_GEMV8_ROWS * 32];  // int32 where quantized
  ISOFOLD_ALIGNED float zeros[32] = {0};
  const float identity[2] = {1.0f, 0.0f};
  struct isofold_linear linear = *l;
  struct isofold_linear_call call = {0, s->quantized ? c->params : identity, c->residual, c->y, c->m,
                                     s->quantized ? c->static_params : 1, 0};
  struct isofold_linear_block b;
  int64_t all = isofold_linear_panels(l);
  (void)isa;
  linear.group_size = s->quantized ? 0 : s->words * 64;  // not 0: epilogue_g, for sums that need no scale
  linear.zero = 0;
  b.k = k;
  b.l = &linear;
  b.c = &call;
  b.groups = 1;
  b.usum = 0;
  b.usum_int = 0;
  b.unit = 1;
  isofold_linear_select(&b);
  for (int64_t task = begin; task < end; ++task) {
    b.panel = task * 2;
    b.panels = isofold_min(2, all - b.panel);
    b.wsum = s->quantized ? l->wsum + b.panel * 16 : zeros;
    int64_t first = b.panel * 16, last = first + b.panels * 16;
    if (isofold_sparse_is_few(s, c->m)) {
      isofold_sparse_few(k, s, c, first, last, t);
      isofold_linear_finish(&b, 0, c->m, t);
    } else {
      int64_t panels = isofold_min(isofold_min(4, 2 * (end - task)), all - b.panel);
      isofold_sparse_expect(s, first, first + panels * 16);
      isofold_sparse_many(&b, s, c, panels);
      task += (panels - 1) / 2;
    }
  }
}

#endif  // ISOFOLD_SPARSE_DRIVER_H
