// Drives the kernels of hadamard.py: y = x H, block by block, H as in compiler/hadamard.py.
#ifndef ISOFOLD_HADAMARD_DRIVER_H
#define ISOFOLD_HADAMARD_DRIVER_H

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#include "hadamard_signs.h"

#include "linear_driver.h"

enum { ISOFOLD_HADAMARD_MAX_CORES = 8 };  // 12^8 is larger than any row

struct isofold_hadamard {
  int64_t size;   // of a block: product of the orders
  int64_t width;  // the power of two, 1 where there is none
  int64_t cores;
  int64_t order[ISOFOLD_HADAMARD_MAX_CORES];
  const float* matrix[ISOFOLD_HADAMARD_MAX_CORES];  // [order, padded], zeros beyond `order`
  float scale;
};

static inline int64_t isofold_hadamard_padded(int64_t order) { return (order + 15) / 16 * 16; }

// Position of a core in the table of signs, or -1.
static inline int isofold_hadamard_find(int64_t order) {
  for (int i = 0; i < ISOFOLD_HADAMARD_CORES; ++i)
    if (isofold_hadamard_signs[i].order == order) return i;
  return -1;
}

// The matrix of the core at `position` (transposed or not) as float [order, padded].
static inline void isofold_hadamard_expand(int position, int transpose, float* matrix) {
  int64_t order = isofold_hadamard_signs[position].order, padded = isofold_hadamard_padded(order);
  const uint8_t* bits = isofold_hadamard_signs[position].bits;
  memset(matrix, 0, (size_t)(order * padded) * sizeof(float));
  for (int64_t i = 0; i < order; ++i)
    for (int64_t j = 0; j < order; ++j) {
      int64_t bit = i * order + j;
      float sign = bits[bit / 8] >> (bit % 8) & 1 ? -1.0f : 1.0f;
      matrix[transpose ? j * padded + i : i * padded + j] = sign;
    }
}

// The power of two on `blocks` blocks of `width` floats.
static inline void isofold_hadamard_power(const struct isofold_kernels* k, enum isofold_isa isa, const float* x,
                                          float* y, int64_t blocks, int64_t width, float scale) {
  int64_t most = isa == ISOFOLD_V4 ? 16 : 8, span = width < most * most ? width : most * most;
  k->hadamard_first(x, y, blocks * (width / span), span, scale);
  while (span < width) {
    int64_t radix = width / span < most ? width / span : most;
    k->hadamard_next(y, blocks * (width / (span * radix)), radix, span);
    span *= radix;
  }
}

// One block; scratch: `size` floats where there are cores, else unused.
static inline void isofold_hadamard_block(const struct isofold_kernels* k, enum isofold_isa isa,
                                          const struct isofold_hadamard* h, const float* x, float* y, float* scratch) {
  int64_t steps = h->cores + (h->width > 1), outer = 1, inner = h->size;
  for (int64_t i = 0; i < steps; ++i) {
    float* to = (steps - 1 - i) % 2 == 0 ? y : scratch;
    float scale = i == steps - 1 ? h->scale : 1.0f;
    if (i == h->cores) {
      isofold_hadamard_power(k, isa, x, to, outer, h->width, scale);
    } else {
      int64_t order = h->order[i];
      inner /= order;
      (inner % 4 ? k->hadamard_columns : k->hadamard_core)(x, h->matrix[i], to, outer, order,
                                                           isofold_hadamard_padded(order), inner, scale);
      outer *= order;
    }
    x = to;
  }
}

// `blocks` blocks after one another; x and y may not overlap.
static inline void isofold_hadamard_run(const struct isofold_kernels* k, enum isofold_isa isa,
                                        const struct isofold_hadamard* h, const float* x, float* y, int64_t blocks,
                                        float* scratch) {
  if (h->size == 1) {
    memcpy(y, x, (size_t)blocks * sizeof(float));
  } else if (h->cores == 0 && h->width <= 64) {  // whole transforms in registers: one call for all
    isofold_hadamard_power(k, isa, x, y, blocks, h->width, h->scale);
  } else {
    for (int64_t b = 0; b < blocks; ++b)
      isofold_hadamard_block(k, isa, h, x + b * h->size, y + b * h->size, scratch);
  }
}

#endif  // ISOFOLD_HADAMARD_DRIVER_H
