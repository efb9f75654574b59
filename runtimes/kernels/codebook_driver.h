// Drives the kernels of codebook.py and codebook_tables.py; tasks, tiles and epilogues are those of linear_float_driver.h.
#ifndef ISOFOLD_CODEBOOK_DRIVER_H
#define ISOFOLD_CODEBOOK_DRIVER_H

#include "linear_float_driver.h"

// A linear on additive codebooks. `linear` comes first: its weight are the codes [panels, kp / 8, 16, total], its scale is
// float32 [16 * panels], kp a multiple of 32; zero, wsum, bits and group_size are 0, scale_multiplier is 1.
struct isofold_codebook {
  struct isofold_linear linear;
  const void* books;  // code_bits 8: float32 [total, 256, 8] (isofold_codebook_expand); 16: float16 [total, 65536, 8]
  int64_t total;
  int32_t code_bits;
};

// Bytes of the float32 codebooks of 8-bit codes; 0: they are read as they are.
static inline int64_t isofold_codebook_scratch_bytes(const struct isofold_codebook* c) {
  return c->code_bits == 8 ? c->total * 256 * 8 * 4 : 0;
}

static inline void isofold_codebook_expand(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                           const uint16_t* stored, float* out) {
  k->codebook_expand(stored, c->total * 256, out);
}

// As isofold_float_gemv; `l` is the first member of a struct isofold_codebook.
static inline void isofold_codebook_gemv(const struct isofold_kernels* k, const struct isofold_linear* l, int64_t panel,
                                         const float* x, int64_t ldx, int64_t rows, int64_t begin, int64_t end,
                                         float* t) {
  const struct isofold_codebook* c = (const struct isofold_codebook*)l;
  const float* scale = (const float*)l->scale + 16 * panel;
  int64_t at = panel * (l->kp / 8) * 16 * c->total;
  int r = rows == 4 ? 0 : rows == 2 ? 1 : 2;
#define ISOFOLD_CODEBOOK_ROWS(B, S) \
  {k->codebook_gemv##B##_##S##_4, k->codebook_gemv##B##_##S##_2, k->codebook_gemv##B##_##S##_1}
#define ISOFOLD_CODEBOOK(B) \
  {ISOFOLD_CODEBOOK_ROWS(B, some1), ISOFOLD_CODEBOOK_ROWS(B, some2), ISOFOLD_CODEBOOK_ROWS(B, all1), \
   ISOFOLD_CODEBOOK_ROWS(B, all2)}
  void (*const narrow[4][3])(const float*, int64_t, const uint8_t*, const float*, int64_t, int64_t, const float*, int64_t,
                             int64_t, float*, int64_t) = ISOFOLD_CODEBOOK(8);
  void (*const wide[4][3])(const float*, int64_t, const uint16_t*, const uint16_t*, int64_t, int64_t, const float*,
                           int64_t, int64_t, float*, int64_t) = ISOFOLD_CODEBOOK(16);
#undef ISOFOLD_CODEBOOK
#undef ISOFOLD_CODEBOOK_ROWS
  for (int64_t m = 0; m < c->total; m += 2) {
    int which = (c->total - m >= 2) + (c->total <= 2 ? 2 : 0);
    if (c->code_bits == 8)
      narrow[which][r](x, ldx, (const uint8_t*)l->weight + at, (const float*)c->books, m, c->total, scale, begin, end, t,
                     32);
    else
      wide[which][r](x, ldx, (const uint16_t*)l->weight + at, (const uint16_t*)c->books, m, c->total, scale, begin, end, t,
                   32);
  }
}

// As isofold_float_unpack.
static inline void isofold_codebook_unpack(const struct isofold_kernels* k, const struct isofold_linear* l,
                                           int64_t panel, int64_t begin, int64_t end, float* out) {
  const struct isofold_codebook* c = (const struct isofold_codebook*)l;
  const float* scale = (const float*)l->scale + 16 * panel;
  int64_t at = panel * (l->kp / 8) * 16 * c->total;
  for (int64_t m = 0; m < c->total; m += 2) {
    int two = c->total - m >= 2;
    if (c->code_bits == 8)
      (two ? k->codebook_unpack8_2 : k->codebook_unpack8_1)((const uint8_t*)l->weight + at, (const float*)c->books, m,
                                                            c->total, scale, begin, end, m != 0, out);
    else
      (two ? k->codebook_unpack16_2 : k->codebook_unpack16_1)((const uint16_t*)l->weight + at,
                                                              (const uint16_t*)c->books, m, c->total, scale, begin, end,
                                                              m != 0, out);
  }
}

// Tasks begin..end (isofold_linear_float_tasks of `linear`).
static inline void isofold_codebook_run(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                        const struct isofold_linear_float_call* call, int64_t begin, int64_t end) {
  isofold_float_run(k, &c->linear, call, begin, end, 1.0f, isofold_codebook_gemv, isofold_codebook_unpack);
}

// ---- Few rows of activations: products are looked up (codebook_tables.py)

enum {
  ISOFOLD_LOOKUP_ROWS = 4,        // rows up to here, one after the other
  ISOFOLD_LOOKUP_FEATURES = 512,  // making tables costs as much as looking up 250
  ISOFOLD_LOOKUP_PANELS = 16,
  ISOFOLD_LOOKUP_TABLES = 512,  // of 768 bytes, made and used at a time
  ISOFOLD_LOOKUP_SPREAD = 256,  // how far the largest group of activations may be above the mean: 8 bits of the 24
  ISOFOLD_LOOKUP_SUMS = 3 * 16 * ISOFOLD_LOOKUP_PANELS
};

static inline int isofold_codebook_looks_up(const struct isofold_codebook* c, int64_t m) {
  return c->code_bits == 8 && c->total <= 2 && m <= ISOFOLD_LOOKUP_ROWS &&
         isofold_linear_panels(&c->linear) * 16 >= ISOFOLD_LOOKUP_FEATURES;
}

// Scratch memory, 64-byte aligned: tables of a chunk of K, codebooks as the kernels read them, a row of activations with
// zeros behind it, and the sums of the chunks so far.
struct isofold_lookup {
  uint8_t* tables;  // [groups, 3, total, 256]
  float* books;     // [total, 8, 256]
  float* x;         // [kp]
  float* sums;      // [16 panels]
  float factor;     // of the row
};

// Groups of a chunk, but of the last one.
static inline int64_t isofold_lookup_groups(const struct isofold_codebook* c) {
  return isofold_min(ISOFOLD_LOOKUP_TABLES / c->total, c->linear.kp / 8);
}

static inline int64_t isofold_lookup_chunks(const struct isofold_codebook* c) {
  return isofold_ceildiv(c->linear.kp / 8, isofold_lookup_groups(c));
}

static inline int64_t isofold_lookup_bytes(const struct isofold_codebook* c) {
  return isofold_lookup_groups(c) * 768 * c->total + isofold_codebook_scratch_bytes(c) + c->linear.kp * 4 +
         isofold_linear_panels(&c->linear) * 64;
}

static inline struct isofold_lookup isofold_lookup_start(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                                         const uint16_t* stored, void* scratch) {
  struct isofold_lookup l = {(uint8_t*)scratch, 0, 0, 0, 0};
  l.books = (float*)(l.tables + isofold_lookup_groups(c) * 768 * c->total);
  l.x = l.books + c->total * 2048;
  l.sums = l.x + c->linear.kp;
  k->codebook_turn(stored, c->total, l.books);
  return l;
}

// Groups of this chunk.
static inline int64_t isofold_lookup_count(const struct isofold_codebook* c, int64_t chunk) {
  int64_t most = isofold_lookup_groups(c);
  return isofold_min(most, c->linear.kp / 8 - chunk * most);
}

// Takes a row of activations. 0: its products have no bound that fixed point could be scaled by: they are all zero, not all
// finite, or a few are so large that little would be left of the others.
static inline int isofold_lookup_row(const struct isofold_codebook* c, struct isofold_lookup* l, const float* x, int64_t k) {
  float inputs = 0, entries = 0, all = 0;  // the largest sum of 8 absolute values, the largest absolute value, all sums
  int finite = 1;
  memcpy(l->x, x, (size_t)k * sizeof(float));
  memset(l->x + k, 0, (size_t)(c->linear.kp - k) * sizeof(float));
  for (int64_t g = 0; g < c->linear.kp / 8; ++g) {
    float sum = 0;
    for (int j = 0; j < 8; ++j) sum += l->x[8 * g + j] < 0 ? -l->x[8 * g + j] : l->x[8 * g + j];
    finite &= sum < 3e38f;  // nor is what is not a number
    if (sum > inputs) inputs = sum;
    all += sum;
  }
  float most[16] = {0};
  for (int64_t i = 0; i < c->total * 2048; i += 16)
    for (int j = 0; j < 16; ++j) {
      float size = l->books[i + j] < 0 ? -l->books[i + j] : l->books[i + j];
      most[j] = size > most[j] ? size : most[j];
    }
  for (int j = 0; j < 16; ++j) entries = most[j] > entries ? most[j] : entries;
  finite &= inputs * (float)(c->linear.kp / 8) <= all * ISOFOLD_LOOKUP_SPREAD;
  l->factor = 8388000.0f / (inputs * entries);
  return finite && l->factor > 0 && l->factor < 1e38f;
}

// Groups begin..end (of isofold_lookup_count) of the row's tables.
static inline void isofold_lookup_tables(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                         const struct isofold_lookup* l, int64_t chunk, int64_t begin, int64_t end) {
  const float* x = l->x + chunk * isofold_lookup_groups(c) * 8;
  k->codebook_tables(x, l->books, c->total, l->factor, begin, end, l->tables);
}

static inline int64_t isofold_lookup_tasks(const struct isofold_codebook* c) {
  return isofold_ceildiv(isofold_linear_panels(&c->linear), ISOFOLD_LOOKUP_PANELS);
}

// Tasks begin..end of row m on a chunk whose tables are all made; chunks in order, the last one writes y.
static inline void isofold_lookup_run(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                      const struct isofold_lookup* l, const struct isofold_linear_float_call* call,
                                      int64_t m, int64_t chunk, int64_t begin, int64_t end) {
  ISOFOLD_ALIGNED int32_t sums[ISOFOLD_LOOKUP_SUMS];
  ISOFOLD_ALIGNED float out[16 * ISOFOLD_LOOKUP_PANELS];
  struct isofold_float_epilogue e;
  int64_t all = isofold_linear_panels(&c->linear), stride = c->linear.kp / 8 * 16 * c->total;
  int64_t count = isofold_lookup_count(c, chunk), from = chunk * isofold_lookup_groups(c) * 16 * c->total;
  isofold_float_epilogue_start(&e, k, &c->linear, call, 1.0f);
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task * ISOFOLD_LOOKUP_PANELS, panels = isofold_min(ISOFOLD_LOOKUP_PANELS, all - first);
    const uint8_t* w = (const uint8_t*)c->linear.weight + first * stride + from;
    const float* scale = (const float*)c->linear.scale + 16 * first;
    float* before = l->sums + 16 * first;
    (c->total == 2 ? k->codebook_lookup2 : k->codebook_lookup1)(w, stride, panels, l->tables, count, 1.0f / l->factor, sums,
                                                                out);
    for (int64_t i = 0; i < 16 * panels; ++i) out[i] = before[i] = out[i] + (chunk ? before[i] : 0.0f);
    if (chunk + 1 < isofold_lookup_chunks(c)) continue;
    for (int64_t i = 0; i < 16 * panels; ++i) out[i] *= scale[i];
    for (int64_t p = 0; p < panels; p += 2) {
      e.block.panel = first + p;
      e.block.panels = isofold_min(2, panels - p);
      isofold_linear_finish(&e.block, m, 1, out + 16 * p);
    }
  }
}

#endif  // ISOFOLD_CODEBOOK_DRIVER_H
