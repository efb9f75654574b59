// Drives the kernel of dense.py; the counterpart of linear_float_driver.h for float32 weights, with the same tasks (32
// output features, gated 16, by up to 128 rows) and the same epilogues. No allocation, no locks, no state.
#ifndef ISOFOLD_DENSE_DRIVER_H
#define ISOFOLD_DENSE_DRIVER_H

#include "linear_float_driver.h"

enum { ISOFOLD_DENSE_PANEL = 32 };  // features of a panel: PANEL in dense.py

// A dense linear is a struct isofold_linear whose weight is float32 [blocks, k, 32], kp is k (not padded), and whose bits,
// scale, zero, wsum and group_size are unused. Gated: columns 0..15 of a block are the gate, 16..31 the factor.
static inline int64_t isofold_dense_blocks(const struct isofold_linear* l) {
  return isofold_ceildiv(isofold_linear_panels(l), 2);
}

static inline int64_t isofold_dense_tasks(const struct isofold_linear* l, int64_t m) {
  return isofold_linear_tasks(l, m);
}

// Tasks begin..end.
static inline void isofold_dense_run(const struct isofold_kernels* k, const struct isofold_linear* l,
                                     const struct isofold_linear_float_call* c, int64_t begin, int64_t end) {
  ISOFOLD_ALIGNED float t[ISOFOLD_ROW_BLOCK * ISOFOLD_DENSE_PANEL];
  struct isofold_float_epilogue e;
  int64_t all = isofold_linear_panels(l), blocks = isofold_dense_blocks(l), height = isofold_linear_row_block(l, c->m);
  isofold_float_epilogue_start(&e, k, l, c, 1.0f);
  for (int64_t task = begin; task < end; ++task) {
    int64_t block = task % blocks, m0 = task / blocks * height, m1 = isofold_min(m0 + height, c->m);
    const float* weight = (const float*)l->weight + block * c->k * ISOFOLD_DENSE_PANEL;
    e.block.panel = block * 2;
    e.block.panels = isofold_min(2, all - e.block.panel);
    for (int64_t from = 0; from < c->k; from += k->dense_inputs_linear_dense) {
      int64_t inputs = isofold_min(k->dense_inputs_linear_dense, c->k - from);
      const float *x = c->x + m0 * c->k + from, *w = weight + from * ISOFOLD_DENSE_PANEL;
      if (from + inputs == c->k) isofold_linear_expect(&e.block, m0, m1 - m0);
      k->dense_block(x, c->k, w, ISOFOLD_DENSE_PANEL, inputs, w + inputs * ISOFOLD_DENSE_PANEL, t, m1 - m0, from != 0);
    }
    isofold_linear_finish(&e.block, m0, m1 - m0, t);
  }
}

#endif  // ISOFOLD_DENSE_DRIVER_H
