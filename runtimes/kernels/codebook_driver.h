// Drives the kernels of codebook.py; tasks, tiles and epilogues are those of linear_float_driver.h.
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

#endif  // ISOFOLD_CODEBOOK_DRIVER_H
