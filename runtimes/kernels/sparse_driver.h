// Drives the kernels of sparse*.py over a range of tasks; the counterpart of linear_driver.h for sparse weights, with its
// epilogues. No allocation, no locks, no state: a task may run on any thread.
//
// A task is 2 panels (32 rows of weights; gated: 16 output features) with all rows of activations:
//
//   int64_t tasks = isofold_sparse_tasks(&linear);
//   scratch = isofold_sparse_scratch_bytes(&sparse, m) bytes, 64-byte aligned; then
//   isofold_sparse_prepare(...) for ranges of words that cover 0..padded / 64, in parallel, all before the first task;
//   isofold_sparse_run(kernels, isa, &linear, &sparse, &call, begin, end) for ranges that cover 0..tasks, in parallel.
#ifndef ISOFOLD_SPARSE_DRIVER_H
#define ISOFOLD_SPARSE_DRIVER_H

#include "linear_driver.h"

// Where values stand: the layouts of compiler/dialect/sparse_packing.py, in the order of LAYOUTS of sparse_layouts.py.
enum isofold_sparse_layout {
  ISOFOLD_BITMASK, ISOFOLD_PANELS, ISOFOLD_WINDOWS, ISOFOLD_1_OF_4, ISOFOLD_2_OF_4, ISOFOLD_4_OF_8, ISOFOLD_1X4, ISOFOLD_16X1,
  ISOFOLD_16X4
};
enum isofold_sparse_value { ISOFOLD_FLOAT32, ISOFOLD_BFLOAT16, ISOFOLD_INT8, ISOFOLD_INT4 };

// The weights, and what else kernels need to read them. A *cell* is what one bit, place or column means: an input, or
// the four of a block of 1x4 or 16x4.
struct isofold_sparse {
  const void* places;
  const void* values;
  const int32_t* offsets;
  int64_t k, rows;       // of the weights, padded to 16
  int32_t layout, value;
  int32_t expands;       // the processor has AVX512-VBMI2 (and VBMI, BITALG, VPOPCNTDQ), and the kernels are v4's
  const int32_t* table;  // isofold_sparse_tables
  // From the others, by isofold_sparse_shape:
  int32_t quantized;
  int64_t cells, words;  // of a row of weights (panels: of each panel); a word is 64 cells
  int64_t padded;        // cells of a row of activations in scratch memory, a multiple of 64
  int64_t size;          // bytes of a cell of activations
  int64_t heads;         // windows: counts in front of the places
};

// One call. Quantized: x is u [m, ldx] and params as in linear_driver.h; else x is float32 [m, ldx].
struct isofold_sparse_call {
  const void* x;
  int64_t ldx;            // at least k; cells of four inputs: at least that many
  const float* params;    // quantized: [m, 2], or [2] when static_params
  const float* residual;  // [m, n] or null; may not overlap y
  float* y;               // [m, n]
  int64_t m;
  int32_t static_params;
  void* scratch;
};

enum {
  ISOFOLD_SPARSE_GEMV_ROWS = 4,    // up to here rows of activations are few; where 8-bit weights are a bitmask:
  ISOFOLD_SPARSE_GEMV8_ROWS = 16,
  ISOFOLD_SPARSE_GEMV4_ROWS = 2,   // 4-bit ones; in panels:
  ISOFOLD_SPARSE_PANEL_ROWS = 8,
  ISOFOLD_SPARSE_HALF = 22,        // values of an average word of 8 bits that hardly ever has more than 32
  ISOFOLD_SPARSE_LOW = 14,         // values of an average word up to which places are looked up instead
  ISOFOLD_SPARSE_CHUNK = 2,        // words of a chunk of K: its transposed activations stay in the first-level cache
  ISOFOLD_SPARSE_CHUNK8 = 8,
  ISOFOLD_SPARSE_WIDE8 = 4,        // the same for 128 rows of activations at once
  ISOFOLD_SPARSE_WHOLE8 = 12,      // words up to which there is one chunk (fewer loads and stores of sums)
  ISOFOLD_SPARSE_COLUMNS = 128,    // columns of a chunk of K of blocks of 16 rows
  ISOFOLD_SPARSE_LIVE = 256 * 8 + 2 * 256 * 4,
  ISOFOLD_SPARSE_TABLE = ISOFOLD_SPARSE_LIVE + 2 * 65  // int32 of isofold_sparse_tables
};

// Where 8 lanes find their packed values, for each of 256 masks: int32 [256, 8], negative where a lane has none; then
// bytes [2, 256, 16] for pshufb (lanes 0..7 and 8..15 of 16); then words with 0..64 low bits set.
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
  for (int count = 0; count <= 64; ++count) {
    uint64_t live = count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
    memcpy(table + ISOFOLD_SPARSE_LIVE + 2 * count, &live, sizeof live);
  }
}

// Inputs of 64 values of a layout N:M.
static inline int64_t isofold_sparse_block_inputs(const struct isofold_sparse* s) {
  return s->layout == ISOFOLD_1_OF_4 ? 256 : 128;
}

static inline int isofold_sparse_is_group(const struct isofold_sparse* s) {
  return s->layout >= ISOFOLD_1_OF_4 && s->layout <= ISOFOLD_4_OF_8;
}

static inline void isofold_sparse_shape(struct isofold_sparse* s) {
  int fours = s->layout == ISOFOLD_1X4 || s->layout == ISOFOLD_16X4;
  int64_t unit = s->layout == ISOFOLD_WINDOWS ? 256 : isofold_sparse_is_group(s) ? isofold_sparse_block_inputs(s) : 64;
  s->quantized = s->value >= ISOFOLD_INT8;
  s->cells = fours ? isofold_ceildiv(s->k, 4) : s->k;
  s->words = isofold_ceildiv(s->cells, unit) * (unit / 64);
  if (s->layout == ISOFOLD_PANELS) s->words = isofold_ceildiv(s->k, 128) * 32;
  s->padded = s->value == ISOFOLD_INT4 ? isofold_ceildiv(s->k, 128) * 128 : s->words * 64;
  s->size = s->quantized && !fours ? 1 : 4;
  s->heads = s->rows * s->words / 4;
}

static inline int64_t isofold_sparse_tasks(const struct isofold_linear* l) {
  return isofold_ceildiv(isofold_linear_panels(l), 2);
}

// Whether activations are copied row by row; else they are transposed.
static inline int isofold_sparse_is_few(const struct isofold_sparse* s, int64_t m) {
  if (s->value == ISOFOLD_INT4) return 1;
  return m <= (s->value == ISOFOLD_INT8 && s->layout == ISOFOLD_BITMASK ? ISOFOLD_SPARSE_GEMV8_ROWS
                                                                       : ISOFOLD_SPARSE_GEMV_ROWS);
}

// Rows of activations of the block from m on, as its kernels take them.
static inline int64_t isofold_sparse_width(const struct isofold_sparse* s, int64_t left) {
  if (s->size == 1) return left > 64 ? 128 : 64;
  return left > 32 ? 64 : left > 16 ? 32 : 16;
}

// Few rows: copies [m, padded] with zeros behind each row. Many: blocks of that width transposed, [padded, width].
static inline int64_t isofold_sparse_scratch_bytes(const struct isofold_sparse* s, int64_t m) {
  int64_t rows = isofold_sparse_is_few(s, m) ? m : isofold_ceildiv(m, 128) * 128;
  return rows * s->padded * s->size + 64;
}

// Words begin..end of the activations.
static inline void isofold_sparse_prepare(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                          const struct isofold_sparse_call* c, int64_t begin, int64_t end) {
  int64_t from = isofold_min(begin * 64, s->cells), to = isofold_min(end * 64, s->cells), size = s->size;
  int64_t inputs = s->quantized && size == 4 ? 4 : 1;  // of a cell
  const char* x = (const char*)c->x;
  char* out = (char*)c->scratch;
  if (isofold_sparse_is_few(s, c->m)) {
    for (int64_t m = 0; m < c->m; ++m) {
      char* row = out + m * s->padded * size;
      memcpy(row + from * size, x + m * c->ldx * size / inputs + from * size, (size_t)((to - from) * size));
      memset(row + to * size, 0, (size_t)((end * 64 - to) * size));
      if (s->value != ISOFOLD_BFLOAT16 || s->layout != ISOFOLD_BITMASK || !s->expands) continue;
      for (int64_t i = begin * 64; i < end * 64; i += 32) {  // even inputs first, for kernels that expand pairs
        float both[32], *cells = (float*)row + i;
        for (int j = 0; j < 16; ++j) both[j] = cells[2 * j], both[16 + j] = cells[2 * j + 1];
        memcpy(cells, both, sizeof both);
      }
    }
    return;
  }
  for (int64_t m = 0, width; m < c->m; m += width) {
    width = isofold_sparse_width(s, c->m - m);
    int64_t rows = isofold_min(c->m - m, width);
    if (size == 1)
      k->sparse8_transpose((const uint8_t*)c->x + m * c->ldx, c->ldx, rows, width, from, to,
                           (uint8_t*)out + m * s->padded);
    else  // four codes move as a float does
      k->sparse_transpose((const float*)c->x + m * c->ldx / inputs, c->ldx / inputs, rows, width, from, to,
                          (float*)out + m * s->padded);
  }
}

// Of a list: most rows of weights, inputs (with what pads them) and rows of activations that it serves.
enum {
  ISOFOLD_SPARSE_ROWS = 64,
  ISOFOLD_SPARSE_LIST = ISOFOLD_SPARSE_WHOLE8 * 64 + 64,
  ISOFOLD_SPARSE_LIST_FLOAT = ISOFOLD_SPARSE_CHUNK * 64 + 64,
  ISOFOLD_SPARSE_BLOCK = 256
};

// Where the values of a chunk of K stand, and what they are (sparse_many.py): int8, or 4 bytes each. The order is that in
// which rows of 8 bits are taken; one more is looked at, and whole vectors are written.
struct isofold_sparse_list {
  ISOFOLD_ALIGNED char copy[ISOFOLD_SPARSE_ROWS * ISOFOLD_SPARSE_LIST];
  ISOFOLD_ALIGNED uint16_t places[ISOFOLD_SPARSE_ROWS * ISOFOLD_SPARSE_LIST];
  int64_t counts[ISOFOLD_SPARSE_ROWS], at[ISOFOLD_SPARSE_ROWS];
  uint8_t order[2 * ISOFOLD_SPARSE_ROWS];
};

// Rows of weights first..first+rows of a list to come.
static inline void isofold_sparse_begin_list(const struct isofold_sparse* s, int64_t first, int64_t rows,
                                             struct isofold_sparse_list* l) {
  for (int64_t r = 0; r < rows; ++r)
    l->at[r] = s->layout == ISOFOLD_BITMASK || s->layout == ISOFOLD_1X4 ? s->offsets[first + r] : 0;
  for (int r = 0; r < 2 * ISOFOLD_SPARSE_ROWS; ++r) l->order[r] = (uint8_t)(r % ISOFOLD_SPARSE_ROWS);
}

// The next `words` words of them, from w on.
static inline void isofold_sparse_write_list(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                             int64_t first, int64_t rows, int64_t w, int64_t words,
                                             struct isofold_sparse_list* l) {
  enum { LIST = ISOFOLD_SPARSE_LIST, LIST_FLOAT = ISOFOLD_SPARSE_LIST_FLOAT };
  const int64_t* mask = (const int64_t*)s->places + first * s->words + w;
  if (s->layout == ISOFOLD_WINDOWS) {
    for (int64_t r = 0; r < rows; r += 16) {
      int64_t panel = (first + r) / 16, start = s->offsets[panel];
      const uint8_t* counts = (const uint8_t*)s->places + panel * s->words * 4 + w * 4;  // 16 of them for 4 words
      const uint8_t* places = (const uint8_t*)s->places + s->heads + start;
      k->sparse_windows_list(counts, places, (const int8_t*)s->values + start, words / 4, l->at + r,
                             l->places + r * LIST, (int8_t*)l->copy + r * LIST, LIST, l->counts + r);
    }
  } else if (isofold_sparse_is_group(s)) {
    int64_t inputs = isofold_sparse_block_inputs(s), blocks = s->words * 64 / inputs, width = s->layout == ISOFOLD_4_OF_8 ? 3 : 2;
    int64_t at = first * blocks + w * 64 / inputs;
    (s->layout == ISOFOLD_1_OF_4   ? k->sparse_1_4_list
     : s->layout == ISOFOLD_2_OF_4 ? k->sparse_2_4_list
                                   : k->sparse_4_8_list)(
        (const int8_t*)s->values + at * 64, (const uint8_t*)s->places + at * 8 * width, blocks, words * 64 / inputs,
        rows, l->places, (int8_t*)l->copy, LIST, l->counts);
  } else if (s->layout == ISOFOLD_1X4) {
    (s->expands ? k->sparse4x8_list : k->sparse4x8_list_plain)(mask, s->words, words, rows, (const int32_t*)s->values,
                                                              l->at, l->places, (int32_t*)l->copy, LIST_FLOAT,
                                                              l->counts);
  } else if (s->value == ISOFOLD_INT8) {
    (s->expands ? k->sparse8_list : k->sparse8_list_plain)(mask, s->words, words, rows, (const int8_t*)s->values, l->at,
                                                          l->places, (int8_t*)l->copy, LIST, l->counts);
  } else if (s->value == ISOFOLD_BFLOAT16) {
    (s->expands ? k->sparse16_list : k->sparse16_list_plain)(mask, s->words, words, rows, (const uint16_t*)s->values,
                                                            l->at, l->places, (float*)l->copy, LIST_FLOAT, l->counts);
  } else {
    (s->expands ? k->sparse_list : k->sparse_list_plain)(mask, s->words, words, rows, (const float*)s->values, l->at,
                                                        l->places, (float*)l->copy, LIST_FLOAT, l->counts);
  }
  if (s->size == 1 && s->expands) k->sparse_order(l->counts, rows, l->order);
}

// Rows first..last of an int8 bitmask against `rows` rows of activations (1, 2 or 4) at x.
static inline void isofold_sparse_few8(const struct isofold_kernels* k, const struct isofold_sparse* s, int64_t rows,
                                       const uint8_t* x, int64_t first, int64_t last, int32_t* t) {
  const int64_t* mask = (const int64_t*)s->places;
  const int8_t* values = (const int8_t*)s->values;
  const uint8_t* bytes = (const uint8_t*)(s->table + 256 * 8);
  if (s->expands && rows == 1) {
    int half = s->offsets[last] - s->offsets[first] <= ISOFOLD_SPARSE_HALF * s->words * (last - first);
    (half ? k->sparse8_gemv_low : k->sparse8_gemv_1)(x, s->padded, mask, s->words, values, s->offsets, first, last, t,
                                                     32, bytes, 0, mask);
    return;
  }
  void (*f)(const uint8_t*, int64_t, const int64_t*, int64_t, const int8_t*, const int32_t*, int64_t, int64_t, int32_t*,
            int64_t, const uint8_t*, int32_t);
  if (s->expands)
    f = rows == 4 ? k->sparse8_gemv_4 : k->sparse8_gemv_2;
  else
    f = rows == 4 ? k->sparse8_gemv_plain_4 : rows == 2 ? k->sparse8_gemv_plain_2 : k->sparse8_gemv_plain_1;
  f(x, s->padded, mask, s->words, values, s->offsets, first, last, t, 32, bytes, 0);
}

// The same of bitmasks whose cells take 4 bytes: floats, or (1x4) four codes, with int32 sums.
static inline void isofold_sparse_few4(const struct isofold_kernels* k, const struct isofold_sparse* s, int64_t rows,
                                       const void* x, int64_t first, int64_t last, void* t) {
  const int64_t* mask = (const int64_t*)s->places;
  if (s->layout == ISOFOLD_1X4) {
    (rows == 4 ? k->sparse4x8_gemv_4 : rows == 2 ? k->sparse4x8_gemv_2 : k->sparse4x8_gemv_1)(
        (const int32_t*)x, s->padded, mask, s->words, (const int32_t*)s->values, s->offsets, first, last, (int32_t*)t,
        32, s->table, 0);
  } else if (s->value == ISOFOLD_BFLOAT16) {
    void (*f)(const float*, int64_t, const int64_t*, int64_t, const uint16_t*, const int32_t*, int64_t, int64_t, float*,
              int64_t, const int32_t*, int32_t);
    if (s->expands)
      f = rows == 4 ? k->sparse16_gemv_4 : rows == 2 ? k->sparse16_gemv_2 : k->sparse16_gemv_1;
    else
      f = rows == 4 ? k->sparse16_gemv_plain_4 : rows == 2 ? k->sparse16_gemv_plain_2 : k->sparse16_gemv_plain_1;
    f((const float*)x, s->padded, mask, s->words, (const uint16_t*)s->values, s->offsets, first, last, (float*)t, 32,
      s->table, 0);
  } else {
    int low = s->offsets[last] - s->offsets[first] <= ISOFOLD_SPARSE_LOW * s->words * (last - first);
    (rows == 4                       ? k->sparse_gemv_4
     : rows == 2                     ? k->sparse_gemv_2
     : s->expands && low             ? k->sparse_gemv_low
                                     : k->sparse_gemv_1)((const float*)x, s->padded, mask, s->words,
                                                         (const float*)s->values, s->offsets, first, last, (float*)t,
                                                         32, s->table, 0);
  }
}

// Blocks of 16 rows: one panel against 1, 2 or 4 rows of activations.
static inline void isofold_sparse_few_blocks(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                             int64_t rows, const void* x, int64_t panel, void* t) {
  int64_t start = s->offsets[panel], count = s->offsets[panel + 1] - start;
  const uint16_t* places = (const uint16_t*)s->places + start;
  if (s->value == ISOFOLD_INT8)
    (rows == 4 ? k->blocks8_gemv_4 : rows == 2 ? k->blocks8_gemv_2 : k->blocks8_gemv_1)(
        (const int32_t*)x, s->padded, places, (const int32_t*)s->values + start * 16, count, (int32_t*)t, 32);
  else if (s->value == ISOFOLD_BFLOAT16)
    (rows == 4 ? k->blocks16_gemv_4 : rows == 2 ? k->blocks16_gemv_2 : k->blocks16_gemv_1)(
        (const float*)x, s->padded, places, (const uint16_t*)s->values + start * 16, count, (float*)t, 32);
  else
    (rows == 4 ? k->blocks_gemv_4 : rows == 2 ? k->blocks_gemv_2 : k->blocks_gemv_1)(
        (const float*)x, s->padded, places, (const float*)s->values + start * 16, count, (float*)t, 32);
}

// Rows of weights first..last against few rows of activations: sums t [m, 32].
static inline void isofold_sparse_few(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                      const struct isofold_sparse_call* c, int64_t first, int64_t last, float* t) {
  int grouped = isofold_sparse_is_group(s);
  if ((grouped || s->layout == ISOFOLD_WINDOWS) && !s->expands) {
    struct isofold_sparse_list l;
    memset(t, 0, (size_t)c->m * 32 * sizeof(float));
    isofold_sparse_begin_list(s, first, last - first, &l);
    for (int64_t w = 0; w < s->words; w += ISOFOLD_SPARSE_CHUNK8) {
      isofold_sparse_write_list(k, s, first, last - first, w, isofold_min(ISOFOLD_SPARSE_CHUNK8, s->words - w), &l);
      k->sparse8_dot((const uint8_t*)c->scratch + w * 64, s->padded, c->m, l.places, (const int8_t*)l.copy,
                     ISOFOLD_SPARSE_LIST, l.counts, last - first, (int32_t*)t, 32);
    }
    return;
  }
  for (int64_t m = 0, rows; m < c->m; m += rows) {
    const char* x = (const char*)c->scratch + m * s->padded * s->size;
    float* sums = t + m * 32;
    rows = c->m - m >= 4 ? 4 : c->m - m >= 2 ? 2 : 1;
    if (grouped) {
      int64_t blocks = s->words * 64 / isofold_sparse_block_inputs(s), width = s->layout == ISOFOLD_4_OF_8 ? 3 : 2;
      rows = 1;
      (s->layout == ISOFOLD_1_OF_4   ? k->sparse_1_4_gemv
       : s->layout == ISOFOLD_2_OF_4 ? k->sparse_2_4_gemv
                                     : k->sparse_4_8_gemv)(
          (const uint8_t*)x, (const int8_t*)s->values + first * blocks * 64,
          (const uint8_t*)s->places + first * blocks * 8 * width, blocks, last - first, (int32_t*)sums);
    } else if (s->layout == ISOFOLD_WINDOWS) {
      rows = 1;
      for (int64_t r = first; r < last; r += 16) {
        int64_t start = s->offsets[r / 16];
        const uint8_t* counts = (const uint8_t*)s->places + r / 16 * s->words * 4;
        const uint8_t* places = (const uint8_t*)s->places + s->heads + start;
        k->sparse_windows_gemv((const uint8_t*)x, s->words / 4, counts, places, (const int8_t*)s->values + start,
                               (const int64_t*)(s->table + ISOFOLD_SPARSE_LIVE), (int32_t*)sums + (r - first));
      }
    } else if (s->layout >= ISOFOLD_16X1) {
      for (int64_t r = first; r < last; r += 16) isofold_sparse_few_blocks(k, s, rows, x, r / 16, sums + (r - first));
    } else if (s->size == 1) {
      isofold_sparse_few8(k, s, rows, (const uint8_t*)x, first, last, (int32_t*)sums);
    } else {
      isofold_sparse_few4(k, s, rows, x, first, last, sums);
    }
  }
}

// Asks for the first chunk of rows begin..end of weights.
static inline void isofold_sparse_expect(const struct isofold_sparse* s, int64_t begin, int64_t end) {
  int64_t size = s->value == ISOFOLD_INT8 && s->layout == ISOFOLD_BITMASK ? 1 : s->value == ISOFOLD_BFLOAT16 ? 2 : 4;
  if (s->layout != ISOFOLD_BITMASK && s->layout != ISOFOLD_1X4) return;
  for (int64_t r = begin; r < end; ++r) {
    const char* values = (const char*)s->values + s->offsets[r] * size;
    isofold_prefetch_read((const int64_t*)s->places + r * s->words);
    isofold_prefetch_read(values);
    isofold_prefetch_read(values + 64);
  }
}

// Adds the products of `panels` panels of blocks of 16 rows and a block of transposed activations to acc.
static inline void isofold_sparse_many_blocks(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                              const void* xt, int64_t width, int64_t panel, int64_t panels, float* acc) {
  for (int64_t p = 0; p < panels; ++p) {
    int64_t start = s->offsets[panel + p], end = s->offsets[panel + p + 1];
    float* sums = acc + p * 16 * width;
    for (int64_t b = start; b < end; b += ISOFOLD_SPARSE_COLUMNS) {
      int64_t count = isofold_min(ISOFOLD_SPARSE_COLUMNS, end - b);
      const uint16_t* places = (const uint16_t*)s->places + b;
      if (s->value == ISOFOLD_INT8)
        (width == 64 ? k->blocks8_gemm_4 : width == 32 ? k->blocks8_gemm_2 : k->blocks8_gemm_1)(
            (const int32_t*)xt, places, (const int32_t*)s->values + b * 16, count, (int32_t*)sums);
      else if (s->value == ISOFOLD_BFLOAT16)
        (width == 64 ? k->blocks16_gemm_4 : width == 32 ? k->blocks16_gemm_2 : k->blocks16_gemm_1)(
            (const float*)xt, places, (const uint16_t*)s->values + b * 16, count, sums);
      else
        (width == 64 ? k->blocks_gemm_4 : width == 32 ? k->blocks_gemm_2 : k->blocks_gemm_1)(
            (const float*)xt, places, (const float*)s->values + b * 16, count, sums);
    }
  }
}

// The same of a list of `rows` rows of weights.
static inline void isofold_sparse_many_listed(const struct isofold_kernels* k, const struct isofold_sparse* s,
                                              const void* xt, int64_t width, const struct isofold_sparse_list* l,
                                              int64_t rows, float* acc) {
  enum { LIST = ISOFOLD_SPARSE_LIST, LIST_FLOAT = ISOFOLD_SPARSE_LIST_FLOAT };
  if (s->size == 1)
    (width == 128 ? k->sparse8_gemm_8 : k->sparse8_gemm_4)((const uint8_t*)xt, l->places, (const int8_t*)l->copy, LIST,
                                                           l->counts, l->order, rows, (int32_t*)acc);
  else if (s->quantized)
    (width == 64 ? k->sparse4x8_gemm_4 : width == 32 ? k->sparse4x8_gemm_2 : k->sparse4x8_gemm_1)(
        (const int32_t*)xt, l->places, (const int32_t*)l->copy, LIST_FLOAT, l->counts, rows, (int32_t*)acc);
  else
    (width == 64 ? k->sparse_gemm_4 : width == 32 ? k->sparse_gemm_2 : k->sparse_gemm_1)(
        (const float*)xt, l->places, (const float*)l->copy, LIST_FLOAT, l->counts, rows, acc);
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
  int64_t rows = panels * 16, panel = b->panel, chunk = ISOFOLD_SPARSE_CHUNK;
  if (s->layout >= ISOFOLD_16X1)
    chunk = s->words;
  else if (s->size == 1 && c->m > 64)
    chunk = ISOFOLD_SPARSE_WIDE8;
  else if (s->size == 1)
    chunk = s->words <= ISOFOLD_SPARSE_WHOLE8 ? s->words : (int64_t)ISOFOLD_SPARSE_CHUNK8;
  for (int64_t m0 = 0; m0 < c->m; m0 += ISOFOLD_SPARSE_BLOCK) {
    int64_t m1 = isofold_min(m0 + ISOFOLD_SPARSE_BLOCK, c->m);
    memset(acc, 0, (size_t)(isofold_ceildiv(m1 - m0, 128) * 128 * rows) * sizeof(float));
    isofold_sparse_begin_list(s, panel * 16, rows, &l);
    for (int64_t w = 0; w < s->words; w += chunk) {
      if (s->layout < ISOFOLD_16X1)
        isofold_sparse_write_list(k, s, panel * 16, rows, w, isofold_min(chunk, s->words - w), &l);
      for (int64_t m = m0, width; m < m1; m += width) {
        width = isofold_sparse_width(s, m1 - m);
        const char* xt = (const char*)c->scratch + (m * s->padded + w * 64 * width) * s->size;
        float* sums = acc + (m - m0) * rows;
        if (s->layout >= ISOFOLD_16X1)
          isofold_sparse_many_blocks(k, s, xt, width, panel, panels, sums);
        else
          isofold_sparse_many_listed(k, s, xt, width, &l, rows, sums);
      }
    }
    for (int64_t m = m0, width; m < m1; m += width) {
      width = isofold_sparse_width(s, m1 - m);
      for (int64_t p = 0; p < panels; p += 2) {
        const float* sums = acc + (m - m0) * rows + p * 16 * width;
        if (s->size == 1)
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

// int4: the block's panels against one or two rows of activations, which processors with AVX512-VBMI2 expand.
static inline void isofold_sparse_few_int4(const struct isofold_linear_block* b, const struct isofold_sparse* s,
                                           const struct isofold_sparse_call* c, float* t) {
  const struct isofold_kernels* k = b->k;
  const int64_t* mask = (const int64_t*)s->places;
  int64_t first = b->panel * 16, last = first + b->panels * 16, group = b->l->group_size;
  for (int64_t m = 0; m < c->m; ++m) {
    const uint8_t* x = (const uint8_t*)c->scratch + m * s->padded;
    const uint8_t* values = (const uint8_t*)s->values;
    const uint16_t* scale = (const uint16_t*)b->l->scale;
    if (group == 0)
      k->sparse4_gemv_pc(x, mask, s->words, values, s->offsets, first, last, scale, b->groups, group,
                         (int32_t*)t + m * 32, 0, mask);
    else
      (group == 32 ? k->sparse4_gemv_g32 : k->sparse4_gemv_g64)(x, mask, s->words, values, s->offsets, first, last,
                                                                scale, b->groups, group, t + m * 32, 0, mask);
  }
  isofold_linear_finish(b, 0, c->m, t);
}

// The same of pairs of panels.
static inline void isofold_sparse_few_panels(const struct isofold_linear_block* b, const struct isofold_sparse* s,
                                             const struct isofold_sparse_call* c, float* t) {
  const struct isofold_kernels* k = b->k;
  int64_t pair = b->panel / 2, grouped = b->l->group_size != 0, group = grouped ? b->l->group_size : s->words * 4;
  const int64_t* mask = (const int64_t*)s->places + pair * 2 * s->words;
  const uint8_t* values = (const uint8_t*)s->values + s->offsets[pair];
  int64_t lds = b->panels == 2 ? b->groups * 16 : 0;  // one panel: its scales once more, for rows that are not there
  const uint16_t* scale = (const uint16_t*)b->l->scale + b->panel * b->groups * 16;
  for (int64_t m = 0, rows; m < c->m; m += rows) {
    const int32_t* x = (const int32_t*)((const char*)c->scratch + m * s->padded);
    rows = c->m - m >= 4 ? 4 : c->m - m >= 2 ? 2 : 1;
    if (grouped)
      (rows == 4 ? k->sparse_panel_gemv_g_4 : rows == 2 ? k->sparse_panel_gemv_g_2 : k->sparse_panel_gemv_g_1)(
          x, s->padded / 4, mask, values, scale, lds, b->groups, group, t + m * 32, 32, 0);
    else
      (rows == 4 ? k->sparse_panel_gemv_pc_4 : rows == 2 ? k->sparse_panel_gemv_pc_2 : k->sparse_panel_gemv_pc_1)(
          x, s->padded / 4, mask, values, scale, 0, 1, group, (int32_t*)t + m * 32, 32, 0);
  }
  isofold_linear_finish(b, 0, c->m, t);
}

// int4: inputs k0..k0+inputs of the block's panels decoded as the dense kernels unpack int4, 64 * `chunks` of each (what is
// behind the matrix is zero); `at`: where the next ones stand in values, for 32 rows.
static inline void isofold_sparse_decode(const struct isofold_linear_block* b, const struct isofold_sparse* s, int64_t k0,
                                         int64_t chunks, int64_t* at, int8_t* out) {
  const struct isofold_kernels* k = b->k;
  const int64_t* mask = (const int64_t*)s->places;
  const uint8_t* values = (const uint8_t*)s->values;
  if (s->layout == ISOFOLD_PANELS) {
    if (k0 == 0) at[0] = at[1] = s->offsets[b->panel / 2];
    (s->expands ? k->sparse_panel_decode : k->sparse_panel_decode_plain)(mask + b->panel * s->words + k0 / 2, chunks * 16,
                                                                       values, at, out, 0);
    return;
  }
  int64_t words = isofold_min(chunks, s->words - k0 / 64);
  for (int64_t r = 0; k0 == 0 && r < 16 * b->panels; ++r) at[r] = s->offsets[b->panel * 16 + r];
  for (int64_t p = 0; p < b->panels; ++p, out += chunks * 1024) {
    (s->expands ? k->sparse4_decode : k->sparse4_decode_plain)(mask + (b->panel + p) * 16 * s->words + k0 / 64, s->words,
                                                             words, values, at + 16 * p, out, 0);
    memset(out + words * 1024, 0, (size_t)(chunks - words) * 1024);
  }
}

// int4: the block's panels decoded, and the dense tiles.
static inline void isofold_sparse_tiles_int4(struct isofold_linear_block* b, const struct isofold_sparse* s,
                                             const struct isofold_sparse_call* c) {
  ISOFOLD_ALIGNED int8_t codes[2 * ISOFOLD_UNPACK * 16];
  ISOFOLD_ALIGNED float t[ISOFOLD_ROW_BLOCK * 32];
  const struct isofold_linear* l = b->l;
  int64_t align = l->group_size > 32 ? l->group_size : 32, all = isofold_ceildiv(s->k, align) * align;
  for (int64_t m0 = 0; m0 < c->m; m0 += ISOFOLD_ROW_BLOCK) {
    int64_t m1 = isofold_min(m0 + ISOFOLD_ROW_BLOCK, c->m), at[32];
    for (int64_t k0 = 0; k0 < all; k0 += ISOFOLD_UNPACK) {
      int64_t inputs = isofold_min(ISOFOLD_UNPACK, all - k0), whole = isofold_ceildiv(inputs, 64) * 64;
      isofold_sparse_decode(b, s, k0, whole / 64, at, codes);
      for (int64_t m = m0, rows; m < m1; m += rows) {
        rows = isofold_tile_rows(m1 - m);
        if (k0 + inputs == all) isofold_linear_expect(b, m, rows);
        isofold_linear_tile(b, m, rows, k0, inputs, codes, whole * 16, codes, 0, t + (m - m0) * 32);
      }
    }
    isofold_linear_finish(b, m0, m1 - m0, t);
  }
}

// Asks for what the epilogue of a block will read and write, before its few rows are computed: with one row each line of
// it was last used a whole matrix ago.
static inline void isofold_sparse_expect_few(const struct isofold_linear_block* b, const struct isofold_sparse* s) {
  const struct isofold_linear* l = b->l;
  int64_t from = b->panel * 16;
  isofold_linear_expect(b, 0, b->c->m);
  for (int64_t p = 0; p < b->panels; ++p) {
    if (s->quantized) isofold_prefetch_read(b->wsum + p * 16);
    if (l->bias) isofold_prefetch_read(l->bias + (l->gated ? from : isofold_min(from, l->n)) + p * 16);
    if (s->quantized && !l->group_size) isofold_prefetch_read((const float*)l->scale + from + p * 16);
  }
}

// Tasks begin..end.
static inline void isofold_sparse_run(const struct isofold_kernels* k, enum isofold_isa isa,
                                      const struct isofold_linear* l, const struct isofold_sparse* s,
                                      const struct isofold_sparse_call* c, int64_t begin, int64_t end) {
  ISOFOLD_ALIGNED float t[ISOFOLD_SPARSE_GEMV8_ROWS * 32];  // int32 where quantized
  ISOFOLD_ALIGNED float zeros[32] = {0};
  const float identity[2] = {1.0f, 0.0f};
  int narrow = s->value == ISOFOLD_INT4;
  struct isofold_linear linear = *l;
  struct isofold_linear_call call = {0, s->quantized ? c->params : identity, c->residual, c->y, c->m,
                                     s->quantized ? c->static_params : 1, 0};
  struct isofold_linear_block b;
  int64_t all = isofold_linear_panels(l);
  linear.zero = 0;
  linear.bits = narrow ? 4 : 8;
  linear.kp = s->padded;
  if (!s->quantized) linear.group_size = 32;  // not 0: epilogue_g, for sums that need no scale
  if (narrow) call.u = (const uint8_t*)c->scratch;
  b.k = k;
  b.l = &linear;
  b.c = &call;
  b.groups = narrow && l->group_size ? isofold_ceildiv(s->k, l->group_size) : 1;
  b.usum = 0;
  b.usum_int = 0;
  b.unit = narrow ? isofold_linear_unit(4, isa) : 1;
  isofold_linear_select(&b);
  for (int64_t task = begin; task < end; ++task) {
    b.panel = task * 2;
    b.panels = isofold_min(2, all - b.panel);
    b.wsum = s->quantized ? l->wsum + b.panel * 16 : zeros;
    int64_t first = b.panel * 16, last = first + b.panels * 16;
    if (c->m <= ISOFOLD_SPARSE_GEMV8_ROWS) isofold_sparse_expect_few(&b, s);
    if (s->layout == ISOFOLD_PANELS && s->expands && c->m <= ISOFOLD_SPARSE_PANEL_ROWS) {
      isofold_sparse_few_panels(&b, s, c, t);
    } else if (s->layout == ISOFOLD_BITMASK && narrow && s->expands && c->m <= ISOFOLD_SPARSE_GEMV4_ROWS) {
      isofold_sparse_few_int4(&b, s, c, t);
    } else if (narrow) {
      isofold_sparse_tiles_int4(&b, s, c);
    } else if (isofold_sparse_is_few(s, c->m)) {
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
