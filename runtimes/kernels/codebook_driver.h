// Drives the kernels of codebook.py and codebook_tables.py; tasks, tiles and epilogues are those of linear_float_driver.h.
#ifndef ISOFOLD_CODEBOOK_DRIVER_H
#define ISOFOLD_CODEBOOK_DRIVER_H

#include <xmmintrin.h>

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
  ISOFOLD_LOOKUP_FEATURES = 256,  // making tables costs as much as 900 lookups of a row, or fetching vectors for 140
  ISOFOLD_LOOKUP_PANELS = 8,
  ISOFOLD_LOOKUP_CODES = 32,    // of a row in a block: CODES in codebook_tables.py
  ISOFOLD_LOOKUP_TABLES = 512,  // of 768 bytes, made and used at a time: a multiple of CODES
  ISOFOLD_LOOKUP_UNIT = 4,      // groups, of which tables are made together
  ISOFOLD_LOOKUP_AHEAD = 4,     // tasks whose codes are fetched ahead: 16 KiB. A cache holds few lines of as many rows
  ISOFOLD_LOOKUP_SHARE = 4,     // the largest group of activations may be this part of all,
  ISOFOLD_LOOKUP_SPREAD = 8     // or so many times their mean
};

static inline int isofold_codebook_looks_up(const struct isofold_codebook* c, int64_t m) {
  return c->code_bits == 8 && c->total <= 2 && m <= ISOFOLD_LOOKUP_ROWS &&
         isofold_linear_panels(&c->linear) * 16 >= ISOFOLD_LOOKUP_FEATURES;
}

// Scratch memory, 64-byte aligned: tables of a chunk of K, codebooks as the kernels read them, a row of activations with
// zeros behind it, the sums so far, and for each block of codes what its entries are multiplied by, and the inverse.
struct isofold_lookup {
  uint8_t* tables;  // [groups, total, 3, 256]
  float* books;     // [total, 8, 256]
  float* x;         // [kp]
  float* sums;      // [16 panels, in whole tasks]
  float* factors;   // [blocks]
  float* inverses;  // [blocks]
};

// Groups of a block, and of a chunk; of the last one there may be fewer.
static inline int64_t isofold_lookup_block(const struct isofold_codebook* c) { return ISOFOLD_LOOKUP_CODES / c->total; }
static inline int64_t isofold_lookup_groups(const struct isofold_codebook* c) {
  return isofold_min(ISOFOLD_LOOKUP_TABLES / c->total, c->linear.kp / 8);
}

static inline int64_t isofold_lookup_chunks(const struct isofold_codebook* c) {
  return isofold_ceildiv(c->linear.kp / 8, isofold_lookup_groups(c));
}

static inline int64_t isofold_lookup_blocks(const struct isofold_codebook* c) {
  return isofold_ceildiv(c->linear.kp / 8, isofold_lookup_block(c));
}

static inline int64_t isofold_lookup_tasks(const struct isofold_codebook* c) {
  return isofold_ceildiv(isofold_linear_panels(&c->linear), ISOFOLD_LOOKUP_PANELS);
}

static inline int64_t isofold_lookup_bytes(const struct isofold_codebook* c) {
  return isofold_lookup_groups(c) * 768 * c->total + isofold_codebook_scratch_bytes(c) + c->linear.kp * 4 +
         isofold_lookup_tasks(c) * (ISOFOLD_LOOKUP_PANELS * 64) + isofold_lookup_blocks(c) * 8;
}

static inline struct isofold_lookup isofold_lookup_start(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                                         const uint16_t* stored, void* scratch) {
  struct isofold_lookup l = {(uint8_t*)scratch, 0, 0, 0, 0, 0};
  l.books = (float*)(l.tables + isofold_lookup_groups(c) * 768 * c->total);
  l.x = l.books + c->total * 2048;
  l.sums = l.x + c->linear.kp;
  l.factors = l.sums + isofold_lookup_tasks(c) * (ISOFOLD_LOOKUP_PANELS * 16);
  l.inverses = l.factors + isofold_lookup_blocks(c);
  k->codebook_turn(stored, c->total, l.books);
  return l;
}

// Units of groups of this chunk.
static inline int64_t isofold_lookup_units(const struct isofold_codebook* c, int64_t chunk) {
  int64_t most = isofold_lookup_groups(c);
  return isofold_min(most, c->linear.kp / 8 - chunk * most) / ISOFOLD_LOOKUP_UNIT;
}

// The largest sizes of the vectors of all codebooks: of an entry, and of the sum of squares.
static inline void isofold_lookup_largest(const struct isofold_codebook* c, const struct isofold_lookup* l, float* entry,
                                          float* squares) {
  float most[16] = {0}, sums[16] = {0};  // of every 16th vector, so that a compiler finds them
  for (int64_t v = 0; v < c->total * 256; v += 16) {
    const float* first = l->books + v / 256 * 2048 + v % 256;
    float sum[16] = {0};
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 16; ++i) {
        float size = first[256 * j + i] < 0 ? -first[256 * j + i] : first[256 * j + i];
        most[i] = size > most[i] ? size : most[i];
        sum[i] += size * size;
      }
    for (int i = 0; i < 16; ++i) sums[i] = sum[i] > sums[i] ? sum[i] : sums[i];
  }
  *entry = *squares = 0;
  for (int i = 0; i < 16; ++i) {
    *entry = most[i] > *entry ? most[i] : *entry;
    *squares = sums[i] > *squares ? sums[i] : *squares;
  }
}

// A bound of the products of vectors with these sums of absolute values, and of squares, by the smaller of two norms.
static inline float isofold_lookup_bound(float inputs, float input_squares, float entry, float entry_squares) {
  float sum = inputs * entry, squares = input_squares * entry_squares;
  if (squares < 1e-30f || squares > 1e30f) return sum;
  float product = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(squares)));
  return product < sum ? product : sum;
}

// Takes a row of activations. 0: its products have no bounds that fixed point could be scaled by: they are not all finite, or
// a few are so large that little would be left of the others.
static inline int isofold_lookup_row(const struct isofold_codebook* c, struct isofold_lookup* l, const float* x, int64_t k) {
  float entry, entry_squares, largest = 0, all = 0;  // sums of 8 absolute activations
  int64_t groups = c->linear.kp / 8, block = isofold_lookup_block(c);
  int fits = 1;
  memcpy(l->x, x, (size_t)k * sizeof(float));
  memset(l->x + k, 0, (size_t)(c->linear.kp - k) * sizeof(float));
  isofold_lookup_largest(c, l, &entry, &entry_squares);
  for (int64_t b = 0; b < isofold_lookup_blocks(c); ++b) {
    float bound = 0;
    for (int64_t g = b * block; g < isofold_min(groups, (b + 1) * block); ++g) {
      float sum = 0, squares = 0;
      for (int j = 0; j < 8; ++j) {
        float size = l->x[8 * g + j] < 0 ? -l->x[8 * g + j] : l->x[8 * g + j];
        sum += size;
        squares += size * size;
      }
      fits &= sum < 3e38f;  // nor is what is not a number
      float here = isofold_lookup_bound(sum, squares, entry, entry_squares);
      bound = here > bound ? here : bound;
      largest = sum > largest ? sum : largest;
      all += sum;
    }
    float factor = bound > 0 ? 1048000.0f / bound : 0.0f;
    fits &= bound == 0 || (factor > 0 && factor < 1e38f);
    l->factors[b] = factor;
    l->inverses[b] = bound > 0 ? 1.0f / factor : 0.0f;
  }
  return fits && (largest * ISOFOLD_LOOKUP_SHARE <= all || largest * (float)groups <= all * ISOFOLD_LOOKUP_SPREAD);
}

// Units begin..end (of isofold_lookup_units) of the row's tables.
static inline void isofold_lookup_tables(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                         const struct isofold_lookup* l, int64_t chunk, int64_t begin, int64_t end) {
  int64_t first = chunk * isofold_lookup_groups(c);
  (c->total == 2 ? k->codebook_tables2 : k->codebook_tables1)(l->x + first * 8, l->books,
                                                              l->factors + first / isofold_lookup_block(c),
                                                              begin * ISOFOLD_LOOKUP_UNIT, end * ISOFOLD_LOOKUP_UNIT,
                                                              l->tables);
}

// Where the kernels leave the sum of one of 64 rows.
static inline int64_t isofold_lookup_place(const struct isofold_codebook* c, int64_t row) {
  int64_t half = c->total == 2 ? row / 32 : row % 2, i = c->total == 2 ? row % 32 : row / 2;
  return half * 32 + i / 4 % 2 * 16 + i / 8 * 4 + i % 4;
}

// How far behind the codes of a task in a range and one block those lie that are fetched while it runs: of a later task, or
// of the next block (`piece` bytes further on; 0: this is the last one).
static inline int64_t isofold_lookup_ahead(int64_t task, int64_t begin, int64_t end, int64_t stride, int64_t piece) {
  int64_t later = task + ISOFOLD_LOOKUP_AHEAD, bytes = ISOFOLD_LOOKUP_PANELS * stride;
  if (later < end) return ISOFOLD_LOOKUP_AHEAD * bytes;
  return piece ? (isofold_min(begin + later - end, end - 1) - task) * bytes + piece : 0;
}

// Tasks begin..end of row m on a chunk whose tables are all made; chunks in order, the last one writes y.
static inline void isofold_lookup_run(const struct isofold_kernels* k, const struct isofold_codebook* c,
                                      const struct isofold_lookup* l, const struct isofold_linear_float_call* call,
                                      int64_t m, int64_t chunk, int64_t begin, int64_t end) {
  enum { FEATURES = 16 * ISOFOLD_LOOKUP_PANELS };
  int64_t all = isofold_linear_panels(&c->linear), groups = c->linear.kp / 8, stride = groups * 16 * c->total;
  int64_t block = isofold_lookup_block(c), per_line = 4 / c->total;
  int64_t first = chunk * isofold_lookup_groups(c), last = first + isofold_lookup_units(c, chunk) * ISOFOLD_LOOKUP_UNIT;
  if (chunk == 0) memset(l->sums + begin * FEATURES, 0, (size_t)((end - begin) * FEATURES) * sizeof(float));
  for (int64_t from = first; from < last; from += block) {
    int64_t count = isofold_min(block, last - from), at = from * 16 * c->total;
    int64_t piece = from + block < groups ? block * 16 * c->total : 0;
    const uint8_t* tables = l->tables + (from - first) * c->total * 768;
    for (int64_t task = begin; task < end; ++task) {
      int64_t panel = task * ISOFOLD_LOOKUP_PANELS;
      (c->total == 2 ? k->codebook_lookup2 : k->codebook_lookup1)(
          (const uint8_t*)c->linear.weight + panel * stride + at, stride, isofold_min(ISOFOLD_LOOKUP_PANELS, all - panel),
          tables, count / per_line, isofold_lookup_ahead(task, begin, end, stride, piece), l->inverses[from / block],
          l->sums + task * FEATURES);
    }
  }
  if (chunk + 1 < isofold_lookup_chunks(c)) return;
  struct isofold_float_epilogue e;
  ISOFOLD_ALIGNED float out[32];
  isofold_float_epilogue_start(&e, k, &c->linear, call, 1.0f);
  for (int64_t panel = begin * ISOFOLD_LOOKUP_PANELS; panel < isofold_min(all, end * ISOFOLD_LOOKUP_PANELS); panel += 2) {
    e.block.panel = panel;
    e.block.panels = isofold_min(2, all - panel);
    const float *sums = l->sums + 16 * (panel & ~3), *scale = (const float*)c->linear.scale + 16 * panel;
    for (int64_t i = 0; i < 16 * e.block.panels; ++i) out[i] = sums[isofold_lookup_place(c, 16 * (panel & 3) + i)] * scale[i];
    isofold_linear_finish(&e.block, m, 1, out);
  }
}

#endif  // ISOFOLD_CODEBOOK_DRIVER_H
