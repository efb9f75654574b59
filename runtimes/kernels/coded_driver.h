// Drives the kernels of coded.py; tasks, tiles and epilogues are those of linear_float_driver.h.
#ifndef ISOFOLD_CODED_DRIVER_H
#define ISOFOLD_CODED_DRIVER_H

#include "linear_float_driver.h"

// The orders of ELEMENTS and SCALES in coded.py.
enum isofold_coded_element {
  ISOFOLD_CODED_TABLE,
  ISOFOLD_CODED_E4M3,
  ISOFOLD_CODED_E5M2,
  ISOFOLD_CODED_E3M2,
  ISOFOLD_CODED_E2M3
};
enum isofold_coded_scale { ISOFOLD_SCALE_CHANNEL, ISOFOLD_SCALE_FLOAT16, ISOFOLD_SCALE_E8M0, ISOFOLD_SCALE_E4M3 };

// A coded linear. `linear` comes first: its zero is null, its wsum and bits are unused.
struct isofold_coded {
  struct isofold_linear linear;
  const float* table;  // 16 entries; read for ISOFOLD_CODED_TABLE only, but never null
  int32_t element;     // enum isofold_coded_element
  int32_t scale;       // enum isofold_coded_scale
};

static inline int64_t isofold_coded_bits(const struct isofold_coded* c) {
  return c->element == ISOFOLD_CODED_TABLE ? 4 : c->element <= ISOFOLD_CODED_E5M2 ? 8 : 6;
}

// Bytes of a stored scale.
static inline int64_t isofold_coded_scale_bytes(const struct isofold_coded* c) {
  return c->scale == ISOFOLD_SCALE_CHANNEL ? 4 : c->scale == ISOFOLD_SCALE_FLOAT16 ? 2 : 1;
}

// What the kernels' numbers are to be multiplied by: UNIT in coded.py, and 2^8 for scales of E4M3.
static inline float isofold_coded_unit(const struct isofold_coded* c) {
  static const float units[5] = {1.0f, 256.0f, 1.0f, 4096.0f, 16384.0f};
  return units[c->element] * (c->scale == ISOFOLD_SCALE_E4M3 ? 256.0f : 1.0f);
}

struct isofold_coded_kernels {
  void (*gemv[3])(const float*, int64_t, const uint8_t*, const uint8_t*, const float*, int64_t, int64_t, int64_t,
                  float*, int64_t);  // rows 4, 2, 1
  void (*unpack)(const uint8_t*, const uint8_t*, const float*, int64_t, int64_t, int64_t, float*);
};

static inline struct isofold_coded_kernels isofold_coded_select(const struct isofold_kernels* k,
                                                                const struct isofold_coded* c) {
#define ISOFOLD_CODED(E, S) \
  {{k->coded_gemv_##E##_##S##_4, k->coded_gemv_##E##_##S##_2, k->coded_gemv_##E##_##S##_1}, k->coded_unpack_##E##_##S}
#define ISOFOLD_NONE_CODED {{0, 0, 0}, 0}
  const struct isofold_coded_kernels all[5][4] = {
      {ISOFOLD_CODED(table, pc), ISOFOLD_CODED(table, g), ISOFOLD_CODED(table, e8m0), ISOFOLD_CODED(table, e4m3)},
      {ISOFOLD_CODED(e4m3, pc), ISOFOLD_CODED(e4m3, g), ISOFOLD_CODED(e4m3, e8m0), ISOFOLD_NONE_CODED},
      {ISOFOLD_CODED(e5m2, pc), ISOFOLD_CODED(e5m2, g), ISOFOLD_CODED(e5m2, e8m0), ISOFOLD_NONE_CODED},
      {ISOFOLD_NONE_CODED, ISOFOLD_NONE_CODED, ISOFOLD_CODED(e3m2, e8m0), ISOFOLD_NONE_CODED},
      {ISOFOLD_NONE_CODED, ISOFOLD_NONE_CODED, ISOFOLD_CODED(e2m3, e8m0), ISOFOLD_NONE_CODED},
  };
#undef ISOFOLD_NONE_CODED
#undef ISOFOLD_CODED
  return all[c->element][c->scale];
}

static inline const uint8_t* isofold_coded_weight(const struct isofold_coded* c, int64_t panel) {
  return (const uint8_t*)c->linear.weight + panel * c->linear.kp * 2 * isofold_coded_bits(c);
}

static inline const uint8_t* isofold_coded_scales(const struct isofold_coded* c, int64_t panel) {
  return (const uint8_t*)c->linear.scale + panel * isofold_linear_groups(&c->linear) * 16 * isofold_coded_scale_bytes(c);
}

// As isofold_float_gemv; `l` is the first member of a struct isofold_coded.
static inline void isofold_coded_gemv(const struct isofold_kernels* k, const struct isofold_linear* l, int64_t panel,
                                      const float* x, int64_t ldx, int64_t rows, int64_t begin, int64_t end, float* t) {
  const struct isofold_coded* c = (const struct isofold_coded*)l;
  isofold_coded_select(k, c).gemv[rows == 4 ? 0 : rows == 2 ? 1 : 2](
      x, ldx, isofold_coded_weight(c, panel), isofold_coded_scales(c, panel), c->table, begin, end,
      l->kp / isofold_linear_groups(l), t, 32);
}

// As isofold_float_unpack.
static inline void isofold_coded_unpack(const struct isofold_kernels* k, const struct isofold_linear* l, int64_t panel,
                                        int64_t begin, int64_t end, float* out) {
  const struct isofold_coded* c = (const struct isofold_coded*)l;
  isofold_coded_select(k, c).unpack(isofold_coded_weight(c, panel), isofold_coded_scales(c, panel), c->table, begin, end,
                                    l->kp / isofold_linear_groups(l), out);
}

// Tasks begin..end (isofold_linear_float_tasks of `linear`).
static inline void isofold_coded_run(const struct isofold_kernels* k, const struct isofold_coded* c,
                                     const struct isofold_linear_float_call* call, int64_t begin, int64_t end) {
  isofold_float_run(k, &c->linear, call, begin, end, c->linear.scale_multiplier * isofold_coded_unit(c),
                    isofold_coded_gemv, isofold_coded_unpack);
}

#endif  // ISOFOLD_CODED_DRIVER_H
