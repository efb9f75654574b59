// Drives the kernels of linear_float.py; the counterpart of linear_driver.h for float activations, with the same tasks.
#ifndef ISOFOLD_LINEAR_FLOAT_DRIVER_H
#define ISOFOLD_LINEAR_FLOAT_DRIVER_H

#include "linear_driver.h"

// One call of a packed linear (struct isofold_linear, wsum unused) on float activations.
struct isofold_linear_float_call {
  const float* x;         // [m, k]
  const float* residual;  // [m, n] or null; may not overlap y
  float* y;               // [m, n]
  int64_t m;
  int64_t k;              // real inputs; linear.kp is k rounded up
};

enum {
  ISOFOLD_FLOAT_CHUNK = 128,    // inputs dequantized at a time: 16 KB, half of the first-level cache
  ISOFOLD_FLOAT_GEMV_ROWS = 4,  // up to here weights are dequantized in registers
  ISOFOLD_FLOAT_BLOCK = 32
};

static inline int64_t isofold_linear_float_tasks(const struct isofold_linear* l, int64_t m) {
  return isofold_linear_tasks(l, m);
}

// Blocks begin..end of one panel against rows (1, 2 or 4) of x (which points at the first of these blocks).
static inline void isofold_float_gemv(const struct isofold_kernels* k, const struct isofold_linear* l, int64_t panel,
                                      const float* x, int64_t ldx, int64_t rows, int64_t begin, int64_t end, float* t) {
  int64_t groups = isofold_linear_groups(l), at = panel * groups * 16, group = l->kp / groups;
  int r = rows == 4 ? 0 : rows == 2 ? 1 : 2;
  const uint8_t* w = (const uint8_t*)l->weight + panel * l->kp * 2 * l->bits;
  const float* channel = (const float*)l->scale + at;
  const uint16_t* scale = (const uint16_t*)l->scale + at;
#define ISOFOLD_FLOAT_GEMVS(B, M) {k->float_gemv##B##_##M##_4, k->float_gemv##B##_##M##_2, k->float_gemv##B##_##M##_1}
#define ISOFOLD_FLOAT_CHANNEL(M) {ISOFOLD_FLOAT_GEMVS(4, M), ISOFOLD_FLOAT_GEMVS(8, M)}
#define ISOFOLD_FLOAT_GROUPS(M) \
  {ISOFOLD_FLOAT_GEMVS(2, M), ISOFOLD_FLOAT_GEMVS(3, M), ISOFOLD_FLOAT_GEMVS(4, M), ISOFOLD_FLOAT_GEMVS(8, M)}
  int width = l->bits == 8 ? 3 : l->bits - 2;
  if (l->group_size == 0 && !l->zero) {
    void (*const f[2][3])(const float*, int64_t, const uint8_t*, const float*, int64_t, int64_t, int64_t, float*,
                          int64_t) = ISOFOLD_FLOAT_CHANNEL(pc);
    f[l->bits == 8][r](x, ldx, w, channel, begin, end, group, t, 32);
  } else if (l->group_size == 0) {
    void (*const f[2][3])(const float*, int64_t, const uint8_t*, const float*, const int8_t*, int64_t, int64_t, int64_t,
                          float*, int64_t) = ISOFOLD_FLOAT_CHANNEL(pcz);
    f[l->bits == 8][r](x, ldx, w, channel, l->zero + at, begin, end, group, t, 32);
  } else if (!l->zero) {
    void (*const f[4][3])(const float*, int64_t, const uint8_t*, const uint16_t*, int64_t, int64_t, int64_t, float*,
                          int64_t) = ISOFOLD_FLOAT_GROUPS(g);
    f[width][r](x, ldx, w, scale, begin, end, group, t, 32);
  } else {
    void (*const f[4][3])(const float*, int64_t, const uint8_t*, const uint16_t*, const int8_t*, int64_t, int64_t,
                          int64_t, float*, int64_t) = ISOFOLD_FLOAT_GROUPS(gz);
    f[width][r](x, ldx, w, scale, l->zero + at, begin, end, group, t, 32);
  }
#undef ISOFOLD_FLOAT_GROUPS
#undef ISOFOLD_FLOAT_CHANNEL
#undef ISOFOLD_FLOAT_GEMVS
}

// Blocks begin..end of one panel, dequantized to out [inputs, 32].
static inline void isofold_float_unpack(const struct isofold_kernels* k, const struct isofold_linear* l, int64_t panel,
                                        int64_t begin, int64_t end, float* out) {
  int64_t groups = isofold_linear_groups(l), at = panel * groups * 16, group = l->kp / groups;
  const uint8_t* w = (const uint8_t*)l->weight + panel * l->kp * 2 * l->bits;
  const float* channel = (const float*)l->scale + at;
  const uint16_t* scale = (const uint16_t*)l->scale + at;
  int width = l->bits == 8 ? 3 : l->bits - 2;
  if (l->group_size == 0 && !l->zero) {
    (l->bits == 8 ? k->float_unpack8_pc : k->float_unpack4_pc)(w, channel, begin, end, group, out);
  } else if (l->group_size == 0) {
    (l->bits == 8 ? k->float_unpack8_pcz : k->float_unpack4_pcz)(w, channel, l->zero + at, begin, end, group, out);
  } else if (!l->zero) {
    void (*const f[4])(const uint8_t*, const uint16_t*, int64_t, int64_t, int64_t, float*) = {
        k->float_unpack2_g, k->float_unpack3_g, k->float_unpack4_g, k->float_unpack8_g};
    f[width](w, scale, begin, end, group, out);
  } else {
    void (*const f[4])(const uint8_t*, const uint16_t*, const int8_t*, int64_t, int64_t, int64_t, float*) = {
        k->float_unpack2_gz, k->float_unpack3_gz, k->float_unpack4_gz, k->float_unpack8_gz};
    f[width](w, scale, l->zero + at, begin, end, group, out);
  }
}

// The last, partial block of rows m..m+rows with zeros behind it: [rows, 32].
static inline void isofold_float_tail(const struct isofold_linear_float_call* c, int64_t m, int64_t rows, float* tail) {
  int64_t from = c->k / ISOFOLD_FLOAT_BLOCK * ISOFOLD_FLOAT_BLOCK, left = c->k - from;
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(tail + r * ISOFOLD_FLOAT_BLOCK, c->x + (m + r) * c->k + from, (size_t)left * sizeof(float));
    memset(tail + r * ISOFOLD_FLOAT_BLOCK + left, 0, (size_t)(ISOFOLD_FLOAT_BLOCK - left) * sizeof(float));
  }
}

// How the weights of a format become floats: as isofold_float_gemv and isofold_float_unpack.
typedef void (*isofold_float_gemv_of)(const struct isofold_kernels*, const struct isofold_linear*, int64_t, const float*,
                                      int64_t, int64_t, int64_t, int64_t, float*);
typedef void (*isofold_float_unpack_of)(const struct isofold_kernels*, const struct isofold_linear*, int64_t, int64_t,
                                        int64_t, float*);

// The epilogue's view of a linear whose sums are floats already scaled: no zero points, no pairs of activations.
struct isofold_float_epilogue {
  struct isofold_linear linear;
  struct isofold_linear_call call;
  struct isofold_linear_block block;  // panel and panels are the caller's
  ISOFOLD_ALIGNED float zeros[32];
  float identity[2];
};

static inline void isofold_float_epilogue_start(struct isofold_float_epilogue* e, const struct isofold_kernels* k,
                                                const struct isofold_linear* l,
                                                const struct isofold_linear_float_call* c, float multiplier) {
  struct isofold_linear_call call = {0, e->identity, c->residual, c->y, c->m, 1, 0};
  memset(e->zeros, 0, sizeof e->zeros);
  e->identity[0] = 1.0f;
  e->identity[1] = 0.0f;
  e->linear = *l;
  e->linear.group_size = l->kp;  // not 0: epilogue_g
  e->linear.zero = 0;
  e->linear.scale_multiplier = multiplier;
  e->call = call;
  e->block.k = k;
  e->block.l = &e->linear;
  e->block.c = &e->call;
  e->block.groups = 1;
  e->block.usum = 0;
  e->block.usum_int = 0;
  e->block.wsum = e->zeros;
  e->block.unit = 1;
  isofold_linear_select(&e->block);
}

// Tasks begin..end of any linear on float activations; `multiplier` is applied to the sums.
static inline void isofold_float_run(const struct isofold_kernels* k, const struct isofold_linear* l,
                                     const struct isofold_linear_float_call* c, int64_t begin, int64_t end,
                                     float multiplier, isofold_float_gemv_of gemv, isofold_float_unpack_of unpack) {
  ISOFOLD_ALIGNED float weights[ISOFOLD_FLOAT_CHUNK * 32];
  ISOFOLD_ALIGNED float t[ISOFOLD_ROW_BLOCK * 32];
  ISOFOLD_ALIGNED float tail[ISOFOLD_ROW_BLOCK * ISOFOLD_FLOAT_BLOCK];
  struct isofold_float_epilogue e;
  int64_t all = isofold_linear_panels(l), blocks = isofold_ceildiv(all, 2), height = isofold_linear_row_block(l, c->m);
  int64_t whole = c->k / ISOFOLD_FLOAT_BLOCK, padded = isofold_ceildiv(c->k, ISOFOLD_FLOAT_BLOCK);
  isofold_float_epilogue_start(&e, k, l, c, multiplier);
  for (int64_t task = begin; task < end; ++task) {
    int64_t m0 = task / blocks * height, m1 = isofold_min(m0 + height, c->m);
    e.block.panel = task % blocks * 2;
    e.block.panels = isofold_min(2, all - e.block.panel);
    memset(t, 0, (size_t)(m1 - m0) * 32 * sizeof(float));
    if (padded > whole) isofold_float_tail(c, m0, m1 - m0, tail);
    float factor = l->outliers ? l->outliers->multiplier / multiplier : 0.0f;
    if (m1 - m0 <= ISOFOLD_FLOAT_GEMV_ROWS) {
      int64_t bytes = l->kp * 2 * l->bits, streamed = isofold_linear_streamed(k, l->bits, 1);
      for (int64_t p = 0; p < e.block.panels; ++p) {
        int64_t panel = e.block.panel + p;
        for (int64_t m = m0; m < m1;) {
          int64_t rows = isofold_tile_rows(m1 - m);
          float* sums = t + (m - m0) * 32 + 16 * p;
          if (whole) gemv(k, l, panel, c->x + m * c->k, c->k, rows, 0, whole, sums);
          if (padded > whole)
            gemv(k, l, panel, tail + (m - m0) * ISOFOLD_FLOAT_BLOCK, ISOFOLD_FLOAT_BLOCK, rows, whole, padded, sums);
          m += rows;
        }
        if (!l->outliers) continue;
        const char* next = (const char*)l->weight + (panel + 1) * bytes + streamed;
        struct isofold_outlier_ahead ahead = isofold_linear_ahead(l, panel, 1, next);
        isofold_outlier_gemv(k, l->outliers, panel, factor, c->x + m0 * c->k, 0, c->k, m1 - m0, &ahead, t + 16 * p);
      }
    } else {
      int64_t cursors[2][16] = {{0}};
      for (int64_t from = 0; from < padded;) {
        int64_t to = from == whole ? padded : isofold_min(from + ISOFOLD_FLOAT_CHUNK / ISOFOLD_FLOAT_BLOCK, whole);
        int64_t inputs = (to - from) * ISOFOLD_FLOAT_BLOCK;
        if (e.block.panels == 1) memset(weights, 0, sizeof weights);
        for (int64_t p = 0; p < e.block.panels; ++p) unpack(k, l, e.block.panel + p, from, to, weights + 16 * p);
        if (l->outliers)
          for (int64_t p = 0; p < e.block.panels; ++p) {
            const struct isofold_outliers* o = l->outliers;
            int64_t at = o->offsets[e.block.panel + p], steps = o->offsets[e.block.panel + p + 1] - at;
            if (steps)
              k->outlier_merge(o->places + at * 16, o->values + at * 16, steps, factor, cursors[p],
                               from * ISOFOLD_FLOAT_BLOCK, to * ISOFOLD_FLOAT_BLOCK, weights + 16 * p);
          }
        for (int64_t m = m0; m < m1;) {
          int64_t rows = isofold_tile_rows(m1 - m);
          int partial = from == whole;
          const float* x = partial ? tail + (m - m0) * ISOFOLD_FLOAT_BLOCK : c->x + m * c->k + from * ISOFOLD_FLOAT_BLOCK;
          void (*tile)(const float*, int64_t, const float*, int64_t, float*, int64_t) =
              rows == 8 ? k->float_tile_8 : rows == 4 ? k->float_tile_4 : rows == 2 ? k->float_tile_2 : k->float_tile_1;
          tile(x, partial ? (int64_t)ISOFOLD_FLOAT_BLOCK : c->k, weights, inputs, t + (m - m0) * 32, 32);
          m += rows;
        }
        from = to;
      }
    }
    isofold_linear_finish(&e.block, m0, m1 - m0, t);
  }
}

// Tasks begin..end.
static inline void isofold_linear_float_run(const struct isofold_kernels* k, const struct isofold_linear* l,
                                            const struct isofold_linear_float_call* c, int64_t begin, int64_t end) {
  isofold_float_run(k, l, c, begin, end, l->scale_multiplier, isofold_float_gemv, isofold_float_unpack);
}

#endif  // ISOFOLD_LINEAR_FLOAT_DRIVER_H
